//! The parts of a Service that become environment variables.

use api::object::Metadata;
use serde::Deserialize;

/// Name, number and protocol.
pub type LinkedPort = (String, u16, String);

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub metadata: Metadata,
    spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    ports: Vec<Port>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Port {
    name: String,
    port: u16,
    protocol: String,
}

impl reconcile::Named for Service {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Service {
    /// Its address and ports, unless it has no address of its own.
    pub fn linkable(&self) -> Option<(&str, Vec<LinkedPort>)> {
        let ip = self.spec.cluster_ip.as_str();
        if ip.is_empty() || ip == "None" {
            return None;
        }
        let protocol = |p: &Port| if p.protocol.is_empty() { "TCP".to_owned() } else { p.protocol.clone() };
        Some((ip, self.spec.ports.iter().map(|p| (p.name.clone(), p.port, protocol(p))).collect()))
    }
}
