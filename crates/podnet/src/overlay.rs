//! The way to other nodes' pods: plain routes between nodes on one link, or a VXLAN device across any network.
//!
//! A plan is computed from the whole list of nodes each time and compared with what the kernel holds, so it does not matter
//! which change brought it about, or how often.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use ipnet::IpNet;
use linux::link::{Address, Fdb, Item, LinkError, Links, Mac, Neighbour, Route};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{PodNet, PodnetError};

/// Marks routes to other nodes (`ip route show proto 71`), so that those of nodes that left can be told from the rest.
const PROTOCOL: u8 = 71;
const DEVICE: &str = "fl-vxlan";
const NETWORK_ID: u32 = 4096;
/// The kernel's and flannel's port, not IANA's 4789: a virtual network below may use that one itself.
const PORT: u16 = 8472;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayKind {
    HostGateway,
    Vxlan,
}

/// A node as this crate sees it: parsed from spec.podCIDRs and the InternalIP addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerNode {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    pub pod_cidrs: Vec<IpNet>,
}

impl PeerNode {
    fn address(&self, is_ipv4: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == is_ipv4)
    }
}

/// One way to reach pods on other nodes.
pub trait Overlay: Send + Sync {
    /// The device of its own that it needs, with its addresses.
    fn device(&self) -> Vec<Item>;
    /// Bytes that it adds to every packet.
    fn overhead(&self) -> u32;
    /// Routes, neighbours and forwarding entries to every other node. A node without a range or an address yields none.
    fn plan(&self, nodes: &[PeerNode]) -> Vec<Item>;
}

/// Nodes are each other's gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostGateway {
    pub node: String,
}

impl Overlay for HostGateway {
    fn device(&self) -> Vec<Item> {
        Vec::new()
    }

    fn overhead(&self) -> u32 {
        0
    }

    fn plan(&self, nodes: &[PeerNode]) -> Vec<Item> {
        let mut items = Vec::new();
        for node in nodes.iter().filter(|node| node.name != self.node) {
            for cidr in &node.pod_cidrs {
                let via = node.address(cidr.addr().is_ipv4());
                items.extend(via.map(|via| Item::Route(Route::network(*cidr).via(via).protocol(PROTOCOL))));
            }
        }
        items
    }
}

/// Every node has a tunnel device whose hardware address follows from the node's address, so a node needs to publish nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    pub node: String,
    /// The end of the tunnel here.
    pub local: IpAddr,
    pub pod_cidrs: Vec<IpNet>,
    /// MTU of the link that `local` is on.
    pub uplink_mtu: u32,
}

impl Overlay for Vxlan {
    fn device(&self) -> Vec<Item> {
        let device = linux::link::Vxlan {
            name: DEVICE.into(),
            id: NETWORK_ID,
            port: PORT,
            local: self.local,
            mac: Mac::of(self.local),
            mtu: self.uplink_mtu.saturating_sub(self.overhead()),
        };
        let mut items = vec![Item::Vxlan(device), Item::Up(DEVICE.into())];
        // The node itself speaks to other nodes' pods from an address in its own range, so that answers take the tunnel, too.
        let own = self.pod_cidrs.iter().map(|cidr| IpNet::from(cidr.network()));
        items.extend(own.map(|address| Item::Address(Address { link: DEVICE.into(), address })));
        items
    }

    fn overhead(&self) -> u32 {
        // Outer IP, UDP, VXLAN, inner Ethernet.
        let outer = if self.local.is_ipv4() { 20 } else { 40 };
        outer + 8 + 8 + 14
    }

    fn plan(&self, nodes: &[PeerNode]) -> Vec<Item> {
        let mut items = Vec::new();
        for node in nodes.iter().filter(|node| node.name != self.node) {
            let Some(remote) = node.address(self.local.is_ipv4()) else { continue };
            let mac = Mac::of(remote);
            if !node.pod_cidrs.is_empty() {
                items.push(Item::Fdb(Fdb { link: DEVICE.into(), mac, remote }));
            }
            for cidr in &node.pod_cidrs {
                // The device over there has this address; no neighbour discovery crosses the tunnel.
                let gateway = cidr.network();
                let route = Route::network(*cidr).via(gateway).link(DEVICE).onlink().protocol(PROTOCOL);
                items.push(Item::Neighbour(Neighbour { link: DEVICE.into(), address: gateway, mac }));
                items.push(Item::Route(route));
            }
        }
        items
    }
}

/// Makes the kernel's ways to other nodes those of the plan. All that can be done is done; the first failure is returned.
pub fn apply(links: &Links, overlay: &dyn Overlay, nodes: &[PeerNode]) -> Result<(), PodnetError> {
    let device = overlay.device();
    if device.is_empty() {
        links.remove_link(DEVICE)?;
    }
    links.ensure_all(&device)?;
    let wanted = overlay.plan(nodes);
    let held = held(links, !device.is_empty())?;
    let mut first_failure = None;
    // IPv6 refuses a gateway on one link while the route that it replaces leads over another: that one goes first.
    for item in held.iter().filter(|item| wanted.iter().any(|wanted| is_on_other_link(wanted, item))) {
        links.remove(item)?;
    }
    // Otherwise what is new comes first: where a route only changes its gateway, there is no moment without one.
    for item in wanted.iter().filter(|item| !held.contains(item)) {
        if let Err(error) = links.ensure(item) {
            first_failure.get_or_insert(explain(item, nodes, error));
        }
    }
    for item in held.iter().filter(|item| !wanted.iter().any(|wanted| is_same_place(wanted, item))) {
        if let Err(error) = links.remove(item) {
            first_failure.get_or_insert(error.into());
        }
    }
    first_failure.map_or(Ok(()), Err)
}

