//! The modes under test.
//!
//! How a mode joins: implement [`OnFake`] for its data path over its fake kernel, and add one line to [`on_fakes`]. Then
//! every case file and the histories run for it. Where it has to differ from the other modes, a case says so in a line of
//! its own (see `case`), and `docs/mode-differences.md` lists it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use linux::nft::{Fate, Packet};
use linux::{bpf, iptables, ipvs, nft};
use proxy::dataplane::ebpf::{Ebpf, LAYOUTS};
use proxy::dataplane::iptables::Iptables;
use proxy::dataplane::ipvs::Ipvs;
use proxy::dataplane::nftables::Nftables;
use proxy::dataplane::userspace::{FakeRelays, Userspace};
use proxy::dataplane::{Change, Dataplane};
use proxy::{Error, Mode, NodeView};
use services::{FrontendChange, FrontendId, ServiceTable};

/// A data path over a kernel that is only a value.
pub trait OnFake: Dataplane + Sized {
    const MODE: Mode;
    /// With a number, each so manieth commit fails.
    fn open(failing: Option<u64>) -> Self;
    /// Walks the first packet of a connection through what the fake holds; changes nothing. `draw` answers each random
    /// draw with a number below its argument.
    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate;
    /// All that the fake holds: equal texts are equal kernels.
    fn dump(&mut self) -> String;
}

/// One fresh subject per mode.
pub fn on_fakes(failing: Option<u64>) -> Vec<Box<dyn Subject>> {
    vec![
        Box::new(On(Nftables::<nft::Fake>::open(failing))),
        Box::new(On(Iptables::<iptables::Fake>::open(failing))),
        Box::new(On(Ebpf::<bpf::Fake>::open(failing))),
        Box::new(On(Ipvs::<ipvs::Fake, nft::Fake>::open(failing))),
        Box::new(On(Userspace::<nft::Fake, FakeRelays>::open(failing))),
    ]
}

/// Any mode, as tests use it.
pub trait Subject {
    fn mode(&self) -> Mode;
    /// Reads the kernel anew and commits the whole plan, as a start does.
    fn start(&mut self, table: &ServiceTable, node: &NodeView) -> Result<(), Error>;
    /// Commits what changed.
    fn change(&mut self, changes: &[FrontendChange], node: &NodeView) -> Result<(), Error>;
    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate;
    fn dump(&mut self) -> String;
}

struct On<D>(D);

impl<D: OnFake> Subject for On<D> {
    fn mode(&self) -> Mode {
        D::MODE
    }

    fn start(&mut self, table: &ServiceTable, node: &NodeView) -> Result<(), Error> {
        D::check(node)?;
        self.0.read()?;
        self.0.commit(Some(&D::base(node)), &whole::<D>(table, node))
    }

    fn change(&mut self, changes: &[FrontendChange], node: &NodeView) -> Result<(), Error> {
        let entries = |frontend: &services::Frontend| D::entries(frontend, node);
        // Several events of one frontend are one change, as in the loop.
        let mut merged: BTreeMap<FrontendId, Change<D::Entries>> = BTreeMap::new();
        for change in changes {
            let (before, after) = (change.before.as_deref().map(entries), change.after.as_deref().map(entries));
            match merged.get_mut(&change.id) {
                Some(held) => held.after = after,
                None => drop(merged.insert(change.id, Change { id: change.id, before, after })),
            }
        }
        let changes: Vec<_> = merged.into_values().filter(|change| change.before != change.after).collect();
        self.0.commit(None, &changes)
    }

    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.0.trace(packet, node, draw)
    }

    fn dump(&mut self) -> String {
        self.0.dump()
    }
}

pub fn whole<D: Dataplane>(table: &ServiceTable, node: &NodeView) -> Vec<Change<D::Entries>> {
    let entries = |frontend: &services::Frontend| D::entries(frontend, node);
    table.frontends().map(|frontend| Change { id: frontend.id, before: None, after: Some(entries(frontend)) }).collect()
}

/// The addresses that are the node's own, also those that nobody has to configure.
fn locals(node: &NodeView) -> Vec<IpAddr> {
    let loopback = ["127.0.0.1", "::1"].map(|text| text.parse().expect("address"));
    node.addresses.iter().copied().chain(loopback).collect()
}

impl OnFake for Nftables<nft::Fake> {
    const MODE: Mode = Mode::Nftables;

    fn open(failing: Option<u64>) -> Self {
        Nftables::new(failing.map_or_else(nft::Fake::default, nft::Fake::failing))
    }

    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.nft().clone().trace(packet, &locals(node), draw)
    }

    fn dump(&mut self) -> String {
        // Chains that nothing leads to may stay. The fake may refuse.
        while self.prune().is_err() {}
        self.nft().dump()
    }
}

impl OnFake for Iptables<iptables::Fake> {
    const MODE: Mode = Mode::Iptables;

    fn open(failing: Option<u64>) -> Self {
        Iptables::new(failing.map_or_else(iptables::Fake::default, iptables::Fake::failing))
    }

    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.kernel().clone().trace(packet, &locals(node), draw)
    }

    fn dump(&mut self) -> String {
        let tables = [iptables::Table::Filter, iptables::Table::Nat];
        let dumps = [false, true].into_iter().flat_map(|v6| tables.map(|table| (v6, table)));
        let text: String = dumps.map(|(v6, table)| self.kernel().dump(v6, table)).collect();
        // kubelet uses that chain too: what was once in it stays.
        text.lines().filter(|line| !line.contains("KUBE-FIREWALL")).map(|line| format!("{line}\n")).collect()
    }
}

impl OnFake for Ebpf<bpf::Fake> {
    const MODE: Mode = Mode::Ebpf;

    fn open(failing: Option<u64>) -> Self {
        // A commit is several calls here.
        Ebpf::new(failing.map_or_else(|| bpf::Fake::new(&LAYOUTS), |n| bpf::Fake::failing(&LAYOUTS, 4 * n)))
    }

    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.explain(&packet, &locals(node), draw, &mut Vec::new())
    }

    fn dump(&mut self) -> String {
        self.lines().expect("a fake can be read").iter().map(|line| format!("{line}\n")).collect()
    }
}

impl OnFake for Ipvs<ipvs::Fake, nft::Fake> {
    const MODE: Mode = Mode::Ipvs;

    fn open(failing: Option<u64>) -> Self {
        // A commit is one transaction of nftables, or two, and as many operations of IPVS as it has steps.
        let ipvs = failing.map_or_else(ipvs::Fake::default, |every| ipvs::Fake::failing(every * 31 + 2));
        Ipvs::new(ipvs, failing.map_or_else(nft::Fake::default, nft::Fake::failing))
    }

    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.explain(packet, &locals(node), draw, &mut Vec::new())
    }

    fn dump(&mut self) -> String {
        let (ipvs, nft) = self.kernel();
        ipvs.dump() + &nft.dump()
    }
}

impl OnFake for Userspace<nft::Fake, FakeRelays> {
    const MODE: Mode = Mode::Userspace;

    fn open(failing: Option<u64>) -> Self {
        let kernel = failing.map_or_else(nft::Fake::default, nft::Fake::failing);
        Userspace::new(Some(kernel), FakeRelays::default())
    }

    fn trace(&mut self, packet: Packet, node: &NodeView, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.explain(packet, &locals(node), draw, &mut Vec::new())
    }

    fn dump(&mut self) -> String {
        Userspace::dump(self)
    }
}
