//! What the endpoint controllers read of Services and of the pods behind them, and which pod serves which port.

use crate::conditions::{self, Condition};
use api::LabelSelector;
use api::object::{Key, Metadata};
use reconcile::{Cache, Named, Queue};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// On a Service's slices and Endpoints when it has no address of its own.
pub const HEADLESS: &str = "service.kubernetes.io/headless";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub metadata: Metadata,
    pub spec: ServiceSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    pub r#type: String,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    pub ip_families: Vec<String>,
    pub selector: BTreeMap<String, String>,
    pub ports: Vec<ServicePort>,
    pub publish_not_ready_addresses: bool,
    pub traffic_distribution: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    pub name: String,
    pub protocol: String,
    pub app_protocol: Option<String>,
    pub port: i64,
    pub target_port: Value,
}

/// A pod as somebody who would send it packets sees it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Backend {
    pub metadata: Metadata,
    pub spec: BackendSpec,
    pub status: BackendStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendSpec {
    pub node_name: String,
    pub hostname: String,
    pub subdomain: String,
    pub containers: Vec<Container>,
    pub init_containers: Vec<Container>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    pub restart_policy: String,
    pub ports: Vec<ContainerPort>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    pub name: String,
    pub container_port: i64,
    pub protocol: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendStatus {
    pub phase: String,
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodIp {
    pub ip: String,
}

impl Named for Service {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for Backend {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// `IPv4` or `IPv6`, as `spec.ipFamilies` and `addressType` write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn as_str(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv6() { Family::V6 } else { Family::V4 }
    }
}

impl Service {
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ip == "None"
    }

    pub fn is_external_name(&self) -> bool {
        self.spec.r#type == "ExternalName"
    }

    /// Only Services with a selector have their endpoints kept for them.
    pub fn has_selector(&self) -> bool {
        !self.spec.selector.is_empty()
    }

    pub fn selector(&self) -> LabelSelector {
        LabelSelector::from_map(&self.spec.selector)
    }

    /// The primary family first.
    pub fn families(&self) -> Vec<Family> {
        let named = self.spec.ip_families.iter().filter_map(|f| match f.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        });
        let mut families: Vec<Family> = named.collect();
        if families.is_empty() {
            families.push(self.spec.cluster_ip.parse().map_or(Family::V4, Family::of));
        }
        families
    }
}

/// A port as endpoints carry it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    // Slices always write the name, even empty.
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

impl Backend {
    pub fn is_ready(&self) -> bool {
        conditions::find(&self.status.conditions, "Ready").is_some_and(Condition::is_true)
    }

    pub fn is_terminating(&self) -> bool {
        self.metadata.is_deleting()
    }

    /// Whether packets could be for it: it has an address and has not finished.
    pub fn is_addressable(&self) -> bool {
        !matches!(self.status.phase.as_str(), "Succeeded" | "Failed") && self.addresses().next().is_some()
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let primary = std::iter::once(self.status.pod_ip.as_str());
        primary.chain(self.status.pod_ips.iter().map(|i| i.ip.as_str())).filter_map(|ip| ip.parse().ok())
    }

    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses().find(|a| Family::of(*a) == family)
    }

    /// The name under which headless DNS knows this pod, if the Service is its subdomain.
    pub fn hostname_for(&self, service: &Service) -> Option<&str> {
        let is_named = !self.spec.hostname.is_empty() && self.spec.subdomain == service.metadata.name;
        is_named.then_some(self.spec.hostname.as_str())
    }

    /// The pod's port behind a Service's port; `None` if it names a port that the pod has not got.
    fn resolve(&self, port: &ServicePort) -> Option<i64> {
        match &port.target_port {
            Value::Number(number) => Some(number.as_i64().filter(|n| *n > 0).unwrap_or(port.port)),
            Value::String(name) if !name.is_empty() => {
                // Sidecars are init containers that keep running: their ports count.
                let sidecars = self.spec.init_containers.iter().filter(|c| c.restart_policy == "Always");
                let mut ports = self.spec.containers.iter().chain(sidecars).flat_map(|c| &c.ports);
                let found = ports.find(|p| &p.name == name && protocol(&p.protocol) == protocol(&port.protocol));
                found.map(|p| p.container_port)
            }
            _ => Some(port.port),
        }
    }

    /// The ports of a Service that this pod serves, in the Service's order.
    pub fn ports_for(&self, service: &Service) -> Vec<EndpointPort> {
        let served = service.spec.ports.iter().filter_map(|port| {
            Some(EndpointPort {
                name: Some(port.name.clone()),
                protocol: Some(protocol(&port.protocol).into()),
                port: Some(self.resolve(port)?),
                app_protocol: port.app_protocol.clone(),
            })
        });
        served.collect()
    }

    /// Whether anything changed that endpoints are made of.
    fn looks_like(&self, other: &Backend) -> bool {
        let (a, b) = (&self.metadata, &other.metadata);
        a.uid == b.uid
            && a.labels == b.labels
            && a.is_deleting() == b.is_deleting()
            && self.spec == other.spec
            && self.status.phase == other.status.phase
            && self.is_ready() == other.is_ready()
            && self.addresses().eq(other.addresses())
    }
}

