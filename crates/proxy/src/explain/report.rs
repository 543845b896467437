//! Why a packet goes where it goes: which Service it is for, who of the endpoints may have it, and what the kernel does.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use linux::nft::{Fate, Packet};
use serde::{Deserialize, Serialize};
use services::{Endpoint, Frontend, Owner, Protocol, ServiceKind, ServiceTable, TrafficPolicy};

use crate::scope::scopes;
use crate::{Error, Mode, NodeView};

/// How many draws of a plan's random numbers are walked to find all places a packet may go to.
const WALKS: u32 = 64;

/// The answer, as a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The node that the packet is on, and its proxy's mode.
    pub node: String,
    pub mode: String,
    pub from: IpAddr,
    pub to: SocketAddr,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    pub destination: Destination,
    pub endpoints: Vec<EndpointReport>,
    pub kernel: Kernel,
    /// Where the kernel differs from the plan; `None` if nobody has looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drift: Option<Vec<String>>,
}

/// What the packet's destination is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Destination {
    /// One port of a Service.
    Frontend {
        /// `namespace/name:port`
        name: String,
        address: AddressKind,
        policy: Policy,
        /// Seconds, with `sessionAffinity: ClientIP`.
        #[serde(skip_serializing_if = "Option::is_none")]
        affinity_seconds: Option<u32>,
        /// Who may use the load balancer's address, and whether this client is one of them.
        #[serde(skip_serializing_if = "Option::is_none")]
        source_ranges: Option<SourceRanges>,
        /// Others that claim the same address and port; the first of all has it.
        #[serde(skip_serializing_if = "Vec::is_empty", default)]
        hidden: Vec<String>,
    },
    /// A cluster IP, but not a port of it.
    UndefinedPort { service: String, ports: Vec<String> },
    /// A cluster IP that no Service has.
    Unallocated,
    /// A pod behind Services; packets to its own address pass by all of them.
    Endpoint { services: Vec<String> },
    /// Nothing that Services know.
    Other,
}

/// Which address of a Service it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressKind {
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    #[serde(rename = "externalIP")]
    ExternalIp,
    #[serde(rename = "load balancer IP")]
    LoadBalancer,
    #[serde(rename = "NodePort")]
    NodePort,
}

/// Whose endpoints may be used, and who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    #[serde(rename = "internalTrafficPolicy: Cluster")]
    InternalCluster,
    #[serde(rename = "internalTrafficPolicy: Local")]
    InternalLocal,
    #[serde(rename = "externalTrafficPolicy: Cluster")]
    ExternalCluster,
    #[serde(rename = "externalTrafficPolicy: Local")]
    ExternalLocal,
    #[serde(rename = "externalTrafficPolicy: Local, but any endpoint for the cluster's own traffic")]
    ExternalLocalFromInside,
}

