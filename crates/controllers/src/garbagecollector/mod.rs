//! Deletes what nobody owns any more.
//!
//! `graph` holds the metadata of every object of every kind, and decides; this file watches, asks the API where the
//! graph may be behind, and acts.

pub mod graph;

use crate::discovery::{EVERY_KIND, Served, served};
use crate::{Context, Descriptor, Error};
use api::object::{Key, OwnerReference};
use api::{ObjectExt, Resource};
use graph::{FOREGROUND, Graph, Item, Node, ORPHAN, Standing, Verdict, judge};
use reconcile::{Api, ApiError, Client, DeleteOptions, Outcome, Patch, Queue, Scope, run_queue, watch};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "generic-garbage-collector",
    watches: EVERY_KIND,
    writes: EVERY_KIND,
    run: |context| Box::pin(run(context)),
};

const CUSTOM_KINDS: (&str, &str) = ("apiextensions.k8s.io", "customresourcedefinitions");

/// An owner of a kind that is not served is neither there nor gone; it is looked for again.
const UNKNOWN_KIND: Duration = Duration::from_secs(30);

const DISCOVERY_RETRY: Duration = Duration::from_secs(2);

struct Collector {
    client: Client,
    graph: Mutex<Graph>,
    kinds: Mutex<Vec<Served>>,
    queue: Queue<String>,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<String> = Queue::default();
    let collector =
        Arc::new(Collector { client, graph: Mutex::default(), kinds: Mutex::default(), queue: queue.clone() });
    let follower = tokio::spawn(collector.clone().follow(token.clone()));
    run_queue("generic-garbage-collector", queue, 4, token, move |uid: String| {
        let collector = collector.clone();
        async move { collector.sync(&uid).await }
    })
    .await;
    if let Err(error) = follower.await {
        warn!(%error, "the garbage collector's watches ended badly");
    }
}

