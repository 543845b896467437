//! Listeners of a Gateway and of its ListenerSets: what each may carry, what is wrong with it, and which certificates it shows.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::object::Key;
use api::selector::LabelSelector;
use tokio_rustls::rustls::sign::CertifiedKey;

use super::RouteType;
use super::condition::Problem;
use super::grants::{End, allows};
use super::objects::{FromNamespaces, GROUP, Gateway, Listener, ListenerSet, Reference};
use super::ports::Transport;
use super::store::Objects;
use crate::compile::SecretState;
use crate::host::HostPattern;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Http,
    Https,
    TlsTerminate,
    TlsPassthrough,
    Tcp,
    Udp,
}

impl Speaks {
    fn kinds(self) -> &'static [RouteType] {
        match self {
            Speaks::Http | Speaks::Https => &[RouteType::Http, RouteType::Grpc],
            Speaks::TlsTerminate | Speaks::TlsPassthrough => &[RouteType::Tls],
            Speaks::Tcp => &[RouteType::Tcp],
            Speaks::Udp => &[RouteType::Udp],
        }
    }

    /// What can be told apart on one port: by the host asked for, or by the name of a handshake.
    fn class(self) -> u8 {
        match self {
            Speaks::Http => 0,
            Speaks::Https | Speaks::TlsTerminate | Speaks::TlsPassthrough => 1,
            Speaks::Tcp => 2,
            Speaks::Udp => 3,
        }
    }

    pub fn has_hosts(self) -> bool {
        !matches!(self, Speaks::Tcp | Speaks::Udp)
    }

    pub fn ends_tls(self) -> bool {
        matches!(self, Speaks::Https | Speaks::TlsTerminate)
    }
}

/// Whose listener it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// `Gateway` or `ListenerSet`.
    pub kind: &'static str,
    pub key: Key,
}

/// A listener and what is known of it.
pub struct Held {
    pub owner: Owner,
    pub spec: Listener,
    /// `None`: nothing that we know.
    pub speaks: Option<Speaks>,
    pub host: HostPattern,
    /// Kinds of routes that may attach.
    pub kinds: Vec<RouteType>,
    pub not_accepted: Vec<Problem>,
    pub conflict: Option<Problem>,
    pub unresolved: Vec<Problem>,
    pub certificates: Vec<Arc<CertifiedKey>>,
    /// A Secret has not been looked at yet.
    pub waits: bool,
}

impl Held {
    pub fn transport(&self) -> Transport {
        if self.speaks == Some(Speaks::Udp) { Transport::Udp } else { Transport::Tcp }
    }

    /// Whether anything comes in here at all.
    pub fn serves(&self) -> bool {
        let has_certificates = !self.speaks.is_some_and(Speaks::ends_tls) || !self.certificates.is_empty();
        self.not_accepted.is_empty() && self.conflict.is_none() && self.speaks.is_some() && has_certificates
    }
}

/// What listeners refer to.
pub struct World<'a> {
    pub objects: &'a Objects,
    pub secrets: &'a BTreeMap<Key, SecretState>,
}

