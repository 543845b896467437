//! The rules by which the kernel tells of new and of refused connections, in a table of their own beside whatever mode
//! serves: it sees connections that are translated, whoever translated them.
//!
//! What every connection pays: one rule on its first packet, and one comparison of the RST flag on each packet. A refusal
//! is held back only if its frontend has another endpoint in its pick: the last one must still refuse.
//!
//! IPVS has to see a refusal before it is held back, or it sends the repeated packet to the same endpoint. And what it
//! translates is not marked as such: then it is by the sets alone that a Service's packets are known.

use std::net::SocketAddr;

use linux::conntrack::Translator;
use linux::nft::{
    Chain, ChainKind, DataType, Datum, Family, Hook, Op, Rule, Set, Socket, Statement, TCP_RST, Transaction, Value,
    ct_status,
};
use services::Protocol;

use super::members::{Kind, TCP};
use crate::Error;
use crate::dataplane::frame::{at, digest, from_host, named};

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-watch";

/// The log groups of new connections and of refusals. Log groups belong to a network namespace, like rules.
pub const BEGUN: u16 = 64_021;
pub const REFUSED: u16 = 64_022;

/// After conntrack has seen a packet (−200), before it is translated (−100).
const AFTER_CONNTRACK: i32 = -150;
/// Before the source is translated (100), when the destination already is.
const BEFORE_SOURCE_NAT: i32 = 90;
/// After IPVS has translated an answer: at input that is at 98, elsewhere in hooks before.
const AFTER_IPVS: i32 = 110;

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
pub fn layout(by: Translator, retry: bool, count: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    for v6 in [false, true] {
        ops.extend(Kind::ALL.map(|kind| Op::AddSet(kind.set(v6))));
        ops.push(Op::AddSet(counted(v6)));
    }
    let chains = chains(by, retry, count);
    ops.extend(chains.iter().map(|(chain, _)| Op::AddChain(chain.clone())));
    for (chain, rules) in chains {
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { chain: chain.name.clone(), rule }));
    }
    ops
}

fn is_protocol(number: u8) -> Statement {
    Statement::Equal(Value::L4Proto, Datum::Proto(number))
}

/// The packet is of a connection that was sent elsewhere; nothing where that does not show.
fn translated(by: Translator) -> Option<Statement> {
    (by == Translator::Nat).then_some(Statement::HasBits(Value::CtStatus, ct_status::DNAT))
}

fn has_alternative(v6: bool) -> Statement {
    // An ICMP error is not of the protocol that it is about.
    let key = [Value::OriginalDestinationIp { v6 }, Value::Const(TCP), Value::OriginalDestinationPort];
    Statement::is_in(key, &Kind::Alternatives.name(v6))
}

/// The endpoint has left the pick of the address, where one other is left.
fn is_out(v6: bool, endpoint: [Value; 2]) -> Statement {
    let key = [Value::OriginalDestinationIp { v6 }, Value::Const(TCP), Value::OriginalDestinationPort];
    Statement::is_in(key.into_iter().chain(endpoint), &Kind::Out.name(v6))
}

fn chains(by: Translator, retry: bool, count: bool) -> Vec<(Chain, Vec<Rule>)> {
    let base = Chain::base;
    // Regular chains first: the others name them.
    let mut chains = refusals(by, retry);
    let begun = begun(by, count);
    chains.extend([
        (Chain::regular("frozen"), frozen(by)),
        (base("begun_forward", ChainKind::Nat, Hook::Postrouting, BEFORE_SOURCE_NAT), begun.clone()),
        (base("begun_here", ChainKind::Nat, Hook::Input, BEFORE_SOURCE_NAT), begun),
    ]);
    chains
}

/// First packets, on their way to their endpoint.
fn begun(by: Translator, count: bool) -> Vec<Rule> {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let tcp = || [Statement::of_family(v6), is_protocol(6)].into_iter();
        let here = |kind: Kind| Statement::is_in([Value::DestinationIp { v6 }, Value::DestinationPort], &kind.name(v6));
        rules.push(Rule::new(tcp().chain([here(Kind::Frozen), Statement::goto("frozen")])));
        if count {
            let pair = Value::original_destination(v6)
                .into_iter()
                .chain([Value::DestinationIp { v6 }, Value::DestinationPort]);
            let set = counted(v6).name;
            let count = Statement::Count { set, key: pair.collect(), timeout_seconds: COUNTED_SECONDS };
            rules.push(Rule::new([Statement::of_family(v6)].into_iter().chain(translated(by)).chain([count])));
        }
        let wake = || [Statement::Limit { rate: 20, burst: 5 }, Statement::Log { group: BEGUN, bytes: 20 }];
        let alternative = Statement::is_in(Value::original_destination(v6), &Kind::Alternatives.name(v6));
        rules.push(Rule::new(tcp().chain(translated(by)).chain([alternative]).chain(wake())));
        // What another node picked for its clients.
        let elsewhere = translated(by).map(|_| Statement::LacksBits(Value::CtStatus, ct_status::DNAT));
        rules.push(Rule::new(tcp().chain(elsewhere).chain([here(Kind::Here)]).chain(wake())));
    }
    rules
}

