//! Objects in, addresses or the refusal's reason out.

use std::collections::BTreeMap;
use std::time::Instant;

use loadbalancer::{Allocator, Pool, PoolObject, Service};
use serde_json::{Value, json};

fn allocator(pools: &[(&str, Value)]) -> Allocator {
    let pool = |(name, spec): &(&str, Value)| {
        let object = json!({"metadata": {"name": name, "namespace": "kube-system"}, "spec": spec});
        Pool::new(&serde_json::from_value::<PoolObject>(object).expect("a pool")).expect("a good pool")
    };
    let mut allocator = Allocator::default();
    assert_eq!(allocator.set_pools(pools.iter().map(pool)), []);
    allocator
}

fn service(name: &str, annotations: Value, spec: Value) -> Service {
    let mut object = json!({"metadata": {"name": name, "namespace": "default", "labels": {"app": name},
        "annotations": annotations}, "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4"],
        "ports": [{"protocol": "TCP", "port": 80}]}});
    for (key, value) in spec.as_object().into_iter().flatten() {
        object["spec"][key] = value.clone();
    }
    serde_json::from_value(object).expect("a Service")
}

/// The addresses, or the reason for which there are none.
fn ask(allocator: &mut Allocator, service: &Service) -> String {
    let request = service.request(BTreeMap::from([("team".into(), "red".into())])).expect("a request that can be read");
    match allocator.assign(request) {
        Ok(given) => given.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        Err(refusal) => refusal.reason().to_owned(),
    }
}

#[test]
fn services_get_what_they_ask_for() {
    let pools = [
        ("main", json!({"addresses": ["192.0.2.0/30", "2001:db8::10-2001:db8::11"], "avoidBuggyIPs": true})),
        ("asked", json!({"addresses": ["198.51.100.7-198.51.100.8"], "autoAssign": false})),
        (
            "red",
            json!({"addresses": ["203.0.113.1/32"], "serviceAllocation":
            {"namespaceSelectors": [{"matchLabels": {"team": "red"}}], "serviceSelectors": [{"matchLabels": {"app": "r"}}]}}),
        ),
    ];
    let mut all = allocator(&pools);
    let plain = json!({});
    let shared = json!({"metallb.io/allow-shared-ip": "k"});
    let dual = json!({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"});
    let cases = [
        // A pool for it comes before those for all.
        ("r", plain.clone(), plain.clone(), "203.0.113.1"),
        // .0 is avoided.
        ("a", plain.clone(), plain.clone(), "192.0.2.1"),
        ("both", plain.clone(), dual.clone(), "192.0.2.2 2001:db8::10"),
        ("ip", plain.clone(), json!({"loadBalancerIP": "198.51.100.7"}), "198.51.100.7"),
        ("taken", json!({"metallb.universe.tf/loadBalancerIPs": "198.51.100.7"}), plain.clone(), "AddressConflict"),
        ("nowhere", json!({"metallb.io/loadBalancerIPs": "10.0.0.1"}), plain.clone(), "AddressNotAllowed"),
        ("six", json!({"metallb.io/loadBalancerIPs": "2001:db8::11"}), plain.clone(), "AddressFamilyMismatch"),
        ("pool", json!({"metallb.io/address-pool": "asked"}), plain.clone(), "198.51.100.8"),
        ("none", json!({"metallb.io/address-pool": "nothing"}), plain.clone(), "AddressNotAllowed"),
        ("s1", shared.clone(), plain.clone(), "192.0.2.3"),
        ("full", plain.clone(), plain.clone(), "AllocationFailed"),
        // Another port goes beside it, the same one does not.
        ("s2", shared.clone(), json!({"ports": [{"protocol": "TCP", "port": 81}]}), "192.0.2.3"),
        ("s3", shared.clone(), plain.clone(), "AllocationFailed"),
        // With Local, one address leads to one selector.
        (
            "s4",
            shared,
            json!({"ports": [{"protocol": "TCP", "port": 82}], "externalTrafficPolicy": "Local"}),
            "AllocationFailed",
        ),
    ];
    for (name, annotations, spec, expected) in cases {
        assert_eq!(ask(&mut all, &service(name, annotations, spec)), expected, "{name}");
    }
    // What is given back is there for the next.
    all.release(&api::object::Key::new("default", "a")).expect("it had one");
    assert_eq!(ask(&mut all, &service("full", plain.clone(), plain)), "192.0.2.1");
    assert_eq!(all.used("main"), (3, 1));
}

#[test]
fn a_restart_changes_nothing() {
    let pools = [("main", json!({"addresses": ["192.0.2.1-192.0.2.9"]}))];
    let mut held = service("held", json!({}), json!({}));
    held.status =
        serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.5"}]}})).expect("a status");
    let mut all = allocator(&pools);
    assert_eq!(ask(&mut all, &held), "192.0.2.5");
    assert_eq!(ask(&mut all, &service("new", json!({}), json!({}))), "192.0.2.1");
    // An address that no pool has any more is given up.
    held.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "10.0.0.5"}]}})).expect("a status");
    assert_eq!(ask(&mut allocator(&pools), &held), "192.0.2.1");
}

#[test]
fn bad_pools_are_named() {
    for (spec, part) in [
        (json!({"addresses": ["192.0.2.9-192.0.2.1"]}), "192.0.2.9-192.0.2.1"),
        (json!({"addresses": ["192.0.2.1-2001:db8::1"]}), "one family"),
        (json!({"addresses": ["all"]}), "spec.addresses"),
    ] {
        let object: PoolObject =
            serde_json::from_value(json!({"metadata": {"name": "x"}, "spec": spec})).expect("read");
        let error = Pool::new(&object).expect_err("not to be meant").to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn ten_thousand_services_take_no_time() {
    let mut all = allocator(&[("main", json!({"addresses": ["10.0.0.0/16"]}))]);
    let services: Vec<Service> = (0..10_000).map(|n| service(&format!("s{n}"), json!({}), json!({}))).collect();
    let begin = Instant::now();
    assert!(services.iter().all(|one| ask(&mut all, one).starts_with("10.0.")));
    println!("10,000 Services have addresses after {:?}", begin.elapsed());
    assert_eq!(all.used("main"), (10_000, 0));
}

#[test]
fn a_class_says_whose_a_service_is() {
    for (spec, with_others, alone) in [
        (json!({}), false, true),
        (json!({"loadBalancerClass": "fairlead.io/loadbalancer"}), true, true),
        (json!({"loadBalancerClass": "example.com/other"}), false, false),
        (json!({"type": "ClusterIP"}), false, false),
    ] {
        let service = service("s", json!({}), spec.clone());
        assert_eq!((service.is_ours(false), service.is_ours(true)), (with_others, alone), "{spec}");
    }
}
