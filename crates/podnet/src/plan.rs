//! What links, addresses and routes a node and a pod should have: values only.

use std::net::IpAddr;

use ipnet::IpNet;
use linux::link::{Address, Bridge, Item, Mac, Neighbour, Port, Route, RouteKind, Veth};
use linux::netns::Netns;

use crate::BRIDGE;
use crate::ipam::nth;

/// The gateway of a pod range is its first address.
pub(crate) fn gateway(cidr: &IpNet) -> Option<IpAddr> {
    nth(cidr, 1)
}

/// Pods know the bridge by this address for good: it follows from the first gateway's.
pub(crate) fn bridge_mac(pod_cidrs: &[IpNet]) -> Option<Mac> {
    pod_cidrs.first().and_then(gateway).map(Mac::of)
}

/// A node before its first pod.
pub(crate) fn node_items(pod_cidrs: &[IpNet], mtu: u32) -> Vec<Item> {
    let bridge = Bridge { name: BRIDGE.into(), mac: bridge_mac(pod_cidrs), mtu: Some(mtu) };
    let mut items = vec![Item::Bridge(bridge), Item::Up(BRIDGE.into())];
    for cidr in pod_cidrs {
        let address = gateway(cidr).map(|gateway| Address { link: BRIDGE.into(), address: IpNet::from(gateway) });
        items.extend(address.map(Item::Address));
        // An address without a pod is answered at once, and never sent out by the default route to come back again.
        items.push(Item::Route(Route::network(*cidr).kind(RouteKind::Unreachable)));
    }
    items
}

/// Settings of a node's namespace: it is a router.
pub(crate) fn node_settings(uplink: &str, has_ipv6: bool) -> Vec<(String, &'static str)> {
    let mut all = vec![
        ("net/ipv4/ip_forward".into(), "1"),
        // Loose: a packet may come in by another link than the one its answer takes, as with several overlays and uplinks.
        (format!("net/ipv4/conf/{BRIDGE}/rp_filter"), "2"),
        (format!("net/ipv4/conf/{uplink}/rp_filter"), "2"),
        // Pods beside each other talk by way of the node, on purpose: do not tell them of a shorter way. Both are asked.
        ("net/ipv4/conf/all/send_redirects".into(), "0"),
        (format!("net/ipv4/conf/{BRIDGE}/send_redirects"), "0"),
    ];
    if has_ipv6 {
        all.push(("net/ipv6/conf/all/forwarding".into(), "1"));
        all.push((format!("net/ipv6/conf/{BRIDGE}/accept_ra"), "0"));
    }
    all
}

/// Settings of a pod's namespace, before its link exists. IPv6 has no way to keep the router from sending redirects.
pub(crate) fn pod_settings(has_ipv6: bool) -> Vec<(&'static str, &'static str)> {
    let mut all = vec![("net/ipv4/conf/all/accept_redirects", "0"), ("net/ipv4/conf/default/accept_redirects", "0")];
    if has_ipv6 {
        all.extend([
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            ("net/ipv6/conf/all/accept_redirects", "0"),
            ("net/ipv6/conf/default/accept_redirects", "0"),
            ("net/ipv6/conf/default/accept_ra", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
        ]);
    }
    all
}

/// The node's name for a sandbox's cable: it fits in the kernel's 15 characters and is the same after a restart.
pub(crate) fn veth_name(sandbox: &str) -> String {
    format!("flv{:012x}", hash(sandbox) & 0xffff_ffff_ffff)
}

/// The same for all time, so names may contain it (FNV-1a).
pub(crate) fn hash(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, step)
}

