//! Holds the objects, and makes of them what the ports of all Gateways do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use api::object::Key;
use services::{ServiceKind, ServiceTable};

use super::RouteType;
use super::assemble::{Assembled, assemble, authority, sets_of};
use super::backends::Lookup;
use super::listeners::{Owner, World};
use super::objects::{Gateway, Reference};
use super::ports::{PortKey, PortTable, Transport};
use super::rules::{Translated, translate};
use super::status::{self, StatusOf, Statuses};
use super::store::{GatewayObject, ObjectKind, Objects};
use super::trust::{HeldTls, trust};
use super::verify::CaState;
use crate::compile::SecretState;
use crate::objects::LoadBalancerIngress;
use crate::registry::{Registering, Registry};
use crate::upstream::Upstream;

/// A Gateway that wants a Service in front of it.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedGateway {
    pub gateway: Arc<Gateway>,
    /// Ports that clients use.
    pub ports: BTreeSet<(u16, Transport)>,
    /// Addresses that it asks for.
    pub addresses: Vec<String>,
}

/// What the objects come to.
#[derive(Clone, Default)]
pub struct Outcome {
    pub ports: BTreeMap<PortKey, Arc<PortTable>>,
    pub gateways: Vec<WantedGateway>,
}

/// Everything that Gateways are made of. One task owns it.
pub struct GatewayCompiler {
    controller: String,
    services: Arc<RwLock<ServiceTable>>,
    objects: Objects,
    secrets: BTreeMap<Key, SecretState>,
    authorities: BTreeMap<Key, CaState>,
    /// Where the Service in front of a Gateway is reached.
    addresses: BTreeMap<Key, Vec<LoadBalancerIngress>>,
    registry: Registry,
    translated: HashMap<(RouteType, Key), Arc<Translated>>,
    /// Of Services that changed.
    shapes: HashMap<Key, Shape>,
    assembled: BTreeMap<Key, Assembled>,
    backend_tls: HashMap<Key, HeldTls>,
    statuses: Statuses,
    dirty: bool,
    wanted_secrets: BTreeSet<Key>,
    wanted_authorities: BTreeSet<Key>,
}

/// What of a Service decides whether a reference leads anywhere; `None`: there is none.
#[derive(Clone, Debug, PartialEq)]
struct Shape(Option<(bool, Vec<services::ServicePort>)>);

impl Shape {
    fn of(table: &ServiceTable, namespace: &str, name: &str) -> Self {
        let service = table.service(namespace, name);
        Shape(service.map(|held| (matches!(held.kind, ServiceKind::ExternalName(_)), held.ports.to_vec())))
    }
}

impl GatewayCompiler {
    /// Serves the classes of `controller`.
    pub fn new(controller: &str, services: Arc<RwLock<ServiceTable>>) -> Self {
        GatewayCompiler {
            controller: controller.to_owned(),
            services,
            objects: Objects::default(),
            secrets: BTreeMap::new(),
            authorities: BTreeMap::new(),
            addresses: BTreeMap::new(),
            registry: Registry::default(),
            translated: HashMap::new(),
            shapes: HashMap::new(),
            assembled: BTreeMap::new(),
            backend_tls: HashMap::new(),
            statuses: Statuses::default(),
            dirty: false,
            wanted_secrets: BTreeSet::new(),
            wanted_authorities: BTreeSet::new(),
        }
    }

    pub fn set(&mut self, object: GatewayObject) {
        let (kind, key) = (object.kind(), object.metadata().key());
        if self.objects.set(object) {
            self.changed(kind, &key);
        }
    }

    pub fn remove(&mut self, kind: ObjectKind, key: &Key) {
        if self.objects.remove(kind, key) {
            self.changed(kind, key);
        }
    }

    /// Replaces all objects of a kind by those of a fresh list.
    pub fn reset(&mut self, kind: ObjectKind, all: Vec<GatewayObject>) {
        let keep: BTreeSet<Key> = all.iter().map(|object| object.metadata().key()).collect();
        for key in self.objects.keys(kind).iter().filter(|key| !keep.contains(key)) {
            self.remove(kind, key);
        }
        all.into_iter().for_each(|object| self.set(object));
    }

