//! What one frontend needs: addresses that lead to a relay, endpoints behind it, and sets of what is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use linux::nft::{Datum, Key};
use services::{Frontend, PortName, Protocol, TrafficPolicy};

use super::layout::{Map, relay_address};
use super::picker::Targets;
use crate::NodeView;
use crate::addresses::{Addresses, of_family};
use crate::scope::{Scopes, scopes};

/// Which endpoints a relay may use. There is one relay for each reach that a Service port needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reach {
    Cluster,
    Local,
    /// The cluster's own traffic may go anywhere, the rest only to this node's own.
    ByClient,
}

impl Reach {
    pub fn policy(self, is_inside: bool) -> TrafficPolicy {
        match (self, is_inside) {
            (Reach::Cluster, _) | (Reach::ByClient, true) => TrafficPolicy::Cluster,
            (Reach::Local, _) | (Reach::ByClient, false) => TrafficPolicy::Local,
        }
    }
}

impl Display for Reach {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reach::Cluster => "cluster",
            Reach::Local => "local",
            Reach::ByClient => "by_client",
        })
    }
}

/// Where an element lies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    pub map: Map,
    pub v6: bool,
    pub key: Key,
    pub end: Option<Key>,
}

impl Slot {
    pub fn destination(map: Map, to: SocketAddr, protocol: Protocol) -> Self {
        let key = Key::new([to.ip().into(), Datum::Proto(protocol.number()), Datum::Port(to.port())]);
        Slot { map, v6: to.is_ipv6(), key, end: None }
    }
}

/// One frontend on this node.
#[derive(Clone, Debug, PartialEq)]
pub struct Entries {
    pub name: PortName,
    pub targets: Targets,
    /// Addresses that clients use, and the relay they lead to.
    pub captured: BTreeMap<SocketAddr, Reach>,
    /// Where relays listen, IPv4 and IPv6; a family that the node has no address of is not captured.
    pub relay_addresses: [Option<IpAddr>; 2],
    /// Members of sets.
    pub members: BTreeSet<Slot>,
    /// What of the Service this mode cannot do.
    pub unsupported: Option<&'static str>,
}

impl Display for Entries {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        if let Some(unsupported) = self.unsupported {
            writeln!(f, "unsupported: {unsupported}")?;
        }
        for (policy, scope) in [(TrafficPolicy::Cluster, "cluster"), (TrafficPolicy::Local, "local")] {
            for v6 in [false, true] {
                for endpoint in self.targets.of(policy, v6) {
                    writeln!(f, "{scope} {endpoint}")?;
                }
            }
        }
        if let Some(seconds) = self.targets.affinity {
            writeln!(f, "affinity {seconds} s")?;
        }
        for (address, reach) in &self.captured {
            let slot = Slot::destination(Map::Redirect, *address, self.name.protocol);
            writeln!(f, "{} {{ {} : relay {reach} }}", slot.map.name(slot.v6), slot.key)?;
        }
        for slot in &self.members {
            let element = linux::nft::Element {
                key: slot.key.clone(),
                end: slot.end.clone(),
                data: linux::nft::ElementData::None,
            };
            writeln!(f, "{} {{ {element} }}", slot.map.name(slot.v6))?;
        }
        Ok(())
    }
}

pub fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
    let mut entries = Entries {
        name: frontend.name.clone(),
        targets: Targets::default(),
        captured: BTreeMap::new(),
        relay_addresses: [false, true].map(|v6| relay_address(node, v6)),
        members: BTreeSet::new(),
        unsupported: (frontend.name.protocol == Protocol::Sctp)
            .then_some("SCTP has no relay; its addresses are refused. Use --proxy-mode=nftables"),
    };
    for v6 in [false, true] {
        let scopes = scopes(frontend, node, v6);
        Plan { frontend, v6, entries: &mut entries, scopes }.gather(node);
    }
    entries
}

/// One family of one frontend, while its entries are gathered.
struct Plan<'a> {
    frontend: &'a Frontend,
    v6: bool,
    entries: &'a mut Entries,
    scopes: Scopes<'a>,
}

