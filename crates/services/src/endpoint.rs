//! Chooses which endpoints a Service port may use from this node.
//!
//! Traffic policy, topology hints and termination are decided here, once. Back ends render the answer.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::Frontend;

/// Where a Service port's traffic can go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Few endpoints have one, and there are many endpoints.
    pub hints: Option<Arc<Hints>>,
}

/// Zones and nodes that should use an endpoint (`hints.forZones`, `hints.forNodes`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    pub zones: Vec<Arc<str>>,
    pub nodes: Vec<Arc<str>>,
}

/// Where the deciding node stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub node: Arc<str>,
    /// The node's `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
}

/// The endpoints of each scope and one address family, in slot order.
#[derive(Clone, Debug, PartialEq)]
pub struct Categories<'a> {
    pub cluster: Vec<&'a Endpoint>,
    pub local: Vec<&'a Endpoint>,
    /// Some node has a usable endpoint, though maybe no scope of ours: then traffic is dropped, not rejected.
    pub any: bool,
}

impl Endpoint {
    /// Still answers, although it is going away.
    fn is_fallback(&self) -> bool {
        self.serving && self.terminating
    }

    /// Empty: no hint.
    pub fn for_zones(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.zones)
    }

    /// Empty: no hint.
    pub fn for_nodes(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.nodes)
    }

    fn is_local(&self, place: &Place) -> bool {
        self.node.as_ref() == Some(&place.node)
    }
}

enum Topology {
    All,
    Node,
    Zone,
}

/// Hints count only if every ready endpoint has one and somebody means us: a half-written slice must not starve a node.
fn topology(endpoints: &[&Endpoint], place: &Place) -> Topology {
    let ready = || endpoints.iter().filter(|endpoint| endpoint.ready);
    if ready().all(|endpoint| !endpoint.for_nodes().is_empty())
        && ready().any(|endpoint| endpoint.for_nodes().contains(&place.node))
    {
        return Topology::Node;
    }
    match &place.zone {
        Some(zone)
            if ready().all(|endpoint| !endpoint.for_zones().is_empty())
                && ready().any(|endpoint| endpoint.for_zones().contains(zone)) =>
        {
            Topology::Zone
        }
        _ => Topology::All,
    }
}

/// Called CategorizeEndpoints in kube-proxy. Each scope uses its ready endpoints and, only if it has none, those that
/// serve while they terminate (KEP-1669); the scopes fall back independently of each other, and so do the address
/// families: a packet of one cannot use an endpoint of the other.
pub fn categorize_endpoints<'a>(frontend: &'a Frontend, place: &Place, v6: bool) -> Categories<'a> {
    let of_family = frontend.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() == v6);
    let all: Vec<&'a Endpoint> = of_family.map(|endpoint| &**endpoint).collect();
    let filter = |keep: &dyn Fn(&Endpoint) -> bool| -> Vec<&'a Endpoint> {
        all.iter().copied().filter(|endpoint| keep(endpoint)).collect()
    };
    let or_fallback = |ready: Vec<&'a Endpoint>, fallback: &dyn Fn(&Endpoint) -> bool| {
        if ready.is_empty() { filter(fallback) } else { ready }
    };
    let topology = topology(&all, place);
    let cluster = filter(&|endpoint| {
        endpoint.ready
            && match topology {
                Topology::All => true,
                Topology::Node => endpoint.for_nodes().contains(&place.node),
                Topology::Zone => place.zone.as_ref().is_some_and(|zone| endpoint.for_zones().contains(zone)),
            }
    });
    let local = filter(&|endpoint| endpoint.ready && endpoint.is_local(place));
    Categories {
        cluster: or_fallback(cluster, &Endpoint::is_fallback),
        local: or_fallback(local, &|endpoint| endpoint.is_fallback() && endpoint.is_local(place)),
        any: all.iter().any(|endpoint| endpoint.ready || endpoint.is_fallback()),
    }
}
