//! The rules and sets by which the kernel tells of new and of refused connections, in a table of their own beside whatever
//! mode serves: it sees connections that are translated, whoever translated them.
//!
//! What every connection pays: one rule on its first packet, and one comparison of the RST flag on each packet. A refusal
//! is held back only if its frontend has another endpoint in its pick: the last one must still refuse.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use linux::nft::{
    ADDRESS_LOCAL, Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Nft, Op, Rule, Set,
    Statement, TCP_RST, Transaction, Value, Verdict, ct_status,
};
use services::{Frontend, Protocol, TrafficPolicy};
use sha2::{Digest, Sha256};

use crate::scope::{Scopes, scopes};
use crate::{Error, NodeView};

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-watch";

/// The log groups of new connections and of refusals. Log groups belong to a network namespace, like rules.
pub const BEGUN: u16 = 64_021;
pub const REFUSED: u16 = 64_022;

/// After conntrack has seen a packet (−200), before it is translated (−100).
const AFTER_CONNTRACK: i32 = -150;
/// Before the source is translated (100), when the destination already is.
const BEFORE_SOURCE_NAT: i32 = 90;

/// Elements a transaction may have, so that a cold start of many Services holds up nobody else for long.
const CHUNK: usize = 1 << 14;

/// What one frontend adds to the sets.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Alternatives(BTreeSet<Member>);

/// An element of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Member {
    /// A TCP address with at least two endpoints to pick from.
    Alternative(SocketAddr),
    /// An endpoint that has left the pick of an address, where one other is left.
    Out(SocketAddr, SocketAddr),
    /// An endpoint of this node that has others beside it: whose proxy picked it does not matter.
    Here(SocketAddr),
    /// A listener of this node that takes no connections.
    Frozen(SocketAddr),
}

impl Alternatives {
    pub fn new(frontend: &Frontend, node: &NodeView) -> Self {
        let mut members = BTreeSet::new();
        if frontend.name.protocol != Protocol::Tcp || frontend.endpoints.len() < 2 {
            return Alternatives(members);
        }
        let here = frontend.endpoints.iter().filter(|endpoint| match &endpoint.node {
            Some(name) => *name == node.place.node,
            None => true,
        });
        members.extend(here.map(|endpoint| Member::Here(endpoint.address)));
        for v6 in [false, true] {
            let scopes = scopes(frontend, node, v6);
            let addresses = crate::stale::addresses(frontend, node).into_iter();
            for address in addresses.filter(|address| address.is_ipv6() == v6) {
                match picks(frontend, &scopes, address) {
                    0 => {}
                    1 => members.extend(scopes.out.iter().map(|out| Member::Out(address, out.address))),
                    _ => drop(members.insert(Member::Alternative(address))),
                }
            }
        }
        Alternatives(members)
    }
}

/// From how many endpoints a packet to this address has its pick, whoever sent it.
fn picks(frontend: &Frontend, scopes: &Scopes<'_>, address: SocketAddr) -> usize {
    let of = |policy| match policy {
        TrafficPolicy::Cluster => scopes.cluster.len(),
        TrafficPolicy::Local => scopes.local.len(),
    };
    if frontend.cluster_ips.contains(&address.ip()) {
        return of(frontend.internal_policy);
    }
    // The cluster's own traffic to an external address may go anywhere.
    of(TrafficPolicy::Cluster).min(of(frontend.external_policy))
}

/// What the sets hold, for whoever looks at flows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Destinations(Arc<RwLock<HashMap<Member, u32>>>);

impl Destinations {
    /// Whether a connection to this address that this endpoint does not answer could go elsewhere.
    pub fn has_alternative(&self, address: SocketAddr, endpoint: SocketAddr) -> bool {
        let held = self.0.read().unwrap_or_else(PoisonError::into_inner);
        held.contains_key(&Member::Alternative(address)) || held.contains_key(&Member::Out(address, endpoint))
    }
}

/// The table in the kernel, or in the fake of it.
pub(crate) struct WatchTable<N> {
    nft: N,
    /// Whether refusals are held back.
    retry: bool,
    /// How many frontends want each element. What an earlier run left is wanted by none.
    held: Destinations,
    /// What the kernel holds is known.
    is_known: bool,
}

impl<N: Nft> WatchTable<N> {
    pub fn new(nft: N, retry: bool) -> Self {
        WatchTable { nft, retry, held: Destinations::default(), is_known: false }
    }

    pub fn destinations(&self) -> Destinations {
        self.held.clone()
    }

    /// Makes the sets follow frontends that changed; with `whole`, `changes` are all frontends there are, and only what they
    /// are counts. An error leaves it open what the kernel holds: the next call has to be whole.
    pub fn commit(
        &mut self,
        whole: bool,
        changes: &[(Alternatives, Alternatives)],
        frozen: &BTreeSet<SocketAddr>,
    ) -> Result<(), Error> {
        let result = self.try_commit(whole, changes, frozen);
        self.is_known = result.is_ok();
        result
    }

