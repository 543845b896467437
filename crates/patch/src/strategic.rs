//! Strategic merge patch: a merge patch that knows from the schema which lists merge, by which key.
//!
//! Directives in the patch: `$patch: replace|delete|merge` in a map or a list element, `$retainKeys: [..]`,
//! `$deleteFromPrimitiveList/FIELD: [..]` and `$setElementOrder/FIELD: [..]`.

use api::schema::{Field, Message};
use serde_json::{Map, Value};

use crate::error::PatchError;
use crate::go;

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_LIST: &str = "$deleteFromPrimitiveList";
const SET_ORDER: &str = "$setElementOrder";

type Object = Map<String, Value>;

/// Applies `patch` to `document`, an object of type `schema`.
///
/// Without a schema (custom resources) no list has a merge key: callers refuse the patch type before they come here.
pub fn strategic_merge_patch(document: &Value, patch: &Value, schema: &'static Message) -> Result<Value, PatchError> {
    let (Value::Object(original), Value::Object(patch)) = (document, patch) else {
        return Err(PatchError::Malformed("invalid JSON document".to_owned()));
    };
    merge_map(original.clone(), patch.clone(), Lookup::Struct(schema)).map(Value::Object)
}

/// What is known of a map's fields.
#[derive(Clone, Copy)]
enum Lookup {
    /// A typed struct.
    Struct(&'static Message),
    /// A map whose values have this message, or none.
    Values(Option<&'static Message>),
    /// Free-form content.
    Unknown,
}

/// How one field's list merges.
struct ListRule {
    merges: bool,
    merge_key: Option<&'static str>,
    element: Lookup,
}

impl Lookup {
    fn field(self, name: &str) -> Result<Option<&'static Field>, PatchError> {
        let Lookup::Struct(message) = self else { return Ok(None) };
        message.field(name).map(Some).ok_or_else(|| {
            PatchError::DoesNotApply(format!(
                "unable to find api field in struct {} for the json field {name:?}",
                message.short_name()
            ))
        })
    }

    fn for_map(self, name: &str) -> Result<Lookup, PatchError> {
        Ok(match self {
            Lookup::Values(Some(message)) => Lookup::Struct(message),
            Lookup::Values(None) | Lookup::Unknown => Lookup::Unknown,
            Lookup::Struct(_) => match self.field(name)? {
                Some(field) if matches!(field.ty, api::schema::Type::Map(_)) => Lookup::Values(field.ty.message()),
                Some(field) => field.ty.message().map_or(Lookup::Unknown, Lookup::Struct),
                None => Lookup::Unknown,
            },
        })
    }

    fn for_list(self, name: &str) -> Result<ListRule, PatchError> {
        Ok(match self.field(name)? {
            Some(field) => ListRule {
                merges: field.patch_merge,
                merge_key: field.merge_key,
                element: field.ty.message().map_or(Lookup::Unknown, Lookup::Struct),
            },
            None => ListRule { merges: false, merge_key: None, element: Lookup::Unknown },
        })
    }
}

fn merge_map(mut original: Object, mut patch: Object, lookup: Lookup) -> Result<Object, PatchError> {
    if let Some(directive) = patch.remove(DIRECTIVE) {
        return match directive.as_str() {
            Some("replace") => Ok(without_directives(patch)),
            Some("delete") => Ok(Object::new()),
            // Merging is what happens anyway.
            Some("merge") => merge_map(original, patch, lookup),
            _ => Err(unknown_directive(&directive, &patch)),
        };
    }
    retain_keys(&mut original, &mut patch)?;
    merge_ordered_lists(&mut original, &mut patch, lookup)?;

    for (name, patch_value) in patch {
        if let Some(list) = directive_target(&name, DELETE_FROM_LIST)
            .map_err(|()| PatchError::DoesNotApply("invalid patch format of primitive list".to_owned()))?
        {
            delete_from_list(&mut original, list, &patch_value)?;
            continue;
        }
        if patch_value.is_null() {
            original.remove(&name);
            continue;
        }
        let merged = match (original.remove(&name), patch_value) {
            (Some(Value::Object(before)), Value::Object(patch)) => {
                Value::Object(merge_map(before, patch, lookup.for_map(&name)?)?)
            }
            (Some(Value::Array(before)), Value::Array(patch)) => {
                let rule = lookup.for_list(&name)?;
                Value::Array(merge_list(before, patch, &rule, &name)?)
            }
            (_, patch) => drop_directives(patch),
        };
        original.insert(name, merged);
    }
    Ok(original)
}

/// `$retainKeys` clears every field that it does not list; the patch may set only listed fields.
fn retain_keys(original: &mut Object, patch: &mut Object) -> Result<(), PatchError> {
    let Some(listed) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let malformed = || PatchError::DoesNotApply("invalid patch format of retainKeys".to_owned());
    let listed: Vec<&str> =
        listed.as_array().and_then(|items| items.iter().map(Value::as_str).collect()).ok_or_else(malformed)?;
    let unlisted = |name: &str, value: &Value| {
        !value.is_null()
            && !name.starts_with(DELETE_FROM_LIST)
            && !name.starts_with(SET_ORDER)
            && !listed.contains(&name)
    };
    if patch.iter().any(|(name, value)| unlisted(name, value)) {
        return Err(malformed());
    }
    original.retain(|name, _| listed.contains(&name.as_str()));
    Ok(())
}

/// Merges every list that comes with a `$setElementOrder`, and takes both out of the patch.
fn merge_ordered_lists(original: &mut Object, patch: &mut Object, lookup: Lookup) -> Result<(), PatchError> {
    let mut directives: Vec<String> = patch.keys().filter(|name| name.starts_with(SET_ORDER)).cloned().collect();
    directives.sort();
    for directive in directives {
        let name = directive_target(&directive, SET_ORDER)
            .map_err(|()| PatchError::DoesNotApply("invalid patch format of setElementOrder list".to_owned()))?
            .unwrap_or_default()
            .to_owned();
        let Some(order) = patch.remove(&directive) else { continue };
        let order = expect_list(order)?;
        let rule = lookup.for_list(&name)?;
        let before = original.get(&name).filter(|value| !value.is_null()).cloned().map(expect_list).transpose()?;
        let patch_list = match patch.remove(&name) {
            // An explicit null deletes the list: there is nothing left to order.
            Some(Value::Null) => {
                original.remove(&name);
                continue;
            }
            other => other.map(expect_list).transpose()?,
        };
        check_order(patch_list.as_deref(), &order, rule.merge_key)?;
        let merged = match (&before, patch_list) {
            (None, None) => continue,
            (Some(before), None) => before.clone(),
            (None, Some(patch)) => drop_directives_in_list(patch),
            (Some(before), Some(patch)) => merge_list(before.clone(), patch, &rule, &name)?,
        };
        let server_order = before.unwrap_or_default();
        original.insert(name, Value::Array(put_in_order(merged, &order, &server_order, rule.merge_key)?));
    }
    Ok(())
}

/// The elements of a patch list must stand in the order that its `$setElementOrder` announces.
fn check_order(patch: Option<&[Value]>, order: &[Value], merge_key: Option<&str>) -> Result<(), PatchError> {
    let Some(patch) = patch else { return Ok(()) };
    let mut remaining = order.iter();
    for item in patch.iter().filter(|item| item.get(DIRECTIVE).is_none()) {
        let found = remaining.any(|candidate| same_element(candidate, item, merge_key));
        if !found {
            return Err(PatchError::DoesNotApply(format!(
                "The order in patch list:\n{}\n doesn't match {SET_ORDER} list:\n{}\n",
                go::print_list(patch),
                go::print_list(order)
            )));
        }
    }
    Ok(())
}

fn delete_from_list(original: &mut Object, list: &str, deleted: &Value) -> Result<(), PatchError> {
    let Value::Array(deleted) = deleted else {
        return Err(PatchError::DoesNotApply("invalid patch format of primitive list".to_owned()));
    };
    if let Some(Value::Array(items)) = original.get_mut(list) {
        items.retain(|item| !deleted.contains(item));
    }
    Ok(())
}

fn merge_list(original: Vec<Value>, patch: Vec<Value>, rule: &ListRule, name: &str) -> Result<Vec<Value>, PatchError> {
    if !rule.merges {
        return Ok(drop_directives_in_list(patch));
    }
    if original.is_empty() && patch.is_empty() {
        return Ok(original);
    }
    if element_kind(&original, &patch)? != "map" {
        let mut merged: Vec<Value> = Vec::with_capacity(original.len() + patch.len());
        for item in original.iter().chain(&patch) {
            if !merged.contains(item) {
                merged.push(item.clone());
            }
        }
        return put_in_order(merged, &patch, &original, None);
    }
    let Some(key) = rule.merge_key else {
        return Err(PatchError::DoesNotApply(format!("cannot merge lists without merge key for {name}")));
    };
    let (original, patch) = take_directive_elements(original, patch, key)?;
    let mut merged = original.clone();
    for item in &patch {
        let Value::Object(item) = item else { continue };
        let value = item.get(key).ok_or_else(|| no_merge_key(item, key))?;
        match merged.iter_mut().find(|candidate| candidate.get(key) == Some(value)) {
            Some(Value::Object(before)) => *before = merge_map(std::mem::take(before), item.clone(), rule.element)?,
            _ => merged.push(drop_directives(Value::Object(item.clone()))),
        }
    }
    put_in_order(merged, &patch, &original, Some(key))
}

/// Acts on the `$patch` elements of a list: returns the original list without deleted elements, and the rest of the
/// patch. After a `$patch: replace` the patch's other elements are the whole list.
fn take_directive_elements(
    mut original: Vec<Value>,
    patch: Vec<Value>,
    key: &str,
) -> Result<(Vec<Value>, Vec<Value>), PatchError> {
    let mut plain = Vec::with_capacity(patch.len());
    let mut replaces = false;
    for item in patch {
        let Some(directive) = item.get(DIRECTIVE) else {
            plain.push(item);
            continue;
        };
        let fields = item.as_object().cloned().unwrap_or_default();
        match directive.as_str() {
            Some("delete") => {
                let value = fields.get(key).ok_or_else(|| no_merge_key(&fields, key))?;
                original.retain(|candidate| candidate.get(key) != Some(value));
            }
            Some("replace") => replaces = true,
            Some("merge") => {
                return Err(PatchError::DoesNotApply("merging lists cannot yet be specified in the patch".to_owned()));
            }
            _ => return Err(unknown_directive(directive, &fields)),
        }
    }
    if replaces { Ok((drop_directives_in_list(plain), Vec::new())) } else { Ok((original, plain)) }
}

/// Orders a merged list. Elements that `patch_order` names stand in its order, the others in the server's; where the
/// server knows both of two neighbours its order decides, otherwise the patch's element goes first.
fn put_in_order(
    merged: Vec<Value>,
    patch_order: &[Value],
    server_order: &[Value],
    merge_key: Option<&str>,
) -> Result<Vec<Value>, PatchError> {
    if let Some(key) = merge_key {
        for item in merged.iter().chain(patch_order).chain(server_order) {
            match item {
                Value::Object(fields) if !fields.contains_key(key) => return Err(no_merge_key(fields, key)),
                Value::Object(_) => {}
                other => {
                    return Err(PatchError::DoesNotApply(format!(
                        "expected a map, but received a {}",
                        go::kind(other)
                    )));
                }
            }
        }
    }
    let index_in = |order: &[Value], item: &Value| order.iter().position(|other| same_element(other, item, merge_key));
    let (mut ours, mut servers): (Vec<Value>, Vec<Value>) =
        merged.into_iter().partition(|item| index_in(patch_order, item).is_some());
    ours.sort_by_key(|item| index_in(patch_order, item));
    servers.sort_by_key(|item| index_in(server_order, item).unwrap_or(usize::MAX));

    let mut ordered = Vec::with_capacity(ours.len() + servers.len());
    let (mut ours, mut servers) = (ours.into_iter().peekable(), servers.into_iter().peekable());
    while let (Some(server), Some(our)) = (servers.peek(), ours.peek()) {
        let server_first = match (index_in(server_order, server), index_in(server_order, our)) {
            (Some(left), Some(right)) => left < right,
            _ => false,
        };
        ordered.extend(if server_first { servers.next() } else { ours.next() });
    }
    ordered.extend(ours);
    ordered.extend(servers);
    Ok(ordered)
}

fn same_element(left: &Value, right: &Value, merge_key: Option<&str>) -> bool {
    match merge_key {
        Some(key) => left.get(key).is_some() && left.get(key) == right.get(key),
        None => left == right,
    }
}

/// The one kind that all elements of both lists have.
fn element_kind(original: &[Value], patch: &[Value]) -> Result<&'static str, PatchError> {
    let mut kinds = original.iter().chain(patch).map(go::kind);
    let first = kinds.next().unwrap_or("map");
    if first == "slice" {
        return Err(PatchError::DoesNotApply("lists of lists are not supported".to_owned()));
    }
    if kinds.any(|kind| kind != first) {
        let all: Vec<Value> = original.iter().chain(patch).cloned().collect();
        return Err(PatchError::DoesNotApply(format!(
            "list element types are not identical: {}",
            go::print_list(&all)
        )));
    }
    Ok(first)
}

