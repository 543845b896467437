//! What the parts of a node read of Node objects: the agent's, and a proxy that runs alone.

use std::net::IpAddr;
use std::sync::Arc;

use api::object::Metadata;
use ipnet::IpNet;
use reconcile::Named;
use serde::Deserialize;

/// The fields of a Node that the parts of a node read.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Node {
    metadata: Metadata,
    spec: Spec,
    status: NodeStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<IpNet>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<IpNet>,
    taints: Vec<Taint>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Taint {
    key: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct NodeStatus {
    addresses: Vec<Address>,
    conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Condition {
    r#type: String,
    status: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Address {
    r#type: String,
    address: String,
}

impl Node {
    pub fn name(&self) -> &str {
        &self.metadata.name
    }

    /// Its kubelet has fallen silent, as the node controller sees it.
    pub fn has_no_heartbeat(&self) -> bool {
        self.has_ready("Unknown")
    }

    pub fn is_ready(&self) -> bool {
        self.has_ready("True")
    }

    /// Whether it runs the Ingress proxy.
    pub fn wants_ingress(&self) -> bool {
        self.metadata.labels.get(crate::ingress::LABEL).is_some_and(|value| value != "false")
    }

    pub fn zone(&self) -> Option<Arc<str>> {
        self.metadata.labels.get("topology.kubernetes.io/zone").map(|zone| zone.as_str().into())
    }

    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.metadata.annotations.get(name).map(String::as_str)
    }

    /// The keys of its taints.
    pub fn taints(&self) -> impl Iterator<Item = &str> {
        self.spec.taints.iter().map(|taint| taint.key.as_str())
    }

    /// Internal addresses, or the external ones of a node that has no others.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let internal = self.internal_addresses();
        if internal.is_empty() { self.addresses_of("ExternalIP") } else { internal }
    }

    pub fn internal_addresses(&self) -> Vec<IpAddr> {
        self.addresses_of("InternalIP")
    }

    /// Its share of the pod ranges.
    pub fn pod_cidrs(&self) -> Vec<IpNet> {
        match self.spec.pod_cidrs.is_empty() {
            true => self.spec.pod_cidr.into_iter().collect(),
            false => self.spec.pod_cidrs.clone(),
        }
    }
    fn addresses_of(&self, kind: &str) -> Vec<IpAddr> {
        let all = self.status.addresses.iter().filter(|address| address.r#type == kind);
        all.filter_map(|address| address.address.parse().ok()).collect()
    }

    fn has_ready(&self, status: &str) -> bool {
        self.status.conditions.iter().any(|condition| condition.r#type == "Ready" && condition.status == status)
    }
}

impl Named for Node {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}
