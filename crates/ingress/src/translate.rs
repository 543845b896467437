//! One Ingress becomes routes: what its rules say, and what is wrong with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::object::Key;
use http::StatusCode;
use regex::RegexBuilder;
use tokio_rustls::rustls::RootCertStore;

use crate::annotations::{Door, Refers, Settings};
use crate::basic::{Basic, Users};
use crate::clients::ClientAuth;
use crate::crypto;
use crate::external::{External, Question};
use crate::gateway::{BackendTls, Identity, Name, StreamRoute};
use crate::headers::SetHeaders;
use crate::host::HostPattern;
use crate::objects::{Backend, Ingress, Path};
use crate::pages::Pages;
use crate::policy::{AnswerHeaders, Clients, Policy};
use crate::registry::Slot;
use crate::route::{Action, Backends, Filter, Matches, Mirror, MirrorTo, PathMatch, Redirect, Route, RouteName};
use crate::upstream::{PortRef, Upstream, UpstreamKey};
use crate::url::{Place, Url};

/// What is wrong, for an event beside the Ingress.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    pub reason: &'static str,
    pub message: String,
}

/// The annotation that names headers for who decides.
pub const SET_HEADERS: &str = "auth-proxy-set-headers";

/// Hands out what routes refer to.
pub trait Register {
    fn upstream(&mut self, key: &UpstreamKey) -> Arc<Upstream>;
    fn counts(&mut self, name: &RouteName) -> Arc<crate::counts::RouteCounts>;
    /// The users of a Secret, as they are at any time.
    fn users(&mut self, secret: &Key) -> Slot<Users>;
    /// Who we are by a Secret's certificate, as it is now.
    fn identity(&self, secret: &Key) -> Option<Arc<Identity>>;
    /// The authorities of a Secret, as they are now.
    fn authorities(&self, secret: &Key) -> Option<Arc<RootCertStore>>;
    /// The headers of a ConfigMap, as they are at any time.
    fn headers(&mut self, config_map: &Key) -> Slot<SetHeaders>;
}

/// A certificate that an Ingress wants shown for a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedCertificate {
    pub host: HostPattern,
    pub secret: Arc<str>,
}

