//! What is special about a kind: defaults, checks, claims. Every method has the default that most kinds want.

mod custom;
mod ingress;
mod meta;
mod node;
mod pod;
mod service;
mod service_cidr;
mod slice;
mod workload;

pub use meta::{validate_meta, validate_meta_update};

use crate::auth::{Identity, escalation};
use crate::registry::{Claims, Registry};
use api::{Cause, ObjectExt, Status, names};
use serde_json::{Value, json};

/// How a deletion proceeds, when nothing else holds the object back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    Now,
    /// Marked now, removed by whoever ends it, at the latest expected after this many seconds.
    Graceful(i64),
}

pub trait Strategy: Send + Sync {
    /// Problems with a name of this kind.
    fn name_problems(&self, name: &str) -> Vec<String> {
        names::dns_subdomain(name)
    }

    /// Fills what a client may leave out. Pure and repeatable: runs on every write.
    fn default(&self, _object: &mut Value) {}

    /// Admission: what the cluster adds or refuses at creation.
    fn prepare_for_create(&self, _registry: &Registry, _who: &Identity, _object: &mut Value) -> Result<(), Status> {
        Ok(())
    }

    /// Rights that this write needs beyond its verb, such as those it would give away.
    fn permits(&self, _: &Registry, _: &Identity, _object: &Value, _old: Option<&Value>) -> Result<(), Status> {
        Ok(())
    }

    /// Whether a PUT of an object that is not there creates it.
    fn creates_on_update(&self) -> bool {
        false
    }

    /// Whether a PUT that names no revision is taken.
    fn updates_unseen(&self) -> bool {
        true
    }

    /// Why nobody may delete this object, if so.
    fn keeps(&self, _object: &Value) -> Option<&'static str> {
        None
    }

    /// Carries over what an update may not change silently.
    fn prepare_for_update(&self, _registry: &Registry, _object: &mut Value, _old: &Value) {}

    /// Every problem of the object; `old` is what it replaces.
    fn validate(&self, _object: &Value, _old: Option<&Value>) -> Vec<Cause> {
        Vec::new()
    }

    /// Things there is one of (addresses, ports) that the write takes or gives back. Fills them into the object.
    fn claims(&self, _registry: &Registry, _object: &mut Value, _old: Option<&Value>) -> Result<Claims, Status> {
        Ok(Claims::default())
    }

    /// What a deletion gives back.
    fn released(&self, _object: &Value) -> Vec<String> {
        Vec::new()
    }

    fn deletion(&self, _object: &Value, _requested: Option<i64>) -> Deletion {
        Deletion::Now
    }

    /// Whether a finished deletion is answered with the object as it last was, not with a Status.
    fn answers_deleted(&self) -> bool {
        false
    }

    /// Whether a change between the two counts as a new generation. Status and metadata do not.
    fn has_generation(&self) -> bool {
        false
    }
}

pub struct Plain;
pub struct Config;
pub struct Event;
pub struct Namespace;
pub struct Rbac;
pub struct Review;
pub struct Csr;
pub struct Endpoints;
pub struct Budget;
pub struct Account;

pub static PLAIN: Plain = Plain;
pub static CONFIG: Config = Config;
pub static EVENT: Event = Event;
pub static NAMESPACE: Namespace = Namespace;
pub static RBAC: Rbac = Rbac;
pub static REVIEW: Review = Review;
pub static CSR: Csr = Csr;
pub static ENDPOINTS: Endpoints = Endpoints;
pub static BUDGET: Budget = Budget;
pub static ACCOUNT: Account = Account;
pub use custom::CUSTOM;
pub use ingress::INGRESS;
pub use node::{LEASE, NODE};
pub use pod::POD;
pub use service::SERVICE;
pub use service_cidr::{IP_ADDRESS, SERVICE_CIDR};
pub use slice::SLICE;
pub use workload::{CRON_JOB, DAEMON_SET, DEPLOYMENT, JOB, REPLICA_SET, STATEFUL_SET};

