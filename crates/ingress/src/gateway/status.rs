//! What is to be said of each object, and which of it is not said yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use api::object::{Key, Metadata};
use serde_json::{Value, json};

use super::assemble::Assembled;
use super::attached::Place;
use super::condition::{Condition, Problem, unless};
use super::listeners::Held;
use super::objects::{AnyRoute, BackendTlsPolicy, GROUP, Gateway, GatewayClass, ListenerSet, Reference};
use super::rules::Translated;
use super::store::{ObjectKind, Objects};
use crate::objects::LoadBalancerIngress;

/// What the class says is there beyond the core of the API, by the names of its conformance tests.
const FEATURES: [&str; 41] = [
    "BackendTLSPolicy",
    "BackendTLSPolicySANValidation",
    "GRPCRoute",
    "GRPCRouteNamedRouteRule",
    "GRPCRouteRequestHeaderModifier",
    "Gateway",
    "GatewayAddressEmpty",
    "GatewayBackendClientCertificate",
    "GatewayFrontendClientCertificateValidation",
    "GatewayFrontendClientCertificateValidationInsecureFallback",
    "GatewayHTTPListenerIsolation",
    "GatewayHTTPSListenerDetectMisdirectedRequests",
    "GatewayInfrastructurePropagation",
    "GatewayPort8080",
    "GatewayStaticAddresses",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendRequestRedirect",
    "HTTPRouteBackendTimeout",
    "HTTPRouteBackendURLRewrite",
    "HTTPRouteCORS",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestMirror",
    "HTTPRouteRequestMultipleMirrors",
    "HTTPRouteRequestPercentageMirror",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteSchemeRedirect",
    "ListenerSet",
];
const MORE_FEATURES: [&str; 5] = ["ReferenceGrant", "TCPRoute", "TLSRoute", "TLSRouteModeTerminate", "UDPRoute"];

/// A status that is to be written.
#[derive(Clone, Debug)]
pub struct StatusOf {
    pub kind: ObjectKind,
    pub key: Key,
    /// A merge patch. It names the version that it was made for, so that nobody's change is lost.
    pub patch: Value,
}

/// What statuses are made of.
pub struct Known<'a> {
    pub controller: &'a str,
    pub objects: &'a Objects,
    pub assembled: &'a BTreeMap<Key, Assembled>,
    pub translated: &'a HashMap<Place, Arc<Translated>>,
    pub addresses: &'a BTreeMap<Key, Vec<LoadBalancerIngress>>,
    pub policies: &'a BTreeMap<Key, Vec<Condition>>,
}

