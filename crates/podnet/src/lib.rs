//! A pod's address, and the way to other nodes' pods.
//!
//! ```text
//!   pod: eth0 10.244.0.5/32 ── veth ── fl-br0 10.244.0.1/32 ── eth0 192.168.49.2 ── other nodes
//! ```
//!
//! Pods have single addresses, so a pod sends everything to its gateway and the node *routes* it, also to a pod beside it:
//! translation and filters see each packet once, whether or not the machine calls netfilter for bridged frames. Where it
//! does, a packet translated to a pod on the same bridge is put back on the bridge at that point; so ports are in hairpin
//! mode (a pod may reach itself through a Service), and not isolated (isolated ports would drop such packets).

mod ipam;
mod overlay;
mod plan;
mod pod;
pub mod rules;
mod run;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use linux::link::LinkError;
use linux::netns::NetnsError;

pub use ipam::{Holding, Ipam};
pub use overlay::{HostGateway, Overlay, OverlayKind, PeerNode, Vxlan, apply, run_overlay};
pub use pod::{HostPort, Masquerade, PodNet};
pub use run::{Running, run, run_in};

/// The bridge that holds the gateway addresses and all pods' ports.
pub const BRIDGE: &str = "fl-br0";

#[derive(Debug, thiserror::Error)]
pub enum PodnetError {
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Nft(#[from] linux::nft::Error),
    #[error("pod range {cidr} of this node has no free address; delete pods here or give nodes larger ranges")]
    Exhausted { cidr: IpNet },
    #[error("{}: {source}; addresses in use are written there, see to it that it can be read and written", .path.display())]
    State { path: PathBuf, source: io::Error },
    #[error("no link of this node has the address {0}; give the node an address it has with --node-ip")]
    NoUplink(IpAddr),
    #[error("this node has no address; give it one with --node-ip")]
    NoAddress,
    #[error("node {node} at {via} is not on a link of this node ({source}); use --overlay vxlan")]
    NotOnLink { node: String, via: IpAddr, source: LinkError },
}

/// What a node's pod network is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetConfig {
    /// `ipam.json` lives here.
    pub dir: PathBuf,
    /// The node's name in the list of nodes.
    pub node: String,
    /// The node's own addresses (InternalIP), at most one of a family.
    pub node_addresses: Vec<IpAddr>,
    /// The node's share of the cluster's pod range (spec.podCIDRs), at most one of a family.
    pub pod_cidrs: Vec<IpNet>,
    /// The whole cluster's pod range.
    pub cluster_cidrs: Vec<IpNet>,
    pub overlay: OverlayKind,
    /// The pods' MTU; by default that of the link with the node's address, less what the overlay adds.
    pub mtu: Option<u32>,
}
