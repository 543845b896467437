//! A store that refuses one write in ten: each write is either refused with 503 and has no effect, or is seen by all.

use crate::cluster::{CONFIG_MAPS, Cluster, Options, config_map};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use store::MemoryStore;

#[tokio::test]
async fn a_write_is_refused_or_seen() {
    let cluster = Cluster::bare(Arc::new(MemoryStore::new().refusing_every(10)), Options::default()).await;
    let admin = cluster.admin();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    assert_eq!(admin.send("POST", "/api/v1/namespaces", &namespace).await.code, 201);
    let mut watch = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion=1"), &[]).await;

    let mut expected: Vec<(&str, String, String)> = Vec::new();
    let mut there: BTreeMap<String, String> = BTreeMap::new();
    let mut refused = 0;
    for i in 0..200 {
        let name = format!("c{}", i % 40);
        let path = format!("{CONFIG_MAPS}/{name}");
        let (kind, answer) = match there.contains_key(&name) {
            false => ("ADDED", admin.send("POST", CONFIG_MAPS, &config_map(&name, json!({}))).await),
            true if i % 3 == 0 => ("DELETED", admin.delete(&path).await),
            true => {
                let change = json!({"data": {"i": i.to_string()}});
                ("MODIFIED", admin.patch(&path, "merge-patch+json", &change).await)
            }
        };
        match answer.code {
            503 => {
                assert_eq!(answer.text("/reason"), "ServiceUnavailable");
                refused += 1;
            }
            200 | 201 => {
                if kind == "DELETED" {
                    there.remove(&name);
                } else {
                    there.insert(name.clone(), answer.text("/metadata/resourceVersion"));
                }
                expected.push((kind, name.clone(), there.get(&name).cloned().unwrap_or_default()));
            }
            _ => panic!("{kind} of {name} is neither refused nor done: {answer:?}"),
        }
        let seen = admin.get(&path).await;
        assert_eq!(seen.code == 200, there.contains_key(&name), "after {kind} of {name}: {answer:?}");
        if let Some(revision) = there.get(&name) {
            assert_eq!(&seen.text("/metadata/resourceVersion"), revision, "after {kind} of {name}");
        }
    }
    assert!(refused >= 15, "only {refused} writes were refused: the store was not broken");
    for (kind, name, revision) in expected {
        let (got_kind, got_name, object) = watch.event().await;
        assert_eq!((got_kind.as_str(), got_name.as_str()), (kind, name.as_str()), "{object}");
        if kind != "DELETED" {
            assert_eq!(object["metadata"]["resourceVersion"], json!(revision));
        }
    }
}

/// A refused Service leaves its address and port to the next.
#[tokio::test]
async fn a_refused_write_claims_nothing() {
    let cluster = Cluster::bare(Arc::new(MemoryStore::new().refusing_every(2)), Options::default()).await;
    let admin = cluster.admin();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    assert_eq!(admin.send("POST", "/api/v1/namespaces", &namespace).await.code, 201);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.9", "ports": [{"port": 80, "nodePort": 30009}]}});
    let path = "/api/v1/namespaces/default/services";
    let answers = [admin.send("POST", path, &service).await.code, admin.send("POST", path, &service).await.code];
    assert_eq!(answers, [503, 201]);
}