impl Known<'_> {
    /// The status of an object if it is not what it should be, as a patch.
    pub fn unwritten(&self, kind: ObjectKind, key: &Key, now: &str) -> Option<StatusOf> {
        let place = |metadata: &Metadata, status: Value| {
            let patch = json!({"metadata": {"resourceVersion": metadata.resource_version}, "status": status});
            Some(StatusOf { kind, key: key.clone(), patch })
        };
        match kind {
            ObjectKind::Class => {
                let held = self.objects.classes.get(key)?;
                let wanted = (held.spec.controller_name == self.controller).then(|| of_class(held))?;
                place(&held.metadata, whole(&held.status, &wanted, now)?)
            }
            ObjectKind::Gateway => {
                let held = self.objects.gateways.get(key)?;
                let wanted = of_gateway(held, self.assembled.get(key)?, self.addresses.get(key));
                place(&held.metadata, whole(&held.status, &wanted, now)?)
            }
            ObjectKind::ListenerSet => {
                let held = self.objects.sets.get(key)?;
                place(&held.metadata, whole(&held.status, &self.of_set(key)?, now)?)
            }
            ObjectKind::Route(route) => {
                let held = self.objects.routes.get(&(route, key.clone()))?;
                let wanted = self.of_route(&(route, key.clone()), held)?;
                let parents = entries(&held.status.parents, wanted, "parentRef", self.controller, now)?;
                place(&held.metadata, json!({"parents": parents}))
            }
            ObjectKind::Policy => {
                let held = self.objects.policies.get(key)?;
                let wanted = self.of_policy(key, held)?;
                let ancestors = entries(&held.status.ancestors, wanted, "ancestorRef", self.controller, now)?;
                place(&held.metadata, json!({"ancestors": ancestors}))
            }
            ObjectKind::Grant | ObjectKind::Namespace => None,
        }
    }

    fn of_set(&self, key: &Key) -> Option<Value> {
        let is = |set: &&Arc<ListenerSet>| set.metadata.namespace == key.namespace && set.metadata.name == key.name;
        for (gateway, assembled) in self.assembled {
            if let Some(set) = assembled.refused_sets.iter().find(is) {
                let message = "the Gateway's spec.allowedListeners does not have this namespace in it";
                let generation = set.metadata.generation;
                let conditions =
                    ["Accepted", "Programmed"].map(|kind| Condition::no(kind, "NotAllowed", message).json(generation));
                return Some(json!({"conditions": conditions, "listeners": []}));
            }
            let Some(set) = assembled.sets.iter().find(is) else { continue };
            let generation = set.metadata.generation;
            let is_reached = assembled.not_accepted.is_none()
                && self.addresses.get(gateway).is_some_and(|addresses| !addresses.is_empty());
            let own = |held: &Held| held.owner.kind == "ListenerSet" && held.owner.key == *key;
            let listeners: Vec<Value> = (0..assembled.listeners.len())
                .filter(|at| own(&assembled.listeners[*at]))
                .map(|at| of_listener(assembled, at, generation))
                .collect();
            let serves = assembled.listeners.iter().any(|held| own(held) && held.serves());
            let accepted = match serves {
                true => Condition::yes("Accepted", "Accepted"),
                false => Condition::no("Accepted", "ListenersNotValid", "none of its listeners is served"),
            };
            let programmed = match serves && is_reached {
                true => Condition::yes("Programmed", "Programmed"),
                false => {
                    let message = "its Gateway is not reached yet, or no listener is served";
                    Condition::no("Programmed", "Pending", message)
                }
            };
            let conditions = [accepted.json(generation), programmed.json(generation)];
            return Some(json!({"conditions": conditions, "listeners": listeners}));
        }
        None
    }

    /// Our entries, in the order of the route's parentRefs.
    fn of_route(&self, place: &Place, route: &AnyRoute) -> Option<Vec<Value>> {
        let translated = self.translated.get(place)?;
        let results = self.assembled.values().flat_map(|one| one.attached.results(place));
        let mut parents: Vec<(usize, Value)> = results
            .map(|(reference, result)| {
                let conditions = route_conditions(translated, &result, route.metadata.generation);
                let at = route.spec.parent_refs.iter().position(|held| held == reference).unwrap_or_default();
                let entry = json!({"parentRef": parent_json(reference), "controllerName": self.controller, "conditions": conditions});
                (at, entry)
            })
            .collect();
        parents.sort_by_key(|(at, _)| *at);
        Some(parents.into_iter().map(|(_, value)| value).collect())
    }

    /// An entry for each Gateway that uses a Service of the policy.
    fn of_policy(&self, key: &Key, policy: &BackendTlsPolicy) -> Option<Vec<Value>> {
        let conditions = self.policies.get(key)?;
        let conditions: Vec<Value> = conditions.iter().map(|one| one.json(policy.metadata.generation)).collect();
        let targets = policy.spec.target_refs.iter().map(|one| Key::new(key.namespace.clone(), one.name.clone()));
        let targets: Vec<Key> = targets.collect();
        let uses = |place: &Place| {
            self.translated.get(place).is_some_and(|held| targets.iter().any(|target| held.asked.contains(target)))
        };
        let through = self.assembled.iter().filter(|(_, assembled)| assembled.attached.places().any(uses));
        let entry = |(gateway, _): (&Key, _)| {
            let reference =
                json!({"group": GROUP, "kind": "Gateway", "namespace": gateway.namespace, "name": gateway.name});
            json!({"ancestorRef": reference, "controllerName": self.controller, "conditions": conditions})
        };
        Some(through.map(entry).collect())
    }
}

