//! The decisions of a rollout: which ReplicaSet is new, and how many pods each one may have now.
//!
//! One call decides one step. What it changes comes back as events of the watch, and the next step follows from them.

use super::object::{DESIRED, Deployment, MAXIMUM, REVISION, REVISION_HISTORY, ReplicaSet, Strategy};
use super::status;
use crate::conditions::{self, Condition};
use crate::owners::controller_of;
use crate::plan::{Change, would_change};
use crate::pods::Pod;
use crate::template::{self, HASH_LABEL};
use api::kinds::{DEPLOYMENTS, REPLICA_SETS};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Annotations of a Deployment that are not its ReplicaSets'.
const OWN_ANNOTATIONS: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAXIMUM,
    "deprecated.deployment.rollback.to",
];

/// One step of a rollout.
#[derive(Debug, Default)]
pub struct Plan {
    /// A ReplicaSet to create before all else.
    pub create: Option<Value>,
    pub changes: Vec<Change>,
    /// Messages of `ScalingReplicaSet` events.
    pub events: Vec<String>,
    /// A merge patch of the status, if it changes anything.
    pub status: Option<Value>,
    /// Seconds after which time alone may change the decision.
    pub after: Option<i64>,
}

/// A ReplicaSet with what is to become of it.
pub(super) struct View {
    pub set: Arc<ReplicaSet>,
    pub replicas: i64,
    annotations: BTreeMap<String, String>,
    min_ready_seconds: i64,
}

impl View {
    fn of(set: Arc<ReplicaSet>) -> View {
        let (replicas, min_ready_seconds) = (set.replicas(), set.spec.min_ready_seconds);
        View { set, replicas, annotations: BTreeMap::new(), min_ready_seconds }
    }

    fn annotate(&mut self, key: &str, value: &str) {
        if self.set.metadata.annotations.get(key).map(String::as_str) == Some(value) {
            self.annotations.remove(key);
        } else {
            self.annotations.insert(key.into(), value.into());
        }
    }

    fn available(&self) -> i64 {
        self.set.status.available_replicas
    }

    fn change(&self) -> Option<Change> {
        let metadata = &self.set.metadata;
        let mut spec = serde_json::Map::new();
        if self.replicas != self.set.replicas() {
            spec.insert("replicas".into(), json!(self.replicas));
        }
        if self.min_ready_seconds != self.set.spec.min_ready_seconds {
            spec.insert("minReadySeconds".into(), json!(self.min_ready_seconds));
        }
        if spec.is_empty() && self.annotations.is_empty() {
            return None;
        }
        let mut body = json!({"metadata": {"resourceVersion": metadata.resource_version}, "spec": spec});
        if !self.annotations.is_empty() {
            body["metadata"]["annotations"] = json!(self.annotations);
        }
        Some(Change::Patch(REPLICA_SETS, metadata.key(), body))
    }
}

/// A rollout being decided.
pub(super) struct Rollout<'a> {
    pub deployment: &'a Deployment,
    pub new: Option<View>,
    pub old: Vec<View>,
    pub conditions: Vec<Condition>,
    pub now: Timestamp,
    create: Option<Value>,
    deletions: Vec<Change>,
    revision: Option<String>,
    events: Vec<String>,
}

/// Decides the next step. `pods` are those of the namespace; only Recreate looks at them.
pub fn plan(deployment: &Deployment, owned: &[Arc<ReplicaSet>], pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut rollout = Rollout::new(deployment, owned, now);
    if deployment.metadata.is_deleting() {
        return rollout.finish(Progress::Unjudged);
    }
    rollout.note_pause();
    if deployment.spec.paused || rollout.is_being_scaled() {
        rollout.revise_existing();
        rollout.scale();
        if deployment.spec.paused {
            rollout.clean_up();
        }
        return rollout.finish(Progress::Unjudged);
    }
    match deployment.spec.strategy() {
        Strategy::Recreate => rollout.recreate(pods),
        Strategy::RollingUpdate { .. } => rollout.roll(),
    }
    rollout.finish(Progress::Judged)
}