/// The node's side of one pod.
pub(crate) fn host_items(sandbox: &str, netns: &Netns, addresses: &[IpAddr], mtu: u32) -> Vec<Item> {
    let name = veth_name(sandbox);
    let mac = addresses.first().map(|first| Mac::of(*first));
    let veth =
        Veth { name: name.clone(), peer: "eth0".into(), peer_netns: netns.clone(), peer_mac: mac, mtu: Some(mtu) };
    let mut items = vec![
        Item::Veth(veth),
        Item::Port(Port { link: name.clone(), bridge: BRIDGE.into(), hairpin: true }),
        Item::Up(name),
    ];
    items.extend(way_items(addresses));
    items
}

/// The way to a pod's addresses, apart from its link: what has to be taken away when the link is gone.
pub(crate) fn way_items(addresses: &[IpAddr]) -> Vec<Item> {
    let Some(mac) = addresses.first().map(|first| Mac::of(*first)) else { return Vec::new() };
    addresses
        .iter()
        .flat_map(|address| {
            [
                Item::Neighbour(Neighbour { link: BRIDGE.into(), address: *address, mac }),
                Item::Route(Route::host(*address).link(BRIDGE)),
            ]
        })
        .collect()
}

/// The pod's own side.
pub(crate) fn pod_items(addresses: &[IpAddr], pod_cidrs: &[IpNet]) -> Vec<Item> {
    let mut items = vec![Item::Up("lo".into()), Item::Up("eth0".into())];
    for address in addresses {
        items.push(Item::Address(Address { link: "eth0".into(), address: IpNet::from(*address) }));
        let gateways = pod_cidrs.iter().filter(|cidr| cidr.contains(address)).filter_map(gateway);
        for gateway in gateways {
            let mac = bridge_mac(pod_cidrs);
            items.extend(mac.map(|mac| Item::Neighbour(Neighbour { link: "eth0".into(), address: gateway, mac })));
            items.push(Item::Route(Route::default_via(gateway).link("eth0").onlink()));
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(items: &[Item]) -> Vec<String> {
        items.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_pod_has_single_addresses_and_sends_everything_to_its_gateway() {
        let cidrs = ["10.244.1.0/24", "fd00:10:244:1::/64"].map(|text| text.parse::<IpNet>().expect("a range"));
        let addresses = ["10.244.1.5", "fd00:10:244:1::5"].map(|text| text.parse::<IpAddr>().expect("an address"));
        assert_eq!(
            lines(&pod_items(&addresses, &cidrs)),
            [
                "link lo up",
                "link eth0 up",
                "address 10.244.1.5/32 dev eth0",
                "neighbour 10.244.1.1 lladdr 0a:58:0a:f4:01:01 dev eth0",
                "route 0.0.0.0/0 via 10.244.1.1 dev eth0 onlink",
                "address fd00:10:244:1::5/128 dev eth0",
                "neighbour fd00:10:244:1::1 lladdr 0a:58:0a:f4:01:01 dev eth0",
                "route ::/0 via fd00:10:244:1::1 dev eth0 onlink",
            ]
        );
        assert_eq!(
            lines(&way_items(&addresses)),
            [
                "neighbour 10.244.1.5 lladdr 0a:58:0a:f4:01:05 dev fl-br0",
                "route 10.244.1.5/32 dev fl-br0",
                "neighbour fd00:10:244:1::5 lladdr 0a:58:0a:f4:01:05 dev fl-br0",
                "route fd00:10:244:1::5/128 dev fl-br0",
            ]
        );
        assert_eq!(
            lines(&node_items(&cidrs, 1500)),
            [
                "bridge fl-br0",
                "link fl-br0 up",
                "address 10.244.1.1/32 dev fl-br0",
                "route unreachable 10.244.1.0/24",
                "address fd00:10:244:1::1/128 dev fl-br0",
                "route unreachable fd00:10:244:1::/64",
            ]
        );
    }

    #[test]
    fn a_cable_s_name_fits_the_kernel_whatever_the_sandbox_is_called() {
        for sandbox in ["", "a", "0123456789abcdef".repeat(8).as_str()] {
            assert_eq!(veth_name(sandbox).len(), 15);
        }
        assert_ne!(veth_name("a"), veth_name("b"));
    }
}