fn of_class(class: &GatewayClass) -> Value {
    let generation = class.metadata.generation;
    let accepted = match &class.spec.parameters_ref {
        None => Condition::yes("Accepted", "Accepted"),
        Some(_) => Condition::no("Accepted", "InvalidParameters", "spec.parametersRef is not served; take it out"),
    };
    let version = Condition::yes("SupportedVersion", "SupportedVersion");
    let mut names: Vec<&str> = FEATURES.into_iter().chain(MORE_FEATURES).collect();
    names.sort_unstable();
    let features: Vec<Value> = names.into_iter().map(|name| json!({"name": name})).collect();
    json!({"conditions": [accepted.json(generation), version.json(generation)], "supportedFeatures": features})
}

fn of_gateway(gateway: &Gateway, assembled: &Assembled, addresses: Option<&Vec<LoadBalancerIngress>>) -> Value {
    let generation = gateway.metadata.generation;
    let own: Vec<&Held> = assembled.listeners.iter().filter(|held| held.owner.kind == "Gateway").collect();
    let serves = assembled.listeners.iter().any(Held::serves);
    let accepted = match &assembled.not_accepted {
        Some(problem) => Condition::no("Accepted", problem.reason, problem.message.clone()),
        None if own.iter().all(|held| held.not_accepted.is_empty() && held.conflict.is_none()) => {
            Condition::yes("Accepted", "Accepted")
        }
        None if own.iter().any(|held| held.not_accepted.is_empty() && held.conflict.is_none()) => {
            // Some are served: it is accepted, and says that not all are.
            Condition {
                message: "not every listener is valid".to_owned(),
                ..Condition::yes("Accepted", "ListenersNotValid")
            }
        }
        None => Condition::no("Accepted", "ListenersNotValid", "no listener is valid"),
    };
    let given = addresses.map(Vec::as_slice).unwrap_or_default();
    let missing: Vec<&str> = gateway
        .spec
        .addresses
        .iter()
        .map(|one| one.value.as_str())
        .filter(|value| !value.is_empty() && !given.iter().any(|held| held.ip == *value))
        .collect();
    let programmed = match () {
        () if !accepted.status => Condition::no("Programmed", "Invalid", "the Gateway is not accepted"),
        () if !missing.is_empty() => {
            Condition::no("Programmed", "AddressNotUsable", format!("its Service has not got {}", missing.join(", ")))
        }
        () if given.is_empty() => Condition::no("Programmed", "AddressNotAssigned", "its Service has no address yet"),
        () if !serves => Condition::no("Programmed", "Invalid", "no listener is served"),
        () => Condition::yes("Programmed", "Programmed"),
    };
    let addresses: Vec<Value> = given
        .iter()
        .map(|one| match one.ip.is_empty() {
            true => json!({"type": "Hostname", "value": one.hostname}),
            false => json!({"type": "IPAddress", "value": one.ip}),
        })
        .collect();
    let listeners: Vec<Value> = (0..assembled.listeners.len())
        .filter(|at| assembled.listeners[*at].owner.kind == "Gateway")
        .map(|at| of_listener(assembled, at, generation))
        .collect();
    let resolved = unless("ResolvedRefs", "ResolvedRefs", &assembled.unresolved);
    let conditions = [accepted, resolved, programmed].map(|one| one.json(generation));
    let mut status = json!({
        "conditions": conditions, "addresses": addresses, "listeners": listeners,
    });
    if gateway.spec.allowed_listeners.is_some() {
        let attached = assembled.sets.iter().filter(|set| {
            let key = set.metadata.key();
            assembled
                .listeners
                .iter()
                .any(|held| held.owner.kind == "ListenerSet" && held.owner.key == key && held.serves())
        });
        status["attachedListenerSets"] = json!(attached.count());
    }
    status
}

