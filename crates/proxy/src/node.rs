//! What the data path knows of the node it works on.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use linux::ipvs::{Scheduler, Timeouts};
use services::{Place, Protocol};

/// One node, as its data path sees it. A change of it renders every frontend anew.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeView {
    pub place: Place,
    /// The node's own addresses, the primary of each family first.
    pub addresses: Vec<IpAddr>,
    /// Where node ports listen. `None` is each mode's own default: the primary address of each family in nftables, every
    /// address of the node in ipvs, 127.0.0.1 too in iptables.
    pub node_port_addresses: Option<Vec<IpAddr>>,
    /// All pods of the cluster: what does not come from here is outside, and masqueraded on its way to a cluster IP.
    pub pod_cidrs: Vec<IpNet>,
    /// Where cluster IPs are allocated: packets to one that nobody has are dropped before they loop.
    pub service_cidrs: Vec<IpNet>,
    /// Masquerade all that is sent to a cluster IP, pods' traffic too.
    pub masquerade_all: bool,
    /// Node ports answer on 127.0.0.1 and ::1 as well, TCP and UDP, through relays of this process where the kernel's rules
    /// cannot do it (KEP-6032). Asked once, when the proxy starts.
    pub relay_localhost: bool,
    /// Endpoints that are known not to answer. They are avoided, but never more than half of those that a Service could use.
    pub ejected: BTreeSet<(SocketAddr, Protocol)>,
    pub ipvs: IpvsSettings,
}

/// What only the ipvs mode asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IpvsSettings {
    /// How every Service chooses among its endpoints.
    pub scheduler: Scheduler,
    /// Answer ARP only for addresses of the interface that was asked: the node has the addresses of load balancers, too,
    /// and must not announce them where something else does.
    pub strict_arp: bool,
    /// When idle connections are forgotten; 0 leaves what the kernel has.
    pub timeouts: Timeouts,
}

impl NodeView {
    /// A node whose node ports listen where the mode has them by default.
    pub fn new(place: Place, addresses: Vec<IpAddr>, pod_cidrs: Vec<IpNet>, service_cidrs: Vec<IpNet>) -> Self {
        NodeView { place, addresses, pod_cidrs, service_cidrs, ..NodeView::default() }
    }

    /// Only what is known of endpoints differs, if anything: then not every frontend is rendered anew.
    pub(crate) fn differs_in_ejected_only(&self, other: &NodeView) -> bool {
        let without = |view: &NodeView| NodeView { ejected: BTreeSet::new(), ..view.clone() };
        without(self) == without(other)
    }

    pub(crate) fn primary_addresses(&self) -> Vec<IpAddr> {
        let primary = |v6: bool| self.addresses.iter().find(|address| address.is_ipv6() == v6).copied();
        [primary(false), primary(true)].into_iter().flatten().collect()
    }

    pub(crate) fn pod_cidrs(&self, v6: bool) -> impl Iterator<Item = &IpNet> {
        self.pod_cidrs.iter().filter(move |cidr| cidr.addr().is_ipv6() == v6)
    }
}