/// What an Ingress says, with each host of its own.
#[derive(Clone, Debug, Default)]
pub struct Translated {
    pub routes: Vec<(HostPattern, Arc<Route>)>,
    /// Hosts whose connections over TLS go to endpoints as they are.
    pub passing: BTreeMap<HostPattern, Arc<StreamRoute>>,
    /// `spec.defaultBackend`.
    pub default: Option<Arc<Route>>,
    pub certificates: Vec<WantedCertificate>,
    /// The Secret of who may come.
    pub users: Option<Arc<str>>,
    /// Whom clients of its hosts must be.
    pub clients: Option<Arc<ClientAuth>>,
    /// The Secret that endpoints are spoken to with, and whether its authorities matter.
    pub endpoints: Option<(Arc<str>, bool)>,
    /// ConfigMaps with headers, and the annotation that names each.
    pub config_maps: BTreeSet<(Arc<str>, &'static str)>,
    pub faults: BTreeSet<Fault>,
}

/// Translates an Ingress. Rules that make no sense are left out and told of; the others count.
pub fn translate(ingress: &Ingress, register: &mut dyn Register) -> Translated {
    let mut out = Translated::default();
    let settings = Settings::read(&ingress.metadata, &mut out.faults);
    out.users =
        settings.basic.as_ref().map(|(secret, _)| Arc::from(&**secret)).filter(|name: &Arc<str>| !name.is_empty());
    if let Some(Door::Asks(question)) = &settings.door {
        let named = question.headers.iter().map(|name| (Arc::from(&**name), SET_HEADERS));
        out.config_maps.extend(named);
    }
    out.config_maps.extend(settings.answers.headers.iter().map(|name| (Arc::from(&**name), "custom-headers")));
    out.clients = settings.clients.as_ref().map(|wanted| {
        let secret = wanted.secret.as_ref().map(|name| Key::new(ingress.metadata.namespace.clone(), name.to_string()));
        let roots = secret.and_then(|secret| register.authorities(&secret));
        Arc::new(ClientAuth { wanted: wanted.clone(), roots })
    });
    let endpoints = settings.backend_tls.as_ref();
    out.endpoints = endpoints.and_then(|tls| Some((Arc::from(&**tls.secret.as_ref()?), tls.verifies)));
    let mut tls_hosts = BTreeSet::new();
    certificates(ingress, &mut out, &mut tls_hosts);
    let mut writer = Writer {
        ingress,
        settings: &settings,
        register,
        external: None,
        filters: Vec::new(),
        tls: Ok(None),
        faults: BTreeSet::new(),
    };
    writer.external = writer.external();
    writer.filters = writer.filters();
    writer.tls = writer.endpoint_tls();
    for (at, rule) in ingress.spec.rules.iter().enumerate() {
        let host = match HostPattern::of_ingress(&rule.host) {
            Ok(host) => host,
            Err(problem) => {
                writer.fault("HostNotValid", format!("spec.rules[{at}].host {problem}; the rule is left out"));
                continue;
            }
        };
        let is_tls = tls_hosts.contains(&host) || matches_wildcard(&tls_hosts, &host);
        let begin = out.routes.len();
        match &rule.http {
            Some(http) => {
                for (number, path) in http.paths.iter().enumerate() {
                    let place = format!("spec.rules[{at}].http.paths[{number}]");
                    if let Some(route) = writer.route(&host, path, &place, is_tls) {
                        out.routes.push((host.clone(), route));
                    }
                }
            }
            // A host without paths is for the default backend of its own Ingress.
            None => {
                let default = ingress.spec.default_backend.as_ref();
                if let Some(route) = default.and_then(|backend| writer.default_route(&host, backend, is_tls)) {
                    out.routes.push((host.clone(), route));
                }
            }
        }
        if host != HostPattern::Any && out.routes.len() > begin {
            let more = writer.more_hosts(&host, &out.routes[begin..], is_tls);
            out.routes.extend(more);
        }
    }
    out.default = ingress
        .spec
        .default_backend
        .as_ref()
        .and_then(|backend| writer.default_route(&HostPattern::Any, backend, false))
        .map(|route| with_clients(route, out.clients.as_ref()));
    if settings.passes_tls {
        out.passing = writer.passing(&out.routes);
    }
    let faults = writer.faults;
    out.faults.extend(faults);
    out
}

/// The route for clients who must be somebody.
pub fn with_clients(route: Arc<Route>, clients: Option<&Arc<ClientAuth>>) -> Arc<Route> {
    let Some(clients) = clients else { return route };
    let policy = Policy { clients: Some(Clients(clients.clone())), ..(*route.policy).clone() };
    Arc::new(Route { policy: Arc::new(policy), ..(*route).clone() })
}

fn matches_wildcard(hosts: &BTreeSet<HostPattern>, host: &HostPattern) -> bool {
    let HostPattern::Exact(name) = host else { return false };
    name.split_once('.').is_some_and(|(_, rest)| hosts.contains(&HostPattern::OneLabel(rest.into())))
}

fn certificates(ingress: &Ingress, out: &mut Translated, tls_hosts: &mut BTreeSet<HostPattern>) {
    for (at, tls) in ingress.spec.tls.iter().enumerate() {
        let mut hosts = Vec::new();
        // Without hosts it is for those of the rules.
        let named: Vec<&String> = match tls.hosts.is_empty() {
            true => ingress.spec.rules.iter().map(|rule| &rule.host).collect(),
            false => tls.hosts.iter().collect(),
        };
        for text in named {
            match HostPattern::of_ingress(text) {
                Ok(host) => hosts.push(host),
                Err(problem) => {
                    let message = format!("spec.tls[{at}].hosts {problem}; it gets no certificate");
                    out.faults.insert(Fault { reason: "HostNotValid", message });
                }
            }
        }
        if hosts.is_empty() {
            hosts.push(HostPattern::Any);
        }
        tls_hosts.extend(hosts.iter().cloned());
        if let Some(secret) = tls.secret_name.as_deref().filter(|name| !name.is_empty()) {
            let secret: Arc<str> = secret.into();
            let wanted = hosts.into_iter().map(|host| WantedCertificate { host, secret: secret.clone() });
            out.certificates.extend(wanted);
        }
    }
}

/// Below this path nobody is asked who they are (RFC 8555 8.3).
const ACME: &str = "/.well-known/acme-challenge";
/// Bytes that one compiled pattern may take.
const PATTERN_LIMIT: usize = 1 << 20;

/// Endpoints are to be verified, and nobody knows by whom.
#[derive(Clone, Copy)]
struct CannotVerify;

struct Writer<'a> {
    ingress: &'a Ingress,
    settings: &'a Settings,
    register: &'a mut dyn Register,
    /// Shared by all paths, with what was answered.
    external: Option<Arc<External>>,
    filters: Vec<Filter>,
    tls: Result<Option<Arc<BackendTls>>, CannotVerify>,
    faults: BTreeSet<Fault>,
}

