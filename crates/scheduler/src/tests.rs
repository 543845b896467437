//! Decisions as data: nodes, the pods on them, a pod; and its node, or why it has none.

use crate::objects::{Namespace, Node, Pod, Service};
use crate::schedule::schedule;
use crate::snapshot::Snapshot;
use serde_json::{Value, json};
use std::sync::Arc;

struct Case {
    title: &'static str,
    /// Of each node: its name and what differs from four CPUs, 8 GiB, room for ten pods and no taint.
    nodes: Vec<(&'static str, Value)>,
    /// Of each pod there: its name, its node, and what differs from a pod labelled `app: web` that asks for nothing.
    pods: Vec<(&'static str, &'static str, Value)>,
    pod: Value,
    /// The node, or the message.
    expected: &'static str,
}

/// Puts the fields of `extra` over those of `value`, deeply.
fn merge(value: &mut Value, extra: &Value) {
    match (value, extra) {
        (Value::Object(target), Value::Object(fields)) => {
            for (name, field) in fields {
                merge(target.entry(name.clone()).or_insert(Value::Null), field);
            }
        }
        (value, extra) => *value = extra.clone(),
    }
}

fn node(name: &str, extra: &Value) -> Arc<Node> {
    let mut value = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "10"}},
    });
    merge(&mut value, extra);
    Arc::new(serde_json::from_value(value).expect("the case is a node"))
}

fn pod(name: &str, extra: &Value) -> Pod {
    let mut value = json!({
        "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c"}]},
    });
    merge(&mut value, extra);
    serde_json::from_value(value).expect("the case is a pod")
}

fn decided(case: &Case) -> String {
    let mut snapshot = Snapshot::default();
    for (name, labels) in [("default", json!({})), ("other", json!({"team": "b"}))] {
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).expect("a namespace");
        snapshot.set_namespace(&namespace);
    }
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "default"}, "spec": {"selector": {"app": "served"}},
    }))
    .expect("a Service");
    snapshot.set_service(&service);
    for (name, place, extra) in &case.pods {
        snapshot.place(Arc::new(pod(name, extra)), place);
    }
    for (name, extra) in &case.nodes {
        snapshot.set_node(node(name, extra));
    }
    match schedule(&snapshot, &pod("new", &case.pod)) {
        Ok(placement) => placement.node,
        Err(refusal) => refusal.to_string(),
    }
}

fn asks(cpu: &str) -> Value {
    json!({"spec": {"containers": [{"resources": {"requests": {"cpu": cpu}}}]}})
}

