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

const RANGES: &str = "/apis/networking.k8s.io/v1/servicecidrs";
const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";

fn range(name: &str, cidrs: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": cidrs}})
}

fn address(name: &str, parent: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "IPAddress", "metadata": {"name": name}, "spec": {"parentRef": parent}})
}

/// KEP-1880: made and removed in the same write as the Service.
#[tokio::test]
async fn every_cluster_ip_has_its_ip_address() {
    let options =
        Options { service_cidrs: vec!["10.96.0.0/24".into(), "fd00:10:96::/112".into()], ..Options::default() };
    let cluster = Cluster::new(options).await;
    let admin = cluster.admin();
    let (_, made) = create(&admin, "web", json!({"ipFamilyPolicy": "RequireDualStack"})).await;
    let ips: Vec<String> = serde_json::from_value(made["spec"]["clusterIPs"].clone()).expect("addresses");
    assert_eq!(ips.len(), 2, "{made}");
    for ip in &ips {
        let held = admin.get(&format!("{ADDRESSES}/{ip}")).await;
        assert_eq!(held.code, 200, "{held:?}");
        let parent = json!({"resource": "services", "namespace": "default", "name": "web"});
        assert_eq!(held.json()["spec"]["parentRef"], parent);
        assert_eq!(held.json()["metadata"]["labels"]["ipaddress.kubernetes.io/managed-by"], "ipallocator.k8s.io");
        assert!(!held.text("/metadata/uid").is_empty());
    }
    let table =
        admin.request("GET", ADDRESSES, &[("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")], "").await;
    assert_eq!(table.json()["rows"][0]["cells"][1], "services/default/web", "{table:?}");
    // An object that is deleted by hand frees no address: the Service still has it.
    assert_eq!(admin.delete(&format!("{ADDRESSES}/{}", ips[0])).await.code, 200);
    assert_eq!(create(&admin, "thief", json!({"clusterIP": ips[0]})).await.0, 422);
    let stolen = address(&ips[0], json!({"resource": "services", "namespace": "default", "name": "thief"}));
    assert_eq!(admin.send("POST", ADDRESSES, &stolen).await.code, 422);
    let back = address(&ips[0], json!({"resource": "services", "namespace": "default", "name": "web"}));
    assert_eq!(admin.send("POST", ADDRESSES, &back).await.code, 201);
    assert_eq!(admin.delete(&format!("{SERVICES}/web")).await.code, 200);
    for ip in &ips {
        assert_eq!(admin.get(&format!("{ADDRESSES}/{ip}")).await.code, 404);
    }
    assert_eq!(create(&admin, "thief", json!({"clusterIP": ips[0]})).await.0, 201);
}

/// Somebody who makes an IPAddress has it: no Service gets it, chosen or not.
#[tokio::test]
async fn an_ip_address_may_be_kept_from_services() {
    let cluster = Cluster::new(Options { service_cidrs: vec!["10.96.0.0/29".into()], ..Options::default() }).await;
    let admin = cluster.admin();
    let gateway =
        json!({"group": "gateway.networking.k8s.io", "resource": "gateways", "namespace": "default", "name": "g"});
    for last in 1..=5 {
        let made = admin.send("POST", ADDRESSES, &address(&format!("10.96.0.{last}"), gateway.clone())).await;
        assert_eq!(made.code, 201, "{made:?}");
    }
    assert_eq!(create(&admin, "chosen", json!({"clusterIP": "10.96.0.3"})).await.0, 422);
    assert_eq!(create(&admin, "left", json!({})).await.1["spec"]["clusterIP"], "10.96.0.6");
    assert_eq!(create(&admin, "none", json!({})).await.0 / 100, 5);
    assert_eq!(admin.delete(&format!("{ADDRESSES}/10.96.0.3")).await.code, 200);
    assert_eq!(create(&admin, "chosen", json!({"clusterIP": "10.96.0.3"})).await.0, 201);
    for (name, parent, why) in [
        ("10.96.0.0x", gateway.clone(), "must be a valid IP address"),
        ("fd00:0::1", gateway.clone(), "must be in canonical form"),
        ("10.96.9.9", Value::Null, "spec.parentRef: Required value"),
        ("10.96.9.9", json!({"resource": "services"}), "spec.parentRef.name: Required value"),
    ] {
        let refused = admin.send("POST", ADDRESSES, &address(name, parent)).await;
        assert_eq!(refused.code, 422, "{name}");
        assert!(refused.text("/message").contains(why), "{refused:?}");
    }
}

/// A range more is a range to take from; one that is to be deleted is not.
#[tokio::test]
async fn addresses_come_from_every_range_that_is_ready() {
    let cluster = Cluster::new(Options { service_cidrs: vec!["10.96.0.0/30".into()], ..Options::default() }).await;
    let admin = cluster.admin();
    assert_eq!(admin.get(&format!("{RANGES}/kubernetes")).await.json()["spec"]["cidrs"], json!(["10.96.0.0/30"]));
    let chosen = json!({"clusterIP": "10.97.0.9"});
    let (code, refused) = create(&admin, "early", chosen.clone()).await;
    assert_eq!(code, 422, "{refused}");
    assert!(refused["message"].as_str().is_some_and(|m| m.contains("valid IPs is 10.96.0.0/30")), "{refused}");
    assert_eq!(admin.send("POST", RANGES, &range("more", json!(["10.97.0.0/24"]))).await.code, 201);
    assert_eq!(create(&admin, "early", chosen).await.0, 201);
    for number in 0..4 {
        let (code, made) = create(&admin, &format!("s{number}"), json!({})).await;
        assert_eq!(code, 201, "{made}");
        let wanted = if number < 2 { "10.96.0." } else { "10.97.0." };
        assert!(made["spec"]["clusterIP"].as_str().is_some_and(|ip| ip.starts_with(wanted)), "{number}: {made}");
    }
    // It waits for whoever lets go of it: the controller, once no address is in use.
    let marked = admin.delete(&format!("{RANGES}/more")).await;
    assert!(!marked.text("/metadata/deletionTimestamp").is_empty(), "{marked:?}");
    assert_eq!(create(&admin, "late", json!({"clusterIP": "10.97.0.77"})).await.0, 422);
    assert_eq!(create(&admin, "late", json!({})).await.0 / 100, 5);
    for (cidrs, why) in [
        (json!([]), "spec.cidrs: Required value"),
        (json!(["10.98.0.1/24"]), "must be in canonical form (\"10.98.0.0/24\")"),
        (json!(["10.98.0.0/33"]), "must be a valid CIDR value"),
        (json!(["10.98.0.0/24", "10.99.0.0/24"]), "may specify no more than one IP for each IP family"),
    ] {
        let refused = admin.send("POST", RANGES, &range("bad", cidrs)).await;
        assert_eq!(refused.code, 422, "{refused:?}");
        assert!(refused.text("/message").replace("\\\"", "\"").contains(why), "{refused:?}");
    }
    let edit = json!({"spec": {"cidrs": ["10.98.0.0/24"]}});
    let edited = admin.patch(&format!("{RANGES}/kubernetes"), "merge-patch+json", &edit).await;
    assert!(edited.text("/message").contains("field is immutable"), "{edited:?}");
}
