//! Rules, and the input of `iptables-restore`, printed exactly as the tool reads it.

use std::fmt::{Display, Formatter, Result};
use std::net::SocketAddr;

use ipnet::IpNet;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    Filter,
    Nat,
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Table::Filter => "filter",
            Table::Nat => "nat",
        })
    }
}

/// One match of a rule, or its comment: the order in which they are written is kept.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    Comment(String),
    Source {
        net: IpNet,
        not: bool,
    },
    Destination {
        net: IpNet,
        not: bool,
    },
    /// Came in through the interface, or through one whose name starts so.
    InInterface {
        name: Box<str>,
        is_prefix: bool,
        not: bool,
    },
    /// `tcp`, `udp` or `sctp`, with a destination port.
    Port {
        protocol: &'static str,
        number: u8,
        destination: Option<IpNet>,
        port: u16,
    },
    Protocol {
        protocol: &'static str,
        number: u8,
    },
    SourceTypeLocal,
    DestinationTypeLocal,
    /// All bits of the mark are set, or (`not`) some are missing.
    Mark {
        bits: u32,
        not: bool,
    },
    CtState {
        states: &'static str,
        not: bool,
    },
    /// Holds with this probability, written with ten digits.
    Random {
        one_in: usize,
    },
    RecentSet {
        list: String,
    },
    RecentCheck {
        list: String,
        seconds: u32,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The rule only counts.
    None,
    Jump(String),
    Accept,
    Drop,
    Reject,
    Return,
    MarkOr(u32),
    MarkXor(u32),
    Masquerade {
        random_fully: bool,
    },
    Dnat(SocketAddr),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub parts: Vec<Part>,
    pub target: Target,
}

/// What one table gets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableRestore {
    /// Chains that are created, or emptied if they are there.
    pub chains: Vec<String>,
    /// Taken out, before anything is added; each must be there.
    pub removes: Vec<(String, Rule)>,
    /// Appended, in order.
    pub rules: Vec<(String, Rule)>,
    /// Put at the head of a chain, each before the one named earlier.
    pub inserts: Vec<(String, Rule)>,
    /// Removed after all rules; each must be in `chains`, which empties it.
    pub deletes: Vec<String>,
}

/// The input of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Restore {
    pub filter: TableRestore,
    pub nat: TableRestore,
}

fn not(negated: bool) -> &'static str {
    if negated { "! " } else { "" }
}

/// An address alone where the prefix is all of it, as kube-proxy writes it.
fn net(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

impl Display for Part {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Part::Comment(text) => write!(f, "-m comment --comment \"{text}\""),
            Part::Source { net: source, not: negated } => write!(f, "{}-s {}", not(*negated), net(source)),
            Part::Destination { net: to, not: negated } => write!(f, "{}-d {}", not(*negated), net(to)),
            Part::InInterface { name, is_prefix, not: negated } => {
                write!(f, "{}-i {name}{}", not(*negated), if *is_prefix { "+" } else { "" })
            }
            Part::Port { protocol, number: _, destination, port } => {
                write!(f, "-m {protocol} -p {protocol}")?;
                if let Some(destination) = destination {
                    write!(f, " -d {}", net(destination))?;
                }
                write!(f, " --dport {port}")
            }
            Part::Protocol { protocol, number: _ } => write!(f, "-m {protocol} -p {protocol}"),
            Part::SourceTypeLocal => f.write_str("-m addrtype --src-type LOCAL"),
            Part::DestinationTypeLocal => f.write_str("-m addrtype --dst-type LOCAL"),
            Part::Mark { bits, not: negated } => write!(f, "-m mark {}--mark {bits:#010x}/{bits:#010x}", not(*negated)),
            Part::CtState { states, not: negated } => write!(f, "-m conntrack {}--ctstate {states}", not(*negated)),
            Part::Random { one_in } => {
                write!(f, "-m statistic --mode random --probability {:.10}", 1.0 / *one_in as f64)
            }
            Part::RecentSet { list } => write!(f, "-m recent --name {list} --set"),
            Part::RecentCheck { list, seconds } => {
                write!(f, "-m recent --name {list} --rcheck --seconds {seconds} --reap")
            }
        }
    }
}

impl Display for Target {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Target::None => Ok(()),
            Target::Jump(chain) => write!(f, "-j {chain}"),
            Target::Accept => f.write_str("-j ACCEPT"),
            Target::Drop => f.write_str("-j DROP"),
            Target::Reject => f.write_str("-j REJECT"),
            Target::Return => f.write_str("-j RETURN"),
            Target::MarkOr(bits) => write!(f, "-j MARK --or-mark {bits:#010x}"),
            Target::MarkXor(bits) => write!(f, "-j MARK --xor-mark {bits:#010x}"),
            Target::Masquerade { random_fully: true } => f.write_str("-j MASQUERADE --random-fully"),
            Target::Masquerade { random_fully: false } => f.write_str("-j MASQUERADE"),
            Target::Dnat(to) => write!(f, "-j DNAT --to-destination {to}"),
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for (index, part) in self.parts.iter().enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{part}")?;
        }
        if self.target != Target::None {
            write!(f, "{}{}", if self.parts.is_empty() { "" } else { " " }, self.target)?;
        }
        Ok(())
    }
}

impl TableRestore {
    pub fn is_empty(&self) -> bool {
        *self == TableRestore::default()
    }

    fn write(&self, table: Table, f: &mut Formatter<'_>) -> Result {
        if self.is_empty() {
            return Ok(());
        }
        writeln!(f, "*{table}")?;
        for chain in &self.chains {
            writeln!(f, ":{chain} - [0:0]")?;
        }
        for (chain, rule) in &self.removes {
            writeln!(f, "-D {chain} {rule}")?;
        }
        for (chain, rule) in &self.inserts {
            writeln!(f, "-I {chain} 1 {rule}")?;
        }
        for (chain, rule) in &self.rules {
            writeln!(f, "-A {chain} {rule}")?;
        }
        for chain in &self.deletes {
            writeln!(f, "-X {chain}")?;
        }
        writeln!(f, "COMMIT")
    }
}

impl Restore {
    pub fn is_empty(&self) -> bool {
        self.filter.is_empty() && self.nat.is_empty()
    }
}

impl Display for Restore {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.filter.write(Table::Filter, f)?;
        self.nat.write(Table::Nat, f)
    }
}
