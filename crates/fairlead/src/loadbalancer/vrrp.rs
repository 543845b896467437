//! Which part a node has in the virtual routers that advertisements ask for.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use loadbalancer::VrrpGroup;
use loadbalancer::vrrp::instance::RouterConfig;
use loadbalancer::vrrp::machine::Settings;
use loadbalancer::vrrp::packet::Checksum;

/// A virtual router, the nodes that take part, and its addresses, of one family.
pub struct Group {
    pub router: VrrpGroup,
    pub nodes: BTreeSet<String>,
    pub addresses: BTreeSet<IpAddr>,
}

impl Group {
    /// A virtual router as this one of several nodes is part of it. Priorities lie far apart: a node that is next waits long enough to
    /// hear of the one before it. Who is not of the cluster, such as a keepalived of its default priority, comes last.
    pub fn router_of(self, own: &str) -> RouterConfig {
        let Group { router, nodes, addresses } = self;
        const FIRST: usize = 250;
        const LAST: usize = 110;
        // Each router has another order, so that all nodes share the work.
        let shift = usize::from(router.id) % nodes.len().max(1);
        let place = nodes.iter().position(|name| name == own).unwrap_or_default();
        let rank = (place + nodes.len() - shift) % nodes.len().max(1);
        let step = (FIRST - LAST) / nodes.len().saturating_sub(1).max(1);
        let is_v4 = addresses.iter().all(IpAddr::is_ipv4);
        RouterConfig {
            name: format!("{}-{}", router.id, if is_v4 { "ipv4" } else { "ipv6" }),
            // The node's own.
            interface: String::new(),
            id: router.id,
            settings: Settings {
                priority: u8::try_from(FIRST - rank * step).unwrap_or(1),
                interval: router.interval,
                preempts: true,
                // A node that comes back has to know its endpoints first.
                preempt_delay: Duration::from_secs(5),
            },
            addresses: addresses.into_iter().collect(),
            peers: Vec::new(),
            source: None,
            checksum: Checksum::default(),
            waits: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_lie_apart_and_routers_are_shared_out() {
        let nodes: BTreeSet<String> = ["a", "b", "c"].map(str::to_owned).into();
        let priority = |own: &str, id: u8| {
            let router = VrrpGroup { id, interval: Duration::from_millis(100) };
            let addresses = BTreeSet::from([IpAddr::from([192, 0, 2, 1])]);
            Group { router, nodes: nodes.clone(), addresses }.router_of(own).settings.priority
        };
        assert_eq!(["a", "b", "c"].map(|own| priority(own, 51)), [250, 180, 110]);
        assert_eq!(["a", "b", "c"].map(|own| priority(own, 52)), [110, 250, 180]);
        let one = Group {
            router: VrrpGroup { id: 7, interval: Duration::from_millis(100) },
            nodes: BTreeSet::from(["a".to_owned()]),
            addresses: BTreeSet::from([IpAddr::from([192, 0, 2, 1])]),
        };
        assert_eq!(one.router_of("a").settings.priority, 250);
    }
}