    fn try_commit(
        &mut self,
        whole: bool,
        changes: &[(Alternatives, Alternatives)],
        frozen: &BTreeSet<SocketAddr>,
    ) -> Result<(), Error> {
        if !whole && !self.is_known {
            return Err(Error::WatchUnknown);
        }
        let mut before: HashSet<Member> = HashSet::new();
        if !self.is_known {
            before = self.lay()?;
        }
        let mut held = self.held.0.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_known && whole {
            before = held.keys().copied().collect();
        }
        let mut touched: BTreeSet<Member> = BTreeSet::new();
        if whole {
            held.clear();
            for member in changes.iter().flat_map(|(_, after)| &after.0) {
                *held.entry(*member).or_default() += 1;
            }
        } else {
            for (member, more) in changes.iter().flat_map(|(before, after)| {
                let (gone, new) = (before.0.difference(&after.0), after.0.difference(&before.0));
                gone.map(|member| (member, false)).chain(new.map(|member| (member, true)))
            }) {
                if touched.insert(*member) && held.contains_key(member) {
                    before.insert(*member);
                }
                let count = held.entry(*member).or_default();
                *count = if more { *count + 1 } else { count.saturating_sub(1) };
                if *count == 0 {
                    held.remove(member);
                }
            }
            let was_frozen: Vec<Member> =
                held.keys().filter(|member| matches!(member, Member::Frozen(_))).copied().collect();
            for member in was_frozen {
                touched.insert(member);
                before.insert(member);
                held.remove(&member);
            }
        }
        for address in frozen {
            touched.insert(Member::Frozen(*address));
            held.insert(Member::Frozen(*address), 1);
        }
        if whole {
            touched = held.keys().chain(&before).copied().collect();
        }
        let gone: Vec<Member> =
            touched.iter().filter(|member| before.contains(member) && !held.contains_key(member)).copied().collect();
        let new: Vec<Member> =
            touched.iter().filter(|member| !before.contains(member) && held.contains_key(member)).copied().collect();
        drop(held);
        for (members, add) in [(gone, false), (new, true)] {
            for chunk in members.chunks(CHUNK) {
                self.nft.commit(&elements(chunk, add))?;
            }
        }
        Ok(())
    }

    /// Puts the rules in place; the elements that are there already.
    fn lay(&mut self) -> Result<HashSet<Member>, Error> {
        let layout = layout(self.retry);
        let comment = comment(&layout);
        let mut found = HashSet::new();
        if self.nft.table_comment(FAMILY, TABLE)?.as_ref() != Some(&comment) {
            let table = || Op::AddTable { comment: Some(comment.clone()) };
            let mut transaction = Transaction::new(FAMILY, TABLE);
            transaction.ops.extend([table(), Op::DeleteTable, table()]);
            transaction.ops.extend(layout);
            self.nft.commit(&transaction)?;
            return Ok(found);
        }
        for v6 in [false, true] {
            for kind in Kind::ALL {
                let elements = self.nft.elements(FAMILY, TABLE, &kind.set(v6))?;
                found.extend(elements.iter().filter_map(|element| kind.member(&element.key.0)));
            }
        }
        Ok(found)
    }
}

/// Takes the table out; whether it was there.
pub(crate) fn remove(nft: &mut impl Nft) -> Result<bool, Error> {
    if nft.table_comment(FAMILY, TABLE)?.is_none() {
        return Ok(false);
    }
    nft.commit(&Transaction { family: FAMILY, table: TABLE.into(), ops: vec![Op::DeleteTable] })?;
    Ok(true)
}

/// The sets, each once per address family.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// address . protocol . port
    Alternatives,
    /// The same . endpoint's address . port
    Out,
    /// address . port
    Here,
    Frozen,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Alternatives, Kind::Out, Kind::Here, Kind::Frozen];

    fn name(self, v6: bool) -> String {
        let stem = match self {
            Kind::Alternatives => "alternatives",
            Kind::Out => "out",
            Kind::Here => "here",
            Kind::Frozen => "frozen",
        };
        format!("{stem}{}", if v6 { 6 } else { 4 })
    }

    fn set(self, v6: bool) -> Set {
        use DataType::{InetProto, InetService};
        let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let key: &[DataType] = match self {
            Kind::Alternatives => &[ip, InetProto, InetService],
            Kind::Out => &[ip, InetProto, InetService, ip, InetService],
            Kind::Here | Kind::Frozen => &[ip, InetService],
        };
        Set::of(&self.name(v6), key)
    }

    fn member(self, key: &[Datum]) -> Option<Member> {
        match (self, key) {
            (Kind::Alternatives, [ip, _, Datum::Port(port)]) => Some(Member::Alternative(at(ip, *port)?)),
            (Kind::Out, [ip, _, Datum::Port(port), endpoint, Datum::Port(target)]) => {
                Some(Member::Out(at(ip, *port)?, at(endpoint, *target)?))
            }
            (Kind::Here, [ip, Datum::Port(port)]) => Some(Member::Here(at(ip, *port)?)),
            (Kind::Frozen, [ip, Datum::Port(port)]) => Some(Member::Frozen(at(ip, *port)?)),
            _ => None,
        }
    }
}

