//! What another mode left in the kernel: a node may be started with another `--proxy-mode` without cleaning by hand.

use std::os::fd::BorrowedFd;

use linux::bpf::Hooks;
use linux::iptables::{Iptables, Tools};
use linux::ipvs;
use linux::nft::Socket;

use crate::dataplane::ebpf::{self, Retired};
use crate::dataplane::{self, iptables, nftables, userspace};
use crate::{Error, Mode, watch};

/// Removes what every mode but this one left.
pub(crate) fn clear_others(mode: Mode, hooks: Option<&Hooks>, namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    if mode != Mode::Nftables {
        clear_nftables(namespace)?;
    }
    if mode != Mode::Iptables {
        clear_iptables(namespace)?;
    }
    if mode != Mode::Ipvs {
        clear_ipvs(namespace)?;
    }
    if mode != Mode::Userspace {
        clear_userspace(namespace)?;
    }
    if mode != Mode::Ebpf {
        clear_ebpf(hooks, namespace)?;
    }
    Ok(())
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
/// Connections that are translated already go on.
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