fn protocol(text: &str) -> &str {
    if text.is_empty() { "TCP" } else { text }
}

/// Queues the Services that select a pod as it was or as it is now, if that makes a difference to them.
pub fn queue_services_of(
    services: &Cache<Service>,
    queue: &Queue<Key>,
    before: Option<&Arc<Backend>>,
    after: Option<&Arc<Backend>>,
) {
    if let (Some(before), Some(after)) = (before, after)
        && before.looks_like(after)
    {
        return;
    }
    let mut keys = BTreeSet::new();
    for pod in [before, after].into_iter().flatten() {
        for service in services.list_namespace(&pod.metadata.namespace) {
            if service.has_selector() && service.selector().matches_map(&pod.metadata.labels) {
                keys.insert(service.metadata.key());
            }
        }
    }
    keys.into_iter().for_each(|key| queue.add(key));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn named_ports_are_looked_up_in_each_pod() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "web"}, "ports": [
                {"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"},
                {"name": "plain", "port": 90, "targetPort": 9090, "protocol": "TCP"},
                {"name": "same", "port": 70, "protocol": "UDP"},
                {"name": "side", "port": 60, "targetPort": "metrics"},
                {"name": "none", "port": 50, "targetPort": "missing"},
                {"name": "other", "port": 40, "targetPort": "web", "protocol": "UDP"},
            ]},
        }))
        .expect("the case is a Service");
        let pod: Backend = serde_json::from_value(json!({
            "spec": {
                "containers": [{"ports": [{"name": "web", "containerPort": 8080, "protocol": "TCP"}]}],
                "initContainers": [
                    {"ports": [{"name": "missing", "containerPort": 1}]},
                    {"restartPolicy": "Always", "ports": [{"name": "metrics", "containerPort": 9100}]},
                ],
            },
        }))
        .expect("the case is a pod");
        let ports: Vec<_> = pod.ports_for(&service).into_iter().filter_map(|p| Some((p.name?, p.port?))).collect();
        let expected = [("http", 8080), ("plain", 9090), ("same", 70), ("side", 9100)];
        assert_eq!(ports, expected.map(|(n, p)| (n.to_string(), p)));
    }

    #[test]
    fn families_come_from_the_service_or_its_address() {
        for (spec, expected) in [
            (json!({"ipFamilies": ["IPv6", "IPv4"]}), vec![Family::V6, Family::V4]),
            (json!({"clusterIP": "fd00::1"}), vec![Family::V6]),
            (json!({"clusterIP": "None"}), vec![Family::V4]),
        ] {
            let service: Service = serde_json::from_value(json!({ "spec": spec })).expect("the case is a Service");
            assert_eq!(service.families(), expected);
        }
    }
}
