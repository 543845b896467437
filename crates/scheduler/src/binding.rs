//! The loop: keeps the snapshot true, takes pods without a node, decides, binds.
//!
//! One lock holds the snapshot and the pods that fit nowhere. A decision assumes its outcome before the lock is let
//! go, so the next one counts with it; what fits nowhere waits until a change that could help it is seen.

use crate::objects::{Namespace, Node, Pod, Service};
use crate::schedule::{Unschedulable, schedule};
use crate::snapshot::Snapshot;
use api::kinds::{NAMESPACES, NODES, PODS, SERVICES};
use api::object::Key;
use jiff::Timestamp;
use reconcile::{Api, ApiError, Cache, Client, EventKind, ObjectRef, Outcome, Patch, Queue, Recorder, Scope};
use reconcile::{feed, run_queue};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

const NAME: &str = "default-scheduler";

/// Why a pod could not be scheduled now; it is tried again.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("binding {0}: {1}")]
    Bind(Key, ApiError),
    #[error("telling why {0} is not scheduled: {1}")]
    Report(Key, ApiError),
}

#[derive(Default)]
struct State {
    snapshot: Snapshot,
    /// Uids of pods that are bound, as far as we know, though the watch has not shown it.
    assumed: BTreeMap<Key, String>,
    /// Pods that fit nowhere, and whether other pods could change that.
    waiting: BTreeMap<Key, bool>,
}

impl State {
    /// Takes the pods that a change may help: all of them, or those that look at other pods.
    fn wake(&mut self, only_company: bool) -> Vec<Key> {
        let woken = self.waiting.iter().filter(|(_, company)| !only_company || **company);
        let woken: Vec<Key> = woken.map(|(key, _)| key.clone()).collect();
        self.waiting.retain(|_, company| only_company && !*company);
        woken
    }

    /// Notes a pod as it is now; returns who should be tried again.
    fn see_pod(&mut self, before: Option<&Arc<Pod>>, after: Option<&Arc<Pod>>) -> Vec<Key> {
        let Some(pod) = after.or(before) else { return Vec::new() };
        let key = pod.metadata.key();
        if before.is_some_and(|b| after.is_none_or(|a| a.metadata.uid != b.metadata.uid)) {
            self.waiting.remove(&key);
            self.assumed.remove(&key);
            self.snapshot.remove_pod(&key);
            if after.is_none() {
                return self.wake(false);
            }
        }
        if pod.is_finished() {
            self.waiting.remove(&key);
            self.assumed.remove(&key);
            let was_there = self.snapshot.place_of(&key).is_some();
            self.snapshot.remove_pod(&key);
            return if was_there { self.wake(false) } else { Vec::new() };
        }
        if pod.spec.node_name.is_empty() {
            return self.see_pending(before, pod);
        }
        self.waiting.remove(&key);
        self.assumed.remove(&key);
        let is_new = self.snapshot.place_of(&key) != Some(pod.spec.node_name.as_str());
        let is_moved = is_new || before.is_none_or(|b| b.metadata.labels != pod.metadata.labels);
        self.snapshot.place(pod.clone(), &pod.spec.node_name);
        if is_moved { self.wake(true) } else { Vec::new() }
    }

    fn see_pending(&mut self, before: Option<&Arc<Pod>>, pod: &Arc<Pod>) -> Vec<Key> {
        let key = pod.metadata.key();
        if pod.metadata.is_deleting() || pod.spec.scheduler_name != NAME {
            self.waiting.remove(&key);
            return Vec::new();
        }
        // Our own report of why it does not fit is no reason to try again.
        let is_same = before.is_some_and(|b| b.spec == pod.spec && b.metadata.labels == pod.metadata.labels);
        if self.assumed.contains_key(&key) || (is_same && self.waiting.contains_key(&key)) {
            return Vec::new();
        }
        self.waiting.remove(&key);
        vec![key]
    }
}

struct Scheduler {
    client: Client,
    pods: Cache<Pod>,
    state: Arc<Mutex<State>>,
    queue: Queue<Key>,
    recorder: Recorder,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no holder of the scheduler's lock panics")
}

