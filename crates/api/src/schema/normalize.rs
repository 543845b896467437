//! Makes a decoded body canonical: types checked, unknown fields dropped and named, zero values left out.
//!
//! The result is what a Go server would have written after decoding the same body.

use super::{Field, Message, Type};
use crate::quantity::Quantity;
use serde_json::{Map, Number, Value};

/// Why a body does not fit its kind, in the words of Go's decoder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    #[error("json: cannot unmarshal {found} into Go struct field {owner}.{path} of type {wanted}")]
    Type { found: &'static str, owner: String, path: String, wanted: String },
    #[error("{0}")]
    Value(String),
}

/// Checks `value` against `message` in place. Returns the paths of the fields that were unknown and dropped.
///
/// # Errors
/// A value of the wrong type, a quantity or time that does not parse, an integer out of range.
pub fn normalize(value: &mut Value, message: &'static Message) -> Result<Vec<String>, SchemaError> {
    let mut unknown = Vec::new();
    let Value::Object(map) = value else {
        return Err(SchemaError::Value(format!(
            "json: cannot unmarshal {} into Go value of type {}",
            found(value),
            go_name(message)
        )));
    };
    object(map, message, "", &mut unknown)?;
    Ok(unknown)
}

fn object(
    map: &mut Map<String, Value>,
    message: &'static Message,
    path: &str,
    unknown: &mut Vec<String>,
) -> Result<(), SchemaError> {
    let names: Vec<String> = map.keys().cloned().collect();
    for name in names {
        let here = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let Some(field) = message.field(&name) else {
            unknown.push(here);
            map.remove(&name);
            continue;
        };
        let Some(value) = map.get_mut(&name) else { continue };
        if value.is_null() && field.ty != Type::Raw {
            map.remove(&name);
            continue;
        }
        check(value, &field.ty, message, &here, unknown)?;
        if !field.pointer && !field.required && is_zero(value, field) {
            map.remove(&name);
        }
    }
    Ok(())
}

fn is_zero(value: &Value, field: &Field) -> bool {
    match value {
        Value::String(s) => s.is_empty() && field.ty != Type::IntOrString && field.ty != Type::Raw,
        Value::Bool(b) => !b && field.ty == Type::Bool,
        Value::Number(n) => matches!(field.ty, Type::Int32 | Type::Int64) && n.as_i64() == Some(0),
        Value::Array(items) => items.is_empty() && field.ty != Type::Raw,
        Value::Object(map) => map.is_empty() && matches!(field.ty, Type::Map(_)),
        Value::Null => false,
    }
}

