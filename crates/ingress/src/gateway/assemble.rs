//! One Gateway: which routes come in at which of its listeners, and what its ports do then.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use api::object::Key;
use rustls_pki_types::ServerName;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{
    ClientHello, ParsedCertificate, ResolvesServerCert, ServerConfig, WebPkiClientVerifier,
};
use tokio_rustls::rustls::sign::CertifiedKey;

use super::RouteType;
use super::attach::{attach, means};
use super::condition::Problem;
use super::grants::{End, allows};
use super::listeners::{Held, Owner, Speaks, World};
use super::objects::{AnyRoute, GROUP, Gateway, ListenerSet, Reference};
use super::ports::{Carries, PortKey, PortTable, StreamRoute, TlsTable, TlsWay, Transport};
use super::rules::Translated;
use super::store::age;
use super::verify::{AnyClient, CaState, Identity};
use crate::compile::SecretState;
use crate::crypto;
use crate::host::HostPattern;
use crate::hosts::HostMap;
use crate::route::{Route, RouteName};
use crate::table::{PathTable, RouteTable};
use crate::tls;
use crate::translate::Register;

/// A Gateway, put together.
pub struct Assembled {
    pub listeners: Vec<Held>,
    /// ListenerSets that may add listeners, and those that may not.
    pub sets: Vec<Arc<ListenerSet>>,
    pub refused_sets: Vec<Arc<ListenerSet>>,
    pub not_accepted: Option<Problem>,
    /// What became of each parentRef that means this Gateway or one of its ListenerSets.
    pub parents: BTreeMap<(RouteType, Key), Vec<Parent>>,
    pub ports: BTreeMap<PortKey, Arc<PortTable>>,
    pub tls: TlsCache,
}

/// A parentRef, and why it leads nowhere if it does.
pub type Parent = (Reference, Result<(), Problem>);

/// TLS as it was set up, kept while nothing of it changes so that tickets stay good.
#[derive(Default)]
pub struct TlsCache {
    ports: HashMap<u16, (TlsInputs, [Arc<ServerConfig>; 2])>,
    identity: Option<Arc<Identity>>,
}

/// What a port's TLS is made of.
#[derive(Clone)]
struct TlsInputs {
    certificates: Vec<(HostPattern, Vec<Arc<CertifiedKey>>)>,
    clients: Option<Clients>,
}

/// Whom clients are taken for.
#[derive(Clone)]
struct Clients {
    roots: Vec<Arc<RootCertStore>>,
    takes_any: bool,
}

impl TlsInputs {
    fn is_same(&self, other: &TlsInputs) -> bool {
        let same = |a: &[Arc<CertifiedKey>], b: &[Arc<CertifiedKey>]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        let certificates = self.certificates.len() == other.certificates.len()
            && self.certificates.iter().zip(&other.certificates).all(|(a, b)| a.0 == b.0 && same(&a.1, &b.1));
        let clients = match (&self.clients, &other.clients) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                a.takes_any == b.takes_any
                    && a.roots.len() == b.roots.len()
                    && a.roots.iter().zip(&b.roots).all(|(a, b)| Arc::ptr_eq(a, b))
            }
            _ => false,
        };
        certificates && clients
    }
}

/// Shows the certificate of the listener whose host is asked for.
#[derive(Debug)]
struct PortResolver(HostMap<Vec<Arc<CertifiedKey>>>);

impl ResolvesServerCert for PortResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or_default().to_ascii_lowercase();
        let list = self.0.find(&name)?;
        if let [only] = &list[..] {
            return Some(only.clone());
        }
        // Of several the one that is for this name.
        let wanted = ServerName::try_from(name).ok();
        let fits = |key: &&Arc<CertifiedKey>| {
            let parsed = key.end_entity_cert().ok().and_then(|held| ParsedCertificate::try_from(held).ok());
            parsed.zip(wanted.as_ref()).is_some_and(|(held, name)| verify_server_name(&held, name).is_ok())
        };
        list.iter().find(fits).or(list.first()).cloned()
    }
}

