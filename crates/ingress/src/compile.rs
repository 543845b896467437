//! Objects in, one table of routes and one of certificates out. A change costs what it changes, not what there is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use api::object::Key;
use services::ServiceTable;
use tokio_rustls::rustls::sign::CertifiedKey;

use crate::basic::Users;
use crate::certificates::{Certificates, read_tls};
use crate::class::Classes;
use crate::gateway::CaState;
use crate::headers::HeadersState;
use crate::host::HostPattern;
use crate::objects::{Ingress, IngressClass};
use crate::registry::{Registering, Registry};
use crate::route::Route;
use crate::table::{PathTable, RouteTable};
use crate::translate::{Fault, SET_HEADERS, Translated, translate, with_clients};
use crate::upstream::Upstream;

/// A Secret as it was last seen.
#[derive(Clone, Debug)]
pub enum SecretState {
    /// Nobody has looked yet.
    Unknown,
    Missing,
    /// Says what is wrong.
    Broken(String),
    Good(Arc<CertifiedKey>),
    /// Names and passwords.
    Users(Arc<Users>),
}

impl SecretState {
    /// From its `data`; `None`: there is no such Secret.
    pub fn of(data: Option<&HashMap<String, String>>) -> Self {
        let Some(data) = data else { return SecretState::Missing };
        let is_tls = data.is_empty() || data.contains_key("tls.crt") || data.contains_key("tls.key");
        let read = match is_tls {
            true => read_tls(data).map(SecretState::Good),
            false => Users::read(data).map(SecretState::Users),
        };
        read.unwrap_or_else(SecretState::Broken)
    }

    fn users(&self) -> Option<Arc<Users>> {
        match self {
            SecretState::Users(users) => Some(users.clone()),
            _ => None,
        }
    }
}

/// One of our Ingresses, and what it was translated to.
struct Held {
    ingress: Arc<Ingress>,
    translated: Translated,
}

impl Held {
    /// The Secrets of the authorities of its clients and endpoints.
    fn authorities(&self, key: &Key) -> impl Iterator<Item = Key> {
        let clients = self.translated.clients.as_ref().and_then(|clients| clients.wanted.secret.as_deref());
        let endpoints = self.translated.endpoints.as_ref().filter(|(_, verifies)| *verifies).map(|(name, _)| &**name);
        let keys = clients.into_iter().chain(endpoints).map(|name| Key::new(key.namespace.clone(), name.to_owned()));
        keys.collect::<Vec<_>>().into_iter()
    }

    /// The Secret that endpoints are spoken to with.
    fn endpoints(&self, key: &Key) -> Option<Key> {
        let (name, _) = self.translated.endpoints.as_ref()?;
        Some(Key::new(key.namespace.clone(), name.to_string()))
    }
}

/// Everything that routes are made of. One task owns it.
pub struct Compiler {
    classes: Classes,
    services: Arc<RwLock<ServiceTable>>,
    /// All Ingresses: a class may make them ours.
    all: BTreeMap<Key, Arc<Ingress>>,
    ours: BTreeMap<Key, Held>,
    /// Who has routes for a host.
    by_host: HashMap<HostPattern, BTreeSet<Key>>,
    secrets: BTreeMap<Key, SecretState>,
    config_maps: BTreeMap<Key, HeadersState>,
    registry: Registry,
    routes: RouteTable,
    certificates: Certificates,
    fallback: Arc<CertifiedKey>,
    /// Two that want the same, found when tables were put together.
    conflicts: HashMap<HostPattern, Vec<(Key, Fault)>>,
    certificate_faults: Vec<(Key, Fault)>,
    dirty_hosts: BTreeSet<HostPattern>,
    dirty_defaults: bool,
    dirty_certificates: bool,
    dirty_secrets: bool,
    dirty_config_maps: bool,
    dirty_authorities: bool,
}

