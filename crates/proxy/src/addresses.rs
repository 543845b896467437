//! Where a frontend is reached on this node and by whom, for one address family.

use std::net::IpAddr;

use ipnet::IpNet;
use services::Frontend;

use crate::NodeView;

/// The frontend's addresses of the family; those of the node, for its node port, are each mode's own choice.
pub(crate) struct Addresses {
    pub cluster: Vec<IpAddr>,
    pub external: Vec<IpAddr>,
    pub load_balancer: Vec<IpAddr>,
    /// Who alone may use the load balancer's addresses; everybody, if it is empty.
    pub sources: Vec<IpNet>,
    /// An address of this node is among the sources.
    pub node_may: bool,
}

impl Addresses {
    /// `None` without a cluster IP of the family: a Service has node ports and external addresses only in the families it
    /// has a cluster IP of.
    pub fn of(frontend: &Frontend, node: &NodeView, v6: bool) -> Option<Self> {
        let of_family = |all: &[IpAddr]| of_family(all, v6).collect::<Vec<_>>();
        let cluster = of_family(&frontend.cluster_ips);
        if cluster.is_empty() {
            return None;
        }
        let sources: Vec<IpNet> =
            frontend.source_ranges.iter().filter(|net| net.addr().is_ipv6() == v6).copied().collect();
        Some(Addresses {
            cluster,
            external: of_family(&frontend.external_ips),
            load_balancer: of_family(&frontend.load_balancer_ips),
            node_may: node.addresses.iter().any(|address| sources.iter().any(|net| net.contains(address))),
            sources,
        })
    }

    /// Those through which the outside comes, the node's own apart.
    pub fn outside(&self) -> impl Iterator<Item = IpAddr> {
        self.external.iter().chain(&self.load_balancer).copied()
    }

    /// Who may use this address of the load balancer, first and last address of each range; no two overlap, which the
    /// kernel refuses.
    pub fn ranges(&self, load_balancer: IpAddr) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        // A node in the ranges may loop its own packets through the load balancer, which then come from that address.
        let looped = self.node_may.then(|| IpNet::from(load_balancer));
        let all: Vec<IpNet> = self.sources.iter().copied().chain(looped).collect();
        IpNet::aggregate(&all).into_iter().map(|net| (net.network(), net.broadcast()))
    }
}

pub(crate) fn of_family(all: &[IpAddr], v6: bool) -> impl Iterator<Item = IpAddr> {
    all.iter().filter(move |address| address.is_ipv6() == v6).copied()
}
