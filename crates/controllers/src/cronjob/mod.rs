//! Makes a Job whenever a CronJob's time comes.

pub mod schedule;

use crate::conditions::Condition;
use crate::owners::{controller_of, owner_key};
use crate::plan::{Change, act, is_namespace_terminating, would_change};
use crate::{Context, Descriptor, Error};
use api::kinds::EVENTS;
use api::object::{Key, Metadata};
use api::{ObjectExt, Resource};
use jiff::Timestamp;
use reconcile::{Cache, Client, EventKind, Named, ObjectRef, Outcome, Queue, Recorder, Scope, feed, run_queue};
use schedule::Schedule;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const CRON_JOBS: Resource =
    Resource { group: "batch", version: "v1", plural: "cronjobs", kind: "CronJob", namespaced: true };
const JOBS: Resource = Resource { group: "batch", version: "v1", plural: "jobs", kind: "Job", namespaced: true };

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "cronjob",
    watches: &[CRON_JOBS, JOBS],
    writes: &[JOBS, CRON_JOBS, EVENTS],
    run: |context| Box::pin(run(context)),
};

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct CronJob {
    metadata: Metadata,
    spec: Spec,
    status: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    schedule: String,
    time_zone: Option<String>,
    starting_deadline_seconds: Option<i64>,
    concurrency_policy: String,
    suspend: bool,
    job_template: Value,
    successful_jobs_history_limit: Option<usize>,
    failed_jobs_history_limit: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Job {
    metadata: Metadata,
    status: JobStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct JobStatus {
    conditions: Vec<Condition>,
    completion_time: Option<String>,
    start_time: Option<String>,
}

impl Named for CronJob {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for Job {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Job {
    fn has_ended(&self, how: &str) -> bool {
        self.status.conditions.iter().any(|c| c.r#type == how && c.is_true())
    }

    fn is_active(&self) -> bool {
        !self.has_ended("Complete") && !self.has_ended("Failed")
    }
}

#[derive(Debug, Default)]
struct Plan {
    changes: Vec<Change>,
    /// Reason and message.
    events: Vec<(&'static str, String)>,
    /// A merge patch of the status.
    status: Value,
    /// When to look again, in seconds.
    after: Option<i64>,
}

fn plan(cron: &CronJob, jobs: &[Arc<Job>], schedule: &Schedule, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let mut active: Vec<&Arc<Job>> = jobs.iter().filter(|j| j.is_active()).collect();
    active.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let mut references: Vec<Value> =
        active.iter().map(|j| reference(&j.metadata.namespace, &j.metadata.name, &j.metadata.uid)).collect();
    let mut last_run = cron.status.text("/lastScheduleTime").to_string();
    prune(cron, jobs, &mut plan);
    if !cron.metadata.is_deleting() && !cron.spec.suspend {
        plan.after = schedule.next(now).map(|next| next.as_second() - now.as_second());
        let since = api::time::parse(&last_run)
            .or_else(|| cron.metadata.creation_timestamp.as_deref().and_then(api::time::parse));
        let due = schedule.last(now).filter(|due| since.is_none_or(|since| *due > since));
        let is_late = |due: &Timestamp| {
            cron.spec.starting_deadline_seconds.is_some_and(|limit| now.as_second() - due.as_second() > limit)
        };
        match due {
            None => {}
            Some(due) if is_late(&due) => {
                let message = format!("Missed scheduled time to start a job: {}", api::time::seconds(due));
                plan.events.push(("MissSchedule", message));
                last_run = api::time::seconds(due);
            }
            Some(_) if !active.is_empty() && cron.spec.concurrency_policy == "Forbid" => {
                let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
                plan.events.push(("JobAlreadyActive", message.into()));
                // It starts once the running one has ended, which is seen.
            }
            Some(due) => {
                if cron.spec.concurrency_policy == "Replace" {
                    for job in &active {
                        plan.events.push(("SuccessfulDelete", format!("Deleted job {}", job.metadata.name)));
                        plan.changes.push(delete(job));
                    }
                    references.clear();
                }
                let job = job(cron, due);
                plan.events.push(("SuccessfulCreate", format!("Created job {}", job.name())));
                references.push(reference(&cron.metadata.namespace, job.name(), ""));
                plan.changes.push(Change::Create(JOBS, job));
                last_run = api::time::seconds(due);
            }
        }
    }
    let success =
        jobs.iter().filter(|j| j.has_ended("Complete")).filter_map(|j| j.status.completion_time.clone()).max();
    let success =
        success.or_else(|| Some(cron.status.text("/lastSuccessfulTime").to_string()).filter(|t| !t.is_empty()));
    plan.status = json!({
        "active": if references.is_empty() { Value::Null } else { json!(references) },
        "lastScheduleTime": if last_run.is_empty() { Value::Null } else { json!(last_run) },
        "lastSuccessfulTime": success,
    });
    plan
}

fn reference(namespace: &str, name: &str, uid: &str) -> Value {
    let mut reference = json!({"apiVersion": "batch/v1", "kind": "Job", "namespace": namespace, "name": name});
    if !uid.is_empty() {
        reference["uid"] = json!(uid);
    }
    reference
}

/// The Job of one time. Its name follows from the time, so that it is made once.
fn job(cron: &CronJob, due: Timestamp) -> Value {
    let template = &cron.spec.job_template;
    let part = |field: &str| template.pointer(&format!("/metadata/{field}")).cloned().unwrap_or_else(|| json!({}));
    let mut annotations = part("annotations");
    annotations["batch.kubernetes.io/cronjob-scheduled-timestamp"] = json!(api::time::seconds(due));
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {
            "name": format!("{}-{}", cron.metadata.name, due.as_second() / 60),
            "namespace": cron.metadata.namespace, "labels": part("labels"), "annotations": annotations,
            "ownerReferences": [controller_of(&CRON_JOBS, &cron.metadata)],
        },
        "spec": template["spec"],
    })
}

fn delete(job: &Job) -> Change {
    let removal = crate::plan::Removal {
        uid: Some(job.metadata.uid.clone()),
        propagation: Some("Background"),
        ..crate::plan::Removal::default()
    };
    Change::Delete(JOBS, job.metadata.key(), removal)
}

/// Deletes the oldest ended Jobs beyond the history that is kept.
fn prune(cron: &CronJob, jobs: &[Arc<Job>], plan: &mut Plan) {
    let limits = [
        ("Complete", cron.spec.successful_jobs_history_limit.unwrap_or(3)),
        ("Failed", cron.spec.failed_jobs_history_limit.unwrap_or(1)),
    ];
    for (how, limit) in limits {
        let mut ended: Vec<_> = jobs.iter().filter(|j| j.has_ended(how) && !j.metadata.is_deleting()).collect();
        ended.sort_by_key(|j| (j.status.start_time.clone(), j.metadata.name.clone()));
        for job in ended.iter().take(ended.len().saturating_sub(limit)) {
            plan.changes.push(delete(job));
        }
    }
}

struct Controller {
    client: Client,
    crons: Cache<CronJob>,
    jobs: Cache<Job>,
    recorder: Recorder,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let adds = queue.clone();
    let crons = feed::<CronJob, _>(&client, &CRON_JOBS, Scope::all(), &token, move |before, after| {
        if let Some(cron) = after.or(before) {
            adds.add(cron.metadata.key());
        }
    });
    let adds = queue.clone();
    let jobs = feed::<Job, _>(&client, &JOBS, Scope::all(), &token, move |before, after| {
        if let Some(owner) = after.or(before).and_then(|job| owner_key(&CRON_JOBS, &job.metadata)) {
            adds.add(owner);
        }
    });
    crons.synced().await;
    jobs.synced().await;
    let recorder = Recorder::new(&client, "cronjob-controller", "");
    let controller = Arc::new(Controller { client, crons, jobs, recorder });
    run_queue("cronjob", queue, 2, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(cron) = self.crons.get(key) else { return Ok(Outcome::Done) };
        let m = &cron.metadata;
        let about = ObjectRef::new("batch/v1", "CronJob", &m.namespace, &m.name, &m.uid);
        let warn = |reason: &str, message: String| self.recorder.event(&about, EventKind::Warning, reason, message);
        let zone = cron.spec.time_zone.as_deref().unwrap_or("Etc/UTC");
        if !matches!(zone, "Etc/UTC" | "UTC" | "") {
            warn(
                "UnknownTimeZone",
                format!("invalid timeZone: {zone:?}: only Etc/UTC is known here: write the schedule in UTC"),
            );
            return Ok(Outcome::Done);
        }
        let schedule = match Schedule::parse(&cron.spec.schedule) {
            Ok(schedule) => schedule,
            Err(error) => {
                warn("UnparseableCronJobSchedule", error.to_string());
                return Ok(Outcome::Done);
            }
        };
        let mut jobs = self.jobs.list_namespace(&key.namespace);
        jobs.retain(|j| j.metadata.controller().is_some_and(|c| c.uid == m.uid));
        let plan = plan(&cron, &jobs, &schedule, Timestamp::now());
        for change in &plan.changes {
            match act(&self.client, change).await {
                Ok(_) => {}
                // Made before, seen late.
                Err(error) if error.is_already_exists() || is_namespace_terminating(&error) => {}
                Err(error) => {
                    warn("FailedCreate", format!("Error creating job: {error}"));
                    return Err(error.into());
                }
            }
        }
        if would_change(&cron.status, &plan.status) {
            act(&self.client, &Change::status(CRON_JOBS, key.clone(), plan.status.clone())).await?;
        }
        for (reason, message) in plan.events {
            let kind = if reason == "MissSchedule" { EventKind::Warning } else { EventKind::Normal };
            self.recorder.event(&about, kind, reason, message);
        }
        // A second late rather than a second early: then the time has come for sure.
        Ok(plan.after.map_or(Outcome::Done, |seconds| Outcome::After(Duration::from_secs(seconds.unsigned_abs() + 1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cron(spec: Value, status: Value) -> CronJob {
        let mut value = json!({
            "metadata": {"name": "c", "namespace": "default", "uid": "c", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"schedule": "0 * * * *", "jobTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": {}}},
            "status": status,
        });
        if let (Some(target), Some(fields)) = (value["spec"].as_object_mut(), spec.as_object()) {
            target.extend(fields.clone());
        }
        serde_json::from_value(value).expect("the case is a CronJob")
    }

    fn job(name: &str, how: &str) -> Arc<Job> {
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name},
            "status": {"startTime": name, "conditions": [{"type": how, "status": "True"}]},
        });
        Arc::new(serde_json::from_value(value).expect("the case is a Job"))
    }

    fn lines(cron: &CronJob, jobs: &[Arc<Job>]) -> Vec<String> {
        let schedule = Schedule::parse(&cron.spec.schedule).expect("a schedule");
        let now = api::time::parse("2026-01-01T02:10:00Z").expect("a time");
        let line = |change: &Change| match change {
            Change::Create(_, job) => format!("+{}", job.name()),
            Change::Delete(_, key, _) => format!("-{}", key.name),
            other => format!("{other:?}"),
        };
        plan(cron, jobs, &schedule, now).changes.iter().map(line).collect()
    }

    #[test]
    fn what_happens_when() {
        let running = [job("r", "")];
        let history: Vec<_> = ["1", "2", "3", "4"].map(|n| job(n, "Complete")).into();
        let ran = json!({"lastScheduleTime": "2026-01-01T02:00:00Z"});
        for (title, spec, status, jobs, expected) in [
            ("missed times are made up for once", json!({}), json!({}), &[][..], vec!["+c-29453880"]),
            ("not twice", json!({}), ran.clone(), &[][..], vec![]),
            ("too late", json!({"startingDeadlineSeconds": 60}), json!({}), &[][..], vec![]),
            ("suspended", json!({"suspend": true}), json!({}), &[][..], vec![]),
            ("beside the one that runs", json!({}), json!({}), &running[..], vec!["+c-29453880"]),
            ("never beside it", json!({"concurrencyPolicy": "Forbid"}), json!({}), &running[..], vec![]),
            (
                "in its place",
                json!({"concurrencyPolicy": "Replace"}),
                json!({}),
                &running[..],
                vec!["-r", "+c-29453880"],
            ),
            ("history is cut", json!({}), ran, &history[..], vec!["-1"]),
        ] {
            assert_eq!(lines(&cron(spec, status), jobs), expected, "{title}");
        }
    }
}
