//! Builds names and record data.

use std::net::IpAddr;

use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::{Name, RData, Record};

/// `labels` below `zone`. `None` when a label or the name is too long for DNS.
pub fn name_below(labels: &[&str], zone: &Name) -> Option<Name> {
    let labels = labels.iter().map(|label| label.as_bytes());
    Name::from_labels(labels).ok()?.append_domain(zone).ok()
}

/// The name of a Service below the zone.
pub fn service_name(namespace: &str, service: &str, zone: &Name) -> Option<Name> {
    name_below(&[service, namespace, "svc"], zone)
}

/// The name of one endpoint of a Service below the zone.
pub fn endpoint_name(host: &str, namespace: &str, service: &str, zone: &Name) -> Option<Name> {
    name_below(&[host, service, namespace, "svc"], zone)
}

pub fn address(ip: IpAddr) -> RData {
    RData::from(ip)
}

/// The zone's start of authority, which negative answers carry so that they can be cached for `ttl` seconds.
pub fn soa(owner: &Name, cluster_zone: &Name, ttl: u32) -> Option<Record> {
    let data = SOA::new(
        name_below(&["ns", "dns"], cluster_zone)?,
        name_below(&["hostmaster"], cluster_zone)?,
        // Nobody may transfer the zone, so nobody compares serials.
        1,
        7200,
        1800,
        86_400,
        ttl,
    );
    Some(Record::from_rdata(owner.clone(), ttl, RData::SOA(data)))
}