impl Plan<'_> {
    fn gather(mut self, node: &NodeView) {
        // Fully, so that a new field asks for a decision here.
        let Frontend {
            id: _,
            name: _,
            app_protocol: _,
            port,
            cluster_ips: _,
            external_ips: _,
            load_balancer_ips: _,
            node_port,
            internal_policy,
            external_policy,
            affinity,
            source_ranges: _,
            health_check_node_port: _,
            // The relays are ours, and end with either side.
            end_policy: _,
            // The loop says that it is not this mode's to choose.
            selection: _,
            direct_return: _,
            endpoints,
        } = self.frontend;
        let v6 = self.v6;
        if self.entries.relay_addresses[usize::from(v6)].is_none() {
            return;
        }
        let Some(addresses) = Addresses::of(self.frontend, node, v6) else { return };
        let at = |address: &IpAddr| SocketAddr::new(*address, *port);
        let targets = &mut self.entries.targets;
        targets.cluster[usize::from(v6)] = self.scopes.cluster.iter().map(|endpoint| endpoint.address).collect();
        targets.local[usize::from(v6)] = self.scopes.local.iter().map(|endpoint| endpoint.address).collect();
        targets.affinity = affinity.map(|affinity| affinity.timeout_seconds);
        let serving = endpoints.iter().filter(|endpoint| endpoint.ready || endpoint.serving);
        targets.serving.extend(serving.map(|endpoint| endpoint.address).filter(|address| address.is_ipv6() == v6));
        for address in &addresses.cluster {
            self.member(Slot { map: Map::ClusterIps, v6, key: Key::new([(*address).into()]), end: None });
            self.inside(at(address), *internal_policy);
        }
        for address in addresses.outside() {
            self.outside(at(&address), *external_policy);
        }
        if let Some(node_port) = node_port {
            let loopback = if v6 { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
            let all = || node.addresses.iter().copied().chain([loopback]).collect();
            let mut own: Vec<IpAddr> = node.node_port_addresses.clone().unwrap_or_else(all);
            if node.relay_localhost {
                own.push(loopback);
            }
            for address in of_family(&own, v6) {
                self.outside(SocketAddr::new(address, node_port.get()), *external_policy);
            }
        }
        // Where nobody serves, everybody is refused.
        if !addresses.sources.is_empty() && self.scopes.any {
            for address in &addresses.load_balancer {
                self.firewall(at(address), &addresses);
            }
        }
    }

    fn member(&mut self, slot: Slot) {
        self.entries.members.insert(slot);
    }

    fn destination(&mut self, map: Map, at: SocketAddr) {
        self.member(Slot::destination(map, at, self.frontend.name.protocol));
    }

    /// Nobody to send to: refuse, or be silent where somebody else has endpoints.
    fn unserved(&mut self, at: SocketAddr) {
        self.destination(if self.scopes.any { Map::Silent } else { Map::Refused }, at);
    }

    fn capture(&mut self, at: SocketAddr, reach: Reach) {
        if self.entries.unsupported.is_some() {
            return self.destination(Map::Refused, at);
        }
        self.entries.captured.insert(at, reach);
    }

    fn inside(&mut self, at: SocketAddr, policy: TrafficPolicy) {
        let (endpoints, reach) = match policy {
            TrafficPolicy::Cluster => (&self.scopes.cluster, Reach::Cluster),
            TrafficPolicy::Local => (&self.scopes.local, Reach::Local),
        };
        if endpoints.is_empty() { self.unserved(at) } else { self.capture(at, reach) }
    }

    fn outside(&mut self, at: SocketAddr, policy: TrafficPolicy) {
        if self.scopes.cluster.is_empty() {
            return self.unserved(at);
        }
        match policy {
            TrafficPolicy::Cluster => self.capture(at, Reach::Cluster),
            TrafficPolicy::Local => {
                if self.scopes.local.is_empty() {
                    self.destination(Map::InsideOnly, at);
                }
                self.capture(at, Reach::ByClient);
            }
        }
    }

    fn firewall(&mut self, at: SocketAddr, addresses: &Addresses) {
        self.destination(Map::Firewalled, at);
        let to = Slot::destination(Map::Allowed, at, self.frontend.name.protocol).key;
        for (first, last) in addresses.ranges(at.ip()) {
            let whole = |source: IpAddr| Key::new(to.0.iter().copied().chain([source.into()]));
            self.member(Slot { map: Map::Allowed, v6: self.v6, key: whole(first), end: Some(whole(last)) });
        }
    }
}
