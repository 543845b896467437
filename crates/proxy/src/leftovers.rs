//! What another mode left in the kernel: a node may be started with another `--proxy-mode` without cleaning by hand.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use linux::bpf::Hooks;
use linux::iptables::{Iptables, Tools};
use linux::nft::{Nft as _, Socket};
use linux::{ipvs, sock_diag};

use crate::dataplane::ebpf::{self, Retired};
use crate::dataplane::{self, iptables, nftables, userspace};
use crate::{Error, Mode, watch};

/// How long the threads that were about to send a first packet when sockets began to be given endpoints may take to do so: no
/// program sees that packet any more, and without the old rules it goes nowhere.
const ABOUT_TO_SEND: Duration = Duration::from_millis(200);

/// What every mode but one left: taken out once that one serves, but for what has to stay until connections have ended.
pub(crate) struct Leftovers {
    mode: Mode,
    hooks: Option<Hooks>,
    namespace: Option<OwnedFd>,
    state: State,
}

enum State {
    Whole,
    /// When to look at the rest again.
    Draining(Instant),
    Gone,
}

impl State {
    fn after(left: Option<Duration>) -> Self {
        left.map_or(State::Gone, |after| State::Draining(Instant::now() + after))
    }
}

impl Leftovers {
    pub fn new(mode: Mode, hooks: Option<Hooks>, namespace: Option<OwnedFd>) -> Self {
        Leftovers { mode, hooks, namespace, state: State::Whole }
    }

    /// The first time it is called: takes out what can go.
    pub fn clear(&mut self) -> Result<(), Error> {
        if let State::Whole = self.state {
            let namespace = self.namespace.as_ref().map(|namespace| namespace.as_fd());
            if self.mode == Mode::Ebpf && is_translated_by_others(namespace)? {
                std::thread::sleep(ABOUT_TO_SEND);
            }
            let left = clear_others(self.mode, self.hooks.as_ref(), namespace)?;
            self.state = State::after(left);
        }
        Ok(())
    }

    /// Looks at what had to stay, if it is time; how long until the next look.
    pub fn tend(&mut self) -> Option<Duration> {
        let State::Draining(at) = self.state else { return None };
        let wait = at.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            return Some(wait);
        }
        let left = retire_ipvs(self.namespace.as_ref().map(|namespace| namespace.as_fd()));
        let left = left.unwrap_or_else(|error| {
            tracing::warn!("proxy: what the ipvs mode left stays for now: {error}");
            Some(dataplane::ipvs::DRAIN)
        });
        self.state = State::after(left);
        left
    }
}

/// Removes what every mode but this one left; when to look again at what had to stay, if anything.
fn clear_others(
    mode: Mode,
    hooks: Option<&Hooks>,
    namespace: Option<BorrowedFd<'_>>,
) -> Result<Option<Duration>, Error> {
    if mode != Mode::Nftables {
        clear_nftables(namespace)?;
    }
    if mode != Mode::Iptables {
        clear_iptables(namespace)?;
    }
    if mode != Mode::Userspace {
        clear_userspace(namespace)?;
    }
    if mode != Mode::Ebpf {
        clear_ebpf(hooks, namespace)?;
    }
    if mode != Mode::Ipvs { retire_ipvs(namespace) } else { Ok(None) }
}

/// Whether rules of another mode translate what is sent to a Service.
fn is_translated_by_others(namespace: Option<BorrowedFd<'_>>) -> Result<bool, Error> {
    let mut nft = Socket::open(namespace)?;
    for (family, table) in [(nftables::FAMILY, nftables::TABLE), (userspace::FAMILY, userspace::TABLE)] {
        if nft.table_comment(family, table)?.is_some() {
            return Ok(true);
        }
    }
    Ok(Tools::is_used(namespace)? || ipvs::Socket::is_used(namespace)?)
}

