//! Clears away pods that no kubelet will ever end: those of nodes that are gone, and those deleted before they had one.

use crate::plain::Plain;
use crate::plan::{Change, Removal, act};
use crate::{Context, Descriptor, Error};
use api::kinds::{NODES, PODS};
use api::object::{Key, Metadata};
use reconcile::{Api, Cache, Client, Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "pod-garbage-collector",
    watches: &[PODS, NODES],
    writes: &[PODS],
    run: |context| Box::pin(run(context)),
};

/// A node that is gone may come back under its name; its pods are left alone this long.
const QUARANTINE: Duration = Duration::from_secs(40);

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    metadata: Metadata,
    spec: Spec,
    status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    node_name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Status {
    phase: String,
}

impl Named for Pod {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// What clears a pod away. It is marked as failed first, so that its owner counts it as ended.
fn plan(pod: &Pod, node_exists: bool) -> Vec<Change> {
    let is_unplaced = pod.spec.node_name.is_empty();
    if (is_unplaced && !pod.metadata.is_deleting()) || (!is_unplaced && node_exists) {
        return Vec::new();
    }
    let key = pod.metadata.key();
    let mut changes = Vec::new();
    if !is_unplaced && !matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
        changes.push(Change::status(PODS, key.clone(), json!({"phase": "Failed"})));
    }
    let removal = Removal { uid: Some(pod.metadata.uid.clone()), grace_period_seconds: Some(0), propagation: None };
    changes.push(Change::Delete(PODS, key, removal));
    changes
}

struct Controller {
    client: Client,
    pods: Cache<Pod>,
    nodes: Cache<Plain>,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    // A node's key has no namespace, a pod's has one.
    let adds = queue.clone();
    let nodes = feed::<Plain, _>(&client, &NODES, Scope::all(), &token, move |before, after| {
        if let (Some(gone), None) = (before, after) {
            adds.add_after(gone.metadata.key(), QUARANTINE);
        }
    });
    nodes.synced().await;
    let (adds, known) = (queue.clone(), nodes.clone());
    let pods = feed::<Pod, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        let Some(pod) = after else { return };
        let is_unplaced = pod.spec.node_name.is_empty();
        if is_unplaced && pod.metadata.is_deleting() {
            adds.add(pod.metadata.key());
        }
        let is_placed_now = before.is_none_or(|b| b.spec.node_name != pod.spec.node_name);
        if !is_unplaced && is_placed_now && known.get(&Key::new("", &pod.spec.node_name)).is_none() {
            adds.add_after(pod.metadata.key(), QUARANTINE);
        }
    });
    pods.synced().await;
    let controller = Arc::new(Controller { client, pods, nodes });
    run_queue("pod-garbage-collector", queue, 2, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let pods = if key.namespace.is_empty() {
            let mut pods = self.pods.list();
            pods.retain(|p| p.spec.node_name == key.name);
            pods
        } else {
            self.pods.get(key).into_iter().collect()
        };
        for pod in pods {
            self.clear(&pod).await?;
        }
        Ok(Outcome::Done)
    }

    async fn clear(&self, pod: &Pod) -> Result<(), Error> {
        let node = &pod.spec.node_name;
        let mut exists = !node.is_empty() && self.nodes.get(&Key::new("", node)).is_some();
        if !node.is_empty() && !exists {
            // The cache may be behind; pods are not ended on its word.
            exists = Api::new(&self.client, &NODES).find("", node).await?.is_some();
        }
        for change in plan(pod, exists) {
            match act(&self.client, &change).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_cleared_away() {
        let gone = json!("2026-01-01T00:00:00Z");
        for (title, node, phase, deleted, node_exists, expected) in [
            ("running where it should", "n1", "Running", None, true, 0),
            ("its node is gone", "n1", "Running", None, false, 2),
            ("finished, its node is gone", "n1", "Succeeded", None, false, 1),
            ("waiting for a node", "", "Pending", None, false, 0),
            ("deleted before it had a node", "", "Pending", Some(&gone), false, 1),
        ] {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": {"name": "p", "namespace": "default", "uid": "u", "deletionTimestamp": deleted},
                "spec": {"nodeName": node}, "status": {"phase": phase},
            }))
            .expect("the case is a pod");
            assert_eq!(plan(&pod, node_exists).len(), expected, "{title}");
        }
    }
}