/// The field that `PREFIX/FIELD` speaks of; `Err` when the slash or the field is missing.
fn directive_target<'a>(name: &'a str, prefix: &str) -> Result<Option<&'a str>, ()> {
    let Some(rest) = name.strip_prefix(prefix) else { return Ok(None) };
    match rest.strip_prefix('/') {
        Some(field) if !field.is_empty() => Ok(Some(field)),
        _ => Err(()),
    }
}

/// What a patch leaves where the original has nothing: no directives, no nulls, no deleted elements.
fn drop_directives(value: Value) -> Value {
    match value {
        Value::Object(map) if map.get(DIRECTIVE).and_then(Value::as_str) == Some("delete") => {
            Value::Object(Object::new())
        }
        Value::Object(map) => Value::Object(without_directives(map)),
        Value::Array(items) => Value::Array(drop_directives_in_list(items)),
        scalar => scalar,
    }
}

fn without_directives(map: Object) -> Object {
    let is_directive = |name: &str| {
        name == DIRECTIVE || name == RETAIN_KEYS || name.starts_with(DELETE_FROM_LIST) || name.starts_with(SET_ORDER)
    };
    map.into_iter()
        .filter(|(name, value)| !is_directive(name) && !value.is_null())
        .map(|(name, value)| (name, drop_directives(value)))
        .collect()
}

