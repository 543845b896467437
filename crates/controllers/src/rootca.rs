//! Publishes the cluster's certificate authority to pods: the config map `kube-root-ca.crt` of every namespace.

use crate::plain::Plain;
use crate::plan::{Change, act, settled};
use crate::{Context, Descriptor};
use api::kinds::{CONFIG_MAPS, NAMESPACES};
use api::object::{Key, Metadata};
use reconcile::{Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "root-ca-certificate-publisher",
    watches: &[NAMESPACES, CONFIG_MAPS],
    writes: &[CONFIG_MAPS],
    run: |context| Box::pin(run(context)),
};

const NAME: &str = "kube-root-ca.crt";
const DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ConfigMap {
    metadata: Metadata,
    data: BTreeMap<String, String>,
}

impl Named for ConfigMap {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

fn plan(namespace: &Plain, current: Option<&ConfigMap>, ca_pem: &str) -> Option<Change> {
    if namespace.metadata.is_deleting() {
        return None;
    }
    let mut map = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {
            "name": NAME, "namespace": namespace.metadata.name,
            "annotations": {"kubernetes.io/description": DESCRIPTION},
        },
        "data": {"ca.crt": ca_pem},
    });
    let Some(current) = current else { return Some(Change::Create(CONFIG_MAPS, map)) };
    let is_same = current.data.len() == 1 && current.data.get("ca.crt").is_some_and(|held| held == ca_pem);
    if is_same {
        return None;
    }
    map["metadata"]["resourceVersion"] = json!(current.metadata.resource_version);
    Some(Change::Replace(CONFIG_MAPS, map))
}

async fn run(context: Context) {
    let Context { client, token, ca_pem, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let adds = queue.clone();
    let namespaces = feed::<Plain, _>(&client, &NAMESPACES, Scope::all(), &token, move |_, after| {
        if let Some(namespace) = after {
            adds.add(namespace.metadata.key());
        }
    });
    let (adds, scope) = (queue.clone(), Scope::fields(format!("metadata.name={NAME}")));
    let maps = feed::<ConfigMap, _>(&client, &CONFIG_MAPS, scope, &token, move |before, after| {
        if let Some(map) = after.or(before) {
            adds.add(Key::new("", &map.metadata.namespace));
        }
    });
    namespaces.synced().await;
    maps.synced().await;
    run_queue("root-ca-certificate-publisher", queue, 2, token, move |key: Key| {
        let (client, namespaces, maps, ca_pem) = (client.clone(), namespaces.clone(), maps.clone(), ca_pem.clone());
        async move {
            let Some(namespace) = namespaces.get(&key) else { return Ok(Outcome::Done) };
            let current = maps.get(&Key::new(&key.name, NAME));
            let Some(change) = plan(&namespace, current.as_deref(), &ca_pem) else { return Ok(Outcome::Done) };
            settled(act(&client, &change).await)
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_is_published_and_put_right() {
        let namespace: Plain = serde_json::from_value(json!({"metadata": {"name": "a"}})).expect("a namespace");
        let map = |pem: &str| -> ConfigMap {
            serde_json::from_value(json!({"metadata": {"name": NAME}, "data": {"ca.crt": pem}})).expect("a config map")
        };
        assert!(matches!(plan(&namespace, None, "PEM"), Some(Change::Create(..))));
        assert_eq!(plan(&namespace, Some(&map("PEM")), "PEM"), None);
        assert!(matches!(plan(&namespace, Some(&map("other")), "PEM"), Some(Change::Replace(..))));
    }
}
