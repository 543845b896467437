//! Where requests go: a port of a Service, and its endpoints as they are now.

use std::collections::HashMap;
use std::fmt::{Display, Formatter};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use services::{Protocol, Service, ServiceKey, ServiceKind, ServicePort, ServiceTable};

use crate::sticky::number_of;
use crate::swap::Swap;

/// A port of a Service as a rule names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortRef {
    Name(Arc<str>),
    Number(u16),
    /// For datagrams.
    Udp(u16),
    /// The first that the Service has.
    First,
    /// At the Service's own address, whatever endpoints it has.
    ClusterIp(Box<PortRef>),
}

impl Display for PortRef {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            PortRef::Name(name) => f.write_str(name),
            PortRef::Number(number) => write!(f, "{number}"),
            PortRef::Udp(number) => write!(f, "{number}/UDP"),
            PortRef::First => f.write_str("first"),
            PortRef::ClusterIp(port) => write!(f, "{port} at its cluster IP"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamKey {
    pub namespace: Arc<str>,
    pub service: Arc<str>,
    pub port: PortRef,
}

impl UpstreamKey {
    /// The port of a Service whose DNS name within a cluster this is: `SERVICE.NAMESPACE.svc`, with any domain behind.
    pub fn of_name(name: &str, port: u16) -> Option<Self> {
        let mut labels = name.trim_end_matches('.').split('.');
        let (service, namespace, svc) = (labels.next()?, labels.next()?, labels.next()?);
        let is_service = svc == "svc" && !service.is_empty() && !namespace.is_empty();
        is_service.then(|| UpstreamKey {
            namespace: namespace.into(),
            service: service.into(),
            port: PortRef::Number(port),
        })
    }
}

impl Display for UpstreamKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}:{}", self.namespace, self.service, self.port)
    }
}

/// A port of a Service. Routes hold it; what it leads to changes without them.
#[derive(Debug)]
pub struct Upstream {
    pub key: UpstreamKey,
    now: Swap<Targets>,
    /// Whose turn it is, where endpoints take turns.
    pub turn: AtomicU32,
    /// An ExternalName is followed to where it leads.
    follows_names: bool,
}

/// What a port leads to at the moment.
#[derive(Debug, Default)]
pub struct Targets {
    pub endpoints: Vec<Arc<Endpoint>>,
    /// The port's `appProtocol`.
    pub app_protocol: Option<Arc<str>>,
    /// A name outside the cluster, and the port there: its addresses are the endpoints.
    pub name: Option<(Arc<str>, u16)>,
    /// Why there can be no endpoints.
    pub problem: Option<Problem>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    NoService,
    NoPort,
    ExternalName,
}

impl Problem {
    pub fn reason(self) -> &'static str {
        match self {
            Problem::NoService => "ServiceNotFound",
            Problem::NoPort => "PortNotFound",
            Problem::ExternalName => "ExternalName",
        }
    }

    /// A sentence for people.
    pub fn text(self, key: &UpstreamKey) -> String {
        let UpstreamKey { namespace, service, port } = key;
        match self {
            Problem::NoService => {
                format!("there is no Service {namespace}/{service}; its paths answer 503 until there is")
            }
            Problem::NoPort => {
                format!("Service {namespace}/{service} has no TCP port {port}; its paths answer 503 until it has")
            }
            Problem::ExternalName => format!(
                "Service {namespace}/{service} is an ExternalName, which is not followed here; its paths answer 503: use a Service with endpoints"
            ),
        }
    }
}

/// One address behind a Service port, and what we know of it. It is the same one as long as it is there, whatever changes
/// beside it.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// The same for every proxy.
    pub number: u64,
    /// Requests that have not ended.
    pub active: AtomicU32,
    /// Failures in a row.
    pub failures: AtomicU32,
    /// Milliseconds of the process's life until which it is passed over.
    pub ejected_until: AtomicU64,
    /// The millisecond of the process's life in which it was first chosen; 0: not yet.
    pub chosen: AtomicU64,
    pub requests: AtomicU64,
    pub failed: AtomicU64,
}