/// Schedules pods until the token is cancelled.
pub async fn run(client: Client, token: CancellationToken) {
    let queue: Queue<Key> = Queue::default();
    let state: Arc<Mutex<State>> = Arc::default();
    let seen = state.clone();
    let namespaces = feed::<Namespace, _>(&client, &NAMESPACES, Scope::all(), &token, move |_, after| {
        if let Some(namespace) = after {
            lock(&seen).snapshot.set_namespace(namespace);
        }
    });
    let seen = state.clone();
    let services =
        feed::<Service, _>(&client, &SERVICES, Scope::all(), &token, move |before, after| match (before, after) {
            (_, Some(service)) => lock(&seen).snapshot.set_service(service),
            (Some(service), None) => lock(&seen).snapshot.remove_service(&service.metadata.key()),
            (None, None) => {}
        });
    let (seen, adds) = (state.clone(), queue.clone());
    let nodes = feed::<Node, _>(&client, &NODES, Scope::all(), &token, move |before, after| {
        let mut state = lock(&seen);
        let Some(node) = after else {
            if let Some(node) = before {
                state.snapshot.remove_node(&node.metadata.name);
            }
            return;
        };
        state.snapshot.set_node(node.clone());
        // Heartbeats change nothing that a pod waits for.
        let is_same = before.is_some_and(|b| {
            b.spec == node.spec && b.metadata.labels == node.metadata.labels && b.status == node.status
        });
        let woken = if is_same { Vec::new() } else { state.wake(false) };
        drop(state);
        woken.into_iter().for_each(|key| adds.add(key));
    });
    let (seen, adds) = (state.clone(), queue.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        let woken = lock(&seen).see_pod(before, after);
        woken.into_iter().for_each(|key| adds.add(key));
    });
    namespaces.synced().await;
    services.synced().await;
    nodes.synced().await;
    pods.synced().await;
    let recorder = Recorder::new(&client, NAME, "");
    let scheduler = Arc::new(Scheduler { client, pods, state, queue: queue.clone(), recorder });
    run_queue("scheduler", queue, 8, token, move |key: Key| {
        let scheduler = scheduler.clone();
        async move { scheduler.place(&key).await }
    })
    .await;
}

fn about(pod: &Pod) -> ObjectRef {
    let m = &pod.metadata;
    ObjectRef::new("v1", "Pod", &m.namespace, &m.name, &m.uid)
}

impl Scheduler {
    async fn place(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(pod) = self.pods.get(key) else { return Ok(Outcome::Done) };
        let is_pending = pod.spec.node_name.is_empty() && !pod.metadata.is_deleting() && !pod.is_finished();
        if !is_pending || pod.spec.scheduler_name != NAME {
            return Ok(Outcome::Done);
        }
        if !pod.spec.scheduling_gates.is_empty() {
            let message = "Scheduling is blocked due to non-empty scheduling gates";
            self.report(&pod, "SchedulingGated", message).await?;
            return Ok(Outcome::Done);
        }
        match self.decide(key, &pod) {
            None => Ok(Outcome::Done),
            Some(Ok(node)) => self.bind(key, &pod, &node).await,
            Some(Err(refusal)) => {
                let message = refusal.to_string();
                self.recorder.event(&about(&pod), EventKind::Warning, "FailedScheduling", message.clone());
                self.report(&pod, "Unschedulable", &message).await?;
                Ok(Outcome::Done)
            }
        }
    }

    /// Decides and assumes, or leaves the pod waiting, in one hold of the lock: no change is missed in between.
    fn decide(&self, key: &Key, pod: &Arc<Pod>) -> Option<Result<String, Unschedulable>> {
        let mut state = lock(&self.state);
        if state.assumed.contains_key(key) {
            return None;
        }
        match schedule(&state.snapshot, pod) {
            Ok(placement) => {
                state.assumed.insert(key.clone(), pod.metadata.uid.clone());
                state.snapshot.place(pod.clone(), &placement.node);
                Some(Ok(placement.node))
            }
            Err(refusal) => {
                state.waiting.insert(key.clone(), pod.wants_company());
                Some(Err(refusal))
            }
        }
    }