fn plain(names: &[&'static str]) -> Vec<(&'static str, Value)> {
    names.iter().map(|name| (*name, json!({}))).collect()
}

fn zoned() -> Vec<(&'static str, Value)> {
    [("n1", "a"), ("n2", "a"), ("n3", "b")]
        .map(|(name, zone)| (name, json!({"metadata": {"labels": {"zone": zone}}})))
        .into()
}

fn tainted(effect: &str) -> Value {
    json!({"spec": {"taints": [{"key": "a", "value": "b", "effect": effect}]}})
}

fn host_port(ip: &str, port: i64, protocol: &str) -> Value {
    json!({"spec": {"containers": [{"ports": [{"hostPort": port, "hostIP": ip, "protocol": protocol}]}]}})
}

/// An affinity (`podAffinity` or `podAntiAffinity`) to pods labelled `app: APP`, by zone.
fn company(kind: &str, app: &str) -> Value {
    let term = json!({"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": app}}});
    json!({"spec": {"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}})
}

fn node_terms(terms: Value) -> Value {
    json!({"spec": {"affinity": {"nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
    }}}})
}

fn spread(key: &str, when: &str, extra: Value) -> Value {
    let mut constraint = json!({
        "maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": when, "labelSelector": {"matchLabels": {"app": "web"}},
    });
    merge(&mut constraint, &extra);
    json!({"spec": {"topologySpreadConstraints": [constraint]}})
}

fn check(cases: Vec<Case>) {
    let wrong: Vec<String> = cases
        .iter()
        .map(|case| (case, decided(case)))
        .filter(|(case, decided)| decided != case.expected)
        .map(|(case, decided)| format!("{}\n  expected {}\n  decided  {decided}", case.title, case.expected))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn room() {
    check(vec![
        Case {
            title: "without nodes there is nothing to say about them",
            nodes: vec![],
            pods: vec![],
            pod: json!({}),
            expected: "no nodes available to schedule pods",
        },
        Case { title: "the only node", nodes: plain(&["n1"]), pods: vec![], pod: json!({}), expected: "n1" },
        Case {
            title: "a pod on a node that is not seen yet takes nothing from others",
            nodes: plain(&["n1"]),
            pods: vec![("a", "ghost", asks("4"))],
            pod: asks("4"),
            expected: "n1",
        },
        Case {
            title: "exactly enough is enough",
            nodes: plain(&["n1"]),
            pods: vec![("a", "n1", asks("3"))],
            pod: asks("1"),
            expected: "n1",
        },
        Case {
            title: "too much CPU, and a reason is counted per node",
            nodes: plain(&["n1", "n2", "n3"]),
            pods: vec![("a", "n1", asks("3500m"))],
            pod: asks("4001m"),
            expected: "0/3 nodes are available: 3 Insufficient cpu.",
        },
        Case {
            title: "all that is missing is said",
            nodes: plain(&["n1"]),
            pods: vec![],
            pod: json!({"spec": {"containers": [{"resources": {"requests": {
                "cpu": "5", "memory": "9Gi", "ephemeral-storage": "1Gi", "example.com/gpu": "1",
            }}}]}}),
            expected: "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient ephemeral-storage, 1 Insufficient \
                       example.com/gpu, 1 Insufficient memory.",
        },
        Case {
            title: "a node takes so many pods",
            nodes: vec![("n1", json!({"status": {"allocatable": {"pods": "1"}}}))],
            pods: vec![("a", "n1", json!({}))],
            pod: json!({}),
            expected: "0/1 nodes are available: 1 Too many pods.",
        },
        Case {
            title: "an init container counts when it needs more than the others together",
            nodes: plain(&["n1"]),
            pods: vec![],
            pod: json!({"spec": {
                "containers": [{"resources": {"requests": {"cpu": "1"}}}],
                "initContainers": [{"resources": {"requests": {"cpu": "5"}}}],
            }}),
            expected: "0/1 nodes are available: 1 Insufficient cpu.",
        },
        Case {
            title: "init containers run one after the other",
            nodes: plain(&["n1"]),
            pods: vec![],
            pod: json!({"spec": {"initContainers": [
                {"resources": {"requests": {"cpu": "3"}}}, {"resources": {"requests": {"cpu": "3"}}},
            ]}}),
            expected: "n1",
        },
        Case {
            title: "a sidecar runs beside the others",
            nodes: plain(&["n1"]),
            pods: vec![],
            pod: json!({"spec": {
                "containers": [{"resources": {"requests": {"cpu": "3"}}}],
                "initContainers": [{"restartPolicy": "Always", "resources": {"requests": {"cpu": "2"}}}],
            }}),
            expected: "0/1 nodes are available: 1 Insufficient cpu.",
        },
        Case {
            title: "overhead counts",
            nodes: plain(&["n1"]),
            pods: vec![],
            pod: json!({"spec": {"overhead": {"cpu": "4500m"}}}),
            expected: "0/1 nodes are available: 1 Insufficient cpu.",
        },
        Case {
            title: "the emptier node",
            nodes: plain(&["n1", "n2"]),
            pods: vec![("a", "n1", asks("2")), ("b", "n2", asks("1"))],
            pod: json!({}),
            expected: "n2",
        },
    ]);
}

#[test]
fn taints_and_wishes_for_nodes() {
    let tolerate = |toleration: Value| json!({"spec": {"tolerations": [toleration]}});
    let cordoned = json!({"spec": {"unschedulable": true}});
    let disk = |name: &'static str, disk: &str| (name, json!({"metadata": {"labels": {"disk": disk}}}));
    let disks = || vec![disk("n1", "hdd"), disk("n2", "ssd")];
    let expressions = |key: &str, operator: &str, values: Value| json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]);
    check(vec![
        Case {
            title: "a taint is named, and other nodes have other reasons",
            nodes: vec![("n1", tainted("NoSchedule")), ("n2", json!({})), ("n3", json!({}))],
            pods: vec![],
            pod: asks("5"),
            expected: "0/3 nodes are available: 1 node(s) had untolerated taint {a: b}, 2 Insufficient cpu.",
        },
        Case {
            title: "a toleration of that value",
            nodes: vec![("n1", tainted("NoSchedule"))],
            pods: vec![],
            pod: tolerate(json!({"key": "a", "value": "b", "effect": "NoSchedule"})),
            expected: "n1",
        },
        Case {
            title: "a toleration of another value",
            nodes: vec![("n1", tainted("NoExecute"))],
            pods: vec![],
            pod: tolerate(json!({"key": "a", "operator": "Equal", "value": "c"})),
            expected: "0/1 nodes are available: 1 node(s) had untolerated taint {a: b}.",
        },
        Case {
            title: "whatever is there is tolerated",
            nodes: vec![("n1", tainted("NoExecute"))],
            pods: vec![],
            pod: tolerate(json!({"operator": "Exists"})),
            expected: "n1",
        },
        Case {
            title: "a taint that advises is heeded while there is a choice",
            nodes: vec![("n1", tainted("PreferNoSchedule")), ("n2", json!({}))],
            pods: vec![("a", "n2", asks("2"))],
            pod: json!({}),
            expected: "n2",
        },
        Case {
            title: "a cordoned node",
            nodes: vec![("n1", cordoned.clone())],
            pods: vec![],
            pod: json!({}),
            expected: "0/1 nodes are available: 1 node(s) were unschedulable.",
        },
        Case {
            title: "daemons tolerate the cordon",
            nodes: vec![("n1", cordoned)],
            pods: vec![],
            pod: tolerate(json!({"key": "node.kubernetes.io/unschedulable", "operator": "Exists"})),
            expected: "n1",
        },
        Case {
            title: "a node selector",
            nodes: disks(),
            pods: vec![],
            pod: json!({"spec": {"nodeSelector": {"disk": "ssd"}}}),
            expected: "n2",
        },
        Case {
            title: "no such node",
            nodes: disks(),
            pods: vec![],
            pod: json!({"spec": {"nodeSelector": {"disk": "tape"}}}),
            expected: "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.",
        },
        Case {
            title: "required affinity, with an operator",
            nodes: disks(),
            pods: vec![],
            pod: node_terms(expressions("disk", "NotIn", json!(["hdd"]))),
            expected: "n2",
        },
        Case {
            title: "numbers are compared",
            nodes: vec![
                ("n1", json!({"metadata": {"labels": {"gen": "9"}}})),
                ("n2", json!({"metadata": {"labels": {"gen": "10"}}})),
            ],
            pods: vec![],
            pod: node_terms(expressions("gen", "Gt", json!(["9"]))),
            expected: "n2",
        },
        Case {
            title: "terms are alternatives, and fields name nodes",
            nodes: plain(&["n1", "n2"]),
            pods: vec![],
            pod: node_terms(json!([
                {"matchExpressions": [{"key": "none", "operator": "Exists"}]},
                {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]},
            ])),
            expected: "n2",
        },
        Case {
            title: "an empty term means no node",
            nodes: plain(&["n1"]),
            pods: vec![],
            pod: node_terms(json!([{}])),
            expected: "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
        },
        Case {
            title: "preferred affinity outweighs room",
            nodes: disks(),
            pods: vec![("a", "n2", asks("1"))],
            pod: json!({"spec": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}},
            ]}}}}),
            expected: "n2",
        },
    ]);
}

