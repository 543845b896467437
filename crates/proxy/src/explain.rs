//! The plan as text: all of it, or the rules that one packet meets.

use std::fmt::Write;

use linux::nft::{Fate, Packet};
use linux::{iptables, ipvs, nft};
use services::ServiceTable;

use crate::dataplane::iptables::Iptables;
use crate::dataplane::ipvs::Ipvs;
use crate::dataplane::nftables::Nftables;
use crate::dataplane::{Change, Dataplane};
use crate::{Error, Mode, NodeView};

/// The table and what this node makes of it.
pub fn dump(mode: Mode, table: &ServiceTable, node: &NodeView) -> String {
    match mode {
        Mode::Nftables => dump_of::<Nftables<nft::Fake>>(table, node),
        Mode::Iptables => dump_of::<Iptables<iptables::Fake>>(table, node),
        Mode::Ipvs => dump_of::<Ipvs<ipvs::Fake, nft::Fake>>(table, node),
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
    let fate = match mode {
        Mode::Nftables => {
            let mut dataplane = Nftables::new(nft::Fake::default());
            plan(&mut dataplane, table, node)?;
            dataplane.nft().explain(packet.clone(), &node.addresses, draw, &mut log)
        }
        Mode::Iptables => {
            let mut dataplane = Iptables::new(iptables::Fake::default());
            plan(&mut dataplane, table, node)?;
            dataplane.kernel().explain(packet.clone(), &node.addresses, draw, &mut log)
        }
        Mode::Ipvs => {
            let mut dataplane = Ipvs::new(ipvs::Fake::default(), nft::Fake::default());
            plan(&mut dataplane, table, node)?;
            dataplane.explain(packet.clone(), &node.addresses, draw, &mut log)
        }
    };
    let mut text = format!("{} -> {}, protocol {}\n", packet.from, packet.to, packet.protocol);
    for line in log {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {line}");
    }
    text += &match fate {
        Fate::Dropped => "dropped\n".to_owned(),
        Fate::Rejected => "rejected\n".to_owned(),
        Fate::Sent { to, masqueraded: true } => format!("sent to {to}, masqueraded\n"),
        Fate::Sent { to, masqueraded: false } => format!("sent to {to}\n"),
    };
    Ok(text)
}

fn plan<D: Dataplane>(dataplane: &mut D, table: &ServiceTable, node: &NodeView) -> Result<(), Error> {
    let changes: Vec<_> = table
        .frontends()
        .map(|frontend| Change { id: frontend.id, before: None, after: Some(D::entries(frontend, node)) })
        .collect();
    dataplane.commit(Some(&D::base(node)), &changes)
}
