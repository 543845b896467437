//! Another mode has taken over: nothing is picked here any more, and connections that were live on.
//!
//! Sockets that were sent to an endpoint need nothing. Packets from outside need the flows that their connections have,
//! so the packet programs stay until none of these was used for an hour; whoever starts then removes them.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use linux::bpf::{self, Hooks, Kernel, Pinned};

use super::OBJECT;
use super::contacts::{CONTACTS, LISTENERS, SETTINGS, Settings};
use super::layout::{FLOWS, LAYOUT, LOADS, Map, NODES, TAKERS, flow_seen};
use crate::Error;

const IDLE: Duration = Duration::from_secs(3_600);

/// What there was to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retired {
    Nothing,
    /// Flows are left that are still translated.
    Translating,
    Gone,
}

pub fn retire(hooks: &Hooks, namespace: Option<BorrowedFd<'_>>) -> Result<Retired, Error> {
    if !bpf::is_kept(&hooks.pins) {
        return Ok(Retired::Nothing);
    }
    let mut kernel = Pinned::open(OBJECT, LAYOUT, hooks.clone(), namespace)?;
    // Sockets first: one that comes too early still finds endpoints, one that comes later the other mode.
    kernel.detach_sockets()?;
    // With this, and at once, packets too: Services that go one by one would look like addresses that nobody has.
    let node = kernel.entries(NODES.name)?;
    if !node.keys.is_empty() {
        let zeroes = vec![0; node.values.len()];
        kernel.put(NODES.name, &bpf::Entries { keys: node.keys, values: zeroes })?;
    }
    if !kernel.entries(SETTINGS.name)?.keys.is_empty() {
        Settings::default().put(&mut kernel)?;
    }
    // Nobody counts any more what ends.
    for layout in Map::ALL.map(Map::layout).into_iter().chain([CONTACTS, LISTENERS, LOADS, TAKERS]) {
        let held = kernel.entries(layout.name)?;
        // Whoever was killed early may not have made the map.
        if !held.keys.is_empty() {
            kernel.remove(layout.name, &held.keys)?;
        }
    }
    let now = bpf::now();
    let flows = kernel.entries(FLOWS.name)?.values;
    let is_used = |flow: &[u8]| now.saturating_sub(flow_seen(flow)) < IDLE;
    if flows.chunks(FLOWS.value_size).any(is_used) {
        return Ok(Retired::Translating);
    }
    drop(kernel);
    bpf::remove(&hooks.pins)?;
    Ok(Retired::Gone)
}