/// Whether this step says anything about the rollout's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Judged,
    /// The Deployment is scaled, paused or going: its clock stands still.
    Unjudged,
}

impl<'a> Rollout<'a> {
    fn new(deployment: &'a Deployment, owned: &[Arc<ReplicaSet>], now: Timestamp) -> Rollout<'a> {
        let mut sets = owned.to_vec();
        sets.sort_by(|a, b| age(a).cmp(&age(b)));
        let wanted = template::canonical(&deployment.spec.template);
        // By template, as upstream; or by name, which follows from it: a server may default the two templates unlike.
        let name = set_name(deployment);
        let same = sets.iter().position(|s| template::canonical(&s.spec.template) == wanted);
        let position = same.or_else(|| sets.iter().position(|s| s.metadata.name == name));
        let new = position.map(|i| View::of(sets.remove(i)));
        Rollout {
            deployment,
            new,
            old: sets.into_iter().map(View::of).collect(),
            conditions: conditions::read(&deployment.status),
            now,
            create: None,
            deletions: Vec::new(),
            revision: None,
            events: Vec::new(),
        }
    }

    /// All sets, the new one last.
    pub fn all(&self) -> impl Iterator<Item = &View> {
        self.old.iter().chain(&self.new)
    }

    fn total(&self) -> i64 {
        self.all().map(|v| v.replicas).sum()
    }

    fn wanted(&self) -> i64 {
        self.deployment.spec.replicas()
    }

    fn progressing(&mut self, status: &str, reason: &str, message: String) {
        conditions::set(
            &mut self.conditions,
            Condition::new("Progressing", status, reason, message, self.now).updated(),
        );
    }

    fn note_pause(&mut self) {
        if self.deployment.spec.deadline().is_none() {
            return;
        }
        let reason = conditions::find(&self.conditions, "Progressing").map(|c| c.reason.clone()).unwrap_or_default();
        if reason == "ProgressDeadlineExceeded" {
            return;
        }
        if self.deployment.spec.paused && reason != "DeploymentPaused" {
            self.progressing("Unknown", "DeploymentPaused", "Deployment is paused".into());
        } else if !self.deployment.spec.paused && reason == "DeploymentPaused" {
            self.progressing("Unknown", "DeploymentResumed", "Deployment is resumed".into());
        }
    }

    /// Whether the wanted number changed since the sets were last sized; then the change is spread before anything rolls on.
    fn is_being_scaled(&self) -> bool {
        let wanted = self.wanted();
        self.all().any(|v| v.replicas > 0 && v.set.number(DESIRED).is_some_and(|desired| desired != wanted))
    }

    /// Gives a set a size and, with it, the sizes that a later change is proportioned by.
    fn resize(&mut self, which: Which, size: i64) {
        let (wanted, surge) = (self.deployment.spec.replicas(), self.deployment.spec.max_surge());
        let view = match which {
            Which::New => self.new.as_mut(),
            Which::Old(index) => self.old.get_mut(index),
        };
        let Some(view) = view else { return };
        view.annotate(DESIRED, &wanted.to_string());
        view.annotate(MAXIMUM, &(wanted + surge).to_string());
        let (before, name) = (view.replicas, &view.set.metadata.name);
        if size == before {
            return;
        }
        let direction = if size > before { "up" } else { "down" };
        self.events.push(format!("Scaled {direction} replica set {name} from {before} to {size}"));
        view.replicas = size;
    }

    fn next_revision(&self) -> i64 {
        self.old.iter().map(|v| v.set.revision()).max().unwrap_or(0) + 1
    }

    /// Gives the new set, if it is there, its revision and the Deployment's annotations.
    fn revise_existing(&mut self) {
        let revision = self.next_revision();
        let deployment = self.deployment;
        let Some(view) = self.new.as_mut() else { return };
        for (key, value) in inherited(deployment) {
            view.annotate(key, value);
        }
        let before = view.set.revision();
        if before < revision {
            view.annotate(REVISION, &revision.to_string());
            if before > 0 {
                let history = view.set.metadata.annotations.get(REVISION_HISTORY).filter(|h| !h.is_empty());
                let history = history.map_or_else(|| before.to_string(), |h| format!("{h},{before}"));
                view.annotate(REVISION_HISTORY, &history);
            }
        }
        view.min_ready_seconds = deployment.spec.min_ready_seconds;
        self.revision = Some(before.max(revision).to_string());
        let name = view.set.metadata.name.clone();
        let is_unjudged = conditions::find(&self.conditions, "Progressing").is_none();
        if is_unjudged && deployment.spec.deadline().is_some() {
            self.progressing("True", "FoundNewReplicaSet", format!("Found new replica set {name:?}"));
        }
    }

    /// Makes sure that there is a new set.
    fn revise_or_create(&mut self) {
        if self.new.is_some() {
            return self.revise_existing();
        }
        let deployment = self.deployment;
        let (hash, name) = (set_hash(deployment), set_name(deployment));
        let revision = self.next_revision().to_string();
        let (wanted, replicas) = (self.wanted(), self.size_of_new(0));
        let mut annotations: BTreeMap<&str, String> = inherited(deployment).map(|(k, v)| (k, v.to_string())).collect();
        annotations.insert(REVISION, revision.clone());
        annotations.insert(DESIRED, wanted.to_string());
        annotations.insert(MAXIMUM, (wanted + deployment.spec.max_surge()).to_string());
        let mut template = deployment.spec.template.clone();
        template["metadata"]["labels"][HASH_LABEL] = json!(hash);
        let mut selector = deployment.spec.selector.clone();
        selector["matchLabels"][HASH_LABEL] = json!(hash);
        let set = json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {
                "name": name, "namespace": deployment.metadata.namespace,
                "labels": template["metadata"]["labels"], "annotations": annotations,
                "ownerReferences": [controller_of(&DEPLOYMENTS, &deployment.metadata)],
            },
            "spec": {
                "replicas": replicas, "minReadySeconds": deployment.spec.min_ready_seconds,
                "selector": selector, "template": template,
            },
        });
        if replicas > 0 {
            self.events.push(format!("Scaled up replica set {name} from 0 to {replicas}"));
        }
        if deployment.spec.deadline().is_some() {
            self.progressing("True", "NewReplicaSetCreated", format!("Created new replica set {name:?}"));
        }
        let view: ReplicaSet = serde_json::from_value(set.clone()).expect("made two lines above");
        self.new = Some(View::of(Arc::new(view)));
        self.revision = Some(revision);
        self.create = Some(set);
    }

    /// How many pods the new set may have, which has `current` now.
    fn size_of_new(&self, current: i64) -> i64 {
        let wanted = self.wanted();
        match self.deployment.spec.strategy() {
            Strategy::Recreate => wanted,
            Strategy::RollingUpdate { max_surge, .. } => {
                let room = (wanted + max_surge - self.total()).max(0);
                current + room.min(wanted - current).max(0)
            }
        }
    }

    fn reconcile_new(&mut self) -> bool {
        let wanted = self.wanted();
        let Some(current) = self.new.as_ref().map(|v| v.replicas) else { return false };
        let size = if current > wanted { wanted } else { self.size_of_new(current) };
        if size != current {
            self.resize(Which::New, size);
        }
        size != current
    }

    fn roll(&mut self) {
        self.revise_or_create();
        if self.reconcile_new() || self.shrink_old() {
            return;
        }
        if status::is_complete(self.deployment, &self.deployment.status) {
            self.clean_up();
        }
    }

    /// Takes from the old sets what may go: first pods that do not serve anyway, then as many as are available beyond the least.
    fn shrink_old(&mut self) -> bool {
        if self.old.iter().all(|v| v.replicas == 0) {
            return false;
        }
        let least = self.wanted() - self.deployment.spec.max_unavailable();
        let unavailable_new = self.new.as_ref().map_or(0, |v| v.replicas - v.available());
        let may_go = self.total() - least - unavailable_new;
        if may_go <= 0 {
            return false;
        }
        let mut gone = 0;
        for index in 0..self.old.len() {
            let view = &self.old[index];
            let unhealthy = (view.replicas - view.available()).clamp(0, may_go - gone);
            let size = view.replicas - unhealthy;
            if unhealthy > 0 {
                self.resize(Which::Old(index), size);
                gone += unhealthy;
            }
        }
        let available: i64 = self.all().map(View::available).sum();
        let mut spare = (available - least).max(0);
        for index in 0..self.old.len() {
            let view = &self.old[index];
            let step = view.replicas.min(spare);
            let size = view.replicas - step;
            if step > 0 {
                self.resize(Which::Old(index), size);
                spare -= step;
                gone += step;
            }
        }
        gone > 0
    }

    fn recreate(&mut self, pods: &[Arc<Pod>]) {
        self.revise_existing();
        let active: Vec<_> = (0..self.old.len()).filter(|i| self.old[*i].replicas > 0).collect();
        if !active.is_empty() {
            for index in active {
                self.resize(Which::Old(index), 0);
            }
            return;
        }
        let is_old = |uid: &str| self.old.iter().any(|v| v.set.metadata.uid == uid);
        let is_running = |pod: &Pod| !pod.is_finished() && pod.metadata.controller().is_some_and(|c| is_old(&c.uid));
        if pods.iter().any(|p| is_running(p)) {
            return;
        }
        self.revise_or_create();
        self.reconcile_new();
        if status::is_complete(self.deployment, &self.deployment.status) {
            self.clean_up();
        }
    }

    /// Gives a changed number to the sets: to the only one, or in proportion to their sizes.
    fn scale(&mut self) {
        let wanted = self.wanted();
        let mut active: Vec<Which> =
            (0..self.old.len()).filter(|i| self.old[*i].replicas > 0).map(Which::Old).collect();
        if self.new.as_ref().is_some_and(|v| v.replicas > 0) {
            active.push(Which::New);
        }
        match active.as_slice() {
            [] => {
                let latest =
                    if self.new.is_some() { Some(Which::New) } else { self.old.len().checked_sub(1).map(Which::Old) };
                if let Some(latest) = latest {
                    self.resize(latest, wanted);
                }
                return;
            }
            [one] => return self.resize(*one, wanted),
            _ => {}
        }
        let is_saturated = self
            .new
            .as_ref()
            .is_some_and(|v| v.replicas == wanted && v.set.number(DESIRED) == Some(wanted) && v.available() == wanted);
        if is_saturated {
            for index in 0..self.old.len() {
                self.resize(Which::Old(index), 0);
            }
            return;
        }
        let surge = self.deployment.spec.max_surge();
        let allowed = if wanted > 0 { wanted + surge } else { 0 };
        let to_add = match self.deployment.spec.strategy() {
            Strategy::RollingUpdate { .. } => allowed - self.total(),
            Strategy::Recreate => 0,
        };
        // Larger sets first; of two alike the newer one gains and the older one loses first.
        active.sort_by_key(|which| {
            let view = self.view(*which);
            let rank = if *which == Which::New { self.old.len() } else { which.index() };
            let rank = i64::try_from(rank).unwrap_or(i64::MAX);
            (-view.replicas, if to_add > 0 { -rank } else { rank })
        });
        let mut sizes: Vec<(Which, i64)> = Vec::new();
        let mut added = 0;
        for which in active {
            let view = self.view(which);
            let share = if to_add == 0 { 0 } else { share(view, self.deployment, wanted + surge, to_add, added) };
            added += share;
            sizes.push((which, view.replicas + share));
        }
        // What rounding left over goes to the first.
        if let Some((_, size)) = sizes.first_mut() {
            *size = (*size + to_add - added).max(0);
        }
        for (which, size) in sizes {
            self.resize(which, size.max(0));
        }
    }

    fn view(&self, which: Which) -> &View {
        match which {
            Which::New => self.new.as_ref().expect("only named when it is there"),
            Which::Old(index) => &self.old[index],
        }
    }

    /// Deletes old sets beyond the history that is kept.
    fn clean_up(&mut self) {
        let Some(limit) = self.deployment.spec.revision_history_limit else { return };
        let surplus = i64::try_from(self.old.len()).unwrap_or(i64::MAX) - limit;
        let mut candidates: Vec<&View> = self.old.iter().filter(|v| !v.set.metadata.is_deleting()).collect();
        candidates.sort_by_key(|v| v.set.revision());
        for view in candidates.into_iter().take(usize::try_from(surplus).unwrap_or(0)) {
            let (metadata, status) = (&view.set.metadata, &view.set.status);
            let is_settled = metadata.generation <= status.observed_generation;
            if view.replicas == 0 && view.set.replicas() == 0 && status.replicas == 0 && is_settled {
                self.deletions.push(Change::delete(REPLICA_SETS, metadata.key(), &metadata.uid));
            }
        }
    }

    fn finish(mut self, progress: Progress) -> Plan {
        let wanted = status::of(&mut self, progress == Progress::Judged);
        let after = (progress == Progress::Judged).then(|| status::deadline_in(&self, &wanted)).flatten();
        let created = usize::from(self.create.is_some());
        let existing = self.old.iter().chain(self.new.iter().skip(created));
        let mut changes: Vec<Change> = existing.filter_map(View::change).collect();
        changes.append(&mut self.deletions);
        if let Some(revision) = self.revision
            && self.deployment.metadata.annotations.get(REVISION) != Some(&revision)
        {
            let body = json!({"metadata": {"annotations": {REVISION: revision}}});
            changes.push(Change::Patch(DEPLOYMENTS, self.deployment.metadata.key(), body));
        }
        let status = would_change(&self.deployment.status, &wanted).then_some(wanted);
        Plan { create: self.create, changes, events: self.events, status, after }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    New,
    Old(usize),
}

