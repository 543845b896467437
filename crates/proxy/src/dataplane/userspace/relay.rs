//! Where relays listen and from where they connect: sockets of the node's network namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use ipnet::IpNet;
use linux::netns::Netns;
use linux::splice::{self, Pool};
use services::{PortName, Protocol};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::picker::Picker;
use super::plan::Reach;
use super::tally::Tally;
use super::{tcp, udp};
use crate::watch::relayed::Witness;

/// Whose traffic is the cluster's own.
#[derive(Default)]
pub struct Inside(RwLock<Vec<IpNet>>);

impl Inside {
    pub fn set(&self, nets: Vec<IpNet>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = nets;
    }

    pub fn contains(&self, client: IpAddr) -> bool {
        let nets = self.0.read().unwrap_or_else(PoisonError::into_inner);
        client.is_loopback() || nets.iter().any(|net| net.contains(&client))
    }
}

/// A place to listen at, and whom to let in to where.
pub struct Door {
    pub name: PortName,
    /// Port 0: any that is free.
    pub bind: SocketAddr,
    pub reach: Reach,
    pub picker: Arc<Picker>,
    pub inside: Arc<Inside>,
}

impl Door {
    /// Endpoints for this client to try, the best first.
    pub fn candidates(&self, client: IpAddr) -> Vec<SocketAddr> {
        let policy = self.reach.policy(self.inside.contains(client));
        self.picker.candidates(policy, self.bind.is_ipv6(), client, Instant::now())
    }
}

/// A relay that listens; it stops when this is dropped, and its TCP connections go on.
#[derive(Debug)]
pub struct Open {
    pub address: SocketAddr,
    pub protocol: Protocol,
    _close: Option<DropGuard>,
}

/// Opens relays. Sockets implement it, and so does a fake.
pub trait Relays: Send + 'static {
    fn open(&mut self, door: Door) -> io::Result<Open>;
}

/// Relays of numbers only.
#[derive(Default)]
pub struct FakeRelays {
    opened: u16,
}

impl Relays for FakeRelays {
    fn open(&mut self, door: Door) -> io::Result<Open> {
        self.opened += 1;
        let port = if door.bind.port() == 0 { 40_000 + self.opened } else { door.bind.port() };
        Ok(Open { address: SocketAddr::new(door.bind.ip(), port), protocol: door.name.protocol, _close: None })
    }
}

/// The network namespace whose sockets are used.
#[derive(Clone)]
pub enum Place {
    /// The one this process is in.
    Here,
    Within(Netns),
}

impl Place {
    /// An unconnected TCP socket for this family.
    fn tcp_socket(&self, peer: SocketAddr) -> io::Result<TcpSocket> {
        match self {
            Place::Here if peer.is_ipv6() => TcpSocket::new_v6(),
            Place::Here => TcpSocket::new_v4(),
            Place::Within(namespace) => {
                Ok(TcpSocket::from_std_stream(namespace.tcp_socket(peer).map_err(io::Error::other)?))
            }
        }
    }

    /// What does not answer any more must not hold a connection for ever.
    fn listen(&self, bind: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.tcp_socket(bind)?;
        socket.set_reuseaddr(true)?;
        // Accepted sockets inherit it.
        socket.set_keepalive(true)?;
        socket.bind(bind)?;
        socket.listen(1024)
    }

    pub async fn connect(&self, endpoint: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.tcp_socket(endpoint)?;
        socket.set_keepalive(true)?;
        socket.set_nodelay(true)?;
        socket.connect(endpoint).await
    }

    fn bind_udp(&self, bind: SocketAddr) -> io::Result<UdpSocket> {
        let socket = match self {
            Place::Here => std::net::UdpSocket::bind(bind)?,
            Place::Within(namespace) => namespace.udp_bind(bind).map_err(io::Error::other)?,
        };
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    pub async fn connect_udp(&self, endpoint: SocketAddr) -> io::Result<UdpSocket> {
        let any = if endpoint.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv4Addr::UNSPECIFIED) };
        let socket = self.bind_udp(SocketAddr::new(any, 0))?;
        socket.connect(endpoint).await?;
        Ok(socket)
    }
}

/// Relays of real sockets, served by tasks of a tokio runtime.
pub struct Sockets {
    place: Place,
    runtime: Handle,
    pipes: Arc<Pool>,
    witness: Witness,
    tally: Arc<Tally>,
}

impl Sockets {
    pub fn new(place: Place, runtime: Handle, witness: Witness, tally: Arc<Tally>) -> Self {
        if let Err(error) = splice::raise_open_files() {
            tracing::warn!("proxy: cannot raise the limit of open files: {error}; many connections may need it");
        }
        Sockets { place, runtime, pipes: Arc::default(), witness, tally }
    }
}

impl Relays for Sockets {
    fn open(&mut self, door: Door) -> io::Result<Open> {
        // Sockets belong to the runtime that is entered when they are made.
        let _entered = self.runtime.enter();
        let protocol = door.name.protocol;
        let closed = CancellationToken::new();
        let address = match protocol {
            Protocol::Tcp => {
                let listener = self.place.listen(door.bind)?;
                let address = listener.local_addr()?;
                let (place, pipes) = (self.place.clone(), self.pipes.clone());
                let (witness, tally) = (self.witness.clone(), self.tally.clone());
                let relay = tcp::Relay { door, place, pipes, witness, tally };
                self.runtime.spawn(tcp::serve(listener, Arc::new(relay), closed.clone()));
                address
            }
            Protocol::Udp => {
                let socket = self.place.bind_udp(door.bind)?;
                let address = socket.local_addr()?;
                let (place, witness, tally) = (self.place.clone(), self.witness.clone(), self.tally.clone());
                let relay = udp::Relay { door, place, socket, buffers: Mutex::default(), witness, tally };
                self.runtime.spawn(udp::serve(Arc::new(relay), closed.clone()));
                address
            }
            Protocol::Sctp => return Err(io::Error::new(io::ErrorKind::Unsupported, "SCTP has no relay")),
        };
        Ok(Open { address, protocol, _close: Some(closed.drop_guard()) })
    }
}
