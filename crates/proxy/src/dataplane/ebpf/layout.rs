//! The maps as values, and the bytes they have in `layout.h`: numbers as the machine writes them, addresses and ports as
//! packets do, IPv4 as ::ffff:a.b.c.d.

use std::collections::BTreeSet;
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use linux::bpf::Layout;
use services::{FrontendId, Protocol};

use super::maglev::PLACES;
use crate::NodeView;

/// Grows whenever a map changes its form.
pub const LAYOUT: u32 = 3;

/// How many networks of each kind a node can tell apart.
const NETWORKS: usize = 8;

/// The maps that are written from here; the others are filled by packets.
pub const LAYOUTS: [Layout; 7] = [
    Layout { name: "frontends", key_size: 20, value_size: 28, limit: 1 << 18 },
    Layout { name: "endpoints", key_size: 8, value_size: 24, limit: 1 << 20 },
    Layout { name: "members", key_size: 24, value_size: 4, limit: 1 << 18 },
    Layout { name: "sources", key_size: 24, value_size: 4, limit: 1 << 16 },
    Layout { name: "maglev", key_size: 8, value_size: 2 * PLACES, limit: 1 << 18 },
    NODES,
    TAKERS,
];

/// Addresses of the nodes that take packets for endpoints of theirs, and may send such here.
pub const TAKERS: Layout = Layout { name: "takers", key_size: 16, value_size: 4, limit: 1 << 14 };

/// What the programs know of the node: one entry, which is always there, and of zeroes while this mode does not serve.
pub const NODES: Layout = Layout { name: "nodes", key_size: 4, value_size: NODE_SIZE, limit: 1 };

/// How many connections each endpoint has; filled by packets.
pub const LOADS: Layout = Layout { name: "loads", key_size: 24, value_size: 8, limit: 1 << 14 };

/// Who counts an endpoint's connections, `enum load_kind` in `layout.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadKind {
    Sockets,
    Flows,
}

/// `struct load_key`.
pub fn load_key(endpoint: SocketAddr, protocol: Protocol, kind: LoadKind) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_address(&mut bytes, endpoint.ip());
    bytes.extend(endpoint.port().to_be_bytes());
    bytes.extend([protocol.number(), kind as u8, 0, 0, 0, 0]);
    bytes
}

/// Whether this is such a key for what this kind counts.
pub fn is_load_of(key: &[u8], kind: LoadKind) -> bool {
    key.get(19) == Some(&(kind as u8))
}

/// `COUNTED` of `enum flow_flags`.
const COUNTED: u32 = 64;

/// Whose load a flow is part of, if it is: `struct flow_key` and `struct flow`.
pub fn counted_flow(key: &[u8], flow: &[u8]) -> Option<(SocketAddr, Protocol)> {
    let mut reader = Reader(flow);
    let (address, port) = (reader.address(), reader.port());
    reader.take::<6>();
    let (_id, flags) = (reader.number(), reader.number());
    let protocol = Protocol::from_number(*key.get(36)?)?;
    (flags & COUNTED != 0).then(|| (SocketAddr::new(address, port), protocol))
}

/// Connections whose packets are translated; filled by packets.
pub const FLOWS: Layout = Layout { name: "flows", key_size: 40, value_size: 48, limit: 1 << 17 };

/// When a packet of the flow was last seen, on the clock of `linux::bpf::now`.
pub fn flow_seen(flow: &[u8]) -> Duration {
    let seen = flow.last_chunk().expect("an entry has the length of its layout");
    Duration::from_nanos(u64::from_ne_bytes(*seen))
}

const NODE_SIZE: usize = 8 + 2 * 16 + 2 * 4 + 2 * NETWORKS * 32 + 2 * 4 + 2 * 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Map {
    Frontends,
    Endpoints,
    Members,
    Sources,
    Maglev,
}

impl Map {
    pub const ALL: [Map; 5] = [Map::Frontends, Map::Endpoints, Map::Members, Map::Sources, Map::Maglev];

    pub fn layout(self) -> Layout {
        LAYOUTS[self as usize]
    }
}

/// One family's endpoints of one frontend, in one scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct List {
    pub id: FrontendId,
    pub v6: bool,
    /// Only this node's.
    pub local: bool,
}