fn at(ip: &Datum, port: u16) -> Option<SocketAddr> {
    match ip {
        Datum::V4(ip) => Some(SocketAddr::from((*ip, port))),
        Datum::V6(ip) => Some(SocketAddr::from((*ip, port))),
        _ => None,
    }
}

const TCP: Datum = Datum::Proto(6);

fn place(member: &Member) -> (Kind, bool, Key) {
    let pair = |address: &SocketAddr| [Datum::from(address.ip()), Datum::Port(address.port())];
    let triple = |address: &SocketAddr| [Datum::from(address.ip()), TCP, Datum::Port(address.port())];
    match member {
        Member::Alternative(address) => (Kind::Alternatives, address.is_ipv6(), Key::new(triple(address))),
        Member::Out(address, endpoint) => {
            (Kind::Out, address.is_ipv6(), Key::new(triple(address).into_iter().chain(pair(endpoint))))
        }
        Member::Here(address) => (Kind::Here, address.is_ipv6(), Key::new(pair(address))),
        Member::Frozen(address) => (Kind::Frozen, address.is_ipv6(), Key::new(pair(address))),
    }
}

/// Adds or deletes elements.
fn elements(members: &[Member], add: bool) -> Transaction {
    let mut transaction = Transaction::new(FAMILY, TABLE);
    for v6 in [false, true] {
        for kind in Kind::ALL {
            let places = members.iter().map(place).filter(|(of, family, _)| *of == kind && *family == v6);
            let elements: Vec<Element> =
                places.map(|(_, _, key)| Element { key, end: None, data: ElementData::None }).collect();
            let set = kind.name(v6).into();
            if !elements.is_empty() {
                transaction.push(if add {
                    Op::AddElements { set, elements }
                } else {
                    Op::DeleteElements { set, elements }
                });
            }
        }
    }
    transaction
}

/// Says what the table is for, and which version of it this is.
fn comment(layout: &[Op]) -> String {
    let text = Transaction { family: FAMILY, table: TABLE.into(), ops: layout.to_vec() }.to_string();
    let hash: String = Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("Endpoints that do not answer, by fairlead: changes here are lost. Layout {hash}")
}

/// Sets, chains and rules.
fn layout(retry: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    for v6 in [false, true] {
        ops.extend(Kind::ALL.map(|kind| Op::AddSet(kind.set(v6))));
    }
    let chains = chains(retry);
    ops.extend(chains.iter().map(|(chain, _)| Op::AddChain(chain.clone())));
    for (chain, rules) in chains {
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { chain: chain.name.clone(), rule }));
    }
    ops
}

fn of_family(v6: bool) -> Statement {
    Statement::Equal(Value::Nfproto, Datum::Proto(if v6 { 10 } else { 2 }))
}

fn is_protocol(number: u8) -> Statement {
    Statement::Equal(Value::L4Proto, Datum::Proto(number))
}

/// Where the client sent its first packet.
fn original(v6: bool) -> [Value; 3] {
    [Value::OriginalDestinationIp { v6 }, Value::L4Proto, Value::OriginalDestinationPort]
}

fn translated() -> Statement {
    Statement::HasBits(Value::CtStatus, ct_status::DNAT)
}

