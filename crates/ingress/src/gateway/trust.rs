//! BackendTLSPolicies: which Services are spoken to over TLS, and whom their endpoints are taken for.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use api::object::Key;
use rustls_pki_types::ServerName;
use tokio_rustls::rustls::RootCertStore;

use super::condition::{Condition, Problem};
use super::objects::BackendTlsPolicy;
use super::store::{Objects, age};
use super::verify::{BackendTls, CaState, Name};
use crate::crypto;

/// TLS to the endpoints of a policy, kept so that connections outlive a change of something else.
pub struct HeldTls {
    policy: Arc<BackendTlsPolicy>,
    roots: Vec<Arc<RootCertStore>>,
    tls: Arc<BackendTls>,
}

type ByService<'a> = HashMap<(Key, Option<&'a str>), Result<Arc<BackendTls>, Problem>>;

/// How Services are spoken to over TLS, by service and port; no port: all that have no policy of their own.
pub struct Trust<'a> {
    by_service: ByService<'a>,
}

impl Trust<'_> {
    /// # Errors
    /// There is a policy, and it does not say how.
    pub fn for_service(&self, service: &Key, port: &str) -> Result<Option<Arc<BackendTls>>, Problem> {
        let of_port = self.by_service.get(&(service.clone(), Some(port)));
        match of_port.or_else(|| self.by_service.get(&(service.clone(), None))) {
            None => Ok(None),
            Some(held) => held.clone().map(Some),
        }
    }
}

/// What the policies say, and in `conditions` what is to be said of each.
pub fn trust<'a>(
    objects: &'a Objects,
    authorities: &BTreeMap<Key, CaState>,
    held: &mut HashMap<Key, HeldTls>,
    conditions: &mut BTreeMap<Key, Vec<Condition>>,
) -> Trust<'a> {
    let mut by_service = ByService::new();
    held.retain(|key, _| objects.policies.contains_key(key));
    let mut policies: Vec<&Arc<BackendTlsPolicy>> = objects.policies.values().collect();
    policies.sort_by(|a, b| age(&a.metadata).cmp(&age(&b.metadata)));
    for policy in policies {
        let key = policy.metadata.key();
        let made = backend_tls(policy, authorities, held);
        let mut conflicts = Vec::new();
        for target in policy.spec.target_refs.iter().filter(|target| target.is("", "Service", ("", "Service"))) {
            let service = Key::new(policy.metadata.namespace.clone(), target.name.clone());
            let place = (service, target.section_name.as_deref());
            if by_service.contains_key(&place) {
                let message = format!("an older BackendTLSPolicy is for Service {}", target.name);
                conflicts.push(Problem::new("Conflicted", message));
                continue;
            }
            by_service.insert(place, made.clone());
        }
        let resolved = match &made {
            Ok(_) => Condition::yes("ResolvedRefs", "ResolvedRefs"),
            Err(problem) => Condition::no("ResolvedRefs", problem.reason, problem.message.clone()),
        };
        let accepted = match (&made, conflicts.first()) {
            (Err(problem), _) => Condition::no("Accepted", "NoValidCACertificate", problem.message.clone()),
            (Ok(_), Some(problem)) => Condition::no("Accepted", problem.reason, problem.message.clone()),
            (Ok(_), None) => Condition::yes("Accepted", "Accepted"),
        };
        conditions.insert(key, vec![accepted, resolved]);
    }
    Trust { by_service }
}

fn backend_tls(
    policy: &Arc<BackendTlsPolicy>,
    authorities: &BTreeMap<Key, CaState>,
    held: &mut HashMap<Key, HeldTls>,
) -> Result<Arc<BackendTls>, Problem> {
    let validation = &policy.spec.validation;
    let mut all: Vec<Arc<RootCertStore>> = Vec::new();
    let mut problem = None;
    for reference in &validation.ca_certificate_refs {
        if !reference.is("", "ConfigMap", ("", "ConfigMap")) {
            let message = format!("caCertificateRefs {} is no ConfigMap; put ca.crt into one", reference.name);
            problem = Some(Problem::new("InvalidKind", message));
            continue;
        }
        let key = Key::new(policy.metadata.namespace.clone(), reference.name.clone());
        let named = format!("ConfigMap {}/{}", key.namespace, key.name);
        let wrong = |message: String| Some(Problem::new("InvalidCACertificateRef", message));
        match authorities.get(&key) {
            Some(CaState::Good(roots)) => all.push(roots.clone()),
            Some(CaState::Missing) => problem = wrong(format!("there is no {named}")),
            Some(CaState::Broken(why)) => problem = wrong(format!("{named} {why}")),
            Some(CaState::Unknown) | None => problem = wrong(format!("{named} has not been read yet")),
        }
    }
    match validation.well_known.as_deref() {
        None | Some("") => {}
        Some("System") => all.push(system_roots()?),
        Some(other) => {
            let message = format!("wellKnownCACertificates {other} is not known; write System");
            return Err(Problem::new("InvalidCACertificateRef", message));
        }
    }
    if all.is_empty() {
        let nothing = || {
            Problem::new(
                "InvalidCACertificateRef",
                "no authority is named; set caCertificateRefs or wellKnownCACertificates",
            )
        };
        return Err(problem.unwrap_or_else(nothing));
    }
    let key = policy.metadata.key();
    if let Some(before) = held.get(&key) {
        let same_roots =
            before.roots.len() == all.len() && before.roots.iter().zip(&all).all(|(a, b)| Arc::ptr_eq(a, b));
        if same_roots && before.policy.spec == policy.spec {
            return Ok(before.tls.clone());
        }
    }
    let host = |text: &str, field: &str| {
        ServerName::try_from(text.to_owned())
            .map_err(|_| Problem::new("Invalid", format!("validation.{field} {text:?} is no DNS name")))
    };
    let name = host(&validation.hostname, "hostname")?;
    let mut names = Vec::new();
    for one in &validation.subject_alt_names {
        names.push(match one.r#type.as_str() {
            "URI" => Name::Uri(one.uri.as_str().into()),
            _ => Name::Host(host(&one.hostname, "subjectAltNames.hostname")?),
        });
    }
    if names.is_empty() {
        names.push(Name::Host(name.clone()));
    }
    let mut roots = RootCertStore::empty();
    all.iter().for_each(|one| roots.roots.extend(one.roots.iter().cloned()));
    let tls = Arc::new(BackendTls::new(Arc::new(roots), name, names, crypto::provider()));
    held.insert(key, HeldTls { policy: policy.clone(), roots: all, tls: tls.clone() });
    Ok(tls)
}

/// The host's own authorities, read once.
fn system_roots() -> Result<Arc<RootCertStore>, Problem> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(roots)
    });
    match roots.is_empty() {
        true => Err(Problem::new("InvalidCACertificateRef", "this system has no certificates of authorities")),
        false => Ok(roots.clone()),
    }
}
