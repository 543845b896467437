//! The plan as text: all of it, or what becomes of one packet, and why.
//!
//! - `report`: a packet's Service, endpoints in and out, and what the kernel does, as a value (text and JSON)
//! - `drift`: where the kernel differs from the plan

mod drift;
mod report;
mod text;

use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;

use linux::nft::{Fate, Packet};
use linux::{bpf, iptables, ipvs, nft};
use services::{Frontend, ServiceTable};

use crate::dataplane::ebpf::{Ebpf, LAYOUTS};
use crate::dataplane::iptables::Iptables;
use crate::dataplane::ipvs::Ipvs;
use crate::dataplane::nftables::Nftables;
use crate::dataplane::userspace::{FakeRelays, Userspace};
use crate::dataplane::{Change, Dataplane};
use crate::{Error, Mode, NodeView};

pub use drift::drift;
pub use report::{AddressKind, Destination, EndpointReport, Kernel, Policy, Report, SourceRanges, cluster_ip, report};

/// The table and what this node makes of it.
pub fn dump(mode: Mode, table: &ServiceTable, node: &NodeView) -> String {
    match mode {
        Mode::Nftables => dump_of::<Nftables<nft::Fake>>(table, node),
        Mode::Iptables => dump_of::<Iptables<iptables::Fake>>(table, node),
        Mode::Ebpf => dump_of::<Ebpf<bpf::Fake>>(table, node),
        Mode::Ipvs => dump_of::<Ipvs<ipvs::Fake, nft::Fake>>(table, node),
        Mode::Userspace => dump_of::<Userspace<nft::Fake, FakeRelays>>(table, node),
    }
}

fn dump_of<D: Dataplane>(table: &ServiceTable, node: &NodeView) -> String {
    let mut text = format!("{}\n", D::base(node));
    for frontend in table.frontends() {
        text += &format!("# {} {} id {}\n", frontend.name, frontend.name.protocol, frontend.id.0);
        for endpoint in &frontend.endpoints {
            let state = match (endpoint.ready, endpoint.serving, endpoint.terminating) {
                (true, _, _) => "ready",
                (false, true, true) => "terminating, still serving",
                (false, _, true) => "terminating",
                (false, _, false) => "not ready",
            };
            let node = endpoint.node.as_deref().unwrap_or("an unknown node");
            text += &format!("#   {} on {node}, {state}\n", endpoint.address);
        }
        text += &format!("{}\n", D::entries(frontend, node));
    }
    text
}

/// The rules that the first packet of a connection meets on this node, in order, and what becomes of it. `draw` answers
/// each random draw with a number below its argument; nothing is sent and nothing is changed.
pub fn explain(
    mode: Mode,
    table: &ServiceTable,
    node: &NodeView,
    packet: Packet,
    draw: &mut dyn FnMut(u32) -> u32,
) -> Result<String, Error> {
    let mut log = Vec::new();
    let fate = Plan::new(mode, table, node, &packet)?.walk(&packet, &node.addresses, draw, &mut log);
    let mut text = format!("{} -> {}, protocol {}\n", packet.from, packet.to, packet.protocol);
    for line in log {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {line}");
    }
    text += &report::describe(&fate);
    text.push('\n');
    Ok(text)
}

/// A mode's plan of what concerns one packet, to walk that packet through.
enum Plan {
    Nftables(Nftables<nft::Fake>),
    Iptables(Iptables<iptables::Fake>),
    Ebpf(Ebpf<bpf::Fake>),
    Ipvs(Box<Ipvs<ipvs::Fake, nft::Fake>>),
    Userspace(Userspace<nft::Fake, FakeRelays>),
}

impl Plan {
    fn new(mode: Mode, table: &ServiceTable, node: &NodeView, packet: &Packet) -> Result<Self, Error> {
        Ok(match mode {
            Mode::Nftables => Plan::Nftables(of(Nftables::new(nft::Fake::default()), table, node, packet)?),
            Mode::Iptables => Plan::Iptables(of(Iptables::new(iptables::Fake::default()), table, node, packet)?),
            Mode::Ebpf => Plan::Ebpf(of(Ebpf::new(bpf::Fake::new(&LAYOUTS)), table, node, packet)?),
            Mode::Ipvs => {
                let fake = Ipvs::new(ipvs::Fake::default(), nft::Fake::default());
                Plan::Ipvs(Box::new(of(fake, table, node, packet)?))
            }
            Mode::Userspace => {
                let fake = Userspace::new(Some(nft::Fake::default()), FakeRelays::default());
                Plan::Userspace(of(fake, table, node, packet)?)
            }
        })
    }

    fn walk(
        &mut self,
        packet: &Packet,
        locals: &[IpAddr],
        draw: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
    ) -> Fate {
        let packet = packet.clone();
        match self {
            // Of copies: a packet leaves affinity behind.
            Plan::Nftables(plan) => plan.nft().clone().explain(packet, locals, draw, log),
            Plan::Iptables(plan) => plan.kernel().clone().explain(packet, locals, draw, log),
            Plan::Ebpf(plan) => plan.explain(&packet, locals, draw, log),
            Plan::Ipvs(plan) => plan.explain(packet, locals, draw, log),
            Plan::Userspace(plan) => plan.explain(packet, locals, draw, log),
        }
    }
}

/// The plan of all frontends that have the packet's address, whichever port, or its port as node port: others' entries
/// are not looked up for it.
fn of<D: Dataplane>(mut dataplane: D, table: &ServiceTable, node: &NodeView, packet: &Packet) -> Result<D, Error> {
    let address = packet.to.ip();
    let concerns = |frontend: &Frontend| {
        let mut lists = [&frontend.cluster_ips, &frontend.external_ips, &frontend.load_balancer_ips].into_iter();
        lists.any(|list| list.contains(&address))
            || frontend.node_port.is_some_and(|port| port.get() == packet.to.port())
    };
    let concerned = table.frontends().filter(|frontend| concerns(frontend));
    commit(&mut dataplane, concerned, node)?;
    Ok(dataplane)
}

/// The whole plan.
fn plan<D: Dataplane>(dataplane: &mut D, frontends: &[Arc<Frontend>], node: &NodeView) -> Result<(), Error> {
    commit(dataplane, frontends.iter(), node)
}

fn commit<'a, D: Dataplane>(
    dataplane: &mut D,
    frontends: impl Iterator<Item = &'a Arc<Frontend>>,
    node: &NodeView,
) -> Result<(), Error> {
    let changes: Vec<_> = frontends
        .map(|frontend| Change { id: frontend.id, before: None, after: Some(D::entries(frontend, node)) })
        .collect();
    dataplane.commit(Some(&D::base(node)), &changes)
}
