//! Netlink framing for the netfilter family: messages with nested attributes out, attributes in, and the raw socket.
//! Shared by nftables, conntrack, nflog and sock_diag.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send, setsockopt,
    socket, sockopt,
};

use super::Error;

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
pub(crate) const HEADER: usize = 16;

/// Grows a buffer of netlink messages.
#[derive(Default)]
pub(crate) struct Writer {
    pub buffer: Vec<u8>,
    message: usize,
}

/// Where a nested attribute started.
#[must_use]
pub(crate) struct Nest(usize);

impl Writer {
    /// Starts a message; `resource` is the nfgenmsg's res_id in network order.
    pub fn begin(&mut self, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) {
        self.message = self.buffer.len();
        self.buffer.extend_from_slice(&0u32.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.buffer.extend_from_slice(&sequence.to_ne_bytes());
        self.buffer.extend_from_slice(&0u32.to_ne_bytes());
        self.buffer.extend_from_slice(&[family, 0]);
        self.buffer.extend_from_slice(&resource.to_be_bytes());
    }

    pub fn end(&mut self) {
        let length = (self.buffer.len() - self.message) as u32;
        self.buffer[self.message..self.message + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub fn set_flag(&mut self, message: usize, flag: u16) {
        let flags = u16::from_ne_bytes([self.buffer[message + 6], self.buffer[message + 7]]) | flag;
        self.buffer[message + 6..message + 8].copy_from_slice(&flags.to_ne_bytes());
    }

    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = (4 + value.len()) as u16;
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value);
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }

    pub fn u8(&mut self, kind: u16, value: u8) {
        self.bytes(kind, &[value]);
    }

    pub fn u16(&mut self, kind: u16, value: u16) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub fn string(&mut self, kind: u16, value: &str) {
        let length = (4 + value.len() + 1) as u16;
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value.as_bytes());
        self.buffer.push(0);
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }

    pub fn nest(&mut self, kind: u16) -> Nest {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&0u16.to_ne_bytes());
        self.buffer.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        Nest(start)
    }

    pub fn close(&mut self, nest: Nest) {
        let length = (self.buffer.len() - nest.0) as u16;
        self.buffer[nest.0..nest.0 + 2].copy_from_slice(&length.to_ne_bytes());
    }
}

/// Reads the attributes of a message or of a nest; stops at the first malformed one.
#[derive(Clone, Copy)]
pub(crate) struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attributes<'a> {
    pub fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    pub fn nested(self, kind: u16) -> Option<Attributes<'a>> {
        self.get(kind).map(Attributes)
    }

    pub fn u32(self, kind: u16) -> Option<u32> {
        self.get(kind)?.try_into().ok().map(u32::from_be_bytes)
    }

    pub fn string(self, kind: u16) -> Option<&'a str> {
        let value = self.get(kind)?;
        std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
    }
}

/// A message of the kernel.
pub(crate) enum Reply<'a> {
    /// A dumped object: its attributes, after the nfgenmsg.
    Object(Attributes<'a>),
    Ack {
        sequence: u32,
    },
    Failed {
        sequence: u32,
        errno: i32,
        /// Offset of the attribute that was refused, from the start of the message.
        offset: Option<u32>,
        text: Option<String>,
    },
    Done,
}

/// A netfilter socket, made in the network namespace given.
pub(crate) struct Raw {
    fd: OwnedFd,
    receive: Vec<u8>,
    send_limit: usize,
}

