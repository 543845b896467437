//! One netlink socket, for links or for generic netlink: it belongs to the namespace it was opened in, and each exchange is
//! one request and its whole answer.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use super::wire::{self, Message};

#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// In the namespace of the calling thread.
    pub fn open(protocol: SockProtocol) -> Result<Self, Errno> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // The kernel fills dumps with datagrams of at most 32 KiB.
        Ok(Self { fd, sequence: 0, buffer: vec![0; 64 * 1024] })
    }

    /// Sends `message` and gives `take` every message of the answer up to the acknowledgement or the end of the dump.
    /// Returns whether the answer is whole: false when the kernel says that what it listed changed meanwhile.
    pub fn exchange(&mut self, message: Message, mut take: impl FnMut(&[u8])) -> Result<bool, Errno> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut whole = true;
        loop {
            let length = match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            for answer in wire::messages(&self.buffer[..length]) {
                if answer.sequence != self.sequence {
                    continue;
                }
                whole &= answer.flags & wire::DUMP_INTERRUPTED == 0;
                match answer.kind {
                    // Both end an answer and carry a code: zero, or a negative errno.
                    wire::ERROR | wire::DONE => {
                        let code =
                            wire::read_u32(answer.payload, 0).map_or(0, |code| code.cast_signed().wrapping_neg());
                        return if code == 0 { Ok(whole) } else { Err(Errno::from_raw(code)) };
                    }
                    _ => take(answer.payload),
                }
            }
        }
    }
}
