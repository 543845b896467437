//! Listening sockets whose programs are behind, and the connections that wait in their queues (linux/inet_diag.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use nix::sys::socket::SockProtocol;

use crate::nft::netlink::{Attributes, NLM_F_DUMP, NLM_F_REQUEST, Raw, Reply, errno};

const MSG_BY_FAMILY: u16 = 20;
const TCP: u8 = 6;
const ESTABLISHED: u32 = 1 << 1;
const CLOSE_WAIT: u32 = 1 << 8;
const LISTEN: u32 = 1 << 10;
/// An inet_diag_req_v2 after its message header.
const REQUEST: usize = 56;
const HEADER: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Netlink(#[from] crate::nft::Error),
    #[error("cannot list sockets: {0}; is inet_diag in this kernel?")]
    Refused(std::io::Error),
    #[error("the kernel said nothing about sockets; retry")]
    Silent,
}

/// A listener with connections in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub port: u16,
    pub inode: u32,
}

/// A connection that the kernel has accepted, and no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Waiting {
    /// The address that the client talks to; IPv4 also where the listener is of IPv6.
    pub local: SocketAddr,
    /// Names the connection for as long as it lives.
    pub cookie: u64,
}

/// TCP sockets of one network namespace.
pub struct Socket {
    raw: Raw,
}

/// What the kernel says of one socket, from behind its state on.
struct Message<'a>(&'a [u8]);

impl Message<'_> {
    fn port(&self) -> Option<u16> {
        Some(u16::from_be_bytes(self.0.get(0..2)?.try_into().ok()?))
    }

    fn local(&self, v6: bool) -> Option<SocketAddr> {
        let address = match v6 {
            false => Ipv4Addr::from(<[u8; 4]>::try_from(self.0.get(4..8)?).ok()?).into(),
            true => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(self.0.get(4..20)?).ok()?)).to_canonical(),
        };
        Some(SocketAddr::new(address, self.port()?))
    }

    fn cookie(&self) -> Option<u64> {
        Some(u64::from_ne_bytes(self.0.get(40..48)?.try_into().ok()?))
    }

    fn receive_queue(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.0.get(52..56)?.try_into().ok()?))
    }

    /// 0: no program holds it.
    fn inode(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.0.get(64..68)?.try_into().ok()?))
    }
}

impl Socket {
    /// Opens the sockets of the namespace given, or of the calling thread's. The namespace lives as long as this.
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        Ok(Socket { raw: Raw::open_protocol(namespace, SockProtocol::NetlinkSockDiag)? })
    }

    /// Listeners whose queue is not empty.
    pub fn backlogged(&mut self) -> Result<Vec<Listener>, Error> {
        let mut found = Vec::new();
        for v6 in [false, true] {
            self.dump(v6, LISTEN, 0, |message| {
                // The receive queue of a listener is its accept queue.
                let backlogged = message.receive_queue().is_some_and(|waiting| waiting > 0);
                if let Some((port, inode)) = message.port().zip(message.inode())
                    && backlogged
                {
                    found.push(Listener { port, inode });
                }
            })?;
        }
        Ok(found)
    }

    /// Connections to a port that wait to be taken.
    pub fn waiting(&mut self, port: u16) -> Result<Vec<Waiting>, Error> {
        let mut found = Vec::new();
        for v6 in [false, true] {
            self.dump(v6, ESTABLISHED | CLOSE_WAIT, port, |message| {
                // In these states only one that nobody has accepted has no file.
                if message.inode() == Some(0)
                    && let Some((local, cookie)) = message.local(v6).zip(message.cookie())
                {
                    found.push(Waiting { local, cookie });
                }
            })?;
        }
        Ok(found)
    }

    fn dump(&mut self, v6: bool, states: u32, port: u16, mut visit: impl FnMut(Message<'_>)) -> Result<(), Error> {
        let mut request = Vec::with_capacity(HEADER + REQUEST);
        request.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
        request.extend(MSG_BY_FAMILY.to_ne_bytes());
        request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        request.extend([0; 8]);
        request.extend([if v6 { libc::AF_INET6 } else { libc::AF_INET } as u8, TCP, 0, 0]);
        request.extend(states.to_ne_bytes());
        request.extend(port.to_be_bytes());
        request.resize(HEADER + REQUEST, 0);
        self.raw.drain()?;
        self.raw.send(&request)?;
        let mut outcome = Err(Error::Silent);
        self.raw.replies(|reply| {
            match reply {
                Reply::Object(Attributes(message)) => {
                    visit(Message(message));
                    return Ok(true);
                }
                Reply::Ack { .. } => return Ok(true),
                Reply::Done => outcome = Ok(()),
                Reply::Failed { errno: number, .. } => outcome = Err(Error::Refused(errno(number))),
            }
            Ok(false)
        })?;
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn connections_that_nobody_accepts_are_found() {
        for any in ["127.0.0.1:0", "[::]:0"] {
            let listener = TcpListener::bind(any).expect("a listener");
            let port = listener.local_addr().expect("an address").port();
            let mut sockets = Socket::open(None).expect("sock_diag");
            let is_behind = |sockets: &mut Socket| {
                let listeners = sockets.backlogged().expect("listeners");
                listeners.iter().any(|listener| listener.port == port)
            };
            assert!(!is_behind(&mut sockets));
            let to = SocketAddr::from(([127, 0, 0, 1], port));
            let clients = [TcpStream::connect(to).expect("a client"), TcpStream::connect(to).expect("a client")];
            assert!(is_behind(&mut sockets));
            let waiting = sockets.waiting(port).expect("connections");
            assert_eq!(waiting.iter().map(|waiting| waiting.local).collect::<Vec<_>>(), [to, to]);
            // One client gives up: its connection waits all the same.
            let [first, second] = clients;
            drop(first);
            assert_eq!(sockets.waiting(port).expect("connections").len(), 2);
            let accepted = [listener.accept().expect("accepted"), listener.accept().expect("accepted")];
            assert!(!is_behind(&mut sockets));
            assert_eq!(sockets.waiting(port).expect("connections"), []);
            drop((second, accepted));
        }
    }
}
