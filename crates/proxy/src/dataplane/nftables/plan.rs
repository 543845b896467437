//! A frontend's elements.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, SocketAddr};

use linux::nft::{Datum, ElementData, Key};
use services::{Endpoint, Frontend, TrafficPolicy};
use sha2::{Digest, Sha256};

use super::class::{Class, Ids, Pick};
use super::layout::Map;
use crate::NodeView;
use crate::addresses::{Addresses, of_family};
use crate::scope::{Scopes, scopes};

/// Where an element lies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    pub map: Map,
    pub v6: bool,
    pub key: Key,
    pub end: Option<Key>,
}

/// All elements of one frontend, and the classes they name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entries {
    pub elements: BTreeMap<Slot, ElementData>,
    pub classes: BTreeSet<Class>,
}

impl Display for Entries {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for class in &self.classes {
            writeln!(f, "class {:#010x} is {}", class.number(), class.name())?;
        }
        for (slot, data) in &self.elements {
            let element = linux::nft::Element { key: slot.key.clone(), end: slot.end.clone(), data: data.clone() };
            writeln!(f, "{} {{ {element} }}", slot.map.name(slot.v6))?;
        }
        Ok(())
    }
}

/// Which list of a frontend's endpoints: two for each id.
fn list(frontend: &Frontend, policy: TrafficPolicy) -> u32 {
    frontend.id.0 << 1 | u32::from(policy == TrafficPolicy::Local)
}

/// A number by which affinity remembers an endpoint, whatever slot it has: a hash of its address, the next free one if
/// two share it.
fn number(endpoint: SocketAddr, taken: &mut BTreeSet<u32>) -> u32 {
    let hash = Sha256::digest(endpoint.to_string());
    let mut number = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]);
    while !taken.insert(number) {
        number = number.wrapping_add(1);
    }
    number
}

/// One family of one frontend, while its elements are gathered.
struct Plan<'a> {
    frontend: &'a Frontend,
    v6: bool,
    entries: &'a mut Entries,
    scopes: Scopes<'a>,
}

pub fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
    let mut entries = Entries::default();
    for v6 in [false, true] {
        let scopes = scopes(frontend, node, v6);
        Plan { frontend, v6, entries: &mut entries, scopes }.gather(node);
    }
    entries
}