impl Policy {
    fn of(self) -> TrafficPolicy {
        match self {
            Policy::InternalLocal | Policy::ExternalLocal => TrafficPolicy::Local,
            Policy::InternalCluster | Policy::ExternalCluster | Policy::ExternalLocalFromInside => {
                TrafficPolicy::Cluster
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceRanges {
    pub allowed: Vec<String>,
    pub is_allowed: bool,
}

/// One endpoint, in or out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointReport {
    pub address: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
    /// May get the packet.
    pub used: bool,
    pub why: String,
}

/// What the kernel does with the first packet of such a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kernel {
    /// All that may become of it.
    pub fates: Vec<String>,
    /// Rules and elements that one such packet meets, in order.
    pub rules: Vec<String>,
}

/// Explains one packet from what is known; looks at no kernel.
pub fn report(mode: Mode, table: &ServiceTable, node: &NodeView, packet: &Packet) -> Result<Report, Error> {
    let frontends = claimants(table, node, packet);
    let mut endpoints = Vec::new();
    let destination = match frontends.split_first() {
        Some(((frontend, address), hidden)) => {
            let policy = policy(frontend, *address, node, packet.from.ip());
            endpoints = explain_endpoints(frontend, node, policy.of(), packet.to.is_ipv6());
            Destination::Frontend {
                name: frontend.name.to_string(),
                address: *address,
                policy,
                affinity_seconds: frontend.affinity.map(|affinity| affinity.timeout_seconds),
                source_ranges: source_ranges(frontend, *address, packet),
                hidden: hidden.iter().map(|(frontend, _)| frontend.name.to_string()).collect(),
            }
        }
        None => elsewhere(table, node, packet),
    };
    Ok(Report {
        node: node.place.node.to_string(),
        mode: mode.to_string(),
        from: packet.from.ip(),
        to: packet.to,
        protocol: Protocol::from_number(packet.protocol).map_or("unknown", Protocol::name).to_owned(),
        kernel: kernel(mode, table, node, packet, &destination)?,
        destination,
        endpoints,
        drift: None,
    })
}

/// Frontends that have this address, the one that gets the packet first: the oldest of those that have an endpoint.
fn claimants<'a>(table: &'a ServiceTable, node: &NodeView, packet: &Packet) -> Vec<(&'a Frontend, AddressKind)> {
    let (address, port) = (packet.to.ip(), packet.to.port());
    let is_own = address.is_loopback() || node.addresses.contains(&address);
    let kind = |frontend: &Frontend| {
        // Ports of the other family are none of this address.
        if !frontend.cluster_ips.iter().any(|ip| ip.is_ipv6() == address.is_ipv6()) {
            return None;
        }
        if frontend.node_port.is_some_and(|node_port| node_port.get() == port) && is_own {
            return Some(AddressKind::NodePort);
        }
        let lists = [
            (&frontend.cluster_ips, AddressKind::ClusterIp),
            (&frontend.external_ips, AddressKind::ExternalIp),
            (&frontend.load_balancer_ips, AddressKind::LoadBalancer),
        ];
        let matching = lists.into_iter().find(|(list, _)| frontend.port == port && list.contains(&address));
        matching.map(|(_, kind)| kind)
    };
    let of_protocol = table.frontends().filter(|frontend| frontend.name.protocol.number() == packet.protocol);
    let mut found: Vec<_> = of_protocol.filter_map(|frontend| Some((&**frontend, kind(frontend)?))).collect();
    let is_unserved = |(frontend, kind): &(&Frontend, AddressKind)| {
        let policy = policy(frontend, *kind, node, packet.from.ip());
        used(frontend, node, policy.of(), address.is_ipv6()).is_empty()
    };
    // Stable: frontends come by age.
    found.sort_by_key(is_unserved);
    found
}

fn policy(frontend: &Frontend, address: AddressKind, node: &NodeView, from: IpAddr) -> Policy {
    let from_inside = from.is_loopback()
        || node.addresses.contains(&from)
        || node.pod_cidrs(from.is_ipv6()).any(|cidr| cidr.contains(&from));
    match (address, frontend.internal_policy, frontend.external_policy) {
        (AddressKind::ClusterIp, TrafficPolicy::Cluster, _) => Policy::InternalCluster,
        (AddressKind::ClusterIp, TrafficPolicy::Local, _) => Policy::InternalLocal,
        (_, _, TrafficPolicy::Cluster) => Policy::ExternalCluster,
        (_, _, TrafficPolicy::Local) if from_inside => Policy::ExternalLocalFromInside,
        (_, _, TrafficPolicy::Local) => Policy::ExternalLocal,
    }
}

fn source_ranges(frontend: &Frontend, address: AddressKind, packet: &Packet) -> Option<SourceRanges> {
    let of_family = frontend.source_ranges.iter().filter(|net| net.addr().is_ipv6() == packet.to.is_ipv6());
    let ranges: Vec<_> = of_family.collect();
    if address != AddressKind::LoadBalancer || ranges.is_empty() {
        return None;
    }
    let is_allowed = ranges.iter().any(|net| net.contains(&packet.from.ip()));
    Some(SourceRanges { allowed: ranges.iter().map(ToString::to_string).collect(), is_allowed })
}

/// The endpoints that a packet may be sent to.
fn used(frontend: &Frontend, node: &NodeView, policy: TrafficPolicy, v6: bool) -> BTreeSet<SocketAddr> {
    let scopes = scopes(frontend, node, v6);
    let used = match policy {
        TrafficPolicy::Cluster => scopes.cluster,
        TrafficPolicy::Local => scopes.local,
    };
    used.iter().map(|endpoint| endpoint.address).collect()
}

fn explain_endpoints(frontend: &Frontend, node: &NodeView, policy: TrafficPolicy, v6: bool) -> Vec<EndpointReport> {
    let used = used(frontend, node, policy, v6);
    let one = |endpoint: &Arc<Endpoint>| EndpointReport {
        address: endpoint.address,
        node: endpoint.node.clone(),
        zone: endpoint.zone.clone(),
        used: used.contains(&endpoint.address),
        why: why(frontend, endpoint, node, policy, v6, used.contains(&endpoint.address)),
    };
    frontend.endpoints.iter().map(one).collect()
}

/// The rule that decided about an endpoint. `used` is the decision; the order here is that of the rules.
fn why(
    frontend: &Frontend,
    endpoint: &Endpoint,
    node: &NodeView,
    policy: TrafficPolicy,
    v6: bool,
    used: bool,
) -> String {
    let is_ejected = node.ejected.contains(&(endpoint.address, frontend.name.protocol));
    match (used, endpoint.ready) {
        (true, true) if is_ejected => return "ready; it does not seem to answer, but no more may be left out".into(),
        (true, true) => return "ready".into(),
        (true, false) => return "terminating and still serving, and nobody here is ready".into(),
        (false, _) => {}
    }
    if endpoint.address.is_ipv6() != v6 {
        return "its address is of the other family".into();
    }
    match (endpoint.ready, endpoint.serving, endpoint.terminating) {
        (false, false, true) => return "terminating and no longer serving".into(),
        (false, _, false) => return "not ready".into(),
        _ => {}
    }
    if policy == TrafficPolicy::Local && endpoint.node.as_ref() != Some(&node.place.node) {
        return format!("not on {}, as the policy Local asks", node.place.node);
    }
    if !endpoint.ready {
        return "terminating, and others are ready".into();
    }
    if is_ejected {
        return "ejected: it does not answer".into();
    }
    let list = |names: &[Arc<str>]| names.join(", ");
    match &node.place.zone {
        _ if !endpoint.for_nodes().is_empty() && !endpoint.for_nodes().contains(&node.place.node) => {
            format!("its hint is for {}, and another endpoint's for {}", list(endpoint.for_nodes()), node.place.node)
        }
        Some(zone) => format!("its hint is for zone {}, and this node is in zone {zone}", list(endpoint.for_zones())),
        None => "its hint is for others".into(),
    }
}

/// What an address is that no frontend has.
fn elsewhere(table: &ServiceTable, node: &NodeView, packet: &Packet) -> Destination {
    let address = packet.to.ip();
    let owners = table.by_address(address);
    let name = |service: &services::Service| format!("{}/{}", service.namespace, service.name);
    for owner in &owners {
        if let Owner::ClusterIp(service) = owner {
            let port = |port: &services::ServicePort| format!("{}/{}", port.port, port.protocol);
            return Destination::UndefinedPort {
                service: name(service),
                ports: service.ports.iter().map(port).collect(),
            };
        }
    }
    let behind: BTreeSet<String> = owners
        .iter()
        .filter_map(|owner| match owner {
            Owner::Endpoint(service, _) => Some(name(service)),
            Owner::ClusterIp(_) => None,
        })
        .collect();
    if !behind.is_empty() {
        return Destination::Endpoint { services: behind.into_iter().collect() };
    }
    if node.service_cidrs.iter().any(|cidr| cidr.contains(&address)) {
        return Destination::Unallocated;
    }
    Destination::Other
}

fn kernel(
    mode: Mode,
    table: &ServiceTable,
    node: &NodeView,
    packet: &Packet,
    destination: &Destination,
) -> Result<Kernel, Error> {
    let mut plan = super::Plan::new(mode, table, node, packet)?;
    let mut rules = Vec::new();
    plan.walk(packet, &node.addresses, &mut |_| 0, &mut rules);
    let mut fates = BTreeSet::new();
    for draw in 0..WALKS {
        // A draw that is not below its argument counts from the start again; the second makes chains of yes-or-no draws
        // say yes once at each link.
        let mut left = draw;
        fates.insert(plan.walk(packet, &node.addresses, &mut |modulus| draw % modulus, &mut Vec::new()));
        let mut one_by_one = |_: u32| {
            left = left.wrapping_sub(1);
            u32::from(left != u32::MAX)
        };
        fates.insert(plan.walk(packet, &node.addresses, &mut one_by_one, &mut Vec::new()));
    }
    let fates = fates.iter().map(|fate| match fate {
        Fate::Sent { to, masqueraded: false } if *to == packet.to => match destination {
            Destination::Frontend { .. } => "left alone: in this mode the Service does not listen there".to_owned(),
            _ => "left alone by the proxy".to_owned(),
        },
        fate => describe(fate),
    });
    Ok(Kernel { fates: fates.collect(), rules })
}

/// One fate in words.
pub(super) fn describe(fate: &Fate) -> String {
    match fate {
        Fate::Dropped => "dropped".to_owned(),
        Fate::Rejected => "rejected".to_owned(),
        Fate::Sent { to, masqueraded: true } => format!("sent to {to}, masqueraded"),
        Fate::Sent { to, masqueraded: false } => format!("sent to {to}"),
    }
}

/// What DNS says for a Service of this name: in this family if one is asked for, otherwise the primary one.
pub fn cluster_ip(table: &ServiceTable, namespace: &str, name: &str, family: Option<bool>) -> Result<IpAddr, Error> {
    let unknown = |why| Error::NoAddress { service: format!("{namespace}/{name}"), why };
    let service = table.service(namespace, name).ok_or_else(|| unknown("there is no such Service"))?;
    match &service.kind {
        ServiceKind::ClusterIp(addresses) => addresses
            .iter()
            .find(|address| family.is_none_or(|v6| address.is_ipv6() == v6))
            .copied()
            .ok_or_else(|| unknown("it has no cluster IP of the sender's family")),
        ServiceKind::Headless => Err(unknown("it is headless: DNS gives its pods' addresses, ask about one of them")),
        ServiceKind::ExternalName(_) => Err(unknown("it is an ExternalName: DNS gives another name, no proxy sees it")),
        ServiceKind::Pending => Err(unknown("its cluster IP is not allocated yet")),
    }
}
