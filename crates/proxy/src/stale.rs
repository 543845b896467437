//! UDP flows that must not go on: the kernel sends each packet of a known flow where it sent the first, however long ago
//! the endpoint went.
//!
//! TCP needs no such care: its peer answers with a reset, or the client gives up and starts a new connection.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use linux::conntrack::{Conntrack, Error};
use services::{Frontend, Protocol};

use crate::NodeView;
use crate::dataplane::Answerers;

/// What a frontend was and is, as far as UDP goes; `None` if nothing is to be looked for. Any *serving* endpoint may
/// answer, whatever the traffic policy says, so that live flows survive a change of policy; without endpoints nobody may.
pub(crate) fn answerers(
    before: Option<&Arc<Frontend>>,
    after: Option<&Arc<Frontend>>,
    node: &NodeView,
    all: &mut Answerers,
) {
    let is_udp = |frontend: &&Arc<Frontend>| frontend.name.protocol == Protocol::Udp;
    let serving: HashSet<SocketAddr> = after
        .into_iter()
        .flat_map(|after| &after.endpoints)
        .filter(|endpoint| endpoint.ready || endpoint.serving)
        .map(|endpoint| endpoint.address)
        .collect();
    for frontend in [before, after].into_iter().flatten().filter(is_udp) {
        for address in addresses(frontend, node) {
            all.entry(address).or_default().extend(&serving);
        }
    }
}

/// Where clients may call it.
pub(crate) fn addresses(frontend: &Frontend, node: &NodeView) -> Vec<SocketAddr> {
    let own = frontend.cluster_ips.iter().chain(&frontend.external_ips).chain(&frontend.load_balancer_ips);
    let mut addresses: Vec<SocketAddr> = own.map(|address| (*address, frontend.port).into()).collect();
    if let Some(port) = frontend.node_port {
        let listening = node.node_port_addresses.as_ref().unwrap_or(&node.addresses);
        addresses.extend(listening.iter().map(|address| SocketAddr::from((*address, port.get()))));
    }
    addresses
}

/// Deletes the flows to these addresses that somebody else answers, or nobody; how many there were.
pub(crate) fn sweep(conntrack: &mut dyn Conntrack, answerers: &Answerers) -> Result<usize, Error> {
    let mut deleted = 0;
    for v6 in [false, true] {
        if !answerers.keys().any(|address| address.is_ipv6() == v6) {
            continue;
        }
        for flow in conntrack.flows(v6, Protocol::Udp.number())? {
            if answerers.get(&flow.original.1).is_some_and(|may| !may.contains(&flow.reply.0)) {
                conntrack.delete(&flow)?;
                deleted += 1;
            }
        }
    }
    Ok(deleted)
}
