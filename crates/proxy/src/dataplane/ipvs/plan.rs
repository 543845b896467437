//! A frontend's virtual servers, the addresses they need, and its elements.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use linux::ipvs::{Destination, Key as ServerKey, Persistence, SCHEDULER_2, Scheduler, Service};
use linux::nft::{Datum, Element, ElementData, Key};
use services::{EndPolicy, Endpoint, Frontend, TrafficPolicy};

use super::layout::Map;
use crate::NodeView;
use crate::scope::{Scopes, scopes};

/// Something that the kernel holds once, whoever wants it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    Server(ServerKey),
    /// On `kube-ipvs0`.
    Address(IpAddr),
    Element {
        map: Map,
        v6: bool,
        key: Key,
        end: Option<Key>,
    },
}

/// What an item is.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Server(Server),
    Address,
    Element(ElementData),
}

/// A virtual server. A destination of weight 0 keeps its connections and gets no new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    pub service: Service,
    pub destinations: BTreeMap<SocketAddr, Destination>,
}

/// All items of one frontend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entries {
    pub items: BTreeMap<Item, Content>,
}

impl Display for Entries {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for (item, content) in &self.items {
            match (item, content) {
                (_, Content::Server(Server { service, destinations })) => {
                    writeln!(f, "ipvsadm -A {service}")?;
                    for destination in destinations.values() {
                        writeln!(f, "ipvsadm -a {} {destination}", service.key)?;
                    }
                }
                (Item::Address(address), _) => writeln!(f, "{address} on {}", linux::ipvs::DEVICE)?,
                (Item::Element { map, v6, key, end }, Content::Element(data)) => {
                    let element = Element { key: key.clone(), end: end.clone(), data: data.clone() };
                    writeln!(f, "{} {{ {element} }}", map.name(*v6))?;
                }
                (Item::Server(_) | Item::Element { .. }, _) => {}
            }
        }
        Ok(())
    }
}

/// One family of one frontend, while its items are gathered.
struct Plan<'a> {
    frontend: &'a Frontend,
    node: &'a NodeView,
    v6: bool,
    entries: &'a mut Entries,
    scopes: Scopes<'a>,
}

pub fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
    let mut entries = Entries::default();
    for v6 in [false, true] {
        let scopes = scopes(frontend, node, v6);
        Plan { frontend, node, v6, entries: &mut entries, scopes }.gather();
    }
    entries
}

type At = (IpAddr, u16);

impl<'a> Plan<'a> {
    fn gather(mut self) {
        // Fully, so that a new field asks for a decision here.
        let Frontend {
            id: _,
            name: _,
            app_protocol: _,
            port,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            node_port,
            internal_policy,
            external_policy,
            affinity: _,
            source_ranges,
            health_check_node_port: _,
            // Where a server's endpoints are chosen.
            end_policy: _,
            // The loop says that it is not this mode's to choose.
            selection: _,
            direct_return: _,
            endpoints: _,
        } = self.frontend;
        let (v6, node) = (self.v6, self.node);
        let of_family = |address: &&IpAddr| address.is_ipv6() == v6;
        // A Service has node ports and external addresses only in the families it has a cluster IP of.
        let Some(cluster_ip) = cluster_ips.iter().find(of_family) else { return };
        for address in cluster_ips.iter().filter(of_family) {
            self.bind(*address);
            self.inside((*address, *port), *internal_policy);
        }
        // Where the cluster IP's own policy leaves it all endpoints, the cluster's clients of an outside address go there.
        let shortcut = (*internal_policy == TrafficPolicy::Cluster).then_some((*cluster_ip, *port));
        for address in external_ips.iter().chain(load_balancer_ips).filter(of_family) {
            self.bind(*address);
            self.outside((*address, *port), *external_policy, shortcut);
        }
        if let Some(node_port) = node_port {
            let addresses = node.node_port_addresses.as_ref().unwrap_or(&node.addresses);
            for address in addresses.iter().filter(of_family) {
                self.outside((*address, node_port.get()), *external_policy, shortcut);
            }
        }
        let ranges: Vec<IpNet> = source_ranges.iter().filter(|net| net.addr().is_ipv6() == v6).copied().collect();
        // Where nobody serves, everybody is refused.
        if !ranges.is_empty() && self.scopes.any {
            let mine = |address: &IpAddr| ranges.iter().any(|net| net.contains(address));
            let node_may = node.addresses.iter().any(mine);
            for address in load_balancer_ips.iter().filter(of_family) {
                self.firewall((*address, *port), &ranges, node_may);
            }
        }
    }

    fn element(&mut self, map: Map, key: impl IntoIterator<Item = Datum>, data: ElementData) {
        let item = Item::Element { map, v6: self.v6, key: Key::new(key), end: None };
        self.entries.items.insert(item, Content::Element(data));
    }

    fn destination(&self, (address, port): At) -> [Datum; 3] {
        [address.into(), Datum::Proto(self.frontend.name.protocol.number()), Datum::Port(port)]
    }

    fn member(&mut self, map: Map, at: At) {
        let key = self.destination(at);
        self.element(map, key, ElementData::None);
    }