fn drop_directives_in_list(items: Vec<Value>) -> Vec<Value> {
    let is_directive = |item: &Value| match item.get(DIRECTIVE).and_then(Value::as_str) {
        Some("delete") => true,
        // `- $patch: replace` alone is the list's directive; with fields beside it, it is an element.
        Some(_) => item.as_object().is_some_and(|fields| fields.len() == 1),
        None => false,
    };
    items.into_iter().filter(|item| !is_directive(item)).map(drop_directives).collect()
}

fn expect_list(value: Value) -> Result<Vec<Value>, PatchError> {
    match value {
        Value::Array(items) => Ok(items),
        other => Err(PatchError::DoesNotApply(format!(
            "expected a []interface {{}}, but received a {}",
            go::type_name(&other)
        ))),
    }
}

fn no_merge_key(fields: &Object, key: &str) -> PatchError {
    let map = go::print(&Value::Object(fields.clone()));
    PatchError::DoesNotApply(format!("map: {map} does not contain declared merge key: {key}"))
}

fn unknown_directive(directive: &Value, fields: &Object) -> PatchError {
    let mut fields = fields.clone();
    fields.insert(DIRECTIVE.to_owned(), directive.clone());
    PatchError::DoesNotApply(format!(
        "unknown patch type: {} in map: {}",
        go::print(directive),
        go::print(&Value::Object(fields))
    ))
}