impl World<'_> {
    /// The Secret that a certificate reference of an object leads to.
    pub fn secret(&self, from: &Owner, reference: &Reference, place: &str) -> Result<Key, Problem> {
        if !reference.is("", "Secret", ("", "Secret")) {
            let message = format!("{place} is no Secret; only Secrets of type kubernetes.io/tls are read");
            return Err(Problem::new("InvalidCertificateRef", message));
        }
        let key = reference.key(&from.key.namespace);
        let (from_end, to) = (End { group: GROUP, kind: from.kind }, End { group: "", kind: "Secret" });
        if !allows(self.objects.grants.values(), from_end, &from.key.namespace, to, &key) {
            let message = format!(
                "{place}: no ReferenceGrant in {} lets {} of {} refer to Secret {}",
                key.namespace, from.kind, from.key.namespace, key.name
            );
            return Err(Problem::new("RefNotPermitted", message));
        }
        Ok(key)
    }

    /// Whether `from` of an owner of `home` has this namespace in it.
    pub fn lets_in(&self, allowed: &FromNamespaces, default: &str, home: &str, namespace: &str) -> bool {
        match allowed.from.as_deref().unwrap_or(default) {
            "All" => true,
            "Same" => home == namespace,
            "Selector" => {
                let selector = allowed.selector.as_ref().and_then(|spec| LabelSelector::from_spec(spec).ok());
                let labels = self.objects.namespaces.get(&Key::new("", namespace)).map(|held| &held.metadata.labels);
                selector.zip(labels).is_some_and(|(selector, labels)| selector.matches_map(labels))
            }
            _ => false,
        }
    }

    /// The listeners of a Gateway, its own first, and those of its ListenerSets, the oldest first. Of two that cannot be told
    /// apart the first is served.
    pub fn listeners(&self, gateway: &Gateway, sets: &[&Arc<ListenerSet>]) -> Vec<Held> {
        let own = gateway.spec.listeners.iter().map(|one| (("Gateway", gateway.metadata.key()), one));
        let more =
            sets.iter().flat_map(|set| set.spec.listeners.iter().map(|one| (("ListenerSet", set.metadata.key()), one)));
        let mut held: Vec<Held> = Vec::new();
        for ((kind, key), listener) in own.chain(more) {
            let mut one = self.listener(Owner { kind, key }, listener);
            one.conflict = conflict(&held, &one);
            held.push(one);
        }
        held
    }

    fn listener(&self, owner: Owner, spec: &Listener) -> Held {
        let mut held = Held {
            owner,
            spec: spec.clone(),
            speaks: None,
            host: HostPattern::Any,
            kinds: Vec::new(),
            not_accepted: Vec::new(),
            conflict: None,
            unresolved: Vec::new(),
            certificates: Vec::new(),
            waits: false,
        };
        match speaks(spec) {
            Ok(speaks) => held.speaks = Some(speaks),
            Err(problem) => held.not_accepted.push(problem),
        }
        if held.speaks.is_some_and(Speaks::has_hosts) {
            match HostPattern::of_gateway(spec.hostname.as_deref().unwrap_or_default()) {
                Ok(host) => held.host = host,
                Err(problem) => held.not_accepted.push(Problem::new("UnsupportedValue", format!("hostname {problem}"))),
            }
        }
        self.kinds(&mut held);
        if held.speaks.is_some_and(Speaks::ends_tls) {
            self.certificates(&mut held);
        }
        held
    }

    fn kinds(&self, held: &mut Held) {
        let known = held.speaks.map_or(&[][..], Speaks::kinds);
        let wanted = &held.spec.allowed_routes.kinds;
        if wanted.is_empty() {
            held.kinds = known.to_vec();
            return;
        }
        for kind in wanted {
            let group = kind.group.as_deref().unwrap_or(GROUP);
            match known.iter().find(|known| known.kind() == kind.kind && group == GROUP) {
                Some(known) => held.kinds.push(*known),
                None => {
                    let message = format!(
                        "allowedRoutes.kinds: {group}/{} cannot attach to protocol {}",
                        kind.kind, held.spec.protocol
                    );
                    held.unresolved.push(Problem::new("InvalidRouteKinds", message));
                }
            }
        }
    }

    fn certificates(&self, held: &mut Held) {
        let references = held.spec.tls.as_ref().map(|tls| &tls.certificate_refs[..]).unwrap_or_default();
        let mut problems = Vec::new();
        if references.is_empty() {
            problems.push(Problem::new("InvalidCertificateRef", "tls.certificateRefs is empty; name a Secret"));
        }
        for (at, reference) in references.iter().enumerate() {
            let place = format!("tls.certificateRefs[{at}]");
            let key = match self.secret(&held.owner, reference, &place) {
                Ok(key) => key,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            match self.certificate(&key) {
                Ok(Some(certificate)) => held.certificates.push(certificate.clone()),
                Ok(None) => held.waits = true,
                Err(why) => problems.push(Problem::new("InvalidCertificateRef", format!("{place}: {why}"))),
            }
        }
        held.unresolved.extend(problems);
    }

    /// What a Secret holds; nothing as long as it has not been read.
    ///
    /// # Errors
    /// Why it is no certificate, for people.
    pub fn certificate(&self, secret: &Key) -> Result<Option<&Arc<CertifiedKey>>, String> {
        let named = || format!("Secret {}/{}", secret.namespace, secret.name);
        match self.secrets.get(secret) {
            Some(SecretState::Good(certificate)) => Ok(Some(certificate)),
            Some(SecretState::Missing) => Err(format!("there is no {}", named())),
            Some(SecretState::Users(_)) => Err(format!("{} has no tls.crt", named())),
            Some(SecretState::Broken(problem)) => Err(format!("{} {problem}", named())),
            Some(SecretState::Unknown) | None => Ok(None),
        }
    }
}

fn speaks(spec: &Listener) -> Result<Speaks, Problem> {
    let mode = spec.tls.as_ref().and_then(|tls| tls.mode.as_deref()).unwrap_or("Terminate");
    match (spec.protocol.as_str(), mode) {
        ("HTTP", _) => Ok(Speaks::Http),
        ("HTTPS", "Terminate") => Ok(Speaks::Https),
        ("TLS", "Terminate") => Ok(Speaks::TlsTerminate),
        ("TLS", "Passthrough") => Ok(Speaks::TlsPassthrough),
        ("TCP", _) => Ok(Speaks::Tcp),
        ("UDP", _) => Ok(Speaks::Udp),
        ("HTTPS" | "TLS", mode) => {
            let message = format!("tls.mode {mode} does not go with protocol {}", spec.protocol);
            Err(Problem::new("UnsupportedValue", message))
        }
        (other, _) => {
            let message = format!("protocol {other} is not served; write HTTP, HTTPS, TLS, TCP or UDP");
            Err(Problem::new("UnsupportedProtocol", message))
        }
    }
}

fn conflict(earlier: &[Held], one: &Held) -> Option<Problem> {
    let speaks = one.speaks?;
    for other in earlier.iter().filter(|other| other.spec.port == one.spec.port && other.conflict.is_none()) {
        let Some(theirs) = other.speaks else { continue };
        let named = format!(
            "listener {} of {} {}/{}",
            other.spec.name, other.owner.kind, other.owner.key.namespace, other.owner.key.name
        );
        // Datagrams and connections do not meet.
        if (theirs == Speaks::Udp) != (speaks == Speaks::Udp) {
            continue;
        }
        if theirs.class() != speaks.class() || !speaks.has_hosts() {
            let message = format!("port {} belongs to {named}, which speaks {}", one.spec.port, other.spec.protocol);
            return Some(Problem::new("ProtocolConflict", message));
        }
        if other.host == one.host {
            return Some(Problem::new(
                "HostnameConflict",
                format!("port {} and host {} belong to {named}", one.spec.port, one.host),
            ));
        }
    }
    None
}