    /// An address that another interface has is local already, and the host's own.
    fn bind(&mut self, address: IpAddr) {
        if !self.node.addresses.contains(&address) {
            self.entries.items.insert(Item::Address(address), Content::Address);
            self.element(Map::Bound, [address.into()], ElementData::None);
        }
    }

    fn scope(&self, policy: TrafficPolicy) -> &[&'a Endpoint] {
        match policy {
            TrafficPolicy::Cluster => &self.scopes.cluster,
            TrafficPolicy::Local => &self.scopes.local,
        }
    }

    fn inside(&mut self, at: At, policy: TrafficPolicy) {
        self.server(at, policy);
        if self.scope(policy).is_empty() {
            return self.unserved(at);
        }
        self.member(if self.node.masquerade_all { Map::Masquerade } else { Map::MasqueradeOutside }, at);
    }

    fn outside(&mut self, at: At, policy: TrafficPolicy, shortcut: Option<At>) {
        if self.scopes.cluster.is_empty() {
            self.server(at, policy);
            return self.unserved(at);
        }
        match policy {
            TrafficPolicy::Cluster => {
                self.server(at, policy);
                // The reply must come back through this node, whose address the client talks to.
                self.member(Map::Masquerade, at);
            }
            TrafficPolicy::Local => {
                let has_local = !self.scopes.local.is_empty();
                if !has_local {
                    self.member(Map::SilentOutside, at);
                }
                match shortcut {
                    Some((address, port)) => {
                        let to = ElementData::Value(Key::new([address.into(), Datum::Port(port)]));
                        let key = self.destination(at);
                        self.element(Map::ShortCircuit, key, to);
                        self.server(at, TrafficPolicy::Local);
                    }
                    // As kube-proxy does it: the cluster's clients get this node's endpoints, all if there are none.
                    None if has_local => self.server(at, TrafficPolicy::Local),
                    None => self.server(at, TrafficPolicy::Cluster),
                }
                self.member(Map::MasqueradeHost, at);
            }
        }
    }

    /// Nobody to send to: refuse, or be silent where somebody else has endpoints.
    fn unserved(&mut self, at: At) {
        self.member(if self.scopes.any { Map::Silent } else { Map::Refused }, at);
    }

    fn server(&mut self, (address, port): At, policy: TrafficPolicy) {
        self.member(Map::Served, (address, port));
        let key = ServerKey { address: SocketAddr::new(address, port), protocol: self.frontend.name.protocol.number() };
        let prefix = if self.v6 { 128 } else { 32 };
        let persistence =
            self.frontend.affinity.map(|affinity| Persistence { timeout_seconds: affinity.timeout_seconds, prefix });
        let scheduler = self.node.ipvs.scheduler.clone();
        // Clients behind one address are spread, too.
        let flags = if scheduler == Scheduler::Maglev { SCHEDULER_2 } else { 0 };
        let service = Service { key, scheduler, persistence, flags };
        let is_here = |endpoint: &Endpoint| {
            policy == TrafficPolicy::Cluster || endpoint.node.as_ref() == Some(&self.node.place.node)
        };
        // Without weight its connections go on; those that are to be reset must not find it.
        let keeps = self.frontend.end_policy != EndPolicy::Reset;
        let drains = |endpoint: &&std::sync::Arc<Endpoint>| {
            let is_ours = endpoint.address.is_ipv6() == self.v6 && is_here(endpoint);
            keeps && is_ours && endpoint.terminating && endpoint.serving
        };
        let draining = self.frontend.endpoints.iter().filter(drains).map(|endpoint| (endpoint.address, 0));
        let chosen: Vec<SocketAddr> = self.scope(policy).iter().map(|endpoint| endpoint.address).collect();
        // The chosen come last, and so win over what drains: a scope may have nobody else.
        let weights = draining.chain(chosen.iter().map(|address| (*address, 1)));
        let destinations = weights.map(|(address, weight)| (address, Destination::new(address, weight))).collect();
        self.entries.items.insert(Item::Server(key), Content::Server(Server { service, destinations }));
        let local: Vec<IpAddr> = self
            .scope(policy)
            .iter()
            // Only an endpoint of this node can call itself through us; one without a node may be here.
            .filter(|endpoint| endpoint.node.is_none() || endpoint.node.as_ref() == Some(&self.node.place.node))
            .map(|endpoint| endpoint.address.ip())
            .collect();
        for address in local {
            self.element(Map::Hairpin, [address.into(), address.into()], ElementData::None);
        }
    }

    fn firewall(&mut self, at: At, ranges: &[IpNet], node_may: bool) {
        let key = self.destination(at);
        self.element(Map::Firewalled, key, ElementData::None);
        let mut ranges = ranges.to_vec();
        // A node in the ranges may loop its own packets through the load balancer, which then come from that address.
        if node_may {
            ranges.push(at.0.into());
        }
        // The kernel refuses ranges that overlap.
        for net in IpNet::aggregate(&ranges) {
            let whole = |source: IpAddr| Key::new(key.into_iter().chain([source.into()]));
            let (first, last) = (whole(net.network()), whole(net.broadcast()));
            let item = Item::Element { map: Map::Allowed, v6: self.v6, key: first, end: Some(last) };
            self.entries.items.insert(item, Content::Element(ElementData::None));
        }
    }
}
