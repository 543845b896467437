//! Packets of one protocol on one interface, past the IP layer: ARP, and neighbour solicitations of IPv6 (packet(7)).
//!
//! The kernel writes the Ethernet header; what is sent and received begins after it.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::link::Mac;

mod tap;

pub use tap::{Seen, Tap};

/// What a socket hears and says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Arp,
    /// Of IPv6 only neighbour solicitations are heard, to whatever multicast group they went.
    NeighbourSolicitation,
}

impl Protocol {
    /// The number in an Ethernet header.
    fn ether_type(self) -> u16 {
        match self {
            Protocol::Arp => libc::ETH_P_ARP as u16,
            Protocol::NeighbourSolicitation => libc::ETH_P_IPV6 as u16,
        }
    }
}

/// One protocol on one interface.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    protocol: Protocol,
    index: i32,
}

impl PacketSocket {
    /// On the interface with this index, in the calling thread's namespace. All that it sends carries the mark.
    ///
    /// # Errors
    /// Whatever the kernel says; this needs CAP_NET_RAW and CAP_NET_ADMIN.
    pub fn open(index: u32, protocol: Protocol, mark: u32) -> io::Result<Self> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: plain numbers; protocol 0 hears nothing until it is bound.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the kernel has just made the descriptor, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let index = i32::try_from(index).map_err(io::Error::other)?;
        let socket = PacketSocket { fd, protocol, index };
        socket.set(libc::SOL_SOCKET, libc::SO_MARK, &mark)?;
        if protocol == Protocol::NeighbourSolicitation {
            socket.hear_solicitations()?;
        }
        let address = socket.address(None);
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `address` is a whole sockaddr_ll of the length given, read during the call only.
        check(unsafe { libc::bind(socket.fd.as_raw_fd(), (&raw const address).cast(), length) })?;
        Ok(socket)
    }

    /// One packet that waits, and who sent it; `None` if none does.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, Mac)>> {
        let mut from = self.address(None);
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        let (at, room) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: `buffer` has `room` bytes and `from` `length`, both writable and ours during the call.
        let got = unsafe { libc::recvfrom(self.fd.as_raw_fd(), at, room, 0, (&raw mut from).cast(), &raw mut length) };
        match usize::try_from(got) {
            Ok(count) => {
                let [a, b, c, d, e, f, ..] = from.sll_addr;
                Ok(Some((count, Mac([a, b, c, d, e, f]))))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    /// # Errors
    /// `ENOBUFS` where a rule on the way out drops it.
    pub fn send(&self, packet: &[u8], to: Mac) -> io::Result<()> {
        let address = self.address(Some(to));
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        let (fd, at) = (self.fd.as_raw_fd(), packet.as_ptr().cast());
        // SAFETY: `packet` and `address` are read during the call only, with their own lengths.
        let sent = unsafe { libc::sendto(fd, at, packet.len(), 0, (&raw const address).cast(), length) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn address(&self, mac: Option<Mac>) -> libc::sockaddr_ll {
        let mut hardware = [0; 8];
        if let Some(Mac(mac)) = mac {
            hardware[..6].copy_from_slice(&mac);
        }
        libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: self.protocol.ether_type().to_be(),
            sll_ifindex: self.index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: hardware,
        }
    }

    /// A filter, as the interface's other IPv6 packets must not wake anybody, and all multicast groups, as each address is
    /// asked for at one of its own.
    fn hear_solicitations(&self) -> io::Result<()> {
        const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
        const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        // The next header is ICMPv6 (58), its type neighbour solicitation (135, RFC 4861).
        let mut program = [
            step(LOAD_BYTE, 0, 0, 6),
            step(IF_EQUAL, 0, 3, 58),
            step(LOAD_BYTE, 0, 0, 40),
            step(IF_EQUAL, 0, 1, 135),
            step(RETURN, 0, 0, u32::MAX),
            step(RETURN, 0, 0, 0),
        ];
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        let all = libc::packet_mreq {
            mr_ifindex: self.index,
            mr_type: libc::PACKET_MR_ALLMULTI as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        self.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &all)
    }

    fn set<T>(&self, level: i32, name: i32, value: &T) -> io::Result<()> {
        let (at, length) = ((&raw const *value).cast(), size_of::<T>() as libc::socklen_t);
        // SAFETY: `value` is a whole T, which the kernel reads during the call; the filter that it may point to lives as long.
        check(unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, at, length) }).map(drop)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