impl Writer<'_> {
    fn fault(&mut self, reason: &'static str, message: String) {
        self.faults.insert(Fault { reason, message });
    }

    fn route(&mut self, host: &HostPattern, path: &Path, place: &str, is_tls: bool) -> Option<Arc<Route>> {
        let held = if path.path.is_empty() { "/" } else { &path.path };
        if !held.starts_with('/') {
            self.fault("PathNotValid", format!("{place}.path is {held:?}, which does not begin with /"));
            return None;
        }
        let wanted = match path.path_type.as_str() {
            _ if self.settings.use_regex => self.pattern(held, place)?,
            "Exact" => PathMatch::Exact(held.into()),
            // Up to us: as Prefix.
            "Prefix" | "ImplementationSpecific" => PathMatch::prefix(held),
            other => {
                let known = "write Exact, Prefix or ImplementationSpecific";
                self.fault("PathNotValid", format!("{place}.pathType is {other:?}; {known}"));
                return None;
            }
        };
        let action = self.backend(&path.backend, &format!("{place}.backend"))?;
        Some(self.finish(host, held, wanted, action, is_tls))
    }

    /// What annotations add to a host: its root, the same host with or without `www.`, and aliases.
    fn more_hosts(
        &mut self,
        host: &HostPattern,
        routes: &[(HostPattern, Arc<Route>)],
        is_tls: bool,
    ) -> Vec<(HostPattern, Arc<Route>)> {
        let mut more = Vec::new();
        let redirect = |status, host: Option<&str>, location: Option<&str>| {
            Action::Redirect(Redirect {
                status,
                scheme: None,
                host: host.map(Into::into),
                port: None,
                path: None,
                location: location.map(Into::into),
            })
        };
        if let Some(root) = self.settings.app_root.clone() {
            let action = redirect(StatusCode::FOUND, None, Some(&root));
            more.push((host.clone(), self.finish(host, "/", PathMatch::Exact("/".into()), action, is_tls)));
        }
        if let HostPattern::Exact(name) = host
            && self.settings.from_to_www
        {
            let from = match name.strip_prefix("www.") {
                Some(bare) => bare.to_owned(),
                None => format!("www.{name}"),
            };
            // Who has rules for the other one, too, wants no redirect.
            if !self.ingress.spec.rules.iter().any(|rule| rule.host == from) {
                let from = HostPattern::Exact(from.as_str().into());
                let action = redirect(StatusCode::PERMANENT_REDIRECT, Some(name), None);
                let route = self.finish(&from, "/", PathMatch::prefix("/"), action, false);
                more.push((from, route));
            }
        }
        for alias in self.settings.aliases.clone() {
            match HostPattern::of_ingress(&alias) {
                Ok(HostPattern::Any) => {}
                Ok(alias) if alias == *host => {}
                Ok(alias) => more.extend(routes.iter().map(|(_, route)| (alias.clone(), route.clone()))),
                Err(problem) => {
                    self.fault("HostNotValid", format!("annotation server-alias {problem}; it is left out"))
                }
            }
        }
        more
    }

    fn pattern(&mut self, path: &str, place: &str) -> Option<PathMatch> {
        match RegexBuilder::new(&format!("^{path}")).case_insensitive(true).size_limit(PATTERN_LIMIT).build() {
            Ok(regex) => Some(PathMatch::Pattern { regex, length: path.len() }),
            Err(error) => {
                let last = error.to_string().lines().last().unwrap_or_default().to_owned();
                self.fault("PathNotValid", format!("{place}.path {path:?} is no regular expression: {last}"));
                None
            }
        }
    }

    fn default_route(&mut self, host: &HostPattern, backend: &Backend, is_tls: bool) -> Option<Arc<Route>> {
        let action = self.backend(backend, "spec.defaultBackend")?;
        Some(self.finish(host, "/", PathMatch::prefix("/"), action, is_tls))
    }

    fn backend(&mut self, backend: &Backend, place: &str) -> Option<Action> {
        if let Some(resource) = &backend.resource {
            let group = resource.api_group.as_deref().unwrap_or("v1");
            self.fault(
                "ResourceBackendNotSupported",
                format!(
                    "{place}.resource is {group} {} {}; requests get 503: use a service backend",
                    resource.kind, resource.name
                ),
            );
            return Some(Action::Respond(StatusCode::SERVICE_UNAVAILABLE));
        }
        let Some(service) = &backend.service else {
            self.fault("BackendMissing", format!("{place} names no service; the path is left out"));
            return None;
        };
        let port = match (service.port.name.as_str(), service.port.number) {
            ("", number) => PortRef::Number(number),
            (name, _) => PortRef::Name(name.into()),
        };
        let port = if self.settings.to_cluster_ip { PortRef::ClusterIp(Box::new(port)) } else { port };
        let key = UpstreamKey {
            namespace: self.ingress.metadata.namespace.as_str().into(),
            service: service.name.as_str().into(),
            port,
        };
        let upstream = self.register.upstream(&key);
        Some(match &self.tls {
            Ok(tls) => Action::Forward(Backends::over(upstream, tls.clone())),
            // Rather nobody than somebody else.
            Err(CannotVerify) => Action::Respond(StatusCode::SERVICE_UNAVAILABLE),
        })
    }

    fn endpoint_tls(&mut self) -> Result<Option<Arc<BackendTls>>, CannotVerify> {
        let Some(wanted) = &self.settings.backend_tls else { return Ok(None) };
        if wanted.is_broken {
            return Err(CannotVerify);
        }
        let secret = wanted.secret.as_ref().map(|name| self.own(name));
        let identity = secret.as_ref().and_then(|secret| self.register.identity(secret));
        let name = wanted.name.clone();
        let tls = match (wanted.verifies, name) {
            (false, name) => BackendTls::unverified(name.filter(|_| wanted.tells_name), crypto::provider()),
            (true, Some(name)) => {
                let roots = secret.and_then(|secret| self.register.authorities(&secret)).ok_or(CannotVerify)?;
                let names = vec![Name::Host(name.clone())];
                BackendTls::below(roots, name, names, crypto::provider(), wanted.depth)
            }
            (true, None) => {
                let message = "annotation proxy-ssl-verify on needs proxy-ssl-name, whose certificate endpoints must have; requests get 503";
                self.fault("AnnotationNotValid", message.to_owned());
                return Err(CannotVerify);
            }
        };
        Ok(Some(Arc::new(tls.with(identity, wanted.tells_name && wanted.name.is_some()))))
    }

    fn pages(&mut self) -> Option<Pages> {
        let (service, statuses) = self.settings.answers.pages.as_ref()?;
        let namespace = self.ingress.metadata.namespace.as_str().into();
        let key = UpstreamKey { namespace, service: (&**service).into(), port: PortRef::First };
        Some(Pages { upstream: self.register.upstream(&key), statuses: *statuses })
    }

    fn doors(&mut self) -> Refers {
        let basic = self.settings.basic.as_ref().map(|(secret, realm)| {
            let secret = self.own(secret);
            Arc::new(Basic { realm: realm.clone(), users: self.register.users(&secret), secret })
        });
        let is_shut = matches!(self.settings.door, Some(Door::Shut));
        Refers { basic, external: self.external.clone(), is_shut, ..Refers::default() }
    }

    /// Where connections of each host go that nobody looks into: there is no path to see, so that the root's Service gets all.
    fn passing(&mut self, routes: &[(HostPattern, Arc<Route>)]) -> BTreeMap<HostPattern, Arc<StreamRoute>> {
        let mut passing = BTreeMap::new();
        for (host, route) in routes {
            let Action::Forward(backends) = &route.action else { continue };
            match (&*route.name.path, host) {
                (_, HostPattern::Any) => {
                    let message = "annotation ssl-passthrough is for hosts, whose names handshakes say; the rule without one is not passed through";
                    self.fault("AnnotationNotValid", message.to_owned());
                }
                ("/", _) => {
                    let name = RouteName { path: "ssl-passthrough".into(), ..route.name.clone() };
                    let counts = self.register.counts(&name);
                    let stream = StreamRoute { name, backends: backends.clone(), counts };
                    passing.entry(host.clone()).or_insert_with(|| Arc::new(stream));
                }
                (path, _) => {
                    let message = format!(
                        "with ssl-passthrough nobody sees paths: path {path} of {host} is for plain requests only, and connections over TLS go to the Service of /"
                    );
                    self.fault("PathIgnored", message);
                }
            }
        }
        passing
    }

    fn own(&self, name: &str) -> Key {
        Key::new(self.ingress.metadata.namespace.clone(), name)
    }

    fn external(&mut self) -> Option<Arc<External>> {
        let settings = self.settings;
        let Some(Door::Asks(question)) = &settings.door else { return None };
        let place = self.place(&question.url);
        let headers = question.headers.as_ref().map(|name| self.register.headers(&self.own(name)));
        Some(Arc::new(External::new(Question::clone(question), place, headers)))
    }

    fn place(&mut self, url: &Url) -> Place {
        Place::of(url.service().map(|key| self.register.upstream(&key)))
    }

    /// The filters of all paths.
    fn filters(&mut self) -> Vec<Filter> {
        let settings = self.settings;
        let mirror = settings.mirror.as_ref().map(|wanted| {
            let to = MirrorTo::Url { wanted: wanted.clone(), place: self.place(&wanted.url) };
            Filter::Mirror(Arc::new(Mirror { to, part: 1, whole: 1 }))
        });
        settings.filters.iter().cloned().chain(mirror).collect()
    }

    fn finish(&mut self, host: &HostPattern, text: &str, path: PathMatch, action: Action, is_tls: bool) -> Arc<Route> {
        let name = RouteName {
            kind: "Ingress",
            namespace: self.ingress.metadata.namespace.as_str().into(),
            name: self.ingress.metadata.name.as_str().into(),
            host: host.to_string().into(),
            path: text.into(),
        };
        let action = match &self.settings.redirect {
            Some((status, location)) => Action::Redirect(Redirect {
                status: *status,
                scheme: None,
                host: None,
                port: None,
                path: None,
                location: Some(location.clone()),
            }),
            None => action,
        };
        // Whoever issues certificates asks for what it put there, and knows no password.
        let mut refers = if text.starts_with(ACME) { Refers::default() } else { self.doors() };
        refers.pages = self.pages();
        let headers = self.settings.answers.headers.as_ref();
        refers.answer_headers = headers.map(|name| AnswerHeaders(self.register.headers(&self.own(name))));
        Arc::new(Route {
            counts: self.register.counts(&name),
            name,
            path,
            matches: Matches::default(),
            action,
            filters: self.filters.clone(),
            policy: self.settings.policy(is_tls, refers),
            canary: self.settings.canary.clone(),
        })
    }
}