    fn changed(&mut self, kind: ObjectKind, key: &Key) {
        self.dirty = true;
        match kind {
            ObjectKind::Route(route) => drop(self.translated.remove(&(route, key.clone()))),
            // Rules of any route may refer through it.
            ObjectKind::Grant | ObjectKind::Policy => self.translated.clear(),
            ObjectKind::Class | ObjectKind::Gateway | ObjectKind::ListenerSet | ObjectKind::Namespace => {}
        }
    }

    pub fn set_secret(&mut self, key: &Key, state: SecretState) {
        if let Some(held) = self.secrets.get_mut(key) {
            *held = state;
            self.dirty = true;
        }
    }

    pub fn set_authority(&mut self, key: &Key, state: CaState) {
        if let Some(held) = self.authorities.get_mut(key) {
            *held = state;
            self.translated.clear();
            self.dirty = true;
        }
    }

    /// Where the Service in front of a Gateway is reached; `None`: there is none.
    pub fn set_addresses(&mut self, gateway: &Key, addresses: Option<Vec<LoadBalancerIngress>>) {
        let is_new = self.addresses.get(gateway) != addresses.as_ref();
        match addresses {
            Some(addresses) => drop(self.addresses.insert(gateway.clone(), addresses)),
            None => drop(self.addresses.remove(gateway)),
        }
        self.dirty |= is_new;
    }

    /// Follows a change of a Service: what routes lead to is another, and they may lead somewhere now, or no more.
    pub fn service_changed(&mut self, namespace: &str, name: &str) {
        let table = self.services.read().unwrap_or_else(PoisonError::into_inner);
        self.registry.refresh(namespace, name, &table);
        let (key, shape) = (Key::new(namespace, name), Shape::of(&table, namespace, name));
        drop(table);
        // Endpoints come and go behind the same upstream; only its ports are a matter of routes.
        if self.shapes.get(&key) == Some(&shape) {
            return;
        }
        self.shapes.insert(key.clone(), shape);
        let before = self.translated.len();
        self.translated.retain(|_, held| !held.asked.contains(&key));
        self.dirty |= self.translated.len() != before;
    }

    pub fn all_services_changed(&mut self) {
        let table = self.services.read().unwrap_or_else(PoisonError::into_inner);
        self.registry.refresh_all(&table);
        drop(table);
        self.translated.clear();
        self.dirty = true;
    }

    /// Secrets and ConfigMaps that are referred to. Those that are new are unknown until they are set.
    pub fn wanted(&self) -> (&BTreeSet<Key>, &BTreeSet<Key>) {
        (&self.wanted_secrets, &self.wanted_authorities)
    }

    /// Something that is referred to was not looked at yet.
    pub fn waits(&self) -> bool {
        self.secrets.values().any(|state| matches!(state, SecretState::Unknown))
            || self.authorities.values().any(|state| matches!(state, CaState::Unknown))
    }

