//! Slices as data: Service, pods and slices in, writes out.

use super::*;
use serde_json::{Value, json};

fn service(spec: Value, annotations: Value) -> Service {
    let mut value = json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "s", "annotations": annotations, "labels": {"team": "a"}},
        "spec": {"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"], "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]},
    });
    if let (Some(target), Some(fields)) = (value["spec"].as_object_mut(), spec.as_object()) {
        target.extend(fields.clone());
    }
    serde_json::from_value(value).expect("the case is a Service")
}

/// The Nth pod: its address ends in N, it is ready and on node `n`.
fn pod(number: usize, node: &str, extra: Value) -> Arc<Backend> {
    let mut value = json!({
        "metadata": {"name": format!("p{number}"), "namespace": "default", "uid": format!("u{number}")},
        "spec": {"nodeName": node, "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {
            "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "podIPs": [{"ip": format!("10.244.{}.{}", number / 200, number % 200 + 2)}, {"ip": format!("fd00::{number:x}")}],
        },
    });
    for part in ["metadata", "spec", "status"] {
        if let (Some(target), Some(fields)) = (value[part].as_object_mut(), extra[part].as_object()) {
            target.extend(fields.clone());
        }
    }
    Arc::new(serde_json::from_value(value).expect("the case is a pod"))
}

fn nodes() -> BTreeMap<String, Arc<Node>> {
    let node = |name: &str, zone: &str| {
        let value = json!({
            "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
            "status": {"allocatable": {"cpu": "2"}},
        });
        (name.to_string(), Arc::new(serde_json::from_value(value).expect("the case is a node")))
    };
    BTreeMap::from([node("n1", "a"), node("n2", "b")])
}

fn changes(service: &Service, pods: &[Arc<Backend>], slices: &[Arc<EndpointSlice>]) -> Vec<Change> {
    let mut number = 0;
    let names = || {
        number += 1;
        format!("web-{number}")
    };
    plan(&Seen { service, pods, nodes: &nodes(), slices, trigger: None }, names)
}

/// Applies writes to the slices, as the API server would.
fn applied(slices: &[Arc<EndpointSlice>], changes: &[Change]) -> Vec<Arc<EndpointSlice>> {
    let mut slices: BTreeMap<String, Arc<EndpointSlice>> =
        slices.iter().map(|s| (s.metadata.name.clone(), s.clone())).collect();
    for change in changes {
        match change {
            Change::Create(_, object) | Change::Replace(_, object) => {
                let slice = serde_json::from_value(object.clone()).expect("what is written can be read");
                slices.insert(object.name().into(), Arc::new(slice));
            }
            Change::Delete(_, key, _) => {
                slices.remove(&key.name);
            }
            other => panic!("no such change of slices: {other:?}"),
        }
    }
    slices.into_values().collect()
}

/// One line per write: what, which, and how many endpoints.
fn lines(changes: &[Change]) -> Vec<String> {
    let line = |change: &Change| match change {
        Change::Create(_, o) => format!("+{} {}", o.name(), o["endpoints"].as_array().map_or(0, Vec::len)),
        Change::Replace(_, o) => format!("={} {}", o.name(), o["endpoints"].as_array().map_or(0, Vec::len)),
        Change::Delete(_, key, _) => format!("-{}", key.name),
        other => format!("{other:?}"),
    };
    changes.iter().map(line).collect()
}

fn pods(range: std::ops::Range<usize>) -> Vec<Arc<Backend>> {
    range.map(|n| pod(n, "n1", json!({}))).collect()
}

#[test]
fn one_endpoint_has_all_that_a_proxy_and_dns_read() {
    let named = json!({"spec": {"hostname": "db-0", "subdomain": "web"}});
    let changes = changes(&service(json!({"clusterIP": "None"}), json!({})), &[pod(1, "n1", named)], &[]);
    let [Change::Create(_, slice)] = changes.as_slice() else { panic!("one slice: {changes:?}") };
    assert_eq!(
        slice["metadata"]["labels"],
        json!({
            "team": "a", "kubernetes.io/service-name": "web",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "service.kubernetes.io/headless": "",
        })
    );
    assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], "s");
    assert_eq!(slice["addressType"], "IPv4");
    assert_eq!(slice["ports"], json!([{"name": "http", "port": 8080, "protocol": "TCP"}]));
    assert_eq!(
        slice["endpoints"],
        json!([{
            "addresses": ["10.244.0.3"], "conditions": {"ready": true, "serving": true, "terminating": false},
            "hostname": "db-0", "nodeName": "n1", "zone": "a",
            "targetRef": {"kind": "Pod", "namespace": "default", "name": "p1", "uid": "u1"},
        }])
    );
}

#[test]
fn conditions_tell_serving_from_ready() {
    let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let unready = json!({"status": {"conditions": []}});
    for (title, spec, extra, expected) in [
        ("terminating pods still serve", json!({}), going.clone(), json!([false, true, true])),
        ("not ready", json!({}), unready.clone(), json!([false, false, false])),
        ("published anyway", json!({"publishNotReadyAddresses": true}), unready, json!([true, false, false])),
        ("published while going", json!({"publishNotReadyAddresses": true}), going, json!([true, true, true])),
    ] {
        let changes = changes(&service(spec, json!({})), &[pod(1, "n1", extra)], &[]);
        let [Change::Create(_, slice)] = changes.as_slice() else { panic!("{title}: {changes:?}") };
        let c = &slice["endpoints"][0]["conditions"];
        assert_eq!(json!([c["ready"], c["serving"], c["terminating"]]), expected, "{title}");
    }
}

