//! Keeps as many pods of a template as a ReplicaSet asks for.

use crate::conditions::{self, Condition};
use crate::expectations::{Expectations, PATIENCE, generated_name};
use crate::owners::{claim, controller_of};
use crate::plan::{Change, act, count, is_namespace_terminating, would_change};
use crate::pods::{self, Pod, next_available, sort_for_deletion};
use crate::{Context, Descriptor, Error, template};
use api::kinds::{EVENTS, PODS, REPLICA_SETS};
use api::object::{Key, Metadata};
use api::selector::LabelSelectorSpec;
use api::{LabelSelector, ObjectExt};
use futures::future::join_all;
use jiff::Timestamp;
use reconcile::{ApiError, Cache, Client, EventKind, Named, ObjectRef, Outcome, Queue, Recorder, Scope};
use reconcile::{feed, run_queue};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "replicaset",
    watches: &[REPLICA_SETS, PODS],
    writes: &[PODS, REPLICA_SETS, EVENTS],
    run: |context| Box::pin(run(context)),
};

/// No more pods than this are made or deleted before looking again.
const BURST: usize = 500;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ReplicaSet {
    metadata: Metadata,
    spec: Spec,
    status: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    replicas: Option<i64>,
    min_ready_seconds: i64,
    selector: LabelSelectorSpec,
    template: Value,
}