    /// What the objects come to, if anything changed since the last call.
    pub fn compile(&mut self) -> Option<Outcome> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        self.look_up_references();
        let services = self.services.clone();
        let table = services.read().unwrap_or_else(PoisonError::into_inner);
        let mut policies = BTreeMap::new();
        let trust = trust(&self.objects, &self.authorities, &mut self.backend_tls, &mut policies);
        for ((kind, key), route) in &self.objects.routes {
            let place = (*kind, key.clone());
            if !self.translated.contains_key(&place) {
                let mut registering = Registering { registry: &mut self.registry, table: &table };
                let mut lookup = Lookup {
                    kind: *kind,
                    namespace: &route.metadata.namespace,
                    objects: &self.objects,
                    services: &table,
                    trust: &trust,
                    register: &mut registering,
                    asked: BTreeSet::new(),
                    problems: Vec::new(),
                };
                let translated = translate(route, &mut lookup);
                self.translated.insert(place, Arc::new(translated));
            }
        }
        let world = World { objects: &self.objects, secrets: &self.secrets };
        let (mut outcome, mut assembled) = (Outcome::default(), BTreeMap::new());
        let ours: Vec<(&Key, &Arc<Gateway>)> = self
            .objects
            .gateways
            .iter()
            .filter(|(_, gateway)| self.is_ours(gateway) && gateway.metadata.deletion_timestamp.is_none())
            .collect();
        let mut registering = Registering { registry: &mut self.registry, table: &table };
        for (key, gateway) in ours {
            let mut before = self.assembled.remove(key);
            let one = assemble(
                &world,
                &self.authorities,
                gateway,
                &self.translated,
                &mut registering,
                before.as_mut().map(|held| std::mem::take(&mut held.tls)).unwrap_or_default(),
            );
            outcome.ports.extend(one.ports.iter().map(|(key, table)| (key.clone(), table.clone())));
            if one.not_accepted.is_none() {
                outcome.gateways.push(WantedGateway {
                    gateway: gateway.clone(),
                    ports: one.wanted_ports(),
                    addresses: gateway
                        .spec
                        .addresses
                        .iter()
                        .map(|held| held.value.clone())
                        .filter(|v| !v.is_empty())
                        .collect(),
                });
            }
            assembled.insert(key.clone(), one);
        }
        self.assembled = assembled;
        self.statuses = status::of_all(&status::Known {
            controller: &self.controller,
            objects: &self.objects,
            assembled: &self.assembled,
            translated: &self.translated,
            addresses: &self.addresses,
            policies: &policies,
        });
        Some(outcome)
    }

    /// A class of this controller; whether it is accepted is another matter.
    fn is_ours(&self, gateway: &Gateway) -> bool {
        self.objects.is_of(gateway, &self.controller)
    }

    /// Statuses that are not what they should be, each with the body of a patch. `now` is the time of what has changed.
    pub fn unwritten(&self, now: &str) -> Vec<StatusOf> {
        self.statuses.unwritten(&self.objects, &self.controller, now)
    }

    pub fn upstreams(&self) -> impl Iterator<Item = Arc<Upstream>> + '_ {
        self.registry.upstreams()
    }

    fn look_up_references(&mut self) {
        let (mut secrets, mut authorities) = (BTreeSet::new(), BTreeSet::new());
        let world = World { objects: &self.objects, secrets: &self.secrets };
        for gateway in self.objects.gateways.values().filter(|gateway| self.is_ours(gateway)) {
            let own = Owner { kind: "Gateway", key: gateway.metadata.key() };
            let mut secret = |owner: &Owner, reference: &Reference| {
                // What may not be referred to is not even read.
                secrets.extend(world.secret(owner, reference, ""));
            };
            for reference in
                gateway.spec.listeners.iter().filter_map(|one| one.tls.as_ref()).flat_map(|tls| &tls.certificate_refs)
            {
                secret(&own, reference);
            }
            if let Some(reference) = &gateway.spec.tls.backend.client_certificate_ref {
                secret(&own, reference);
            }
            for set in sets_of(&world, gateway).0 {
                let owner = Owner { kind: "ListenerSet", key: set.metadata.key() };
                for reference in
                    set.spec.listeners.iter().filter_map(|one| one.tls.as_ref()).flat_map(|tls| &tls.certificate_refs)
                {
                    secret(&owner, reference);
                }
            }
            if let Some(frontend) = &gateway.spec.tls.frontend {
                let ports = frontend.per_port.iter().map(|port| &port.tls);
                let validations = ports.chain([&frontend.default]).filter_map(|port| port.validation.as_ref());
                for reference in validations.flat_map(|validation| &validation.ca_certificate_refs) {
                    authorities.extend(authority(&world, &own, reference));
                }
            }
        }
        for policy in self.objects.policies.values() {
            for reference in &policy.spec.validation.ca_certificate_refs {
                if reference.is("", "ConfigMap", ("", "ConfigMap")) {
                    authorities.insert(Key::new(policy.metadata.namespace.clone(), reference.name.clone()));
                }
            }
        }
        self.secrets.retain(|key, _| secrets.contains(key));
        for key in &secrets {
            self.secrets.entry(key.clone()).or_insert(SecretState::Unknown);
        }
        self.authorities.retain(|key, _| authorities.contains(key));
        for key in &authorities {
            self.authorities.entry(key.clone()).or_insert(CaState::Unknown);
        }
        (self.wanted_secrets, self.wanted_authorities) = (secrets, authorities);
    }
}
