//! Speaks in the name of an endpoint.
//!
//! [`Provoker::provoke`] makes the client of an established TCP connection say something, so that a rule can answer it with a
//! reset.
//! A reset is only believed if it has the right sequence number, which nobody but the two ends knows. A SYN-ACK in the
//! endpoint's name is harmless: conntrack passes it on without a change of state, translated as any answer, and the client
//! sends a challenge ACK (RFC 5961, section 4), whose number is the one that a reset needs.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6, sendto, setsockopt, socket, sockopt,
};

const TCP: u8 = 6;
const SYN_ACK: u8 = 0x12;
const RST: u8 = 0x04;

/// Raw sockets of one network namespace.
pub struct Provoker {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
}

impl Provoker {
    /// Opens them in the namespace given, or in the calling thread's. A kernel without IPv6 has one.
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let Some(namespace) = namespace else { return Self::here() };
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                Self::here()
            });
            inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread that opens raw sockets died")))
        })
    }

    fn here() -> io::Result<Self> {
        // IPPROTO_RAW: we write the IP header.
        let raw = |family: AddressFamily| -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(family, SockType::Raw, flags, nix::sys::socket::SockProtocol::Raw)?;
            // Answers to others are copied to every raw socket: keep none.
            setsockopt(&fd, sockopt::RcvBuf, &0)?;
            Ok(fd)
        };
        let v6 = match raw(AddressFamily::Inet6) {
            Err(nix::Error::EAFNOSUPPORT) => None,
            other => Some(other?),
        };
        Ok(Provoker { v4: raw(AddressFamily::Inet)?, v6 })
    }

    /// Speaks as `from` to `to`: the source and the destination of a connection's answers, as conntrack has them.
    pub fn provoke(&self, from: SocketAddr, to: SocketAddr) -> io::Result<()> {
        self.send(from, to, SYN_ACK)
    }

    /// Makes IPVS take the connection of `client` for refused by `endpoint`, so that it chooses anew when the client repeats
    /// its first packet. The client itself does not believe a reset that acknowledges nothing (RFC 9293, section 3.10.7.3).
    pub fn refuse(&self, endpoint: SocketAddr, client: SocketAddr) -> io::Result<()> {
        self.send(endpoint, client, RST)
    }

    fn send(&self, from: SocketAddr, to: SocketAddr, flags: u8) -> io::Result<()> {
        let sent = match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0];
                packet.extend(source.octets());
                packet.extend(destination.octets());
                let segment = segment(from.port(), to.port(), flags, &packet[12..20]);
                packet.extend(segment);
                let address = SockaddrIn::from(std::net::SocketAddrV4::new(destination, 0));
                sendto(self.v4.as_raw_fd(), &packet, &address, MsgFlags::empty())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let v6 = self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                let mut packet = vec![0x60, 0, 0, 0, 0, 20, TCP, 64];
                packet.extend(source.octets());
                packet.extend(destination.octets());
                let segment = segment(from.port(), to.port(), flags, &packet[8..40]);
                packet.extend(segment);
                let address = SockaddrIn6::from(std::net::SocketAddrV6::new(destination, 0, 0, 0));
                sendto(v6.as_raw_fd(), &packet, &address, MsgFlags::empty())
            }
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{from} and {to} differ in family"))),
        };
        sent.map(drop).map_err(Into::into)
    }
}

/// A header of 20 bytes; `addresses` is source and destination for its checksum.
fn segment(from: u16, to: u16, flags: u8, addresses: &[u8]) -> [u8; 20] {
    let mut segment = [0; 20];
    segment[..2].copy_from_slice(&from.to_be_bytes());
    segment[2..4].copy_from_slice(&to.to_be_bytes());
    segment[12] = 5 << 4;
    segment[13] = flags;
    let pseudo = addresses.iter().copied().chain([0, TCP, 0, 20]);
    let bytes: Vec<u8> = pseudo.chain(segment).collect();
    let sum = bytes.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}

#[cfg(test)]
mod tests {
    use super::{SYN_ACK, segment};

    #[test]
    fn a_checksum_makes_all_ones() {
        let addresses = [10, 244, 0, 11, 203, 0, 113, 9];
        let segment = segment(8080, 50_000, SYN_ACK, &addresses);
        let bytes: Vec<u8> = addresses.into_iter().chain([0, 6, 0, 20]).chain(segment).collect();
        let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