    async fn bind(&self, key: &Key, pod: &Pod, node: &str) -> Result<Outcome, Error> {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"namespace": key.namespace, "name": key.name, "uid": pod.metadata.uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        match Api::new(&self.client, &PODS).post(&key.namespace, &key.name, "binding", &binding).await {
            Ok(_) => {
                let message = format!("Successfully assigned {key} to {node}");
                self.recorder.event(&about(pod), EventKind::Normal, "Scheduled", message);
                Ok(Outcome::Done)
            }
            Err(error) => {
                self.forget(key, &pod.metadata.uid);
                if error.is_not_found() || error.is_conflict() {
                    // Gone, or bound by another: the watch tells.
                    return Ok(Outcome::Done);
                }
                Err(Error::Bind(key.clone(), error))
            }
        }
    }

    /// Takes back an assumption that did not come true.
    fn forget(&self, key: &Key, uid: &str) {
        let mut state = lock(&self.state);
        if state.assumed.get(key).is_some_and(|assumed| assumed == uid) {
            state.assumed.remove(key);
            state.snapshot.remove_pod(key);
            let woken = state.wake(false);
            drop(state);
            woken.into_iter().for_each(|key| self.queue.add(key));
        }
    }

    /// Writes the condition `PodScheduled` as false, unless it says so already.
    async fn report(&self, pod: &Pod, reason: &str, message: &str) -> Result<(), Error> {
        let mut conditions = pod.status.conditions.iter();
        if conditions.any(|c| c.r#type == "PodScheduled" && c.reason == reason && c.message == message) {
            return Ok(());
        }
        let key = pod.metadata.key();
        let mut condition = json!({"type": "PodScheduled", "status": "False", "reason": reason, "message": message});
        let was_false = pod.status.conditions.iter().any(|c| c.r#type == "PodScheduled" && c.status == "False");
        if !was_false {
            condition["lastTransitionTime"] = json!(api::time::seconds(Timestamp::now()));
        }
        let body = json!({"status": {"conditions": [condition]}});
        let api = Api::new(&self.client, &PODS);
        match api.patch_status(&key.namespace, &key.name, Patch::Strategic, &body).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(Error::Report(key, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pod(extra: Value) -> Arc<Pod> {
        let mut value = json!({
            "metadata": {"name": "p", "namespace": "default", "uid": "u"},
            "spec": {"schedulerName": NAME},
        });
        for part in ["metadata", "spec", "status"] {
            if let Some(fields) = extra[part].as_object() {
                fields.iter().for_each(|(name, field)| value[part][name.as_str()] = field.clone());
            }
        }
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    #[test]
    fn who_is_tried_when() {
        let key = Key::new("default", "p");
        let plain = pod(json!({}));
        let mut state = State::default();
        assert_eq!(state.see_pod(None, Some(&plain)), std::slice::from_ref(&key), "a new pod");
        state.waiting.insert(key.clone(), false);
        let told = pod(json!({"status": {"conditions": [{"type": "PodScheduled", "status": "False"}]}}));
        assert!(state.see_pod(Some(&plain), Some(&told)).is_empty(), "our own report");
        let changed = pod(json!({"spec": {"nodeSelector": {"a": "b"}}}));
        assert_eq!(state.see_pod(Some(&told), Some(&changed)), std::slice::from_ref(&key), "another spec");
        state.waiting.insert(key.clone(), false);
        let other = pod(json!({"metadata": {"name": "q", "uid": "v"}, "spec": {"nodeName": "n1"}}));
        assert!(state.see_pod(None, Some(&other)).is_empty(), "more pods help nobody who is alone");
        assert_eq!(state.see_pod(Some(&other), None), std::slice::from_ref(&key), "one that leaves makes room");
        state.waiting.insert(key.clone(), true);
        assert_eq!(state.see_pod(None, Some(&other)), std::slice::from_ref(&key), "company has come");
        state.assumed.insert(key.clone(), "u".into());
        assert!(state.see_pod(Some(&plain), Some(&changed)).is_empty(), "assumed pods are placed");
        let foreign = pod(json!({"spec": {"schedulerName": "mine"}}));
        assert!(state.see_pod(None, Some(&foreign)).is_empty(), "another scheduler's");
    }
}
