//! A frontend's entries.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::net::IpAddr;

use services::{Endpoint, Frontend, Protocol, Selection, TrafficPolicy};

use super::layout::{Key, Line, List, Taken, Target, Value, flag};
use super::maglev::{self, PLACES};
use crate::NodeView;
use crate::addresses::{Addresses, of_family};
use crate::scope::{Scopes, scopes};

/// All entries of one frontend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entries {
    pub entries: BTreeMap<Key, Value>,
    /// Whose packets this mode does not translate.
    pub unserved: Option<Protocol>,
}

impl Display for Entries {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        if let Some(protocol) = self.unserved {
            writeln!(f, "# the ebpf mode does not translate {protocol}")?;
        }
        for (key, value) in &self.entries {
            writeln!(f, "{}", Line(key, value))?;
        }
        Ok(())
    }
}

/// One family of one frontend, while its entries are gathered.
struct Plan<'a> {
    frontend: &'a Frontend,
    v6: bool,
    entries: &'a mut BTreeMap<Key, Value>,
    scopes: Scopes<'a>,
}

pub fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
    let mut entries = BTreeMap::new();
    for v6 in [false, true] {
        let scopes = scopes(frontend, node, v6);
        Plan { frontend, v6, entries: &mut entries, scopes }.gather(node);
    }
    let protocol = frontend.name.protocol;
    Entries { entries, unserved: (protocol == Protocol::Sctp).then_some(protocol) }
}

