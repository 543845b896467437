//! Ingresses: what a rule must say, in Kubernetes' words.

use super::Strategy;
use crate::auth::Identity;
use crate::registry::Registry;
use api::{Cause, ObjectExt, Status, kinds, names};
use serde_json::Value;

pub struct Ingress;
pub static INGRESS: Ingress = Ingress;

const LEGACY_CLASS: &str = "kubernetes.io/ingress.class";
const IS_DEFAULT: &str = "ingressclass.kubernetes.io/is-default-class";

/// The name decides between those of one second.
fn default_class(classes: &[Value]) -> Option<&str> {
    let defaults = classes.iter().filter(|class| class.annotation(IS_DEFAULT) == Some("true"));
    let age = |class: &&Value| {
        (class.text("/metadata/creationTimestamp").to_owned(), std::cmp::Reverse(class.name().to_owned()))
    };
    defaults.max_by_key(age).map(|class| class.name())
}

const PATH_TYPES: [&str; 3] = ["Exact", "ImplementationSpecific", "Prefix"];

impl Strategy for Ingress {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn has_generation(&self) -> bool {
        true
    }

    /// Called DefaultIngressClass in Kubernetes: an Ingress that names no class gets the default one; of several the newest.
    fn prepare_for_create(&self, registry: &Registry, _: &Identity, object: &mut Value) -> Result<(), Status> {
        if !object.text("/spec/ingressClassName").is_empty() || object.annotation(LEGACY_CLASS).is_some() {
            return Ok(());
        }
        let row = registry.row(&kinds::INGRESS_CLASSES).clone();
        let classes: Vec<Value> = registry.cache.list(&row, "").1.iter().map(|class| class.parse()).collect();
        if let (Some(name), Some(spec)) =
            (default_class(&classes), object.get_mut("spec").and_then(Value::as_object_mut))
        {
            spec.insert("ingressClassName".into(), name.into());
        }
        Ok(())
    }

    fn validate(&self, object: &Value, _: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        let rules = object.pointer("/spec/rules").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        match object.pointer("/spec/defaultBackend") {
            Some(backend) => backend_causes("spec.defaultBackend", backend, &mut causes),
            None if rules.is_empty() => {
                let why = "either `defaultBackend` or `rules` must be specified";
                causes.push(Cause::invalid("spec", "null", why));
            }
            None => {}
        }
        for (i, rule) in rules.iter().enumerate() {
            let host = rule.text("/host");
            // A wildcard stands for one label in front.
            let problems = names::dns_subdomain(host.strip_prefix("*.").unwrap_or(host));
            for problem in problems.into_iter().filter(|_| !host.is_empty()) {
                causes.push(Cause::invalid(format!("spec.rules[{i}].host"), format!("{host:?}"), problem));
            }
            let Some(http) = rule.get("http") else { continue };
            let paths = http.get("paths").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            if paths.is_empty() {
                causes.push(Cause::required(format!("spec.rules[{i}].http.paths"), ""));
            }
            for (j, path) in paths.iter().enumerate() {
                path_causes(&format!("spec.rules[{i}].http.paths[{j}]"), path, &mut causes);
            }
        }
        causes
    }
}

fn path_causes(at: &str, value: &Value, causes: &mut Vec<Cause>) {
    let (kind, path) = (value.text("/pathType"), value.text("/path"));
    if kind.is_empty() {
        causes.push(Cause::required(format!("{at}.pathType"), "pathType must be specified"));
    } else if !PATH_TYPES.contains(&kind) {
        causes.push(Cause::unsupported(format!("{at}.pathType"), kind, &PATH_TYPES));
    } else if !(path.starts_with('/') || kind == "ImplementationSpecific" && path.is_empty()) {
        causes.push(Cause::invalid(format!("{at}.path"), format!("{path:?}"), "must be an absolute path"));
    }
    match value.get("backend") {
        Some(backend) => backend_causes(&format!("{at}.backend"), backend, causes),
        None => causes.push(Cause::required(format!("{at}.backend"), "")),
    }
}

fn backend_causes(at: &str, backend: &Value, causes: &mut Vec<Cause>) {
    let (service, resource) = (backend.get("service"), backend.get("resource"));
    if service.is_some() && resource.is_some() {
        causes.push(Cause::invalid(at, "\"\"", "cannot set both resource and service backends"));
        return;
    }
    let Some(service) = service else {
        if resource.is_none() {
            causes.push(Cause::required(at, "one of service or resource backends must be specified"));
        }
        return;
    };
    let name = service.text("/name");
    if name.is_empty() {
        causes.push(Cause::required(format!("{at}.service.name"), ""));
    } else {
        for problem in names::dns_1035_label(name) {
            causes.push(Cause::invalid(format!("{at}.service.name"), format!("{name:?}"), problem));
        }
    }
    let number = service.pointer("/port/number").and_then(Value::as_i64).unwrap_or(0);
    let port = service.text("/port/name");
    match (number, port) {
        (0, "") => causes.push(Cause::required(at, "port name or number is required")),
        (0, name) => {
            for problem in names::port_name(name) {
                causes.push(Cause::invalid(format!("{at}.service.port.name"), format!("{name:?}"), problem));
            }
        }
        (_, name) if !name.is_empty() => {
            causes.push(Cause::invalid(at, "\"\"", "cannot set both port name & port number"));
        }
        (n, _) if !(1..=65535).contains(&n) => {
            let why = "must be between 1 and 65535, inclusive";
            causes.push(Cause::invalid(format!("{at}.service.port.number"), n, why));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_newest_default_class_is_meant() {
        let class = |name: &str, created: &str, is_default: &str| json!({"metadata": {"name": name, "creationTimestamp": created, "annotations": {IS_DEFAULT: is_default}}});
        let old = class("old", "2026-01-01T00:00:00Z", "true");
        let new = class("new", "2026-02-01T00:00:00Z", "true");
        let other = class("other", "2026-03-01T00:00:00Z", "false");
        let twin = class("aaa", "2026-02-01T00:00:00Z", "true");
        assert_eq!(default_class(&[old.clone(), new.clone(), other.clone()]), Some("new"));
        assert_eq!(default_class(&[old, new, twin]), Some("aaa"));
        assert_eq!(default_class(&[other]), None);
    }
}