impl Compiler {
    /// Serves the classes of `controller`; shows `fallback` to who asks for a name without a certificate.
    pub fn new(controller: &str, services: Arc<RwLock<ServiceTable>>, fallback: Arc<CertifiedKey>) -> Self {
        let mut registry = Registry::default();
        registry.follow_names(true);
        Compiler {
            classes: Classes::new(controller),
            services,
            all: BTreeMap::new(),
            ours: BTreeMap::new(),
            by_host: HashMap::new(),
            secrets: BTreeMap::new(),
            config_maps: BTreeMap::new(),
            registry,
            routes: RouteTable::default(),
            certificates: Certificates::new(fallback.clone()),
            fallback,
            conflicts: HashMap::new(),
            certificate_faults: Vec::new(),
            dirty_hosts: BTreeSet::new(),
            dirty_defaults: false,
            dirty_certificates: false,
            dirty_secrets: false,
            dirty_config_maps: false,
            dirty_authorities: false,
        }
    }

    /// Answers for ExternalNames with 503, as whoever writes one chooses where this machine connects to. To be said first.
    pub fn refuse_external_names(&mut self) {
        self.registry.follow_names(false);
    }

    pub fn set_ingress(&mut self, ingress: Ingress) {
        let key = ingress.key();
        let ingress = Arc::new(ingress);
        self.all.insert(key.clone(), ingress);
        self.look(&key);
    }

    pub fn remove_ingress(&mut self, key: &Key) {
        self.all.remove(key);
        self.look(key);
    }

    /// Removes what a fresh list no longer has.
    pub fn retain_ingresses(&mut self, keep: impl Fn(&Key) -> bool) {
        let gone: Vec<Key> = self.all.keys().filter(|key| !keep(key)).cloned().collect();
        gone.iter().for_each(|key| self.remove_ingress(key));
    }

    pub fn set_class(&mut self, class: IngressClass) {
        self.classes.insert(class);
        self.look_at_all();
    }

    pub fn remove_class(&mut self, name: &str) {
        self.classes.remove(name);
        self.look_at_all();
    }

    pub fn retain_classes(&mut self, keep: impl Fn(&str) -> bool) {
        self.classes.retain(keep);
        self.look_at_all();
    }

    pub fn set_secret(&mut self, key: &Key, state: SecretState) {
        self.registry.set_users(key, state.users());
        let certificate = if let SecretState::Good(certificate) = &state { Some(certificate) } else { None };
        self.registry.set_identity(key, certificate);
        self.translate_anew(|of, held| held.endpoints(of).as_ref() == Some(key));
        if let Some(held) = self.secrets.get_mut(key) {
            *held = state;
            self.dirty_certificates = true;
        }
    }

    /// Says which authorities a Secret of `auth-tls-secret` holds.
    pub fn set_authorities(&mut self, key: &Key, state: CaState) {
        self.registry.set_authorities(key, state);
        self.translate_anew(|of, held| held.authorities(of).any(|one| one == *key));
    }

