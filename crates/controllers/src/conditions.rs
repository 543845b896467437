//! Conditions: the list in a status that says what is true, since when and why.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    pub r#type: String,
    pub status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_probe_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_heartbeat_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_update_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

impl Condition {
    pub fn new(kind: &str, status: &str, reason: &str, message: impl Into<String>, now: Timestamp) -> Condition {
        Condition {
            r#type: kind.into(),
            status: status.into(),
            reason: reason.into(),
            message: message.into(),
            last_transition_time: Some(api::time::seconds(now)),
            ..Condition::default()
        }
    }

    /// With `lastUpdateTime`, which Deployments have.
    pub fn updated(mut self) -> Condition {
        self.last_update_time = self.last_transition_time.clone();
        self
    }

    pub fn is_true(&self) -> bool {
        self.status == "True"
    }

    pub fn since(&self) -> Option<Timestamp> {
        self.last_transition_time.as_deref().and_then(api::time::parse)
    }
}

/// The conditions of a status, or none.
pub fn read(status: &Value) -> Vec<Condition> {
    status
        .get("conditions")
        .filter(|c| !c.is_null())
        .and_then(|c| serde_json::from_value(c.clone()).ok())
        .unwrap_or_default()
}

/// As they go into a status patch: an empty list is no field.
pub fn write(conditions: &[Condition]) -> Value {
    if conditions.is_empty() {
        return Value::Null;
    }
    serde_json::to_value(conditions).expect("conditions are plain data")
}

pub fn find<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.r#type == kind)
}

/// Puts a condition in. The same status and reason leave the old one as it is, the same status keeps its transition time.
pub fn set(conditions: &mut Vec<Condition>, mut new: Condition) {
    match conditions.iter_mut().find(|c| c.r#type == new.r#type) {
        Some(old) if old.status == new.status && old.reason == new.reason => {}
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = old.last_transition_time.clone();
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

pub fn remove(conditions: &mut Vec<Condition>, kind: &str) {
    conditions.retain(|c| c.r#type != kind);
}
