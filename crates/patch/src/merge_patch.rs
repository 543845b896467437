//! JSON merge patch (RFC 7386): maps merge, null removes, everything else replaces.

use serde_json::Value;

use crate::error::PatchError;

/// Applies `patch` to `document`. A patch that is not an object would replace the whole object, so it is refused.
pub fn merge_patch(document: &Value, patch: &Value) -> Result<Value, PatchError> {
    if !patch.is_object() {
        return Err(PatchError::Malformed("Invalid JSON Patch: a merge patch must be a JSON object".to_owned()));
    }
    let mut document = document.clone();
    ::json_patch::merge(&mut document, patch);
    Ok(document)
}
