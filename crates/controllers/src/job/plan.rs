//! How far a Job is, and what comes next.
//!
//! A pod that ended is counted exactly once, though it may be deleted at any time: it carries a finalizer until its
//! uid stands in `status.uncountedTerminatedPods`, and its uid stands there until the finalizer is gone; only then
//! does it become a number.

use crate::conditions::{self, Condition};
use crate::owners::controller_of;
use crate::plan::{Change, count};
use crate::pods::sort_for_deletion;
use crate::template;
use api::ObjectExt;
use api::Resource;
use api::kinds::PODS;
use api::object::Metadata;
use jiff::Timestamp;
use reconcile::Named;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub const JOBS: Resource = Resource { group: "batch", version: "v1", plural: "jobs", kind: "Job", namespaced: true };

pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

pub type Pod = crate::pods::Pod;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Job {
    pub metadata: Metadata,
    pub spec: Spec,
    #[serde(rename = "status")]
    pub held: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub parallelism: Option<i64>,
    pub completions: Option<i64>,
    pub backoff_limit: Option<i64>,
    pub active_deadline_seconds: Option<i64>,
    pub ttl_seconds_after_finished: Option<i64>,
    pub suspend: bool,
    pub completion_mode: String,
    pub template: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    pub start_time: Option<String>,
    pub completion_time: Option<String>,
    pub succeeded: i64,
    pub failed: i64,
    pub completed_indexes: String,
    pub conditions: Vec<Condition>,
    pub uncounted_terminated_pods: Option<Uncounted>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Uncounted {
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub succeeded: BTreeSet<String>,
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub failed: BTreeSet<String>,
}

impl Named for Job {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Job {
    fn is_indexed(&self) -> bool {
        self.spec.completion_mode == "Indexed"
    }

    /// The status as this controller wrote it; nobody else does.
    fn status(&self) -> Status {
        serde_json::from_value(self.held.clone()).unwrap_or_default()
    }

    /// The condition with which it ended.
    pub fn finished(&self) -> Option<Condition> {
        let ends = |c: &Condition| matches!(c.r#type.as_str(), "Complete" | "Failed") && c.is_true();
        self.status().conditions.into_iter().find(ends)
    }

    fn parallelism(&self) -> i64 {
        if self.spec.suspend { 0 } else { self.spec.parallelism.unwrap_or(1) }
    }
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub struct Plan {
    /// The whole status, as a merge patch.
    pub status: Value,
    /// Pods to delete.
    pub delete: Vec<Change>,
    /// Pods to create.
    pub create: Vec<Change>,
    /// Pods that are counted, from which the finalizer goes once the status is written.
    pub counted: Vec<Arc<Pod>>,
    /// Reason and message of the event that tells the end.
    pub end: Option<(&'static str, String)>,
    /// Seconds after which time alone may change the decision.
    pub after: Option<i64>,
}

fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().any(|f| f == FINALIZER)
}

/// A pod deleted before it had a node never runs, and nobody else ends it.
fn has_failed(pod: &Pod) -> bool {
    pod.status.phase == "Failed" || (pod.metadata.is_deleting() && pod.spec.node_name.is_empty() && !pod.is_finished())
}

fn has_succeeded(pod: &Pod) -> bool {
    pod.status.phase == "Succeeded"
}

fn index_of(pod: &Pod) -> Option<i64> {
    pod.metadata.annotations.get(INDEX)?.parse().ok()
}

/// The counts after this look.
struct Tally {
    succeeded: i64,
    failed: i64,
    uncounted: Uncounted,
    indexes: BTreeSet<i64>,
}

fn tally(status: &Status, pods: &[Arc<Pod>]) -> Tally {
    let before = status.uncounted_terminated_pods.clone().unwrap_or_default();
    let tracked: BTreeSet<&str> = pods.iter().filter(|p| is_tracked(p)).map(|p| p.metadata.uid.as_str()).collect();
    let mut uncounted = Uncounted::default();
    let (mut succeeded, mut failed) = (status.succeeded, status.failed);
    for uid in before.succeeded {
        if tracked.contains(uid.as_str()) {
            uncounted.succeeded.insert(uid);
        } else {
            succeeded += 1;
        }
    }
    for uid in before.failed {
        if tracked.contains(uid.as_str()) {
            uncounted.failed.insert(uid);
        } else {
            failed += 1;
        }
    }
    let mut indexes = parse_indexes(&status.completed_indexes);
    for pod in pods.iter().filter(|p| is_tracked(p)) {
        if has_succeeded(pod) {
            indexes.extend(index_of(pod));
            uncounted.succeeded.insert(pod.metadata.uid.clone());
        } else if has_failed(pod) {
            uncounted.failed.insert(pod.metadata.uid.clone());
        }
    }
    Tally { succeeded, failed, uncounted, indexes }
}

/// Decides. `name` gives each new pod its five letters.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp, mut suffix: impl FnMut() -> String) -> Plan {
    let status = job.status();
    let Tally { succeeded, failed, uncounted, indexes } = tally(&status, pods);
    let seen = |set: &BTreeSet<String>| i64::try_from(set.len()).unwrap_or(i64::MAX);
    let all_failed = failed + seen(&uncounted.failed);
    let all_succeeded = if job.is_indexed() {
        i64::try_from(indexes.len()).unwrap_or(i64::MAX)
    } else {
        succeeded + seen(&uncounted.succeeded)
    };
    let active: Vec<Arc<Pod>> = pods.iter().filter(|p| p.is_active()).cloned().collect();
    let going = pods.iter().filter(|p| p.metadata.is_deleting() && !p.is_finished() && !has_failed(p)).count();
    let mut plan = Plan::default();
    let counted = |p: &&Arc<Pod>| {
        is_tracked(p) && (uncounted.succeeded.contains(&p.metadata.uid) || uncounted.failed.contains(&p.metadata.uid))
    };
    plan.counted = pods.iter().filter(counted).cloned().collect();

    let mut conditions = status.conditions.clone();
    let start = match (&status.start_time, job.spec.suspend) {
        (_, true) => None,
        (Some(start), _) => Some(start.clone()),
        (None, _) => Some(api::time::seconds(now)),
    };
    let mut completion_time = status.completion_time.clone();
    let is_over = job.finished().is_some();
    let end = if is_over { None } else { end(job, pods, &active, start.as_deref(), all_succeeded, all_failed, now) };
    if let Some(end) = end {
        let (kind, criterion, reason, message) = end;
        for kind in [criterion, kind] {
            conditions::set(&mut conditions, Condition::new(kind, "True", reason, message.clone(), now));
        }
        if kind == "Complete" {
            completion_time = Some(api::time::seconds(now));
        }
        plan.end = Some((if kind == "Complete" { "Completed" } else { reason }, message));
    }
    let has_ended = is_over || plan.end.is_some();
    let mut left = active.clone();
    if has_ended || job.spec.suspend {
        plan.delete = active.iter().map(remove).collect();
        left.clear();
    } else if !job.metadata.is_deleting() {
        size(job, &mut plan, &mut left, all_succeeded, all_failed, &indexes, pods, now, &mut suffix);
    }
    if !has_ended {
        suspend(job, &mut conditions, now);
        if let (Some(deadline), Some(start)) =
            (job.spec.active_deadline_seconds, start.as_deref().and_then(api::time::parse))
        {
            let until = (start.as_second() + deadline - now.as_second()).max(1);
            plan.after = Some(plan.after.map_or(until, |after| after.min(until)));
        }
    }
    let ready = active.iter().filter(|p| p.is_ready()).count();
    plan.status = json!({
        "active": count(i64::try_from(if has_ended { 0 } else { active.len() }).unwrap_or(i64::MAX)),
        "ready": if has_ended { 0 } else { ready }, "terminating": going,
        "succeeded": count(if job.is_indexed() { all_succeeded } else { succeeded }), "failed": count(failed),
        "startTime": start, "completionTime": completion_time,
        "completedIndexes": if indexes.is_empty() { Value::Null } else { json!(write_indexes(&indexes)) },
        "uncountedTerminatedPods": {
            "succeeded": listed(&uncounted.succeeded), "failed": listed(&uncounted.failed),
        },
        "conditions": conditions::write(&conditions),
    });
    plan
}

fn listed(uids: &BTreeSet<String>) -> Value {
    if uids.is_empty() { Value::Null } else { json!(uids) }
}

fn remove(pod: &Arc<Pod>) -> Change {
    Change::delete(PODS, pod.metadata.key(), &pod.metadata.uid)
}

type End = (&'static str, &'static str, &'static str, String);

/// Whether the Job ends now: its condition, the one that says by which criterion, reason and message.
fn end(
    job: &Job,
    pods: &[Arc<Pod>],
    active: &[Arc<Pod>],
    start: Option<&str>,
    succeeded: i64,
    failed: i64,
    now: Timestamp,
) -> Option<End> {
    let limit = job.spec.backoff_limit.unwrap_or(6);
    let restarts: i64 = pods.iter().flat_map(|p| &p.status.container_statuses).map(|c| c.restart_count).sum();
    let restarts_in_place = job.spec.template.text("/spec/restartPolicy") == "OnFailure";
    // A limit of zero restarts is over with the first one.
    if failed > limit || (restarts_in_place && restarts > 0 && restarts >= limit) {
        let message = "Job has reached the specified backoff limit".to_string();
        return Some(("Failed", "FailureTarget", "BackoffLimitExceeded", message));
    }
    let is_late = job.spec.active_deadline_seconds.zip(start.and_then(api::time::parse));
    if is_late.is_some_and(|(deadline, start)| now.as_second() - start.as_second() >= deadline) {
        let message = "Job was active longer than specified deadline".to_string();
        return Some(("Failed", "FailureTarget", "DeadlineExceeded", message));
    }
    let is_complete = match job.spec.completions {
        Some(completions) => succeeded >= completions,
        None => succeeded > 0 && active.is_empty(),
    };
    let message = "Reached expected number of succeeded pods".to_string();
    (is_complete && !job.spec.suspend).then_some(("Complete", "SuccessCriteriaMet", "CompletionsReached", message))
}

fn suspend(job: &Job, conditions: &mut Vec<Condition>, now: Timestamp) {
    if job.spec.suspend {
        conditions::set(conditions, Condition::new("Suspended", "True", "JobSuspended", "Job suspended", now));
    } else if conditions::find(conditions, "Suspended").is_some() {
        conditions::set(conditions, Condition::new("Suspended", "False", "JobResumed", "Job resumed", now));
    }
}

/// Seconds until a pod may be made again after so many failures: 10, 20, 40 … 600 after the last one.
fn back_off(pods: &[Arc<Pod>], failed: i64, now: Timestamp) -> i64 {
    let ends = pods.iter().filter(|p| has_failed(p)).flat_map(|p| &p.status.conditions).filter_map(Condition::since);
    let Some(last) = ends.max().filter(|_| failed > 0) else { return 0 };
    let doublings = u32::try_from((failed - 1).clamp(0, 6)).unwrap_or(6);
    (last.as_second() + (10 * 2i64.pow(doublings)).min(600) - now.as_second()).max(0)
}

/// Makes the number of active pods right.
#[allow(clippy::too_many_arguments, reason = "one step of plan, apart only to be read apart")]
fn size(
    job: &Job,
    plan: &mut Plan,
    left: &mut Vec<Arc<Pod>>,
    succeeded: i64,
    failed: i64,
    indexes: &BTreeSet<i64>,
    pods: &[Arc<Pod>],
    now: Timestamp,
    suffix: &mut impl FnMut() -> String,
) {
    let there = i64::try_from(left.len()).unwrap_or(i64::MAX);
    let wanted = match job.spec.completions {
        Some(completions) => (completions - succeeded).min(job.parallelism()),
        // Any success ends the search for more.
        None if succeeded > 0 => there.min(job.parallelism()),
        None => job.parallelism(),
    }
    .max(0);
    if there > wanted {
        sort_for_deletion(left, &BTreeMap::new());
        let surplus = usize::try_from(there - wanted).unwrap_or(0);
        plan.delete = left.drain(..surplus).map(|p| remove(&p)).collect();
        return;
    }
    if there == wanted {
        return;
    }
    let wait = back_off(pods, failed, now);
    if wait > 0 {
        plan.after = Some(wait);
        return;
    }
    let missing = usize::try_from((wanted - there).min(500)).unwrap_or(0);
    if job.is_indexed() {
        let busy: BTreeSet<i64> = pods
            .iter()
            .filter(|p| !p.is_finished())
            .filter_map(|p| index_of(p))
            .chain(indexes.iter().copied())
            .collect();
        let free = (0..job.spec.completions.unwrap_or(0)).filter(|i| !busy.contains(i)).take(missing);
        plan.create = free.map(|index| Change::Create(PODS, pod(job, Some(index), &suffix()))).collect();
    } else {
        plan.create = (0..missing).map(|_| Change::Create(PODS, pod(job, None, &suffix()))).collect();
    }
}

fn pod(job: &Job, index: Option<i64>, suffix: &str) -> Value {
    let metadata = &job.metadata;
    let base = match index {
        Some(index) => format!("{}-{index}-", metadata.name),
        None => format!("{}-", metadata.name),
    };
    let owner = controller_of(&JOBS, metadata);
    let mut pod = template::pod(&job.spec.template, &metadata.namespace, &format!("{base}{suffix}"), &owner);
    pod["metadata"]["generateName"] = json!(base);
    let labels = &mut pod["metadata"]["labels"];
    for (key, value) in [
        ("batch.kubernetes.io/controller-uid", &metadata.uid),
        ("controller-uid", &metadata.uid),
        ("batch.kubernetes.io/job-name", &metadata.name),
        ("job-name", &metadata.name),
    ] {
        labels[key] = json!(value);
    }
    let mut finalizers: Vec<Value> = pod["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
    finalizers.push(json!(FINALIZER));
    pod["metadata"]["finalizers"] = json!(finalizers);
    let Some(index) = index else { return pod };
    pod["metadata"]["labels"][INDEX] = json!(index.to_string());
    pod["metadata"]["annotations"][INDEX] = json!(index.to_string());
    pod["spec"]["hostname"] = json!(format!("{}-{index}", metadata.name));
    for list in ["/spec/containers", "/spec/initContainers"] {
        for container in pod.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let mut env = container["env"].as_array().cloned().unwrap_or_default();
            if !env.iter().any(|e| e["name"] == "JOB_COMPLETION_INDEX") {
                let path = format!("metadata.annotations['{INDEX}']");
                env.push(json!({"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": {"fieldPath": path}}}));
            }
            container["env"] = json!(env);
        }
    }
    pod
}

/// `1,3-5,7` as a set.
fn parse_indexes(text: &str) -> BTreeSet<i64> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<i64>().ok()?..=to.parse::<i64>().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// Three or more in a row are written as a range.
fn write_indexes(indexes: &BTreeSet<i64>) -> String {
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for index in indexes {
        match ranges.last_mut() {
            Some((_, to)) if *to + 1 == *index => *to = *index,
            _ => ranges.push((*index, *index)),
        }
    }
    let text = |(from, to): &(i64, i64)| match to - from {
        0 => from.to_string(),
        1 => format!("{from},{to}"),
        _ => format!("{from}-{to}"),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(spec: Value, status: Value) -> Job {
        let mut value = json!({
            "metadata": {"name": "j", "namespace": "default", "uid": "j"},
            "spec": {"parallelism": 2, "completions": 3, "backoffLimit": 2,
                "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}}},
            "status": status,
        });
        if let (Some(target), Some(fields)) = (value["spec"].as_object_mut(), spec.as_object()) {
            target.extend(fields.clone());
        }
        serde_json::from_value(value).expect("the case is a Job")
    }

    fn pod(name: &str, phase: &str, is_tracked: bool) -> Arc<Pod> {
        let finalizers = if is_tracked { json!([FINALIZER]) } else { json!([]) };
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name, "finalizers": finalizers},
            "spec": {"nodeName": "n1"}, "status": {"phase": phase},
        });
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    fn now() -> Timestamp {
        api::time::parse("2026-01-01T01:00:00Z").expect("a time")
    }

    /// What a merge patch leaves: nothing where it says null.
    fn stored(patch: &Value) -> Value {
        match patch {
            Value::Object(fields) => {
                let kept = fields.iter().filter(|(_, v)| !v.is_null());
                kept.map(|(name, v)| (name.clone(), stored(v))).collect()
            }
            other => other.clone(),
        }
    }

    fn decided(job: &Job, pods: &[Arc<Pod>]) -> Plan {
        plan(job, pods, now(), || "xxxxx".into())
    }

    #[test]
    fn how_many_pods() {
        let done = json!({"succeeded": 2});
        for (title, spec, status, pods, create, delete) in [
            ("as many at once as allowed", json!({}), json!({}), vec![], 2, 0),
            ("no more than are missing", json!({}), done, vec![], 1, 0),
            ("one more", json!({}), json!({}), vec![pod("a", "Running", true)], 1, 0),
            (
                "too many",
                json!({"parallelism": 1}),
                json!({}),
                vec![pod("a", "Running", true), pod("b", "Pending", true)],
                0,
                1,
            ),
            ("suspended", json!({"suspend": true}), json!({}), vec![pod("a", "Running", true)], 0, 1),
            (
                "a queue: none after a success",
                json!({"completions": null}),
                json!({"succeeded": 1}),
                vec![pod("a", "Running", true)],
                0,
                0,
            ),
        ] {
            let plan = decided(&job(spec, status), &pods);
            assert_eq!((plan.create.len(), plan.delete.len()), (create, delete), "{title}");
        }
    }

    #[test]
    fn each_pod_is_counted_once() {
        let ended = [pod("a", "Succeeded", true), pod("b", "Failed", true)];
        let first = decided(&job(json!({}), json!({})), &ended);
        assert_eq!(first.status["succeeded"], Value::Null);
        assert_eq!(first.status["uncountedTerminatedPods"], json!({"succeeded": ["a"], "failed": ["b"]}));
        assert_eq!(first.counted.len(), 2);
        // The finalizers are gone, then one of the pods as well.
        for pods in [vec![pod("a", "Succeeded", false), pod("b", "Failed", false)], vec![pod("a", "Succeeded", false)]]
        {
            let second = decided(&job(json!({}), stored(&first.status)), &pods);
            assert_eq!((&second.status["succeeded"], &second.status["failed"]), (&json!(1), &json!(1)));
            assert_eq!(second.status["uncountedTerminatedPods"], json!({"succeeded": null, "failed": null}));
            let third = decided(&job(json!({}), stored(&second.status)), &pods);
            assert_eq!(third.status["succeeded"], json!(1), "and stays counted");
        }
    }

    #[test]
    fn ends() {
        let end = |spec: Value, status: Value, pods: &[Arc<Pod>]| decided(&job(spec, status), pods).end.map(|e| e.0);
        let (two, running) = (json!({"succeeded": 2}), [pod("r", "Running", true)]);
        assert_eq!(end(json!({}), two.clone(), &[pod("a", "Succeeded", true)]), Some("Completed"));
        assert_eq!(end(json!({}), two, &[]), None);
        assert_eq!(end(json!({}), json!({"failed": 3}), &[]), Some("BackoffLimitExceeded"));
        assert_eq!(end(json!({}), json!({"failed": 2}), &[]), None);
        let (deadline, started) = (json!({"activeDeadlineSeconds": 60}), json!({"startTime": "2026-01-01T00:00:00Z"}));
        assert_eq!(end(deadline, started, &running), Some("DeadlineExceeded"));
        assert_eq!(end(json!({"completions": null}), json!({"succeeded": 1}), &[]), Some("Completed"));
        assert_eq!(end(json!({"completions": null}), json!({"succeeded": 1}), &running), None);
    }

    #[test]
    fn indexes_are_given_out_once() {
        let spec = json!({"completionMode": "Indexed", "parallelism": 3, "completions": 5});
        let plan = decided(&job(spec, json!({"completedIndexes": "0,2-3"})), &[]);
        let names: Vec<_> = plan
            .create
            .iter()
            .filter_map(|c| match c {
                Change::Create(_, pod) => Some(pod.name().to_string()),
                _ => None,
            })
            .collect();
        assert_eq!(names, ["j-1-xxxxx", "j-4-xxxxx"]);
        assert_eq!(write_indexes(&parse_indexes("0,2-4,6,7")), "0,2-4,6,7");
    }
}