/// The ListenerSets of a Gateway, the oldest first: those that it lets in, and those that it does not.
pub fn sets_of<'a>(world: &World<'a>, gateway: &Gateway) -> (Vec<&'a Arc<ListenerSet>>, Vec<&'a Arc<ListenerSet>>) {
    let key = gateway.metadata.key();
    let ours = world.objects.sets.values().filter(|set| {
        means(&set.spec.parent_ref, &set.metadata.namespace, "Gateway", &key)
            && set.metadata.deletion_timestamp.is_none()
    });
    let allowed = gateway.spec.allowed_listeners.clone().unwrap_or_default().namespaces;
    let (mut good, bad): (Vec<_>, Vec<_>) =
        ours.partition(|set| world.lets_in(&allowed, "None", &key.namespace, &set.metadata.namespace));
    good.sort_by(|a, b| age(&a.metadata).cmp(&age(&b.metadata)));
    (good, bad)
}

/// The ConfigMap that a reference to authorities leads to.
pub fn authority(world: &World<'_>, from: &Owner, reference: &Reference) -> Result<Key, Problem> {
    if !reference.is("", "ConfigMap", ("", "ConfigMap")) {
        let message = format!("caCertificateRefs {} is no ConfigMap; put ca.crt into one", reference.name);
        return Err(Problem::new("InvalidCACertificateKind", message));
    }
    let key = reference.key(&from.key.namespace);
    let (own, to) = (End { group: GROUP, kind: from.kind }, End { group: "", kind: "ConfigMap" });
    match allows(world.objects.grants.values(), own, &from.key.namespace, to, &key) {
        true => Ok(key),
        false => {
            let message = format!(
                "no ReferenceGrant in {} lets {} of {} refer to ConfigMap {}",
                key.namespace, from.kind, from.key.namespace, key.name
            );
            Err(Problem::new("RefNotPermitted", message))
        }
    }
}

/// Puts a Gateway together.
pub fn assemble(
    world: &World<'_>,
    authorities: &BTreeMap<Key, CaState>,
    gateway: &Gateway,
    translated: &HashMap<(RouteType, Key), Arc<Translated>>,
    register: &mut dyn Register,
    cache: TlsCache,
) -> Assembled {
    let (sets, refused) = sets_of(world, gateway);
    let listeners = world.listeners(gateway, &sets);
    let mut out = Assembled {
        listeners,
        not_accepted: not_accepted(gateway),
        sets: sets.into_iter().cloned().collect(),
        refused_sets: refused.into_iter().cloned().collect(),
        parents: BTreeMap::new(),
        ports: BTreeMap::new(),
        tls: TlsCache::default(),
    };
    let mut builder = Builder { world, gateway, translated, register, out: &mut out, cache };
    let clients = builder.clients(authorities);
    let identity = builder.identity();
    let attached = builder.attach_all();
    builder.ports(attached, &clients, identity);
    out
}

