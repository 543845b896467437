//! What follows from a node's silence or illness: its conditions, its taints, and the end of its pods.

use crate::conditions::{self, Condition};
use crate::nodes::{Node, Taint, Toleration};
use api::object::Metadata;
use jiff::Timestamp;
use reconcile::Named;
use serde::Deserialize;
use serde_json::{Value, json};

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// Conditions that are not known when nobody posts them.
const POSTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// Conditions, the status that is bad news, and the taint that says so to the scheduler.
const ADVERSE: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub metadata: Metadata,
    pub spec: PodSpec,
    pub status: PodStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    pub node_name: String,
    pub tolerations: Vec<Toleration>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    pub phase: String,
    pub conditions: Vec<Condition>,
}

impl Named for Pod {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// The node's `Ready`: `True`, `False`, or `Unknown` if it never said.
pub fn readiness(node: &Node) -> &str {
    conditions::find(&node.status.conditions, "Ready").map_or("Unknown", |c| c.status.as_str())
}

/// The conditions that a silent node no longer vouches for, as they become; none if that is said already.
pub fn silence(node: &Node, now: Timestamp) -> Vec<Condition> {
    let unknown = |kind: &&str| {
        let old = conditions::find(&node.status.conditions, kind);
        if old.is_some_and(|c| c.status == "Unknown") {
            return None;
        }
        let (reason, message) = match old {
            Some(_) => ("NodeStatusUnknown", "Kubelet stopped posting node status."),
            None => ("NodeStatusNeverUpdated", "Kubelet never posted node status."),
        };
        let mut new = Condition::new(kind, "Unknown", reason, message, now);
        let created = || node.metadata.creation_timestamp.clone();
        new.last_heartbeat_time = old.map_or_else(created, |c| c.last_heartbeat_time.clone());
        Some(new)
    };
    POSTED.iter().filter_map(unknown).collect()
}

/// The node's taints as they should be; those of others stay.
pub fn taints(node: &Node, now: Timestamp) -> Vec<Taint> {
    let mut wanted = Vec::new();
    match readiness(node) {
        "True" => {}
        "False" => wanted.extend([Taint::new(NOT_READY, "NoSchedule"), Taint::new(NOT_READY, "NoExecute")]),
        _ => wanted.extend([Taint::new(UNREACHABLE, "NoSchedule"), Taint::new(UNREACHABLE, "NoExecute")]),
    }
    for (kind, key) in ADVERSE {
        if conditions::find(&node.status.conditions, kind).is_some_and(Condition::is_true) {
            wanted.push(Taint::new(key, "NoSchedule"));
        }
    }
    if node.spec.unschedulable {
        wanted.push(Taint::new("node.kubernetes.io/unschedulable", "NoSchedule"));
    }
    let is_ours = |taint: &Taint| {
        let key = taint.key.as_str();
        match taint.effect.as_str() {
            "NoExecute" => matches!(key, NOT_READY | UNREACHABLE),
            "NoSchedule" => {
                matches!(key, NOT_READY | UNREACHABLE | "node.kubernetes.io/unschedulable")
                    || ADVERSE.iter().any(|(_, adverse)| *adverse == key)
            }
            _ => false,
        }
    };
    // In the order they are in: a patch that only reorders would be a write for nothing.
    let held = node.spec.taints.iter();
    let mut taints: Vec<Taint> = held.filter(|t| !is_ours(t) || wanted.iter().any(|w| w.is_same(t))).cloned().collect();
    for mut taint in wanted {
        if !taints.iter().any(|t| t.is_same(&taint)) {
            taint.time_added = Some(api::time::seconds(now));
            taints.push(taint);
        }
    }
    taints
}

/// The patch by which a pod of a node that is not ready is no longer ready itself.
pub fn unready(pod: &Pod, now: Timestamp) -> Option<Value> {
    conditions::find(&pod.status.conditions, "Ready").filter(|c| c.is_true())?;
    let condition = json!({"type": "Ready", "status": "False", "lastTransitionTime": api::time::seconds(now)});
    Some(json!({"status": {"conditions": [condition]}}))
}

/// When a pod has to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    Forever,
    /// Seconds from now; zero is at once.
    For(i64),
}

