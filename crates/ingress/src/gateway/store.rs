//! The objects that Gateways are made of, by kind and key.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::object::{Key, Metadata};

use super::RouteType;
use super::objects::{AnyRoute, BackendTlsPolicy, Gateway, GatewayClass, ListenerSet, Namespace, ReferenceGrant};

/// An object of one of the kinds that Gateways are made of.
#[derive(Clone, Debug)]
pub enum GatewayObject {
    Class(GatewayClass),
    Gateway(Box<Gateway>),
    ListenerSet(ListenerSet),
    Route(RouteType, AnyRoute),
    Grant(ReferenceGrant),
    Policy(BackendTlsPolicy),
    Namespace(Namespace),
}

/// Which kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    Class,
    Gateway,
    ListenerSet,
    Route(RouteType),
    Grant,
    Policy,
    Namespace,
}

/// All objects, by kind and key.
#[derive(Default)]
pub struct Objects {
    pub classes: BTreeMap<Key, Arc<GatewayClass>>,
    pub gateways: BTreeMap<Key, Arc<Gateway>>,
    pub sets: BTreeMap<Key, Arc<ListenerSet>>,
    pub routes: BTreeMap<(RouteType, Key), Arc<AnyRoute>>,
    pub grants: BTreeMap<Key, Arc<ReferenceGrant>>,
    pub policies: BTreeMap<Key, Arc<BackendTlsPolicy>>,
    pub namespaces: BTreeMap<Key, Arc<Namespace>>,
}

fn put<T>(map: &mut BTreeMap<Key, Arc<T>>, key: Key, value: T, same: impl Fn(&T, &T) -> bool) -> bool {
    let is_same = map.get(&key).is_some_and(|held| same(held, &value));
    map.insert(key, Arc::new(value));
    !is_same
}

/// Nothing that counts differs; statuses may.
fn same_metadata(a: &Metadata, b: &Metadata) -> bool {
    a.uid == b.uid
        && a.labels == b.labels
        && a.generation == b.generation
        && a.creation_timestamp == b.creation_timestamp
        && a.deletion_timestamp == b.deletion_timestamp
}

impl GatewayObject {
    pub fn kind(&self) -> ObjectKind {
        match self {
            GatewayObject::Class(_) => ObjectKind::Class,
            GatewayObject::Gateway(_) => ObjectKind::Gateway,
            GatewayObject::ListenerSet(_) => ObjectKind::ListenerSet,
            GatewayObject::Route(kind, _) => ObjectKind::Route(*kind),
            GatewayObject::Grant(_) => ObjectKind::Grant,
            GatewayObject::Policy(_) => ObjectKind::Policy,
            GatewayObject::Namespace(_) => ObjectKind::Namespace,
        }
    }

    pub fn metadata(&self) -> &Metadata {
        match self {
            GatewayObject::Class(held) => &held.metadata,
            GatewayObject::Gateway(held) => &held.metadata,
            GatewayObject::ListenerSet(held) => &held.metadata,
            GatewayObject::Route(_, held) => &held.metadata,
            GatewayObject::Grant(held) => &held.metadata,
            GatewayObject::Policy(held) => &held.metadata,
            GatewayObject::Namespace(held) => &held.metadata,
        }
    }
}

impl Objects {
    /// Says whether anything but a status differs.
    pub fn set(&mut self, object: GatewayObject) -> bool {
        let key = object.metadata().key();
        match object {
            GatewayObject::Class(held) => {
                put(&mut self.classes, key, held, |a, b| a.spec == b.spec && same_metadata(&a.metadata, &b.metadata))
            }
            GatewayObject::Gateway(held) => {
                put(&mut self.gateways, key, *held, |a, b| a.spec == b.spec && same_metadata(&a.metadata, &b.metadata))
            }
            GatewayObject::ListenerSet(held) => {
                put(&mut self.sets, key, held, |a, b| a.spec == b.spec && same_metadata(&a.metadata, &b.metadata))
            }
            GatewayObject::Route(kind, held) => {
                let place = (kind, key);
                let is_same = self
                    .routes
                    .get(&place)
                    .is_some_and(|a| a.spec == held.spec && same_metadata(&a.metadata, &held.metadata));
                self.routes.insert(place, Arc::new(held));
                !is_same
            }
            GatewayObject::Grant(held) => put(&mut self.grants, key, held, |a, b| a.spec == b.spec),
            GatewayObject::Policy(held) => {
                put(&mut self.policies, key, held, |a, b| a.spec == b.spec && same_metadata(&a.metadata, &b.metadata))
            }
            GatewayObject::Namespace(held) => {
                put(&mut self.namespaces, key, held, |a, b| a.metadata.labels == b.metadata.labels)
            }
        }
    }

    pub fn remove(&mut self, kind: ObjectKind, key: &Key) -> bool {
        match kind {
            ObjectKind::Class => self.classes.remove(key).is_some(),
            ObjectKind::Gateway => self.gateways.remove(key).is_some(),
            ObjectKind::ListenerSet => self.sets.remove(key).is_some(),
            ObjectKind::Route(route) => self.routes.remove(&(route, key.clone())).is_some(),
            ObjectKind::Grant => self.grants.remove(key).is_some(),
            ObjectKind::Policy => self.policies.remove(key).is_some(),
            ObjectKind::Namespace => self.namespaces.remove(key).is_some(),
        }
    }

    /// Whether it is of a class of this controller that is accepted.
    pub fn is_of(&self, gateway: &Gateway, controller: &str) -> bool {
        let class = self.classes.get(&Key::new("", gateway.spec.gateway_class_name.clone()));
        class.is_some_and(|class| class.spec.controller_name == controller && class.spec.parameters_ref.is_none())
    }

    pub fn keys(&self, kind: ObjectKind) -> Vec<Key> {
        match kind {
            ObjectKind::Class => self.classes.keys().cloned().collect(),
            ObjectKind::Gateway => self.gateways.keys().cloned().collect(),
            ObjectKind::ListenerSet => self.sets.keys().cloned().collect(),
            ObjectKind::Route(route) => {
                self.routes.keys().filter(|(kind, _)| *kind == route).map(|(_, key)| key.clone()).collect()
            }
            ObjectKind::Grant => self.grants.keys().cloned().collect(),
            ObjectKind::Policy => self.policies.keys().cloned().collect(),
            ObjectKind::Namespace => self.namespaces.keys().cloned().collect(),
        }
    }
}

/// The older of two that want the same wins; those of the same second by name.
pub fn age(metadata: &Metadata) -> (&str, &str, &str) {
    (metadata.creation_timestamp.as_deref().unwrap_or_default(), &metadata.namespace, &metadata.name)
}
