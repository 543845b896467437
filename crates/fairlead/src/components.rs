//! The identity and the role of each of our own components.

use api::kinds::GATEWAY;
use apiserver::bootstrap::Component;
use serde_json::{Value, json};

const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "update", "patch", "delete", "get"];
/// What says who announces which addresses, and to whom.
const ANNOUNCED: [&str; 6] =
    ["ipaddresspools", "l2advertisements", "bgpadvertisements", "bgppeers", "bfdprofiles", "communities"];

/// What Gateways are made of.
const GATEWAY_KINDS: [&str; 10] = [
    "gatewayclasses",
    "gateways",
    "listenersets",
    "httproutes",
    "grpcroutes",
    "tlsroutes",
    "tcproutes",
    "udproutes",
    "referencegrants",
    "backendtlspolicies",
];
const GATEWAY_STATUSES: [&str; 9] = [
    "gatewayclasses/status",
    "gateways/status",
    "listenersets/status",
    "httproutes/status",
    "grpcroutes/status",
    "tlsroutes/status",
    "tcproutes/status",
    "udproutes/status",
    "backendtlspolicies/status",
];

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

fn events() -> Value {
    rule("", &["events"], &["create", "patch", "update"])
}

/// Service accounts in `kube-system`, each with what it needs and no more.
pub fn all() -> Vec<Component> {
    let component =
        |account: &str, rules: Vec<Value>| Component { account: account.into(), rules: Value::Array(rules) };
    let mut all = vec![
        component(
            "fairlead-proxy",
            vec![
                rule("", &["services", "nodes"], &READ),
                rule("discovery.k8s.io", &["endpointslices"], &READ),
                rule("networking.k8s.io", &["servicecidrs"], &READ),
                rule("coordination.k8s.io", &["leases"], &["create", "get", "update", "patch"]),
                events(),
            ],
        ),
        component(
            "fairlead-dns",
            vec![
                // Pods for where their names are verified, as CoreDNS's role has them.
                rule("", &["services", "namespaces", "pods"], &READ),
                rule("discovery.k8s.io", &["endpointslices"], &READ),
            ],
        ),
        component(
            "fairlead-ingress",
            vec![
                rule("", &["services"], &["list", "watch"]),
                rule("networking.k8s.io", &["ingresses", "ingressclasses"], &["list", "watch"]),
                rule("networking.k8s.io", &["ingresses/status"], &["patch"]),
                rule("", &["namespaces"], &["list", "watch"]),
                rule(GATEWAY, &GATEWAY_KINDS, &["list", "watch"]),
                rule(GATEWAY, &GATEWAY_STATUSES, &["patch"]),
                // The Service in front of each Gateway, and where it leads.
                rule("", &["services"], &["create", "patch", "delete"]),
                rule("discovery.k8s.io", &["endpointslices"], &["create", "get", "update", "delete"]),
                // Only those that Ingresses and Gateways name are asked for, each by its name.
                rule("", &["secrets", "configmaps"], &["list", "watch"]),
                rule("coordination.k8s.io", &["leases"], &["create", "get", "update"]),
                events(),
            ],
        ),
        component(
            "fairlead-loadbalancer",
            vec![
                rule("", &["services", "namespaces"], &["list", "watch"]),
                rule("", &["services/status"], &["patch"]),
                rule("metallb.io", &["ipaddresspools"], &["list", "watch"]),
                rule("metallb.io", &["ipaddresspools/status"], &["patch"]),
                rule("coordination.k8s.io", &["leases"], &["create", "get", "update"]),
                events(),
            ],
        ),
        component(
            "fairlead-layer2",
            vec![
                rule("", &["services", "nodes"], &["list", "watch"]),
                rule("", &["namespaces"], &["get"]),
                rule("discovery.k8s.io", &["endpointslices"], &["list", "watch"]),
                rule("metallb.io", &ANNOUNCED, &["list", "watch"]),
                // Of BGPPeers that name one, each by its name.
                rule("", &["secrets"], &["get"]),
                rule("coordination.k8s.io", &["leases"], &["create", "get", "update"]),
                events(),
            ],
        ),
        component("fairlead-podnet", vec![rule("", &["nodes"], &READ)]),
        component(
            "fairlead-scheduler",
            vec![
                rule("", &["nodes", "namespaces"], &READ),
                rule("", &["pods", "services", "replicationcontrollers"], &READ),
                rule("apps", &["replicasets", "statefulsets"], &READ),
                rule("", &["pods/binding"], &["create"]),
                rule("", &["pods/status"], &["patch", "update"]),
                events(),
            ],
        ),
        component(
            "fairlead-signer",
            vec![
                rule("certificates.k8s.io", &["certificatesigningrequests"], &READ),
                rule(
                    "certificates.k8s.io",
                    &["certificatesigningrequests/approval", "certificatesigningrequests/status"],
                    &["update", "patch"],
                ),
                rule("", &["nodes"], &READ),
                events(),
            ],
        ),
    ];
    for controller in controllers::ALL {
        all.push(component(&format!("{}-controller", controller.name), controller_rules(controller)));
    }
    all
}

/// A controller's role follows from its descriptor: it reads what it watches and writes what it writes.
fn controller_rules(controller: &controllers::Descriptor) -> Vec<Value> {
    let mut rules: Vec<Value> = controller.watches.iter().map(|r| rule(r.group, &[r.plural], &READ)).collect();
    for resource in controller.writes {
        let parts = [
            resource.plural.to_string(),
            format!("{}/status", resource.plural),
            format!("{}/finalizers", resource.plural),
        ];
        let mut parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        if resource.plural == "namespaces" {
            parts.push("namespaces/finalize");
        }
        rules.push(rule(resource.group, &parts, &WRITE));
    }
    rules.push(events());
    if matches!(controller.name, "namespace" | "garbagecollector" | "garbage-collector" | "generic-garbage-collector") {
        // These two act on every kind there is or will be.
        rules.push(rule("*", &["*"], &["get", "list", "watch", "delete", "deletecollection", "patch", "update"]));
        rules.push(json!({"nonResourceURLs": ["*"], "verbs": ["get"]}));
    }
    rules
}
