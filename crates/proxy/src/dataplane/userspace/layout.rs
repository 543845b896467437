//! The table of the userspace mode without any Service: maps and sets, and the chains that look things up in them.

use std::fmt::{Display, Formatter};
use std::net::IpAddr;

use ipnet::IpNet;
use linux::nft::{
    ADDRESS_LOCAL, Chain, ChainKind, DataType, Datum, Family, Hook, Op, Reject, Rule, Set, Statement, Transaction,
    Value, Verdict, ct_state, ct_status,
};
use sha2::{Digest, Sha256};

use crate::NodeView;

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-userspace";

/// The sets and maps, each once per address family. A destination is address . protocol . port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Map {
    /// destination : address . port of the relay
    Redirect,
    /// Where relays listen: whoever comes there directly is refused, or source ranges would guard nothing.
    Relays,
    /// Destinations without an endpoint anywhere, and those without one in their scope.
    Refused,
    Silent,
    /// Destinations that have endpoints for the cluster's own traffic, but none for the outside's.
    InsideOnly,
    ClusterIps,
    /// Load balancer addresses that only some sources may use, and these sources.
    Firewalled,
    Allowed,
}

impl Map {
    pub const ALL: [Map; 8] = [
        Map::Redirect,
        Map::Relays,
        Map::Refused,
        Map::Silent,
        Map::InsideOnly,
        Map::ClusterIps,
        Map::Firewalled,
        Map::Allowed,
    ];

    pub fn name(self, v6: bool) -> String {
        let stem = match self {
            Map::Redirect => "redirect",
            Map::Relays => "relays",
            Map::Refused => "refused",
            Map::Silent => "silent",
            Map::InsideOnly => "inside_only",
            Map::ClusterIps => "cluster_ips",
            Map::Firewalled => "firewalled",
            Map::Allowed => "allowed",
        };
        format!("{stem}{}", suffix(v6))
    }

    pub fn set(self, v6: bool) -> Set {
        use DataType::{InetProto, InetService};
        let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let destination = [ip, InetProto, InetService];
        let name = &self.name(v6);
        match self {
            Map::Redirect => Set::map(name, &destination, &[ip, InetService]),
            Map::Relays | Map::Refused | Map::Silent | Map::InsideOnly | Map::Firewalled => Set::of(name, &destination),
            Map::ClusterIps => Set::of(name, &[ip]),
            Map::Allowed => Set::of(name, &[ip, InetProto, InetService, ip]).interval(),
        }
    }
}

fn suffix(v6: bool) -> char {
    if v6 { '6' } else { '4' }
}

/// `ip daddr . meta l4proto . th dport`
fn destination(v6: bool) -> [Value; 3] {
    [Value::DestinationIp { v6 }, Value::L4Proto, Value::DestinationPort]
}

fn of_family(v6: bool) -> Statement {
    Statement::Equal(Value::Nfproto, Datum::Proto(if v6 { 10 } else { 2 }))
}

fn is_in(key: impl IntoIterator<Item = Value>, map: Map, v6: bool) -> Statement {
    Statement::is_in(key, &map.name(v6))
}

const REFUSE: &str = "refuse";

/// Everything but the Services.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    pub sets: Vec<Set>,
    pub chains: Vec<(Chain, Vec<Rule>)>,
    /// Whose traffic is the cluster's own: pods, and this node.
    pub inside: Vec<IpNet>,
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        let sets = [false, true].into_iter().flat_map(|v6| Map::ALL.map(|map| map.set(v6))).collect();
        let own = node.addresses.iter().map(|address| IpNet::from(*address));
        let pods = [false, true].into_iter().flat_map(|v6| node.pod_cidrs(v6));
        Base { sets, chains: chains(node), inside: pods.copied().chain(own).collect() }
    }

    pub fn declare(&self, transaction: &mut Transaction) {
        for set in &self.sets {
            transaction.push(Op::AddSet(set.clone()));
        }
        // Chains first: rules name them.
        for (chain, _) in &self.chains {
            transaction.push(Op::AddChain(chain.clone()));
        }
        for (chain, rules) in &self.chains {
            for rule in rules {
                transaction.push(Op::AddRule { chain: chain.name.clone(), rule: rule.clone() });
            }
        }
    }

    /// The table's comment, which says which layout it has: another one is laid anew.
    pub fn comment(&self) -> String {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        self.declare(&mut transaction);
        let hash = Sha256::digest(transaction.to_string());
        let digest: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("Services, by fairlead: changes here are lost. Layout {digest}")
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        self.declare(&mut transaction);
        write!(f, "{transaction}")?;
        for net in &self.inside {
            writeln!(f, "# {net} is inside")?;
        }
        Ok(())
    }
}

