//! The table: what goes in as JSON and what readers see.

use std::net::IpAddr;

use serde_json::{Value, json};
use services::{DSR_ANNOTATION, FrontendId, Owner, Protocol, Seed, Selection, ServiceKind, ServiceTable};

fn service(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name}, "spec": spec})
}

fn web() -> Value {
    service(
        "web",
        json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
    )
}

/// A slice with port `http` 8080; endpoints are `address` or `address!` for one that is not ready.
fn slice(name: &str, service: &str, endpoints: &[&str]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|text| match text.strip_suffix('!') {
            Some(address) => json!({"addresses": [address], "conditions": {"ready": false}}),
            None => json!({"addresses": [text]}),
        })
        .collect();
    json!({"metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints})
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn addresses(table: &ServiceTable, port: &str) -> Vec<String> {
    let frontend = table.frontends().find(|frontend| &*frontend.name.port == port).expect("the port");
    frontend.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect()
}

#[test]
fn each_port_is_a_frontend_and_slices_are_joined_by_port_name() {
    let mut table = ServiceTable::new();
    // Slices may come first.
    assert!(
        table
            .upsert_slice(&bytes(&slice("a", "web", &["10.244.0.1", "10.244.0.2"])))
            .expect("slice")
            .frontends
            .is_empty()
    );
    let changes = table.upsert_service(&bytes(&web())).expect("service");
    assert_eq!(changes.frontends.len(), 2);
    // The same endpoint in two slices, as while a controller moves it: once, and ready if it is ready in one.
    let changes = table.upsert_slice(&bytes(&slice("b", "web", &["10.244.0.2!", "10.244.0.3"]))).expect("slice");
    assert_eq!(changes.frontends.len(), 1, "the port without endpoints did not change");
    assert_eq!(addresses(&table, "http"), ["10.244.0.1:8080", "10.244.0.2:8080", "10.244.0.3:8080"]);
    assert!(addresses(&table, "dns").is_empty());
    // The same again is no change; deleting brings back what was.
    assert!(table.upsert_slice(&bytes(&slice("b", "web", &["10.244.0.2!", "10.244.0.3"]))).expect("slice").is_empty());
    table.delete_slice("default", "b");
    assert_eq!(addresses(&table, "http").len(), 2);
    assert_eq!(table.delete_service("default", "web").frontends.len(), 2);
    assert_eq!(table.frontends().count(), 0);
    assert!(table.delete_service("default", "web").is_empty());
}

#[test]
fn a_slot_is_kept_and_the_last_moves_into_a_hole() {
    let mut table = ServiceTable::new();
    table.upsert_service(&bytes(&web())).expect("service");
    let mut set = |endpoints: &[&str]| {
        table.upsert_slice(&bytes(&slice("a", "web", endpoints))).expect("slice");
        addresses(&table, "http")
            .iter()
            .map(|text| text.split(['.', ':']).nth(3).expect("host").to_owned())
            .collect::<String>()
    };
    assert_eq!(set(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]), "1234");
    assert_eq!(set(&["10.0.0.1", "10.0.0.3", "10.0.0.4"]), "143");
    assert_eq!(set(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]), "1432");
    // Who is not ready has no slot.
    assert_eq!(set(&["10.0.0.1!", "10.0.0.2", "10.0.0.3", "10.0.0.4"]), "2431");
}

#[test]
fn a_restart_keeps_ids_and_slots() {
    let mut table = ServiceTable::with_seed(Seed {
        ids: [(("10.96.0.10".parse().expect("ip"), Protocol::Tcp, 80), FrontendId(7))].into(),
        slots: [(FrontendId(7), vec!["10.0.0.3:8080".parse().expect("at"), "10.0.0.1:8080".parse().expect("at")])]
            .into(),
    });
    table.upsert_service(&bytes(&web())).expect("service");
    table.upsert_slice(&bytes(&slice("a", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]))).expect("slice");
    assert!(!table.is_synced());
    assert!(table.set_synced().synced);
    let frontend = table.frontend(FrontendId(7)).expect("its id");
    assert_eq!(&*frontend.name.port, "http");
    assert_eq!(addresses(&table, "http"), ["10.0.0.3:8080", "10.0.0.1:8080", "10.0.0.2:8080"]);
    assert!(table.frontends().any(|other| other.id == FrontendId(8)), "new ids come after the old");
}

