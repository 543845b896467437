//! TCP sockets of a network namespace (linux/inet_diag.h): listeners whose programs are behind, the connections that wait in
//! their queues, and connections for which an eBPF program keeps something, which can be ended.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::SockProtocol;

use crate::nft::netlink::{Attributes, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Raw, Reply, errno};

const MSG_BY_FAMILY: u16 = 20;
const MSG_DESTROY: u16 = 21;
/// Attributes of a request and of a message; nested in both is what belongs to the storage of a map.
const REQUEST_STORAGES: u16 = 2;
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const STORAGE_VALUE: u16 = 3;
const TCP: u8 = 6;
/// A socket of UDP with a peer is in the state ESTABLISHED.
const UDP: u8 = 17;
const ESTABLISHED: u32 = 1 << 1;
/// All in which a program may hold the socket, but for those that listen.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 11;
const CLOSE_WAIT: u32 = 1 << 8;
const LISTEN: u32 = 1 << 10;
/// An inet_diag_req_v2 after its message header.
const REQUEST: usize = 56;
const HEADER: usize = 16;
/// Where a request names the protocol.
const PROTOCOL: usize = HEADER + 1;
/// Where attributes begin in a message, from behind the state on.
const ATTRIBUTES: usize = 68;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Netlink(#[from] crate::nft::Error),
    #[error("cannot list sockets: {0}; is inet_diag in this kernel?")]
    Refused(std::io::Error),
    #[error("the kernel said nothing about sockets; retry")]
    Silent,
    #[error("cannot end a connection: {0}; is CONFIG_INET_DIAG_DESTROY in this kernel?")]
    Destroy(std::io::Error),
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

/// The size of an inet_diag_sockid, which names a socket for as long as it lives.
const ID: usize = 48;

/// A connection for which an eBPF program keeps something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What is kept, as the program wrote it.
    pub value: Vec<u8>,
    v6: bool,
    id: [u8; ID],
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

    /// What an eBPF program keeps for it, if it was asked for.
    fn stored(&self, v6: bool) -> Option<Stored> {
        let storages = Attributes(self.0.get(ATTRIBUTES..)?).nested(STORAGES)?;
        let value = storages.nested(STORAGE)?.get(STORAGE_VALUE)?.to_vec();
        Some(Stored { value, v6, id: *self.0.first_chunk()? })
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

    /// The addresses that sockets with a peer have as their own, of TCP and UDP.
    pub fn own_addresses(&mut self) -> Result<BTreeSet<IpAddr>, Error> {
        let mut found = BTreeSet::new();
        for (protocol, v6) in [(TCP, false), (TCP, true), (UDP, false), (UDP, true)] {
            let mut request = request(MSG_BY_FAMILY, NLM_F_DUMP, v6, CONNECTED, &[0; ID]);
            request[PROTOCOL] = protocol;
            self.ask(request, |message| found.extend(message.local(v6).map(|local| local.ip())))?;
        }
        Ok(found)
    }

    /// Connections for which this map keeps something. It is a map of `BPF_MAP_TYPE_SK_STORAGE`.
    pub fn stored(&mut self, map: BorrowedFd<'_>) -> Result<Vec<Stored>, Error> {
        let mut attribute = Vec::new();
        for (length, kind) in [(12_u16, REQUEST_STORAGES), (8, STORAGE)] {
            attribute.extend(length.to_ne_bytes());
            attribute.extend(kind.to_ne_bytes());
        }
        attribute.extend(map.as_raw_fd().to_ne_bytes());
        let mut found = Vec::new();
        for v6 in [false, true] {
            let mut request = request(MSG_BY_FAMILY, NLM_F_DUMP, v6, CONNECTED, &[0; ID]);
            request.extend(&attribute);
            self.ask(request, |message| found.extend(message.stored(v6)))?;
        }
        Ok(found)
    }

    /// Ends a connection, as if its program had aborted it: the program hears ECONNABORTED, the other side a reset. Whether
    /// it was still there.
    pub fn destroy(&mut self, connection: &Stored) -> Result<bool, Error> {
        let request = request(MSG_DESTROY, NLM_F_ACK, connection.v6, CONNECTED, &connection.id);
        match self.ask(request, |_| ()) {
            Ok(()) => Ok(true),
            Err(Error::Refused(cause)) if cause.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(Error::Refused(cause)) => Err(Error::Destroy(cause)),
            Err(error) => Err(error),
        }
    }

    fn dump(&mut self, v6: bool, states: u32, port: u16, visit: impl FnMut(Message<'_>)) -> Result<(), Error> {
        let mut id = [0; ID];
        id[..2].copy_from_slice(&port.to_be_bytes());
        self.ask(request(MSG_BY_FAMILY, NLM_F_DUMP, v6, states, &id), visit)
    }

    fn ask(&mut self, mut request: Vec<u8>, mut visit: impl FnMut(Message<'_>)) -> Result<(), Error> {
        let length = request.len() as u32;
        request[..4].copy_from_slice(&length.to_ne_bytes());
        self.raw.drain()?;
        self.raw.send(&request)?;
        let mut outcome = Err(Error::Silent);
        self.raw.replies(|reply| {
            match reply {
                Reply::Object(Attributes(message)) => {
                    visit(Message(message));
                    return Ok(true);
                }
                Reply::Ack { .. } | Reply::Done => outcome = Ok(()),
                Reply::Failed { errno: number, .. } => outcome = Err(Error::Refused(errno(number))),
            }
            Ok(false)
        })?;
        outcome
    }
}

/// A message whose length is still to be written.
fn request(kind: u16, flags: u16, v6: bool, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut request = vec![0; 4];
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([if v6 { libc::AF_INET6 } else { libc::AF_INET } as u8, TCP, 0, 0]);
    request.extend(states.to_ne_bytes());
    request.extend(id);
    debug_assert_eq!(request.len(), HEADER + REQUEST, "an inet_diag_req_v2");
    request
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn an_address_is_in_use_while_a_connection_has_it() {
        let own = IpAddr::from([127, 0, 0, 42]);
        let mut sockets = Socket::open(None).expect("sock_diag");
        let mut is_used = || sockets.own_addresses().expect("addresses").contains(&own);
        let udp = UdpSocket::bind((own, 0)).expect("bind");
        let listener = TcpListener::bind((own, 0)).expect("bind");
        assert!(!is_used(), "nobody has a peer");
        udp.connect((own, 9)).expect("connect");
        assert!(is_used());
        drop(udp);
        assert!(!is_used());
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connect");
        assert!(is_used());
        drop((listener, client));
    }

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
