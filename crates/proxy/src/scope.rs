//! The endpoints of a frontend that this node uses, for one address family.

use services::{Endpoint, Frontend, Protocol, categorize_endpoints};

use crate::NodeView;

/// Endpoints of each scope in slot order.
pub(crate) struct Scopes<'a> {
    pub cluster: Vec<&'a Endpoint>,
    pub local: Vec<&'a Endpoint>,
    /// Those that would be in `cluster` and in `local`, but are ejected.
    pub out: Vec<&'a Endpoint>,
    /// An endpoint of this family is usable somewhere: an empty scope drops instead of rejecting.
    pub any: bool,
}

pub(crate) fn scopes<'a>(frontend: &'a Frontend, node: &NodeView, v6: bool) -> Scopes<'a> {
    let categories = categorize_endpoints(frontend, &node.place, v6);
    let mut out = Vec::new();
    let mut choose = |all: Vec<&'a Endpoint>| {
        let (kept, ejected) = eject(all, frontend.name.protocol, node);
        out.extend(ejected);
        kept
    };
    let (cluster, local) = (choose(categories.cluster), choose(categories.local));
    out.sort_by_key(|endpoint| endpoint.address);
    out.dedup_by_key(|endpoint| endpoint.address);
    Scopes { cluster, local, out, any: categories.any }
}

/// Splits a scope into those that stay and those that are out. Never more than half are out, so that wrong evidence, or one
/// cause that hits all, does not put the load of all on a few; who goes first is the order of the addresses, so that every
/// frontend with the same endpoints keeps the same ones.
fn eject<'a>(all: Vec<&'a Endpoint>, protocol: Protocol, node: &NodeView) -> (Vec<&'a Endpoint>, Vec<&'a Endpoint>) {
    let suspects = || all.iter().filter(|endpoint| node.ejected.contains(&(endpoint.address, protocol)));
    if node.ejected.is_empty() || suspects().next().is_none() {
        return (all, Vec::new());
    }
    let mut out: Vec<std::net::SocketAddr> = suspects().map(|endpoint| endpoint.address).collect();
    out.sort();
    out.truncate(all.len() / 2);
    all.into_iter().partition(|endpoint| out.binary_search(&endpoint.address).is_err())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::SocketAddr;

    use super::*;

    fn endpoint(host: u8) -> Endpoint {
        Endpoint {
            address: SocketAddr::from(([10, 244, 0, host], 8080)),
            node: None,
            zone: None,
            ready: true,
            serving: true,
            terminating: false,
            hints: None,
        }
    }

    #[test]
    fn at_most_half_are_out() {
        // endpoints, evidence against, who is out
        let cases: &[(&[u8], &[u8], &[u8])] = &[
            (&[1], &[1], &[]),
            (&[1, 2], &[1], &[1]),
            (&[1, 2], &[1, 2], &[1]),
            (&[2, 1], &[1, 2], &[1]),
            (&[1, 2, 3], &[3], &[3]),
            (&[1, 2, 3], &[2, 3], &[2]),
            (&[1, 2, 3, 4], &[4, 2, 3], &[2, 3]),
            (&[1, 2, 3], &[9], &[]),
            (&[], &[1], &[]),
        ];
        for (all, evidence, expected) in cases {
            let all: Vec<Endpoint> = all.iter().map(|host| endpoint(*host)).collect();
            let ejected: BTreeSet<_> = evidence.iter().map(|host| (endpoint(*host).address, Protocol::Tcp)).collect();
            let node = NodeView { ejected, ..NodeView::default() };
            let hosts = |endpoints: Vec<&Endpoint>| {
                let last = |endpoint: &&Endpoint| match endpoint.address.ip() {
                    std::net::IpAddr::V4(address) => address.octets()[3],
                    std::net::IpAddr::V6(_) => 0,
                };
                endpoints.iter().map(last).collect::<Vec<u8>>()
            };
            let (kept, out) = eject(all.iter().collect(), Protocol::Tcp, &node);
            assert_eq!(hosts(out), *expected, "{evidence:?} of {}", all.len());
            assert_eq!(kept.len() + expected.len(), all.len());
            // Evidence against a TCP port says nothing of the UDP port.
            assert!(eject(all.iter().collect(), Protocol::Udp, &node).1.is_empty());
        }
    }
}