#[test]
fn names_and_addresses_for_dns() {
    let mut table = ServiceTable::new();
    table.upsert_service(&bytes(&web())).expect("service");
    table
        .upsert_service(&bytes(&service("db", json!({"clusterIP": "None", "clusterIPs": ["None"]}))))
        .expect("service");
    let external = json!({"type": "ExternalName", "externalName": "example.org"});
    table.upsert_service(&bytes(&service("ext", external))).expect("service");
    table.upsert_service(&bytes(&service("new", json!({"clusterIP": ""})))).expect("service");
    let mut members = slice("db-1", "db", &["10.0.0.1", "10.0.0.2"]);
    members["endpoints"][0]["hostname"] = json!("first");
    table.upsert_slice(&bytes(&members)).expect("slice");

    assert_eq!(table.frontends().count(), 2, "only the first has addresses");
    let kind = |name: &str| table.service("default", name).expect("service").kind.clone();
    assert_eq!(kind("db"), ServiceKind::Headless);
    assert_eq!(kind("ext"), ServiceKind::ExternalName("example.org".into()));
    assert_eq!(kind("new"), ServiceKind::Pending);
    assert!(table.service("other", "web").is_none());

    let named = |host: &str| table.endpoints_named("default", "db", host).len();
    assert_eq!((named("FIRST"), named("10-0-0-2"), named("10-0-0-1")), (1, 1, 0));
    let address = |text: &str| text.parse::<IpAddr>().expect("address");
    assert!(
        matches!(table.by_address(address("10.96.0.10"))[..], [Owner::ClusterIp(service)] if &*service.name == "web")
    );
    assert!(
        matches!(table.by_address(address("10.0.0.1"))[..], [Owner::Endpoint(service, _)] if &*service.name == "db")
    );
    assert_eq!(table.namespaces().collect::<Vec<_>>(), ["default"]);

    // A slice that changes hands leaves its first owner.
    members["metadata"]["labels"]["kubernetes.io/service-name"] = json!("web");
    let changes = table.upsert_slice(&bytes(&members)).expect("slice");
    assert_eq!(changes.services.len(), 2);
    assert!(
        matches!(table.by_address(address("10.0.0.1"))[..], [Owner::Endpoint(service, _)] if &*service.name == "web")
    );

    table.retain_services(|_, _| false);
    table.retain_slices(|_, _| false);
    assert!(!table.has_namespace("default") && table.by_address(address("10.0.0.1")).is_empty());
}

#[test]
fn a_bad_object_is_kept_out_and_says_why() {
    let mut table = ServiceTable::new();
    table.upsert_service(&bytes(&web())).expect("service");
    let bad = |field: &str, value: Value| {
        let mut object = web();
        object["spec"][field] = value;
        bytes(&object)
    };
    for (object, says) in [
        (bad("clusterIPs", json!(["10.96.0.300"])), "clusterIPs is \"10.96.0.300\", which is not an IP address"),
        (bad("ports", json!([{"port": 0}])), "a port from 1 to 65535"),
        (bad("ports", json!([{"port": 70_000}])), "a port from 1 to 65535"),
        (bad("ports", json!([{"port": 80, "protocol": "ICMP"}])), "TCP, UDP or SCTP"),
        (bad("externalTrafficPolicy", json!("local")), "Cluster or Local"),
        (bad("loadBalancerSourceRanges", json!(["10.0.0.0/33"])), "a CIDR"),
        (b"{\"metadata\": {}}".to_vec(), "not a Service"),
        (b"".to_vec(), "not a Service"),
    ] {
        let error = table.upsert_service(&object).expect_err("kept out").to_string();
        assert!(error.contains(says), "{error}");
    }
    assert_eq!(table.frontends().count(), 2, "the last valid version stays");
}

