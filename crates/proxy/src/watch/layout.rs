//! The rules by which the kernel tells of new and of refused connections, in a table of their own beside whatever mode
//! serves: it sees connections that are translated, whoever translated them.
//!
//! What every connection pays: one rule on its first packet, and one comparison of the RST flag on each packet. A refusal
//! is held back only if its frontend has another endpoint in its pick: the last one must still refuse.

use std::net::SocketAddr;

use linux::nft::{
    Chain, ChainKind, DataType, Datum, Family, Hook, Op, Rule, Set, Socket, Statement, TCP_RST, Transaction, Value,
    ct_status,
};
use services::Protocol;

use super::members::{Kind, TCP, at};
use crate::Error;
use crate::dataplane::frame::{digest, from_host, named};

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-watch";

/// The log groups of new connections and of refusals. Log groups belong to a network namespace, like rules.
pub const BEGUN: u16 = 64_021;
pub const REFUSED: u16 = 64_022;

/// After conntrack has seen a packet (−200), before it is translated (−100).
const AFTER_CONNTRACK: i32 = -150;
/// Before the source is translated (100), when the destination already is.
const BEFORE_SOURCE_NAT: i32 = 90;

/// Pairs of address and endpoint that are counted at a time, and for how long one without a new connection is remembered.
const COUNTED: u32 = 1 << 16;
const COUNTED_SECONDS: u32 = 3600;

/// Says what the table is for, and which version of it this is.
pub fn comment(layout: &[Op]) -> String {
    let text = Transaction { family: FAMILY, table: TABLE.into(), ops: layout.to_vec() }.to_string();
    format!("Endpoints that do not answer, by fairlead: changes here are lost. Layout {}", digest(&text))
}

/// address . protocol . port . endpoint's address . port, filled by first packets
fn counted(v6: bool) -> Set {
    use DataType::{InetProto, InetService};
    let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
    Set::of(&named("connections", v6), &[ip, InetProto, InetService, ip, InetService]).dynamic(COUNTED)
}

/// Connections by protocol, address and endpoint, since the pair was last idle for an hour; none if nobody counts.
pub(crate) fn connections(nft: &mut Socket) -> Result<Vec<(Protocol, SocketAddr, SocketAddr, u64)>, Error> {
    let mut found = Vec::new();
    for v6 in [false, true] {
        let counters = match nft.counters(FAMILY, TABLE, &counted(v6)) {
            Err(error) if error.is_absent() => return Ok(Vec::new()),
            counters => counters?,
        };
        for (key, count) in counters {
            if let [ip, Datum::Proto(protocol), Datum::Port(port), endpoint, Datum::Port(target)] = &key.0[..]
                && let (Some(address), Some(endpoint)) = (at(ip, *port), at(endpoint, *target))
                && let Some(protocol) = Protocol::from_number(*protocol)
            {
                found.push((protocol, address, endpoint, count));
            }
        }
    }
    Ok(found)
}

/// Sets, chains and rules.
pub fn layout(retry: bool, count: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    for v6 in [false, true] {
        ops.extend(Kind::ALL.map(|kind| Op::AddSet(kind.set(v6))));
        ops.push(Op::AddSet(counted(v6)));
    }
    let chains = chains(retry, count);
    ops.extend(chains.iter().map(|(chain, _)| Op::AddChain(chain.clone())));
    for (chain, rules) in chains {
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { chain: chain.name.clone(), rule }));
    }
    ops
}

fn is_protocol(number: u8) -> Statement {
    Statement::Equal(Value::L4Proto, Datum::Proto(number))
}

fn translated() -> Statement {
    Statement::HasBits(Value::CtStatus, ct_status::DNAT)
}