/// How long a pod's tolerations let it stay under the node's `NoExecute` taints.
pub fn stay(pod: &Pod, node: &Node, now: Timestamp) -> Stay {
    let mut stay = Stay::Forever;
    for taint in node.spec.taints.iter().filter(|t| t.effect == "NoExecute") {
        let tolerations: Vec<_> = pod.spec.tolerations.iter().filter(|t| t.tolerates(taint)).collect();
        if tolerations.is_empty() {
            return Stay::For(0);
        }
        // The shortest counts; one without a limit limits nothing.
        let Some(seconds) = tolerations.iter().filter_map(|t| t.toleration_seconds).min() else { continue };
        let since = taint.time_added.as_deref().and_then(api::time::parse).unwrap_or(now);
        let left = (since.as_second() + seconds.max(0) - now.as_second()).max(0);
        stay = match stay {
            Stay::For(shorter) if shorter <= left => stay,
            _ => Stay::For(left),
        };
    }
    stay
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        api::time::parse(text).expect("the case is a time")
    }

    fn node(ready: &str, spec: Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n1"}, "spec": spec,
            "status": {"conditions": [
                {"type": "Ready", "status": ready, "lastHeartbeatTime": "2026-01-01T00:00:00Z"},
                {"type": "DiskPressure", "status": "True"},
            ]},
        }))
        .expect("the case is a node")
    }

    #[test]
    fn silence_is_told_once() {
        let now = at("2026-01-01T00:01:00Z");
        let lost = silence(&node("True", json!({})), now);
        let reasons: Vec<_> = lost.iter().map(|c| (c.r#type.as_str(), c.reason.as_str())).collect();
        assert_eq!(
            reasons,
            [
                ("Ready", "NodeStatusUnknown"),
                ("MemoryPressure", "NodeStatusNeverUpdated"),
                ("DiskPressure", "NodeStatusUnknown"),
                ("PIDPressure", "NodeStatusNeverUpdated"),
            ]
        );
        assert_eq!(lost[0].last_heartbeat_time.as_deref(), Some("2026-01-01T00:00:00Z"));
        let mut silent = node("True", json!({}));
        silent.status.conditions = lost;
        assert!(silence(&silent, now).is_empty());
    }

    #[test]
    fn taints_follow_conditions_and_keep_others() {
        let now = at("2026-01-01T00:01:00Z");
        let shape = |node: &Node| -> Vec<String> {
            taints(node, now)
                .iter()
                .map(|t| format!("{}:{}", t.key.rsplit('/').next().unwrap_or(""), t.effect))
                .collect()
        };
        let theirs = json!({"taints": [{"key": "a/b", "effect": "NoSchedule"}], "unschedulable": true});
        assert_eq!(
            shape(&node("True", theirs)),
            ["b:NoSchedule", "disk-pressure:NoSchedule", "unschedulable:NoSchedule"]
        );
        let expected = ["unreachable:NoSchedule", "unreachable:NoExecute", "disk-pressure:NoSchedule"];
        assert_eq!(shape(&node("Unknown", json!({}))), expected);
        let back = json!({"taints": [
            {"key": UNREACHABLE, "effect": "NoExecute"}, {"key": NOT_READY, "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"},
        ]});
        assert_eq!(
            shape(&node("False", back)),
            ["not-ready:NoExecute", "not-ready:NoSchedule", "disk-pressure:NoSchedule"]
        );
    }

    #[test]
    fn pods_stay_as_long_as_they_tolerate() {
        let spec = json!({"taints": [
            {"key": UNREACHABLE, "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"},
            {"key": UNREACHABLE, "effect": "NoSchedule"},
        ]});
        let node = node("Unknown", spec);
        for (tolerations, expected) in [
            (json!([]), Stay::For(0)),
            (json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute"}]), Stay::Forever),
            (json!([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 300}]), Stay::For(240)),
            (json!([{"operator": "Exists", "tolerationSeconds": 30}]), Stay::For(0)),
            (json!([{"key": NOT_READY, "operator": "Exists"}]), Stay::For(0)),
        ] {
            let pod: Pod =
                serde_json::from_value(json!({"spec": {"tolerations": tolerations}})).expect("the case is a pod");
            assert_eq!(stay(&pod, &node, at("2026-01-01T00:01:00Z")), expected, "{tolerations}");
        }
    }
}