impl Collector {
    fn graph(&self) -> MutexGuard<'_, Graph> {
        self.graph.lock().expect("no holder of the graph's lock panics")
    }

    fn add_all(&self, uids: BTreeSet<String>) {
        uids.into_iter().for_each(|uid| self.queue.add(uid));
    }

    /// Watches every kind, and new ones as they are defined.
    async fn follow(self: Arc<Self>, token: CancellationToken) {
        let changed = Arc::new(Notify::new());
        let mut watches = JoinSet::new();
        let mut running: BTreeMap<(&'static str, &'static str), (Resource, CancellationToken)> = BTreeMap::new();
        changed.notify_one();
        loop {
            tokio::select! {
                () = changed.notified() => {}
                () = token.cancelled() => break,
            }
            let found = match served(&self.client).await {
                Ok(found) => found,
                Err(error) => {
                    warn!(%error, "kinds are not discovered, will retry");
                    tokio::select! {
                        () = tokio::time::sleep(DISCOVERY_RETRY) => changed.notify_one(),
                        () = token.cancelled() => break,
                    }
                    continue;
                }
            };
            let mut wanted: BTreeMap<(&'static str, &'static str), Resource> = BTreeMap::new();
            for kind in found.iter().filter(|k| is_collected(k)) {
                wanted.insert((kind.resource.group, kind.resource.plural), kind.resource);
            }
            *self.kinds.lock().expect("no holder of this lock panics") = found;
            let mut gone = Vec::new();
            running.retain(|name, (resource, stop)| {
                let stays = wanted.contains_key(name);
                if !stays {
                    stop.cancel();
                    gone.push(*resource);
                }
                stays
            });
            // With a kind go its objects.
            for resource in gone {
                let affected = self.note(&resource, reconcile::Change::Reset(Vec::new()));
                self.add_all(affected);
            }
            for (name, resource) in wanted {
                running.entry(name).or_insert_with(|| {
                    let stop = token.child_token();
                    watches.spawn(self.clone().watch_kind(resource, changed.clone(), stop.clone()));
                    (resource, stop)
                });
            }
        }
        while watches.join_next().await.is_some() {}
    }

    async fn watch_kind(self: Arc<Self>, resource: Resource, kinds_changed: Arc<Notify>, stop: CancellationToken) {
        let defines_kinds = (resource.group, resource.plural) == CUSTOM_KINDS;
        let mut changes = watch::<Item>(&self.client, &resource, Scope::all());
        let mut is_first = true;
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = stop.cancelled() => break,
            };
            let Some(change) = change else { break };
            if defines_kinds && !is_first {
                kinds_changed.notify_one();
            }
            is_first = false;
            let affected = self.note(&resource, change);
            self.add_all(affected);
        }
    }

    fn note(&self, resource: &Resource, change: reconcile::Change<Item>) -> BTreeSet<String> {
        let mut graph = self.graph();
        match change {
            reconcile::Change::Apply(item) => {
                let uid = item.metadata.uid.clone();
                graph.set(&uid, Node::new(*resource, item.metadata))
            }
            reconcile::Change::Delete(item) => graph.remove(&item.metadata.uid),
            reconcile::Change::Reset(items) => {
                let mut gone = graph.of_kind(resource);
                let mut affected = BTreeSet::new();
                for item in items {
                    let uid = item.metadata.uid.clone();
                    gone.remove(&uid);
                    affected.extend(graph.set(&uid, Node::new(*resource, item.metadata)));
                }
                for uid in gone {
                    affected.extend(graph.remove(&uid));
                }
                affected
            }
        }
    }

    async fn sync(&self, uid: &str) -> Result<Outcome, Error> {
        let Some((node, dependents)) = ({
            let graph = self.graph();
            graph.get(uid).cloned().map(|node| {
                let dependents: Vec<(String, Node)> =
                    graph.dependents(uid).map(|(uid, node)| (uid.to_string(), node.clone())).collect();
                (node, dependents)
            })
        }) else {
            return Ok(Outcome::Done);
        };
        if node.orphans_dependents() {
            for (dependent, _) in &dependents {
                self.drop_owner(dependent, uid).await?;
            }
            self.drop_finalizer(&node, uid, ORPHAN).await?;
            return Ok(Outcome::Done);
        }
        if node.waits_for_dependents() {
            let blocks = |dependent: &Node| {
                dependent.owners.iter().any(|o| o.uid == uid && o.block_owner_deletion == Some(true))
            };
            if !dependents.iter().any(|(_, d)| blocks(d)) {
                self.drop_finalizer(&node, uid, FOREGROUND).await?;
                return Ok(Outcome::Done);
            }
            let staying = dependents.into_iter().filter(|(_, d)| !d.is_deleting);
            self.add_all(staying.map(|(uid, _)| uid).collect());
            return Ok(Outcome::Done);
        }
        if node.is_deleting || node.owners.is_empty() {
            return Ok(Outcome::Done);
        }
        // The graph may be behind: what is deleted is decided on the object as it is now.
        let api = Api::new(&self.client, &node.resource);
        let Some(object) = api.find(&node.key.namespace, &node.key.name).await? else { return Ok(Outcome::Done) };
        if object.uid() != uid {
            return Ok(Outcome::Done);
        }
        let live = Node::live(node.resource, &object);
        let mut standings = Vec::with_capacity(live.owners.len());
        for owner in &live.owners {
            let Some(standing) = self.standing(owner, &live.key.namespace).await? else {
                return Ok(Outcome::After(UNKNOWN_KIND));
            };
            standings.push(standing);
        }
        match judge(&live, &standings, !dependents.is_empty()) {
            Verdict::Keep => {}
            Verdict::Drop(kept) => {
                let body = json!({"metadata": {
                    "uid": uid, "resourceVersion": object.resource_version(), "ownerReferences": kept,
                }});
                gone_is_fine(api.patch(&live.key.namespace, &live.key.name, Patch::Merge, &body).await)?;
            }
            Verdict::Delete(policy) => {
                let options =
                    DeleteOptions { uid: Some(uid.into()), propagation: Some(policy), ..DeleteOptions::default() };
                match api.delete(&live.key.namespace, &live.key.name, &options).await {
                    // Another object has its name now.
                    Err(error) if error.is_conflict() => {}
                    other => other?,
                }
            }
        }
        Ok(Outcome::Done)
    }

    /// Whether an owner is there; `None` if its kind is not served.
    async fn standing(&self, owner: &OwnerReference, namespace: &str) -> Result<Option<Standing>, ApiError> {
        let of = |node: &Node| if node.waits_for_dependents() { Standing::Waiting } else { Standing::Solid };
        if let Some(node) = self.graph().get(&owner.uid) {
            return Ok(Some(of(node)));
        }
        let Some(resource) = self.resource_of(owner) else { return Ok(None) };
        let namespace = if resource.namespaced { namespace } else { "" };
        let found = Api::new(&self.client, &resource).find(namespace, &owner.name).await?;
        let same = found.filter(|object| object.uid() == owner.uid);
        Ok(Some(same.map_or(Standing::Absent, |object| of(&Node::live(resource, &object)))))
    }

    fn resource_of(&self, owner: &OwnerReference) -> Option<Resource> {
        let (group, version) = owner.api_version.split_once('/').unwrap_or(("", owner.api_version.as_str()));
        let kinds = self.kinds.lock().expect("no holder of this lock panics");
        let alike = || kinds.iter().filter(|k| k.resource.group == group && k.resource.kind == owner.kind);
        // Any version of the kind shows the same objects.
        let found = alike().find(|k| k.resource.version == version).or_else(|| alike().next());
        found.map(|k| k.resource)
    }

    /// Takes one owner out of an object's references.
    async fn drop_owner(&self, dependent: &str, owner: &str) -> Result<(), Error> {
        let Some((resource, key)) = self.graph().get(dependent).map(|n| (n.resource, n.key.clone())) else {
            return Ok(());
        };
        let Some(object) = self.same(&resource, &key, dependent).await? else { return Ok(()) };
        let references = object.pointer("/metadata/ownerReferences").and_then(Value::as_array).cloned();
        let kept: Vec<Value> = references.unwrap_or_default().into_iter().filter(|r| r.text("/uid") != owner).collect();
        let body = json!({"metadata": {
            "uid": dependent, "resourceVersion": object.resource_version(), "ownerReferences": kept,
        }});
        let api = Api::new(&self.client, &resource);
        gone_is_fine(api.patch(&key.namespace, &key.name, Patch::Merge, &body).await)
    }

    async fn drop_finalizer(&self, node: &Node, uid: &str, finalizer: &str) -> Result<(), Error> {
        let Some(object) = self.same(&node.resource, &node.key, uid).await? else { return Ok(()) };
        let finalizers = object.finalizers();
        if !finalizers.contains(&finalizer) {
            return Ok(());
        }
        let kept: Vec<&str> = finalizers.into_iter().filter(|f| *f != finalizer).collect();
        let body = json!({"metadata": {
            "uid": uid, "resourceVersion": object.resource_version(), "finalizers": kept,
        }});
        let api = Api::new(&self.client, &node.resource);
        gone_is_fine(api.patch(&node.key.namespace, &node.key.name, Patch::Merge, &body).await)
    }

    /// The object as it is now, if it is still the one with this uid.
    async fn same(&self, resource: &Resource, key: &Key, uid: &str) -> Result<Option<Value>, ApiError> {
        let found = Api::new(&self.client, resource).find(&key.namespace, &key.name).await?;
        Ok(found.filter(|object| object.uid() == uid))
    }
}

fn gone_is_fine(result: Result<Value, ApiError>) -> Result<(), Error> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether objects of a kind are looked after. Events own nothing and come in numbers.
fn is_collected(served: &Served) -> bool {
    served.can(&["list", "watch", "delete", "patch"]) && served.resource.plural != "events"
}
