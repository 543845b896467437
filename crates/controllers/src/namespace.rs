//! Empties a namespace that is to be deleted, then lets it go.

use crate::conditions::{self, Condition};
use crate::discovery::{EVERY_KIND, Served, served};
use crate::plain::Plain;
use crate::plan::{Change, act, would_change};
use crate::{Context, Descriptor, Error};
use api::ObjectExt;
use api::kinds::{NAMESPACES, PODS};
use api::object::{Key, Metadata};
use jiff::Timestamp;
use reconcile::api::request;
use reconcile::{Api, ApiError, Cache, Client, DeleteOptions, Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tracing::debug;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "namespace",
    watches: &[NAMESPACES, PODS],
    writes: EVERY_KIND,
    run: |context| Box::pin(run(context)),
};

/// The finalizer that is ours, in `spec.finalizers`.
const FINALIZER: &str = "kubernetes";

/// Objects that stay wait for somebody's finalizer, and nothing tells when that goes: they are looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    metadata: Metadata,
    spec: Spec,
    status: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Spec {
    finalizers: Vec<String>,
}

impl Named for Namespace {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// What could not be deleted at once: how many objects of each kind, and how many wait for each finalizer.
#[derive(Debug, Default, PartialEq)]
struct Remains {
    kinds: BTreeMap<String, usize>,
    finalizers: BTreeMap<String, usize>,
}

impl Remains {
    fn note(&mut self, served: &Served, objects: &[Value]) {
        if objects.is_empty() {
            return;
        }
        let resource = &served.resource;
        let name = if resource.group.is_empty() {
            format!("{}.", resource.plural)
        } else {
            format!("{}.{}", resource.plural, resource.group)
        };
        *self.kinds.entry(name).or_default() += objects.len();
        for finalizer in objects.iter().flat_map(|o| o.finalizers()) {
            *self.finalizers.entry(finalizer.to_string()).or_default() += 1;
        }
    }

    fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }
}

/// The status that says what a namespace still waits for.
fn status(namespace: &Namespace, remains: &Remains, now: Timestamp) -> Value {
    let listed = |counts: &BTreeMap<String, usize>, what: &str| {
        let parts: Vec<_> =
            counts.iter().map(|(name, count)| format!("{name} {what} {count} resource instances")).collect();
        parts.join(", ")
    };
    let mut conditions = conditions::read(&namespace.status);
    let mut set = |kind: &str, is_so: bool, reason: &str, message: String| {
        let status = if is_so { "True" } else { "False" };
        // The counts are news even when status and reason are not.
        let old = conditions.iter().find(|c| c.r#type == kind && c.status == status).cloned();
        let mut new = Condition::new(kind, status, reason, message, now);
        if let Some(old) = old {
            new.last_transition_time = old.last_transition_time;
        }
        conditions::remove(&mut conditions, kind);
        conditions.push(new);
    };
    if remains.is_empty() {
        set("NamespaceContentRemaining", false, "ContentRemoved", "All content successfully removed".into());
    } else {
        let message = format!("Some resources are remaining: {}", listed(&remains.kinds, "has"));
        set("NamespaceContentRemaining", true, "SomeResourcesRemain", message);
    }
    if remains.finalizers.is_empty() {
        set(
            "NamespaceFinalizersRemaining",
            false,
            "ContentHasNoFinalizers",
            "All content-preserving finalizers finished".into(),
        );
    } else {
        let message =
            format!("Some content in the namespace has finalizers remaining: {}", listed(&remains.finalizers, "in"));
        set("NamespaceFinalizersRemaining", true, "SomeFinalizersRemain", message);
    }
    json!({"phase": "Terminating", "conditions": conditions::write(&conditions)})
}

/// The namespace without our finalizer.
fn finalized(namespace: &Namespace) -> Value {
    let kept: Vec<_> = namespace.spec.finalizers.iter().filter(|f| *f != FINALIZER).collect();
    let metadata = &namespace.metadata;
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": metadata.name, "uid": metadata.uid},
        "spec": {"finalizers": kept},
    })
}

