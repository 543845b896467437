//! Sockets as BGP and BFD want them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use linux::{hops, tcp_md5};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::bfd;
use super::speaker::Neighbour;

pub const PORT: u16 = 179;
/// How long a router may take to answer a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// From these ports BFD packets come (RFC 5881, section 4).
const BFD_SOURCES: std::ops::RangeInclusive<u16> = 49152..=65535;

fn domain(address: IpAddr) -> Domain {
    Domain::for_address(SocketAddr::new(address, 0))
}

pub fn any(is_v4: bool) -> IpAddr {
    if is_v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn set_hops(socket: &Socket, is_v4: bool, count: u8) -> io::Result<()> {
    if is_v4 { socket.set_ttl_v4(count.into()) } else { socket.set_unicast_hops_v6(count.into()) }
}

/// A connection to a peer. Over one hop it carries no further than that.
pub async fn connect(neighbour: Neighbour) -> io::Result<TcpStream> {
    let peer = neighbour.address;
    let socket = Socket::new(domain(peer), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(hops) = neighbour.hops {
        set_hops(&socket, peer.is_ipv4(), hops)?;
    }
    if let Some(key) = &neighbour.password {
        tcp_md5::set_key(socket.as_fd(), peer, key.as_bytes())?;
    }
    if let Some(source) = neighbour.source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(SocketAddr::new(peer, neighbour.port));
    match tokio::time::timeout(PATIENCE, connecting).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Where passive peers connect to; with the keys of those that have one.
pub fn listen<'a>(is_v4: bool, peers: impl IntoIterator<Item = &'a Neighbour>) -> io::Result<TcpListener> {
    let address = any(is_v4);
    let socket = Socket::new(domain(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if !is_v4 {
        socket.set_only_v6(true)?;
    }
    for peer in peers {
        if let Some(key) = &peer.password {
            tcp_md5::set_key(socket.as_fd(), peer.address, key.as_bytes())?;
        }
    }
    socket.bind(&SocketAddr::new(address, PORT).into())?;
    socket.listen(16)?;
    TcpListener::from_std(socket.into())
}

/// Hears BFD packets of one family, over one hop or several.
pub fn hear_bfd(is_v4: bool, is_multihop: bool) -> io::Result<tokio::net::UdpSocket> {
    let address = any(is_v4);
    let socket = Socket::new(domain(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if !is_v4 {
        socket.set_only_v6(true)?;
    }
    hops::tell(socket.as_fd(), is_v4)?;
    let port = if is_multihop { bfd::MULTIHOP_PORT } else { bfd::PORT };
    socket.bind(&SocketAddr::new(address, port).into())?;
    tokio::net::UdpSocket::from_std(socket.into())
}

/// Says BFD packets to one peer. `first` chooses where the search for a free port begins.
pub fn say_bfd(neighbour: &Neighbour, is_multihop: bool, first: u32) -> io::Result<UdpSocket> {
    let peer = neighbour.address;
    let socket = Socket::new(domain(peer), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    set_hops(&socket, peer.is_ipv4(), bfd::HOPS)?;
    let source = neighbour.source.unwrap_or(any(peer.is_ipv4()));
    let count = BFD_SOURCES.len() as u32;
    let mut ports = (0..count).map(|n| BFD_SOURCES.start() + (first.wrapping_add(n) % count) as u16);
    let bound = ports.find_map(|port| match socket.bind(&SocketAddr::new(source, port).into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
        other => Some(other),
    });
    bound.unwrap_or(Err(io::ErrorKind::AddrInUse.into()))?;
    let port = if is_multihop { bfd::MULTIHOP_PORT } else { bfd::PORT };
    socket.connect(&SocketAddr::new(peer, port).into())?;
    Ok(socket.into())
}
