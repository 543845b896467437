//! What controllers that make pods read of a pod, and which of several goes first.

use crate::conditions::{self, Condition};
use crate::expectations::Expectations;
use crate::owners::owner_key;
use api::object::{Key, Metadata};
use api::{ObjectExt, Resource};
use jiff::Timestamp;
use reconcile::Named;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub metadata: Metadata,
    pub spec: Spec,
    pub status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub node_name: String,
    /// The one node that a required affinity names, as a DaemonSet's pods have it before they are bound.
    #[serde(rename = "affinity", deserialize_with = "named_node")]
    pub target: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    pub phase: String,
    pub conditions: Vec<Condition>,
    pub container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerStatus {
    pub restart_count: i64,
}

fn named_node<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let affinity = Value::deserialize(deserializer)?;
    let field = "/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchFields/0";
    let field = affinity.pointer(field).filter(|f| f.text("/key") == "metadata.name");
    Ok(field.map(|f| f.text("/values/0").to_string()).filter(|name| !name.is_empty()))
}

impl Named for Pod {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Pod {
    /// The node it is on, or is meant for.
    pub fn node(&self) -> &str {
        if self.spec.node_name.is_empty() {
            self.spec.target.as_deref().unwrap_or_default()
        } else {
            &self.spec.node_name
        }
    }

    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Neither finished nor going.
    pub fn is_active(&self) -> bool {
        !self.is_finished() && !self.metadata.is_deleting()
    }

    pub fn ready_condition(&self) -> Option<&Condition> {
        conditions::find(&self.status.conditions, "Ready")
    }

    pub fn is_ready(&self) -> bool {
        self.ready_condition().is_some_and(Condition::is_true)
    }

    /// Seconds until the pod has been ready for `min_ready_seconds`; `None` if it is not ready.
    pub fn available_in(&self, min_ready_seconds: i64, now: Timestamp) -> Option<i64> {
        let ready = self.ready_condition().filter(|c| c.is_true())?;
        if min_ready_seconds <= 0 {
            return Some(0);
        }
        let since = ready.since()?;
        Some((since.as_second() + min_ready_seconds - now.as_second()).max(0))
    }

    pub fn is_available(&self, min_ready_seconds: i64, now: Timestamp) -> bool {
        self.available_in(min_ready_seconds, now) == Some(0)
    }
}

/// Meets the expectations of a pod's owners of one kind, and names the owners that have to look again.
pub fn touched_owners(
    owners: &Resource,
    expectations: &Expectations,
    before: Option<&Arc<Pod>>,
    after: Option<&Arc<Pod>>,
) -> Vec<Key> {
    let mut touched = Vec::new();
    if let Some(pod) = before {
        let gone = after.is_none_or(|a| a.metadata.uid != pod.metadata.uid);
        if let Some(owner) = owner_key(owners, &pod.metadata) {
            if gone {
                expectations.saw_deleted(&owner, &pod.metadata.uid);
            }
            touched.push(owner);
        }
    }
    if let Some(pod) = after
        && let Some(owner) = owner_key(owners, &pod.metadata)
    {
        expectations.saw_created(&owner, &pod.metadata.name);
        if pod.metadata.is_deleting() {
            expectations.saw_deleted(&owner, &pod.metadata.uid);
        }
        if !touched.contains(&owner) {
            touched.push(owner);
        }
    }
    touched
}

/// Seconds until the next of these pods becomes available, if one will by waiting alone.
pub fn next_available(pods: &[Arc<Pod>], min_ready_seconds: i64, now: Timestamp) -> Option<i64> {
    pods.iter().filter_map(|p| p.available_in(min_ready_seconds, now)).filter(|s| *s > 0).min()
}

/// Sorts pods so that the ones whose loss matters least come first. Called ActivePodsWithRanks upstream.
///
/// `crowd` counts related pods per node: of two alike, the one on the fuller node goes.
pub fn sort_for_deletion(pods: &mut [Arc<Pod>], crowd: &BTreeMap<String, usize>) {
    pods.sort_by_cached_key(|pod| {
        let phase = match pod.status.phase.as_str() {
            "Pending" | "" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let cost: i32 = pod
            .metadata
            .annotations
            .get("controller.kubernetes.io/pod-deletion-cost")
            .and_then(|c| c.parse().ok())
            .unwrap_or(0);
        let ready_since = pod.ready_condition().filter(|c| c.is_true()).and_then(Condition::since);
        let restarts = pod.status.container_statuses.iter().map(|c| c.restart_count).max().unwrap_or(0);
        let created = pod.metadata.creation_timestamp.as_deref().and_then(api::time::parse);
        (
            (!pod.spec.node_name.is_empty(), phase, pod.is_ready(), cost),
            Reverse(crowd.get(&pod.spec.node_name).copied().unwrap_or(0)),
            Reverse(ready_since),
            Reverse(restarts),
            Reverse(created),
            pod.metadata.name.clone(),
        )
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, node: &str, phase: &str, ready_since: Option<&str>, extra: Value) -> Arc<Pod> {
        let conditions = match ready_since {
            Some(since) => json!([{"type": "Ready", "status": "True", "lastTransitionTime": since}]),
            None => json!([]),
        };
        let mut metadata = json!({"name": name, "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"});
        if let (Some(metadata), Some(extra)) = (metadata.as_object_mut(), extra.as_object()) {
            metadata.extend(extra.clone());
        }
        let value = json!({"metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": phase, "conditions": conditions}});
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    #[test]
    fn the_pod_whose_loss_matters_least_goes_first() {
        let cost = json!({"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-5"}});
        let young = json!({"creationTimestamp": "2026-01-02T00:00:00Z"});
        let mut pods = vec![
            pod("old-ready", "n1", "Running", Some("2026-01-01T00:00:10Z"), json!({})),
            pod("new-ready", "n1", "Running", Some("2026-01-01T00:05:00Z"), json!({})),
            pod("crowded", "n2", "Running", Some("2026-01-01T00:00:01Z"), json!({})),
            pod("cheap", "n1", "Running", Some("2026-01-01T00:00:00Z"), cost),
            pod("unready", "n1", "Running", None, json!({})),
            pod("unready-young", "n1", "Running", None, young),
            pod("pending", "n1", "Pending", None, json!({})),
            pod("unassigned", "", "Pending", None, json!({})),
        ];
        let crowd = BTreeMap::from([("n1".to_string(), 6), ("n2".to_string(), 9)]);
        sort_for_deletion(&mut pods, &crowd);
        let names: Vec<_> = pods.iter().map(|p| p.metadata.name.as_str()).collect();
        let expected =
            ["unassigned", "pending", "unready-young", "unready", "cheap", "crowded", "new-ready", "old-ready"];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_pod_is_available_once_it_was_ready_long_enough() {
        let pod = pod("a", "n1", "Running", Some("2026-01-01T00:00:00Z"), json!({}));
        let at = |text| api::time::parse(text).expect("a time");
        assert_eq!(pod.available_in(10, at("2026-01-01T00:00:04Z")), Some(6));
        assert_eq!(pod.available_in(10, at("2026-01-01T00:00:10Z")), Some(0));
        assert_eq!(pod.available_in(0, at("2026-01-01T00:00:00Z")), Some(0));
    }
}
