//! Keeps one pod of a template on every node that fits it.

mod plan;

use crate::expectations::{Expectations, PATIENCE, generated_name};
use crate::nodes::Node;
use crate::owners::claim;
use crate::plan::{Change, act, is_namespace_terminating, would_change};
use crate::pods::{self, Pod, next_available};
use crate::revisions::{self, CONTROLLER_REVISIONS, REVISION_LABEL, Revision};
use crate::{Context, Descriptor, Error};
use api::kinds::{DAEMON_SETS, EVENTS, NODES, PODS};
use api::object::Key;
use api::{LabelSelector, ObjectExt};
use jiff::Timestamp;
use plan::{DaemonSet, Seen, plan, status};
use reconcile::{Cache, Client, EventKind, ObjectRef, Outcome, Queue, Recorder, Scope, feed, run_queue};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "daemon-set",
    watches: &[DAEMON_SETS, NODES, PODS, CONTROLLER_REVISIONS],
    writes: &[PODS, DAEMON_SETS, CONTROLLER_REVISIONS, EVENTS],
    run: |context| Box::pin(run(context)),
};

struct Controller {
    client: Client,
    sets: Cache<DaemonSet>,
    nodes: Cache<Node>,
    pods: Cache<Pod>,
    revisions: Cache<Revision>,
    expectations: Arc<Expectations>,
    recorder: Recorder,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let expectations = Arc::new(Expectations::default());
    let adds = queue.clone();
    let sets = feed::<DaemonSet, _>(&client, &DAEMON_SETS, Scope::all(), &token, move |before, after| {
        if let Some(set) = after.or(before) {
            adds.add(set.metadata.key());
        }
    });
    let (adds, known) = (queue.clone(), sets.clone());
    let nodes = feed::<Node, _>(&client, &NODES, Scope::all(), &token, move |before, after| {
        let is_same =
            before.zip(after).is_some_and(|(b, a)| b.spec == a.spec && b.metadata.labels == a.metadata.labels);
        if !is_same {
            known.list().iter().for_each(|set| adds.add(set.metadata.key()));
        }
    });
    let (adds, seen) = (queue.clone(), expectations.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        for owner in pods::touched_owners(&DAEMON_SETS, &seen, before, after) {
            adds.add(owner);
        }
    });
    let revisions = feed::<Revision, _>(&client, &CONTROLLER_REVISIONS, Scope::all(), &token, |_, _| {});
    sets.synced().await;
    nodes.synced().await;
    pods.synced().await;
    revisions.synced().await;
    let recorder = Recorder::new(&client, "daemonset-controller", "");
    let controller = Arc::new(Controller { client, sets, nodes, pods, revisions, expectations, recorder });
    run_queue("daemon-set", queue, 2, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(set) = self.sets.get(key) else {
            self.expectations.forget(key);
            return Ok(Outcome::Done);
        };
        let is_current = self.expectations.are_met(key);
        let selector = LabelSelector::from_spec(&set.spec.selector)?;
        let claimed = claim(&set.metadata, &selector, self.pods.list_namespace(&key.namespace));
        let owned = claimed.settle(&self.client, &DAEMON_SETS, &set.metadata, &PODS).await?;
        let mut revisions = self.revisions.list_namespace(&key.namespace);
        revisions.retain(|r| r.metadata.controller().is_some_and(|c| c.uid == set.metadata.uid));
        let collisions = set.status.get("collisionCount").and_then(Value::as_i64).unwrap_or(0);
        let revision = revisions::current(&DAEMON_SETS, &set.metadata, &set.spec.template, &revisions, collisions);
        if let Some(change) = revision.change.as_ref().filter(|_| !set.metadata.is_deleting()) {
            match act(&self.client, change).await {
                // Ours, seen late: its name follows from the template.
                Err(error) if error.is_already_exists() => {}
                other => drop(other?),
            }
        }
        let (nodes, now) = (self.nodes.list(), Timestamp::now());
        let seen = Seen { set: &set, nodes: &nodes, pods: &owned, hash: &revision.hash, now };
        let mut failure = None;
        if is_current {
            for change in plan(&seen, || generated_name(&format!("{}-", key.name))) {
                if let Err(error) = self.change(key, &set, &change).await {
                    failure = Some(error);
                    break;
                }
            }
        }
        let wanted = status(&seen);
        if would_change(&set.status, &wanted) {
            act(&self.client, &Change::status(DAEMON_SETS, key.clone(), wanted)).await?;
        }
        if let Some(error) = failure {
            return Err(error);
        }
        let mut live: Vec<String> =
            owned.iter().filter_map(|p| p.metadata.labels.get(REVISION_LABEL).cloned()).collect();
        live.push(revision.hash.clone());
        for change in revisions::clean_up(&revisions, &live, set.spec.revision_history_limit.unwrap_or(10)) {
            act(&self.client, &change).await?;
        }
        Ok(match next_available(&owned, set.spec.min_ready_seconds, now) {
            Some(seconds) => Outcome::After(Duration::from_secs(seconds.unsigned_abs())),
            None if is_current => Outcome::Done,
            None => Outcome::After(PATIENCE),
        })
    }

    async fn change(&self, key: &Key, set: &DaemonSet, change: &Change) -> Result<(), Error> {
        let m = &set.metadata;
        let about = ObjectRef::new("apps/v1", "DaemonSet", &m.namespace, &m.name, &m.uid);
        let (reason, message) = match change {
            Change::Create(_, pod) => {
                self.expectations.expect_created(key, pod.name());
                ("SuccessfulCreate", format!("Created pod: {}", pod.name()))
            }
            Change::Delete(_, pod, removal) => {
                self.expectations.expect_deleted(key, removal.uid.as_deref().unwrap_or_default());
                ("SuccessfulDelete", format!("Deleted pod: {}", pod.name))
            }
            _ => return Ok(()),
        };
        let Err(error) = act(&self.client, change).await else {
            self.recorder.event(&about, EventKind::Normal, reason, message);
            return Ok(());
        };
        let (reason, verb) = match change {
            Change::Create(_, pod) => {
                self.expectations.saw_created(key, pod.name());
                ("FailedCreate", "creating")
            }
            Change::Delete(_, _, removal) => {
                self.expectations.saw_deleted(key, removal.uid.as_deref().unwrap_or_default());
                ("FailedDelete", "deleting")
            }
            _ => return Ok(()),
        };
        if is_namespace_terminating(&error) {
            return Ok(());
        }
        self.recorder.event(&about, EventKind::Warning, reason, format!("Error {verb}: {error}"));
        Err(error.into())
    }
}