/// A slice that cannot be right changes nothing, and the endpoints that were known stay.
#[test]
fn a_bad_slice_is_kept_out_and_says_why() {
    let mut table = ServiceTable::new();
    table.upsert_service(&bytes(&web())).expect("service");
    table.upsert_slice(&bytes(&slice("a", "web", &["10.244.0.1"]))).expect("slice");
    let bad = |pointer: &str, value: Value| {
        let mut object = slice("a", "web", &["10.244.0.2"]);
        *object.pointer_mut(pointer).expect("a field") = value;
        bytes(&object)
    };
    for (object, says) in [
        (bad("/ports/0/port", json!(70_000)), "a port from 1 to 65535"),
        (bad("/ports/0/port", json!(-1)), "a port from 1 to 65535"),
        (bad("/ports/0/port", json!(0)), "a port from 1 to 65535"),
        (bad("/ports/0/protocol", json!("ICMP")), "TCP, UDP or SCTP"),
        (bad("/endpoints/0/addresses/0", json!("10.244.0.256")), "not an IP address"),
        (bad("/endpoints/0/addresses/0", json!("fd00::1")), "not an address of the slice's addressType"),
        (bad("/addressType", json!("IPv6")), "not an address of the slice's addressType"),
        (bad("/addressType", json!("IPX")), "not an address of the slice's addressType"),
        (bad("/endpoints/0/addresses", json!("10.244.0.2")), "not a EndpointSlice"),
        (bad("/endpoints", json!({})), "not a EndpointSlice"),
    ] {
        let error = table.upsert_slice(&object).expect_err("kept out").to_string();
        assert!(error.contains(says), "{error}");
        assert_eq!(addresses(&table, "http"), ["10.244.0.1:8080"]);
    }
    // No port means every port, which no Service uses. An endpoint without an address is none.
    for empty in [bad("/ports/0/port", json!(null)), bad("/endpoints/0/addresses", json!([]))] {
        table.upsert_slice(&empty).expect("slice");
        assert!(addresses(&table, "http").is_empty());
    }
}

/// How endpoints are chosen is said by an annotation; one that is not understood is told, and is as if there were none.
#[test]
fn a_service_says_how_its_endpoints_are_chosen() {
    let mut table = ServiceTable::new();
    for (annotation, expected) in [
        (json!("maglev"), Some(Selection::Maglev)),
        (json!("least-load"), Some(Selection::LeastLoad)),
        (json!("random"), Some(Selection::Random)),
        (json!("best"), None),
        (json!(null), None),
    ] {
        let mut web = web();
        web["metadata"]["annotations"] = json!({Selection::ANNOTATION: annotation});
        table.upsert_service(&bytes(&web)).expect("service");
        assert!(table.frontends().all(|frontend| frontend.selection == expected), "{annotation}");
        let told = table.service("default", "web").and_then(|service| service.warnings.clone());
        let told = told.map(|warnings| warnings.texts.join("")).unwrap_or_default();
        assert_eq!(
            told.contains("\"best\", which is not random, maglev or least-load"),
            annotation == "best",
            "{told}"
        );
    }
}

#[test]
fn a_service_says_whether_its_endpoints_answer_past_the_node() {
    let mut table = ServiceTable::new();
    let values = [("true", Some(true)), (" false", Some(false)), ("yes", None)];
    for (annotation, expected) in values {
        let mut web = web();
        web["metadata"]["annotations"] = json!({DSR_ANNOTATION: annotation});
        table.upsert_service(&bytes(&web)).expect("service");
        assert!(table.frontends().all(|frontend| frontend.direct_return == expected), "{annotation}");
        let told = table.service("default", "web").and_then(|service| service.warnings.clone());
        let told = told.map(|warnings| warnings.texts.join("")).unwrap_or_default();
        assert_eq!(told.contains("\"yes\", which is not true or false"), expected.is_none(), "{told}");
    }
}

/// Whatever arrives, it is an error or a change, and never a panic.
#[test]
fn no_byte_panics() {
    for object in [web(), slice("a", "web", &["10.0.0.1", "10.0.0.2!"])].iter().map(bytes) {
        for position in 0..object.len() {
            for byte in [0, b'"', b'-', b'0', b'9', b'{', b'}', b'n', b',', 0xff] {
                let mut object = object.clone();
                object[position] = byte;
                let mut table = ServiceTable::new();
                drop(table.upsert_service(&object));
                drop(table.upsert_slice(&object));
                assert!(table.frontends().count() <= 2);
            }
        }
    }
}