impl<'a> Plan<'a> {
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
            affinity: _,
            source_ranges: _,
            // Connections are ended beside the plan (`end`), the same way wherever conntrack translates.
            end_policy: _,
            // The loop says that it is not this mode's to choose.
            selection: _,
            direct_return: _,
            health_check_node_port: _,
            endpoints: _,
        } = self.frontend;
        let Some(addresses) = Addresses::of(self.frontend, node, self.v6) else { return };
        let mut outside: Vec<(IpAddr, u16)> = addresses.outside().map(|address| (address, *port)).collect();
        if let Some(node_port) = node_port {
            let primary = node.primary_addresses();
            let own = of_family(node.node_port_addresses.as_ref().unwrap_or(&primary), self.v6);
            // A packet from 127.0.0.1 may not leave the node, so it needs a relay.
            outside.extend(own.filter(|own| !own.is_loopback()).map(|own| (own, node_port.get())));
        }
        for address in &addresses.cluster {
            self.element(Map::ClusterIps, [(*address).into()], ElementData::None);
            self.inside((*address, *port), *internal_policy, node.masquerade_all);
        }
        for destination in &outside {
            self.outside(*destination, *external_policy);
        }
        let uses = |policy| {
            *internal_policy == policy
                || (!outside.is_empty() && (policy == TrafficPolicy::Cluster || *external_policy == policy))
        };
        for policy in [TrafficPolicy::Cluster, TrafficPolicy::Local] {
            if uses(policy) {
                self.list(policy, node);
            }
        }
        // Where nobody serves, everybody is refused.
        if !addresses.sources.is_empty() && self.scopes.any {
            for address in &addresses.load_balancer {
                self.firewall((*address, *port), &addresses);
            }
        }
    }

    fn element(&mut self, map: Map, key: impl IntoIterator<Item = Datum>, data: ElementData) {
        let slot = Slot { map, v6: self.v6, key: Key::new(key), end: None };
        self.entries.elements.insert(slot, data);
    }

    fn destination(&self, (address, port): (IpAddr, u16)) -> [Datum; 3] {
        [address.into(), Datum::Proto(self.frontend.name.protocol.number()), Datum::Port(port)]
    }

    fn member(&mut self, map: Map, at: (IpAddr, u16)) {
        let key = self.destination(at);
        self.element(map, key, ElementData::None);
    }

    fn class(&mut self, at: (IpAddr, u16), class: Class) {
        let key = self.destination(at);
        let number = Datum::Mark(class.number());
        self.element(Map::Frontends, key, ElementData::Value(Key::new([number])));
        self.entries.classes.insert(class);
    }

    fn id(&mut self, map: Map, at: (IpAddr, u16), policy: TrafficPolicy) {
        let key = self.destination(at);
        let id = list(self.frontend, policy);
        self.element(map, key, ElementData::Value(Key::new([Datum::Mark(id)])));
    }

    fn scope(&self, policy: TrafficPolicy) -> &[&'a Endpoint] {
        match policy {
            TrafficPolicy::Cluster => &self.scopes.cluster,
            TrafficPolicy::Local => &self.scopes.local,
        }
    }

    fn pick(&self, policy: TrafficPolicy, ids: Ids) -> Option<Pick> {
        let affinity = self.frontend.affinity.map(|affinity| affinity.timeout_seconds);
        match self.scope(policy).len() as u32 {
            0 => None,
            count => Some(Pick { v6: self.v6, ids, count, affinity }),
        }
    }

    /// Nobody to send to: refuse, or be silent where somebody else has endpoints.
    fn unserved(&mut self, at: (IpAddr, u16)) {
        self.member(if self.scopes.any { Map::Silent } else { Map::Refused }, at);
    }

    fn inside(&mut self, at: (IpAddr, u16), policy: TrafficPolicy, masquerade_all: bool) {
        let Some(pick) = self.pick(policy, Ids::Main) else { return self.unserved(at) };
        self.class(at, Class::Pick(pick));
        self.id(Map::Ids, at, policy);
        self.member(if masquerade_all { Map::Masquerade } else { Map::MasqueradeOutside }, at);
    }

    fn outside(&mut self, at: (IpAddr, u16), policy: TrafficPolicy) {
        let Some(anywhere) = self.pick(TrafficPolicy::Cluster, Ids::Main) else { return self.unserved(at) };
        self.id(Map::Ids, at, TrafficPolicy::Cluster);
        match policy {
            TrafficPolicy::Cluster => {
                self.class(at, Class::Pick(anywhere));
                // The reply must come back through this node, whose address the client talks to.
                self.member(Map::Masquerade, at);
            }
            TrafficPolicy::Local => {
                let here = self.pick(TrafficPolicy::Local, Ids::Local);
                if here.is_some() {
                    self.id(Map::LocalIds, at, TrafficPolicy::Local);
                }
                self.class(at, Class::External { anywhere, here });
                self.member(Map::MasqueradeHost, at);
            }
        }
    }

    /// The endpoints of one scope.
    fn list(&mut self, policy: TrafficPolicy, node: &NodeView) {
        let zero = Datum::Mark(0);
        let list = Datum::Mark(list(self.frontend, policy));
        let mut numbers = BTreeSet::new();
        let endpoints: Vec<&Endpoint> = self.scope(policy).to_vec();
        for (slot, endpoint) in endpoints.into_iter().enumerate() {
            let (address, port) = (endpoint.address.ip(), Datum::Port(endpoint.address.port()));
            let at = Key::new([address.into(), port]);
            let slot = Datum::Mark(slot as u32);
            self.element(Map::Slots, [zero, list, slot], ElementData::Value(at.clone()));
            if self.frontend.affinity.is_some() {
                let number = number(endpoint.address, &mut numbers);
                let value = ElementData::Value(Key::new([Datum::Mark(number)]));
                self.element(Map::Numbers, [zero, list, slot], value);
                self.element(Map::Endpoints, [zero, list, zero, Datum::Mark(number)], ElementData::Value(at));
            }
            // Only an endpoint of this node can call itself through us; one without a node may be here.
            if endpoint.node.is_none() || endpoint.node.as_ref() == Some(&node.place.node) {
                self.element(Map::Hairpin, [address.into(), address.into()], ElementData::None);
            }
        }
    }

    fn firewall(&mut self, at: (IpAddr, u16), addresses: &Addresses) {
        let key = self.destination(at);
        self.element(Map::Firewalled, key, ElementData::None);
        for (first, last) in addresses.ranges(at.0) {
            let whole = |source: IpAddr| Key::new(key.into_iter().chain([source.into()]));
            let slot = Slot { map: Map::Allowed, v6: self.v6, key: whole(first), end: Some(whole(last)) };
            self.entries.elements.insert(slot, ElementData::None);
        }
    }
}