impl Strategy for Plain {}
impl Strategy for Review {}

impl Strategy for Event {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn name_problems(&self, name: &str) -> Vec<String> {
        names::dns_subdomain(name)
    }
}

impl Strategy for Rbac {
    fn creates_on_update(&self) -> bool {
        true
    }

    // RBAC names may hold colons: system:node.
    fn name_problems(&self, name: &str) -> Vec<String> {
        names::path_segment(name)
    }

    fn permits(&self, registry: &Registry, who: &Identity, object: &Value, old: Option<&Value>) -> Result<(), Status> {
        escalation::check(registry, who, object, old)
    }

    fn default(&self, object: &mut Value) {
        if let Some(role) = object.get_mut("roleRef").and_then(Value::as_object_mut) {
            role.entry("apiGroup").or_insert_with(|| json!("rbac.authorization.k8s.io"));
        }
        for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
            let is_account = subject.text("/kind") == "ServiceAccount";
            if let Some(map) = subject.as_object_mut().filter(|_| !is_account) {
                map.entry("apiGroup").or_insert_with(|| json!("rbac.authorization.k8s.io"));
            }
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        if let (Some(old), Some(role)) = (old.and_then(|o| o.get("roleRef")), object.get("roleRef"))
            && old != role
        {
            causes.push(Cause::invalid("roleRef", compact(role), "cannot change roleRef"));
        }
        for (i, rule) in object.get("rules").and_then(Value::as_array).into_iter().flatten().enumerate() {
            if rule.get("verbs").and_then(Value::as_array).is_none_or(Vec::is_empty) {
                causes.push(Cause::required(format!("rules[{i}].verbs"), "verbs must contain at least one value"));
            }
        }
        causes
    }
}

impl Strategy for Config {
    fn default(&self, object: &mut Value) {
        if object.text("/kind") != "Secret" {
            return;
        }
        let Some(map) = object.as_object_mut() else { return };
        map.entry("type").or_insert_with(|| json!("Opaque"));
        if let Some(Value::Object(plain)) = map.remove("stringData") {
            use base64::Engine;
            let data = map.entry("data").or_insert_with(|| json!({}));
            for (key, value) in plain {
                let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or(""));
                if let Some(data) = data.as_object_mut() {
                    data.insert(key, json!(encoded));
                }
            }
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        let mut total = 0;
        for part in ["data", "binaryData"] {
            for (key, value) in object.get(part).and_then(Value::as_object).into_iter().flatten() {
                total += value.as_str().map_or(0, str::len);
                for problem in names::config_key(key) {
                    causes.push(Cause::invalid(format!("{part}[{key}]"), format!("{key:?}"), problem));
                }
            }
        }
        if total > 1024 * 1024 {
            causes.push(Cause::too_long("data", 1024 * 1024));
        }
        if let Some(old) = old.filter(|o| o.get("immutable") == Some(&json!(true))) {
            if object.get("immutable") != Some(&json!(true)) {
                causes.push(Cause::forbidden("immutable", "field is immutable when `immutable` is set"));
            }
            for part in ["data", "binaryData"] {
                if old.get(part) != object.get(part) {
                    causes.push(Cause::forbidden(part, "field is immutable when `immutable` is set"));
                }
            }
        }
        if let Some(old) = old
            && object.text("/kind") == "Secret"
            && old.get("type") != object.get("type")
        {
            causes.push(Cause::invalid("type", format!("{:?}", object.text("/type")), "field is immutable"));
        }
        causes
    }
}

impl Strategy for Namespace {
    fn name_problems(&self, name: &str) -> Vec<String> {
        names::dns_label(name)
    }

    fn default(&self, object: &mut Value) {
        let name = object.name().to_string();
        if name.is_empty() {
            return;
        }
        let labels = object.metadata_mut().entry("labels").or_insert_with(|| json!({}));
        if let Some(labels) = labels.as_object_mut() {
            labels.insert("kubernetes.io/metadata.name".into(), json!(name));
        }
    }

