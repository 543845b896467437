//! The table without any pod: sets, maps, and the rules that look things up in them. They never change; elements do.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use linux::nft::{
    ADDRESS_LOCAL, Chain, ChainKind, DataType, Datum, Family, Hook, Op, Rule, Set, Statement, Transaction, Value,
    ct_status,
};

use crate::plan::hash;

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-pods";

const HOST_PORTS: &str = "host_ports";

/// What the sets and maps are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Map {
    /// address of the node . protocol . port : address and port of the pod
    HostPorts,
    /// protocol . port : address and port of the pod, for those that asked for no address of the node
    AnyHostPorts,
    /// source . destination of a pod that reached itself
    Hairpin,
    /// source . destination that pods reach with their own addresses
    Direct,
    /// source . destination of everything else that pods send
    Outside,
}

/// One set or map: each exists once per address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub map: Map,
    pub v6: bool,
}

impl Place {
    pub fn all() -> impl Iterator<Item = Place> {
        const MAPS: [Map; 5] = [Map::HostPorts, Map::AnyHostPorts, Map::Hairpin, Map::Direct, Map::Outside];
        [false, true].into_iter().flat_map(|v6| MAPS.map(|map| Place { map, v6 }))
    }

    pub fn name(self) -> String {
        let stem = match self.map {
            Map::HostPorts => "host_ports",
            Map::AnyHostPorts => "any_host_ports",
            Map::Hairpin => "hairpin",
            Map::Direct => "direct",
            Map::Outside => "outside",
        };
        format!("{stem}{}", if self.v6 { '6' } else { '4' })
    }

    pub fn set(self) -> Set {
        use DataType::{InetProto, InetService};
        let ip = if self.v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let name = &self.name();
        match self.map {
            Map::HostPorts => Set::map(name, &[ip, InetProto, InetService], &[ip, InetService]),
            Map::AnyHostPorts => Set::map(name, &[InetProto, InetService], &[ip, InetService]),
            Map::Hairpin => Set::of(name, &[ip, ip]),
            Map::Direct | Map::Outside => Set::of(name, &[ip, ip]).interval(),
        }
    }
}

/// Makes the whole table, whatever was there under its name, without elements.
pub fn lay() -> Transaction {
    let mut transaction = Transaction::new(FAMILY, TABLE);
    transaction.replace_table("host ports and pods' way out, by fairlead: changes are lost");
    transaction.ops.extend(constant());
    transaction.push(Op::AddChain(Chain::regular(&mark())));
    transaction
}

/// The name of an empty chain that says which layout a table has. The comment of a table would say it more plainly, but
/// cannot be changed.
pub fn mark() -> String {
    let layout = Transaction { ops: constant(), ..Transaction::new(FAMILY, TABLE) };
    format!("layout_{:016x}", hash(&layout.to_string()))
}

fn constant() -> Vec<Op> {
    let mut ops: Vec<Op> = Place::all().map(|place| Op::AddSet(place.set())).collect();
    let chains = chains();
    // All chains before all rules, which name them.
    ops.extend(chains.iter().map(|(chain, _)| Op::AddChain(chain.clone())));
    for (chain, rules) in chains {
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { chain: chain.name.clone(), rule }));
    }
    ops
}

fn chains() -> Vec<(Chain, Vec<Rule>)> {
    let both = |rules: fn(bool) -> Vec<Rule>| [false, true].into_iter().flat_map(rules).collect::<Vec<_>>();
    let to_node = || {
        let is_local = Statement::Equal(Value::FibDestinationType, Datum::Mark(ADDRESS_LOCAL));
        vec![Rule::new([is_local, Statement::goto(HOST_PORTS)])]
    };
    // Chains of type nat see only the first packet of a connection, and no further one once a chain has translated it.
    // So a host port comes before a NodePort of the same number (kube-proxy's and ours are at -100), and what a Service
    // has masqueraded (at 100) does not come to the last chain.
    let base = |name, hook, priority| Chain::base(name, ChainKind::Nat, hook, priority);
    vec![
        (Chain::regular(HOST_PORTS), both(host_ports)),
        (base("prerouting", Hook::Prerouting, -101), to_node()),
        (base("output", Hook::Output, -101), to_node()),
        (base("postrouting", Hook::Postrouting, 101), both(leave)),
    ]
}

/// The packet goes to an address of the node.
fn host_ports(v6: bool) -> Vec<Rule> {
    let loopback = if v6 {
        IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128)
    } else {
        IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8)
    };
    let address = || Value::DestinationIp { v6 };
    let port = || [Value::L4Proto, Value::DestinationPort];
    let translate = |key: Vec<Value>, map| {
        let pod = Statement::Choose(Value::lookup(key, &Place { map, v6 }.name()));
        Rule::new([Statement::of_family(v6), pod, Statement::Dnat { v6 }])
    };
    vec![
        // The kernel does not let packets from loopback addresses out of the node, not even to its own pods.
        Rule::new([Statement::of_family(v6), Statement::InNet(address(), loopback), Statement::returns()]),
        translate([address()].into_iter().chain(port()).collect(), Map::HostPorts),
        translate(port().into(), Map::AnyHostPorts),
    ]
}

/// The packet leaves the node, or goes to a pod on it.
fn leave(v6: bool) -> Vec<Rule> {
    let is_in =
        |map| Statement::is_in([Value::SourceIp { v6 }, Value::DestinationIp { v6 }], &Place { map, v6 }.name());
    let masquerade = || Statement::Masquerade { fully_random: true };
    let is_translated = Statement::HasBits(Value::CtStatus, ct_status::DNAT);
    vec![
        // A pod that sees its own address as the source answers itself, and nobody translates the answer back.
        Rule::new([Statement::of_family(v6), is_translated, is_in(Map::Hairpin), masquerade()]),
        Rule::new([Statement::of_family(v6), is_in(Map::Direct), Statement::returns()]),
        Rule::new([Statement::of_family(v6), is_in(Map::Outside), masquerade()]),
    ]
}
