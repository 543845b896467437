//! Addresses for LoadBalancer Services, and who announces them: what the server, the agents and `fairlead loadbalancer` share.

mod allocate;
mod alone;
mod announce;
mod options;

use std::net::IpAddr;

use api::kinds::{IP_ADDRESS_POOLS, L2_ADVERTISEMENTS};
use api::object::{Key, Metadata};
use ipnet::IpNet;
use serde_json::{Value, json};

pub use allocate::run as allocate;
pub use alone::{LoadBalancerArgs, METRICS_PORT, respond, run};
pub use announce::{Node, run as announce};
pub use options::LoadBalancerOptions;

const NAMESPACE: &str = "kube-system";
/// Of all that could, the holder of this Lease gives addresses.
const LEASE: &str = "fairlead-loadbalancer";
/// Its holder has a second vote where announcing nodes are split into equal halves.
const TIE: &str = "fairlead-layer2";
/// Of the IPv6 pool that `up` makes.
const POOL_LENGTH_V6: u8 = 112;

fn key(metadata: &Metadata) -> Key {
    Key::new(&metadata.namespace, &metadata.name)
}

/// A pool of the upper half of the nodes' own IPv4 range and of a part of their IPv6 range, announced by every node: what
/// `up` starts with, as collections of the API and the objects in them.
pub fn first_objects(node_cidrs: &[IpNet]) -> Vec<(String, Value)> {
    let addresses: Vec<String> = node_cidrs.iter().filter_map(pool_of).map(|range| range.to_string()).collect();
    if addresses.is_empty() {
        return Vec::new();
    }
    let metadata = json!({"name": "default", "namespace": NAMESPACE});
    let pool = json!({
        "apiVersion": IP_ADDRESS_POOLS.api_version(), "kind": IP_ADDRESS_POOLS.kind, "metadata": metadata,
        // The last IPv4 address is the broadcast address of the nodes' network.
        "spec": {"addresses": addresses, "avoidBuggyIPs": true},
    });
    let advertisement = json!({
        "apiVersion": L2_ADVERTISEMENTS.api_version(), "kind": L2_ADVERTISEMENTS.kind, "metadata": metadata,
        "spec": {"ipAddressPools": ["default"]},
    });
    vec![(IP_ADDRESS_POOLS.path(NAMESPACE), pool), (L2_ADVERTISEMENTS.path(NAMESPACE), advertisement)]
}

/// `None`: the range is too small to be shared.
fn pool_of(nodes: &IpNet) -> Option<IpNet> {
    match nodes {
        IpNet::V4(net) => net.subnets((net.prefix_len() + 1).min(30)).ok()?.last().map(IpNet::V4),
        IpNet::V6(net) if net.prefix_len() < POOL_LENGTH_V6 => {
            let first = u128::from(net.network()) | 1 << (128 - POOL_LENGTH_V6);
            IpNet::new(IpAddr::from(first.to_be_bytes()), POOL_LENGTH_V6).ok()
        }
        IpNet::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::pool_of;

    #[test]
    fn a_pool_lies_beside_the_nodes() {
        for (nodes, pool) in [
            ("192.168.49.0/24", Some("192.168.49.128/25")),
            ("fd00:c0a8:31::/64", Some("fd00:c0a8:31::1:0/112")),
            ("fd00::/120", None),
        ] {
            let found = pool_of(&nodes.parse().expect("a literal range")).map(|range| range.to_string());
            assert_eq!(found.as_deref(), pool, "{nodes}");
        }
    }
}
