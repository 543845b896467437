//! What a controller decided to do, as values, and the one place that does it.

use crate::Error;
use api::object::Key;
use api::{ObjectExt, Resource};
use reconcile::{Api, ApiError, Client, DeleteOptions, Outcome, Patch};
use serde_json::{Value, json};

/// One write.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Create(Resource, Value),
    /// Replaces the object; its resourceVersion, if set, must be current.
    Replace(Resource, Value),
    /// A merge patch.
    Patch(Resource, Key, Value),
    /// A merge patch of the status subresource.
    PatchStatus(Resource, Key, Value),
    Delete(Resource, Key, Removal),
}

/// How an object is deleted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Removal {
    /// Only the object with this uid.
    pub uid: Option<String>,
    pub grace_period_seconds: Option<i64>,
    pub propagation: Option<&'static str>,
}

impl Change {
    /// Deletes the object of this name only if it is still the one with this uid.
    pub fn delete(resource: Resource, key: Key, uid: &str) -> Change {
        Change::Delete(resource, key, Removal { uid: Some(uid.into()), ..Removal::default() })
    }

    /// Replaces the status, field by field; `null` removes a field.
    pub fn status(resource: Resource, key: Key, status: Value) -> Change {
        Change::PatchStatus(resource, key, json!({ "status": status }))
    }
}

/// Does one change. The answer of a delete is `null`.
pub async fn act(client: &Client, change: &Change) -> Result<Value, ApiError> {
    match change {
        Change::Create(resource, object) => Api::new(client, resource).create(object.namespace(), object).await,
        Change::Replace(resource, object) => Api::new(client, resource).replace(object).await,
        Change::Patch(resource, key, body) => {
            Api::new(client, resource).patch(&key.namespace, &key.name, Patch::Merge, body).await
        }
        Change::PatchStatus(resource, key, body) => {
            Api::new(client, resource).patch_status(&key.namespace, &key.name, Patch::Merge, body).await
        }
        Change::Delete(resource, key, removal) => {
            let options = DeleteOptions {
                grace_period_seconds: removal.grace_period_seconds,
                uid: removal.uid.clone(),
                propagation: removal.propagation,
            };
            match Api::new(client, resource).delete(&key.namespace, &key.name, &options).await {
                // The precondition failed: the object of that uid is gone already.
                Err(error) if error.is_conflict() && removal.uid.is_some() => Ok(Value::Null),
                other => other.map(|()| Value::Null),
            }
        }
    }
}

/// Does changes in order, ending at the first failure.
pub async fn act_all(client: &Client, changes: &[Change]) -> Result<(), ApiError> {
    for change in changes {
        act(client, change).await?;
    }
    Ok(())
}

/// Whether a merge patch would change the value. As in Go, a field that is absent is as good as zero.
pub fn would_change(current: &Value, patch: &Value) -> bool {
    match patch {
        Value::Object(fields) => {
            fields.iter().any(|(name, wanted)| would_change(current.get(name).unwrap_or(&Value::Null), wanted))
        }
        other => current != other && !(is_zero(current) && is_zero(other)),
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_so) => !is_so,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// A count as Go's `omitempty` writes it: zero is no field.
pub fn count(number: i64) -> Value {
    if number == 0 { Value::Null } else { json!(number) }
}

/// Creating in a namespace that is going away fails for good; nothing is to be reported.
pub fn is_namespace_terminating(error: &ApiError) -> bool {
    let ApiError::Status(status) = error else { return false };
    status.details.iter().flat_map(|d| &d.causes).any(|c| c.reason == "NamespaceTerminating")
}

/// Creating what is there already, or what is going away with its namespace, is no failure.
pub fn settled(result: Result<Value, ApiError>) -> Result<Outcome, Error> {
    match result {
        Ok(_) => Ok(Outcome::Done),
        Err(error) if error.is_already_exists() || is_namespace_terminating(&error) => Ok(Outcome::Done),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_changes_only_what_differs() {
        let current = json!({"replicas": 2, "conditions": [{"type": "A"}], "inner": {"a": 1}});
        for (patch, expected) in [
            (json!({"replicas": 2}), false),
            (json!({"replicas": 3}), true),
            (json!({"readyReplicas": null}), false),
            (json!({"replicas": null}), true),
            (json!({"readyReplicas": 1}), true),
            (json!({"conditions": [{"type": "A"}]}), false),
            (json!({"conditions": []}), true),
            (json!({"inner": {"a": 1, "b": null}}), false),
            (json!({"readyReplicas": 0, "absent": {"a": null}, "list": []}), false),
            (json!({"replicas": 0}), true),
        ] {
            assert_eq!(would_change(&current, &patch), expected, "{patch}");
        }
    }
}