impl List {
    pub fn number(self) -> u32 {
        self.id.0 << 2 | u32::from(self.v6) << 1 | u32::from(self.local)
    }

    pub fn from_number(number: u32) -> Self {
        List { id: FrontendId(number >> 2), v6: number & 2 != 0, local: number & 1 != 0 }
    }
}

impl Display for List {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let scope = if self.local { "local" } else { "all" };
        write!(f, "{}/{}/{scope}", self.id.0, if self.v6 { "ipv6" } else { "ipv4" })
    }
}

/// Which entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// An address that clients use. Without protocol and port: what the others leave of a cluster IP.
    Frontend {
        address: IpAddr,
        port: Option<(Protocol, u16)>,
    },
    Endpoint {
        list: List,
        slot: u32,
    },
    /// In a list whose frontend has session affinity.
    Member {
        list: List,
        endpoint: SocketAddr,
    },
    /// May go on answering a UDP flow that it has.
    Serving {
        id: FrontendId,
        endpoint: SocketAddr,
    },
    /// Answers clients itself that came to another node.
    Taken {
        by: Taken,
        endpoint: SocketAddr,
    },
    /// May use a frontend with a firewall.
    Source {
        id: FrontendId,
        network: IpNet,
    },
    /// A part of a list's table.
    Places {
        list: List,
        part: u32,
    },
}

/// Where an endpoint is that answers past the node that was asked, and for which of the frontend's addresses; the last three
/// of `enum member_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Taken {
    There(FrontendId),
    Here(FrontendId),
    /// Here, for this node port of any node.
    ByPort(Protocol, u16),
}

impl Taken {
    /// `list` and `kind` of the key.
    fn numbers(self) -> (u32, u16) {
        match self {
            Taken::There(id) => (id.0, 2),
            Taken::Here(id) => (id.0, 3),
            Taken::ByPort(protocol, port) => (u32::from(port) << 8 | u32::from(protocol.number()), 4),
        }
    }

    fn from_numbers(list: u32, kind: u16) -> Option<Self> {
        match kind {
            2 => Some(Taken::There(FrontendId(list))),
            3 => Some(Taken::Here(FrontendId(list))),
            4 => Some(Taken::ByPort(Protocol::from_number(list as u8)?, (list >> 8) as u16)),
            _ => None,
        }
    }
}

impl Display for Taken {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Taken::There(id) => write!(f, "{}/taken-there", id.0),
            Taken::Here(id) => write!(f, "{}/taken-here", id.0),
            Taken::ByPort(protocol, port) => write!(f, "{port}/{protocol}/taken-here"),
        }
    }
}

/// What a frontend's traffic meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub id: FrontendId,
    /// For pods and the node itself, and for everybody else: a list and how many it has.
    pub inside: (List, u32),
    pub outside: (List, u32),
    pub affinity_seconds: u32,
    pub flags: u32,
}

/// Bits of `Target::flags`, `enum frontend_flags` in `layout.h`.
pub mod flag {
    pub const REFUSED: u32 = 1;
    pub const MASQUERADE: u32 = 2;
    pub const MASQUERADE_OUTSIDE: u32 = 4;
    pub const FIREWALL: u32 = 8;
    pub const NODE_ALLOWED: u32 = 16;
    pub const MAGLEV: u32 = 32;
    pub const LEAST_LOAD: u32 = 64;
    pub const DIRECT: u32 = 128;
    pub const NAMES: [(u32, &str); 8] = [
        (REFUSED, "refused"),
        (MASQUERADE, "masquerade"),
        (MASQUERADE_OUTSIDE, "masquerade_outside"),
        (FIREWALL, "firewall"),
        (NODE_ALLOWED, "node_allowed"),
        (MAGLEV, "maglev"),
        (LEAST_LOAD, "least_load"),
        (DIRECT, "direct"),
    ];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    Target(Target),
    Endpoint(SocketAddr),
    /// Slots of the list's endpoints.
    Places([u16; PLACES]),
    Present,
}

pub(super) fn write_address(bytes: &mut Vec<u8>, address: IpAddr) {
    let mapped = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    bytes.extend(mapped.octets());
}

