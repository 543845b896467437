//! Services that nodes serve themselves: cluster DNS on every node, Ingress on those that are labelled for it. Each has one
//! endpoint per such node, ready when the node is.

use crate::{Context, Descriptor, Error};
use api::kinds::{ENDPOINT_SLICES, NODES};
use api::object::{Key, Metadata};
use futures::future::BoxFuture;
use reconcile::{Api, Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::sync::Arc;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "nodeservices", watches: &[NODES], writes: &[ENDPOINT_SLICES], run };

const NAMESPACE: &str = "kube-system";

/// A Service of `kube-system` whose endpoints are nodes.
struct NodeService {
    name: &'static str,
    /// Its slices have this label, too, with the Service's name.
    label: &'static str,
    /// Only nodes that have this label, with any value but `false`.
    only: Option<&'static str>,
    /// Name, protocol, and where the nodes listen.
    ports: &'static [(&'static str, &'static str, u16)],
    /// Nodes and zones are to use their own.
    has_hints: bool,
}

const SERVICES: &[NodeService] = &[
    NodeService {
        name: "kube-dns",
        label: "k8s-app",
        only: None,
        ports: &[("dns", "UDP", 10053), ("dns-tcp", "TCP", 10053), ("metrics", "TCP", 9153)],
        has_hints: true,
    },
    NodeService {
        name: "fairlead-ingress",
        label: "app.kubernetes.io/name",
        only: Some("fairlead.io/ingress"),
        ports: &[("http", "TCP", 10080), ("https", "TCP", 10443)],
        has_hints: false,
    },
];

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Node {
    metadata: Metadata,
    status: NodeStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    addresses: Vec<Address>,
    conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Address {
    r#type: String,
    address: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Condition {
    r#type: String,
    status: String,
}

impl Named for Node {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Node {
    fn address(&self, is_ipv4: bool) -> Option<IpAddr> {
        let internal = self.status.addresses.iter().filter(|a| a.r#type == "InternalIP");
        internal.filter_map(|a| a.address.parse::<IpAddr>().ok()).find(|ip| ip.is_ipv4() == is_ipv4)
    }

    fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|c| c.r#type == "Ready" && c.status == "True")
    }
}

/// The slice of one family, or `None` when no node has an address of it.
fn plan(service: &NodeService, nodes: &[Arc<Node>], is_ipv4: bool) -> Option<Value> {
    nodes.iter().find(|node| node.address(is_ipv4).is_some())?;
    let serves = |node: &&Arc<Node>| match service.only {
        Some(label) => node.metadata.labels.get(label).is_some_and(|value| value != "false"),
        None => true,
    };
    let endpoints: Vec<Value> = nodes
        .iter()
        .filter(serves)
        .filter_map(|node| {
            let address = node.address(is_ipv4)?;
            let ready = node.is_ready() && !node.metadata.is_deleting();
            let mut endpoint = json!({
                "addresses": [address], "nodeName": node.metadata.name,
                "conditions": {"ready": ready, "serving": ready, "terminating": false},
            });
            let zone = node.metadata.labels.get("topology.kubernetes.io/zone");
            if let Some(zone) = zone {
                endpoint["zone"] = json!(zone);
            }
            if service.has_hints {
                endpoint["hints"] = json!({"forNodes": [{"name": node.metadata.name}]});
                if let Some(zone) = zone {
                    endpoint["hints"]["forZones"] = json!([{"name": zone}]);
                }
            }
            Some(endpoint)
        })
        .collect();
    let ports: Vec<Value> = service
        .ports
        .iter()
        .map(|(name, protocol, port)| json!({"name": name, "port": port, "protocol": protocol}))
        .collect();
    let family = if is_ipv4 { "IPv4" } else { "IPv6" };
    Some(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{}-{}", service.name, family.to_lowercase()), "namespace": NAMESPACE, "labels": {
            "kubernetes.io/service-name": service.name, service.label: service.name,
            "endpointslice.kubernetes.io/managed-by": "fairlead-nodeservices"}},
        "addressType": family, "endpoints": endpoints, "ports": ports,
    }))
}

fn run(context: Context) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let queue: Queue<Key> = Queue::default();
        let add_all = |queue: &Queue<Key>| SERVICES.iter().for_each(|one| queue.add(Key::new(NAMESPACE, one.name)));
        let changed = queue.clone();
        let nodes = feed::<Node, _>(&context.client, &NODES, Scope::all(), &context.token, move |_, _| {
            add_all(&changed);
        });
        add_all(&queue);
        let api = Api::new(&context.client, &ENDPOINT_SLICES);
        run_queue("nodeservices", queue, 1, context.token, move |key| {
            let (nodes, api) = (nodes.clone(), api.clone());
            async move {
                nodes.synced().await;
                let service = SERVICES.iter().find(|one| one.name == key.name);
                for is_ipv4 in [true, false] {
                    // An equal slice is no write: the API server finds nothing changed.
                    if let Some(slice) = service.and_then(|service| plan(service, &nodes.list(), is_ipv4)) {
                        api.create_or_replace(&slice).await?;
                    }
                }
                Ok::<_, Error>(Outcome::Done)
            }
        })
        .await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, labels: Value) -> Arc<Node> {
        let node = json!({"metadata": {"name": name, "labels": labels}, "status": {
            "addresses": [{"type": "InternalIP", "address": "192.168.49.2"}],
            "conditions": [{"type": "Ready", "status": "False"}]}});
        Arc::new(serde_json::from_value(node).expect("a node"))
    }

    #[test]
    fn every_node_with_an_address_is_an_endpoint_that_its_own_node_prefers() {
        let slice = plan(&SERVICES[0], &[node("a", json!({}))], true).expect("an IPv4 slice");
        assert_eq!(slice["endpoints"][0]["conditions"]["ready"], json!(false));
        assert_eq!(slice["endpoints"][0]["hints"]["forNodes"][0]["name"], json!("a"));
        assert!(plan(&SERVICES[0], &[], false).is_none());
    }

    #[test]
    fn only_labelled_nodes_serve_ingresses() {
        let label = |value: &str| json!({"fairlead.io/ingress": value});
        let nodes = [node("a", json!({})), node("b", label("true")), node("c", label("false")), node("d", label(""))];
        let slice = plan(&SERVICES[1], &nodes, true).expect("an IPv4 slice");
        let names: Vec<&Value> =
            slice["endpoints"].as_array().expect("endpoints").iter().map(|endpoint| &endpoint["nodeName"]).collect();
        assert_eq!(names, ["b", "d"]);
        // The last one loses its label: nobody is left in the slice, which stays.
        assert_eq!(plan(&SERVICES[1], &nodes[..1], true).expect("a slice")["endpoints"], json!([]));
    }
}