/// Removes the chains of the iptables mode. The tools are only looked for if somebody has used iptables here.
fn clear_iptables(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    if !Tools::is_used(namespace)? {
        return Ok(());
    }
    for mut tools in Tools::all(namespace)? {
        if iptables::remove(&mut tools)? {
            tracing::info!("proxy: removed the chains of the iptables mode ({})", tools.about());
        }
    }
    Ok(())
}

/// Removes the table of the userspace mode; its connections are their process's.
fn clear_userspace(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    if userspace::remove(&mut Socket::open(namespace)?)? {
        tracing::info!("proxy: removed the table of the userspace mode");
    }
    Ok(())
}

/// Removes the table of the nftables mode.
fn clear_nftables(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    if nftables::remove(&mut Socket::open(namespace)?)? {
        tracing::info!("proxy: removed the table of the nftables mode");
    }
    Ok(())
}

/// Removes the table that watches for endpoints that do not answer.
pub(crate) fn clear_watch(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    if watch::remove(&mut Socket::open(namespace)?)? {
        tracing::info!("proxy: removed the table of the watch over endpoints");
    }
    Ok(())
}

/// Removes what opening a mode has left that was not begun.
pub(crate) fn clear_unused(mode: Mode, hooks: Option<&Hooks>, namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    match mode {
        Mode::Ebpf => clear_ebpf(hooks, namespace),
        // Nothing of them is in the kernel before their first commit.
        Mode::Nftables | Mode::Iptables | Mode::Ipvs | Mode::Userspace => Ok(()),
    }
}

/// Ends the ebpf mode, if a node ever had it.
fn clear_ebpf(hooks: Option<&Hooks>, namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let Some(hooks) = hooks else { return Ok(()) };
    match ebpf::retire(hooks, namespace)? {
        Retired::Nothing => {}
        Retired::Translating => tracing::info!("proxy: the programs of the ebpf mode translate what it has begun"),
        Retired::Gone => tracing::info!("proxy: removed the programs of the ebpf mode"),
    }
    Ok(())
}

/// Takes out what no connection of the ipvs mode needs; when to look again, if something had to stay.
fn retire_ipvs(namespace: Option<BorrowedFd<'_>>) -> Result<Option<Duration>, Error> {
    if !ipvs::Socket::is_used(namespace)? {
        return Ok(None);
    }
    let in_use = sock_diag::Socket::open(namespace)?.own_addresses()?;
    let (mut ipvs, mut nft) = (ipvs::Socket::open(namespace)?, Socket::open(namespace)?);
    match dataplane::ipvs::retire(&mut ipvs, &mut nft, &in_use)? {
        dataplane::ipvs::Retired::Nothing => Ok(None),
        dataplane::ipvs::Retired::Gone => {
            tracing::info!("proxy: removed the virtual servers of the ipvs mode");
            Ok(None)
        }
        dataplane::ipvs::Retired::Serving { servers } => {
            tracing::debug!("proxy: {servers} virtual servers of the ipvs mode have connections that go on");
            Ok(Some(dataplane::ipvs::DRAIN))
        }
    }
}

/// Removes virtual servers, their interface and their table. IPVS is only asked if the interface is there: asking would
/// make the kernel load it.
fn clear_ipvs(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    if !ipvs::Socket::is_used(namespace)? {
        return Ok(());
    }
    if dataplane::ipvs::remove(&mut ipvs::Socket::open(namespace)?, &mut Socket::open(namespace)?)? {
        tracing::info!("proxy: removed the virtual servers of the ipvs mode");
    }
    Ok(())
}

/// Removes what any mode has put into the kernel, for a node whose Services somebody else is to serve, or nobody.
/// Connections that are translated already go on; those of the ipvs mode end.
pub fn cleanup(hooks: Option<&Hooks>, namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    clear_nftables(namespace)?;
    clear_userspace(namespace)?;
    clear_watch(namespace)?;
    clear_ebpf(hooks, namespace)?;
    clear_ipvs(namespace)?;
    clear_iptables(namespace)?;
    // Last: while it was there, what the others had translated went on.
    crate::keeper::remove(&mut Socket::open(namespace)?)?;
    Ok(())
}