impl Which {
    fn index(self) -> usize {
        match self {
            Which::New => 0,
            Which::Old(index) => index,
        }
    }
}

/// A set's part of a change, in proportion to its part of what the Deployment was.
fn share(view: &View, deployment: &Deployment, maximum: i64, to_add: i64, added: i64) -> i64 {
    if view.replicas == 0 || to_add == added {
        return 0;
    }
    let part = if deployment.spec.replicas() == 0 {
        -view.replicas
    } else {
        let before = view.set.number(MAXIMUM).unwrap_or_else(|| deployment.count("replicas")).max(1);
        // Half away from zero, as upstream rounds.
        (view.replicas * maximum * 2 + before) / (before * 2) - view.replicas
    };
    if to_add > 0 { part.clamp(0, to_add - added) } else { part.clamp(to_add - added, 0) }
}

fn set_hash(deployment: &Deployment) -> String {
    template::hash(&deployment.spec.template, deployment.collisions())
}

/// What the ReplicaSet of the template as it is now is called.
fn set_name(deployment: &Deployment) -> String {
    format!("{}-{}", deployment.metadata.name, set_hash(deployment))
}

fn inherited(deployment: &Deployment) -> impl Iterator<Item = (&str, &str)> {
    let all = deployment.metadata.annotations.iter().map(|(k, v)| (k.as_str(), v.as_str()));
    all.filter(|(k, _)| !OWN_ANNOTATIONS.contains(k))
}

/// Oldest first; of two made in one second, by name.
fn age(set: &ReplicaSet) -> (Option<Timestamp>, &str) {
    (set.metadata.creation_timestamp.as_deref().and_then(api::time::parse), &set.metadata.name)
}
