//! The nouns of nftables: data types, keys, elements, sets, chains and the transaction that changes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::rule::Rule;

/// The address family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    Ip,
    Ip6,
    Inet,
    /// Packets of one interface, of whatever protocol.
    Netdev,
}

impl Family {
    pub(crate) fn number(self) -> u8 {
        match self {
            Family::Inet => 1,
            Family::Ip => 2,
            Family::Netdev => 5,
            Family::Ip6 => 10,
        }
    }
}

/// One field of a key, as `nft` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DataType {
    Ipv4Addr,
    Ipv6Addr,
    InetProto,
    InetService,
    /// A 32-bit number in host byte order.
    Mark,
}

impl DataType {
    /// nft's own number of the type: it prints a set by it.
    pub(crate) fn number(self) -> u32 {
        match self {
            DataType::Ipv4Addr => 7,
            DataType::Ipv6Addr => 8,
            DataType::InetProto => 12,
            DataType::InetService => 13,
            DataType::Mark => 19,
        }
    }

    /// Bytes of the value, without padding.
    pub(crate) fn len(self) -> u32 {
        match self {
            DataType::Ipv4Addr | DataType::Mark => 4,
            DataType::Ipv6Addr => 16,
            DataType::InetProto => 1,
            DataType::InetService => 2,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            DataType::Ipv4Addr => "ipv4_addr",
            DataType::Ipv6Addr => "ipv6_addr",
            DataType::InetProto => "inet_proto",
            DataType::InetService => "inet_service",
            DataType::Mark => "mark",
        }
    }
}

/// One value of a key or of an element's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Datum {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
    /// An IP protocol number.
    Proto(u8),
    Port(u16),
    Mark(u32),
}

impl Datum {
    pub fn data_type(self) -> DataType {
        match self {
            Datum::V4(_) => DataType::Ipv4Addr,
            Datum::V6(_) => DataType::Ipv6Addr,
            Datum::Proto(_) => DataType::InetProto,
            Datum::Port(_) => DataType::InetService,
            Datum::Mark(_) => DataType::Mark,
        }
    }
}

impl From<IpAddr> for Datum {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Datum::V4(address),
            IpAddr::V6(address) => Datum::V6(address),
        }
    }
}

/// A concatenation of values: the key of an element, or the data of a map's element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub Box<[Datum]>);

impl Key {
    pub fn new(data: impl IntoIterator<Item = Datum>) -> Self {
        Key(data.into_iter().collect())
    }
}

/// Where a packet goes after a rule or a verdict map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(Box<str>),
    Goto(Box<str>),
}

impl Verdict {
    pub fn chain(&self) -> Option<&str> {
        match self {
            Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
            Verdict::Accept | Verdict::Drop | Verdict::Return => None,
        }
    }
}

/// What an element maps to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ElementData {
    /// A member of a set.
    None,
    Verdict(Verdict),
    Value(Key),
}

/// A member of a set or map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Element {
    pub key: Key,
    /// The last key of a range, in interval sets: each field from `key` to here, both included.
    pub end: Option<Key>,
    pub data: ElementData,
}

/// What a map's elements hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetData {
    None,
    Verdict,
    Value(Vec<DataType>),
}

/// A set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub name: Box<str>,
    pub key: Vec<DataType>,
    pub data: SetData,
    /// Elements are ranges.
    pub interval: bool,
    /// Rules fill it, elements time out.
    pub dynamic: bool,
    /// The most elements it may hold; required of dynamic sets, or packets could fill the memory.
    pub size: Option<u32>,
}

impl Set {
    pub fn of(name: &str, key: &[DataType]) -> Self {
        Set { name: name.into(), key: key.to_vec(), data: SetData::None, interval: false, dynamic: false, size: None }
    }

    pub fn map(name: &str, key: &[DataType], data: &[DataType]) -> Self {
        Set { data: SetData::Value(data.to_vec()), ..Set::of(name, key) }
    }

    pub fn verdict_map(name: &str, key: &[DataType]) -> Self {
        Set { data: SetData::Verdict, ..Set::of(name, key) }
    }

    pub fn interval(self) -> Self {
        Set { interval: true, ..self }
    }

    pub fn dynamic(self, size: u32) -> Self {
        Set { dynamic: true, size: Some(size), ..self }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    Filter,
    Nat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
    /// What leaves through an interface, sent past the IP layer or not; in the netdev family, since Linux 5.16.
    Egress,
}

impl Hook {
    pub(crate) fn number(self) -> u32 {
        match self {
            Hook::Prerouting => 0,
            Hook::Input | Hook::Egress => 1,
            Hook::Forward => 2,
            Hook::Output => 3,
            Hook::Postrouting => 4,
        }
    }
}

/// What ties a chain to the kernel's path. The policy is always accept: dropping is said by rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    pub kind: ChainKind,
    pub hook: Hook,
    pub priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub name: Box<str>,
    pub base: Option<Base>,
    /// The interface whose packets come here, in the netdev family.
    pub device: Option<Box<str>>,
}

impl Chain {
    pub fn regular(name: &str) -> Self {
        Chain { name: name.into(), base: None, device: None }
    }

    pub fn base(name: &str, kind: ChainKind, hook: Hook, priority: i32) -> Self {
        Chain { name: name.into(), base: Some(Base { kind, hook, priority }), device: None }
    }

    /// Sees what leaves through this interface, and may drop it.
    pub fn egress(name: &str, device: &str) -> Self {
        Chain { device: Some(device.into()), ..Chain::base(name, ChainKind::Filter, Hook::Egress, 0) }
    }
}

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Creates the table if it is missing; the comment of an existing table stays as it is.
    AddTable {
        comment: Option<String>,
    },
    /// The table must exist: say `AddTable` before.
    DeleteTable,
    /// Creates the chain if it is missing.
    AddChain(Chain),
    /// Removes the chain's rules.
    FlushChain(Box<str>),
    DeleteChain(Box<str>),
    /// Creates the set if it is missing.
    AddSet(Set),
    DeleteSet(Box<str>),
    FlushSet(Box<str>),
    AddRule {
        chain: Box<str>,
        rule: Rule,
    },
    AddElements {
        set: Box<str>,
        elements: Vec<Element>,
    },
    DeleteElements {
        set: Box<str>,
        elements: Vec<Element>,
    },
    /// Adds elements to a dynamic set, from which the kernel takes them away after so long. Their keys must not be there.
    AddFor {
        set: Box<str>,
        elements: Vec<Element>,
        milliseconds: u64,
    },
}

/// Changes of one table that happen together.
#[derive(Clone, Debug, PartialEq)]
pub struct Transaction {
    pub family: Family,
    pub table: Box<str>,
    pub ops: Vec<Op>,
}

impl Transaction {
    pub fn new(family: Family, table: &str) -> Self {
        Transaction { family, table: table.into(), ops: Vec::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    pub fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// Begins the table anew, empty, whatever was there under its name.
    pub fn replace_table(&mut self, comment: &str) {
        let table = || Op::AddTable { comment: Some(comment.to_owned()) };
        // Added first: only what is there can be deleted.
        self.ops.extend([table(), Op::DeleteTable, table()]);
    }
}
