//! The search path, walked here instead of by the client.
//!
//! A pod's resolver that looks for `www.example.com` asks for `www.example.com.NAMESPACE.svc.ZONE` first, and through
//! all its search domains before it asks for the name itself. The answer to the last question is given to the first one
//! where nothing on the way could answer: the walk must end where the client's own would.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::BinDecodable;
use ipnet::IpNet;

use crate::compile::Held;
use crate::names::Names;
use crate::objects::Objects;
use crate::wire::{Ask, WireName, kind};
use crate::zone::{Found, Zone, has_namespace};

/// Within this time the answer is there, or the client walks by itself.
pub const PATIENCE: Duration = Duration::from_millis(50);

/// For whom the search path is walked.
#[derive(Debug, Clone, Default)]
pub struct SearchPath {
    /// Where pods have their addresses: only they have the cluster's search domains. Empty: for nobody.
    pub clients: Vec<IpNet>,
    /// The node's own search domains, which pods have behind the cluster's.
    pub domains: Vec<Name>,
}

impl SearchPath {
    /// The names that the client would ask others about at the end of its walk, in order. Empty: this is no such question,
    /// or a name of the cluster is on the way.
    pub fn walk(
        &self,
        zone: &Zone,
        names: &Names,
        objects: &Objects,
        ask: &Ask,
        below: usize,
        client: IpAddr,
    ) -> Vec<Name> {
        let name = &ask.name;
        let is_address = matches!(ask.kind, kind::A | kind::AAAA);
        // At least two labels, the namespace, `svc`.
        if !is_address || below < 4 || name.label(below - 1) != b"svc" || name.label(0).first() == Some(&b'_') {
            return Vec::new();
        }
        let is_pod = self.clients.iter().any(|range| range.contains(&client));
        if !is_pod || !has_namespace(names, objects, name.part(below - 2, below - 1)) {
            return Vec::new();
        }
        let first = below - 2;
        // What is below a Service is looked for there and nowhere else.
        if names.service(name.part(first - 1, first + 1)).is_some() {
            return Vec::new();
        }
        let ends: [&[u8]; 3] = [b"\x03svc", b"", &[0]];
        for (index, end) in ends.into_iter().enumerate() {
            let origin: &[u8] = if index < 2 { zone.origin().bytes() } else { b"" };
            let wire = [name.part(0, first), end, origin].concat();
            let Some(wire) = WireName::read(&wire, 0) else { return Vec::new() };
            let Some(below) = wire.below(zone.origin()) else { continue };
            let is_written_out = index == 2;
            if is_written_out || zone.find(names, objects, &wire, ask.kind, below) != Found::Held(Held::NoName) {
                return Vec::new();
            }
        }
        // In the client's case, as it would have asked.
        let mut own = ask.written_name()[..name.start(first)].to_vec();
        own.push(0);
        let Ok(own) = Name::from_bytes(&own) else { return Vec::new() };
        let longer = self.domains.iter().filter_map(|domain| own.clone().append_domain(domain).ok());
        let mut walk: Vec<Name> = longer.collect();
        walk.push(own);
        walk
    }
}
