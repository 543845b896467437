//! What the runtime asks of a pod network: an address in a sandbox's network namespace, and its removal.

use std::net::IpAddr;
use std::path::PathBuf;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// One sandbox as its network sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxNetwork {
    /// The sandbox's id, unique on this node for all time.
    pub id: String,
    pub namespace: String,
    pub name: String,
    /// For example `/proc/PID/ns/net` of the pod's helper. It may be gone when the sandbox is removed.
    pub netns: PathBuf,
    pub port_mappings: Vec<PortMapping>,
}

/// A port of the node that leads to one of the pod's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
    /// TCP, UDP or SCTP.
    pub protocol: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NetworkError(pub String);

/// Gives sandboxes their addresses. Both calls are idempotent: `add` answers the same addresses again, `remove`
/// succeeds for a sandbox it never saw.
pub trait PodNetwork: Send + Sync {
    fn add<'a>(&'a self, pod: &'a SandboxNetwork) -> BoxFuture<'a, Result<Vec<IpAddr>, NetworkError>>;
    fn remove<'a>(&'a self, pod: &'a SandboxNetwork) -> BoxFuture<'a, Result<(), NetworkError>>;
}

/// Pods that reach only themselves: every sandbox keeps an empty namespace with a loopback.
#[derive(Debug, Default, Clone, Copy)]
pub struct Isolated;

impl PodNetwork for Isolated {
    fn add<'a>(&'a self, _: &'a SandboxNetwork) -> BoxFuture<'a, Result<Vec<IpAddr>, NetworkError>> {
        Box::pin(async { Ok(vec![IpAddr::from([127, 0, 0, 1])]) })
    }

    fn remove<'a>(&'a self, _: &'a SandboxNetwork) -> BoxFuture<'a, Result<(), NetworkError>> {
        Box::pin(async { Ok(()) })
    }
}
