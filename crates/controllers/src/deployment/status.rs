//! How far a rollout is: the counts and conditions of a Deployment's status.

use super::object::Deployment;
use super::rollout::Rollout;
use crate::conditions::{self, Condition};
use crate::plan::{count, would_change};
use jiff::Timestamp;
use serde_json::{Value, json};

/// Whether all pods are of the new template, and available.
pub fn is_complete(deployment: &Deployment, status: &Value) -> bool {
    let wanted = deployment.spec.replicas();
    let is_all = |field| number(status, field) == wanted;
    is_all("updatedReplicas")
        && is_all("replicas")
        && is_all("availableReplicas")
        && number(status, "observedGeneration") >= deployment.metadata.generation
}

fn number(status: &Value, field: &str) -> i64 {
    status.get(field).and_then(Value::as_i64).unwrap_or(0)
}

/// The status that follows from the ReplicaSets' own. Progress is judged only when the Deployment rolls.
pub(super) fn of(rollout: &mut Rollout<'_>, judge: bool) -> Value {
    let (deployment, now) = (rollout.deployment, rollout.now);
    let (mut replicas, mut ready, mut available, mut specified) = (0, 0, 0, 0);
    for view in rollout.all() {
        replicas += view.set.status.replicas;
        ready += view.set.status.ready_replicas;
        available += view.set.status.available_replicas;
        specified += view.replicas;
    }
    let updated = rollout.new.as_ref().map_or(0, |v| v.set.status.replicas);
    let mut status = json!({
        "observedGeneration": deployment.metadata.generation,
        "replicas": count(replicas), "updatedReplicas": count(updated),
        "readyReplicas": count(ready), "availableReplicas": count(available),
        "unavailableReplicas": count((specified - available).max(0)),
    });
    let is_available = available >= deployment.spec.replicas() - deployment.spec.max_unavailable();
    let condition = if is_available {
        let message = "Deployment has minimum availability.";
        Condition::new("Available", "True", "MinimumReplicasAvailable", message, now)
    } else {
        let message = "Deployment does not have minimum availability.";
        Condition::new("Available", "False", "MinimumReplicasUnavailable", message, now)
    };
    conditions::set(&mut rollout.conditions, condition.updated());
    if judge {
        judge_progress(rollout, &status);
        report_failure(rollout);
    }
    status["conditions"] = conditions::write(&rollout.conditions);
    status
}

fn judge_progress(rollout: &mut Rollout<'_>, status: &Value) {
    let (deployment, now) = (rollout.deployment, rollout.now);
    let Some(deadline) = deployment.spec.deadline() else {
        conditions::remove(&mut rollout.conditions, "Progressing");
        return;
    };
    let current = conditions::find(&rollout.conditions, "Progressing").cloned();
    let reason = current.as_ref().map(|c| c.reason.as_str()).unwrap_or_default();
    let is_settled = number(status, "replicas") == number(status, "updatedReplicas");
    if is_settled && reason == "NewReplicaSetAvailable" {
        return;
    }
    let subject = match &rollout.new {
        Some(view) => format!("ReplicaSet {:?}", view.set.metadata.name),
        None => format!("Deployment {:?}", deployment.metadata.name),
    };
    let condition =
        |status, reason, message: String| Condition::new("Progressing", status, reason, message, now).updated();
    if is_complete(deployment, status) {
        let message = format!("{subject} has successfully progressed.");
        conditions::set(&mut rollout.conditions, condition("True", "NewReplicaSetAvailable", message));
    } else if has_moved(deployment, status) {
        let mut new = condition("True", "ReplicaSetUpdated", format!("{subject} is progressing."));
        if let Some(current) = current.filter(Condition::is_true) {
            new.last_transition_time = current.last_transition_time;
        }
        // Taken out first: the time of the last progress is news even when its reason is not.
        conditions::remove(&mut rollout.conditions, "Progressing");
        rollout.conditions.push(new);
    } else if current.as_ref().is_some_and(|c| is_overdue(c, deadline, now)) {
        let message = format!("{subject} has timed out progressing.");
        conditions::set(&mut rollout.conditions, condition("False", "ProgressDeadlineExceeded", message));
    }
}

fn has_moved(deployment: &Deployment, status: &Value) -> bool {
    let old = |field| deployment.count(field);
    let new = |field| number(status, field);
    new("updatedReplicas") > old("updatedReplicas")
        || new("replicas") - new("updatedReplicas") < old("replicas") - old("updatedReplicas")
        || new("readyReplicas") > old("readyReplicas")
        || new("availableReplicas") > old("availableReplicas")
}

fn is_overdue(condition: &Condition, deadline: i64, now: Timestamp) -> bool {
    match condition.reason.as_str() {
        "ProgressDeadlineExceeded" => true,
        "NewReplicaSetAvailable" => false,
        _ => remaining(condition, deadline, now).is_some_and(|seconds| seconds < 0),
    }
}

fn remaining(condition: &Condition, deadline: i64, now: Timestamp) -> Option<i64> {
    let since = condition.last_update_time.as_deref().and_then(api::time::parse)?;
    Some(since.as_second() + deadline - now.as_second())
}

/// Seconds until the rollout may be overdue.
pub(super) fn deadline_in(rollout: &Rollout<'_>, status: &Value) -> Option<i64> {
    let deadline = rollout.deployment.spec.deadline()?;
    let condition = conditions::find(&rollout.conditions, "Progressing")?;
    if condition.reason == "ProgressDeadlineExceeded" || is_complete(rollout.deployment, status) {
        return None;
    }
    remaining(condition, deadline, rollout.now).map(|seconds| seconds.max(0) + 1)
}

/// A ReplicaSet that cannot make pods makes that known on its Deployment.
fn report_failure(rollout: &mut Rollout<'_>) {
    let mut sets = rollout.new.iter().chain(&rollout.old);
    let failure = sets.find_map(|v| conditions::find(&v.set.status.conditions, "ReplicaFailure")).cloned();
    match failure {
        Some(failure) => conditions::set(
            &mut rollout.conditions,
            Condition { last_update_time: failure.last_transition_time.clone(), ..failure },
        ),
        None => conditions::remove(&mut rollout.conditions, "ReplicaFailure"),
    }
}

/// The status patch that says why the new ReplicaSet could not be created.
pub fn create_error(deployment: &Deployment, message: String, now: Timestamp) -> Option<Value> {
    deployment.spec.deadline()?;
    let mut conditions = conditions::read(&deployment.status);
    conditions::set(
        &mut conditions,
        Condition::new("Progressing", "False", "ReplicaSetCreateError", message, now).updated(),
    );
    let status = json!({"conditions": conditions::write(&conditions)});
    would_change(&deployment.status, &status).then_some(status)
}
