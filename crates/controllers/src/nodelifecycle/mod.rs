//! Notices nodes that fell silent, says so, and moves their pods away in time.
//!
//! A node lives as long as its Lease, or its status, changes. The clock that counts is ours, from when the change was
//! seen: the node's own may be wrong.

pub mod plan;

use crate::nodes::Node;
use crate::plan::{Change, act};
use crate::{Context, Descriptor, Error};
use api::kinds::{EVENTS, LEASES, NODES, PODS};
use api::object::{Key, Metadata};
use jiff::Timestamp;
use plan::{Pod, Stay, readiness, silence, stay, taints, unready};
use reconcile::{Api, Cache, Client, EventKind, Named, ObjectRef, Outcome, Patch, Queue, Recorder, Scope};
use reconcile::{feed, run_queue};
use serde::Deserialize;
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "node-lifecycle",
    watches: &[NODES, LEASES, PODS],
    writes: &[NODES, PODS, EVENTS],
    run: |context| Box::pin(run(context)),
};

/// After this long without a sign of life a node's state is unknown.
const GRACE: Duration = Duration::from_secs(40);

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Lease {
    metadata: Metadata,
    spec: LeaseSpec,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LeaseSpec {
    renew_time: Option<String>,
}

impl Named for Lease {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// What is remembered of a node between looks.
struct Watched {
    seen: Instant,
    /// When it will be looked at next, whatever happens.
    next: Option<Instant>,
}

type Memory = Arc<Mutex<HashMap<String, Watched>>>;

fn lock(memory: &Mutex<HashMap<String, Watched>>) -> MutexGuard<'_, HashMap<String, Watched>> {
    memory.lock().expect("no holder of this lock panics")
}

fn note_life(memory: &Memory, node: &str) {
    let seen = Instant::now();
    lock(memory).entry(node.into()).and_modify(|w| w.seen = seen).or_insert(Watched { seen, next: None });
}

struct Controller {
    client: Client,
    nodes: Cache<Node>,
    pods: Cache<Pod>,
    memory: Memory,
    recorder: Recorder,
}

fn heartbeat(node: &Node) -> Option<&str> {
    crate::conditions::find(&node.status.conditions, "Ready")?.last_heartbeat_time.as_deref()
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let memory = Memory::default();
    let (adds, seen) = (queue.clone(), memory.clone());
    let nodes = feed::<Node, _>(&client, &NODES, Scope::all(), &token, move |before, after| {
        let Some(node) = after else {
            if let Some(node) = before {
                lock(&seen).remove(&node.metadata.name);
            }
            return;
        };
        if before.is_none_or(|b| heartbeat(b) != heartbeat(node)) {
            note_life(&seen, &node.metadata.name);
        }
        adds.add(node.metadata.key());
    });
    let (adds, seen, known) = (queue.clone(), memory.clone(), nodes.clone());
    let leases = Scope::namespace("kube-node-lease");
    let leases = feed::<Lease, _>(&client, &LEASES, leases, &token, move |before, after| {
        let Some(lease) = after else { return };
        if before.is_some_and(|b| b.spec == lease.spec) {
            return;
        }
        note_life(&seen, &lease.metadata.name);
        // A renewal is news only of a node that was given up; all others are looked at when their time is over.
        let key = Key::new("", &lease.metadata.name);
        if known.get(&key).is_some_and(|n| readiness(&n) != "True") {
            adds.add(key);
        }
    });
    let adds = queue.clone();
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        let Some(pod) = after.filter(|p| !p.spec.node_name.is_empty()) else { return };
        if before.is_none_or(|b| b.spec != pod.spec) {
            adds.add(Key::new("", &pod.spec.node_name));
        }
    });
    nodes.synced().await;
    leases.synced().await;
    pods.synced().await;
    let recorder = Recorder::new(&client, "node-controller", "");
    let controller = Arc::new(Controller { client, nodes, pods, memory, recorder });
    run_queue("node-lifecycle", queue, 4, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(node) = self.nodes.get(key) else { return Ok(Outcome::Done) };
        let now = Timestamp::now();
        let silent_for = lock(&self.memory).get(&key.name).map(|w| w.seen.elapsed()).unwrap_or_default();
        if silent_for >= GRACE {
            let lost = silence(&node, now);
            if !lost.is_empty() {
                let body = json!({"status": {"conditions": lost}});
                Api::new(&self.client, &NODES).patch_status("", &key.name, Patch::Strategic, &body).await?;
                // The changed node comes back as an event; taints and pods follow from that.
                return Ok(Outcome::Done);
            }
        }
        let wanted = taints(&node, now);
        if wanted != node.spec.taints {
            let body = json!({
                "metadata": {"resourceVersion": node.metadata.resource_version}, "spec": {"taints": wanted},
            });
            act(&self.client, &Change::Patch(NODES, key.clone(), body)).await?;
            return Ok(Outcome::Done);
        }
        let mut pods = self.pods.list();
        pods.retain(|p| p.spec.node_name == key.name && !matches!(p.status.phase.as_str(), "Succeeded" | "Failed"));
        if readiness(&node) != "True" {
            self.report(&node, &pods, now).await?;
        }
        let leaving = self.evict(&node, &pods, now).await?;
        let until_silent = if silent_for >= GRACE { None } else { Some(GRACE - silent_for) };
        let next = [leaving, until_silent].into_iter().flatten().min();
        Ok(next.map_or(Outcome::Done, |delay| self.look_again(&key.name, delay)))
    }

    /// Sets the node's next look, unless an earlier one is set already.
    fn look_again(&self, node: &str, delay: Duration) -> Outcome {
        let now = Instant::now();
        let mut memory = lock(&self.memory);
        let watched = memory.entry(node.into()).or_insert(Watched { seen: now, next: None });
        let at = now + delay;
        if watched.next.is_some_and(|next| next > now && next <= at) {
            return Outcome::Done;
        }
        watched.next = Some(at);
        Outcome::After(delay)
    }

    /// Pods of a node that is not ready are not ready.
    async fn report(&self, node: &Node, pods: &[Arc<Pod>], now: Timestamp) -> Result<(), Error> {
        let name = &node.metadata.name;
        let mut is_news = false;
        for pod in pods {
            let Some(body) = unready(pod, now) else { continue };
            is_news = true;
            let key = pod.metadata.key();
            let api = Api::new(&self.client, &PODS);
            match api.patch_status(&key.namespace, &key.name, Patch::Strategic, &body).await {
                Ok(_) => self.recorder.event(&about(pod), EventKind::Warning, "NodeNotReady", "Node is not ready"),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        if is_news {
            let about = ObjectRef::new("v1", "Node", "", name, &node.metadata.uid);
            let message = format!("Node {name} status is now: NodeNotReady");
            self.recorder.event(&about, EventKind::Normal, "NodeNotReady", message);
        }
        Ok(())
    }

    /// Deletes pods whose time under a taint is over; returns when the next one's is.
    async fn evict(&self, node: &Node, pods: &[Arc<Pod>], now: Timestamp) -> Result<Option<Duration>, Error> {
        let mut next: Option<i64> = None;
        for pod in pods.iter().filter(|p| !p.metadata.is_deleting()) {
            match stay(pod, node, now) {
                Stay::Forever => {}
                Stay::For(0) => {
                    let key = pod.metadata.key();
                    let message = format!("Marking for deletion Pod {key}");
                    self.recorder.event(&about(pod), EventKind::Normal, "TaintManagerEviction", message);
                    act(&self.client, &Change::delete(PODS, key, &pod.metadata.uid)).await?;
                }
                Stay::For(seconds) => next = Some(next.map_or(seconds, |n| n.min(seconds))),
            }
        }
        Ok(next.map(|seconds| Duration::from_secs(seconds.unsigned_abs())))
    }
}

fn about(pod: &Pod) -> ObjectRef {
    let m = &pod.metadata;
    ObjectRef::new("v1", "Pod", &m.namespace, &m.name, &m.uid)
}