impl Named for ReplicaSet {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl ReplicaSet {
    fn about(&self) -> ObjectRef {
        let m = &self.metadata;
        ObjectRef::new("apps/v1", "ReplicaSet", &m.namespace, &m.name, &m.uid)
    }
}

/// The pods to make, or the pods to delete, so that there are as many as asked for.
///
/// `crowd` counts related pods per node; `name` gives each new pod its name.
fn plan(
    set: &ReplicaSet,
    owned: &[Arc<Pod>],
    crowd: &BTreeMap<String, usize>,
    mut name: impl FnMut() -> String,
) -> Vec<Change> {
    if set.metadata.is_deleting() {
        return Vec::new();
    }
    let wanted = usize::try_from(set.spec.replicas.unwrap_or(1)).unwrap_or(0);
    if owned.len() < wanted {
        let owner = controller_of(&REPLICA_SETS, &set.metadata);
        let missing = (wanted - owned.len()).min(BURST);
        let pod = |name: String| {
            let mut pod = template::pod(&set.spec.template, &set.metadata.namespace, &name, &owner);
            pod.metadata_mut().insert("generateName".into(), json!(format!("{}-", set.metadata.name)));
            Change::Create(PODS, pod)
        };
        return (0..missing).map(|_| pod(name())).collect();
    }
    let mut candidates = owned.to_vec();
    sort_for_deletion(&mut candidates, crowd);
    let surplus = (owned.len() - wanted).min(BURST);
    candidates[..surplus].iter().map(|p| Change::delete(PODS, p.metadata.key(), &p.metadata.uid)).collect()
}

/// The status that follows from the pods; `failure` is a reason and a message.
fn status(set: &ReplicaSet, owned: &[Arc<Pod>], failure: Option<(&str, String)>, now: Timestamp) -> Value {
    let labels = LabelSelector::from_map(&template::labels(&set.spec.template));
    let number =
        |matches: &dyn Fn(&Pod) -> bool| i64::try_from(owned.iter().filter(|p| matches(p)).count()).unwrap_or(i64::MAX);
    let mut conditions = conditions::read(&set.status);
    match failure {
        Some((reason, message)) => {
            conditions::set(&mut conditions, Condition::new("ReplicaFailure", "True", reason, message, now));
        }
        None => conditions::remove(&mut conditions, "ReplicaFailure"),
    }
    json!({
        "replicas": owned.len(),
        "fullyLabeledReplicas": count(number(&|p| labels.matches_map(&p.metadata.labels))),
        "readyReplicas": count(number(&Pod::is_ready)),
        "availableReplicas": count(number(&|p| p.is_available(set.spec.min_ready_seconds, now))),
        "observedGeneration": set.metadata.generation,
        "conditions": conditions::write(&conditions),
    })
}

struct Controller {
    client: Client,
    sets: Cache<ReplicaSet>,
    pods: Cache<Pod>,
    expectations: Arc<Expectations>,
    recorder: Recorder,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let expectations = Arc::new(Expectations::default());
    let adds = queue.clone();
    let sets = feed::<ReplicaSet, _>(&client, &REPLICA_SETS, Scope::all(), &token, move |before, after| {
        if let Some(set) = after.or(before) {
            adds.add(set.metadata.key());
        }
    });
    let (adds, seen, known) = (queue.clone(), expectations.clone(), sets.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        for owner in pods::touched_owners(&REPLICA_SETS, &seen, before, after) {
            adds.add(owner);
        }
        let Some(orphan) = after.filter(|p| p.metadata.controller().is_none()) else { return };
        for set in known.list_namespace(&orphan.metadata.namespace) {
            let selector = LabelSelector::from_spec(&set.spec.selector);
            if selector.is_ok_and(|s| s.matches_map(&orphan.metadata.labels)) {
                adds.add(set.metadata.key());
            }
        }
    });
    sets.synced().await;
    pods.synced().await;
    let recorder = Recorder::new(&client, "replicaset-controller", "");
    let controller = Arc::new(Controller { client, sets, pods, expectations, recorder });
    run_queue("replicaset", queue, 4, token, move |key: Key| {
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
        // Asked before the pods are listed: an expectation met in between is only met too late, never too early.
        let is_current = self.expectations.are_met(key);
        let selector = LabelSelector::from_spec(&set.spec.selector)?;
        let mut pods = self.pods.list_namespace(&key.namespace);
        pods.retain(|p| p.is_active());
        let claimed = claim(&set.metadata, &selector, pods);
        let owned = claimed.settle(&self.client, &REPLICA_SETS, &set.metadata, &PODS).await?;
        let mut failure = None;
        if is_current {
            let generate = || generated_name(&format!("{}-", set.metadata.name));
            let changes = plan(&set, &owned, &self.crowd(&set), generate);
            failure = self.scale(key, &set, changes).await;
        }
        let now = Timestamp::now();
        let reason = failure.as_ref().map(|(reason, error)| (*reason, error.to_string()));
        let wanted = status(&set, &owned, reason, now);
        if would_change(&set.status, &wanted) {
            act(&self.client, &Change::status(REPLICA_SETS, key.clone(), wanted)).await?;
        }
        if let Some((_, error)) = failure {
            return Err(error.into());
        }
        let later = next_available(&owned, set.spec.min_ready_seconds, now);
        Ok(match later {
            Some(seconds) => Outcome::After(Duration::from_secs(seconds.unsigned_abs())),
            None if is_current => Outcome::Done,
            None => Outcome::After(PATIENCE),
        })
    }

    /// How many pods of this set and its siblings of the same owner each node has.
    fn crowd(&self, set: &ReplicaSet) -> BTreeMap<String, usize> {
        let mut family = vec![set.metadata.uid.clone()];
        if let Some(owner) = set.metadata.controller() {
            let siblings = self.sets.list_namespace(&set.metadata.namespace);
            let related = siblings.iter().filter(|s| s.metadata.controller().is_some_and(|c| c.uid == owner.uid));
            family.extend(related.map(|s| s.metadata.uid.clone()));
        }
        let mut crowd: BTreeMap<String, usize> = BTreeMap::new();
        for pod in self.pods.list_namespace(&set.metadata.namespace) {
            if pod.is_active() && pod.metadata.controller().is_some_and(|c| family.contains(&c.uid)) {
                *crowd.entry(pod.spec.node_name.clone()).or_default() += 1;
            }
        }
        crowd
    }

    /// Does the plan in batches that double, so that a refusal is met once and not five hundred times.
    async fn scale(&self, key: &Key, set: &ReplicaSet, changes: Vec<Change>) -> Option<(&'static str, ApiError)> {
        let mut rest = changes.as_slice();
        let mut batch = 1;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(batch.min(rest.len()));
            let results = join_all(now.iter().map(|change| self.change(key, set, change))).await;
            if let Some(failure) = results.into_iter().find_map(Result::err) {
                return Some(failure);
            }
            rest = later;
            batch *= 2;
        }
        None
    }

