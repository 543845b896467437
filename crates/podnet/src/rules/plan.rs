//! What the sets and maps should hold: host ports and ways out become elements.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::nft::{Datum, Element, ElementData, Key};

use super::layout::{Map, Place};
use crate::{HostPort, Masquerade};

/// The elements of each set; a set that is not named has none.
pub type Elements = BTreeMap<Place, BTreeSet<Element>>;

/// What the kernel should hold, and what it cannot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub elements: Elements,
    pub refused: BTreeSet<Refusal>,
}

/// Why a host port does not lead to its pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    #[error("host port {port} of sandbox {sandbox}: {protocol:?} has no ports here; use TCP, UDP or SCTP")]
    Protocol { sandbox: String, port: u16, protocol: String },
    #[error(
        "host port {port} of sandbox {sandbox}: nothing leads from loopback address {address} to a pod; \
         leave hostIP out, or give another address of the node"
    )]
    Loopback { sandbox: String, port: u16, address: IpAddr },
    #[error("host port {port} of sandbox {sandbox}: the pod has no address of the family of {address}; change hostIP")]
    Family { sandbox: String, port: u16, address: IpAddr },
    #[error("host port {port} of sandbox {sandbox}: sandbox {holder} has it; delete one of the two pods")]
    Taken { sandbox: String, port: u16, holder: String },
}

/// Host ports come in the order in which they win: of two pods that want the same one, the first gets it.
pub fn plan(ports: &[HostPort], masquerade: &Masquerade) -> Plan {
    let mut plan = Plan::default();
    let mut holders: BTreeMap<(Place, Key), (&str, ElementData)> = BTreeMap::new();
    // The runtime's interface lists all container ports; those without a host port have number 0.
    for port in ports.iter().filter(|port| port.mapping.host_port != 0) {
        let wanted = match wanted(port) {
            Ok(wanted) => wanted,
            Err(refusal) => {
                plan.refused.insert(refusal);
                continue;
            }
        };
        for (place, element, pod) in wanted {
            let claim = (port.sandbox.as_str(), element.data.clone());
            match holders.entry((place, element.key.clone())) {
                Entry::Vacant(free) => {
                    free.insert(claim);
                    plan.put(place, element);
                    plan.put(Place { map: Map::Hairpin, v6: place.v6 }, member([pod.into(), pod.into()], None));
                }
                // Two containers of a pod may name the same way twice.
                Entry::Occupied(held) if *held.get() == claim => {}
                Entry::Occupied(held) => {
                    let (sandbox, port) = (port.sandbox.clone(), port.mapping.host_port);
                    plan.refused.insert(Refusal::Taken { sandbox, port, holder: held.get().0.into() });
                }
            }
        }
    }
    let from = aggregate(masquerade.from.iter());
    // Pods reach each other with their own addresses also where the cluster's range is not known.
    let direct = aggregate(masquerade.except.iter().chain(&from));
    for pods in &from {
        let v6 = pods.addr().is_ipv6();
        let everywhere = if v6 { IpNet::from(Ipv6Net::default()) } else { IpNet::from(Ipv4Net::default()) };
        plan.put(Place { map: Map::Outside, v6 }, way(*pods, everywhere));
        for to in direct.iter().filter(|to| to.addr().is_ipv6() == v6) {
            plan.put(Place { map: Map::Direct, v6 }, way(*pods, *to));
        }
    }
    plan
}

impl Plan {
    fn put(&mut self, place: Place, element: Element) {
        self.elements.entry(place).or_default().insert(element);
    }
}

/// The elements of one host port, and which address of the pod each leads to.
fn wanted(port: &HostPort) -> Result<Vec<(Place, Element, IpAddr)>, Refusal> {
    let mapping = &port.mapping;
    let (sandbox, number) = (port.sandbox.clone(), mapping.host_port);
    let protocol = match mapping.protocol.as_str() {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        other => return Err(Refusal::Protocol { sandbox, port: number, protocol: other.into() }),
    };
    let service = [Datum::Proto(protocol), Datum::Port(number)];
    let mut wanted = Vec::new();
    for pod in port.pod_addresses.iter().filter(|pod| mapping.host_ip.is_none_or(|ip| ip.is_ipv4() == pod.is_ipv4())) {
        let target = Key::new([Datum::from(*pod), Datum::Port(mapping.container_port)]);
        // 0.0.0.0 is every address of the node, but of this family only.
        let (map, key) = match mapping.host_ip.filter(|ip| !ip.is_unspecified()) {
            Some(ip) if ip.is_loopback() => return Err(Refusal::Loopback { sandbox, port: number, address: ip }),
            Some(ip) => (Map::HostPorts, Key::new([Datum::from(ip)].into_iter().chain(service))),
            None => (Map::AnyHostPorts, Key::new(service)),
        };
        let element = Element { key, end: None, data: ElementData::Value(target) };
        wanted.push((Place { map, v6: pod.is_ipv6() }, element, *pod));
    }
    match mapping.host_ip {
        Some(address) if wanted.is_empty() => Err(Refusal::Family { sandbox, port: number, address }),
        _ => Ok(wanted),
    }
}

/// The fewest ranges that hold the same addresses: the kernel refuses ranges that overlap.
fn aggregate<'a>(ranges: impl Iterator<Item = &'a IpNet>) -> Vec<IpNet> {
    IpNet::aggregate(&ranges.map(IpNet::trunc).collect())
}

/// Packets from one range to another.
fn way(from: IpNet, to: IpNet) -> Element {
    let last = [Datum::from(from.broadcast()), Datum::from(to.broadcast())];
    member([Datum::from(from.network()), Datum::from(to.network())], Some(Key::new(last)))
}

fn member(key: [Datum; 2], end: Option<Key>) -> Element {
    Element { key: Key::new(key), end, data: ElementData::None }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for (place, elements) in &self.elements {
            for element in elements {
                writeln!(f, "{} {element}", place.name())?;
            }
        }
        for refusal in &self.refused {
            writeln!(f, "refused: {refusal}")?;
        }
        Ok(())
    }
}
