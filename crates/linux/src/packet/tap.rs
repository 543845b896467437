//! Every frame that comes in on any interface of a network namespace, as its wire has it: for those who check what others say.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

/// What waits to be read while the reader is busy, in bytes.
const WAITING: usize = 32 << 20;
/// PACKET_OUTGOING: what this namespace sends itself.
const OUTGOING: u8 = 4;

#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

/// Of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Bytes in the reader's buffer, the Ethernet header first.
    pub length: usize,
    /// When it came, by the kernel's clock that [`Tap::now`] reads.
    pub at: Duration,
    /// The index of the interface that it came in on.
    pub index: u32,
}

impl Tap {
    /// In the calling thread's namespace.
    ///
    /// # Errors
    /// Whatever the kernel says; this needs CAP_NET_RAW and CAP_NET_ADMIN.
    pub fn open() -> io::Result<Tap> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
        setsockopt(&fd, sockopt::RcvBufForce, &WAITING)?;
        setsockopt(&fd, sockopt::ReceiveTimestampns, &true)?;
        Ok(Tap { fd })
    }

    /// The time since the epoch, as frames are stamped with it.
    pub fn now() -> Duration {
        clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from)
    }

    /// One frame that waits; `None` if none does. Those that go out are passed over.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Seen>> {
        loop {
            let mut control = nix::cmsg_space!(TimeSpec);
            let mut room = [IoSliceMut::new(buffer)];
            let got = recvmsg::<LinkAddr>(self.fd.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty());
            let message = match got {
                Ok(message) => message,
                Err(Errno::EAGAIN) => return Ok(None),
                // An interface went down; the others speak on.
                Err(Errno::ENETDOWN) => continue,
                Err(error) => return Err(error.into()),
            };
            let stamp = message.cmsgs()?.find_map(|one| match one {
                ControlMessageOwned::ScmTimestampns(at) => Some(Duration::from(at)),
                _ => None,
            });
            let Some(from) = message.address.filter(|from| from.pkttype() != OUTGOING) else { continue };
            let index = u32::try_from(from.ifindex()).map_err(io::Error::other)?;
            return Ok(Some(Seen { length: message.bytes, at: stamp.unwrap_or_else(Tap::now), index }));
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