    async fn change(&self, key: &Key, set: &ReplicaSet, change: &Change) -> Result<(), (&'static str, ApiError)> {
        let (name, uid) = match change {
            Change::Create(_, pod) => (pod.name().to_string(), None),
            Change::Delete(_, pod, removal) => (pod.name.clone(), removal.uid.clone()),
            _ => return Ok(()),
        };
        match &uid {
            None => self.expectations.expect_created(key, &name),
            Some(uid) => self.expectations.expect_deleted(key, uid),
        }
        let Err(error) = act(&self.client, change).await else {
            let (reason, verb) =
                if uid.is_none() { ("SuccessfulCreate", "Created") } else { ("SuccessfulDelete", "Deleted") };
            self.recorder.event(&set.about(), EventKind::Normal, reason, format!("{verb} pod: {name}"));
            return Ok(());
        };
        let (reason, verb) = match &uid {
            None => {
                self.expectations.saw_created(key, &name);
                ("FailedCreate", "creating")
            }
            Some(uid) => {
                self.expectations.saw_deleted(key, uid);
                ("FailedDelete", "deleting")
            }
        };
        if is_namespace_terminating(&error) {
            return Ok(());
        }
        self.recorder.event(&set.about(), EventKind::Warning, reason, format!("Error {verb}: {error}"));
        Err((reason, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(replicas: i64) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "set-uid", "generation": 3},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "a", "image": "b"}]}},
            },
            "status": {"replicas": 1, "conditions": [{"type": "ReplicaFailure", "status": "True"}]},
        }))
        .expect("the case is a ReplicaSet")
    }

    fn pod(name: &str, ready: bool) -> Arc<Pod> {
        let conditions = if ready { json!([{"type": "Ready", "status": "True"}]) } else { json!([]) };
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("{name}-uid"), "labels": {"app": "web"}},
            "spec": {"nodeName": "n1"},
            "status": {"phase": "Running", "conditions": conditions},
        });
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    fn planned(replicas: i64, owned: &[Arc<Pod>]) -> Vec<String> {
        let mut number = 0;
        let names = || {
            number += 1;
            format!("web-{number}")
        };
        let changes = plan(&set(replicas), owned, &BTreeMap::new(), names);
        let line = |change: &Change| match change {
            Change::Create(_, pod) => format!("+{}", pod.name()),
            Change::Delete(_, key, _) => format!("-{}", key.name),
            other => format!("{other:?}"),
        };
        changes.iter().map(line).collect()
    }

    #[test]
    fn as_many_pods_as_asked_for() {
        let two = [pod("a", true), pod("b", false)];
        for (replicas, owned, expected) in [
            (2, &two[..0], vec!["+web-1", "+web-2"]),
            (3, &two[..], vec!["+web-1"]),
            (2, &two[..], vec![]),
            (1, &two[..], vec!["-b"]),
            (0, &two[..], vec!["-b", "-a"]),
        ] {
            assert_eq!(planned(replicas, owned), expected, "{replicas} of {}", owned.len());
        }
    }

    #[test]
    fn a_new_pod_is_the_template_with_an_owner() {
        let changes = plan(&set(1), &[], &BTreeMap::new(), || "web-x".into());
        let Some(Change::Create(_, pod)) = changes.first() else { panic!("a pod is created") };
        assert_eq!(pod.text("/metadata/generateName"), "web-");
        assert_eq!(pod.text("/metadata/labels/app"), "web");
        assert_eq!(pod.text("/metadata/ownerReferences/0/uid"), "set-uid");
        assert_eq!(pod.text("/spec/containers/0/image"), "b");
    }

    #[test]
    fn status_counts_and_forgets_a_failure_that_passed() {
        let now = Timestamp::UNIX_EPOCH;
        let status = status(&set(2), &[pod("a", true), pod("b", false)], None, now);
        assert_eq!(
            status,
            json!({
                "replicas": 2, "fullyLabeledReplicas": 2, "readyReplicas": 1, "availableReplicas": 1,
                "observedGeneration": 3, "conditions": null,
            })
        );
    }
}
