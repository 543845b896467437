//! What a cluster was made with, kept in its data directory, so that `up` again means the same cluster.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// `DIR/cluster.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterConfig {
    /// Where the API server listens on the host's loopback.
    pub api_port: u16,
    pub proxy_mode: String,
    pub overlay: String,
    pub store: String,
    pub publish: Vec<String>,
    pub nodes: u32,
    #[serde(default)]
    pub localhost_node_ports: bool,
}

fn path(dir: &Path) -> PathBuf {
    dir.join("cluster.json")
}

impl ClusterConfig {
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
