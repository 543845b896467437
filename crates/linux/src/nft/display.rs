//! Prints values the way `nft` would, so that a plan in a test reads like a ruleset.

use std::fmt::{Display, Formatter, Result};

use super::rule::{ADDRESS_LOCAL, Reject, Rule, Statement, TCP_RST, Value, ct_state, ct_status};
use super::value::{
    Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Op, Set, SetData, Transaction, Verdict,
};

/// Joins with a separator, straight into the formatter.
fn join<T: Display>(f: &mut Formatter<'_>, items: impl IntoIterator<Item = T>, separator: &str) -> Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(separator)?;
        }
        write!(f, "{item}")?;
    }
    Ok(())
}

struct Joined<'a, T>(&'a [T], &'a str);

impl<T: Display> Display for Joined<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        join(f, self.0, self.1)
    }
}

impl Display for Family {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
            Family::Inet => "inet",
            Family::Netdev => "netdev",
        })
    }
}

impl Display for DataType {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(self.name())
    }
}

impl Display for Datum {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Datum::V4(address) => write!(f, "{address}"),
            Datum::V6(address) => write!(f, "{address}"),
            Datum::Proto(6) => f.write_str("tcp"),
            Datum::Proto(17) => f.write_str("udp"),
            Datum::Proto(132) => f.write_str("sctp"),
            Datum::Proto(other) => write!(f, "{other}"),
            Datum::Port(port) => write!(f, "{port}"),
            Datum::Mark(mark) => write!(f, "{mark:#010x}"),
        }
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        join(f, self.0.iter(), " . ")
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Return => f.write_str("return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match &self.end {
            None => write!(f, "{}", self.key)?,
            Some(end) => {
                for (index, (low, high)) in self.key.0.iter().zip(end.0.iter()).enumerate() {
                    if index > 0 {
                        f.write_str(" . ")?;
                    }
                    write!(f, "{low}")?;
                    if low != high {
                        write!(f, "-{high}")?;
                    }
                }
            }
        }
        match &self.data {
            ElementData::None => Ok(()),
            ElementData::Verdict(verdict) => write!(f, " : {verdict}"),
            ElementData::Value(value) => write!(f, " : {value}"),
        }
    }
}

impl Display for Set {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let word = if self.data == SetData::None { "set" } else { "map" };
        write!(f, "{word} {} {{ type {}", self.name, Joined(&self.key, " . "))?;
        match &self.data {
            SetData::None => {}
            SetData::Verdict => f.write_str(" : verdict")?,
            SetData::Value(types) => write!(f, " : {}", Joined(types, " . "))?,
        }
        if let Some(size) = self.size {
            write!(f, "; size {size}")?;
        }
        if self.interval {
            f.write_str("; flags interval")?;
        }
        if self.dynamic {
            f.write_str("; flags dynamic,timeout")?;
        }
        f.write_str("; }")
    }
}

impl Display for Hook {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
            Hook::Egress => "egress",
        })
    }
}

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "chain {}", self.name)?;
        let Some(base) = &self.base else { return Ok(()) };
        let kind = match base.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        };
        write!(f, " {{ type {kind} hook {}", base.hook)?;
        if let Some(device) = &self.device {
            write!(f, " device \"{device}\"")?;
        }
        write!(f, " priority {}; policy accept; }}", base.priority)
    }
}

/// `ip daddr` or `ip6 daddr`.
fn header(v6: bool) -> &'static str {
    if v6 { "ip6" } else { "ip" }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Value::Nfproto => f.write_str("meta nfproto"),
            Value::L4Proto => f.write_str("meta l4proto"),
            Value::PacketMark => f.write_str("meta mark"),
            Value::SourceIp { v6 } => write!(f, "{} saddr", header(*v6)),
            Value::DestinationIp { v6 } => write!(f, "{} daddr", header(*v6)),
            Value::SourcePort => f.write_str("th sport"),
            Value::DestinationPort => f.write_str("th dport"),
            Value::OriginalDestinationIp { v6 } => write!(f, "ct original {} daddr", header(*v6)),
            Value::OriginalDestinationPort => f.write_str("ct original proto-dst"),
            Value::ReplySourceIp { v6 } => write!(f, "ct reply {} saddr", header(*v6)),
            Value::ReplySourcePort => f.write_str("ct reply proto-src"),
            Value::TcpFlags => f.write_str("tcp flags"),
            Value::IcmpType => f.write_str("icmp type"),
            Value::IcmpCode => f.write_str("icmp code"),
            Value::CtDirection => f.write_str("ct direction"),
            Value::CtState => f.write_str("ct state"),
            Value::CtStatus => f.write_str("ct status"),
            Value::FibSourceType => f.write_str("fib saddr type"),
            Value::FibDestinationType => f.write_str("fib daddr type"),
            Value::Random { modulus } => write!(f, "numgen random mod {modulus}"),
            Value::Const(datum) => write!(f, "{datum}"),
            Value::Lookup { key, map } => write!(f, "{} map @{map}", Joined(key, " . ")),
            Value::Chosen { .. } => f.write_str("$chosen"),
        }
    }
}

/// Constants that have a name where they are compared.
fn constant(value: &Value, datum: &Datum) -> String {
    match (value, datum) {
        (Value::Nfproto, Datum::Proto(2)) => "ipv4".into(),
        (Value::Nfproto, Datum::Proto(10)) => "ipv6".into(),
        (Value::CtDirection, Datum::Proto(0)) => "original".into(),
        (Value::CtDirection, Datum::Proto(1)) => "reply".into(),
        // In these places the number is none of a protocol.
        (Value::IcmpType | Value::IcmpCode, Datum::Proto(number)) => number.to_string(),
        (Value::FibSourceType | Value::FibDestinationType, Datum::Mark(ADDRESS_LOCAL)) => "local".into(),
        (_, datum) => datum.to_string(),
    }
}