impl Endpoint {
    pub fn new(address: SocketAddr) -> Self {
        Endpoint {
            address,
            number: number_of(address),
            active: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            chosen: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub fn is_ejected(&self, now: u64) -> bool {
        self.ejected_until.load(Ordering::Relaxed) > now
    }
}

impl Upstream {
    pub fn targets(&self) -> Arc<Targets> {
        self.now.load()
    }

    /// Makes it what the table says, and returns the Services that the names on the way there stand for.
    fn refresh(&self, table: &ServiceTable) -> Vec<ServiceKey> {
        let before = self.now.load();
        let (after, passed) = self.look(table, &before.endpoints);
        let same = after.endpoints.iter().map(|e| e.address).eq(before.endpoints.iter().map(|e| e.address));
        let is_same = after.app_protocol == before.app_protocol && after.problem == before.problem;
        if !same || !is_same || after.name != before.name {
            self.now.store(Arc::new(after));
        }
        passed
    }

    fn look(&self, table: &ServiceTable, known: &[Arc<Endpoint>]) -> (Targets, Vec<ServiceKey>) {
        let nothing = |problem| Targets { problem: Some(problem), ..Targets::default() };
        let (mut at, mut passed) = (self.key.clone(), Vec::new());
        loop {
            let Some(service) = table.service(&at.namespace, &at.service) else {
                return (nothing(Problem::NoService), passed);
            };
            let port = port_of(service, &at.port);
            let ServiceKind::ExternalName(name) = &service.kind else {
                let targets =
                    port.map_or_else(|| nothing(Problem::NoPort), |port| here(&at, table, service, port, known));
                return (targets, passed);
            };
            if !self.follows_names || passed.len() >= NAMES_IN_A_ROW {
                return (nothing(Problem::ExternalName), passed);
            }
            // Without ports of its own it has the one that is asked for.
            let number = match (&at.port, port) {
                (_, Some(port)) => port.port,
                (PortRef::Number(number), None) if service.ports.is_empty() => *number,
                _ => return (nothing(Problem::NoPort), passed),
            };
            let Some(next) = UpstreamKey::of_name(name, number) else {
                let app_protocol = port.and_then(|port| port.app_protocol.clone());
                return (Targets { name: Some((name.clone(), number)), app_protocol, ..Targets::default() }, passed);
            };
            passed.push((next.namespace.clone(), next.service.clone()));
            at = next;
        }
    }
}

/// ExternalNames that lead to each other.
const NAMES_IN_A_ROW: usize = 4;

fn port_of<'a>(service: &'a Service, wanted: &PortRef) -> Option<&'a ServicePort> {
    let protocol = if matches!(wanted, PortRef::Udp(_)) { Protocol::Udp } else { Protocol::Tcp };
    let mut ports = service.ports.iter().filter(|port| port.protocol == protocol);
    match wanted {
        PortRef::Name(name) => ports.find(|port| port.name == *name),
        PortRef::Number(number) | PortRef::Udp(number) => ports.find(|port| port.port == *number),
        PortRef::First => ports.next(),
        PortRef::ClusterIp(port) => port_of(service, port),
    }
}

