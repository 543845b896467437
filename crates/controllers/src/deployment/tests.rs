//! Rollouts as data: what there is, and the next step.

use super::object::{Deployment, ReplicaSet};
use super::rollout::{Plan, plan};
use crate::plan::Change;
use crate::pods::Pod;
use api::ObjectExt;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::sync::Arc;

fn at(text: &str) -> Timestamp {
    api::time::parse(text).expect("the case is a time")
}

fn template(image: &str) -> Value {
    json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": image}]}})
}

fn deployment(image: &str, spec: Value, status: Value) -> Deployment {
    let mut value = json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "d", "generation": 2},
        "spec": {
            "replicas": 4, "selector": {"matchLabels": {"app": "web"}}, "template": template(image),
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
        },
        "status": status,
    });
    if let (Some(target), Some(fields)) = (value["spec"].as_object_mut(), spec.as_object()) {
        target.extend(fields.clone());
    }
    serde_json::from_value(value).expect("the case is a Deployment")
}

/// `size` pods asked for, `available` of them available; sized last for a Deployment of `desired`.
fn set(image: &str, revision: i64, size: i64, available: i64, desired: i64) -> Arc<ReplicaSet> {
    let value = json!({
        "metadata": {
            "name": format!("web-{image}"), "namespace": "default", "uid": format!("u-{image}"), "resourceVersion": "7",
            "generation": 1, "creationTimestamp": format!("2026-01-01T00:00:{revision:02}Z"),
            "annotations": {
                "deployment.kubernetes.io/revision": revision.to_string(),
                "deployment.kubernetes.io/desired-replicas": desired.to_string(),
                "deployment.kubernetes.io/max-replicas": (desired + (desired + 3) / 4).to_string(),
            },
        },
        "spec": {"replicas": size, "template": template(image)},
        "status": {
            "replicas": size, "readyReplicas": available, "availableReplicas": available, "observedGeneration": 1,
        },
    });
    Arc::new(serde_json::from_value(value).expect("the case is a ReplicaSet"))
}

fn step(deployment: &Deployment, sets: &[Arc<ReplicaSet>]) -> Plan {
    plan(deployment, sets, &[], at("2026-01-01T00:01:00Z"))
}

#[test]
fn the_first_step_creates_the_new_set_whole() {
    let plan = step(&deployment("a", json!({"replicas": 2}), json!({})), &[]);
    let set = plan.create.expect("a set is created");
    assert_eq!(set["spec"]["replicas"], 2);
    let hash = set["metadata"]["labels"]["pod-template-hash"].as_str().expect("the set is labelled");
    assert_eq!(set.name(), format!("web-{hash}"));
    assert_eq!(set["spec"]["selector"]["matchLabels"], json!({"app": "web", "pod-template-hash": hash}));
    assert_eq!(set["spec"]["template"]["metadata"]["labels"]["pod-template-hash"], hash);
    assert_eq!(set.annotation("deployment.kubernetes.io/revision"), Some("1"));
    assert_eq!(set.annotation("deployment.kubernetes.io/max-replicas"), Some("3"));
    assert_eq!(plan.events, [format!("Scaled up replica set web-{hash} from 0 to 2")]);
    assert!(matches!(plan.changes.as_slice(), [Change::Patch(r, _, _)] if r.plural == "deployments"));
    let reasons = reasons(plan.status.as_ref());
    assert_eq!(reasons, ["Progressing=True/NewReplicaSetCreated", "Available=False/MinimumReplicasUnavailable"]);
    assert_eq!(plan.after, Some(601));
}

fn reasons(status: Option<&Value>) -> Vec<String> {
    let conditions = status.and_then(|s| s["conditions"].as_array()).cloned().unwrap_or_default();
    let line = |c: &Value| format!("{}={}/{}", c.text("/type"), c.text("/status"), c.text("/reason"));
    conditions.iter().map(line).collect()
}

#[test]
fn a_rolling_update_step_by_step() {
    // The Deployment asks for 4 of image b, with one more and one less allowed.
    for (title, sets, expected) in [
        ("new gets the surge", vec![set("a", 1, 4, 4, 4)], vec![]),
        (
            "old gives what may be unavailable",
            vec![set("a", 1, 4, 4, 4), set("b", 2, 1, 0, 4)],
            vec!["Scaled down replica set web-a from 4 to 3"],
        ),
        (
            "new takes the room",
            vec![set("a", 1, 3, 3, 4), set("b", 2, 1, 0, 4)],
            vec!["Scaled up replica set web-b from 1 to 2"],
        ),
        ("nothing moves until new ones serve", vec![set("a", 1, 3, 3, 4), set("b", 2, 2, 0, 4)], vec![]),
        (
            "old goes as new serves",
            vec![set("a", 1, 3, 3, 4), set("b", 2, 2, 2, 4)],
            vec!["Scaled down replica set web-a from 3 to 1"],
        ),
        (
            "unhealthy old ones go first",
            vec![set("a", 1, 4, 0, 4), set("b", 2, 1, 1, 4)],
            vec!["Scaled down replica set web-a from 4 to 2"],
        ),
        (
            "the last old one",
            vec![set("a", 1, 1, 1, 4), set("b", 2, 4, 4, 4)],
            vec!["Scaled down replica set web-a from 1 to 0"],
        ),
        ("done", vec![set("a", 1, 0, 0, 4), set("b", 2, 4, 4, 4)], vec![]),
    ] {
        let plan = step(&deployment("b", json!({}), json!({})), &sets);
        if title == "new gets the surge" {
            let created = plan.create.expect("the new set");
            assert_eq!(created["spec"]["replicas"], 1, "{title}");
            assert_eq!(created.annotation("deployment.kubernetes.io/revision"), Some("2"), "{title}");
            continue;
        }
        assert_eq!(plan.events, expected, "{title}");
    }
}

