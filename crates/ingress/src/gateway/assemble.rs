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

use super::attach::means;
use super::attached::Attached;
use super::condition::Problem;
use super::grants::{End, allows};
use super::listeners::{Held, Owner, Speaks, World};
use super::objects::{GROUP, Gateway, ListenerSet, Reference};
use super::ports::{Carries, PortKey, PortTable, TlsTable, TlsWay, Transport};
use super::store::age;
use super::verify::{AnyClient, CaState, Identity};
use crate::crypto;
use crate::host::HostPattern;
use crate::hosts::HostMap;
use crate::table::RouteTable;
use crate::tls;

/// A Gateway, put together.
pub struct Assembled {
    pub listeners: Vec<Held>,
    /// ListenerSets that may add listeners, and those that may not.
    pub sets: Vec<Arc<ListenerSet>>,
    pub refused_sets: Vec<Arc<ListenerSet>>,
    pub not_accepted: Option<Problem>,
    /// References of its own, not of a listener, that lead nowhere.
    pub unresolved: Vec<Problem>,
    pub attached: Attached,
    pub ports: BTreeMap<PortKey, Arc<PortTable>>,
    pub tls: TlsCache,
    clients: BTreeMap<u16, Clients>,
    identity: Option<Arc<Identity>>,
}

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

