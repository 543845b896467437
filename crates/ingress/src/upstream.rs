//! Where requests go: a port of a Service, and its endpoints as they are now.

use std::collections::HashMap;
use std::fmt::{Display, Formatter};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use services::{Protocol, ServiceKey, ServiceKind, ServiceTable};

use crate::sticky::number_of;
use crate::swap::Swap;

/// A port of a Service as a rule names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortRef {
    Name(Arc<str>),
    Number(u16),
    /// For datagrams.
    Udp(u16),
}

impl Display for PortRef {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            PortRef::Name(name) => f.write_str(name),
            PortRef::Number(number) => write!(f, "{number}"),
            PortRef::Udp(number) => write!(f, "{number}/UDP"),
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
}

/// What a port leads to at the moment.
#[derive(Debug, Default)]
pub struct Targets {
    pub endpoints: Vec<Arc<Endpoint>>,
    /// The port's `appProtocol`.
    pub app_protocol: Option<Arc<str>>,
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
                "Service {namespace}/{service} is an ExternalName, which is not followed; its paths answer 503: use a Service with endpoints"
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

    /// Makes it what the table says.
    fn refresh(&self, table: &ServiceTable) {
        let before = self.now.load();
        let after = look(&self.key, table, &before.endpoints);
        let same = after.endpoints.iter().map(|e| e.address).eq(before.endpoints.iter().map(|e| e.address));
        if !same || after.app_protocol != before.app_protocol || after.problem != before.problem {
            self.now.store(Arc::new(after));
        }
    }
}

fn look(key: &UpstreamKey, table: &ServiceTable, known: &[Arc<Endpoint>]) -> Targets {
    let nothing = |problem| Targets { problem: Some(problem), ..Targets::default() };
    let Some(service) = table.service(&key.namespace, &key.service) else { return nothing(Problem::NoService) };
    if matches!(service.kind, ServiceKind::ExternalName(_)) {
        return nothing(Problem::ExternalName);
    }
    let protocol = if matches!(key.port, PortRef::Udp(_)) { Protocol::Udp } else { Protocol::Tcp };
    let mut ports = service.ports.iter().filter(|port| port.protocol == protocol);
    let port = ports.find(|port| match &key.port {
        PortRef::Name(name) => port.name == *name,
        PortRef::Number(number) | PortRef::Udp(number) => port.port == *number,
    });
    let Some(port) = port else { return nothing(Problem::NoPort) };
    let all = table.endpoints(&key.namespace, &key.service, &port.name, protocol);
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
    let held: HashMap<SocketAddr, &Arc<Endpoint>> = known.iter().map(|endpoint| (endpoint.address, endpoint)).collect();
    let endpoint = |address: SocketAddr| match held.get(&address) {
        Some(endpoint) => Arc::clone(endpoint),
        None => Arc::new(Endpoint::new(address)),
    };
    Targets {
        endpoints: addresses.into_iter().map(endpoint).collect(),
        app_protocol: port.app_protocol.clone(),
        problem: None,
    }
}

/// All upstreams that any route holds.
#[derive(Default)]
pub struct Upstreams {
    by_service: HashMap<ServiceKey, Vec<Weak<Upstream>>>,
}

impl Upstreams {
    /// The upstream of this name, as the table has it.
    pub fn get(&mut self, key: &UpstreamKey, table: &ServiceTable) -> Arc<Upstream> {
        let of_service = self.by_service.entry((key.namespace.clone(), key.service.clone())).or_default();
        of_service.retain(|held| held.strong_count() > 0);
        if let Some(held) = of_service.iter().filter_map(Weak::upgrade).find(|held| held.key == *key) {
            return held;
        }
        let upstream = Upstream { key: key.clone(), now: Swap::default(), turn: AtomicU32::new(0) };
        upstream.refresh(table);
        let upstream = Arc::new(upstream);
        of_service.push(Arc::downgrade(&upstream));
        upstream
    }

    /// Follows a change of a Service.
    pub fn refresh(&mut self, namespace: &str, service: &str, table: &ServiceTable) {
        let key = (namespace.into(), service.into());
        let Some(held) = self.by_service.get_mut(&key) else { return };
        held.retain(|one| one.strong_count() > 0);
        held.iter().filter_map(Weak::upgrade).for_each(|one| one.refresh(table));
        if held.is_empty() {
            self.by_service.remove(&key);
        }
    }

    pub fn refresh_all(&mut self, table: &ServiceTable) {
        self.by_service.retain(|_, held| {
            held.retain(|one| one.strong_count() > 0);
            !held.is_empty()
        });
        self.iter().for_each(|one| one.refresh(table));
    }

    pub fn iter(&self) -> impl Iterator<Item = Arc<Upstream>> + '_ {
        self.by_service.values().flatten().filter_map(Weak::upgrade)
    }
}