#[test]
fn going_back_gives_the_old_set_a_new_revision() {
    let sets = [set("a", 1, 0, 0, 4), set("b", 2, 4, 4, 4)];
    let plan = step(&deployment("a", json!({}), json!({})), &sets);
    let patches: Vec<_> = plan
        .changes
        .iter()
        .filter_map(|c| match c {
            Change::Patch(r, key, body) => Some((r.plural, key.name.as_str(), body)),
            _ => None,
        })
        .collect();
    let (_, name, body) = patches[0];
    assert_eq!(name, "web-a");
    assert_eq!(body["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "3");
    assert_eq!(body["metadata"]["annotations"]["deployment.kubernetes.io/revision-history"], "1");
    assert_eq!(body["spec"]["replicas"], 1);
    assert_eq!(patches.last().map(|p| p.0), Some("deployments"));
}

#[test]
fn a_changed_number_goes_to_the_sets_before_anything_rolls() {
    for (title, replicas, sets, expected) in [
        ("one set", 6, vec![set("b", 1, 4, 4, 4)], vec!["Scaled up replica set web-b from 4 to 6"]),
        ("to nothing", 0, vec![set("b", 1, 4, 4, 4)], vec!["Scaled down replica set web-b from 4 to 0"]),
        (
            "in proportion",
            8,
            vec![set("a", 1, 3, 3, 4), set("b", 2, 2, 1, 4)],
            vec!["Scaled up replica set web-a from 3 to 6", "Scaled up replica set web-b from 2 to 4"],
        ),
    ] {
        let plan = step(&deployment("b", json!({"replicas": replicas}), json!({})), &sets);
        assert_eq!(plan.events, expected, "{title}");
    }
}

#[test]
fn recreate_waits_for_the_last_old_pod() {
    let recreate = json!({"strategy": {"type": "Recreate"}});
    let deployment = deployment("b", recreate, json!({}));
    let down = step(&deployment, &[set("a", 1, 4, 4, 4)]);
    assert_eq!(down.events, ["Scaled down replica set web-a from 4 to 0"]);
    assert!(down.create.is_none());
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "deletionTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [{"uid": "u-a", "controller": true}]},
        "status": {"phase": "Running"},
    }))
    .expect("the case is a pod");
    let sets = [set("a", 1, 0, 0, 4)];
    let now = at("2026-01-01T00:01:00Z");
    assert!(plan(&deployment, &sets, &[Arc::new(pod)], now).create.is_none());
    let created = plan(&deployment, &sets, &[], now).create.expect("no old pod is left");
    assert_eq!(created["spec"]["replicas"], 4);
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let plan = step(&deployment("b", json!({"paused": true, "replicas": 5}), json!({})), &[set("a", 1, 4, 4, 4)]);
    assert!(plan.create.is_none());
    assert_eq!(plan.events, ["Scaled up replica set web-a from 4 to 5"]);
    assert_eq!(reasons(plan.status.as_ref())[0], "Progressing=Unknown/DeploymentPaused");
}

#[test]
fn completion_and_the_deadline_are_told() {
    let progressing = |reason: &str, since: &str| {
        json!({"conditions": [{"type": "Progressing", "status": "True", "reason": reason,
            "lastUpdateTime": since, "lastTransitionTime": since}]})
    };
    let moving = progressing("ReplicaSetUpdated", "2026-01-01T00:00:00Z");
    let done = step(&deployment("b", json!({}), moving), &[set("b", 1, 4, 4, 4)]);
    assert_eq!(reasons(done.status.as_ref())[0], "Progressing=True/NewReplicaSetAvailable");
    assert_eq!(done.after, None);

    let stuck = progressing("ReplicaSetUpdated", "2025-12-31T23:00:00Z");
    let late = step(&deployment("b", json!({}), stuck), &[set("b", 1, 4, 0, 4)]);
    // The pods are counted for the first time: that is progress.
    assert_eq!(reasons(late.status.as_ref())[0], "Available=False/MinimumReplicasUnavailable");
    let mut stuck = progressing("ReplicaSetUpdated", "2025-12-31T23:00:00Z");
    stuck["replicas"] = json!(4);
    stuck["updatedReplicas"] = json!(4);
    let late = step(&deployment("b", json!({}), stuck), &[set("b", 1, 4, 0, 4)]);
    assert_eq!(reasons(late.status.as_ref())[0], "Progressing=False/ProgressDeadlineExceeded");
}

#[test]
fn history_beyond_the_limit_is_deleted_oldest_first() {
    let status = json!({"replicas": 4, "updatedReplicas": 4, "readyReplicas": 4, "availableReplicas": 4, "observedGeneration": 2});
    let sets = [set("a", 1, 0, 0, 4), set("b", 2, 0, 0, 4), set("c", 3, 4, 4, 4)];
    let plan = step(&deployment("c", json!({"revisionHistoryLimit": 1}), status), &sets);
    let deleted: Vec<_> = plan
        .changes
        .iter()
        .filter_map(|c| match c {
            Change::Delete(_, key, _) => Some(key.name.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(deleted, ["web-a"]);
}