fn of_listener(assembled: &Assembled, at: usize, generation: i64) -> Value {
    let (held, attached) = (&assembled.listeners[at], assembled.attached.count_at(at));
    let kinds: Vec<Value> = held.kinds.iter().map(|kind| json!({"group": GROUP, "kind": kind.kind()})).collect();
    let conflicts: Vec<Problem> = held.conflict.iter().cloned().collect();
    let conflicted = match &held.conflict {
        Some(problem) => {
            Condition { status: true, ..Condition::no("Conflicted", problem.reason, problem.message.clone()) }
        }
        None => Condition { status: false, ..Condition::yes("Conflicted", "NoConflicts") },
    };
    let not_accepted: Vec<Problem> = held.not_accepted.iter().cloned().chain(conflicts).collect();
    let programmed = match (held.serves(), held.waits) {
        (true, _) => Condition::yes("Programmed", "Programmed"),
        (false, true) => Condition::no("Programmed", "Pending", "its Secrets are being read"),
        (false, false) => Condition::no("Programmed", "Invalid", "see the other conditions"),
    };
    let conditions = [
        unless("Accepted", "Accepted", &not_accepted),
        conflicted,
        unless("ResolvedRefs", "ResolvedRefs", &held.unresolved),
        programmed,
    ];
    let conditions: Vec<Value> = conditions.iter().map(|one| one.json(generation)).collect();
    json!({"name": held.spec.name, "supportedKinds": kinds, "attachedRoutes": attached, "conditions": conditions})
}

fn route_conditions(translated: &Translated, result: &Result<(), Problem>, generation: i64) -> Vec<Value> {
    let accepted = match result {
        Ok(()) => Condition::yes("Accepted", "Accepted"),
        Err(problem) => Condition::no("Accepted", problem.reason, problem.message.clone()),
    };
    let mut conditions = vec![accepted, unless("ResolvedRefs", "ResolvedRefs", &translated.unresolved)];
    if let Some(problem) = &translated.partly {
        let message = format!("Dropped Rule: {}", problem.message);
        conditions.push(Condition { message, ..Condition::yes("PartiallyInvalid", problem.reason) });
    }
    conditions.iter().map(|one| one.json(generation)).collect()
}

fn parent_json(reference: &Reference) -> Value {
    let mut out = json!({"name": reference.name});
    let fields = [
        ("group", &reference.group),
        ("kind", &reference.kind),
        ("namespace", &reference.namespace),
        ("sectionName", &reference.section_name),
    ];
    for (field, value) in fields {
        if let Some(value) = value {
            out[field] = json!(value);
        }
    }
    if let Some(port) = reference.port {
        out["port"] = json!(port);
    }
    out
}

/// The status as it should be, with the times of what stays; `None`: it is so already.
fn whole(held: &Value, wanted: &Value, now: &str) -> Option<Value> {
    let mut status = wanted.clone();
    timed(&mut status["conditions"], held.get("conditions"), now);
    if let Some(listeners) = status.get_mut("listeners").and_then(Value::as_array_mut) {
        for listener in listeners {
            let before = held
                .get("listeners")
                .and_then(Value::as_array)
                .and_then(|all| all.iter().find(|one| one.get("name") == listener.get("name")));
            timed(&mut listener["conditions"], before.and_then(|one| one.get("conditions")), now);
        }
    }
    let differs = status.as_object()?.iter().any(|(field, value)| {
        let before = held.get(field);
        before != Some(value) && !(is_empty(value) && before.is_none_or(is_empty))
    });
    differs.then_some(status)
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

/// A list with our entries as they should be and everybody else's as they are; `None`: it is so already.
fn entries(held: &[Value], mut ours: Vec<Value>, reference: &str, controller: &str, now: &str) -> Option<Vec<Value>> {
    let is_ours = |entry: &&Value| entry.get("controllerName").and_then(Value::as_str) == Some(controller);
    for entry in &mut ours {
        let before = held.iter().filter(is_ours).find(|one| one.get(reference) == entry.get(reference));
        timed(&mut entry["conditions"], before.and_then(|one| one.get("conditions")), now);
    }
    if held.iter().filter(is_ours).eq(ours.iter()) {
        return None;
    }
    let mut all: Vec<Value> = held.iter().filter(|entry| !is_ours(entry)).cloned().collect();
    all.extend(ours);
    Some(all)
}

/// Gives conditions the time of their last change.
fn timed(conditions: &mut Value, held: Option<&Value>, now: &str) {
    for condition in conditions.as_array_mut().into_iter().flatten() {
        let before = held.and_then(Value::as_array).and_then(|all| {
            all.iter()
                .find(|one| one.get("type") == condition.get("type") && one.get("status") == condition.get("status"))
        });
        let time = before.and_then(|one| one.get("lastTransitionTime")).cloned();
        condition["lastTransitionTime"] = time.unwrap_or_else(|| json!(now));
    }
}