/// Reads fixed fields one after the other; the kernel gives whole entries.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("an entry has the length of its layout");
        self.0 = rest;
        *field
    }

    pub fn number(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    pub fn port(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }

    pub fn long(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    pub fn address(&mut self) -> IpAddr {
        IpAddr::from(Ipv6Addr::from(self.take::<16>())).to_canonical()
    }
}

impl Key {
    pub fn map(&self) -> Map {
        match self {
            Key::Frontend { .. } => Map::Frontends,
            Key::Endpoint { .. } => Map::Endpoints,
            Key::Member { .. } | Key::Serving { .. } | Key::Taken { .. } => Map::Members,
            Key::Source { .. } => Map::Sources,
            Key::Places { .. } => Map::Maglev,
        }
    }

    pub fn write(&self, bytes: &mut Vec<u8>) {
        let member = |bytes: &mut Vec<u8>, list: u32, kind: u16, endpoint: &SocketAddr| {
            bytes.extend(list.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(endpoint.port().to_be_bytes());
            write_address(bytes, endpoint.ip());
        };
        match self {
            Key::Frontend { address, port } => {
                write_address(bytes, *address);
                let (protocol, port) = port.map_or((0, 0), |(protocol, port)| (protocol.number(), port));
                bytes.extend(port.to_be_bytes());
                bytes.extend([protocol, 0]);
            }
            Key::Endpoint { list, slot: number } | Key::Places { list, part: number } => {
                bytes.extend(list.number().to_ne_bytes());
                bytes.extend(number.to_ne_bytes());
            }
            Key::Member { list, endpoint } => member(bytes, list.number(), 0, endpoint),
            Key::Serving { id, endpoint } => member(bytes, id.0, 1, endpoint),
            Key::Taken { by, endpoint } => {
                let (list, kind) = by.numbers();
                member(bytes, list, kind, endpoint);
            }
            Key::Source { id, network } => {
                // The id is matched as a whole, and IPv4 is at the end of a mapped address.
                let before = 32 + if network.addr().is_ipv4() { 96 } else { 0 };
                bytes.extend((before + u32::from(network.prefix_len())).to_ne_bytes());
                bytes.extend(id.0.to_ne_bytes());
                write_address(bytes, network.network());
            }
        }
    }

    /// `None`: not of our making.
    pub fn read(map: Map, bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        Some(match map {
            Map::Frontends => {
                let (address, port) = (reader.address(), reader.port());
                let port = match reader.take::<2>()[0] {
                    0 => None,
                    protocol => Some((Protocol::from_number(protocol)?, port)),
                };
                Key::Frontend { address, port }
            }
            Map::Endpoints => Key::Endpoint { list: List::from_number(reader.number()), slot: reader.number() },
            Map::Maglev => Key::Places { list: List::from_number(reader.number()), part: reader.number() },
            Map::Members => {
                let (list, kind) = (reader.number(), u16::from_ne_bytes(reader.take()));
                let port = reader.port();
                let endpoint = SocketAddr::new(reader.address(), port);
                match kind {
                    0 => Key::Member { list: List::from_number(list), endpoint },
                    1 => Key::Serving { id: FrontendId(list), endpoint },
                    _ => Key::Taken { by: Taken::from_numbers(list, kind)?, endpoint },
                }
            }
            Map::Sources => {
                let (length, id, address) = (reader.number(), FrontendId(reader.number()), reader.address());
                let before = 32 + if address.is_ipv4() { 96 } else { 0 };
                let length = u8::try_from(length.checked_sub(before)?).ok()?;
                Key::Source { id, network: IpNet::new(address, length).ok()? }
            }
        })
    }
}

impl Value {
    pub fn write(&self, bytes: &mut Vec<u8>) {
        match self {
            Value::Target(Target { id, inside, outside, affinity_seconds, flags }) => {
                let numbers =
                    [id.0, inside.0.number(), inside.1, outside.0.number(), outside.1, *affinity_seconds, *flags];
                bytes.extend(numbers.iter().flat_map(|number| number.to_ne_bytes()));
            }
            Value::Endpoint(endpoint) => {
                write_address(bytes, endpoint.ip());
                bytes.extend(endpoint.port().to_be_bytes());
                bytes.extend([0; 6]);
            }
            Value::Places(slots) => bytes.extend(slots.iter().flat_map(|slot| slot.to_ne_bytes())),
            Value::Present => bytes.extend(1_u32.to_ne_bytes()),
        }
    }

    pub fn read(map: Map, bytes: &[u8]) -> Self {
        let mut reader = Reader(bytes);
        let mut number = || reader.number();
        match map {
            Map::Frontends => {
                let id = FrontendId(number());
                let mut list = || (List::from_number(number()), number());
                let (inside, outside) = (list(), list());
                Value::Target(Target { id, inside, outside, affinity_seconds: number(), flags: number() })
            }
            Map::Endpoints => {
                let address = reader.address();
                Value::Endpoint(SocketAddr::new(address, reader.port()))
            }
            Map::Maglev => Value::Places(std::array::from_fn(|_| u16::from_ne_bytes(reader.take()))),
            Map::Members | Map::Sources => Value::Present,
        }
    }
}

/// An entry as a person reads it.
pub struct Line<'a>(pub &'a Key, pub &'a Value);

impl Display for Line<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {{ ", self.0.map().layout().name)?;
        match self.0 {
            Key::Frontend { address, port: Some((protocol, port)) } => write!(f, "{address} . {protocol} . {port}")?,
            Key::Frontend { address, port: None } => write!(f, "{address} . *")?,
            Key::Endpoint { list, slot } => write!(f, "{list} . {slot}")?,
            Key::Member { list, endpoint } => write!(f, "{list} . {endpoint}")?,
            Key::Serving { id, endpoint } => write!(f, "{}/serving . {endpoint}", id.0)?,
            Key::Taken { by, endpoint } => write!(f, "{by} . {endpoint}")?,
            Key::Source { id, network } => write!(f, "{} . {network}", id.0)?,
            Key::Places { list, part } => write!(f, "{list} . {part}")?,
        }
        match self.1 {
            Value::Target(target) => {
                let (inside, outside) = (target.inside, target.outside);
                write!(f, " : {} of {}", inside.1, inside.0)?;
                if inside != outside {
                    write!(f, ", outside {} of {}", outside.1, outside.0)?;
                }
                if target.affinity_seconds > 0 {
                    write!(f, ", sticky for {} s", target.affinity_seconds)?;
                }
                for (_, name) in flag::NAMES.iter().filter(|(bit, _)| target.flags & bit != 0) {
                    write!(f, ", {name}")?;
                }
            }
            Value::Endpoint(endpoint) => write!(f, " : {endpoint}")?,
            Value::Places(slots) => write!(f, " : slots {slots:?}")?,
            Value::Present => {}
        }
        f.write_str(" }")
    }
}

/// What the programs know of the node.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    /// What masqueraded packets come from, of each family.
    pub addresses: Vec<IpAddr>,
    pub pods: Vec<IpNet>,
    pub services: Vec<IpNet>,
    /// Addresses of nodes that take packets for endpoints of theirs, and may send such here.
    pub takers: BTreeSet<IpAddr>,
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        Base {
            addresses: node.primary_addresses(),
            pods: [false, true].into_iter().flat_map(|v6| node.pod_cidrs(v6)).copied().collect(),
            services: node.service_cidrs.clone(),
            takers: node.takers.values().flat_map(|taker| taker.addresses.iter().copied()).collect(),
        }
    }

    /// Whether there is room for all networks.
    pub fn fits(&self) -> bool {
        self.pods.len() <= NETWORKS && self.services.len() <= NETWORKS
    }

    pub fn has_pods(&self, v6: bool) -> bool {
        self.pods.iter().any(|network| network.addr().is_ipv6() == v6)
    }

    pub fn is_pod(&self, address: IpAddr) -> bool {
        self.pods.iter().any(|network| network.contains(&address))
    }

    /// `takers`, in order.
    pub fn taker_keys(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.takers.iter().for_each(|address| write_address(&mut bytes, *address));
        bytes
    }

    /// `struct node`.
    pub fn bytes(&self, cookie: u64, mtu: u32) -> Vec<u8> {
        let mut bytes = cookie.to_ne_bytes().to_vec();
        for v6 in [false, true] {
            let none = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            write_address(&mut bytes, *self.addresses.iter().find(|address| address.is_ipv6() == v6).unwrap_or(&none));
        }
        for networks in [&self.pods, &self.services] {
            bytes.extend((networks.len() as u32).to_ne_bytes());
        }
        for networks in [&self.pods, &self.services] {
            let end = bytes.len() + NETWORKS * 32;
            for network in networks {
                write_address(&mut bytes, network.network());
                let before = if network.addr().is_ipv4() { 96 } else { 0 };
                let ones = before + u32::from(network.prefix_len());
                let mask = u128::MAX.checked_shl(128 - ones).unwrap_or(0);
                bytes.extend(mask.to_be_bytes());
            }
            bytes.resize(end, 0);
        }
        for v6 in [false, true] {
            bytes.extend(u32::from(self.has_pods(v6)).to_ne_bytes());
        }
        bytes.extend([mtu, 0].iter().flat_map(|number| number.to_ne_bytes()));
        bytes
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for address in &self.addresses {
            writeln!(f, "nodes {{ masquerade as {address} }}")?;
        }
        for network in &self.pods {
            writeln!(f, "nodes {{ pods in {network} }}")?;
        }
        for network in &self.services {
            writeln!(f, "nodes {{ Services in {network} }}")?;
        }
        for address in &self.takers {
            writeln!(f, "takers {{ {address} }}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let list = List { id: FrontendId(7), v6: true, local: true };
        let id = FrontendId(9);
        let (four, six) = ("10.244.0.7:80", "[fd00::7]:81");
        let endpoint = |text: &str| text.parse::<SocketAddr>().expect("endpoint");
        let address = |text: &str| text.parse::<IpAddr>().expect("address");
        let network = |text: &str| text.parse::<IpNet>().expect("network");
        let target = Target { id, inside: (list, 3), outside: (list, 2), affinity_seconds: 60, flags: flag::FIREWALL };
        let entries = [
            (Key::Frontend { address: address("10.96.0.1"), port: Some((Protocol::Udp, 53)) }, Value::Target(target)),
            (Key::Frontend { address: address("fd00::1"), port: None }, Value::Target(target)),
            (Key::Endpoint { list, slot: 4 }, Value::Endpoint(endpoint(four))),
            (Key::Endpoint { list, slot: 5 }, Value::Endpoint(endpoint(six))),
            (Key::Member { list, endpoint: endpoint(six) }, Value::Present),
            (Key::Serving { id, endpoint: endpoint(four) }, Value::Present),
            (Key::Taken { by: Taken::There(id), endpoint: endpoint(six) }, Value::Present),
            (Key::Taken { by: Taken::Here(id), endpoint: endpoint(four) }, Value::Present),
            (Key::Taken { by: Taken::ByPort(Protocol::Udp, 30_053), endpoint: endpoint(four) }, Value::Present),
            (Key::Places { list, part: 3 }, Value::Places(std::array::from_fn(|slot| slot as u16 * 300))),
            (Key::Source { id, network: network("203.0.113.0/24") }, Value::Present),
            (Key::Source { id, network: network("0.0.0.0/0") }, Value::Present),
            (Key::Source { id, network: network("2001:db8::/32") }, Value::Present),
        ];
        for (key, value) in entries {
            let (mut key_bytes, mut value_bytes) = (Vec::new(), Vec::new());
            key.write(&mut key_bytes);
            value.write(&mut value_bytes);
            let layout = key.map().layout();
            assert_eq!((key_bytes.len(), value_bytes.len()), (layout.key_size, layout.value_size), "{key:?}");
            assert_eq!(Key::read(key.map(), &key_bytes), Some(key));
            assert_eq!(Value::read(key.map(), &value_bytes), value);
        }
        let base = Base {
            addresses: vec![address("192.168.49.2")],
            pods: vec![network("10.244.0.0/16")],
            services: vec![],
            takers: [address("192.168.49.3"), address("fd00::3")].into(),
        };
        assert_eq!(base.bytes(1, 1_500).len(), NODE_SIZE);
        assert_eq!(base.taker_keys().len(), 2 * TAKERS.key_size);
    }
}
