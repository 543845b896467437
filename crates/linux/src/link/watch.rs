//! Tells when an address or a link of a namespace comes, goes or changes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;

use super::LinkError;
use crate::netns::{Netns, NetnsError};

/// RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR.
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;

/// RTMGRP_LINK.
const LINK_GROUP: u32 = 1;

/// Hears of changes of links in the calling thread's namespace, for who waits with poll(2).
#[derive(Debug)]
pub struct LinkWatch {
    fd: OwnedFd,
}

impl LinkWatch {
    pub fn open() -> Result<Self, LinkError> {
        Ok(LinkWatch { fd: listener(LINK_GROUP).map_err(LinkError::Open)? })
    }

    /// Whether anything changed since this was last asked: read the links again then.
    pub fn has_changed(&self) -> bool {
        let mut buffer = [0; 8192];
        let mut heard = false;
        loop {
            match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                // What was lost were changes, too.
                Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                Err(Errno::EINTR) => {}
                Err(_) => return heard,
            }
        }
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Hears of changes of addresses from the moment it is opened on.
#[derive(Debug)]
pub struct AddressWatch {
    fd: AsyncFd<OwnedFd>,
}

impl AddressWatch {
    /// In the namespace given, or in the calling thread's. Needs a tokio runtime.
    pub fn open(namespace: Option<&Netns>) -> Result<Self, LinkError> {
        let fd = match namespace {
            Some(namespace) => namespace
                .run(|| listener(ADDRESS_GROUPS))
                .map_err(|error: NetnsError| LinkError::Namespace(error.to_string()))?,
            None => listener(ADDRESS_GROUPS),
        };
        let fd = fd.map_err(LinkError::Open)?;
        let register = |error: io::Error| LinkError::Open(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        // SAFETY: the descriptor is owned by what is registered, and lives and keeps its number as long.
        let fd = unsafe { AsyncFd::register(fd) };
        Ok(AddressWatch { fd: fd.map_err(|error| register(error.into()))? })
    }

    /// Returns after one change or several at once: read the addresses again then.
    pub async fn changed(&self) -> Result<(), LinkError> {
        let failed = |errno| LinkError::Kernel { item: "the watch on addresses".into(), errno };
        let mut heard = false;
        let mut buffer = [0; 8192];
        loop {
            let ready = self.fd.readable().await;
            let mut ready = ready.map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
            loop {
                match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                    // What was lost were changes, too.
                    Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(errno) => return Err(failed(errno)),
                }
            }
            ready.clear_ready();
            if heard {
                return Ok(());
            }
        }
    }
}

fn listener(groups: u32) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(fd)
}
