//! Defaults and checks of custom resources, by what their schema says, as an API server does it for them.

use serde_json::{Map, Value};

use super::{Message, Type};
use crate::Cause;

/// Everybody's metadata is checked by itself.
const METADATA: [&str; 2] = ["meta.v1.ObjectMeta", "meta.v1.TypeMeta"];

/// Fills fields that are absent where the schema has a default for them, and those within it. Doing so again changes nothing.
pub fn apply_defaults(value: &mut Value, message: &'static Message) {
    let Value::Object(map) = value else { return };
    for field in &message.fields {
        if let Some(default) = field.bounds.as_ref().and_then(|bounds| bounds.default.as_ref())
            && !map.contains_key(field.name)
        {
            map.insert(field.name.to_owned(), default.clone());
        }
        if let Some(value) = map.get_mut(field.name) {
            defaults_within(value, &field.ty);
        }
    }
}

fn defaults_within(value: &mut Value, ty: &Type) {
    match (ty, value) {
        (Type::Message(name), value) if !METADATA.contains(name) => {
            if let Some(message) = super::message(name) {
                apply_defaults(value, message);
            }
        }
        (Type::List(inner), Value::Array(items)) => items.iter_mut().for_each(|item| defaults_within(item, inner)),
        (Type::Map(inner), Value::Object(map)) => map.values_mut().for_each(|item| defaults_within(item, inner)),
        _ => {}
    }
}

/// What the schema does not allow: absent fields that must be there, other words, numbers and lengths out of bounds. A status
/// that nobody has written yet is allowed.
pub fn violations(value: &Value, message: &'static Message) -> Vec<Cause> {
    let mut causes = Vec::new();
    if let Value::Object(map) = value {
        check(map, message, "", &mut causes);
    }
    let is_blank = value.get("status").and_then(Value::as_object).is_some_and(Map::is_empty);
    causes.retain(|cause| !is_blank || !cause.field.starts_with("status."));
    causes
}

fn check(map: &Map<String, Value>, message: &'static Message, path: &str, causes: &mut Vec<Cause>) {
    for field in &message.fields {
        let here = if path.is_empty() { field.name.to_owned() } else { format!("{path}.{}", field.name) };
        let Some(value) = map.get(field.name) else {
            if field.required {
                causes.push(Cause::required(here, ""));
            }
            continue;
        };
        if let Some(bounds) = &field.bounds {
            let at_least = |minimum: i64| format!("{here} in body should be greater than or equal to {minimum}");
            let at_most = |maximum: i64| format!("{here} in body should be less than or equal to {maximum}");
            if let Some(number) = value.as_i64() {
                if let Some(minimum) = bounds.minimum.filter(|minimum| number < *minimum) {
                    causes.push(Cause::invalid(here.clone(), number, at_least(minimum)));
                }
                if let Some(maximum) = bounds.maximum.filter(|maximum| number > *maximum) {
                    causes.push(Cause::invalid(here.clone(), number, at_most(maximum)));
                }
            }
            if let Value::Array(items) = value {
                let count = items.len();
                if let Some(least) = bounds.min_items.filter(|least| count < *least) {
                    let detail = format!("{here} in body should have at least {least} items");
                    causes.push(Cause::invalid(here.clone(), count, detail));
                }
                if let Some(most) = bounds.max_items.filter(|most| count > *most) {
                    causes.push(Cause::invalid(here.clone(), count, format!("must have at most {most} items")));
                }
            }
            let words = value.as_str().filter(|_| !bounds.words.is_empty());
            if let Some(word) = words.filter(|word| !bounds.words.contains(word)) {
                causes.push(Cause::unsupported(here.clone(), word, &bounds.words));
            }
        }
        check_within(value, &field.ty, &here, causes);
    }
}

fn check_within(value: &Value, ty: &Type, path: &str, causes: &mut Vec<Cause>) {
    match (ty, value) {
        (Type::Message(name), Value::Object(map)) if !METADATA.contains(name) => {
            if let Some(message) = super::message(name) {
                check(map, message, path, causes);
            }
        }
        (Type::List(inner), Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                check_within(item, inner, &format!("{path}[{index}]"), causes);
            }
        }
        (Type::Map(inner), Value::Object(map)) => {
            for (key, item) in map {
                check_within(item, inner, &format!("{path}[{key}]"), causes);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn route() -> &'static Message {
        super::super::for_kind("gateway.networking.k8s.io", "v1", "HTTPRoute").expect("it has a schema")
    }

    #[test]
    fn defaults_reach_into_what_is_there() {
        let mut value = json!({"spec": {
            "parentRefs": [{"name": "edge"}],
            "rules": [{"backendRefs": [{"name": "web", "port": 80}]}, {"matches": [{"path": {"value": "/a"}}]}],
        }});
        apply_defaults(&mut value, route());
        assert_eq!(
            value["spec"]["parentRefs"][0],
            json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"})
        );
        assert_eq!(
            value["spec"]["rules"][0],
            json!({
                "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                "backendRefs": [{"group": "", "kind": "Service", "name": "web", "port": 80, "weight": 1}],
            })
        );
        assert_eq!(value["spec"]["rules"][1]["matches"], json!([{"path": {"type": "PathPrefix", "value": "/a"}}]));
        let once = value.clone();
        apply_defaults(&mut value, route());
        assert_eq!(value, once);
    }

    #[test]
    fn what_the_schema_forbids_is_named() {
        let value = json!({"metadata": {}, "spec": {
            "rules": [{
                "matches": [{"path": {"type": "Glob", "value": "/"}, "headers": [{"type": "Exact", "value": "x"}]}],
                "backendRefs": [{"name": "web", "port": 70_000}],
            }],
        }});
        let told: Vec<String> =
            violations(&value, route()).iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
        assert_eq!(
            told,
            [
                "spec.rules[0].matches[0].path.type: Unsupported value: \"Glob\": supported values: \"Exact\", \"PathPrefix\", \"RegularExpression\"",
                "spec.rules[0].matches[0].headers[0].name: Required value",
                "spec.rules[0].backendRefs[0].port: Invalid value: 70000: spec.rules[0].backendRefs[0].port in body should be less than or equal to 65535",
            ]
        );
    }
}