/// Puts a Gateway together, without its routes; what was set up before for TLS is kept where it still fits.
pub fn assemble(
    world: &World<'_>,
    authorities: &BTreeMap<Key, CaState>,
    gateway: &Gateway,
    mut cache: TlsCache,
) -> Assembled {
    let (sets, refused) = sets_of(world, gateway);
    let mut listeners = world.listeners(gateway, &sets);
    let own = Owner { kind: "Gateway", key: gateway.metadata.key() };
    let clients = clients(world, authorities, gateway, &own, &mut listeners);
    let (identity, unresolved) = match identity(world, gateway, &own, &mut cache) {
        Ok(identity) => (identity, Vec::new()),
        Err(problem) => (None, vec![problem]),
    };
    let owners = sets.iter().map(|set| Owner { kind: "ListenerSet", key: set.metadata.key() });
    let owners: BTreeSet<Owner> = owners.chain([own]).collect();
    Assembled {
        attached: Attached::new(owners, listeners.len()),
        listeners,
        not_accepted: not_accepted(gateway),
        unresolved,
        sets: sets.into_iter().cloned().collect(),
        refused_sets: refused.into_iter().cloned().collect(),
        ports: BTreeMap::new(),
        tls: cache,
        clients,
        identity,
    }
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

/// Whom clients are taken for, by port. Listeners of a port whose authorities cannot be read serve nobody.
fn clients(
    world: &World<'_>,
    authorities: &BTreeMap<Key, CaState>,
    gateway: &Gateway,
    own: &Owner,
    listeners: &mut [Held],
) -> BTreeMap<u16, Clients> {
    let Some(frontend) = &gateway.spec.tls.frontend else { return BTreeMap::new() };
    let mut all = BTreeMap::new();
    for held in listeners.iter_mut().filter(|held| held.speaks == Some(Speaks::Https)) {
        let of_port = frontend.per_port.iter().find(|one| one.port == held.spec.port);
        let Some(validation) = &of_port.map_or(&frontend.default, |one| &one.tls).validation else { continue };
        let (mut roots, mut problems, mut waits) = (Vec::new(), Vec::new(), false);
        for reference in &validation.ca_certificate_refs {
            let key = match authority(world, own, reference) {
                Ok(key) => key,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            let named = format!("ConfigMap {}/{}", key.namespace, key.name);
            let wrong = |message: String| Problem::new("InvalidCACertificateRef", message);
            match authorities.get(&key) {
                Some(CaState::Good(held)) => roots.push(held.clone()),
                Some(CaState::Missing) => problems.push(wrong(format!("there is no {named}"))),
                Some(CaState::Broken(why)) => problems.push(wrong(format!("{named} {why}"))),
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

/// Whom endpoints take the Gateway for, if it says so and its Secret has been read.
fn identity(
    world: &World<'_>,
    gateway: &Gateway,
    own: &Owner,
    cache: &mut TlsCache,
) -> Result<Option<Arc<Identity>>, Problem> {
    let Some(reference) = &gateway.spec.tls.backend.client_certificate_ref else { return Ok(None) };
    let place = "spec.tls.backend.clientCertificateRef";
    let wrong = |message: String| Problem::new("InvalidClientCertificateRef", message);
    let key = world.secret(own, reference, place).map_err(|problem| match problem.reason {
        "RefNotPermitted" => problem,
        _ => wrong(problem.message),
    })?;
    let Some(certificate) = world.certificate(&key).map_err(|why| wrong(format!("{place}: {why}")))? else {
        return Ok(None);
    };
    let before = cache.identity.take().filter(|held| Arc::ptr_eq(&held.key, certificate));
    let identity = before.unwrap_or_else(|| Arc::new(Identity::new(certificate.clone())));
    cache.identity = Some(identity.clone());
    Ok(Some(identity))
}

impl Assembled {
    /// Makes of the listeners and of what is attached to them what the ports do.
    pub fn make_ports(&mut self, gateway: &Key) {
        let mut by_port: BTreeMap<(u16, Transport), Vec<usize>> = BTreeMap::new();
        if self.not_accepted.is_none() {
            for (at, held) in self.listeners.iter().enumerate().filter(|(_, held)| held.serves()) {
                by_port.entry((held.spec.port, held.transport())).or_default().push(at);
            }
        }
        self.ports.clear();
        self.tls.ports.retain(|port, _| by_port.contains_key(&(*port, Transport::Tcp)));
        for ((port, transport), listeners) in by_port {
            let first = self.listeners[listeners[0]].speaks;
            let stream = || listeners.iter().find_map(|at| self.attached.streams[*at].values().next().cloned());
            let carries = match first {
                Some(Speaks::Http) => Carries::Http(self.hosts(&listeners)),
                Some(Speaks::Tcp) => Carries::Tcp(stream()),
                Some(Speaks::Udp) => Carries::Udp(stream()),
                _ => match self.tls(port, &listeners) {
                    Ok(table) => Carries::Tls(table),
                    Err(problem) => {
                        listeners.iter().for_each(|at| self.listeners[*at].not_accepted.push(problem.clone()));
                        continue;
                    }
                },
            };
            let key = PortKey { gateway: gateway.clone(), port, transport };
            let table = PortTable { number: port, identity: self.identity.clone(), carries };
            self.ports.insert(key, Arc::new(table));
        }
    }

    /// The routes of listeners that speak HTTP, by the listener's host.
    fn hosts(&self, listeners: &[usize]) -> HostMap<Arc<RouteTable>> {
        let mut map = HostMap::default();
        for at in listeners {
            map.insert(&self.listeners[*at].host, self.attached.tables[*at].clone());
        }
        map
    }

    fn tls(&mut self, port: u16, listeners: &[usize]) -> Result<TlsTable, Problem> {
        let mut ways = HostMap::default();
        let mut inputs = TlsInputs { certificates: Vec::new(), clients: self.clients.get(&port).cloned() };
        let mut https = Vec::new();
        for at in listeners {
            let held = &self.listeners[*at];
            if held.speaks == Some(Speaks::Https) {
                ways.insert(&held.host, TlsWay::Https);
                https.push(*at);
            }
            for (host, route) in &self.attached.streams[*at] {
                let ends = held.speaks == Some(Speaks::TlsTerminate);
                let way = if ends { TlsWay::Terminate(route.clone()) } else { TlsWay::Passthrough(route.clone()) };
                ways.insert(host, way);
            }
            if !held.certificates.is_empty() {
                inputs.certificates.push((held.host.clone(), held.certificates.clone()));
            }
        }
        let configs = match self.tls.ports.remove(&port) {
            Some((before, configs)) if before.is_same(&inputs) => configs,
            _ => [server(&inputs, &[b"h2", b"http/1.1"])?, server(&inputs, &[])?],
        };
        self.tls.ports.insert(port, (inputs, configs.clone()));
        let [https_config, stream_config] = configs;
        Ok(TlsTable { https_config, stream_config, ways, http: self.hosts(&https) })
    }

    /// Ports that clients are to reach, whether or not all of them do something yet.
    pub fn wanted_ports(&self) -> BTreeSet<(u16, Transport)> {
        let good = self.listeners.iter().filter(|held| held.conflict.is_none() && held.not_accepted.is_empty());
        good.map(|held| (held.spec.port, held.transport())).collect()
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