impl Raw {
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        Self::open_protocol(namespace, SockProtocol::NetlinkNetFilter)
    }

    /// The same for another family of messages.
    pub fn open_protocol(namespace: Option<BorrowedFd<'_>>, protocol: SockProtocol) -> Result<Self, Error> {
        let fd = match namespace {
            None => Self::socket(protocol),
            // A socket belongs to the namespace of the thread that made it: a scratch thread goes there and comes back
            // with the socket only.
            Some(namespace) => std::thread::scope(|scope| {
                let thread = scope.spawn(move || {
                    setns(namespace, CloneFlags::CLONE_NEWNET)?;
                    Self::socket(protocol)
                });
                thread.join().unwrap_or(Err(nix::Error::EIO))
            }),
        };
        let fd = fd.map_err(|error| Error::Open(error.into()))?;
        Ok(Raw { fd, receive: vec![0; 1 << 16], send_limit: 0 })
    }

    fn socket(protocol: SockProtocol) -> nix::Result<OwnedFd> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, Some(protocol))?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // The replies to a large batch are queued before the first can be read.
        setsockopt(&fd, sockopt::RcvBufForce, &(8 << 20))?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            set_netlink_option(fd.as_fd(), option, 1)?;
        }
        Ok(fd)
    }

    /// Sends the messages as one packet, which is what makes a batch a batch.
    pub fn send(&mut self, messages: &[u8]) -> Result<(), Error> {
        // A packet must fit the send buffer; the kernel keeps a little of it for itself.
        let needed = messages.len() * 2 + (64 << 10);
        if needed > self.send_limit {
            setsockopt(&self.fd, sockopt::SndBufForce, &needed).map_err(|error| Error::Socket(error.into()))?;
            self.send_limit = needed;
        }
        match send(self.fd.as_raw_fd(), messages, MsgFlags::empty()) {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::Socket(error.into())),
        }
    }

    /// The number by which the kernel names this socket in what it says of others' requests.
    pub fn port(&self) -> Result<u32, Error> {
        let address: NetlinkAddr = getsockname(self.fd.as_raw_fd()).map_err(|error| Error::Socket(error.into()))?;
        Ok(address.pid())
    }

    /// Joins or leaves a multicast group.
    pub fn listen(&mut self, group: i32, joins: bool) -> Result<(), Error> {
        let option = if joins { libc::NETLINK_ADD_MEMBERSHIP } else { libc::NETLINK_DROP_MEMBERSHIP };
        set_netlink_option(self.fd.as_fd(), option, group).map_err(|error| Error::Socket(error.into()))
    }

    /// Hands every reply that waits now to the visitor, until the visitor says that was the last (`false`) or none is
    /// left. The kernel has answered by the time `send` returned, dumps excepted, which continue as they are read.
    pub fn replies(&mut self, mut visit: impl FnMut(Reply<'_>) -> Result<bool, Error>) -> Result<(), Error> {
        self.messages(|message| match parse(message)? {
            Some(reply) => visit(reply),
            None => Ok(true),
        })
    }

    /// The same for whole messages, from their header on, of at least [`HEADER`] bytes.
    pub fn messages(&mut self, mut visit: impl FnMut(&[u8]) -> Result<bool, Error>) -> Result<(), Error> {
        loop {
            let size = loop {
                match recv(self.fd.as_raw_fd(), &mut self.receive, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC) {
                    Ok(size) if size > self.receive.len() => return Err(Error::Malformed("a reply larger than 64 KB")),
                    Ok(size) => break size,
                    Err(nix::Error::EAGAIN) => return Ok(()),
                    Err(nix::Error::EINTR) => {}
                    Err(error) => return Err(Error::Socket(error.into())),
                }
            };
            let mut rest = &self.receive[..size];
            while rest.len() >= HEADER {
                let (message, after) = split_message(rest)?;
                rest = after;
                if !visit(message)? {
                    return Ok(());
                }
            }
        }
    }

    /// Forgets replies of an exchange that was given up.
    pub fn drain(&mut self) -> Result<(), Error> {
        self.replies(|_| Ok(true))
    }
}

impl AsFd for Raw {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn split_message(rest: &[u8]) -> Result<(&[u8], &[u8]), Error> {
    let length = u32::from_ne_bytes(rest[..4].try_into().expect("four bytes")) as usize;
    if length < HEADER || length > rest.len() {
        return Err(Error::Malformed("a message header"));
    }
    Ok((&rest[..length], rest.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn parse(message: &[u8]) -> Result<Option<Reply<'_>>, Error> {
    let kind = u16::from_ne_bytes([message[4], message[5]]);
    let flags = u16::from_ne_bytes([message[6], message[7]]);
    let body = &message[HEADER..];
    if kind == NLMSG_DONE {
        return Ok(Some(Reply::Done));
    }
    if kind != NLMSG_ERROR {
        let attributes = body.get(4..).ok_or(Error::Malformed("a short message"))?;
        return Ok(Some(Reply::Object(Attributes(attributes))));
    }
    let errno = body.get(..4).ok_or(Error::Malformed("an error"))?;
    let errno = -i32::from_ne_bytes(errno.try_into().expect("four bytes"));
    let original = body.get(4..4 + HEADER).ok_or(Error::Malformed("an error"))?;
    let sequence = u32::from_ne_bytes(original[8..12].try_into().expect("four bytes"));
    if errno == 0 {
        return Ok(Some(Reply::Ack { sequence }));
    }
    let mut offset = None;
    let mut text = None;
    if flags & NLM_F_ACK_TLVS != 0 && flags & NLM_F_CAPPED != 0 {
        let details = Attributes(&body[4 + HEADER..]);
        text = details.string(1).map(str::to_owned);
        offset = details.get(2).and_then(|value| value.try_into().ok()).map(u32::from_ne_bytes);
    }
    Ok(Some(Reply::Failed { sequence, errno, offset, text }))
}

#[allow(unsafe_code)]
fn set_netlink_option(fd: BorrowedFd<'_>, option: i32, value: libc::c_int) -> nix::Result<()> {
    // SAFETY: the pointer and length describe `value`, which outlives the call; the descriptor is borrowed.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    nix::Error::result(result).map(drop)
}

pub(crate) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