fn held(links: &Links, has_device: bool) -> Result<Vec<Item>, LinkError> {
    let routes = links.routes()?.into_iter().filter(|route| route.protocol == PROTOCOL);
    let mut held: Vec<Item> = routes.map(Item::Route).collect();
    if has_device {
        held.extend(links.neighbours(DEVICE)?.into_iter().map(Item::Neighbour));
        held.extend(links.forwarding(DEVICE)?.into_iter().map(Item::Fdb));
    }
    Ok(held)
}

/// Whether ensuring one replaces the other.
fn is_same_place(a: &Item, b: &Item) -> bool {
    match (a, b) {
        (Item::Route(a), Item::Route(b)) => a.to == b.to,
        (Item::Neighbour(a), Item::Neighbour(b)) => a.address == b.address,
        (Item::Fdb(a), Item::Fdb(b)) => a.mac == b.mac,
        _ => false,
    }
}

fn is_on_other_link(wanted: &Item, held: &Item) -> bool {
    match (wanted, held) {
        (Item::Route(wanted), Item::Route(held)) => {
            wanted.to == held.to && wanted.link.is_some() && wanted.link != held.link
        }
        _ => false,
    }
}

fn explain(item: &Item, nodes: &[PeerNode], source: LinkError) -> PodnetError {
    match item {
        Item::Route(Route { to, via: Some(via), is_onlink: false, .. }) if source.is_unreachable() => {
            let node = nodes.iter().find(|node| node.pod_cidrs.contains(to)).map(|node| node.name.clone());
            PodnetError::NotOnLink { node: node.unwrap_or_default(), via: *via, source }
        }
        _ => source.into(),
    }
}

/// Follows the list of nodes until it ends or `stop` is given. What could not be done is tried again, less and less often.
pub async fn run_overlay(
    podnet: Arc<PodNet>,
    mut nodes: impl Stream<Item = Vec<PeerNode>> + Send + Unpin,
    stop: CancellationToken,
) {
    const FIRST: Duration = Duration::from_millis(500);
    const LAST: Duration = Duration::from_secs(30);
    let mut latest: Option<Vec<PeerNode>> = None;
    let mut delay = FIRST;
    let mut retry_at: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            next = nodes.next() => match next {
                // A heartbeat: nothing that matters here, and no reason to put off the next attempt.
                Some(next) if latest.as_ref() == Some(&next) => continue,
                Some(next) => {
                    latest = Some(next);
                    delay = FIRST;
                }
                None => return,
            },
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                delay = (delay * 2).min(LAST);
            }
        }
        let Some(nodes) = latest.clone() else { continue };
        retry_at = match podnet.sync(nodes).await {
            Ok(()) => None,
            Err(error) => {
                tracing::warn!(%error, retry_in = ?delay, "the way to other nodes' pods is incomplete");
                Some(Instant::now() + delay)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(index: u8) -> PeerNode {
        PeerNode {
            name: format!("node-{index}"),
            addresses: [format!("192.168.49.{}", index + 1), format!("fd00:c0a8:31::{}", index + 1)]
                .map(|text| text.parse::<IpAddr>().expect("an address"))
                .into(),
            pod_cidrs: [format!("10.244.{}.0/24", index - 1), format!("fd00:10:244:{}::/64", index - 1)]
                .map(|text| text.parse::<IpNet>().expect("a range"))
                .into(),
        }
    }

    fn lines(items: &[Item]) -> Vec<String> {
        items.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn host_gateway_routes_each_family_over_the_other_node_s_address_of_it() {
        let overlay = HostGateway { node: "node-1".into() };
        assert_eq!(
            lines(&overlay.plan(&[node(1), node(2)])),
            ["route 10.244.1.0/24 via 192.168.49.3", "route fd00:10:244:1::/64 via fd00:c0a8:31::3"]
        );
        let mut young = node(2);
        young.pod_cidrs.clear();
        assert!(overlay.plan(&[node(1), young]).is_empty());
    }

    #[test]
    fn vxlan_tells_the_device_who_is_where_and_carries_both_families_over_one() {
        let me = node(1);
        let overlay =
            Vxlan { node: me.name.clone(), local: me.addresses[0], pod_cidrs: me.pod_cidrs.clone(), uplink_mtu: 1500 };
        assert_eq!(
            lines(&overlay.plan(&[me, node(2)])),
            [
                "fdb 0a:58:c0:a8:31:03 dst 192.168.49.3 dev fl-vxlan",
                "neighbour 10.244.1.0 lladdr 0a:58:c0:a8:31:03 dev fl-vxlan",
                "route 10.244.1.0/24 via 10.244.1.0 dev fl-vxlan onlink",
                "neighbour fd00:10:244:1:: lladdr 0a:58:c0:a8:31:03 dev fl-vxlan",
                "route fd00:10:244:1::/64 via fd00:10:244:1:: dev fl-vxlan onlink",
            ]
        );
        assert_eq!(
            lines(&overlay.device()),
            [
                "vxlan fl-vxlan id 4096 port 8472 local 192.168.49.2",
                "link fl-vxlan up",
                "address 10.244.0.0/32 dev fl-vxlan",
                "address fd00:10:244::/128 dev fl-vxlan",
            ]
        );
        assert_eq!(overlay.overhead(), 50);
    }
}
