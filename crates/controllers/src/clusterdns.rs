//! Cluster DNS runs on every node, so its Service has one endpoint per Ready node, and each node prefers its own.

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
    Descriptor { name: "clusterdns", watches: &[NODES], writes: &[ENDPOINT_SLICES], run };

const NAMESPACE: &str = "kube-system";
const SERVICE: &str = "kube-dns";
/// Where every node's DNS listens, and where it gives its metrics.
const PORT: u16 = 10053;
const METRICS_PORT: u16 = 9153;

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
fn plan(nodes: &[Arc<Node>], is_ipv4: bool) -> Option<Value> {
    let endpoints: Vec<Value> = nodes
        .iter()
        .filter_map(|node| {
            let address = node.address(is_ipv4)?;
            let ready = node.is_ready() && !node.metadata.is_deleting();
            let mut endpoint = json!({
                "addresses": [address], "nodeName": node.metadata.name,
                "conditions": {"ready": ready, "serving": ready, "terminating": false},
                "hints": {"forNodes": [{"name": node.metadata.name}]},
            });
            if let Some(zone) = node.metadata.labels.get("topology.kubernetes.io/zone") {
                endpoint["zone"] = json!(zone);
                endpoint["hints"]["forZones"] = json!([{"name": zone}]);
            }
            Some(endpoint)
        })
        .collect();
    if endpoints.is_empty() {
        return None;
    }
    let family = if is_ipv4 { "IPv4" } else { "IPv6" };
    Some(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{SERVICE}-{}", family.to_lowercase()), "namespace": NAMESPACE, "labels": {
            "kubernetes.io/service-name": SERVICE, "k8s-app": "kube-dns",
            "endpointslice.kubernetes.io/managed-by": "fairlead-clusterdns"}},
        "addressType": family, "endpoints": endpoints,
        "ports": [
            {"name": "dns", "port": PORT, "protocol": "UDP"},
            {"name": "dns-tcp", "port": PORT, "protocol": "TCP"},
            {"name": "metrics", "port": METRICS_PORT, "protocol": "TCP"}],
    }))
}

fn run(context: Context) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let queue: Queue<Key> = Queue::default();
        let key = Key::new(NAMESPACE, SERVICE);
        let (changed, what) = (queue.clone(), key.clone());
        let nodes = feed::<Node, _>(&context.client, &NODES, Scope::all(), &context.token, move |_, _| {
            changed.add(what.clone());
        });
        queue.add(key);
        let api = Api::new(&context.client, &ENDPOINT_SLICES);
        run_queue("clusterdns", queue, 1, context.token, move |_| {
            let (nodes, api) = (nodes.clone(), api.clone());
            async move {
                nodes.synced().await;
                for slice in [true, false].iter().filter_map(|v4| plan(&nodes.list(), *v4)) {
                    // An equal slice is no write: the API server finds nothing changed.
                    api.create_or_replace(&slice).await?;
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

    #[test]
    fn every_node_with_an_address_is_an_endpoint_that_its_own_node_prefers() {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "a"}, "status": {
            "addresses": [{"type": "InternalIP", "address": "192.168.49.2"}],
            "conditions": [{"type": "Ready", "status": "False"}]}}))
        .expect("a node");
        let slice = plan(&[Arc::new(node)], true).expect("an IPv4 slice");
        assert_eq!(slice["endpoints"][0]["conditions"]["ready"], json!(false));
        assert_eq!(slice["endpoints"][0]["hints"]["forNodes"][0]["name"], json!("a"));
        assert!(plan(&[], false).is_none());
    }
}