    fn keeps(&self, object: &Value) -> Option<&'static str> {
        let kept = matches!(object.name(), "default" | "kube-system" | "kube-public");
        kept.then_some("this namespace may not be deleted")
    }

    fn prepare_for_create(&self, _: &Registry, _: &Identity, object: &mut Value) -> Result<(), Status> {
        if let Some(map) = object.as_object_mut() {
            map.insert("spec".into(), json!({"finalizers": ["kubernetes"]}));
            map.insert("status".into(), json!({"phase": "Active"}));
        }
        Ok(())
    }

    fn prepare_for_update(&self, _: &Registry, object: &mut Value, old: &Value) {
        if let (Some(map), Some(spec)) = (object.as_object_mut(), old.get("spec")) {
            map.insert("spec".into(), spec.clone());
        }
    }
}

impl Strategy for Csr {
    fn prepare_for_create(&self, _: &Registry, who: &Identity, object: &mut Value) -> Result<(), Status> {
        let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return Ok(()) };
        spec.insert("username".into(), json!(who.user));
        spec.insert("groups".into(), json!(who.groups));
        if let Some(map) = object.as_object_mut() {
            map.insert("status".into(), json!({}));
        }
        Ok(())
    }

    fn prepare_for_update(&self, _: &Registry, object: &mut Value, old: &Value) {
        // The request is what was asked for; only approval and certificate follow.
        if let (Some(map), Some(spec)) = (object.as_object_mut(), old.get("spec")) {
            map.insert("spec".into(), spec.clone());
        }
    }

    fn validate(&self, object: &Value, _: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        for field in ["request", "signerName"] {
            if object.text(&format!("/spec/{field}")).is_empty() {
                causes.push(Cause::required(format!("spec.{field}"), ""));
            }
        }
        if object.pointer("/spec/usages").and_then(Value::as_array).is_none_or(Vec::is_empty) {
            causes.push(Cause::required("spec.usages", ""));
        }
        causes
    }
}

impl Strategy for Account {
    fn answers_deleted(&self) -> bool {
        true
    }
}

/// Disruption budgets: what is left of one is counted down by evictions, so nobody writes it unseen.
impl Strategy for Budget {
    fn updates_unseen(&self) -> bool {
        false
    }

    fn has_generation(&self) -> bool {
        true
    }

    fn validate(&self, object: &Value, _: Option<&Value>) -> Vec<Cause> {
        let Some(spec) = object.get("spec") else { return Vec::new() };
        if spec.get("minAvailable").is_some() && spec.get("maxUnavailable").is_some() {
            let why = "minAvailable and maxUnavailable cannot be both set";
            return vec![Cause::invalid("spec", compact(spec), why)];
        }
        Vec::new()
    }
}

impl Strategy for Endpoints {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, object: &mut Value) {
        for subset in object.get_mut("subsets").and_then(Value::as_array_mut).into_iter().flatten() {
            for port in subset.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
                set_default(port, "protocol", json!("TCP"));
            }
        }
    }

    fn validate(&self, object: &Value, _: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        for (i, subset) in object.get("subsets").and_then(Value::as_array).into_iter().flatten().enumerate() {
            for list in ["addresses", "notReadyAddresses"] {
                for (j, address) in subset.get(list).and_then(Value::as_array).into_iter().flatten().enumerate() {
                    let path = format!("subsets[{i}].{list}[{j}].ip");
                    causes.extend(slice::address_problem(path, address.text("/ip")));
                }
            }
        }
        causes
    }
}

/// Sets a field that is missing or null.
pub(crate) fn set_default(object: &mut Value, key: &str, value: Value) {
    if let Some(map) = object.as_object_mut() {
        let slot = map.entry(key).or_insert(Value::Null);
        if slot.is_null() {
            *slot = value;
        }
    }
}

/// A value as Kubernetes quotes it in an error.
pub(crate) fn compact(value: &Value) -> String {
    value.to_string()
}
