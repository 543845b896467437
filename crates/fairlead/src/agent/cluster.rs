//! What a node learns of its cluster, and how it makes itself known.

use crate::node_object::Node;
use anyhow::{Context, bail};
use api::ObjectExt;
use api::kinds::{CONFIG_MAPS, NODES};
use ipnet::IpNet;
use kubelet::ClusterDns;
use reconcile::Api;
use serde_json::{Value, json};

/// What the server tells every agent: the cluster's ranges and its DNS.
pub struct Cluster {
    pub pod_cidrs: Vec<IpNet>,
    pub service_cidrs: Vec<IpNet>,
    pub dns: ClusterDns,
}

pub async fn cluster(node: &kube::Client) -> anyhow::Result<Cluster> {
    let settings =
        Api::new(node, &CONFIG_MAPS).get("kube-system", "fairlead").await.context("read the cluster's settings")?;
    let list = |key: &str| {
        settings
            .text(&format!("/data/{key}"))
            .split(',')
            .filter(|t| !t.is_empty())
            .map(str::to_string)
            .collect::<Vec<_>>()
    };
    let nets = |key: &str| list(key).iter().map(|t| t.parse::<IpNet>()).collect::<Result<Vec<_>, _>>();
    Ok(Cluster {
        pod_cidrs: nets("podCIDRs")?,
        service_cidrs: nets("serviceCIDRs")?,
        dns: ClusterDns {
            servers: list("clusterDNS").iter().map(|t| t.parse()).collect::<Result<Vec<_>, _>>()?,
            domain: settings.text("/data/clusterDomain").to_string(),
        },
    })
}

/// Makes sure the Node exists, with its share of the pod ranges, and returns it.
pub async fn register(node: &kube::Client, name: &str, wanted: &[IpNet], labels: &Value) -> anyhow::Result<Node> {
    let nodes = Api::new(node, &NODES);
    let mut object =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": {}});
    if let Some(first) = wanted.first() {
        object["spec"] = json!({"podCIDR": first, "podCIDRs": wanted});
    }
    let live = match nodes.create("", &object).await {
        Ok(created) => created,
        Err(error) if error.is_already_exists() => nodes.get("", name).await?,
        Err(error) => return Err(error).context("register this node"),
    };
    let node: Node = serde_json::from_value(live).context("read this node")?;
    if node.pod_cidrs().is_empty() {
        bail!("node {name} has no pod range; start the server with --pod-cidr");
    }
    Ok(node)
}
