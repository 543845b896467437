//! From an address back to the Services and endpoints that have it.
//!
//! The table's own index answers: a second one, with names written out, would take more memory than all other answers.

use std::collections::BTreeSet;

use ipnet::IpNet;
use services::{Owner, ServiceTable};

use crate::compile::{Held, labels, record};
use crate::wire::{QUESTION_NAME, WireName, kind};
use crate::zone::Found;

/// The names under in-addr.arpa and ip6.arpa that the table knows.
#[derive(Clone)]
pub struct ReverseZones {
    zone: WireName,
    ttl: u32,
    ranges: Vec<IpNet>,
}

impl ReverseZones {
    /// Names in `zone`; in `ranges` no other server is asked about unknown addresses.
    pub fn new(zone: WireName, ttl: u32, ranges: Vec<IpNet>) -> Self {
        ReverseZones { zone, ttl, ranges }
    }

    /// What is known of an address of the cluster; `None` for other names.
    pub fn find(&self, table: &ServiceTable, name: &WireName, wanted: u16) -> Option<Found<'static>> {
        let (address, parts) = name.reversed()?;
        let is_ours = self.ranges.iter().any(|range| range.contains(&address));
        if parts < if address.is_ipv4() { 4 } else { 32 } {
            // Between the zone and an address: exists, and has nothing.
            return is_ours.then_some(Found::Held(Held::NoData));
        }
        if !table.is_synced() {
            return is_ours.then_some(Found::NotYet);
        }
        let owners = table.by_address(address);
        if owners.is_empty() {
            return is_ours.then_some(Found::Held(Held::NoName));
        }
        if !matches!(wanted, kind::PTR | kind::ANY) {
            return Some(Found::Held(Held::NoData));
        }
        let targets: BTreeSet<Vec<u8>> = owners.iter().filter_map(|owner| self.target(owner)).collect();
        let (mut answers, mut answer_count) = (Vec::new(), 0);
        for target in targets {
            record(&mut answers, QUESTION_NAME, kind::PTR, self.ttl, &target);
            answer_count += 1;
        }
        Some(Found::Made { answers, answer_count, additionals: Vec::new(), additional_count: 0 })
    }

    fn target(&self, owner: &Owner<'_>) -> Option<Vec<u8>> {
        let mut target = match owner {
            Owner::ClusterIp(service) => labels(&[&service.name, &service.namespace, "svc"]),
            Owner::Endpoint(service, endpoint) => labels(&[&endpoint.host(), &service.name, &service.namespace, "svc"]),
        }?;
        target.extend_from_slice(self.zone.bytes());
        Some(target)
    }
}