/// The endpoints of a Service that has some of its own.
fn here(
    key: &UpstreamKey,
    table: &ServiceTable,
    service: &Service,
    port: &ServicePort,
    known: &[Arc<Endpoint>],
) -> Targets {
    let held: HashMap<SocketAddr, &Arc<Endpoint>> = known.iter().map(|endpoint| (endpoint.address, endpoint)).collect();
    let endpoint = |address: SocketAddr| match held.get(&address) {
        Some(endpoint) => Arc::clone(endpoint),
        None => Arc::new(Endpoint::new(address)),
    };
    let app_protocol = port.app_protocol.clone();
    if let (PortRef::ClusterIp(_), ServiceKind::ClusterIp(ips)) = (&key.port, &service.kind) {
        let own = ips.first().map(|ip| endpoint(SocketAddr::new(*ip, port.port)));
        return Targets { endpoints: own.into_iter().collect(), app_protocol, ..Targets::default() };
    }
    let all = table.endpoints(&key.namespace, &key.service, &port.name, port.protocol);
    // One family, or pods of both would count twice; the Service's own first.
    let prefers_v6 = matches!(&service.kind, ServiceKind::ClusterIp(ips) if ips.first().is_some_and(|ip| ip.is_ipv6()));
    let usable = |v6: bool| -> Vec<SocketAddr> {
        let family = || all.iter().filter(|endpoint| endpoint.address.is_ipv6() == v6);
        let ready: Vec<SocketAddr> = family().filter(|e| e.ready).map(|e| e.address).collect();
        if !ready.is_empty() {
            return ready;
        }
        // Those that go away still answer, and better than nobody (KEP-1669).
        family().filter(|e| e.serving && e.terminating).map(|e| e.address).collect()
    };
    let mut addresses = usable(prefers_v6);
    if addresses.is_empty() {
        addresses = usable(!prefers_v6);
    }
    addresses.sort_unstable();
    Targets { endpoints: addresses.into_iter().map(endpoint).collect(), app_protocol, ..Targets::default() }
}

/// All upstreams that any route holds.
#[derive(Default)]
pub struct Upstreams {
    /// Also by the Services that ExternalNames on the way lead to.
    by_service: HashMap<ServiceKey, Vec<Weak<Upstream>>>,
    /// ExternalNames are followed.
    pub follows_names: bool,
}

impl Upstreams {
    /// The upstream of this name, as the table has it.
    pub fn get(&mut self, key: &UpstreamKey, table: &ServiceTable) -> Arc<Upstream> {
        let of_service = self.by_service.entry((key.namespace.clone(), key.service.clone())).or_default();
        of_service.retain(|held| held.strong_count() > 0);
        if let Some(held) = of_service.iter().filter_map(Weak::upgrade).find(|held| held.key == *key) {
            return held;
        }
        let (now, turn) = (Swap::default(), AtomicU32::new(0));
        let upstream = Arc::new(Upstream { key: key.clone(), now, turn, follows_names: self.follows_names });
        of_service.push(Arc::downgrade(&upstream));
        let passed = upstream.refresh(table);
        self.link(&upstream, passed);
        upstream
    }

    /// Has the upstream follow changes of these Services, too.
    fn link(&mut self, upstream: &Arc<Upstream>, passed: Vec<ServiceKey>) {
        for service in passed {
            let list = self.by_service.entry(service).or_default();
            if !list.iter().any(|held| std::ptr::eq(held.as_ptr(), Arc::as_ptr(upstream))) {
                list.push(Arc::downgrade(upstream));
            }
        }
    }

    /// Follows a change of a Service.
    pub fn refresh(&mut self, namespace: &str, service: &str, table: &ServiceTable) {
        let key = (namespace.into(), service.into());
        let Some(held) = self.by_service.get_mut(&key) else { return };
        held.retain(|one| one.strong_count() > 0);
        let all: Vec<Arc<Upstream>> = held.iter().filter_map(Weak::upgrade).collect();
        if held.is_empty() {
            self.by_service.remove(&key);
        }
        for one in all {
            let passed = one.refresh(table);
            self.link(&one, passed);
        }
    }

    pub fn refresh_all(&mut self, table: &ServiceTable) {
        self.by_service.retain(|_, held| {
            held.retain(|one| one.strong_count() > 0);
            !held.is_empty()
        });
        for one in self.iter().collect::<Vec<_>>() {
            let passed = one.refresh(table);
            self.link(&one, passed);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Arc<Upstream>> + '_ {
        let own = |service: &ServiceKey, held: &Upstream| {
            (&service.0, &service.1) == (&held.key.namespace, &held.key.service)
        };
        self.by_service.iter().flat_map(move |(service, list)| {
            list.iter().filter_map(Weak::upgrade).filter(move |held| own(service, held)).collect::<Vec<_>>()
        })
    }
}
