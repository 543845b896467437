//! Keeps a row of pods, each with a name, a host name and storage of its own.

mod plan;

use crate::expectations::{Expectations, PATIENCE};
use crate::owners::claim;
use crate::plan::{Change, act, is_namespace_terminating, would_change};
use crate::pods::{self, Pod, next_available};
use crate::revisions::{self, CONTROLLER_REVISIONS};
use crate::{Context, Descriptor, Error};
use api::kinds::{EVENTS, PODS, STATEFUL_SETS};
use api::object::Key;
use api::{LabelSelector, ObjectExt};
use jiff::Timestamp;
use plan::{CLAIMS, Revision, Seen, StatefulSet, plan, status};
use reconcile::{Cache, Client, EventKind, ObjectRef, Outcome, Queue, Recorder, Scope, feed, run_queue};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "statefulset",
    watches: &[STATEFUL_SETS, PODS, CONTROLLER_REVISIONS],
    writes: &[PODS, CLAIMS, STATEFUL_SETS, CONTROLLER_REVISIONS, EVENTS],
    run: |context| Box::pin(run(context)),
};

struct Controller {
    client: Client,
    sets: Cache<StatefulSet>,
    pods: Cache<Pod>,
    revisions: Cache<revisions::Revision>,
    expectations: Arc<Expectations>,
    recorder: Recorder,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let expectations = Arc::new(Expectations::default());
    let adds = queue.clone();
    let sets = feed::<StatefulSet, _>(&client, &STATEFUL_SETS, Scope::all(), &token, move |before, after| {
        if let Some(set) = after.or(before) {
            adds.add(set.metadata.key());
        }
    });
    let (adds, seen) = (queue.clone(), expectations.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        for owner in pods::touched_owners(&STATEFUL_SETS, &seen, before, after) {
            adds.add(owner);
        }
    });
    let revisions = feed::<revisions::Revision, _>(&client, &CONTROLLER_REVISIONS, Scope::all(), &token, |_, _| {});
    sets.synced().await;
    pods.synced().await;
    revisions.synced().await;
    let recorder = Recorder::new(&client, "statefulset-controller", "");
    let controller = Arc::new(Controller { client, sets, pods, revisions, expectations, recorder });
    run_queue("statefulset", queue, 2, token, move |key: Key| {
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
        let owned = claimed.settle(&self.client, &STATEFUL_SETS, &set.metadata, &PODS).await?;
        let (current, update) = self.revisions(&set).await?;
        let now = Timestamp::now();
        let seen = Seen { set: &set, pods: &owned, current: &current, update: &update, now };
        let mut failure = None;
        if is_current {
            for change in plan(&seen) {
                if let Err(error) = self.change(key, &set, &change).await {
                    failure = Some(error);
                    break;
                }
            }
        }
        let wanted = status(&seen);
        if would_change(&set.status, &wanted) {
            act(&self.client, &Change::status(STATEFUL_SETS, key.clone(), wanted)).await?;
        }
        if let Some(error) = failure {
            return Err(error);
        }
        Ok(match next_available(&owned, set.spec.min_ready_seconds, now) {
            Some(seconds) => Outcome::After(Duration::from_secs(seconds.unsigned_abs())),
            None if is_current => Outcome::Done,
            None => Outcome::After(PATIENCE),
        })
    }

    /// The revision that the set has been, and the one that it is to be.
    async fn revisions(&self, set: &StatefulSet) -> Result<(Revision, Revision), Error> {
        let mut owned = self.revisions.list_namespace(&set.metadata.namespace);
        owned.retain(|r| r.metadata.controller().is_some_and(|c| c.uid == set.metadata.uid));
        let collisions = set.status.get("collisionCount").and_then(Value::as_i64).unwrap_or(0);
        let found = revisions::current(&STATEFUL_SETS, &set.metadata, &set.spec.template, &owned, collisions);
        if let Some(change) = found.change.as_ref().filter(|_| !set.metadata.is_deleting()) {
            match act(&self.client, change).await {
                // Ours, seen late: its name follows from the template.
                Err(error) if error.is_already_exists() => {}
                other => drop(other?),
            }
        }
        let before = set.status.text("/currentRevision");
        let current = owned.iter().find(|r| r.metadata.name == before);
        let update = Revision { name: found.name, template: set.spec.template.clone() };
        let current = current.map_or_else(
            || Revision { name: update.name.clone(), template: update.template.clone() },
            |r| Revision { name: before.into(), template: r.template() },
        );
        let live = [current.name.clone(), update.name.clone()];
        for change in revisions::clean_up(&owned, &live, set.spec.revision_history_limit.unwrap_or(10)) {
            act(&self.client, &change).await?;
        }
        Ok((current, update))
    }

    async fn change(&self, key: &Key, set: &StatefulSet, change: &Change) -> Result<(), Error> {
        let m = &set.metadata;
        let about = ObjectRef::new("apps/v1", "StatefulSet", &m.namespace, &m.name, &m.uid);
        let (reason, message) = match change {
            Change::Create(resource, claim) if *resource == CLAIMS => {
                return match act(&self.client, change).await {
                    Ok(_) => {
                        let message = format!("create Claim {} in StatefulSet {} success", claim.name(), m.name);
                        self.recorder.event(&about, EventKind::Normal, "SuccessfulCreate", message);
                        Ok(())
                    }
                    // It was there before the pod, as it should be when a pod comes back.
                    Err(error) if error.is_already_exists() || is_namespace_terminating(&error) => Ok(()),
                    Err(error) => Err(error.into()),
                };
            }
            Change::Create(_, pod) => {
                self.expectations.expect_created(key, pod.name());
                ("SuccessfulCreate", format!("create Pod {} in StatefulSet {} successful", pod.name(), m.name))
            }
            Change::Delete(_, pod, removal) => {
                self.expectations.expect_deleted(key, removal.uid.as_deref().unwrap_or_default());
                ("SuccessfulDelete", format!("delete Pod {} in StatefulSet {} successful", pod.name, m.name))
            }
            _ => return Ok(()),
        };
        let Err(error) = act(&self.client, change).await else {
            self.recorder.event(&about, EventKind::Normal, reason, message);
            return Ok(());
        };
        let reason = match change {
            Change::Create(_, pod) => {
                self.expectations.saw_created(key, pod.name());
                "FailedCreate"
            }
            Change::Delete(_, _, removal) => {
                self.expectations.saw_deleted(key, removal.uid.as_deref().unwrap_or_default());
                "FailedDelete"
            }
            _ => return Ok(()),
        };
        if is_namespace_terminating(&error) {
            return Ok(());
        }
        let message = message.replace("successful", &format!("failed error: {error}"));
        self.recorder.event(&about, EventKind::Warning, reason, message);
        Err(error.into())
    }
}
