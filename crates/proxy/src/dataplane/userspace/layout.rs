//! The table of the userspace mode without any Service: maps and sets, and the chains that look things up in them.

use std::fmt::{Display, Formatter};
use std::net::IpAddr;

use ipnet::IpNet;
use linux::nft::{
    Chain, ChainKind, DataType, Family, Hook, Rule, Set, Statement, Transaction, Value, ct_state, ct_status,
};

use crate::NodeView;
use crate::dataplane::frame::{self, Frame, from_host, is_in, named};

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
            Map::Refused => frame::REFUSED,
            Map::Silent => frame::SILENT,
            Map::InsideOnly => "inside_only",
            Map::ClusterIps => frame::CLUSTER_IPS,
            Map::Firewalled => frame::FIREWALLED,
            Map::Allowed => frame::ALLOWED,
        };
        named(stem, v6)
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

/// Everything but the Services.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    pub frame: Frame,
    /// Whose traffic is the cluster's own: pods, and this node.
    pub inside: Vec<IpNet>,
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        let sets = [false, true].into_iter().flat_map(|v6| Map::ALL.map(|map| map.set(v6)));
        let sets = sets.chain(frame::tallies()).collect();
        let own = node.addresses.iter().map(|address| IpNet::from(*address));
        let pods = [false, true].into_iter().flat_map(|v6| node.pod_cidrs(v6));
        Base { frame: Frame { sets, chains: chains(node) }, inside: pods.copied().chain(own).collect() }
    }

    /// The table's comment, which says which layout it has: another one is laid anew.
    pub fn comment(&self) -> String {
        format!("Services, by fairlead: changes here are lost. Layout {}", frame::digest(&self.table().to_string()))
    }

    fn table(&self) -> Transaction {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        self.frame.declare(&mut transaction);
        self.frame.fill(&mut transaction);
        transaction
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.table())?;
        self.inside.iter().try_for_each(|net| writeln!(f, "# {net} is inside"))
    }
}

fn chains(node: &NodeView) -> Vec<(Chain, Vec<Rule>)> {
    let both = |rule: &dyn Fn(bool) -> Rule| vec![rule(false), rule(true)];
    let new = || Statement::HasBits(Value::CtState, ct_state::NEW);
    let redirect = || {
        both(&|v6| {
            let relay = Value::lookup(Value::destination(v6), &Map::Redirect.name(v6));
            Rule::new([Statement::of_family(v6), Statement::Choose(relay), Statement::Dnat { v6 }])
        })
    };
    let check = || vec![Rule::new([new(), Statement::goto("unserved")])];
    let guard = || {
        let mut rules = both(&|v6| {
            let firewall = Statement::goto(&named("firewall", v6));
            Rule::new([Statement::of_family(v6), new(), is_in(Value::destination(v6), frame::FIREWALLED, v6), firewall])
        });
        rules.extend(both(&|v6| {
            let outside = Statement::goto(&named("drop_outside", v6));
            Rule::new([
                Statement::of_family(v6),
                new(),
                Statement::is_in(Value::destination(v6), &Map::InsideOnly.name(v6)),
                outside,
            ])
        }));
        rules
    };
    // Regular chains first: base chains name them.
    let mut chains = vec![frame::refuse(), frame::unserved(node)];
    for v6 in [false, true] {
        chains.push(frame::firewall(v6));
        let pods = node.pod_cidrs(v6).map(|cidr| {
            Rule::new([Statement::of_family(v6), Statement::InNet(Value::SourceIp { v6 }, *cidr), Statement::returns()])
        });
        let mut rules: Vec<Rule> = pods.collect();
        let drop = Rule::new([frame::count_rejected(v6), Statement::drop()]);
        rules.extend([Rule::new([from_host(), Statement::returns()]), drop]);
        chains.push((Chain::regular(&named("drop_outside", v6)), rules));
    }
    let base = Chain::base;
    // `unserved` comes back here, for the rules after it.
    let mut input = vec![
        Rule::new([new(), Statement::jump("unserved")]),
        Rule::new([Statement::HasBits(Value::CtStatus, ct_status::DNAT), Statement::returns()]),
    ];
    input.extend(both(&|v6| {
        Rule::new([
            Statement::of_family(v6),
            new(),
            Statement::is_in(Value::destination(v6), &Map::Relays.name(v6)),
            Statement::goto(frame::REFUSE),
        ])
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

/// Where this node's relays listen in this family.
pub fn relay_address(node: &NodeView, v6: bool) -> Option<IpAddr> {
    node.addresses.iter().find(|address| address.is_ipv6() == v6).copied()
}
