//! A cluster's first objects, made once and then left alone.

use crate::cluster::{Cluster, Options};
use apiserver::bootstrap::{self, Advertise, Component};
use serde_json::json;
use std::sync::Arc;
use store::MemoryStore;

#[tokio::test]
async fn a_second_start_writes_nothing() {
    let cluster = Cluster::new(Options::default()).await;
    let rules = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]);
    let components = [Component { account: "fairlead-test".into(), rules }];
    let advertise = Advertise {
        addresses: vec!["192.168.49.2".parse().expect("an address")],
        port: 6443,
        service_addresses: vec!["10.96.0.1".parse().expect("an address")],
    };
    let mut revisions = Vec::new();
    for _ in 0..2 {
        bootstrap::run(&cluster.server, &components).await.expect("it is made");
        bootstrap::kubernetes_service(&cluster.server, &advertise).await.expect("it is made");
        revisions.push(cluster.store.revision().await.expect("the store answers"));
    }
    assert_eq!(revisions[0], revisions[1]);

    let service = cluster.admin().get("/api/v1/namespaces/default/services/kubernetes").await;
    assert_eq!(service.text("/spec/clusterIP"), "10.96.0.1", "{service:?}");
    let account = apiserver::Identity::service_account("kube-system", "fairlead-test");
    assert_eq!(cluster.client(account.clone()).get("/api/v1/pods").await.code, 200);
    assert_eq!(cluster.client(account).get("/api/v1/nodes").await.code, 403);
}

#[tokio::test]
async fn what_was_changed_by_hand_is_made_right_again() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/view";
    let emptied = admin.patch(role, "merge-patch+json", &json!({"rules": []})).await;
    assert_eq!(emptied.code, 200, "{emptied:?}");
    bootstrap::run(&cluster.server, &[]).await.expect("it is made right");
    assert!(admin.get(role).await.json()["rules"].as_array().is_some_and(|r| !r.is_empty()));
}

/// The server owns them: Service, Endpoints and EndpointSlice point at it, whatever somebody did to them.
#[tokio::test]
async fn default_kubernetes_points_at_the_server() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let advertise = Advertise {
        addresses: vec!["192.168.49.2".parse().expect("an address")],
        port: 6443,
        service_addresses: vec!["10.96.0.1".parse().expect("an address")],
    };
    let namespace = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    for round in 0..2 {
        bootstrap::kubernetes_service(&cluster.server, &advertise).await.expect("it is made");
        let service = admin.get("/api/v1/namespaces/default/services/kubernetes").await;
        assert_eq!(service.json()["spec"]["ports"][0]["port"], 443, "round {round}: {service:?}");
        let endpoints = admin.get("/api/v1/namespaces/default/endpoints/kubernetes").await;
        assert_eq!(endpoints.text("/subsets/0/addresses/0/ip"), "192.168.49.2", "round {round}: {endpoints:?}");
        let slice = admin.get(&format!("{namespace}/kubernetes")).await;
        assert_eq!(slice.text("/endpoints/0/addresses/0"), "192.168.49.2", "round {round}: {slice:?}");
        assert_eq!(slice.json()["ports"][0]["port"], 6443, "round {round}: {slice:?}");
        let elsewhere = json!({"endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": true}}]});
        let edited = admin.patch(&format!("{namespace}/kubernetes"), "merge-patch+json", &elsewhere).await;
        assert_eq!(edited.code, 200, "{edited:?}");
        assert_eq!(admin.delete("/api/v1/namespaces/default/endpoints/kubernetes").await.code, 200);
    }
}

#[tokio::test]
async fn objects_outlive_the_server() {
    let cluster = Cluster::new(Options::default()).await;
    let before = cluster.admin().get("/api/v1/namespaces/default").await;
    let again = Cluster::bare(cluster.store.clone(), Options::default()).await;
    let after = again.admin().get("/api/v1/namespaces/default").await;
    assert_eq!(before.json(), after.json());
}

/// A store that is away for a moment delays the start and does not end it.
#[tokio::test]
async fn a_store_that_refuses_now_and_then_is_tried_again() {
    let cluster = Cluster::bare(Arc::new(MemoryStore::new().refusing_every(3)), Options::default()).await;
    bootstrap::run(&cluster.server, &[]).await.expect("it is made at last");
    assert_eq!(cluster.admin().get("/api/v1/namespaces/kube-system").await.code, 200);
}
