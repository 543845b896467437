//! What a cluster was made with, kept in its data directory, so that `up` again means the same cluster.

use crate::dns::DnsOptions;
use crate::ingress::IngressOptions;
use crate::loadbalancer::LoadBalancerOptions;
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `DIR/cluster.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterConfig {
    /// Where the API server listens on the host's loopback.
    pub api_port: u16,
    pub proxy_mode: String,
    /// Nodes that `node mode` has given another one.
    #[serde(default)]
    pub node_proxy_modes: BTreeMap<String, String>,
    pub overlay: String,
    pub store: String,
    pub publish: Vec<String>,
    pub nodes: u32,
    #[serde(default)]
    pub localhost_node_ports: bool,
    #[serde(default)]
    pub dns: DnsOptions,
    #[serde(default)]
    pub ingress: IngressOptions,
    #[serde(default)]
    pub load_balancer: LoadBalancerOptions,
    /// Switches of every node's proxy that are not as they are by default.
    #[serde(default)]
    pub feature_gates: String,
    /// As `--endpoint-selection` of every node's agent says it; empty: as by default.
    #[serde(default)]
    pub endpoint_selection: String,
    #[serde(default)]
    pub dsr: bool,
}

fn path(dir: &Path) -> PathBuf {
    dir.join("cluster.json")
}

impl ClusterConfig {
    /// The mode of one node's proxy.
    pub fn proxy_mode_of(&self, node: &str) -> &str {
        self.node_proxy_modes.get(node).unwrap_or(&self.proxy_mode)
    }

    pub fn load(dir: &Path) -> anyhow::Result<Option<ClusterConfig>> {
        let path = path(dir);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{}", path.display()))?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    pub fn save(&self, dir: &Path) -> anyhow::Result<()> {
        crate::pki::write_private(&path(dir), &serde_json::to_vec_pretty(self)?)
    }

    /// Whoever starts the node's agent again starts it in this mode.
    pub fn keep_proxy_mode(dir: &Path, node: &str, mode: proxy::Mode) -> anyhow::Result<()> {
        let mut config = ClusterConfig::load(dir)?.context("this data directory has no cluster; run `fairlead up`")?;
        config.node_proxy_modes.insert(node.into(), mode.to_string());
        config.save(dir)
    }
}

/// A loopback port of the host that leads to a node port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    pub listen: std::net::SocketAddr,
    pub node_port: u16,
}

impl std::str::FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Publish, String> {
        let wrong = || format!("{text:?} is not [ADDR:]PORT:NODEPORT, such as 8080:30007");
        let (listen, node_port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let node_port = node_port.parse().map_err(|_| wrong())?;
        let listen = match listen.parse::<u16>() {
            Ok(port) => std::net::SocketAddr::from(([127, 0, 0, 1], port)),
            Err(_) => listen.parse().map_err(|_| wrong())?,
        };
        if !listen.ip().is_loopback() {
            return Err(format!("{} is not a loopback address; --publish opens loopback ports only", listen.ip()));
        }
        Ok(Publish { listen, node_port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports_are_read() {
        let publish: Publish = "8080:30007".parse().expect("a good port");
        assert_eq!((publish.listen.to_string().as_str(), publish.node_port), ("127.0.0.1:8080", 30007));
        assert!("[::1]:8080:30007".parse::<Publish>().is_ok());
        for bad in ["8080", "x:1", "0.0.0.0:80:30007", "1:70000"] {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }
}
