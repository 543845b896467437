//! Where modes differ because the rows of the specification say so: the list in `docs/mode-differences.md`, and which packets
//! each entry is about.

use std::collections::BTreeSet;
use std::net::IpAddr;

use linux::nft::Packet;
use proxy::{Mode, NodeView};
use services::{Frontend, ServiceTable, TrafficPolicy};

use crate::case;

/// Whether an entry is about this packet.
type IsAbout = fn(&Packet, &NodeView, &ServiceTable) -> bool;

/// The entries by name. Each is a row of the document.
const DIFFERENCES: &[(&str, IsAbout)] = &[
    ("no-catch-all", |packet, node, table| {
        let is_one = |cidr: &ipnet::IpNet| cidr.contains(&packet.to.ip());
        node.service_cidrs.iter().any(is_one) && !is_served(packet, table)
    }),
    ("node-port-addresses", |packet, node, _| {
        let to = packet.to.ip();
        let primary = node.addresses.iter().find(|address| address.is_ipv6() == to.is_ipv6());
        node.node_port_addresses.is_none() && node.addresses.contains(&to) && primary != Some(&to)
    }),
    // Whose histories compare without the source.
    ("relayed-source", |_, _, _| false),
    ("connected-source", |_, _, _| false),
    ("no-sctp", |packet, _, _| packet.protocol == 132),
    ("localhost-node-ports", |packet, _, _| packet.to.ip().is_loopback()),
    ("refused-node-ports", |packet, node, _| {
        let listens = |addresses: &Vec<IpAddr>| addresses.contains(&packet.to.ip());
        node.addresses.contains(&packet.to.ip()) && !node.node_port_addresses.as_ref().is_none_or(listens)
    }),
    ("external-from-host", |packet, node, table| {
        let is_external = |ips: &[IpAddr]| ips.contains(&packet.to.ip());
        let mut frontends = table.frontends();
        node.addresses.contains(&packet.from.ip())
            && frontends.any(|frontend| is_external(&frontend.external_ips) || is_external(&frontend.load_balancer_ips))
    }),
    ("bound-addresses", |packet, node, table| {
        let has = |ips: &[IpAddr]| ips.contains(&packet.to.ip());
        let mut frontends = table.frontends();
        !node.addresses.contains(&packet.to.ip())
            && frontends.any(|frontend| has(&frontend.external_ips) || has(&frontend.load_balancer_ips))
    }),
    ("both-policies-local", |packet, _, table| {
        let is_at = |frontend: &Frontend| {
            let ips = frontend.external_ips.iter().chain(&frontend.load_balancer_ips);
            ips.copied().any(|ip| ip == packet.to.ip())
                || frontend.node_port.is_some_and(|port| port.get() == packet.to.port())
        };
        let local = |policy| policy == TrafficPolicy::Local;
        let mut frontends = table.frontends();
        frontends.any(|frontend| local(frontend.internal_policy) && local(frontend.external_policy) && is_at(frontend))
    }),
];

fn is_served(packet: &Packet, table: &ServiceTable) -> bool {
    let has = |ips: &[IpAddr]| ips.contains(&packet.to.ip());
    table.frontends().any(|frontend| {
        frontend.name.protocol.number() == packet.protocol
            && frontend.port == packet.to.port()
            && has(&frontend.cluster_ips)
    })
}

/// The rows of the document: an entry's name, and a mode that it excepts.
fn listed() -> BTreeSet<(String, Mode)> {
    let text = include_str!("../../../../docs/mode-differences.md");
    let mut listed = BTreeSet::new();
    for row in text.lines().filter_map(|line| line.strip_prefix("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = cells[0].trim_matches('`');
        for mode in cells[1].split(',') {
            let mode = mode.trim().parse().expect("a mode");
            assert!(listed.insert((name.to_owned(), mode)), "{name} is listed twice for {mode}");
        }
    }
    listed
}

/// Whether the document lists a difference between these modes for such a packet.
pub fn explain(packet: &Packet, node: &NodeView, table: &ServiceTable, modes: [Mode; 2]) -> bool {
    let names = DIFFERENCES.iter().filter(|(_, is_about)| is_about(packet, node, table));
    let listed = listed();
    names.into_iter().any(|(name, _)| modes.iter().any(|mode| listed.contains(&((*name).to_owned(), *mode))))
}

#[test]
fn the_document_lists_what_cases_show() {
    let mut shown = BTreeSet::new();
    for case in case::all() {
        let traces = || case.steps.iter().flat_map(|step| &step.traces);
        if traces().any(case::Trace::is_otherwise_if_relayed) {
            shown.extend(case::RELAYED.iter().map(|mode| ("relayed-source".to_owned(), *mode)));
        }
        if traces().any(case::Trace::is_otherwise_if_connected) {
            shown.extend(case::CONNECTED.iter().map(|mode| ("connected-source".to_owned(), *mode)));
        }
        for exception in traces().flat_map(|trace| &trace.exceptions) {
            shown.extend(exception.modes.iter().map(|mode| (exception.difference.clone(), *mode)));
        }
    }
    assert_eq!(shown, listed(), "shown by a case (left), listed in docs/mode-differences.md (right)");
    let names: BTreeSet<&str> = DIFFERENCES.iter().map(|(name, _)| *name).collect();
    let shown: BTreeSet<&str> = shown.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, shown, "known to the histories (left), shown by a case (right)");
}
