//! The packet programs on every network device of a node, those that come later included.
//!
//! Not on the loopback, whose packets are those of the node's own sockets. And on the ports of a bridge instead of the
//! bridge: where br_netfilter is on, connection tracking looks at a packet between the two, and it must see both
//! directions with the same addresses, those between arriving and leaving.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use super::Error;
use super::call::Hook;
use super::pinned::{ARRIVING, LEAVING, attach};
use crate::link::{Link, Links};
use crate::netns::Netns;

/// RTMGRP_LINK of linux/rtnetlink.h.
const LINK_EVENTS: u32 = 1;

/// The devices of a namespace and the programs they get.
pub(super) struct Devices {
    namespace: Netns,
    dir: PathBuf,
    programs: [(&'static str, Hook, OwnedFd); 2],
    /// Devices that this process has given its programs.
    done: Mutex<BTreeSet<u32>>,
}

impl Devices {
    pub fn new(namespace: Netns, dir: PathBuf, arriving: OwnedFd, leaving: OwnedFd) -> Self {
        let programs = [(ARRIVING, Hook::Arriving, arriving), (LEAVING, Hook::Leaving, leaving)];
        Devices { namespace, dir, programs, done: Mutex::default() }
    }

    /// Attaches to devices that are new, and lets go of those that are none of ours any more.
    pub fn attach(&self) -> Result<(), Error> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let links = Links::open(&self.namespace)?.links()?;
        let wanted: BTreeSet<u32> = links.iter().filter(|link| carries_services(link)).map(|link| link.index).collect();
        let new: Vec<&Link> =
            links.iter().filter(|link| wanted.contains(&link.index) && !done.contains(&link.index)).collect();
        for link in new {
            // A device's index counts where the call is made.
            let attached = self.namespace.run(|| {
                self.programs.iter().try_for_each(|(name, hook, program)| {
                    attach(program.as_fd(), link.index, *hook, &self.dir.join(format!("{name}-{}", link.index)))
                })
            })?;
            match attached {
                Ok(()) => drop(done.insert(link.index)),
                // It went while we looked.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => {
                    let what = format!("attach to the device {}", link.name);
                    return Err(Error::Missing { what, cause: error.to_string() });
                }
            }
        }
        done.retain(|index| wanted.contains(index));
        self.forget_others(&wanted).map_err(|cause| Error::Pins { path: self.dir.clone(), cause })
    }

    /// Removes the pins of devices that have gone, and with the pin the link.
    fn forget_others(&self, wanted: &BTreeSet<u32>) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let index = [ARRIVING, LEAVING]
                .iter()
                .find_map(|program| name.to_str()?.strip_prefix(program)?.strip_prefix('-')?.parse::<u32>().ok());
            if index.is_some_and(|index| !wanted.contains(&index)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Whether packets to Services may come or go through a device. One without a hardware address has another packet layout.
fn carries_services(link: &Link) -> bool {
    link.name != "lo" && link.mac.is_some() && link.kind != "bridge"
}

/// What every device of the namespace takes on which packets to Services may be; 0 without one.
pub(super) fn smallest_mtu(namespace: &Netns) -> Result<u32, Error> {
    let links = Links::open(namespace)?.links()?;
    Ok(links.iter().filter(|link| carries_services(link)).map(|link| link.mtu).min().unwrap_or_default())
}

/// A thread that follows the namespace's devices until this is dropped.
pub(super) struct Watch {
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(devices: Arc<Devices>) -> Result<Self, Error> {
        let failed = |errno: Errno| Error::Missing { what: "tell of new devices".into(), cause: errno.to_string() };
        let events = devices.namespace.run(open_events)?.map_err(failed)?;
        let end = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(failed)?);
        let ended = end.clone();
        let follow = move || follow(&events, &ended, &devices);
        let thread = std::thread::Builder::new()
            .name("ebpf-devices".into())
            .spawn(follow)
            .map_err(|cause| Error::Missing { what: "start a thread".into(), cause: cause.to_string() })?;
        Ok(Watch { end, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let told = self.end.write(1).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| told) {
            drop(thread.join());
        }
    }
}

fn open_events() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, LINK_EVENTS))?;
    Ok(fd)
}

fn follow(events: &OwnedFd, end: &EventFd, devices: &Devices) {
    let mut buffer = vec![0_u8; 32 * 1024];
    loop {
        let mut waited = [PollFd::new(events.as_fd(), PollFlags::POLLIN), PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return tracing::error!("ebpf: cannot wait for new devices: {errno}; restart the proxy"),
        }
        if waited[1].any() == Some(true) {
            return;
        }
        // What happened does not matter, nor how often, nor whether the kernel lost some: the links are listed anew.
        while !matches!(recv(events.as_raw_fd(), &mut buffer, MsgFlags::empty()), Err(Errno::EAGAIN)) {}
        if let Err(error) = devices.attach() {
            tracing::warn!("ebpf: {error}");
        }
    }
}
