//! Prints JSON values as Go's `%v` prints them, because Kubernetes' error messages contain them so.

use serde_json::Value;

/// `map[name:web ports:[80 443]]`
pub fn print(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(items) => print_list(items),
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|a, b| a.0.cmp(b.0));
            let entries: Vec<String> = entries.into_iter().map(|(k, v)| format!("{k}:{}", print(v))).collect();
            format!("map[{}]", entries.join(" "))
        }
    }
}

/// `[80 443]`
pub fn print_list(items: &[Value]) -> String {
    let items: Vec<String> = items.iter().map(print).collect();
    format!("[{}]", items.join(" "))
}

/// The Go kind that Kubernetes' messages name when a value has the wrong one.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nil",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "slice",
        Value::Object(_) => "map",
    }
}

/// The Go type of a decoded JSON value, as `%T` prints it.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
        other => kind(other),
    }
}
