//! What a Service asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use api::object::{Key, Metadata};
use serde::Deserialize;

/// `spec.loadBalancerClass` of Services that are ours whatever else serves the cluster.
pub const CLASS: &str = "fairlead.io/loadbalancer";
const PREFIXES: [&str; 2] = ["metallb.io/", "metallb.universe.tf/"];

/// The fields of a Service that are read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub metadata: Metadata,
    pub spec: ServiceSpec,
    pub status: ServiceStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    pub r#type: String,
    pub load_balancer_class: Option<String>,
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: String,
    pub ip_families: Vec<String>,
    pub ip_family_policy: String,
    pub ports: Vec<ServicePort>,
    pub selector: BTreeMap<String, String>,
    pub external_traffic_policy: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ServicePort {
    pub protocol: String,
    pub port: u16,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    pub load_balancer: LoadBalancer,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LoadBalancer {
    pub ingress: Vec<Ingress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Ingress {
    pub ip: String,
}

impl Service {
    /// A Service of type LoadBalancer that we serve; those without a class are ours, too, if `is_default`.
    pub fn is_ours(&self, is_default: bool) -> bool {
        let class = self.spec.load_balancer_class.as_deref();
        self.spec.r#type == "LoadBalancer" && class.map_or(is_default, |class| class == CLASS)
    }

    /// What its status holds.
    pub fn held(&self) -> Vec<IpAddr> {
        self.status.load_balancer.ingress.iter().filter_map(|one| one.ip.parse().ok()).collect()
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        PREFIXES.iter().find_map(|prefix| self.metadata.annotations.get(&format!("{prefix}{name}"))).map(String::as_str)
    }

    /// # Errors
    /// What was asked for and cannot be read, with the field's name.
    pub fn request(&self, namespace_labels: BTreeMap<String, String>) -> Result<Request, String> {
        let listed = self.annotation("loadBalancerIPs");
        let text = listed.unwrap_or(&self.spec.load_balancer_ip);
        let (field, parts) = match listed {
            Some(_) => ("annotation metallb.io/loadBalancerIPs", text.split(',').collect()),
            None if text.is_empty() => ("spec.loadBalancerIP", Vec::new()),
            None => ("spec.loadBalancerIP", vec![text]),
        };
        let parse = |part: &str| {
            part.trim().parse().map_err(|_| format!("{field}: {part:?} is not an IP address; write one like 192.0.2.1"))
        };
        let mut ports = BTreeSet::new();
        for port in &self.spec.ports {
            ports.insert((port.protocol.clone(), port.port));
        }
        // Where traffic stays on the node that got it, one address can only lead to one set of pods.
        let backend = (self.spec.external_traffic_policy == "Local").then(|| self.spec.selector.clone());
        Ok(Request {
            key: Key::new(&self.metadata.namespace, &self.metadata.name),
            labels: self.metadata.labels.clone(),
            namespace_labels,
            families: self.spec.ip_families.iter().map(|family| family != "IPv6").collect(),
            needs_all: self.spec.ip_family_policy == "RequireDualStack",
            wanted: parts.into_iter().map(parse).collect::<Result<_, _>>()?,
            pool: self.annotation("address-pool").map(str::to_owned),
            sharing: self.annotation("allow-shared-ip").map(str::to_owned),
            ports,
            backend,
            held: self.held(),
        })
    }
}

/// What a Service asks for, read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub key: Key,
    pub labels: BTreeMap<String, String>,
    pub namespace_labels: BTreeMap<String, String>,
    /// An address of each; true is IPv4.
    pub families: Vec<bool>,
    /// All families or nothing.
    pub needs_all: bool,
    /// These addresses and no others; empty: any.
    pub wanted: Vec<IpAddr>,
    pub pool: Option<String>,
    /// Services with the same key may share an address, where their ports differ.
    pub sharing: Option<String>,
    pub ports: BTreeSet<(String, u16)>,
    /// The selector of a Service with externalTrafficPolicy Local.
    pub backend: Option<BTreeMap<String, String>>,
    pub held: Vec<IpAddr>,
}