impl<'a> Plan<'a> {
    fn gather(mut self, node: &NodeView) {
        // Fully, so that a new field asks for a decision here.
        let Frontend {
            id,
            name,
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
            // The loop ends connections, whatever the mode (`crate::end`).
            end_policy: _,
            selection,
            direct_return,
            endpoints,
        } = self.frontend;
        let v6 = self.v6;
        let Some(addresses) = Addresses::of(self.frontend, node, v6) else { return };
        for address in &addresses.cluster {
            let nobody = self.target(TrafficPolicy::Cluster, TrafficPolicy::Cluster, 0);
            let nobody =
                Target { inside: (nobody.inside.0, 0), outside: (nobody.outside.0, 0), flags: flag::REFUSED, ..nobody };
            self.entries.insert(Key::Frontend { address: *address, port: None }, Value::Target(nobody));
        }
        if name.protocol == Protocol::Sctp {
            return;
        }
        let selection = selection.unwrap_or(node.selection);
        let choice = match selection {
            Selection::Random => 0,
            Selection::Maglev => flag::MAGLEV,
            Selection::LeastLoad => flag::LEAST_LOAD,
        };
        let masquerade = if node.masquerade_all { flag::MASQUERADE } else { flag::MASQUERADE_OUTSIDE };
        for address in &addresses.cluster {
            let target = self.target(*internal_policy, *internal_policy, masquerade | choice);
            self.frontend(*address, *port, target);
        }
        // Outside traffic under policy Cluster: the reply must come back through this node, whose address the client
        // talks to.
        let masquerade = if *external_policy == TrafficPolicy::Cluster { flag::MASQUERADE } else { 0 };
        let is_direct = *external_policy == TrafficPolicy::Cluster && direct_return.unwrap_or(node.direct_return);
        let direct = if is_direct { flag::DIRECT } else { 0 };
        let outside = self.target(TrafficPolicy::Cluster, *external_policy, masquerade | choice | direct);
        for address in &addresses.external {
            self.frontend(*address, *port, outside);
        }
        let mut is_outside = addresses.outside().next().is_some();
        if let Some(node_port) = node_port {
            let primary = node.primary_addresses();
            for address in of_family(node.node_port_addresses.as_ref().unwrap_or(&primary), v6) {
                self.frontend(address, node_port.get(), outside);
                is_outside = true;
            }
        }
        for address in &addresses.load_balancer {
            let mut guarded = outside;
            // Where nobody answers, everybody is told so.
            if !addresses.sources.is_empty() && guarded.flags & flag::REFUSED == 0 {
                guarded.flags |= flag::FIREWALL;
                // A node in the ranges may use the address, too, and its packets may come back from the load balancer.
                if addresses.node_may {
                    guarded.flags |= flag::NODE_ALLOWED;
                    self.entries.insert(Key::Source { id: *id, network: (*address).into() }, Value::Present);
                }
                for network in &addresses.sources {
                    self.entries.insert(Key::Source { id: *id, network: network.trunc() }, Value::Present);
                }
            }
            self.frontend(*address, *port, guarded);
        }
        for policy in [TrafficPolicy::Cluster, TrafficPolicy::Local] {
            let for_outside = policy == TrafficPolicy::Cluster || *external_policy == policy;
            if *internal_policy == policy || (is_outside && for_outside) {
                self.list(policy, affinity.is_some(), selection == Selection::Maglev);
            }
        }
        if is_direct && is_outside {
            self.taken(node);
        }
        if name.protocol == Protocol::Udp {
            let serving = endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() == v6);
            for endpoint in serving.filter(|endpoint| endpoint.ready || endpoint.serving) {
                self.entries.insert(Key::Serving { id: *id, endpoint: endpoint.address }, Value::Present);
            }
        }
    }

    fn scope(&self, policy: TrafficPolicy) -> (List, &[&'a Endpoint]) {
        let list = |local| List { id: self.frontend.id, v6: self.v6, local };
        match policy {
            TrafficPolicy::Cluster => (list(false), &self.scopes.cluster),
            TrafficPolicy::Local => (list(true), &self.scopes.local),
        }
    }

    fn target(&self, inside: TrafficPolicy, outside: TrafficPolicy, flags: u32) -> Target {
        let scope = |policy| {
            let (list, endpoints) = self.scope(policy);
            (list, endpoints.len() as u32)
        };
        // Nobody to send to: refuse, or be silent where somebody else has endpoints.
        let refused = if self.scopes.any { 0 } else { flag::REFUSED };
        Target {
            id: self.frontend.id,
            inside: scope(inside),
            outside: scope(outside),
            affinity_seconds: self.frontend.affinity.map_or(0, |affinity| affinity.timeout_seconds),
            flags: flags | refused,
        }
    }

    /// Endpoints that answer clients from outside themselves: on nodes that take packets for them, and on this one. A flow
    /// stays with an endpoint that still serves.
    fn taken(&mut self, node: &NodeView) {
        let Frontend { id, name, node_port, direct_return, endpoints, .. } = self.frontend;
        let serving = endpoints.iter().filter(|endpoint| endpoint.ready || endpoint.serving);
        for endpoint in serving.filter(|endpoint| endpoint.address.is_ipv6() == self.v6) {
            let Some(place) = &endpoint.node else { continue };
            let mut insert = |by| self.entries.insert(Key::Taken { by, endpoint: endpoint.address }, Value::Present);
            if *place == node.place.node {
                insert(Taken::Here(*id));
                if let Some(port) = node_port {
                    insert(Taken::ByPort(name.protocol, port.get()));
                }
            } else if node.takers.get(place).is_some_and(|taker| taker.takes(*direct_return)) {
                insert(Taken::There(*id));
            }
        }
    }

    fn frontend(&mut self, address: IpAddr, port: u16, target: Target) {
        let port = Some((self.frontend.name.protocol, port));
        self.entries.insert(Key::Frontend { address, port }, Value::Target(target));
    }

    /// The endpoints of one scope.
    fn list(&mut self, policy: TrafficPolicy, sticky: bool, by_table: bool) {
        let (list, endpoints) = self.scope(policy);
        let endpoints: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
        if by_table && !endpoints.is_empty() {
            for (part, slots) in maglev::table(&endpoints).chunks(PLACES).enumerate() {
                // The last part is not full; what is beyond is never asked for.
                let slots = std::array::from_fn(|at| slots.get(at).copied().unwrap_or_default());
                self.entries.insert(Key::Places { list, part: part as u32 }, Value::Places(slots));
            }
        }
        for (slot, endpoint) in endpoints.into_iter().enumerate() {
            self.entries.insert(Key::Endpoint { list, slot: slot as u32 }, Value::Endpoint(endpoint));
            if sticky {
                self.entries.insert(Key::Member { list, endpoint }, Value::Present);
            }
        }
    }
}
