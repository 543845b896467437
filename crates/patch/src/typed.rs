//! Walks over values with their shape: which fields a configuration sets, merging it in, and taking fields out.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::sets::{Element, FieldSet, print_path};
use crate::shape::Shape;

/// The set of fields that an applied configuration names, and with that claims.
///
/// The error is a path and a problem: unknown fields, elements without their key, duplicates.
pub fn fields_of(config: &Value, shape: Shape) -> Result<FieldSet, String> {
    let mut set = FieldSet::default();
    collect(config, shape, &mut Vec::new(), &mut set)?;
    Ok(set)
}

fn collect(value: &Value, shape: Shape, path: &mut Vec<Element>, set: &mut FieldSet) -> Result<(), String> {
    match (shape, value) {
        (Shape::Struct(_) | Shape::Map(_) | Shape::Unknown, Value::Object(map)) => {
            for (name, item) in map {
                path.push(Element::field(name));
                let below = match shape.field(name) {
                    Some(below) => below,
                    // The type of an object is part of no struct, but of every object.
                    None if path.len() == 1 && (name == "apiVersion" || name == "kind") => Shape::Leaf,
                    None => return Err(format!("{}: field not declared in schema", print_path(path))),
                };
                collect(item, below, path, set)?;
                if is_hollow(item) || !shape.declares(name) {
                    set.insert(path);
                }
                path.pop();
            }
            Ok(())
        }
        (Shape::Set | Shape::Keyed { .. }, Value::Array(items)) => {
            let mut seen = BTreeSet::new();
            for (index, item) in items.iter().enumerate() {
                let element = shape
                    .list_element(item)
                    .map_err(|problem| format!("{}: element {index}: {problem}", print_path(path)))?;
                path.push(element.clone());
                if !seen.insert(element) {
                    let text = print_path(path);
                    path.pop();
                    let entry = &text[print_path(path).len()..];
                    return Err(format!("{}: duplicate entries for key {entry}", print_path(path)));
                }
                collect(item, shape.element(), path, set)?;
                set.insert(path);
                path.pop();
            }
            Ok(())
        }
        (_, Value::Null) | (Shape::Leaf | Shape::Unknown, _) => {
            set.insert(path);
            Ok(())
        }
        (Shape::Struct(_) | Shape::Map(_), other) => {
            Err(format!("{}: expected map, got {}", print_path(path), describe(other)))
        }
        (Shape::Set | Shape::Keyed { .. }, other) => {
            Err(format!("{}: expected list, got {}", print_path(path), describe(other)))
        }
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Object(_) => "map".to_owned(),
        Value::Array(_) => "list".to_owned(),
        scalar => format!("&{{{}}}", scalar.to_string().trim_matches('"')),
    }
}

