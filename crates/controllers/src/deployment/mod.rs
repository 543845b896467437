//! Moves a Deployment's pods from one template to the next, through ReplicaSets.
//!
//! `rollout` decides, `status` says how far it is, this file reads, acts and reports.

mod object;
mod rollout;
mod status;
#[cfg(test)]
mod tests;

use crate::owners::{claim, owner_key};
use crate::plan::{Change, act};
use crate::pods::Pod;
use crate::{Context, Descriptor, Error};
use api::kinds::{DEPLOYMENTS, EVENTS, PODS, REPLICA_SETS};
use api::object::Key;
use api::selector::LabelSelectorSpec;
use api::{LabelSelector, ObjectExt};
use jiff::Timestamp;
use object::{Deployment, ReplicaSet, Strategy};
use reconcile::{Api, ApiError, Cache, Client, EventKind, Outcome, Queue, Recorder, Scope};
use reconcile::{feed, run_queue};
use rollout::{Plan, plan};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "deployment",
    watches: &[DEPLOYMENTS, REPLICA_SETS, PODS],
    writes: &[REPLICA_SETS, DEPLOYMENTS, EVENTS],
    run: |context| Box::pin(run(context)),
};

struct Controller {
    client: Client,
    deployments: Cache<Deployment>,
    sets: Cache<ReplicaSet>,
    pods: Cache<Pod>,
    recorder: Recorder,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let adds = queue.clone();
    let deployments = feed::<Deployment, _>(&client, &DEPLOYMENTS, Scope::all(), &token, move |before, after| {
        if let Some(deployment) = after.or(before) {
            adds.add(deployment.metadata.key());
        }
    });
    let (adds, known) = (queue.clone(), deployments.clone());
    let sets = feed::<ReplicaSet, _>(&client, &REPLICA_SETS, Scope::all(), &token, move |before, after| {
        for owner in [before, after].into_iter().flatten().filter_map(|s| owner_key(&DEPLOYMENTS, &s.metadata)) {
            adds.add(owner);
        }
        let Some(orphan) = after.filter(|s| s.metadata.controller().is_none()) else { return };
        for deployment in known.list_namespace(&orphan.metadata.namespace) {
            if deployment.selector().is_ok_and(|s| s.matches_map(&orphan.metadata.labels)) {
                adds.add(deployment.metadata.key());
            }
        }
    });
    let (adds, known, parents) = (queue.clone(), deployments.clone(), sets.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        // Only Recreate waits for pods: for the last old one to end.
        let Some(pod) = before.filter(|_| after.is_none_or(|a| a.is_finished())) else { return };
        let set = owner_key(&REPLICA_SETS, &pod.metadata).and_then(|key| parents.get(&key));
        let owner = set.and_then(|s| owner_key(&DEPLOYMENTS, &s.metadata));
        let Some(deployment) = owner.and_then(|key| known.get(&key)) else { return };
        if deployment.spec.strategy() == Strategy::Recreate {
            adds.add(deployment.metadata.key());
        }
    });
    deployments.synced().await;
    sets.synced().await;
    pods.synced().await;
    let recorder = Recorder::new(&client, "deployment-controller", "");
    let controller = Arc::new(Controller { client, deployments, sets, pods, recorder });
    run_queue("deployment", queue, 4, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(deployment) = self.deployments.get(key) else { return Ok(Outcome::Done) };
        let selector = deployment.selector()?;
        if selector.is_empty() {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            self.recorder.event(&deployment.about(), EventKind::Warning, "SelectingAll", message);
            return Ok(Outcome::Done);
        }
        let claimed = claim(&deployment.metadata, &selector, self.sets.list_namespace(&key.namespace));
        let owned = claimed.settle(&self.client, &DEPLOYMENTS, &deployment.metadata, &REPLICA_SETS).await?;
        let pods = match deployment.spec.strategy() {
            Strategy::Recreate => self.pods.list_namespace(&key.namespace),
            Strategy::RollingUpdate { .. } => Vec::new(),
        };
        let Plan { create, changes, events, status, after } = plan(&deployment, &owned, &pods, Timestamp::now());
        if let Some(set) = create {
            self.create(&deployment, set).await?;
        }
        for change in &changes {
            act(&self.client, change).await?;
        }
        for message in events {
            self.recorder.event(&deployment.about(), EventKind::Normal, "ScalingReplicaSet", message);
        }
        if let Some(status) = status {
            act(&self.client, &Change::status(DEPLOYMENTS, key.clone(), status)).await?;
        }
        Ok(after.map_or(Outcome::Done, |seconds| Outcome::After(Duration::from_secs(seconds.unsigned_abs()))))
    }

    /// Creates the new ReplicaSet. Its name follows from the template, so one that is there is either ours, seen late,
    /// or somebody else's; then the next attempt uses another hash.
    async fn create(&self, deployment: &Deployment, set: serde_json::Value) -> Result<(), Error> {
        let api = Api::new(&self.client, &REPLICA_SETS);
        let namespace = &deployment.metadata.namespace;
        let error = match api.create(namespace, &set).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        let key = deployment.metadata.key();
        if error.is_already_exists() {
            let live = api.get(namespace, set.name()).await?;
            let is_ours = live.text("/metadata/ownerReferences/0/uid") == deployment.metadata.uid;
            if is_ours {
                return Ok(());
            }
            let collisions = deployment.collisions() + 1;
            act(&self.client, &Change::status(DEPLOYMENTS, key, json!({"collisionCount": collisions}))).await?;
            return Err(error.into());
        }
        if crate::plan::is_namespace_terminating(&error) {
            return Ok(());
        }
        self.report_failure(deployment, set.name(), &error).await?;
        Err(error.into())
    }

    async fn report_failure(&self, deployment: &Deployment, name: &str, error: &ApiError) -> Result<(), Error> {
        let message = format!("Failed to create new replica set {name:?}: {error}");
        self.recorder.event(&deployment.about(), EventKind::Warning, "ReplicaSetCreateError", message.clone());
        if let Some(status) = status::create_error(deployment, message, Timestamp::now()) {
            act(&self.client, &Change::status(DEPLOYMENTS, deployment.metadata.key(), status)).await?;
        }
        Ok(())
    }
}

impl Deployment {
    fn selector(&self) -> Result<LabelSelector, Error> {
        let spec: LabelSelectorSpec = serde_json::from_value(self.spec.selector.clone())
            .map_err(|e| Error::Object(format!("spec.selector: {e}")))?;
        Ok(LabelSelector::from_spec(&spec)?)
    }
}
