//! JSON patch (RFC 6902) with Kubernetes' limits and error words.

use ::json_patch::{Patch, PatchOperation, patch_unsafe};
use serde_json::Value;

use crate::error::PatchError;

/// Kubernetes' bound on the operations of one patch.
const MAX_OPERATIONS: usize = 10_000;
/// A copy may double the document, so ten of them make a thousand of one: bound the sum, as Kubernetes does.
const MAX_COPIED_BYTES: usize = 3 * 1024 * 1024;
/// Deeper documents than a parsed body can be come only from adding below additions; they would exhaust the stack.
const MAX_DEPTH: usize = 256;

/// Applies `patch`, a JSON array of operations, to `document`. On an error nothing of it is applied.
pub fn json_patch(document: &Value, patch: &Value) -> Result<Value, PatchError> {
    let operations = parse(patch)?;
    let mut document = document.clone();
    let mut copied_bytes = 0;
    let mut depth = depth_of(&document);
    for operation in &operations {
        if let PatchOperation::Copy(copy) = operation {
            copied_bytes += document.pointer(copy.from.as_str()).map_or(0, size_of);
            if copied_bytes > MAX_COPIED_BYTES {
                return Err(PatchError::TooLarge(format!(
                    "Unable to complete the copy, the accumulated size increase of copy is {copied_bytes}, exceeding the limit {MAX_COPIED_BYTES}"
                )));
            }
        }
        let reason = explain(&document, operation);
        patch_unsafe(&mut document, std::slice::from_ref(operation))
            .map_err(|failure| PatchError::DoesNotApply(reason.unwrap_or_else(|| failure.to_string())))?;
        depth = depth.max(deepest_after(operation, depth));
        if depth > MAX_DEPTH {
            // The estimate only grows; the document may be flatter than it says.
            depth = depth_of(&document);
            if depth > MAX_DEPTH {
                return Err(PatchError::TooLarge(format!(
                    "the patched object is nested deeper than {MAX_DEPTH} levels"
                )));
            }
        }
    }
    Ok(document)
}

fn parse(patch: &Value) -> Result<Vec<PatchOperation>, PatchError> {
    let Value::Array(items) = patch else {
        return Err(PatchError::Malformed(format!(
            "json: cannot unmarshal {} into Go value of type jsonpatch.Patch",
            json_kind(patch)
        )));
    };
    if items.len() > MAX_OPERATIONS {
        return Err(PatchError::TooLarge(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            items.len()
        )));
    }
    items.iter().map(parse_operation).collect()
}

fn parse_operation(item: &Value) -> Result<PatchOperation, PatchError> {
    if !item.is_object() {
        return Err(PatchError::Malformed(format!(
            "json: cannot unmarshal {} into Go value of type jsonpatch.Operation",
            json_kind(item)
        )));
    }
    let name = item.get("op").and_then(Value::as_str).unwrap_or("unknown");
    if !["add", "remove", "replace", "move", "copy", "test"].contains(&name) {
        return Err(PatchError::DoesNotApply(format!("Unexpected kind: {name}")));
    }
    serde_json::from_value::<Patch>(Value::Array(vec![item.clone()]))
        .ok()
        .and_then(|mut patch| patch.0.pop())
        .ok_or_else(|| PatchError::Malformed(format!("invalid operation {item}: {name} {}", needs(name))))
}

fn needs(operation: &str) -> &'static str {
    match operation {
        "remove" => "needs a path that starts with /",
        "move" | "copy" => "needs from and path, each starting with /",
        _ => "needs a path that starts with / and a value",
    }
}

/// Why `operation` cannot apply to `document`, in the words of the Go library that Kubernetes uses.
/// `None` when it can, or when the library's own sentence has to do.
fn explain(document: &Value, operation: &PatchOperation) -> Option<String> {
    let path = operation.path().as_str();
    let parent_missing = |path: &str| match path.rsplit_once('/') {
        Some((parent, _)) => document.pointer(parent).is_none_or(|value| !value.is_object() && !value.is_array()),
        None => false,
    };
    let key = path.rsplit_once('/').map_or("", |(_, key)| key);
    let missing = |what: String| Some(format!("{what}: missing value"));
    match operation {
        PatchOperation::Add(_) if parent_missing(path) => {
            missing(format!("add operation does not apply: doc is missing path: \"{path}\""))
        }
        PatchOperation::Remove(_) if parent_missing(path) => {
            missing(format!("remove operation does not apply: doc is missing path: \"{path}\""))
        }
        PatchOperation::Remove(_) if document.pointer(path).is_none() => {
            missing(format!("error in remove for path: '{path}': unable to remove nonexistent key: {key}"))
        }
        PatchOperation::Replace(_) if parent_missing(path) => {
            missing(format!("replace operation does not apply: doc is missing path: {path}"))
        }
        PatchOperation::Replace(_) if document.pointer(path).is_none() => {
            missing(format!("replace operation does not apply: doc is missing key: {path}"))
        }
        PatchOperation::Move(moved) if document.pointer(moved.from.as_str()).is_none() => {
            missing(format!("move operation does not apply: doc is missing from path: {}", moved.from))
        }
        PatchOperation::Copy(copy) if document.pointer(copy.from.as_str()).is_none() => {
            missing(format!("copy operation does not apply: doc is missing from path: {}", copy.from))
        }
        PatchOperation::Test(test) if document.pointer(path) != Some(&test.value) => {
            Some(format!("testing value {path} failed: test failed"))
        }
        _ => None,
    }
}

/// An upper bound of the depth that `operation` gives to a document whose depth was at most `before`.
fn deepest_after(operation: &PatchOperation, before: usize) -> usize {
    let levels = |path: &str| path.matches('/').count();
    let at = levels(operation.path().as_str());
    match operation {
        PatchOperation::Add(add) => at + depth_of(&add.value),
        PatchOperation::Replace(replace) => at + depth_of(&replace.value),
        PatchOperation::Move(moved) => at + before.saturating_sub(levels(moved.from.as_str())),
        PatchOperation::Copy(copy) => at + before.saturating_sub(levels(copy.from.as_str())),
        PatchOperation::Remove(_) | PatchOperation::Test(_) => 0,
    }
}

fn depth_of(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth_of).max().unwrap_or(0),
        _ => 0,
    }
}

/// About the length of the value's JSON text.
fn size_of(value: &Value) -> usize {
    match value {
        Value::Array(items) => 2 + items.iter().map(|item| size_of(item) + 1).sum::<usize>(),
        Value::Object(map) => 2 + map.iter().map(|(key, item)| key.len() + 4 + size_of(item)).sum::<usize>(),
        Value::String(text) => text.len() + 2,
        _ => 5,
    }
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
