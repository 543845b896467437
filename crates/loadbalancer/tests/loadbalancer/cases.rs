//! `tests/cases/allocate.txt`: pools and Services in, addresses or the refusal's reason out.

use std::collections::BTreeMap;

use api::object::Key;
use loadbalancer::{Allocator, Pool, PoolObject, Service};
use serde_json::{Value, json};

#[path = "../../../dns/tests/dns/cases.rs"]
mod file;

fn pools(text: &str) -> Vec<Pool> {
    let pool = |line: &str| {
        let (name, spec) = line.split_once(' ').expect("a name and a spec");
        let spec: Value = serde_json::from_str(spec).expect("JSON");
        let object = json!({"metadata": {"name": name}, "spec": spec});
        Pool::new(&serde_json::from_value::<PoolObject>(object).expect("a pool")).expect("a good pool")
    };
    text.lines().filter(|line| !line.is_empty()).map(pool).collect()
}

fn service(name: &str, given: &Value) -> Service {
    let mut spec = json!({"type": "LoadBalancer", "ipFamilies": ["IPv4"], "ports": [{"protocol": "TCP", "port": 80}]});
    for (key, value) in given["spec"].as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    let held: Vec<Value> = given["held"].as_array().into_iter().flatten().map(|ip| json!({"ip": ip})).collect();
    let mut metadata = json!({"name": name, "namespace": "default"});
    for field in ["labels", "annotations"] {
        if given[field].is_object() {
            metadata[field] = given[field].clone();
        }
    }
    let object = json!({"metadata": metadata, "spec": spec, "status": {"loadBalancer": {"ingress": held}}});
    serde_json::from_value(object).expect("a Service")
}

#[test]
fn services_get_what_the_cases_say() {
    let cases = file::parse(include_str!("../cases/allocate.txt"));
    assert!(cases.len() >= 10, "{} cases", cases.len());
    for case in cases {
        let mut all = Allocator::default();
        for section in &case.sections {
            if section.name == "pools" {
                assert_eq!(all.set_pools(pools(&section.text)), [], "{}", case.title);
                continue;
            }
            for line in section.text.lines().filter(|line| !line.is_empty()) {
                if let Some(name) = line.strip_suffix(" gone") {
                    all.release(&Key::new("default", name)).expect("it had an address");
                    continue;
                }
                let (head, expected) = line.split_once(" => ").expect("what is asked for, and what comes of it");
                let (name, given) = head.split_once(' ').expect("a name and what is asked for");
                let given: Value = serde_json::from_str(given).expect("JSON");
                let request = service(name, &given).request(BTreeMap::new()).expect("a request that can be read");
                let seen = match all.assign(request) {
                    Ok(given) => given.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
                    Err(refusal) => refusal.reason().to_owned(),
                };
                assert_eq!(seen, expected, "{}: {line}", case.title);
            }
        }
    }
}
