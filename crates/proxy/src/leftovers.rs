//! What another mode left in the kernel: a node may be started with another `--proxy-mode` without cleaning by hand.

use std::os::fd::BorrowedFd;

use linux::bpf::Hooks;
use linux::iptables::{Iptables, Tools};
use linux::nft::Socket;

use crate::Error;
use crate::dataplane::ebpf::{self, Retired};
use crate::dataplane::{iptables, nftables, userspace};

/// Removes the chains of the iptables mode. The tools are only looked for if somebody has used iptables here.
pub(crate) fn clear_iptables(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
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
pub(crate) fn clear_userspace(nft: &mut Socket) -> Result<(), Error> {
    if userspace::remove(nft)? {
        tracing::info!("proxy: removed the table of the userspace mode");
    }
    Ok(())
}

/// Removes the table of the nftables mode.
pub(crate) fn clear_nftables(nft: &mut Socket) -> Result<(), Error> {
    if nftables::remove(nft)? {
        tracing::info!("proxy: removed the table of the nftables mode");
    }
    Ok(())
}

/// Ends the ebpf mode, if a node ever had it.
pub(crate) fn clear_ebpf(hooks: Option<&Hooks>, namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let Some(hooks) = hooks else { return Ok(()) };
    match ebpf::retire(hooks, namespace)? {
        Retired::Nothing => {}
        Retired::Translating => tracing::info!("proxy: the programs of the ebpf mode translate what it has begun"),
        Retired::Gone => tracing::info!("proxy: removed the programs of the ebpf mode"),
    }
    Ok(())
}