    fn translate_anew(&mut self, which: impl Fn(&Key, &Held) -> bool) {
        let naming = self.ours.iter().filter(|(key, held)| which(key, held));
        for key in naming.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.drop_held(&key);
            self.look(&key);
        }
    }

    pub fn set_config_map(&mut self, key: &Key, state: HeadersState) {
        self.registry.set_headers(key, state.headers());
        if let Some(held) = self.config_maps.get_mut(key) {
            *held = state;
        }
    }

    /// Follows a change of a Service: routes stay, what they lead to is another.
    pub fn service_changed(&mut self, namespace: &str, name: &str) {
        let table = self.services.read().unwrap_or_else(PoisonError::into_inner);
        self.registry.refresh(namespace, name, &table);
    }

    pub fn all_services_changed(&mut self) {
        let table = self.services.read().unwrap_or_else(PoisonError::into_inner);
        self.registry.refresh_all(&table);
    }

    fn look_at_all(&mut self) {
        let keys: Vec<Key> = self.all.keys().cloned().collect();
        keys.iter().for_each(|key| self.look(key));
    }

    /// Makes what we hold of an Ingress what it says now.
    fn look(&mut self, key: &Key) {
        let wanted = self.all.get(key).filter(|ingress| self.classes.is_ours(ingress)).cloned();
        if let (Some(wanted), Some(held)) = (&wanted, self.ours.get_mut(key)) {
            let same = wanted.spec == held.ingress.spec
                && wanted.metadata.annotations == held.ingress.metadata.annotations
                && wanted.metadata.creation_timestamp == held.ingress.metadata.creation_timestamp;
            if same {
                // Its status may differ, which is no matter of routes.
                held.ingress = wanted.clone();
                return;
            }
        }
        self.drop_held(key);
        let Some(ingress) = wanted else { return };
        let table = self.services.read().unwrap_or_else(PoisonError::into_inner);
        let translated = translate(&ingress, &mut Registering { registry: &mut self.registry, table: &table });
        drop(table);
        if let Some(name) = &translated.users {
            let secret = Key::new(key.namespace.clone(), name.to_string());
            let users = self.secrets.get(&secret).and_then(SecretState::users);
            self.registry.set_users(&secret, users);
        }
        for (name, _) in &translated.config_maps {
            let config_map = Key::new(key.namespace.clone(), name.to_string());
            let headers = self.config_maps.get(&config_map).and_then(HeadersState::headers);
            self.registry.set_headers(&config_map, headers);
        }
        self.touch(key, &translated, true);
        self.ours.insert(key.clone(), Held { ingress, translated });
    }

    fn drop_held(&mut self, key: &Key) {
        if let Some(before) = self.ours.remove(key) {
            self.touch(key, &before.translated, false);
        }
    }

    fn touch(&mut self, key: &Key, translated: &Translated, is_there: bool) {
        for (host, _) in &translated.routes {
            self.dirty_hosts.insert(host.clone());
            let holders = self.by_host.entry(host.clone()).or_default();
            if is_there {
                holders.insert(key.clone())
            } else {
                holders.remove(key)
            };
            if holders.is_empty() {
                self.by_host.remove(host);
            }
        }
        self.dirty_defaults |= translated.default.is_some();
        let has_secrets =
            !translated.certificates.is_empty() || translated.users.is_some() || translated.endpoints.is_some();
        self.dirty_certificates |= has_secrets;
        self.dirty_secrets |= has_secrets;
        self.dirty_config_maps |= !translated.config_maps.is_empty();
        self.dirty_authorities |= translated.clients.is_some() || translated.endpoints.is_some();
    }

    /// The table of routes, if anything changed since the last call.
    pub fn routes(&mut self) -> Option<RouteTable> {
        if self.dirty_hosts.is_empty() && !self.dirty_defaults {
            return None;
        }
        for host in std::mem::take(&mut self.dirty_hosts) {
            let paths = self.paths_of(&host);
            self.routes.set(&host, paths);
        }
        if std::mem::take(&mut self.dirty_defaults) {
            let with_default = self.ours.values().filter(|held| held.translated.default.is_some());
            let oldest = with_default.min_by(|a, b| a.ingress.age().cmp(&b.ingress.age()));
            let default = oldest.and_then(|held| held.translated.default.clone());
            self.routes.set_default(default);
        }
        self.registry.tidy(self.ours.len());
        Some(self.routes.clone())
    }

    /// The routes of a host from all Ingresses, the oldest first.
    fn paths_of(&mut self, host: &HostPattern) -> Option<Arc<PathTable>> {
        self.conflicts.remove(host);
        let holders = self.by_host.get(host)?;
        let mut held: Vec<(&Key, &Held)> =
            holders.iter().filter_map(|key| self.ours.get(key).map(|held| (key, held))).collect();
        held.sort_by(|a, b| a.1.ingress.age().cmp(&b.1.ingress.age()));
        // Of a host, not of a path: the handshake knows no path.
        let clients = held.iter().find_map(|(_, one)| one.translated.clients.clone());
        let passing = held.iter().find_map(|(_, one)| one.translated.passing.get(host).cloned());
        let mut taken: HashMap<_, &Key> = HashMap::new();
        let mut conflicts = Vec::new();
        let mut routes: Vec<Arc<Route>> = Vec::new();
        for (key, one) in held {
            for (_, route) in one.translated.routes.iter().filter(|(of, _)| of == host) {
                let place = (route.name.path.clone(), std::mem::discriminant(&route.path));
                if route.canary.is_none() {
                    if let Some(winner) = taken.get(&place) {
                        let message = format!(
                            "path {} of host {host} belongs to Ingress {}/{} already, which comes first; this one gets nothing",
                            route.name.path, winner.namespace, winner.name
                        );
                        conflicts.push((key.clone(), Fault { reason: "PathConflict", message }));
                        continue;
                    }
                    taken.insert(place, key);
                }
                routes.push(route.clone());
            }
        }
        if let Some(clients) = clients {
            routes = routes.into_iter().map(|route| with_clients(route, Some(&clients))).collect();
        }
        if !conflicts.is_empty() {
            self.conflicts.insert(host.clone(), conflicts);
        }
        Some(Arc::new(PathTable::new(routes).passing(passing)))
    }

    /// The Secrets that our Ingresses name. Those that are new are unknown until they are set.
    pub fn wanted_secrets(&mut self) -> BTreeSet<Key> {
        let mut wanted = BTreeSet::new();
        for (key, held) in &self.ours {
            let of_ingress = held.translated.certificates.iter();
            let endpoints = held.translated.endpoints.iter().map(|(name, _)| name);
            let names = of_ingress.map(|one| &one.secret).chain(&held.translated.users).chain(endpoints);
            wanted.extend(names.map(|name| Key::new(key.namespace.clone(), name.to_string())));
        }
        self.secrets.retain(|key, _| wanted.contains(key));
        self.registry.keep_identities(&wanted);
        for key in &wanted {
            self.secrets.entry(key.clone()).or_insert(SecretState::Unknown);
        }
        wanted
    }

    /// The Secrets that are wanted, if they may be others than at the last call.
    pub fn new_secrets(&mut self) -> Option<BTreeSet<Key>> {
        std::mem::take(&mut self.dirty_secrets).then(|| self.wanted_secrets())
    }

    /// The ConfigMaps that our Ingresses name, if they may be others than at the last call.
    pub fn new_config_maps(&mut self) -> Option<BTreeSet<Key>> {
        if !std::mem::take(&mut self.dirty_config_maps) {
            return None;
        }
        let of_ingress = |(key, held): (&Key, &Held)| {
            let namespace = key.namespace.clone();
            let names = held.translated.config_maps.iter();
            names.map(|(name, _)| Key::new(namespace.clone(), name.to_string())).collect::<Vec<_>>()
        };
        let wanted: BTreeSet<Key> = self.ours.iter().flat_map(of_ingress).collect();
        self.config_maps.retain(|key, _| wanted.contains(key));
        for key in &wanted {
            self.config_maps.entry(key.clone()).or_insert(HeadersState::Unknown);
        }
        Some(wanted)
    }

    /// The Secrets of authorities that our Ingresses name, if they may be others than at the last call.
    pub fn new_authorities(&mut self) -> Option<BTreeSet<Key>> {
        std::mem::take(&mut self.dirty_authorities).then(|| {
            let wanted: BTreeSet<Key> = self.ours.iter().flat_map(|(key, held)| held.authorities(key)).collect();
            self.registry.keep_authorities(&wanted);
            wanted
        })
    }

    /// Somebody wants a Secret or ConfigMap that was not looked at yet.
    pub fn waits_for_secrets(&self) -> bool {
        self.secrets.values().any(|state| matches!(state, SecretState::Unknown))
            || self.config_maps.values().any(|state| matches!(state, HeadersState::Unknown))
            || self
                .ours
                .iter()
                .flat_map(|(key, held)| held.authorities(key))
                .any(|secret| matches!(self.registry.authorities(&secret), CaState::Unknown))
    }

    /// The certificates, if anything changed since the last call.
    pub fn certificates(&mut self) -> Option<Certificates> {
        if !std::mem::take(&mut self.dirty_certificates) {
            return None;
        }
        self.wanted_secrets();
        let mut certificates = Certificates::new(self.fallback.clone());
        let mut faults = Vec::new();
        let mut held: Vec<(&Key, &Held)> = self.ours.iter().collect();
        held.sort_by(|a, b| a.1.ingress.age().cmp(&b.1.ingress.age()));
        let mut has_default = false;
        for (key, one) in held {
            if let Some(name) = &one.translated.users {
                let secret = Key::new(key.namespace.clone(), name.to_string());
                let problem = match self.secrets.get(&secret) {
                    Some(SecretState::Missing) => Some(("SecretNotFound", "is not there".to_owned())),
                    Some(SecretState::Broken(problem)) => Some(("UsersNotValid", problem.clone())),
                    Some(SecretState::Good(_)) => Some(("UsersNotValid", "holds a certificate".to_owned())),
                    Some(SecretState::Users(_) | SecretState::Unknown) | None => None,
                };
                if let Some((reason, problem)) = problem {
                    let message = format!(
                        "Secret {}/{} of auth-secret {problem}; requests get 503",
                        secret.namespace, secret.name
                    );
                    faults.push((key.clone(), Fault { reason, message }));
                }
            }
            for wanted in &one.translated.certificates {
                let secret = Key::new(key.namespace.clone(), wanted.secret.to_string());
                let named = format!("Secret {}/{}", secret.namespace, secret.name);
                let mut fault = |reason, message| faults.push((key.clone(), Fault { reason, message }));
                match self.secrets.get(&secret) {
                    Some(SecretState::Good(certificate)) => {
                        if wanted.host == HostPattern::Any && std::mem::replace(&mut has_default, true) {
                            continue;
                        }
                        if !certificates.insert(&wanted.host, certificate)
                            && !Arc::ptr_eq(certificates.find(&wanted.host.to_string()), certificate)
                        {
                            let message = format!("an older Ingress has another certificate for {}", wanted.host);
                            fault("CertificateConflict", message);
                        }
                    }
                    Some(SecretState::Missing) => {
                        fault(
                            "SecretNotFound",
                            format!("there is no {named}; {} gets the fallback certificate", wanted.host),
                        );
                    }
                    Some(SecretState::Broken(problem)) => {
                        fault(
                            "CertificateNotValid",
                            format!("{named} {problem}; {} gets the fallback certificate", wanted.host),
                        );
                    }
                    Some(SecretState::Users(_)) => fault(
                        "CertificateNotValid",
                        format!("{named} has no tls.crt; {} gets the fallback certificate", wanted.host),
                    ),
                    Some(SecretState::Unknown) | None => {}
                }
            }
        }
        self.certificate_faults = faults;
        self.certificates = certificates.clone();
        Some(certificates)
    }

    /// All that is wrong now, beside the Ingress that says it.
    pub fn faults(&self) -> BTreeSet<(Key, Fault)> {
        let own = self.ours.iter().flat_map(|(key, held)| {
            let faults = held.translated.faults.iter().cloned();
            let routes = held.translated.routes.iter().map(|(_, route)| route).chain(&held.translated.default);
            let upstreams = routes.clone().flat_map(|route| route.upstreams()).filter_map(|upstream| {
                let problem = upstream.targets().problem?;
                Some(Fault { reason: problem.reason(), message: problem.text(&upstream.key) })
            });
            let mirrors = routes.flat_map(|route| route.mirrors()).filter_map(|upstream| {
                let reason = upstream.targets().problem?.reason();
                let message = format!("requests are not copied: {} of mirror-target leads nowhere", upstream.key);
                Some(Fault { reason, message })
            });
            let config_maps = held.translated.config_maps.iter().filter_map(|(name, annotation)| {
                let config_map = Key::new(key.namespace.clone(), name.to_string());
                let problem = self.config_maps.get(&config_map)?.problem(*annotation == SET_HEADERS)?;
                let named = format!("ConfigMap {}/{name} of {annotation}", key.namespace);
                Some(Fault { reason: "ConfigMapNotValid", message: format!("{named} {problem}") })
            });
            let authorities = held.authorities(key).filter_map(|secret| {
                let problem = match self.registry.authorities(&secret) {
                    CaState::Missing => "is not there",
                    CaState::Broken(problem) => problem,
                    CaState::Unknown | CaState::Good(_) => return None,
                };
                let named = format!("Secret {}/{}, which certificates are judged by,", secret.namespace, secret.name);
                Some(Fault {
                    reason: "AuthoritiesNotValid",
                    message: format!("{named} {problem}; requests get 403, or 503 where endpoints are judged"),
                })
            });
            faults
                .chain(upstreams)
                .chain(mirrors)
                .chain(config_maps)
                .chain(authorities)
                .map(|fault| (key.clone(), fault))
                .collect::<Vec<_>>()
        });
        let shared = self.conflicts.values().flatten().chain(&self.certificate_faults).cloned();
        own.chain(shared).collect()
    }

    /// The Ingresses that are served here.
    pub fn ingresses(&self) -> impl Iterator<Item = &Arc<Ingress>> {
        self.ours.values().map(|held| &held.ingress)
    }

    pub fn upstreams(&self) -> impl Iterator<Item = Arc<Upstream>> + '_ {
        self.registry.upstreams()
    }
}
