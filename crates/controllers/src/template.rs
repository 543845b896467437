//! Pod templates: pods made of them, and their hash.

use crate::expectations::safe_encoded;
use api::object::OwnerReference;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The label that tells a Deployment's ReplicaSets apart.
pub const HASH_LABEL: &str = "pod-template-hash";

/// A pod of a template, with a name of its own.
pub fn pod(template: &Value, namespace: &str, name: &str, owner: &OwnerReference) -> Value {
    let mut metadata = Map::new();
    for field in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer(&format!("/metadata/{field}")).filter(|v| !v.is_null()) {
            metadata.insert(field.into(), value.clone());
        }
    }
    metadata.insert("name".into(), json!(name));
    metadata.insert("namespace".into(), json!(namespace));
    metadata.insert("ownerReferences".into(), json!([owner]));
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": template.get("spec").cloned().unwrap_or_else(|| json!({})),
    })
}

pub fn labels(template: &Value) -> BTreeMap<String, String> {
    let labels = template.pointer("/metadata/labels").and_then(Value::as_object);
    let texts = labels.into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string())));
    texts.collect()
}

/// A template in the one form that is compared and hashed: keys sorted, no nulls, no hash label.
pub fn canonical(template: &Value) -> String {
    let mut template = template.clone();
    if let Some(labels) = template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(HASH_LABEL);
    }
    let mut out = String::new();
    render(&template, &mut out);
    out
}

fn render(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut fields: Vec<_> = map.iter().filter(|(_, v)| !v.is_null()).collect();
            fields.sort_by_key(|(name, _)| *name);
            out.push('{');
            for (name, value) in fields {
                out.push_str(&format!("{name:?}:"));
                render(value, out);
                out.push(',');
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for item in items {
                render(item, out);
                out.push(',');
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// The hash of a template, in letters and digits that spell no words. `collisions` makes a second one of the same template.
pub fn hash(template: &Value, collisions: i64) -> String {
    let mut hash = fnv(0x811c_9dc5, canonical(template).as_bytes());
    if collisions > 0 {
        hash = fnv(hash, &collisions.to_le_bytes());
    }
    safe_encoded(&hash.to_string())
}

/// FNV-1a of 32 bits.
fn fnv(start: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(start, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_sees_the_template_and_nothing_else() {
        let plain =
            json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "a", "image": "b"}]}});
        let labelled = json!({
            "spec": {"containers": [{"image": "b", "name": "a"}]},
            "metadata": {"creationTimestamp": null, "labels": {"app": "web", "pod-template-hash": "x"}},
        });
        let other =
            json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "a", "image": "c"}]}});
        assert_eq!(canonical(&plain), canonical(&labelled));
        assert_eq!(hash(&plain, 0), hash(&labelled, 0));
        assert_ne!(hash(&plain, 0), hash(&other, 0));
        assert_ne!(hash(&plain, 0), hash(&plain, 1));
        assert!(hash(&plain, 0).len() <= 10);
    }
}
