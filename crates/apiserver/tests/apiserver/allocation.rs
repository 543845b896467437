//! Addresses and ports there is one of: who gets them when there are many who ask, and when there are few left.

use crate::cluster::{Client, Cluster, Options};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

const SERVICES: &str = "/api/v1/namespaces/default/services";

fn service(name: &str, spec: Value) -> Value {
    let mut object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
    object["spec"]["ports"] = object["spec"].get("ports").cloned().unwrap_or(json!([{"port": 80}]));
    object
}

async fn create(client: &Client, name: &str, spec: Value) -> (u16, Value) {
    let answer = client.send("POST", SERVICES, &service(name, spec)).await;
    (answer.code, answer.json())
}

/// KEP-3070: of a /24 the first 16 addresses are taken last, so that they stay free for those who choose.
#[tokio::test]
async fn addresses_come_from_the_upper_band_until_it_is_full() {
    let options = Options { service_cidrs: vec!["10.96.0.0/24".into()], ..Options::default() };
    let cluster = Cluster::new(options).await;
    let admin = cluster.admin();
    let mut seen = BTreeSet::new();
    for i in 0..254 {
        let (code, made) = create(&admin, &format!("s{i}"), json!({})).await;
        assert_eq!(code, 201, "service {i}: {made}");
        let ip: Ipv4Addr = made["spec"]["clusterIP"].as_str().and_then(|t| t.parse().ok()).expect("an address");
        let last = ip.octets()[3];
        assert!((1..=254).contains(&last), "{ip} is no host address");
        assert_eq!(last <= 16, i >= 238, "{ip} is the {i}th");
        assert!(seen.insert(ip), "{ip} is given twice");
    }
    let (code, refused) = create(&admin, "more", json!({})).await;
    assert_eq!(code / 100, 5, "{refused}");
    assert_eq!(admin.delete(&format!("{SERVICES}/s7")).await.code, 200);
    assert_eq!(create(&admin, "more", json!({})).await.0, 201);
}

/// KEP-3668: the same for node ports; of 32, the first 16 are the static band.
#[tokio::test]
async fn node_ports_come_from_the_upper_band_until_it_is_full() {
    let cluster = Cluster::new(Options { node_ports: 30000..=30031, ..Options::default() }).await;
    let admin = cluster.admin();
    let mut seen = BTreeSet::new();
    for i in 0..32 {
        let (code, made) = create(&admin, &format!("s{i}"), json!({"type": "NodePort"})).await;
        assert_eq!(code, 201, "service {i}: {made}");
        let port = made["spec"]["ports"][0]["nodePort"].as_u64().expect("a port");
        assert!((30000..=30031).contains(&port), "{port} is outside of the range");
        assert_eq!(port < 30016, i >= 16, "{port} is the {i}th");
        assert!(seen.insert(port), "{port} is given twice");
    }
    let (code, refused) = create(&admin, "more", json!({"type": "NodePort"})).await;
    assert_eq!(code / 100, 5, "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_want_the_same_one_gets_it() {
    let cluster = Cluster::new(Options::default()).await;
    let asking = (0..30).map(|i| {
        let admin = cluster.admin();
        let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.77", "ports": [{"port": 80, "nodePort": 30077}]});
        tokio::spawn(async move { create(&admin, &format!("s{i}"), spec).await })
    });
    let mut codes = Vec::new();
    for task in asking.collect::<Vec<_>>() {
        codes.push(task.await.expect("the task ends").0);
    }
    codes.sort_unstable();
    assert_eq!(codes[0], 201, "{codes:?}");
    assert!(codes[1..].iter().all(|c| *c == 422), "{codes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_what_another_has() {
    let options =
        Options { service_cidrs: vec!["10.96.0.0/25".into(), "fd00:10:96::/112".into()], node_ports: 30000..=30127 };
    let cluster = Cluster::new(options).await;
    let asking = (0..60).map(|i| {
        let admin = cluster.admin();
        let spec = json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack"});
        tokio::spawn(async move { create(&admin, &format!("s{i}"), spec).await })
    });
    let (mut addresses, mut ports) = (BTreeSet::new(), BTreeSet::new());
    for task in asking.collect::<Vec<_>>() {
        let (code, made) = task.await.expect("the task ends");
        assert_eq!(code, 201, "{made}");
        for ip in made["spec"]["clusterIPs"].as_array().into_iter().flatten() {
            assert!(addresses.insert(ip.to_string()), "{ip} is given twice");
        }
        let port = made["spec"]["ports"][0]["nodePort"].as_u64().expect("a port");
        assert!(ports.insert(port), "{port} is given twice");
    }
    assert_eq!((addresses.len(), ports.len()), (120, 60));
}