fn chains(retry: bool, count: bool) -> Vec<(Chain, Vec<Rule>)> {
    let goto = |chain: &str| Statement::goto(chain);
    let mut held = vec![Rule::new([
        Statement::Limit { rate: 100, burst: 20 },
        // An IPv6 header, one of ICMPv6, and what that quotes.
        Statement::Log { group: REFUSED, bytes: 128 },
    ])];
    if retry {
        // The connection is out of the kernel's table: when the client repeats its first packet, that is picked anew.
        held.push(Rule::new([Statement::Counter, Statement::drop()]));
    }
    let mut refused = Vec::new();
    let mut unreachable = Vec::new();
    let mut begun = Vec::new();
    for v6 in [false, true] {
        let has_alternative = || {
            // An ICMP error is not of the protocol that it is about.
            let key = [Value::OriginalDestinationIp { v6 }, Value::Const(TCP), Value::OriginalDestinationPort];
            Statement::is_in(key, &Kind::Alternatives.name(v6))
        };
        let is_out = Value::original_destination(v6).into_iter().chain([Value::SourceIp { v6 }, Value::SourcePort]);
        refused.push(Rule::new([Statement::of_family(v6), has_alternative(), goto("held")]));
        refused.push(Rule::new([
            Statement::of_family(v6),
            Statement::is_in(is_out, &Kind::Out.name(v6)),
            goto("held"),
        ]));
        unreachable.push(Rule::new([Statement::of_family(v6), has_alternative(), goto("held")]));
        let frozen = Statement::is_in([Value::DestinationIp { v6 }, Value::DestinationPort], &Kind::Frozen.name(v6));
        begun.push(Rule::new([Statement::of_family(v6), is_protocol(6), frozen, goto("frozen")]));
        if count {
            let pair = Value::original_destination(v6)
                .into_iter()
                .chain([Value::DestinationIp { v6 }, Value::DestinationPort]);
            let set = counted(v6).name;
            let count = Statement::Count { set, key: pair.collect(), timeout_seconds: COUNTED_SECONDS };
            begun.push(Rule::new([Statement::of_family(v6), translated(), count]));
        }
        let wake = || [Statement::Limit { rate: 20, burst: 5 }, Statement::Log { group: BEGUN, bytes: 20 }];
        let alternative = Statement::is_in(Value::original_destination(v6), &Kind::Alternatives.name(v6));
        let statements =
            [Statement::of_family(v6), is_protocol(6), translated(), alternative].into_iter().chain(wake());
        begun.push(Rule::new(statements));
        // What another node picked for its clients.
        let here = Statement::is_in([Value::DestinationIp { v6 }, Value::DestinationPort], &Kind::Here.name(v6));
        let elsewhere = Statement::LacksBits(Value::CtStatus, ct_status::DNAT);
        let statements = [Statement::of_family(v6), is_protocol(6), elsewhere, here].into_iter().chain(wake());
        begun.push(Rule::new(statements));
    }
    let frozen = vec![
        Rule::new([translated(), Statement::drop()]),
        // Probes of this node's kubelet have to find out by themselves.
        Rule::new([from_host(), Statement::returns()]),
        // The proxies of other nodes see that their first packets are not answered.
        Rule::new([Statement::drop()]),
    ];
    let unreachable_type = |icmp: u8, number: u8| {
        let mut statements = vec![is_protocol(icmp), Statement::Equal(Value::IcmpType, Datum::Proto(number))];
        if icmp == 1 {
            // A packet that is too large for a link.
            statements.push(Statement::NotEqual(Value::IcmpCode, Datum::Proto(4)));
        }
        statements.extend([
            translated(),
            Statement::LacksBits(Value::CtStatus, ct_status::SEEN_REPLY),
            goto("unreachable"),
        ]);
        Rule::new(statements)
    };
    let refusals = || {
        vec![
            Rule::new([
                is_protocol(6),
                Statement::HasBits(Value::TcpFlags, TCP_RST),
                Statement::Equal(Value::CtDirection, Datum::Proto(1)),
                translated(),
                // The kernel takes a connection out of its table at once if its only answer is a reset, and only then.
                Statement::HasBits(Value::CtStatus, ct_status::DYING),
                goto("refused"),
            ]),
            unreachable_type(1, 3),
            unreachable_type(58, 1),
        ]
    };
    let base = Chain::base;
    vec![
        // Regular chains first: the others name them.
        (Chain::regular("held"), held),
        (Chain::regular("refused"), refused),
        (Chain::regular("unreachable"), unreachable),
        (Chain::regular("frozen"), frozen),
        (base("begun_forward", ChainKind::Nat, Hook::Postrouting, BEFORE_SOURCE_NAT), begun.clone()),
        (base("begun_here", ChainKind::Nat, Hook::Input, BEFORE_SOURCE_NAT), begun),
        (base("refusals", ChainKind::Filter, Hook::Prerouting, AFTER_CONNTRACK), refusals()),
        (base("refusals_here", ChainKind::Filter, Hook::Output, AFTER_CONNTRACK), refusals()),
    ]
}