fn chains(retry: bool) -> Vec<(Chain, Vec<Rule>)> {
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
        let is_out = original(v6).into_iter().chain([Value::SourceIp { v6 }, Value::SourcePort]);
        refused.push(Rule::new([of_family(v6), has_alternative(), goto("held")]));
        refused.push(Rule::new([of_family(v6), Statement::is_in(is_out, &Kind::Out.name(v6)), goto("held")]));
        unreachable.push(Rule::new([of_family(v6), has_alternative(), goto("held")]));
        let frozen = Statement::is_in([Value::DestinationIp { v6 }, Value::DestinationPort], &Kind::Frozen.name(v6));
        begun.push(Rule::new([of_family(v6), is_protocol(6), frozen, goto("frozen")]));
        let wake = || [Statement::Limit { rate: 20, burst: 5 }, Statement::Log { group: BEGUN, bytes: 20 }];
        let alternative = Statement::is_in(original(v6), &Kind::Alternatives.name(v6));
        let statements = [of_family(v6), is_protocol(6), translated(), alternative].into_iter().chain(wake());
        begun.push(Rule::new(statements));
        // What another node picked for its clients.
        let here = Statement::is_in([Value::DestinationIp { v6 }, Value::DestinationPort], &Kind::Here.name(v6));
        let elsewhere = Statement::LacksBits(Value::CtStatus, ct_status::DNAT);
        let statements = [of_family(v6), is_protocol(6), elsewhere, here].into_iter().chain(wake());
        begun.push(Rule::new(statements));
    }
    let frozen = vec![
        Rule::new([translated(), Statement::drop()]),
        // Probes of this node's kubelet have to find out by themselves.
        Rule::new([
            Statement::Equal(Value::FibSourceType, Datum::Mark(ADDRESS_LOCAL)),
            Statement::Verdict(Verdict::Return),
        ]),
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

#[cfg(test)]
mod tests {
    use linux::nft::Fake;

    use super::*;

    fn members(ports: &[u16]) -> Alternatives {
        let address = |port: &u16| Member::Alternative(SocketAddr::from(([10, 96, 0, 10], *port)));
        Alternatives(ports.iter().map(address).collect())
    }

    fn held(table: &mut WatchTable<Fake>) -> Vec<u16> {
        let elements = table.nft.elements(FAMILY, TABLE, &Kind::Alternatives.set(false)).expect("a set");
        elements
            .iter()
            .filter_map(|element| {
                element.key.0.iter().find_map(|datum| match datum {
                    Datum::Port(port) => Some(*port),
                    _ => None,
                })
            })
            .collect()
    }

    #[test]
    fn two_frontends_may_want_the_same_element() {
        let mut table = WatchTable::new(Fake::default(), true);
        let none = BTreeSet::new();
        let nothing = Alternatives::default();
        assert!(table.commit(false, &[], &none).is_err(), "nothing is known yet");
        table
            .commit(true, &[(nothing.clone(), members(&[80, 81])), (nothing.clone(), members(&[80]))], &none)
            .expect("laid");
        assert_eq!(held(&mut table), [80, 81]);
        table.commit(false, &[(members(&[80, 81]), members(&[82]))], &none).expect("changed");
        assert_eq!(held(&mut table), [80, 82]);
        let service = |port: u16| SocketAddr::from(([10, 96, 0, 10], port));
        let destinations = table.destinations();
        assert!(destinations.has_alternative(service(80), service(1)));
        assert!(!destinations.has_alternative(service(81), service(1)));
        table.commit(false, &[(members(&[80]), nothing.clone())], &none).expect("changed");
        assert_eq!(held(&mut table), [82]);
        // One frontend hands an element to another in one commit.
        table
            .commit(false, &[(members(&[82]), nothing.clone()), (nothing.clone(), members(&[82]))], &none)
            .expect("handed over");
        assert_eq!(held(&mut table), [82]);
        // A new start finds what is there, and changes only what differs.
        let mut again = WatchTable::new(table.nft.clone(), true);
        let before = again.nft.changed;
        again.commit(true, &[(nothing.clone(), members(&[82, 83]))], &none).expect("found");
        assert_eq!((held(&mut again), again.nft.changed - before), (vec![82, 83], 1));
        again.commit(true, &[], &none).expect("emptied");
        assert_eq!(held(&mut again), [0; 0]);
    }

    #[test]
    fn frozen_listeners_come_and_go() {
        let mut table = WatchTable::new(Fake::default(), true);
        let pod = SocketAddr::from(([10, 244, 0, 11], 8080));
        let count = |table: &mut WatchTable<Fake>| {
            table.nft.elements(FAMILY, TABLE, &Kind::Frozen.set(false)).expect("a set").len()
        };
        table.commit(true, &[], &BTreeSet::from([pod])).expect("laid");
        assert_eq!(count(&mut table), 1);
        table.commit(false, &[], &BTreeSet::from([pod])).expect("the same");
        assert_eq!(count(&mut table), 1);
        table.commit(false, &[], &BTreeSet::new()).expect("thawed");
        assert_eq!(count(&mut table), 0);
    }

    #[test]
    fn a_failed_commit_is_followed_by_a_whole_one() {
        let mut table = WatchTable::new(Fake::failing(3), true);
        let nothing = Alternatives::default();
        table.commit(true, &[(nothing.clone(), members(&[80]))], &BTreeSet::new()).expect("two commits");
        let change = [(members(&[80]), members(&[81]))];
        assert!(table.commit(false, &change, &BTreeSet::new()).is_err());
        assert!(table.commit(false, &change, &BTreeSet::new()).is_err(), "only a whole one will do");
        table.commit(true, &[(nothing, members(&[81]))], &BTreeSet::new()).expect("whole");
        assert_eq!(held(&mut table), [81]);
    }
}