impl Display for Statement {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Statement::Equal(value, datum) => write!(f, "{value} {}", constant(value, datum)),
            Statement::NotEqual(value, datum) => write!(f, "{value} != {}", constant(value, datum)),
            Statement::InNet(value, net) => write!(f, "{value} {net}"),
            Statement::NotInNet(value, net) => write!(f, "{value} != {net}"),
            Statement::CameThrough { name, is_prefix } => {
                write!(f, "iifname \"{name}{}\"", if *is_prefix { "*" } else { "" })
            }
            Statement::HasBits(Value::CtState, ct_state::NEW) => f.write_str("ct state new"),
            Statement::HasBits(Value::CtStatus, ct_status::DNAT) => f.write_str("ct status dnat"),
            Statement::HasBits(Value::CtState, ct_state::RELATED) => f.write_str("ct state related"),
            Statement::HasBits(Value::CtStatus, ct_status::DYING) => f.write_str("ct status dying"),
            Statement::HasBits(Value::TcpFlags, TCP_RST) => f.write_str("tcp flags rst"),
            Statement::LacksBits(Value::CtStatus, ct_status::SEEN_REPLY) => f.write_str("ct status ! seen-reply"),
            Statement::LacksBits(value, bits) => write!(f, "{value} & {bits:#x} == 0"),
            Statement::HasBits(value, bits) => write!(f, "{value} & {bits:#x} != 0"),
            Statement::In { key, set } => write!(f, "{} @{set}", Joined(key, " . ")),
            Statement::NotIn { key, set } => write!(f, "{} != @{set}", Joined(key, " . ")),
            Statement::VerdictMap { key, map } => write!(f, "{} vmap @{map}", Joined(key, " . ")),
            Statement::Choose(value) => write!(f, "$chosen = {value}"),
            Statement::Count { set, key, timeout_seconds } => {
                write!(f, "update @{set} {{ {} timeout {timeout_seconds}s counter }}", Joined(key, " . "))
            }
            Statement::Forget { map, key, data } => {
                write!(f, "delete @{map} {{ {} : {} }}", Joined(key, " . "), Joined(data, " . "))
            }
            Statement::Update { map, key, data, timeout_seconds } => {
                let (key, data) = (Joined(key, " . "), Joined(data, " . "));
                write!(f, "update @{map} {{ {key} timeout {timeout_seconds}s : {data} }}")
            }
            Statement::Dnat { v6 } => write!(f, "dnat {} to $chosen", header(*v6)),
            Statement::Masquerade { fully_random: true } => f.write_str("masquerade fully-random"),
            Statement::Masquerade { fully_random: false } => f.write_str("masquerade"),
            Statement::Reject(Reject::TcpReset) => f.write_str("reject with tcp reset"),
            Statement::Reject(Reject::PortUnreachable) => f.write_str("reject"),
            Statement::Counter => f.write_str("counter"),
            Statement::Limit { rate, burst } => write!(f, "limit rate {rate}/second burst {burst} packets"),
            Statement::Log { group, bytes } => write!(f, "log group {group} snaplen {bytes}"),
            Statement::Duplicate { to } => write!(f, "dup to {to}"),
            Statement::Verdict(verdict) => write!(f, "{verdict}"),
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        join(f, &self.statements, " ")?;
        match &self.comment {
            Some(comment) => write!(f, " comment \"{comment}\""),
            None => Ok(()),
        }
    }
}

impl Op {
    /// The line `nft -f` would take, for the named table.
    pub(crate) fn line(&self, family: Family, table: &str) -> String {
        let at = format!("{family} {table}");
        match self {
            Op::AddTable { comment: None } => format!("add table {at}"),
            Op::AddTable { comment: Some(comment) } => format!("add table {at} {{ comment \"{comment}\"; }}"),
            Op::DeleteTable => format!("delete table {at}"),
            Op::AddChain(chain) => format!("add {}", chain.to_string().replacen("chain ", &format!("chain {at} "), 1)),
            Op::FlushChain(chain) => format!("flush chain {at} {chain}"),
            Op::DeleteChain(chain) => format!("delete chain {at} {chain}"),
            Op::AddSet(set) => {
                let text = set.to_string();
                let (word, rest) = text.split_at(4);
                format!("add {word}{at} {rest}")
            }
            Op::DeleteSet(set) => format!("delete set {at} {set}"),
            Op::FlushSet(set) => format!("flush set {at} {set}"),
            Op::AddRule { chain, rule } => format!("add rule {at} {chain} {rule}"),
            Op::AddElements { set, elements } => format!("add element {at} {set} {{ {} }}", Joined(elements, ", ")),
            Op::DeleteElements { set, elements } => {
                format!("delete element {at} {set} {{ {} }}", Joined(elements, ", "))
            }
            Op::AddFor { set, elements, milliseconds } => {
                let timed = elements.iter().map(|element| {
                    let text = element.to_string();
                    // A timeout stands behind the key.
                    let (key, data) =
                        text.split_once(" : ").map_or((&*text, String::new()), |(k, d)| (k, format!(" : {d}")));
                    format!("{key} timeout {milliseconds}ms{data}")
                });
                format!("add element {at} {set} {{ {} }}", timed.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

impl Display for Transaction {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for op in &self.ops {
            writeln!(f, "{}", op.line(self.family, &self.table))?;
        }
        Ok(())
    }
}