fn frozen(by: Translator) -> Vec<Rule> {
    let mut rules: Vec<Rule> = match translated(by) {
        Some(translated) => vec![Rule::new([translated, Statement::drop()])],
        None => {
            [false, true].map(|v6| Rule::new([Statement::of_family(v6), has_alternative(v6), Statement::drop()])).into()
        }
    };
    rules.extend([
        // Probes of this node's kubelet have to find out by themselves.
        Rule::new([from_host(), Statement::returns()]),
        // The proxies of other nodes see that their first packets are not answered.
        Rule::new([Statement::drop()]),
    ]);
    rules
}

/// What refuses: told, and held back where a connection could go elsewhere.
fn refusals(by: Translator, retry: bool) -> Vec<(Chain, Vec<Rule>)> {
    let told = Rule::new([
        Statement::Limit { rate: 100, burst: 20 },
        // An IPv6 header, one of ICMPv6, and what that quotes.
        Statement::Log { group: REFUSED, bytes: 128 },
    ]);
    // The connection is out of the kernel's table: when the client repeats its first packet, that is picked anew.
    let hold = || retry.then(|| Rule::new([Statement::Counter, Statement::drop()]));
    let held: Vec<Rule> = [told.clone()].into_iter().chain(hold()).collect();
    let of_each = |endpoint: fn(bool) -> [Value; 2], then: &str| {
        let rules = [false, true].map(|v6| {
            [has_alternative(v6), is_out(v6, endpoint(v6))]
                .map(|is_so| Rule::new([Statement::of_family(v6), is_so, Statement::goto(then)]))
        });
        rules.concat()
    };
    // Who answers, as the packet says before IPVS has translated it, and as conntrack says at any time.
    let by_packet: fn(bool) -> [Value; 2] = |v6| [Value::SourceIp { v6 }, Value::SourcePort];
    let by_conntrack: fn(bool) -> [Value; 2] = |v6| [Value::ReplySourceIp { v6 }, Value::ReplySourcePort];
    let unreachable_type = |icmp: u8, number: u8| {
        let mut statements = vec![is_protocol(icmp), Statement::Equal(Value::IcmpType, Datum::Proto(number))];
        if icmp == 1 {
            // A packet that is too large for a link.
            statements.push(Statement::NotEqual(Value::IcmpCode, Datum::Proto(4)));
        }
        statements.extend(translated(by));
        statements.push(Statement::LacksBits(Value::CtStatus, ct_status::SEEN_REPLY));
        statements.push(Statement::goto("unreachable"));
        Rule::new(statements)
    };
    let reset = |then: &str| {
        let mut statements = vec![
            is_protocol(6),
            Statement::HasBits(Value::TcpFlags, TCP_RST),
            Statement::Equal(Value::CtDirection, Datum::Proto(1)),
        ];
        statements.extend(translated(by));
        // The kernel takes a connection out of its table at once if its only answer is a reset, and only then.
        statements.extend([Statement::HasBits(Value::CtStatus, ct_status::DYING), Statement::goto(then)]);
        Rule::new(statements)
    };
    let filter = |name: &str, hook, priority| Chain::base(name, ChainKind::Filter, hook, priority);
    let refusals = || vec![reset("refused"), unreachable_type(1, 3), unreachable_type(58, 1)];
    let mut chains = vec![(Chain::regular("held"), held)];
    match by {
        Translator::Nat => chains.push((Chain::regular("refused"), of_each(by_packet, "held"))),
        Translator::Ipvs => chains
            .extend([(Chain::regular("told"), vec![told]), (Chain::regular("refused"), of_each(by_conntrack, "told"))]),
    }
    // An ICMP error comes from whoever writes it.
    chains.push((Chain::regular("unreachable"), of_each(by_conntrack, "held")));
    if by == Translator::Ipvs
        && let Some(hold) = hold()
    {
        chains.extend([
            (Chain::regular("hold"), vec![hold]),
            (Chain::regular("translated"), of_each(by_conntrack, "hold")),
            (filter("answers_forward", Hook::Postrouting, AFTER_IPVS), vec![reset("translated")]),
            (filter("answers_here", Hook::Input, AFTER_IPVS), vec![reset("translated")]),
        ]);
    }
    chains.extend([
        (filter("refusals", Hook::Prerouting, AFTER_CONNTRACK), refusals()),
        (filter("refusals_here", Hook::Output, AFTER_CONNTRACK), refusals()),
    ]);
    chains
}
