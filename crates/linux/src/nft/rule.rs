//! What a rule may say. Registers are the encoder's business: here a value is an expression.

use ipnet::IpNet;

use super::value::{Datum, Key, Verdict};

/// Something a rule can read or compute for the packet at hand.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// 2 for IPv4, 10 for IPv6.
    Nfproto,
    L4Proto,
    /// What a socket (`SO_MARK`) or a rule has marked the packet with.
    PacketMark,
    /// The field of the header; `v6` names which header.
    SourceIp {
        v6: bool,
    },
    DestinationIp {
        v6: bool,
    },
    SourcePort,
    DestinationPort,
    /// Where the first packet of the connection was sent, before translation.
    OriginalDestinationIp {
        v6: bool,
    },
    OriginalDestinationPort,
    /// Who answers the connection.
    ReplySourceIp {
        v6: bool,
    },
    ReplySourcePort,
    /// Flags of the TCP header; the rule has to ask for TCP before.
    TcpFlags,
    /// Type and code of an ICMP or ICMPv6 header; the rule has to ask for the protocol before.
    IcmpType,
    IcmpCode,
    /// 0 on packets of whoever began the connection, 1 on the answers.
    CtDirection,
    /// One of `NEW`, `ESTABLISHED` … as a bit.
    CtState,
    CtStatus,
    /// The kind of address (`local`, `unicast` …) of the packet's source.
    FibSourceType,
    FibDestinationType,
    /// A random number below the modulus.
    Random {
        modulus: u32,
    },
    Const(Datum),
    /// What the map holds under the key; the rule ends here if it holds nothing. Inside another key it is a number, and
    /// a `Const` must stand before it (see the encoder's `key`).
    Lookup {
        key: Vec<Value>,
        map: Box<str>,
    },
    /// What `Statement::Choose` chose earlier in the same rule: that many numbers. Inside a key, a `Const` must stand
    /// before it.
    Chosen {
        words: u32,
    },
}

impl Value {
    pub fn lookup(key: impl IntoIterator<Item = Value>, map: &str) -> Self {
        Value::Lookup { key: key.into_iter().collect(), map: map.into() }
    }

    /// `ip daddr . meta l4proto . th dport`
    pub fn destination(v6: bool) -> [Value; 3] {
        [Value::DestinationIp { v6 }, Value::L4Proto, Value::DestinationPort]
    }

    /// The same before translation.
    pub fn original_destination(v6: bool) -> [Value; 3] {
        [Value::OriginalDestinationIp { v6 }, Value::L4Proto, Value::OriginalDestinationPort]
    }
}

/// How a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    TcpReset,
    /// The ICMP or ICMPv6 "port unreachable", whichever fits.
    PortUnreachable,
}

/// One part of a rule; the next is reached only if this one holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    Equal(Value, Datum),
    NotEqual(Value, Datum),
    /// The address lies in the network.
    InNet(Value, IpNet),
    NotInNet(Value, IpNet),
    /// The packet came in through this interface, or through one whose name starts so. Packets of this node's own
    /// processes came in through none.
    CameThrough {
        name: Box<str>,
        is_prefix: bool,
    },
    /// At least one of the bits is set.
    HasBits(Value, u32),
    /// None of the bits is set.
    LacksBits(Value, u32),
    In {
        key: Vec<Value>,
        set: Box<str>,
    },
    NotIn {
        key: Vec<Value>,
        set: Box<str>,
    },
    VerdictMap {
        key: Vec<Value>,
        map: Box<str>,
    },
    /// Computes a value once, for the statements after this one: a number, or an address and port.
    Choose(Value),
    /// Writes key → data into a dynamic map. The rule ends here if the map is full. A key that is there already keeps its
    /// data and only gets a fresh timeout.
    Update {
        map: Box<str>,
        key: Vec<Value>,
        data: Vec<Value>,
        timeout_seconds: u32,
    },
    /// Counts the packet in the element of a dynamic set that has this key, which a first packet makes. The rule ends here
    /// if the set is full.
    Count {
        set: Box<str>,
        key: Vec<Value>,
        timeout_seconds: u32,
    },
    /// Removes a key from a dynamic map, whatever its data; the kernel still wants data of the right type.
    Forget {
        map: Box<str>,
        key: Vec<Value>,
        data: Vec<Value>,
    },
    /// Sends the connection to the address and port chosen; `v6` is their family.
    Dnat {
        v6: bool,
    },
    Masquerade {
        fully_random: bool,
    },
    Reject(Reject),
    Counter,
    /// Holds for at most `rate` packets a second.
    Limit {
        rate: u64,
        burst: u32,
    },
    /// Sends at most so many bytes of the packet to whoever listens to the group (`crate::nflog`).
    Log {
        group: u16,
        bytes: u32,
    },
    /// Sends a copy of the packet to the neighbour, or by way of the router, with this address; only in tables of one family.
    Duplicate {
        to: Value,
    },
    Verdict(Verdict),
}

/// Statements, and a comment that `nft` prints.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub statements: Vec<Statement>,
    pub comment: Option<Box<str>>,
}

impl Rule {
    pub fn new(statements: impl IntoIterator<Item = Statement>) -> Self {
        Rule { statements: statements.into_iter().collect(), comment: None }
    }

    pub fn comment(self, comment: &str) -> Self {
        Rule { comment: Some(comment.into()), ..self }
    }
}

/// Bits of `ct state`.
pub mod ct_state {
    pub const ESTABLISHED: u32 = 1 << 1;
    pub const RELATED: u32 = 1 << 2;
    pub const NEW: u32 = 1 << 3;
}

/// Bits of `ct status`.
pub mod ct_status {
    pub const SEEN_REPLY: u32 = 1 << 1;
    pub const SNAT: u32 = 1 << 4;
    pub const DNAT: u32 = 1 << 5;
    /// The kernel has just taken the connection out of its table.
    pub const DYING: u32 = 1 << 9;
}

/// Flags of TCP.
pub const TCP_SYN: u32 = 2;
pub const TCP_RST: u32 = 4;

/// `fib … type local`.
pub const ADDRESS_LOCAL: u32 = 2;

impl Statement {
    /// `meta nfproto ipv4` or `ipv6`
    pub fn of_family(v6: bool) -> Self {
        Statement::Equal(Value::Nfproto, Datum::Proto(if v6 { 10 } else { 2 }))
    }

    pub fn is_in(key: impl IntoIterator<Item = Value>, set: &str) -> Self {
        Statement::In { key: key.into_iter().collect(), set: set.into() }
    }

    pub fn not_in(key: impl IntoIterator<Item = Value>, set: &str) -> Self {
        Statement::NotIn { key: key.into_iter().collect(), set: set.into() }
    }

    pub fn verdict_map(key: impl IntoIterator<Item = Value>, map: &str) -> Self {
        Statement::VerdictMap { key: key.into_iter().collect(), map: map.into() }
    }

    pub fn goto(chain: &str) -> Self {
        Statement::Verdict(Verdict::Goto(chain.into()))
    }

    pub fn jump(chain: &str) -> Self {
        Statement::Verdict(Verdict::Jump(chain.into()))
    }

    pub fn returns() -> Self {
        Statement::Verdict(Verdict::Return)
    }

    pub fn drop() -> Self {
        Statement::Verdict(Verdict::Drop)
    }
}

impl FromIterator<Datum> for Key {
    fn from_iter<T: IntoIterator<Item = Datum>>(data: T) -> Self {
        Key::new(data)
    }
}