struct Controller {
    client: Client,
    namespaces: Cache<Namespace>,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let adds = queue.clone();
    let namespaces = feed::<Namespace, _>(&client, &NAMESPACES, Scope::all(), &token, move |_, after| {
        if let Some(namespace) = after.filter(|n| n.metadata.is_deleting()) {
            adds.add(namespace.metadata.key());
        }
    });
    let (adds, known) = (queue.clone(), namespaces.clone());
    // Pods take their time to end; the last one's end is what a namespace mostly waits for.
    let pods = feed::<Plain, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        if let (Some(pod), None) = (before, after) {
            let key = Key::new("", &pod.metadata.namespace);
            if known.get(&key).is_some_and(|n| n.metadata.is_deleting()) {
                adds.add(key);
            }
        }
    });
    namespaces.synced().await;
    pods.synced().await;
    let controller = Arc::new(Controller { client, namespaces });
    run_queue("namespace", queue, 4, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(namespace) = self.namespaces.get(key).filter(|n| n.metadata.is_deleting()) else {
            return Ok(Outcome::Done);
        };
        if !namespace.spec.finalizers.iter().any(|f| f == FINALIZER) {
            return Ok(Outcome::Done);
        }
        let remains = self.empty(&key.name).await?;
        if remains.is_empty() {
            let path = format!("/api/v1/namespaces/{}/finalize", key.name);
            let body = finalized(&namespace);
            return match request::<Value>(&self.client, "PUT", &path, "application/json", Some(&body)).await {
                Ok(_) => Ok(Outcome::Done),
                Err(error) if error.is_not_found() => Ok(Outcome::Done),
                Err(error) => Err(error.into()),
            };
        }
        let wanted = status(&namespace, &remains, Timestamp::now());
        if would_change(&namespace.status, &wanted) {
            act(&self.client, &Change::status(NAMESPACES, key.clone(), wanted)).await?;
        }
        Ok(Outcome::After(LOOK_AGAIN))
    }

    /// Deletes everything in the namespace; returns what is still there.
    async fn empty(&self, namespace: &str) -> Result<Remains, ApiError> {
        let mut remains = Remains::default();
        for served in served(&self.client).await? {
            if !served.resource.namespaced || !served.can(&["list", "delete"]) {
                continue;
            }
            let api = Api::new(&self.client, &served.resource);
            let objects = match api.list(namespace).await {
                Ok(objects) => objects,
                // A kind may go between discovery and list.
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            if objects.is_empty() {
                continue;
            }
            for object in objects.iter().filter(|o| !o.is_deleting()) {
                let options = DeleteOptions {
                    uid: Some(object.uid().into()),
                    propagation: Some("Background"),
                    ..DeleteOptions::default()
                };
                match api.delete(namespace, object.name(), &options).await {
                    Ok(()) => {}
                    // It was replaced by another of its name; the next look sees that one.
                    Err(error) if error.is_conflict() => debug!(%error, "replaced while being deleted"),
                    Err(error) => return Err(error),
                }
            }
            remains.note(&served, &api.list(namespace).await?);
        }
        Ok(remains)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_remains_is_said() {
        let served = Served { resource: PODS, verbs: Vec::new() };
        let mut remains = Remains::default();
        remains.note(&served, &[json!({"metadata": {"finalizers": ["a/b"]}}), json!({"metadata": {}})]);
        let status = status(&Namespace::default(), &remains, Timestamp::UNIX_EPOCH);
        assert_eq!(status["phase"], "Terminating");
        assert_eq!(status["conditions"][0]["reason"], "SomeResourcesRemain");
        assert_eq!(status["conditions"][0]["message"], "Some resources are remaining: pods. has 2 resource instances");
        assert_eq!(
            status["conditions"][1]["message"],
            "Some content in the namespace has finalizers remaining: a/b in 1 resource instances"
        );
    }

    #[test]
    fn only_our_finalizer_is_taken_away() {
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": {"name": "a", "uid": "u"}, "spec": {"finalizers": ["kubernetes", "theirs"]},
        }))
        .expect("a namespace");
        assert_eq!(finalized(&namespace)["spec"]["finalizers"], json!(["theirs"]));
    }
}
