//! Links, addresses, routes and neighbours: plain values, and [`Links`], the one place that puts them into a namespace.
//!
//! Everything is named by link name, never by index, so that a plan can be written before its links exist. `ensure` makes an
//! item true and is content when it already is; `remove` makes it untrue and is content when it never was.

mod code;
mod read;
pub(crate) mod socket;
mod watch;
pub(crate) mod wire;
mod write;

use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use crate::netns::{Netns, NetnsError};
use socket::Socket;
pub use watch::{AddressWatch, LinkWatch};

/// Marks routes as ours in the kernel (`ip route show proto 70`), so that nothing else's are listed or removed.
pub const PROTOCOL: u8 = 70;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("open a netlink socket: {0}; this needs CAP_NET_ADMIN in the namespace")]
    Open(Errno),
    #[error("{item}: {errno}; compare with `ip -d link`, `ip address` and `ip route` in that namespace")]
    Kernel { item: String, errno: Errno },
    #[error("link {0} does not exist; it has to be made before what refers to it")]
    NoSuchLink(String),
    #[error("link name {0:?} is not 1 to 15 characters without slash and space; choose another")]
    Name(String),
    #[error("link {name} exists and is not a {wanted}; rename or delete it")]
    OtherKind { name: String, wanted: &'static str },
    #[error("{doing} changed all the time while it was read; try again")]
    Unsteady { doing: &'static str },
    #[error("{0}")]
    Namespace(String),
}

impl LinkError {
    /// Whether the kernel refused a route because it knows no way to the gateway.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Kernel { errno: Errno::ENETUNREACH | Errno::EHOSTUNREACH, .. })
    }
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of an interface that has this IP address and no other: whoever knows one knows both, so no ARP is needed.
    /// Locally administered; IPv4 is contained, IPv6 is hashed (FNV-1a).
    pub fn of(address: IpAddr) -> Self {
        let low = match address {
            IpAddr::V4(v4) => v4.octets(),
            IpAddr::V6(v6) => v6
                .octets()
                .iter()
                .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
                .to_be_bytes(),
        };
        Self([0x0a, if address.is_ipv4() { 0x58 } else { 0x5a }, low[0], low[1], low[2], low[3]])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A link as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `bridge`, `veth`, `vxlan`; empty for a physical device and the loopback.
    pub kind: String,
    pub mtu: u32,
    pub mac: Option<Mac>,
    pub is_up: bool,
    /// Something is at the other end of the cable.
    pub has_carrier: bool,
    /// Index of the bridge this link is a port of.
    pub bridge: Option<u32>,
}

/// A learning bridge without spanning tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    /// Fixed, or the bridge takes over the lowest address of its ports and its own changes as they come and go.
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
}

/// A veth pair: `name` here, `peer` in another namespace. Both are made down and never appear in a third namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Veth {
    pub name: String,
    pub peer: String,
    pub peer_netns: Netns,
    pub peer_mac: Option<Mac>,
    pub mtu: Option<u32>,
}

/// A VXLAN device that learns nothing: who is where is told by [`Fdb`] entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    pub name: String,
    pub id: u32,
    pub port: u16,
    pub local: IpAddr,
    pub mac: Mac,
    pub mtu: u32,
}

/// A link as a port of a bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub link: String,
    pub bridge: String,
    /// Whether a frame may leave by the port it came in.
    pub hairpin: bool,
}

/// An address on a link. IPv6 addresses are used at once, without duplicate address detection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    pub link: String,
    /// The address itself with the length of its network: not truncated.
    pub address: IpNet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    Unicast,
    /// Dropped without a word.
    Blackhole,
    /// Answered with an ICMP error, so that clients fail at once.
    Unreachable,
}

/// A route of the main table. Without `via` the destination is on the link itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub to: IpNet,
    pub kind: RouteKind,
    pub via: Option<IpAddr>,
    /// May be left out where `via` says it.
    pub link: Option<String>,
    /// `via` is on the link although no address of the link says so.
    pub is_onlink: bool,
    pub source: Option<IpAddr>,
    /// Who made the route; see [`PROTOCOL`].
    pub protocol: u8,
}

impl Route {
    pub fn network(to: IpNet) -> Self {
        Self {
            to: to.trunc(),
            kind: RouteKind::Unicast,
            via: None,
            link: None,
            is_onlink: false,
            source: None,
            protocol: PROTOCOL,
        }
    }

