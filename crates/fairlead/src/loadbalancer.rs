//! Addresses for LoadBalancer Services, and who announces them: what the server, the agents and `fairlead loadbalancer` share.

mod allocate;
mod alone;
mod announce;
mod bgp;
mod options;
mod vrrp;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use api::kinds::{IP_ADDRESS_POOLS, L2_ADVERTISEMENTS};
use api::object::{Key, Metadata};
use ipnet::IpNet;
use loadbalancer::Metrics;
use reconcile::{Change, ServiceFeed};
use serde_json::{Value, json};
use services::ServiceTable;
use tokio_util::sync::CancellationToken;

pub use allocate::run as allocate;
pub use alone::{LoadBalancerArgs, METRICS_PORT, respond, run};
pub use announce::Node;
pub use options::LoadBalancerOptions;

const NAMESPACE: &str = "kube-system";
/// Of all that could, the holder of this Lease gives addresses.
const LEASE: &str = "fairlead-loadbalancer";
/// Its holder has a second vote where announcing nodes are split into equal halves.
const TIE: &str = "fairlead-layer2";
/// How long changes may gather; a new address is announced at most this much later.
const GATHER: Duration = Duration::from_millis(10);
/// A node with this label announces nothing, and has no vote.
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// The taint of a node that an autoscaler is about to remove: it announces nothing that another can, as load balancers turn away
/// from it.
const DRAINING: &str = "ToBeDeletedByClusterAutoscaler";
/// Of the IPv6 pool that `up` makes.
const POOL_LENGTH_V6: u8 = 112;

/// Announces in every way until the token is cancelled.
pub async fn announce(
    client: kube::Client,
    feed: ServiceFeed,
    node: Node,
    metrics: Arc<Metrics>,
    token: CancellationToken,
) {
    let bgp = bgp::run(client.clone(), feed.clone(), node.clone(), metrics.clone(), token.clone());
    tokio::join!(announce::run(client, feed, node, metrics, token), bgp);
}

fn key(metadata: &Metadata) -> Key {
    Key::new(&metadata.namespace, &metadata.name)
}

fn update<T, K: Ord, V>(held: &mut BTreeMap<K, V>, change: Change<T>, key: impl Fn(&T) -> K, value: impl Fn(T) -> V) {
    match change {
        Change::Reset(all) => *held = all.into_iter().map(|one| (key(&one), value(one))).collect(),
        Change::Apply(one) => drop(held.insert(key(&one), value(one))),
        Change::Delete(one) => drop(held.remove(&key(&one))),
    }
}

/// Nodes with ready endpoints, or, if there are none at all, with those that still serve.
fn serving_nodes(table: &ServiceTable, namespace: &str, name: &str) -> BTreeSet<Arc<str>> {
    let all = || table.slices(namespace, name).flat_map(|slice| &slice.endpoints);
    let ready: BTreeSet<Arc<str>> = all().filter(|one| one.ready).filter_map(|one| one.node.clone()).collect();
    if ready.is_empty() { all().filter(|one| one.serving).filter_map(|one| one.node.clone()).collect() } else { ready }
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
