//! Checks of `metadata` that hold for every kind.

use api::{Cause, ObjectExt, names};
use serde_json::Value;

/// Problems of an object's metadata; `name_problems` is the kind's own rule.
pub fn validate_meta(object: &Value, namespaced: bool, name_problems: impl Fn(&str) -> Vec<String>) -> Vec<Cause> {
    let mut causes = Vec::new();
    let (name, generate) = (object.name(), object.text("/metadata/generateName"));
    if !generate.is_empty() {
        // The server appends to it, so an open end is fine.
        let probe = format!("{}x", generate.trim_end_matches(['-', '.']));
        for problem in name_problems(&probe) {
            causes.push(Cause::invalid("metadata.generateName", format!("{generate:?}"), problem));
        }
    }
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else {
        for problem in name_problems(name) {
            causes.push(Cause::invalid("metadata.name", format!("{name:?}"), problem));
        }
    }
    if namespaced {
        if object.namespace().is_empty() {
            causes.push(Cause::required("metadata.namespace", ""));
        } else {
            for problem in names::dns_label(object.namespace()) {
                causes.push(Cause::invalid("metadata.namespace", format!("{:?}", object.namespace()), problem));
            }
        }
    } else if !object.namespace().is_empty() {
        causes.push(Cause::forbidden("metadata.namespace", "not allowed on this type"));
    }
    causes.extend(labels("metadata.labels", object.pointer("/metadata/labels")));
    let mut total = 0;
    for (key, value) in object.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten() {
        total += key.len() + value.as_str().map_or(0, str::len);
        for problem in names::qualified_name(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", format!("{key:?}"), problem));
        }
    }
    if total > 256 * 1024 {
        causes.push(Cause::too_long("metadata.annotations", 256 * 1024));
    }
    for (i, owner) in
        object.pointer("/metadata/ownerReferences").and_then(Value::as_array).into_iter().flatten().enumerate()
    {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner.text(&format!("/{field}")).is_empty() {
                causes.push(Cause::invalid(
                    format!("metadata.ownerReferences[{i}].{field}"),
                    "\"\"",
                    format!("{} must not be empty", if field == "apiVersion" { "version" } else { field }),
                ));
            }
        }
    }
    for finalizer in object.finalizers() {
        for problem in names::qualified_name(finalizer) {
            causes.push(Cause::invalid("metadata.finalizers", format!("{finalizer:?}"), problem));
        }
    }
    causes
}

/// Problems of a map of labels.
pub fn labels(path: &str, map: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    for (key, value) in map.and_then(Value::as_object).into_iter().flatten() {
        for problem in names::qualified_name(key) {
            causes.push(Cause::invalid(path, format!("{key:?}"), problem));
        }
        let value = value.as_str().unwrap_or("");
        for problem in names::label_value(value) {
            causes.push(Cause::invalid(path, format!("{value:?}"), problem));
        }
    }
    causes
}

/// What an update may not change in metadata.
pub fn validate_meta_update(object: &Value, old: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if object.is_deleting() {
        for finalizer in object.finalizers() {
            if !old.finalizers().contains(&finalizer) && old.is_deleting() {
                causes.push(Cause::forbidden(
                    "metadata.finalizers",
                    format!("no new finalizers can be added if the object is being deleted, found new finalizers []string{{{finalizer:?}}}"),
                ));
            }
        }
    }
    causes
}
