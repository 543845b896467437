//! Runs pods to their end, as many as a Job asks for.

mod plan;

use crate::expectations::{Expectations, PATIENCE, generated_name};
use crate::owners::owner_key;
use crate::plan::{Change, Removal, act, is_namespace_terminating, would_change};
use crate::pods;
use crate::{Context, Descriptor, Error};
use api::ObjectExt;
use api::kinds::{EVENTS, PODS};
use api::object::Key;
use jiff::Timestamp;
use plan::{FINALIZER, JOBS, Job, Plan, Pod, plan};
use reconcile::{Api, Cache, Client, EventKind, ObjectRef, Outcome, Queue, Recorder, Scope, feed, run_queue};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "job",
    watches: &[JOBS, PODS],
    writes: &[PODS, JOBS, EVENTS],
    run: |context| Box::pin(run(context)),
};

struct Controller {
    client: Client,
    jobs: Cache<Job>,
    pods: Cache<Pod>,
    expectations: Arc<Expectations>,
    recorder: Recorder,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let expectations = Arc::new(Expectations::default());
    let adds = queue.clone();
    let jobs = feed::<Job, _>(&client, &JOBS, Scope::all(), &token, move |before, after| {
        if let Some(job) = after.or(before) {
            adds.add(job.metadata.key());
        }
    });
    let (adds, seen) = (queue.clone(), expectations.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        for owner in pods::touched_owners(&JOBS, &seen, before, after) {
            adds.add(owner);
        }
    });
    jobs.synced().await;
    pods.synced().await;
    let recorder = Recorder::new(&client, "job-controller", "");
    let controller = Arc::new(Controller { client, jobs, pods, expectations, recorder });
    run_queue("job", queue, 4, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let is_current = self.expectations.are_met(key);
        let mut pods = self.pods.list_namespace(&key.namespace);
        pods.retain(|p| owner_key(&JOBS, &p.metadata).is_some_and(|owner| owner == *key));
        let job = self.jobs.get(key);
        let uid = job.as_ref().map(|j| j.metadata.uid.clone()).unwrap_or_default();
        let (owned, strangers): (Vec<_>, Vec<_>) =
            pods.into_iter().partition(|p| p.metadata.controller().is_some_and(|c| c.uid == uid));
        if !strangers.is_empty() {
            self.release(key, &uid, &strangers).await?;
        }
        let Some(job) = job else {
            self.expectations.forget(key);
            return Ok(Outcome::Done);
        };
        if job.metadata.is_deleting() {
            // Nothing is counted any more; nothing holds its pods back.
            for pod in &owned {
                self.drop_finalizer(pod).await?;
            }
            return Ok(Outcome::Done);
        }
        if !is_current {
            return Ok(Outcome::After(PATIENCE));
        }
        let now = Timestamp::now();
        let suffix = || generated_name("");
        let Plan { status, delete, create, counted, end, after } = plan(&job, &owned, now, suffix);
        for change in &delete {
            self.delete(key, &job, change).await?;
        }
        for change in &create {
            self.create(key, &job, change).await?;
        }
        // Written against the version that was counted from: counting from an older one would lose a pod.
        if would_change(&job.held, &status) {
            let body = json!({"metadata": {"resourceVersion": job.metadata.resource_version}, "status": status});
            act(&self.client, &Change::PatchStatus(JOBS, key.clone(), body)).await?;
            if let Some((reason, message)) = end {
                let kind = if reason == "Completed" { EventKind::Normal } else { EventKind::Warning };
                let message = if reason == "Completed" { "Job completed".into() } else { message };
                self.recorder.event(&about(&job), kind, reason, message);
            }
        }
        for pod in &counted {
            self.drop_finalizer(pod).await?;
        }
        if let Some(outcome) = self.expire(key, &job, now).await? {
            return Ok(outcome);
        }
        Ok(after.map_or(Outcome::Done, |seconds| Outcome::After(Duration::from_secs(seconds.unsigned_abs()))))
    }

    /// Pods whose Job is gone are not held back by a finalizer that nobody takes away.
    async fn release(&self, key: &Key, known: &str, pods: &[Arc<Pod>]) -> Result<(), Error> {
        let live = Api::new(&self.client, &JOBS).find(&key.namespace, &key.name).await?;
        let live = live.as_ref().map(|job| job.uid()).unwrap_or_default();
        for pod in pods {
            let owner = pod.metadata.controller().map(|c| c.uid.as_str()).unwrap_or_default();
            if owner != live && owner != known {
                self.drop_finalizer(pod).await?;
            }
        }
        Ok(())
    }

    async fn drop_finalizer(&self, pod: &Pod) -> Result<(), Error> {
        let metadata = &pod.metadata;
        if !metadata.finalizers.iter().any(|f| f == FINALIZER) {
            return Ok(());
        }
        let kept: Vec<&String> = metadata.finalizers.iter().filter(|f| *f != FINALIZER).collect();
        let body = json!({"metadata": {
            "uid": metadata.uid, "resourceVersion": metadata.resource_version, "finalizers": kept,
        }});
        match act(&self.client, &Change::Patch(PODS, metadata.key(), body)).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn create(&self, key: &Key, job: &Job, change: &Change) -> Result<(), Error> {
        let Change::Create(_, pod) = change else { return Ok(()) };
        self.expectations.expect_created(key, pod.name());
        let Err(error) = act(&self.client, change).await else {
            let message = format!("Created pod: {}", pod.name());
            self.recorder.event(&about(job), EventKind::Normal, "SuccessfulCreate", message);
            return Ok(());
        };
        self.expectations.saw_created(key, pod.name());
        if is_namespace_terminating(&error) {
            return Ok(());
        }
        self.recorder.event(&about(job), EventKind::Warning, "FailedCreate", format!("Error creating: {error}"));
        Err(error.into())
    }

    async fn delete(&self, key: &Key, job: &Job, change: &Change) -> Result<(), Error> {
        let Change::Delete(_, pod, Removal { uid: Some(uid), .. }) = change else { return Ok(()) };
        self.expectations.expect_deleted(key, uid);
        if let Err(error) = act(&self.client, change).await {
            self.expectations.saw_deleted(key, uid);
            return Err(error.into());
        }
        let message = format!("Deleted pod: {}", pod.name);
        self.recorder.event(&about(job), EventKind::Normal, "SuccessfulDelete", message);
        Ok(())
    }

    /// Deletes a Job that ended long enough ago, if it says how long that is.
    async fn expire(&self, key: &Key, job: &Job, now: Timestamp) -> Result<Option<Outcome>, Error> {
        let Some(end) = job.finished().and_then(|c| c.since()) else { return Ok(None) };
        let Some(ttl) = job.spec.ttl_seconds_after_finished else { return Ok(Some(Outcome::Done)) };
        let left = end.as_second() + ttl - now.as_second();
        if left > 0 {
            return Ok(Some(Outcome::After(Duration::from_secs(left.unsigned_abs()))));
        }
        let removal =
            Removal { uid: Some(job.metadata.uid.clone()), propagation: Some("Foreground"), ..Removal::default() };
        act(&self.client, &Change::Delete(JOBS, key.clone(), removal)).await?;
        Ok(Some(Outcome::Done))
    }
}

fn about(job: &Job) -> ObjectRef {
    let m = &job.metadata;
    ObjectRef::new("batch/v1", "Job", &m.namespace, &m.name, &m.uid)
}
