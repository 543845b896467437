//! Holds the objects, and makes of them what the ports of all Gateways do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use api::object::Key;
use services::{ServiceKind, ServiceTable};

use super::RouteType;
use super::assemble::{Assembled, assemble, authority, sets_of};
use super::attached::Place;
use super::backends::Lookup;
use super::condition::Condition;
use super::listeners::{Owner, World};
use super::objects::{Gateway, Reference};
use super::ports::{PortKey, PortTable, Transport};
use super::rules::{Translated, translate};
use super::status::{Known, StatusOf};
use super::store::{GatewayObject, ObjectKind, Objects};
use super::trust::{HeldTls, trust};
use super::verify::CaState;
use crate::compile::SecretState;
use crate::objects::LoadBalancerIngress;
use crate::registry::{Registering, Registry};

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
    /// What is to be said of policies.
    policy_conditions: BTreeMap<Key, Vec<Condition>>,
    /// Something that any route may depend on has changed.
    dirty: bool,
    /// Routes that changed, if nothing else did.
    changed: BTreeSet<Place>,
    /// Objects whose status may not be what it should be.
    untold: BTreeSet<(ObjectKind, Key)>,
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
            policy_conditions: BTreeMap::new(),
            dirty: false,
            changed: BTreeSet::new(),
            untold: BTreeSet::new(),
            wanted_secrets: BTreeSet::new(),
            wanted_authorities: BTreeSet::new(),
        }
    }

    pub fn set(&mut self, object: GatewayObject) {
        let (kind, key) = (object.kind(), object.metadata().key());
        // Somebody may have written a status, too.
        self.untold.insert((kind, key.clone()));
        if self.objects.set(object) {
            self.changed(kind, &key);
        }
    }

    pub fn remove(&mut self, kind: ObjectKind, key: &Key) {
        self.untold.remove(&(kind, key.clone()));
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
        if let ObjectKind::Route(route) = kind {
            let place = (route, key.clone());
            self.translated.remove(&place);
            self.changed.insert(place);
            return;
        }
        self.dirty = true;
        match kind {
            // Rules of any route may refer through it.
            ObjectKind::Grant | ObjectKind::Policy => self.translated.clear(),
            ObjectKind::Route(_)
            | ObjectKind::Class
            | ObjectKind::Gateway
            | ObjectKind::ListenerSet
            | ObjectKind::Namespace => {}
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
        if self.addresses.get(gateway) == addresses.as_ref() {
            return;
        }
        match addresses {
            Some(addresses) => drop(self.addresses.insert(gateway.clone(), addresses)),
            None => drop(self.addresses.remove(gateway)),
        }
        self.untold.insert((ObjectKind::Gateway, gateway.clone()));
        let sets = self.assembled.get(gateway).into_iter().flat_map(|held| &held.sets);
        self.untold.extend(sets.map(|set| (ObjectKind::ListenerSet, set.metadata.key())));
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
        let changed = &mut self.changed;
        self.translated.retain(|place, held| {
            let stays = !held.asked.contains(&key);
            if !stays {
                changed.insert(place.clone());
            }
            stays
        });
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

    /// What the objects come to, if anything changed since the last call. A change of routes costs what it changes; one of
    /// anything else costs everything.
    pub fn compile(&mut self) -> Option<Outcome> {
        let (is_all, changed) = (std::mem::take(&mut self.dirty), std::mem::take(&mut self.changed));
        if !is_all && changed.is_empty() {
            return None;
        }
        if is_all {
            self.look_up_references();
        }
        self.translate(is_all, &changed);
        match is_all {
            true => self.assemble_all(),
            false => self.attach(&changed),
        }
        self.untold.extend(self.objects.policies.keys().map(|key| (ObjectKind::Policy, key.clone())));
        let mut outcome = Outcome::default();
        for (key, one) in &self.assembled {
            outcome.ports.extend(one.ports.iter().map(|(key, table)| (key.clone(), table.clone())));
            let Some(gateway) = self.objects.gateways.get(key).filter(|_| one.not_accepted.is_none()) else { continue };
            let addresses = gateway.spec.addresses.iter().map(|held| held.value.clone());
            outcome.gateways.push(WantedGateway {
                gateway: gateway.clone(),
                ports: one.wanted_ports(),
                addresses: addresses.filter(|value| !value.is_empty()).collect(),
            });
        }
        self.registry.tidy(self.objects.routes.len());
        Some(outcome)
    }

    /// Translates the routes that are not translated yet.
    fn translate(&mut self, is_all: bool, changed: &BTreeSet<Place>) {
        let services = self.services.clone();
        let table = services.read().unwrap_or_else(PoisonError::into_inner);
        self.policy_conditions.clear();
        let trust = trust(&self.objects, &self.authorities, &mut self.backend_tls, &mut self.policy_conditions);
        let places: Vec<&Place> = if is_all { self.objects.routes.keys().collect() } else { changed.iter().collect() };
        for place in places {
            let Some(route) = self.objects.routes.get(place).filter(|_| !self.translated.contains_key(place)) else {
                continue;
            };
            let mut registering = Registering { registry: &mut self.registry, table: &table };
            let mut lookup = Lookup {
                kind: place.0,
                namespace: &route.metadata.namespace,
                objects: &self.objects,
                services: &table,
                trust: &trust,
                register: &mut registering,
                asked: BTreeSet::new(),
                problems: Vec::new(),
            };
            let translated = translate(route, &mut lookup);
            self.translated.insert(place.clone(), Arc::new(translated));
        }
    }

    fn assemble_all(&mut self) {
        let world = World { objects: &self.objects, secrets: &self.secrets };
        let mut before = std::mem::take(&mut self.assembled);
        for (key, gateway) in &self.objects.gateways {
            if !self.is_ours(gateway) || gateway.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let cache = before.remove(key).map(|held| held.tls).unwrap_or_default();
            let mut one = assemble(&world, &self.authorities, gateway, cache);
            let (mut touched, mut places) = (BTreeSet::new(), BTreeSet::new());
            for (place, route) in &self.objects.routes {
                let translated = self.translated.get(place).map(|held| (&**route, &**held));
                if one.attached.put(&world, &one.listeners, place, translated, &mut touched) {
                    places.insert(place.clone());
                }
            }
            one.attached.settle(&touched, &self.translated, &places);
            one.make_ports(key);
            self.assembled.insert(key.clone(), one);
        }
        self.untold.extend(self.objects.routes.keys().map(|(kind, key)| (ObjectKind::Route(*kind), key.clone())));
        self.untold.extend(self.objects.gateways.keys().map(|key| (ObjectKind::Gateway, key.clone())));
        self.untold.extend(self.objects.classes.keys().map(|key| (ObjectKind::Class, key.clone())));
        self.untold.extend(self.objects.sets.keys().map(|key| (ObjectKind::ListenerSet, key.clone())));
    }

    /// Attaches routes anew to the listeners as they are.
    fn attach(&mut self, changed: &BTreeSet<Place>) {
        let world = World { objects: &self.objects, secrets: &self.secrets };
        for (key, one) in &mut self.assembled {
            let (mut touched, mut places) = (BTreeSet::new(), BTreeSet::new());
            for place in changed {
                let route = self.objects.routes.get(place).zip(self.translated.get(place));
                let route = route.map(|(route, translated)| (&**route, &**translated));
                if one.attached.put(&world, &one.listeners, place, route, &mut touched) {
                    places.insert(place.clone());
                }
            }
            if places.is_empty() {
                continue;
            }
            let concerned = one.attached.settle(&touched, &self.translated, &places);
            one.make_ports(key);
            self.untold.extend(concerned.into_iter().map(|(kind, key)| (ObjectKind::Route(kind), key)));
            self.untold.insert((ObjectKind::Gateway, key.clone()));
            self.untold.extend(one.sets.iter().map(|set| (ObjectKind::ListenerSet, set.metadata.key())));
        }
    }

    /// A class of this controller; whether it is accepted is another matter.
    fn is_ours(&self, gateway: &Gateway) -> bool {
        self.objects.is_of(gateway, &self.controller)
    }

    /// Statuses that are not what they should be, each with the body of a patch. `now` is the time of what has changed. They
    /// are told of again until the objects have them.
    pub fn unwritten(&mut self, now: &str) -> Vec<StatusOf> {
        let known = Known {
            controller: &self.controller,
            objects: &self.objects,
            assembled: &self.assembled,
            translated: &self.translated,
            addresses: &self.addresses,
            policies: &self.policy_conditions,
        };
        let mut out = Vec::new();
        self.untold.retain(|(kind, key)| match known.unwritten(*kind, key, now) {
            Some(status) => {
                out.push(status);
                true
            }
            None => false,
        });
        out
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