#[test]
fn ports_of_the_node() {
    let taken = "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports.";
    let case = |title, there: Value, pod: Value, expected| Case {
        title,
        nodes: plain(&["n1"]),
        pods: vec![("a", "n1", there)],
        pod,
        expected,
    };
    check(vec![
        case("the same port", host_port("", 80, "TCP"), host_port("", 80, "TCP"), taken),
        case("another protocol", host_port("", 80, "TCP"), host_port("", 80, "UDP"), "n1"),
        case("another port", host_port("", 80, "TCP"), host_port("", 81, "TCP"), "n1"),
        case("other addresses", host_port("10.0.0.1", 80, "TCP"), host_port("10.0.0.2", 80, "TCP"), "n1"),
        case("one address of all", host_port("0.0.0.0", 80, "TCP"), host_port("10.0.0.2", 80, "TCP"), taken),
    ]);
}

#[test]
fn company_and_distance() {
    let labelled = |app: &str| json!({"metadata": {"labels": {"app": app}}});
    let elsewhere = json!({"metadata": {"labels": {"app": "db"}, "namespace": "other"}});
    let mut across = company("podAffinity", "db");
    let term = "/spec/affinity/podAffinity/requiredDuringSchedulingIgnoredDuringExecution/0";
    across.pointer_mut(term).expect("made above")["namespaceSelector"] = json!({"matchLabels": {"team": "b"}});
    let mut shy = company("podAntiAffinity", "web");
    merge(&mut shy, &labelled("hermit"));
    let nowhere = "0/3 nodes are available: 3 node(s) didn't match pod affinity rules.";
    check(vec![
        Case {
            title: "near a database, by zone",
            nodes: zoned(),
            pods: vec![("db", "n3", labelled("db"))],
            pod: company("podAffinity", "db"),
            expected: "n3",
        },
        Case {
            title: "no database anywhere",
            nodes: zoned(),
            pods: vec![],
            pod: company("podAffinity", "db"),
            expected: nowhere,
        },
        Case {
            title: "the first of a kind that wants its own kind",
            nodes: zoned(),
            pods: vec![],
            pod: company("podAffinity", "web"),
            expected: "n1",
        },
        Case {
            title: "other namespaces are not meant",
            nodes: zoned(),
            pods: vec![("db", "n3", elsewhere.clone())],
            pod: company("podAffinity", "db"),
            expected: nowhere,
        },
        Case {
            title: "unless they are selected",
            nodes: zoned(),
            pods: vec![("db", "n3", elsewhere)],
            pod: across,
            expected: "n3",
        },
        Case {
            title: "away from its kind, by zone",
            nodes: zoned(),
            pods: vec![("a", "n1", json!({}))],
            pod: company("podAntiAffinity", "web"),
            expected: "n3",
        },
        Case {
            title: "nowhere is far enough",
            nodes: zoned(),
            pods: vec![("a", "n1", json!({})), ("b", "n3", json!({}))],
            pod: company("podAntiAffinity", "web"),
            expected: "0/3 nodes are available: 3 node(s) didn't match pod anti-affinity rules.",
        },
        Case {
            title: "those that are there may refuse company",
            nodes: zoned(),
            pods: vec![("h", "n1", shy.clone())],
            pod: json!({}),
            expected: "n3",
        },
        Case {
            title: "everywhere",
            nodes: zoned(),
            pods: vec![("h", "n1", shy.clone()), ("i", "n3", shy)],
            pod: json!({}),
            expected: "0/3 nodes are available: 3 node(s) didn't satisfy existing pods anti-affinity rules.",
        },
    ]);
}