fn check(
    value: &mut Value,
    ty: &Type,
    owner: &'static Message,
    path: &str,
    unknown: &mut Vec<String>,
) -> Result<(), SchemaError> {
    let wrong = |value: &Value, wanted: &str| {
        Err(SchemaError::Type {
            found: found(value),
            owner: owner.short_name().into(),
            path: without_indices(path),
            wanted: wanted.into(),
        })
    };
    match ty {
        Type::String | Type::Time | Type::MicroTime => {
            let Value::String(text) = value else { return wrong(value, "string") };
            if matches!(ty, Type::Time | Type::MicroTime) && !text.is_empty() && crate::time::parse(text).is_none() {
                return Err(SchemaError::Value(format!(
                    "parsing time \"{text}\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"{text}\" as \"2006\""
                )));
            }
        }
        Type::Int32 | Type::Int64 => {
            let wanted = if *ty == Type::Int32 { "int32" } else { "int64" };
            // Go's decoder takes 1.0 and 1e3 as integers.
            if let Some(float) = value.as_f64().filter(|f| value.as_i64().is_none() && f.fract() == 0.0) {
                *value = Value::Number(Number::from(float as i64));
            }
            let Some(number) = value.as_i64() else { return wrong(value, wanted) };
            if *ty == Type::Int32 && i32::try_from(number).is_err() {
                return wrong(value, wanted);
            }
        }
        Type::Bool if !value.is_boolean() => return wrong(value, "bool"),
        Type::Double if !value.is_number() => return wrong(value, "float64"),
        Type::Bytes => {
            let Value::String(text) = value else { return wrong(value, "[]uint8") };
            use base64::Engine;
            if base64::engine::general_purpose::STANDARD.decode(text.as_bytes()).is_err() {
                return Err(SchemaError::Value("illegal base64 data at input byte 0".into()));
            }
        }
        Type::Quantity => {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                _ => return wrong(value, "resource.Quantity"),
            };
            let quantity: Quantity = text.parse().map_err(|_| {
                SchemaError::Value(
                    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
                        .into(),
                )
            })?;
            *value = Value::String(quantity.to_string());
        }
        Type::IntOrString => match value {
            Value::String(_) => {}
            Value::Number(n) if n.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => {}
            _ => return wrong(value, "intstr.IntOrString"),
        },
        Type::Fields if !value.is_object() => return wrong(value, "v1.FieldsV1"),
        Type::Bool | Type::Double | Type::Fields | Type::Raw => {}
        Type::Message(name) => {
            let Some(inner) = super::message(name) else { return Ok(()) };
            match value {
                Value::Object(map) => object(map, inner, path, unknown)?,
                _ => return wrong(value, &go_name(inner)),
            }
        }
        Type::List(inner) => {
            let Value::Array(items) = value else { return wrong(value, &go_type(ty)) };
            for (i, item) in items.iter_mut().enumerate() {
                if item.is_null() && matches!(**inner, Type::Message(_)) {
                    *item = Value::Object(Map::new());
                }
                check(item, inner, owner, &format!("{path}[{i}]"), unknown)?;
            }
        }
        Type::Map(inner) => {
            let Value::Object(map) = value else { return wrong(value, &go_type(ty)) };
            // A null in a Go map of strings decodes to the empty string.
            for (key, item) in map.iter_mut() {
                if item.is_null() && matches!(**inner, Type::String | Type::Bytes) {
                    *item = Value::String(String::new());
                }
                // Go names no keys of maps in an error about their values; an unknown field below is named by its key.
                let here = if matches!(**inner, Type::Message(_)) { format!("{path}.{key}") } else { path.to_string() };
                check(item, inner, owner, &here, unknown)?;
            }
        }
    }
    Ok(())
}

fn found(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn go_name(message: &Message) -> String {
    let mut parts = message.name.rsplit('.');
    let (name, version) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    format!("{version}.{name}")
}

fn go_type(ty: &Type) -> String {
    match ty {
        Type::List(inner) => format!("[]{}", go_type(inner)),
        Type::Map(inner) => format!("map[string]{}", go_type(inner)),
        Type::Message(name) => super::message(name).map(go_name).unwrap_or_default(),
        Type::Int32 => "int32".into(),
        Type::Int64 => "int64".into(),
        Type::Bool => "bool".into(),
        Type::Bytes => "[]uint8".into(),
        _ => "string".into(),
    }
}

/// Go names the path of the struct fields only, without list positions.
fn without_indices(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut inside = false;
    for c in path.chars() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            _ if !inside => out.push(c),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(value: Value) -> (Value, Result<Vec<String>, SchemaError>) {
        let mut value = value;
        let result = normalize(&mut value, super::super::message("core.v1.Service").expect("Service is built in"));
        (value, result)
    }

    #[test]
    fn unknown_fields_are_named_and_dropped_and_zeros_left_out() {
        let (value, result) = service(json!({
            "metadata": {"name": "a", "creationTimestamp": null},
            "spec": {"ports": [{"port": 80, "nodePort": 0, "name": "", "what": 1}], "selector": {}},
            "status": {"loadBalancer": {}}
        }));
        assert_eq!(result, Ok(vec!["spec.ports[0].what".to_string()]));
        assert_eq!(
            value,
            json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}, "status": {"loadBalancer": {}}})
        );
    }

    #[test]
    fn a_wrong_type_speaks_as_go_does() {
        let (_, result) = service(json!({"spec": {"ports": [{"port": "x"}]}}));
        assert_eq!(
            result.map_err(|e| e.to_string()),
            Err("json: cannot unmarshal string into Go struct field ServicePort.spec.ports.port of type int32".into())
        );
    }
}