#[test]
fn who_is_no_endpoint() {
    for (title, extra) in [
        ("finished", json!({"status": {"phase": "Succeeded"}})),
        ("without an address", json!({"status": {"podIPs": []}})),
        ("without the named port", json!({"spec": {"containers": []}})),
    ] {
        let changes = changes(&service(json!({}), json!({})), &[pod(1, "n1", extra)], &[]);
        assert_eq!(lines(&changes), ["+web-1 0"], "{title}");
    }
    assert!(changes(&service(json!({"selector": {}}), json!({})), &pods(0..1), &[]).is_empty());
}

#[test]
fn few_writes() {
    let service = service(json!({}), json!({}));
    let first = changes(&service, &pods(0..150), &[]);
    assert_eq!(lines(&first), ["+web-1 100", "+web-2 50"]);
    let slices = applied(&[], &first);
    assert!(changes(&service, &pods(0..150), &slices).is_empty(), "the same pods need no write");
    assert_eq!(lines(&changes(&service, &pods(0..151), &slices)), ["=web-2 51"], "a new one goes where there is room");
    let swapped: Vec<_> = pods(1..151);
    let written = changes(&service, &swapped, &slices);
    assert_eq!(written.len(), 1, "one gone and one new are one write: {:?}", lines(&written));
    let none = changes(&service, &[], &slices);
    assert_eq!(lines(&none), ["=web-1 0", "-web-2"], "one empty slice stays");
    let empty = applied(&slices, &none);
    assert!(changes(&service, &[], &empty).is_empty());
    assert_eq!(lines(&changes(&service, &pods(0..1), &empty)), ["=web-1 1"], "and is used again");
}

#[test]
fn families_have_slices_of_their_own() {
    let dual = service(json!({"ipFamilies": ["IPv4", "IPv6"]}), json!({}));
    let both = changes(&dual, &pods(0..1), &[]);
    assert_eq!(lines(&both), ["+web-1 1", "+web-2 1"]);
    let slices = applied(&[], &both);
    assert_eq!(slices[1].endpoints()[0].addresses, ["fd00::"]);
    assert_eq!(lines(&changes(&service(json!({}), json!({})), &pods(0..1), &slices)), ["-web-2"]);
    let external = service(json!({"type": "ExternalName"}), json!({}));
    assert_eq!(lines(&changes(&external, &[], &slices)), ["-web-1", "-web-2"]);
}

#[test]
fn pods_with_other_ports_are_other_slices() {
    let other = json!({"spec": {"containers": [{"ports": [{"name": "http", "containerPort": 9090}]}]}});
    let mixed = [pod(0, "n1", json!({})), pod(1, "n1", other)];
    assert_eq!(lines(&changes(&service(json!({}), json!({})), &mixed, &[])), ["+web-1 1", "+web-2 1"]);
}

#[test]
fn hints_are_for_all_or_for_none() {
    let two = [pod(0, "n1", json!({})), pod(1, "n2", json!({}))];
    let astray = [pod(0, "n1", json!({})), pod(1, "elsewhere", json!({}))];
    let auto = json!({"service.kubernetes.io/topology-mode": "Auto"});
    let four = [0, 1, 2, 3].map(|n| pod(n, if n == 0 { "n2" } else { "n1" }, json!({})));
    for (title, distribution, annotations, pods, expected) in [
        ("no wish", "", json!({}), &two[..], vec!["", ""]),
        ("zone", "PreferClose", json!({}), &two[..], vec!["a", "b"]),
        ("zone by its new name", "PreferSameZone", json!({}), &two[..], vec!["a", "b"]),
        ("a zone is unknown", "PreferClose", json!({}), &astray[..], vec!["", ""]),
        ("node", "PreferSameNode", json!({}), &two[..], vec!["a@n1", "b@n2"]),
        ("node without zones", "PreferSameNode", json!({}), &astray[..], vec!["@n1", "@elsewhere"]),
        ("in proportion", "", auto.clone(), &four[..], vec!["b", "a", "a", "b"]),
        ("the older wish wins", "PreferSameNode", auto, &four[..], vec!["b", "a", "a", "b"]),
    ] {
        let service = service(json!({ "trafficDistribution": distribution }), annotations);
        let changes = changes(&service, pods, &[]);
        let [Change::Create(_, slice)] = changes.as_slice() else { panic!("{title}: {changes:?}") };
        let endpoints = slice["endpoints"].as_array().expect("a list");
        let hint = |e: &Value| {
            let zone = e.text("/hints/forZones/0/name").to_string();
            let node = e.text("/hints/forNodes/0/name");
            if node.is_empty() { zone } else { format!("{zone}@{node}") }
        };
        assert_eq!(endpoints.iter().map(hint).collect::<Vec<_>>(), expected, "{title}");
    }
}
