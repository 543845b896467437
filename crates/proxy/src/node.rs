//! What the data path knows of the node it works on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use linux::ipvs::{Scheduler, Timeouts};
use services::{Place, Protocol, Selection};

/// kube-proxy's bit of the packet mark.
const MASQUERADE_BIT: u8 = 14;

/// How a packet of a pod is told from one of the outside. kube-proxy calls the choice `detectLocalMode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pods {
    /// It comes from one of these networks. Without any nobody can tell, and nothing counts as outside.
    Cidrs(Vec<IpNet>),
    /// It comes in through this bridge: pods of this node only.
    Bridge(Box<str>),
    /// It comes in through an interface whose name starts so: pods of this node only.
    InterfacePrefix(Box<str>),
}

impl Default for Pods {
    fn default() -> Self {
        Pods::Cidrs(Vec::new())
    }
}

impl Pods {
    /// The networks of one family; none where interfaces tell.
    pub fn cidrs(&self, v6: bool) -> impl Iterator<Item = &IpNet> {
        let all = match self {
            Pods::Cidrs(all) => all.as_slice(),
            Pods::Bridge(_) | Pods::InterfacePrefix(_) => &[],
        };
        all.iter().filter(move |cidr| cidr.addr().is_ipv6() == v6)
    }
}

impl Display for Pods {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Pods::Cidrs(all) => all.iter().try_for_each(|cidr| writeln!(f, "# pods are in {cidr}")),
            Pods::Bridge(name) => writeln!(f, "# pods are behind {name}"),
            Pods::InterfacePrefix(name) => writeln!(f, "# pods are behind {name}*"),
        }
    }
}

/// One node, as its data path sees it. A change of it renders every frontend anew.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    pub place: Place,
    /// The node's own addresses, the primary of each family first.
    pub addresses: Vec<IpAddr>,
    /// Where node ports listen. `None` is each mode's own default: the primary address of each family in nftables, every
    /// address of the node in ipvs, 127.0.0.1 too in iptables.
    pub node_port_addresses: Option<Vec<IpAddr>>,
    /// Node ports may answer on 127.0.0.1; the iptables mode alone can.
    pub localhost_node_ports: bool,
    /// Who is inside: what does not come from a pod is masqueraded on its way to a cluster IP.
    pub pods: Pods,
    /// Where cluster IPs are allocated: packets to one that nobody has are dropped before they loop.
    pub service_cidrs: Vec<IpNet>,
    /// Masquerade all that is sent to a cluster IP, pods' traffic too.
    pub masquerade_all: bool,
    /// The bit of a packet's mark that the iptables mode uses; the nftables mode uses none.
    pub masquerade_bit: u8,
    /// Node ports answer on 127.0.0.1 and ::1 as well, TCP and UDP, through relays of this process where the kernel's rules
    /// cannot do it (KEP-6032). Asked once, when the proxy starts.
    pub relay_localhost: bool,
    /// Endpoints that are known not to answer. They are avoided, but never more than half of those that a Service could use.
    pub ejected: BTreeSet<(SocketAddr, Protocol)>,
    pub ipvs: IpvsSettings,
    /// How endpoints are chosen for Services that do not say; the ebpf mode alone has a choice of its own.
    pub selection: Selection,
    /// Whether endpoints on other nodes answer clients from outside past this node (DSR), for Services that do not say; the
    /// ebpf mode alone can do it.
    pub direct_return: bool,
    /// The other nodes that take packets for it.
    pub takers: BTreeMap<Arc<str>, Taker>,
}

/// A node whose proxy answers clients itself that came to another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taker {
    pub addresses: Vec<IpAddr>,
    /// For Services that do not ask for it, too.
    pub by_default: bool,
}

impl Taker {
    /// Whether it does so for a Service that asks for it or not, or does not say.
    pub(crate) fn takes(&self, asked: Option<bool>) -> bool {
        asked.unwrap_or(self.by_default)
    }
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

impl Default for NodeView {
    fn default() -> Self {
        NodeView {
            place: Place::default(),
            addresses: Vec::new(),
            node_port_addresses: None,
            localhost_node_ports: true,
            pods: Pods::default(),
            service_cidrs: Vec::new(),
            masquerade_all: false,
            masquerade_bit: MASQUERADE_BIT,
            relay_localhost: false,
            ejected: BTreeSet::new(),
            ipvs: IpvsSettings::default(),
            selection: Selection::default(),
            direct_return: false,
            takers: BTreeMap::new(),
        }
    }
}

impl NodeView {
    /// A node whose node ports listen where the mode has them by default.
    pub fn new(place: Place, addresses: Vec<IpAddr>, pod_cidrs: Vec<IpNet>, service_cidrs: Vec<IpNet>) -> Self {
        NodeView { place, addresses, pods: Pods::Cidrs(pod_cidrs), service_cidrs, ..NodeView::default() }
    }

    /// Only what is known of endpoints differs, if anything: then not every frontend is rendered anew. With `past` other nodes
    /// that take packets count, too.
    pub(crate) fn differs_in_ejected_only(&self, other: &NodeView, past: bool) -> bool {
        let without = |view: &NodeView| {
            let takers = if past { view.takers.clone() } else { BTreeMap::new() };
            NodeView { ejected: BTreeSet::new(), takers, ..view.clone() }
        };
        without(self) == without(other)
    }

    /// The first address of each family.
    pub fn primary_addresses(&self) -> Vec<IpAddr> {
        let primary = |v6: bool| self.addresses.iter().find(|address| address.is_ipv6() == v6).copied();
        [primary(false), primary(true)].into_iter().flatten().collect()
    }

    pub(crate) fn pod_cidrs(&self, v6: bool) -> impl Iterator<Item = &IpNet> {
        self.pods.cidrs(v6)
    }
}