fn not_accepted(gateway: &Gateway) -> Option<Problem> {
    if gateway.spec.infrastructure.parameters_ref.is_some() {
        let message = "spec.infrastructure.parametersRef is not served; take it out";
        return Some(Problem::new("InvalidParameters", message));
    }
    let other = gateway.spec.addresses.iter().find(|one| one.r#type.as_deref().unwrap_or("IPAddress") != "IPAddress");
    other.map(|one| {
        let kind = one.r#type.as_deref().unwrap_or_default();
        Problem::new("UnsupportedAddress", format!("spec.addresses: type {kind} is not served; write IPAddress"))
    })
}

/// What came in at one listener.
#[derive(Default)]
struct Arrived {
    /// By host: of which kind, as HTTPRoute and GRPCRoute do not share one, and the routes in their order.
    http: BTreeMap<HostPattern, (RouteType, Vec<Arc<Route>>)>,
    /// The oldest counts.
    streams: BTreeMap<HostPattern, Arc<StreamRoute>>,
}

struct Builder<'a, 'b> {
    world: &'a World<'b>,
    gateway: &'a Gateway,
    translated: &'a HashMap<(RouteType, Key), Arc<Translated>>,
    register: &'a mut dyn Register,
    out: &'a mut Assembled,
    cache: TlsCache,
}

impl Builder<'_, '_> {
    fn own(&self) -> Owner {
        Owner { kind: "Gateway", key: self.gateway.metadata.key() }
    }

    /// Whom clients are taken for, by port. Listeners of a port whose authorities cannot be read serve nobody.
    fn clients(&mut self, authorities: &BTreeMap<Key, CaState>) -> BTreeMap<u16, Clients> {
        let Some(frontend) = &self.gateway.spec.tls.frontend else { return BTreeMap::new() };
        let own = self.own();
        let mut all = BTreeMap::new();
        for held in self.out.listeners.iter_mut().filter(|held| held.speaks == Some(Speaks::Https)) {
            let of_port = frontend.per_port.iter().find(|one| one.port == held.spec.port);
            let Some(validation) = &of_port.map_or(&frontend.default, |one| &one.tls).validation else { continue };
            let (mut roots, mut problems, mut waits) = (Vec::new(), Vec::new(), false);
            for reference in &validation.ca_certificate_refs {
                let key = match authority(self.world, &own, reference) {
                    Ok(key) => key,
                    Err(problem) => {
                        problems.push(problem);
                        continue;
                    }
                };
                let named = format!("ConfigMap {}/{}", key.namespace, key.name);
                match authorities.get(&key) {
                    Some(CaState::Good(held)) => roots.push(held.clone()),
                    Some(CaState::Missing) => {
                        problems.push(Problem::new("InvalidCACertificateRef", format!("there is no {named}")));
                    }
                    Some(CaState::Broken(why)) => {
                        problems.push(Problem::new("InvalidCACertificateRef", format!("{named} {why}")));
                    }
                    Some(CaState::Unknown) | None => waits = true,
                }
            }
            held.unresolved.extend(problems);
            held.waits |= waits;
            if roots.is_empty() {
                // Nobody could be let in; nobody is, rather than everybody.
                if !waits {
                    let message = "no authority of spec.tls.frontend can be read, so no client can be verified";
                    held.not_accepted.push(Problem::new("NoValidCACertificate", message));
                }
                held.certificates.clear();
                continue;
            }
            all.insert(held.spec.port, Clients { roots, takes_any: validation.mode == "AllowInsecureFallback" });
        }
        all
    }

    fn identity(&mut self) -> Option<Arc<Identity>> {
        let reference = self.gateway.spec.tls.backend.client_certificate_ref.as_ref()?;
        let key = self.world.secret(&self.own(), reference, "spec.tls.backend.clientCertificateRef").ok()?;
        let SecretState::Good(certificate) = self.world.secrets.get(&key)? else { return None };
        let before = self.cache.identity.take().filter(|held| Arc::ptr_eq(&held.key, certificate));
        let identity = before.unwrap_or_else(|| Arc::new(Identity::new(certificate.clone())));
        self.out.tls.identity = Some(identity.clone());
        Some(identity)
    }

    fn attach_all(&mut self) -> Vec<Arrived> {
        let mut arrived: Vec<Arrived> = self.out.listeners.iter().map(|_| Arrived::default()).collect();
        let owners: BTreeSet<Owner> = [self.own()]
            .into_iter()
            .chain(self.out.sets.iter().map(|set| Owner { kind: "ListenerSet", key: set.metadata.key() }))
            .collect();
        let is_ours = |parent: &Reference, namespace: &str| {
            owners.iter().any(|owner| means(parent, namespace, owner.kind, &owner.key))
        };
        let mut routes: Vec<(RouteType, &Arc<AnyRoute>)> = self
            .world
            .objects
            .routes
            .iter()
            .filter(|(_, route)| {
                let namespace = &route.metadata.namespace;
                route.metadata.deletion_timestamp.is_none()
                    && route.spec.parent_refs.iter().any(|parent| is_ours(parent, namespace))
            })
            .map(|((kind, _), route)| (*kind, route))
            .collect();
        routes.sort_by(|a, b| age(&a.1.metadata).cmp(&age(&b.1.metadata)));
        for (kind, route) in routes {
            let place = (kind, route.metadata.key());
            let Some(translated) = self.translated.get(&place) else { continue };
            let mut counted = BTreeSet::new();
            let mut results = Vec::new();
            for parent in route.spec.parent_refs.iter().filter(|parent| is_ours(parent, &route.metadata.namespace)) {
                let result = match &translated.not_accepted {
                    Some(problem) => Err(problem.clone()),
                    None => self.attach_one(kind, route, translated, parent, &mut arrived, &mut counted),
                };
                results.push((parent.clone(), result));
            }
            for at in counted {
                self.out.listeners[at].attached += 1;
            }
            self.out.parents.insert(place, results);
        }
        arrived
    }

    fn attach_one(
        &mut self,
        kind: RouteType,
        route: &AnyRoute,
        translated: &Translated,
        parent: &Reference,
        arrived: &mut [Arrived],
        counted: &mut BTreeSet<usize>,
    ) -> Result<(), Problem> {
        let met = attach(self.world, kind, route, parent, &self.out.listeners)?;
        let mut is_in = false;
        for (at, hosts) in met {
            // Another parentRef has brought it here already.
            let is_new = !counted.contains(&at);
            for host in hosts {
                if matches!(kind, RouteType::Http | RouteType::Grpc) {
                    let held = arrived[at].http.entry(host).or_insert_with(|| (kind, Vec::new()));
                    if held.0 != kind {
                        continue;
                    }
                    if is_new {
                        held.1.extend(translated.routes.iter().cloned());
                    }
                } else if let Some(backends) = &translated.backends {
                    let name = RouteName {
                        kind: kind.kind(),
                        namespace: route.metadata.namespace.as_str().into(),
                        name: route.metadata.name.as_str().into(),
                        host: route.spec.hostnames.join(",").into(),
                        path: "".into(),
                    };
                    let counts = self.register.counts(&name);
                    let made = StreamRoute { name, backends: backends.clone(), counts };
                    arrived[at].streams.entry(host).or_insert_with(|| Arc::new(made));
                }
                is_in = true;
                counted.insert(at);
            }
        }
        match is_in {
            true => Ok(()),
            false => {
                let other = if kind == RouteType::Http { "GRPCRoute" } else { "HTTPRoute" };
                let message = format!("its hosts belong to an older {other} of the same listener");
                Err(Problem::new("HostnameConflict", message))
            }
        }
    }

    fn ports(&mut self, arrived: Vec<Arrived>, clients: &BTreeMap<u16, Clients>, identity: Option<Arc<Identity>>) {
        let mut by_port: BTreeMap<(u16, Transport), Vec<usize>> = BTreeMap::new();
        if self.out.not_accepted.is_none() {
            for (at, held) in self.out.listeners.iter().enumerate().filter(|(_, held)| held.serves()) {
                let transport = if held.speaks == Some(Speaks::Udp) { Transport::Udp } else { Transport::Tcp };
                by_port.entry((held.spec.port, transport)).or_default().push(at);
            }
        }
        for ((port, transport), listeners) in by_port {
            let first = self.out.listeners[listeners[0]].speaks;
            let stream = || listeners.iter().find_map(|at| arrived[*at].streams.values().next().cloned());
            let carries = match first {
                Some(Speaks::Http) => Carries::Http(self.hosts(&listeners, &arrived)),
                Some(Speaks::Tcp) => Carries::Tcp(stream()),
                Some(Speaks::Udp) => Carries::Udp(stream()),
                _ => match self.tls(port, &listeners, &arrived, clients.get(&port)) {
                    Ok(table) => Carries::Tls(table),
                    Err(problem) => {
                        listeners.iter().for_each(|at| self.out.listeners[*at].not_accepted.push(problem.clone()));
                        continue;
                    }
                },
            };
            let key = PortKey { gateway: self.gateway.metadata.key(), port, transport };
            let table = PortTable { number: port, identity: identity.clone(), carries };
            self.out.ports.insert(key, Arc::new(table));
        }
    }

    /// The routes of listeners that speak HTTP, by the listener's host.
    fn hosts(&self, listeners: &[usize], arrived: &[Arrived]) -> HostMap<Arc<RouteTable>> {
        let mut map = HostMap::default();
        for at in listeners {
            let mut table = RouteTable::default();
            for (host, (_, routes)) in &arrived[*at].http {
                table.set(host, Some(Arc::new(PathTable::new(routes.clone()))));
            }
            map.insert(&self.out.listeners[*at].host, Arc::new(table));
        }
        map
    }

    fn tls(
        &mut self,
        port: u16,
        listeners: &[usize],
        arrived: &[Arrived],
        clients: Option<&Clients>,
    ) -> Result<TlsTable, Problem> {
        let mut ways = HostMap::default();
        let mut inputs = TlsInputs { certificates: Vec::new(), clients: clients.cloned() };
        let mut https = Vec::new();
        for at in listeners {
            let held = &self.out.listeners[*at];
            if held.speaks == Some(Speaks::Https) {
                ways.insert(&held.host, TlsWay::Https);
                https.push(*at);
            }
            for (host, route) in &arrived[*at].streams {
                let ends = held.speaks == Some(Speaks::TlsTerminate);
                let way = if ends { TlsWay::Terminate(route.clone()) } else { TlsWay::Passthrough(route.clone()) };
                ways.insert(host, way);
            }
            if !held.certificates.is_empty() {
                inputs.certificates.push((held.host.clone(), held.certificates.clone()));
            }
        }
        let configs = match self.cache.ports.remove(&port) {
            Some((before, configs)) if before.is_same(&inputs) => configs,
            _ => [server(&inputs, &[b"h2", b"http/1.1"])?, server(&inputs, &[])?],
        };
        self.out.tls.ports.insert(port, (inputs, configs.clone()));
        let [https_config, stream_config] = configs;
        Ok(TlsTable { https_config, stream_config, ways, http: self.hosts(&https, arrived) })
    }
}

fn server(inputs: &TlsInputs, protocols: &[&[u8]]) -> Result<Arc<ServerConfig>, Problem> {
    let wrong = |error: String| Problem::new("Invalid", format!("TLS cannot be set up: {error}"));
    let mut certificates = HostMap::default();
    for (host, held) in &inputs.certificates {
        certificates.insert(host, held.clone());
    }
    let clients = match &inputs.clients {
        None => None,
        Some(wanted) => {
            let mut roots = RootCertStore::empty();
            wanted.roots.iter().for_each(|one| roots.roots.extend(one.roots.iter().cloned()));
            let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), crypto::provider());
            let strict: Arc<dyn ClientCertVerifier> = builder.build().map_err(|error| wrong(error.to_string()))?;
            Some(if wanted.takes_any { Arc::new(AnyClient(strict)) } else { strict })
        }
    };
    tls::server(Arc::new(PortResolver(certificates)), clients, protocols).map_err(|error| wrong(error.to_string()))
}

impl Assembled {
    /// Ports that clients are to reach, whether or not all of them do something yet.
    pub fn wanted_ports(&self) -> BTreeSet<(u16, Transport)> {
        let good = self.listeners.iter().filter(|held| held.conflict.is_none() && held.not_accepted.is_empty());
        good.map(|held| {
            (held.spec.port, if held.speaks == Some(Speaks::Udp) { Transport::Udp } else { Transport::Tcp })
        })
        .collect()
    }
}