#[test]
fn spreading() {
    let owned = json!({"metadata": {"labels": {"app": "x"}, "ownerReferences": [{"uid": "set", "controller": true}]}});
    let served = json!({"metadata": {"labels": {"app": "served"}}});
    let missing = "0/3 nodes are available: 1 node(s) didn't match pod topology spread constraints, 2 node(s) didn't \
                   match pod topology spread constraints (missing required label).";
    let mut partly = plain(&["n1", "n2"]);
    partly.push(("n3", json!({"metadata": {"labels": {"zone": "b"}}})));
    check(vec![
        Case {
            title: "pods of one owner go to different nodes",
            nodes: plain(&["n1", "n2", "n3"]),
            pods: vec![("a", "n1", owned.clone()), ("b", "n3", owned.clone())],
            pod: owned,
            expected: "n2",
        },
        Case {
            title: "and so do pods behind one Service",
            nodes: plain(&["n1", "n2"]),
            pods: vec![("a", "n1", served.clone())],
            pod: served,
            expected: "n2",
        },
        Case {
            title: "no zone may be ahead by two",
            nodes: zoned(),
            pods: vec![("a", "n1", json!({}))],
            pod: spread("zone", "DoNotSchedule", json!({})),
            expected: "n3",
        },
        Case {
            title: "a skew of two is allowed",
            nodes: zoned(),
            pods: vec![("a", "n1", json!({})), ("b", "n3", asks("3"))],
            pod: spread("zone", "DoNotSchedule", json!({"maxSkew": 2})),
            expected: "n2",
        },
        Case {
            title: "too few domains count as one that is empty; nodes without the label are out",
            nodes: partly,
            pods: vec![("a", "n3", json!({}))],
            pod: spread("zone", "DoNotSchedule", json!({"minDomains": 2})),
            expected: missing,
        },
        Case {
            title: "a domain that the pod cannot use is not counted",
            nodes: zoned(),
            pods: vec![("a", "n1", json!({}))],
            pod: {
                let mut pod = spread("zone", "DoNotSchedule", json!({}));
                merge(&mut pod, &json!({"spec": {"nodeSelector": {"zone": "a"}}}));
                pod
            },
            expected: "n2",
        },
        Case {
            title: "a wish for balance is no rule",
            nodes: zoned(),
            pods: vec![("a", "n3", json!({})), ("b", "n3", json!({}))],
            pod: spread("zone", "ScheduleAnyway", json!({})),
            expected: "n1",
        },
    ]);
}

#[test]
fn what_leaves_gives_back_what_it_took() {
    let mut snapshot = Snapshot::default();
    snapshot.set_node(node("n1", &json!({})));
    let big = Arc::new(pod("big", &asks("4")));
    snapshot.place(big.clone(), "n1");
    snapshot.place(big.clone(), "n1");
    assert!(schedule(&snapshot, &pod("new", &asks("1"))).is_err());
    snapshot.remove_pod(&big.metadata.key());
    assert!(schedule(&snapshot, &pod("new", &asks("4"))).is_ok());
    snapshot.remove_node("n1");
    assert_eq!(snapshot.nodes().count(), 0);
}
