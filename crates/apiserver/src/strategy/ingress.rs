//! Ingresses: what a rule must say, in Kubernetes' words.

use super::Strategy;
use api::{Cause, ObjectExt, names};
use serde_json::Value;

pub struct Ingress;
pub static INGRESS: Ingress = Ingress;

const PATH_TYPES: [&str; 3] = ["Exact", "ImplementationSpecific", "Prefix"];

impl Strategy for Ingress {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn has_generation(&self) -> bool {
        true
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