    /// A route to a single address.
    pub fn host(address: IpAddr) -> Self {
        Self::network(IpNet::from(address))
    }

    /// The default route of the family of `via`.
    pub fn default_via(via: IpAddr) -> Self {
        let any = match via {
            IpAddr::V4(_) => IpAddr::from([0_u8; 4]),
            IpAddr::V6(_) => IpAddr::from([0_u8; 16]),
        };
        Self { to: IpNet::new(any, 0).expect("length 0 fits every family"), ..Self::host(any) }.via(via)
    }

    pub fn kind(mut self, kind: RouteKind) -> Self {
        self.kind = kind;
        self
    }

    pub fn via(mut self, via: IpAddr) -> Self {
        self.via = Some(via);
        self
    }

    pub fn link(mut self, link: impl Into<String>) -> Self {
        self.link = Some(link.into());
        self
    }

    pub fn onlink(mut self) -> Self {
        self.is_onlink = true;
        self
    }

    pub fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self
    }

    pub fn protocol(mut self, protocol: u8) -> Self {
        self.protocol = protocol;
        self
    }
}

/// A permanent entry of the neighbour table: no ARP, no neighbour discovery.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    pub link: String,
    pub address: IpAddr,
    pub mac: Mac,
}

/// Where a VXLAN device sends frames for `mac`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fdb {
    pub link: String,
    pub mac: Mac,
    pub remote: IpAddr,
}

/// Anything that [`Links`] can make true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Bridge(Bridge),
    /// A link that leads nowhere: it only holds addresses.
    Dummy(String),
    Veth(Veth),
    Vxlan(Vxlan),
    Port(Port),
    Up(String),
    Address(Address),
    Route(Route),
    Neighbour(Neighbour),
    Fdb(Fdb),
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge(Bridge { name, .. }) => write!(f, "bridge {name}"),
            Self::Dummy(name) => write!(f, "dummy {name}"),
            Self::Veth(Veth { name, peer, .. }) => write!(f, "veth {name} peer {peer}"),
            Self::Vxlan(Vxlan { name, id, port, local, .. }) => {
                write!(f, "vxlan {name} id {id} port {port} local {local}")
            }
            Self::Port(Port { link, bridge, hairpin }) => write!(f, "port {link} of {bridge} hairpin {hairpin}"),
            Self::Up(link) => write!(f, "link {link} up"),
            Self::Address(Address { link, address }) => write!(f, "address {address} dev {link}"),
            Self::Route(route) => write!(f, "{route}"),
            Self::Neighbour(Neighbour { link, address, mac }) => {
                write!(f, "neighbour {address} lladdr {mac} dev {link}")
            }
            Self::Fdb(Fdb { link, mac, remote }) => write!(f, "fdb {mac} dst {remote} dev {link}"),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RouteKind::Unicast => write!(f, "route {}", self.to)?,
            RouteKind::Blackhole => write!(f, "route blackhole {}", self.to)?,
            RouteKind::Unreachable => write!(f, "route unreachable {}", self.to)?,
        }
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if let Some(link) = &self.link {
            write!(f, " dev {link}")?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if self.is_onlink {
            write!(f, " onlink")?;
        }
        Ok(())
    }
}

/// The links of one namespace. An exchange with the kernel takes microseconds but waits for the kernel's one lock over all
/// links, so asynchronous callers with many items use a blocking thread.
#[derive(Debug)]
pub struct Links {
    socket: Mutex<Socket>,
}

impl Links {
    /// The links of the calling thread's namespace.
    pub fn current() -> Result<Self, LinkError> {
        let socket = Socket::open(SockProtocol::NetlinkRoute).map_err(LinkError::Open)?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    pub fn open(namespace: &Netns) -> Result<Self, LinkError> {
        namespace.run(Self::current).map_err(|error: NetnsError| LinkError::Namespace(error.to_string()))?
    }

    /// Makes every item true, in order.
    pub fn ensure_all<'a>(&self, items: impl IntoIterator<Item = &'a Item>) -> Result<(), LinkError> {
        items.into_iter().try_for_each(|item| self.ensure(item))
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        // A panic between request and answer leaves an answer that the next exchange skips by its sequence number.
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
