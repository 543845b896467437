//! Backend references become upstreams, or the status that their share of requests gets.

use std::collections::BTreeSet;
use std::sync::Arc;

use api::object::Key;
use http::StatusCode;
use services::{Protocol, ServiceKind, ServiceTable};

use super::RouteType;
use super::condition::Problem;
use super::grants::{End, allows};
use super::objects::{BackendRef, GROUP, Reference};
use super::store::Objects;
use super::trust::Trust;
use super::verify::BackendTls;
use crate::route::{Backends, Filter, Instead, Redirect, WeightedBackend};
use crate::translate::Register;
use crate::upstream::{PortRef, Upstream, UpstreamKey};

/// What backend references are looked up in, for one route.
pub struct Lookup<'a> {
    pub kind: RouteType,
    pub namespace: &'a str,
    pub objects: &'a Objects,
    pub services: &'a ServiceTable,
    pub trust: &'a Trust<'a>,
    pub register: &'a mut dyn Register,
    /// Services that were asked for, there or not.
    pub asked: BTreeSet<Key>,
    /// Why references lead nowhere.
    pub problems: Vec<Problem>,
}

/// A backend that a reference leads to.
pub struct Found {
    pub upstream: Arc<Upstream>,
    pub tls: Option<Arc<BackendTls>>,
}

impl Lookup<'_> {
    /// The backends of a rule. `filters` are those of each reference, and where it sends clients to.
    pub fn backends(&mut self, references: &[BackendRef], filters: Vec<(Vec<Filter>, Option<Redirect>)>) -> Backends {
        let mut list = Vec::new();
        for (reference, (filters, redirect)) in references.iter().zip(filters) {
            let weight = reference.weight.unwrap_or(1);
            let (found, instead) = match self.find(&reference.reference) {
                Ok(found) => (found, redirect.map(Instead::Redirect)),
                Err(problem) => {
                    self.problems.push(problem);
                    let nowhere = Found { upstream: self.upstream(&reference.reference), tls: None };
                    (nowhere, Some(Instead::Refusal(StatusCode::INTERNAL_SERVER_ERROR)))
                }
            };
            list.push(WeightedBackend { weight, upstream: found.upstream, filters, tls: found.tls, instead });
        }
        Backends::new(list)
    }

    fn upstream(&mut self, reference: &Reference) -> Arc<Upstream> {
        let key = reference.key(self.namespace);
        let number = reference.port.unwrap_or_default();
        let port = if self.kind == RouteType::Udp { PortRef::Udp(number) } else { PortRef::Number(number) };
        self.register.upstream(&UpstreamKey { namespace: key.namespace.into(), service: key.name.into(), port })
    }

    /// Where one reference leads.
    ///
    /// # Errors
    /// Why it leads nowhere, as the condition ResolvedRefs says it.
    pub fn find(&mut self, reference: &Reference) -> Result<Found, Problem> {
        let key = reference.key(self.namespace);
        if !reference.is("", "Service", ("", "Service")) {
            let group = reference.group.as_deref().unwrap_or_default();
            let kind = reference.kind.as_deref().unwrap_or_default();
            let message =
                format!("backendRef {} is a {group}/{kind}; only Services of the core group are served", key.name);
            return Err(Problem::new("InvalidKind", message));
        }
        let (from, to) = (End { group: GROUP, kind: self.kind.kind() }, End { group: "", kind: "Service" });
        if !allows(self.objects.grants.values(), from, self.namespace, to, &key) {
            let message = format!(
                "no ReferenceGrant in {} lets {} of {} refer to Service {}",
                key.namespace,
                self.kind.kind(),
                self.namespace,
                key.name
            );
            return Err(Problem::new("RefNotPermitted", message));
        }
        self.asked.insert(key.clone());
        let named = format!("Service {}/{}", key.namespace, key.name);
        let missing = |message: String| Err(Problem::new("BackendNotFound", message));
        let Some(service) = self.services.service(&key.namespace, &key.name) else {
            return missing(format!("there is no {named}"));
        };
        if matches!(service.kind, ServiceKind::ExternalName(_)) {
            let message =
                format!("{named} is an ExternalName, which Gateway API leaves out; use a Service with endpoints");
            return Err(Problem::new("UnsupportedValue", message));
        }
        let Some(number) = reference.port else {
            return missing(format!("the backendRef to {named} has no port"));
        };
        let protocol = if self.kind == RouteType::Udp { Protocol::Udp } else { Protocol::Tcp };
        let Some(port) = service.ports.iter().find(|port| port.port == number && port.protocol == protocol) else {
            return missing(format!("{named} has no {} port {number}", protocol));
        };
        let tls = match self.kind {
            RouteType::Http | RouteType::Grpc => self.trust.for_service(&key, &port.name)?,
            RouteType::Tls | RouteType::Tcp | RouteType::Udp => None,
        };
        Ok(Found { upstream: self.upstream(reference), tls })
    }
}