/// Null, `{}` and `[]`: nothing below, so the value itself is what is claimed.
fn is_hollow(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// `live` with everything that `config` says; what `config` does not mention stays.
pub fn merge(live: &Value, config: &Value, shape: Shape) -> Value {
    match (shape, live, config) {
        (Shape::Struct(_) | Shape::Map(_) | Shape::Unknown, Value::Object(live), Value::Object(config)) => {
            let mut merged = live.clone();
            for (name, item) in config {
                if item.is_null() {
                    merged.remove(name);
                    continue;
                }
                let below = shape.field(name).unwrap_or(Shape::Unknown);
                let value = match live.get(name) {
                    Some(before) => merge(before, item, below),
                    None => without_nulls(item, below),
                };
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Shape::Set | Shape::Keyed { .. }, Value::Array(live), Value::Array(config)) => {
            Value::Array(merge_list(live, config, shape))
        }
        (_, _, config) => without_nulls(config, shape),
    }
}

/// A configuration's null says "no value"; only atomic content keeps its nulls.
fn without_nulls(value: &Value, shape: Shape) -> Value {
    match (shape, value) {
        (Shape::Leaf, _) => value.clone(),
        (_, Value::Object(map)) => {
            let kept = map.iter().filter(|(_, item)| !item.is_null());
            Value::Object(
                kept.map(|(name, item)| {
                    (name.clone(), without_nulls(item, shape.field(name).unwrap_or(Shape::Unknown)))
                })
                .collect(),
            )
        }
        (Shape::Set | Shape::Keyed { .. }, Value::Array(items)) => {
            Value::Array(items.iter().map(|item| without_nulls(item, shape.element())).collect())
        }
        _ => value.clone(),
    }
}

/// Merges two lists by element. The configuration's order wins among what it names; the live list's other elements
/// keep their place in front of what followed them.
fn merge_list(live: &[Value], config: &[Value], shape: Shape) -> Vec<Value> {
    let elements =
        |items: &[Value]| -> Option<Vec<Element>> { items.iter().map(|item| shape.list_element(item).ok()).collect() };
    // A stored list whose elements have no keys cannot be merged into: the configuration replaces it.
    let (Some(live_elements), Some(config_elements)) = (elements(live), elements(config)) else {
        return config.to_vec();
    };
    let in_config: BTreeSet<&Element> = config_elements.iter().collect();
    let mut live_values: BTreeMap<&Element, &Value> = BTreeMap::new();
    for (element, value) in live_elements.iter().zip(live) {
        live_values.entry(element).or_insert(value);
    }
    // Shared elements in the configuration's order: a live one that is not next in this order is passed over, and
    // written where the configuration has it.
    let mut shared = config_elements.iter().filter(|element| live_values.contains_key(element)).peekable();
    let mut merged = Vec::with_capacity(live.len() + config.len());
    let mut done: BTreeSet<&Element> = BTreeSet::new();
    let (mut left, mut right) = (0, 0);
    while left < live.len() || right < config.len() {
        if left < live.len() && right < config.len() && live_elements[left] == config_elements[right] {
            merged.push(merge(&live[left], &config[right], shape.element()));
            done.insert(&config_elements[right]);
            left += 1;
            right += 1;
            shared.next();
            continue;
        }
        if left < live.len() {
            let element = &live_elements[left];
            if !in_config.contains(element) {
                merged.push(live[left].clone());
                left += 1;
                continue;
            }
            if done.contains(element) || shared.peek().is_some_and(|next| *next != element) {
                left += 1;
                continue;
            }
        }
        let Some(element) = config_elements.get(right) else {
            left += 1;
            continue;
        };
        merged.push(match live_values.get(element) {
            Some(before) => merge(before, &config[right], shape.element()),
            None => without_nulls(&config[right], shape.element()),
        });
        done.insert(element);
        if shared.peek() == Some(&element) {
            shared.next();
        }
        right += 1;
    }
    merged
}

/// Takes every member of `removed` out of `value`, with all below it. `None` when nothing is left of a map or list.
pub fn remove(value: &Value, shape: Shape, removed: &FieldSet) -> Option<Value> {
    match (shape, value) {
        (Shape::Struct(_) | Shape::Map(_) | Shape::Unknown, Value::Object(map)) => {
            let mut kept = Map::new();
            for (name, item) in map {
                let item = match removed.child(&Element::field(name)) {
                    Some(node) if node.is_member() => None,
                    Some(node) => remove(item, shape.field(name).unwrap_or(Shape::Unknown), node),
                    None => Some(item.clone()),
                };
                kept.extend(item.map(|item| (name.clone(), item)));
            }
            (!kept.is_empty() || map.is_empty()).then_some(Value::Object(kept))
        }
        (Shape::Set | Shape::Keyed { .. }, Value::Array(items)) => {
            let kept: Vec<Value> = items
                .iter()
                .filter_map(|item| {
                    let node = shape.list_element(item).ok().and_then(|element| removed.child(&element));
                    match node {
                        Some(node) if node.is_member() => None,
                        Some(node) => remove(item, shape.element(), node),
                        None => Some(item.clone()),
                    }
                })
                .collect();
            (!kept.is_empty() || items.is_empty()).then_some(Value::Array(kept))
        }
        _ => Some(value.clone()),
    }
}
