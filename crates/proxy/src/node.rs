//! What the data path knows of the node it works on.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use services::{Place, Protocol};

/// One node, as its data path sees it. A change of it renders every frontend anew.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeView {
    pub place: Place,
    /// The node's own addresses, the primary of each family first.
    pub addresses: Vec<IpAddr>,
    /// Where node ports listen; the primary address of each family unless configured otherwise.
    pub node_port_addresses: Vec<IpAddr>,
    /// All pods of the cluster: what does not come from here is outside, and masqueraded on its way to a cluster IP.
    pub pod_cidrs: Vec<IpNet>,
    /// Where cluster IPs are allocated: packets to one that nobody has are dropped before they loop.
    pub service_cidrs: Vec<IpNet>,
    /// Masquerade everything that is sent to a Service.
    pub masquerade_all: bool,
    /// Endpoints that are known not to answer. They are avoided as long as another one is left.
    pub ejected: BTreeSet<(SocketAddr, Protocol)>,
}

impl NodeView {
    /// A node whose node ports listen on the first address of each family.
    pub fn new(place: Place, addresses: Vec<IpAddr>, pod_cidrs: Vec<IpNet>, service_cidrs: Vec<IpNet>) -> Self {
        let primary = |v6: bool| addresses.iter().find(|address| address.is_ipv6() == v6).copied();
        let node_port_addresses = [primary(false), primary(true)].into_iter().flatten().collect();
        NodeView { place, addresses, node_port_addresses, pod_cidrs, service_cidrs, ..NodeView::default() }
    }

    pub(crate) fn pod_cidrs(&self, v6: bool) -> impl Iterator<Item = &IpNet> {
        self.pod_cidrs.iter().filter(move |cidr| cidr.addr().is_ipv6() == v6)
    }
}