fn chains(node: &NodeView) -> Vec<(Chain, Vec<Rule>)> {
    let both = |rule: &dyn Fn(bool) -> Rule| vec![rule(false), rule(true)];
    let new = || Statement::HasBits(Value::CtState, ct_state::NEW);
    let redirect = || {
        both(&|v6| {
            let relay = Value::lookup(destination(v6), &Map::Redirect.name(v6));
            Rule::new([of_family(v6), Statement::Choose(relay), Statement::Dnat { v6 }])
        })
    };
    let check = || vec![Rule::new([new(), Statement::goto("unserved")])];
    let guard = || {
        let mut rules = both(&|v6| {
            let firewall = Statement::goto(&format!("firewall{}", suffix(v6)));
            Rule::new([of_family(v6), new(), is_in(destination(v6), Map::Firewalled, v6), firewall])
        });
        rules.extend(both(&|v6| {
            let outside = Statement::goto(&format!("drop_outside{}", suffix(v6)));
            Rule::new([of_family(v6), new(), is_in(destination(v6), Map::InsideOnly, v6), outside])
        }));
        rules
    };
    let return_ = || Statement::Verdict(Verdict::Return);
    let mut chains = vec![
        // Regular chains first: base chains name them.
        (
            Chain::regular(REFUSE),
            vec![
                Rule::new([Statement::Equal(Value::L4Proto, Datum::Proto(6)), Statement::Reject(Reject::TcpReset)]),
                Rule::new([Statement::Reject(Reject::PortUnreachable)]),
            ],
        ),
        (Chain::regular("unserved"), unserved(node)),
    ];
    for v6 in [false, true] {
        let source = destination(v6).into_iter().chain([Value::SourceIp { v6 }]);
        let allowed = is_in(source, Map::Allowed, v6);
        chains.push((
            Chain::regular(&format!("firewall{}", suffix(v6))),
            vec![Rule::new([allowed, return_()]), Rule::new([Statement::drop()])],
        ));
        let pods = node
            .pod_cidrs(v6)
            .map(|cidr| Rule::new([of_family(v6), Statement::InNet(Value::SourceIp { v6 }, *cidr), return_()]));
        let mut rules: Vec<Rule> = pods.collect();
        let own = Statement::Equal(Value::FibSourceType, Datum::Mark(ADDRESS_LOCAL));
        rules.extend([Rule::new([own, return_()]), Rule::new([Statement::drop()])]);
        chains.push((Chain::regular(&format!("drop_outside{}", suffix(v6))), rules));
    }
    let base = Chain::base;
    // `unserved` comes back here, for the rules after it.
    let mut input = vec![
        Rule::new([new(), Statement::Verdict(Verdict::Jump("unserved".into()))]),
        Rule::new([Statement::HasBits(Value::CtStatus, ct_status::DNAT), return_()]),
    ];
    input.extend(both(&|v6| {
        Rule::new([of_family(v6), new(), is_in(destination(v6), Map::Relays, v6), Statement::goto(REFUSE)])
    }));
    chains.extend([
        (base("guard_prerouting", ChainKind::Filter, Hook::Prerouting, -110), guard()),
        (base("guard_output", ChainKind::Filter, Hook::Output, -110), guard()),
        (base("prerouting", ChainKind::Nat, Hook::Prerouting, -100), redirect()),
        (base("output", ChainKind::Nat, Hook::Output, -100), redirect()),
        // After translation: what still goes to an address of a Service found no relay.
        (base("check_input", ChainKind::Filter, Hook::Input, 0), input),
        (base("check_forward", ChainKind::Filter, Hook::Forward, 0), check()),
        (base("check_output", ChainKind::Filter, Hook::Output, 0), check()),
    ]);
    chains
}

fn unserved(node: &NodeView) -> Vec<Rule> {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let address = || Value::DestinationIp { v6 };
        rules.push(Rule::new([of_family(v6), is_in(destination(v6), Map::Refused, v6), Statement::goto(REFUSE)]));
        rules.push(Rule::new([of_family(v6), is_in(destination(v6), Map::Silent, v6), Statement::drop()]));
        let undefined_port = is_in([address()], Map::ClusterIps, v6);
        rules.push(Rule::new([of_family(v6), undefined_port, Statement::goto(REFUSE)]));
    }
    for cidr in &node.service_cidrs {
        let v6 = cidr.addr().is_ipv6();
        let nobodys = Statement::InNet(Value::DestinationIp { v6 }, *cidr);
        rules.push(Rule::new([of_family(v6), nobodys, Statement::drop()]));
    }
    rules
}

/// Where this node's relays listen in this family.
pub fn relay_address(node: &NodeView, v6: bool) -> Option<IpAddr> {
    node.addresses.iter().find(|address| address.is_ipv6() == v6).copied()
}
