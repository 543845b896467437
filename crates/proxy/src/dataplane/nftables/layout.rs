//! The table without any Service: sets, maps, and the chains that look things up in them.

use std::fmt::{Display, Formatter};

use linux::nft::{
    ADDRESS_LOCAL, Chain, ChainKind, DataType, Datum, Family, Hook, Op, Reject, Rule, Set, Statement, Transaction,
    Value, ct_state, ct_status,
};
use sha2::{Digest, Sha256};

use crate::{NodeView, Pods};

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead";

/// Clients remembered for session affinity, over all Services. A full map means plain picks, not refused packets.
const AFFINITY_SIZE: u32 = 1 << 18;

/// The sets and maps, each once per address family. A number that a rule reads from one map and looks up in another has a
/// zero before it in the second one's keys (see `linux::nft::Value::Lookup`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Map {
    /// address . protocol . port : the number of its class. Not the chain itself: the kernel walks over every element with
    /// a verdict whenever one is added, and here is one for every address.
    Frontends,
    /// 0 . class : the chain that picks an endpoint
    Classes,
    /// address . protocol . port : which list of endpoints
    Ids,
    /// The same for the list of this node's own endpoints, where outside traffic must stay local.
    LocalIds,
    /// 0 . list . slot : endpoint
    Slots,
    /// For Services with affinity: 0 . list . slot : the endpoint's number, and 0 . list . 0 . number : endpoint
    Numbers,
    Endpoints,
    /// 0 . list . client : 0 . the number of its endpoint, filled by packets
    Affinity,
    /// Original destinations of what is masqueraded whoever sent it, if it came from outside, if a process of this node
    /// sent it.
    Masquerade,
    MasqueradeOutside,
    MasqueradeHost,
    /// source . destination of a pod that reached itself
    Hairpin,
    /// Destinations without an endpoint anywhere, and those without one in their scope.
    Refused,
    Silent,
    ClusterIps,
    /// Load balancer addresses that only some sources may use, and these sources.
    Firewalled,
    Allowed,
}

impl Map {
    pub const ALL: [Map; 17] = [
        Map::Frontends,
        Map::Classes,
        Map::Ids,
        Map::LocalIds,
        Map::Slots,
        Map::Numbers,
        Map::Endpoints,
        Map::Affinity,
        Map::Masquerade,
        Map::MasqueradeOutside,
        Map::MasqueradeHost,
        Map::Hairpin,
        Map::Refused,
        Map::Silent,
        Map::ClusterIps,
        Map::Firewalled,
        Map::Allowed,
    ];

    /// Its keys begin with the number of one frontend's list: no other frontend wants its elements.
    pub fn is_own(self) -> bool {
        matches!(self, Map::Slots | Map::Numbers | Map::Endpoints)
    }

    pub fn name(self, v6: bool) -> String {
        let stem = match self {
            Map::Frontends => "frontends",
            Map::Classes => "classes",
            Map::Ids => "ids",
            Map::LocalIds => "local_ids",
            Map::Slots => "slots",
            Map::Numbers => "numbers",
            Map::Endpoints => "endpoints",
            Map::Affinity => "affinity",
            Map::Masquerade => "masquerade",
            Map::MasqueradeOutside => "masquerade_outside",
            Map::MasqueradeHost => "masquerade_host",
            Map::Hairpin => "hairpin",
            Map::Refused => "refused",
            Map::Silent => "silent",
            Map::ClusterIps => "cluster_ips",
            Map::Firewalled => "firewalled",
            Map::Allowed => "allowed",
        };
        format!("{stem}{}", suffix(v6))
    }

    pub fn set(self, v6: bool) -> Set {
        use DataType::{InetProto, InetService, Mark};
        let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let destination = [ip, InetProto, InetService];
        let name = &self.name(v6);
        match self {
            Map::Classes => Set::verdict_map(name, &[Mark, Mark]),
            Map::Masquerade | Map::MasqueradeOutside | Map::MasqueradeHost | Map::Refused | Map::Silent => {
                Set::of(name, &destination)
            }
            Map::Frontends | Map::Ids | Map::LocalIds => Set::map(name, &destination, &[Mark]),
            Map::Slots => Set::map(name, &[Mark, Mark, Mark], &[ip, InetService]),
            Map::Endpoints => Set::map(name, &[Mark, Mark, Mark, Mark], &[ip, InetService]),
            Map::Numbers => Set::map(name, &[Mark, Mark, Mark], &[Mark]),
            Map::Affinity => Set::map(name, &[Mark, Mark, ip], &[Mark, Mark]).dynamic(AFFINITY_SIZE),
            Map::Hairpin => Set::of(name, &[ip, ip]),
            Map::ClusterIps => Set::of(name, &[ip]),
            Map::Firewalled => Set::of(name, &destination),
            Map::Allowed => Set::of(name, &[ip, InetProto, InetService, ip]).interval(),
        }
    }
}

fn suffix(v6: bool) -> char {
    if v6 { '6' } else { '4' }
}

const REFUSE: &str = "refuse";

/// Masquerades what does not come from a pod.
fn masquerade_outside(v6: bool) -> String {
    format!("from_outside{}", suffix(v6))
}

/// `ip daddr . meta l4proto . th dport`
pub fn destination(v6: bool) -> [Value; 3] {
    [Value::DestinationIp { v6 }, Value::L4Proto, Value::DestinationPort]
}

pub fn of_family(v6: bool) -> Statement {
    Statement::Equal(Value::Nfproto, Datum::Proto(if v6 { 10 } else { 2 }))
}

/// The ways to tell that a packet comes from a pod, one of which holds.
pub fn from_pods(pods: &Pods, v6: bool) -> Vec<Statement> {
    match pods {
        Pods::Cidrs(_) => pods.cidrs(v6).map(|cidr| Statement::InNet(Value::SourceIp { v6 }, *cidr)).collect(),
        Pods::Bridge(name) => vec![Statement::CameThrough { name: name.clone(), is_prefix: false }],
        Pods::InterfacePrefix(name) => vec![Statement::CameThrough { name: name.clone(), is_prefix: true }],
    }
}

/// Everything but the Services.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    pub sets: Vec<Set>,
    pub chains: Vec<(Chain, Vec<Rule>)>,
    pub pods: Pods,
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        let sets = [false, true].into_iter().flat_map(|v6| Map::ALL.map(|map| map.set(v6))).collect();
        Base { sets, chains: chains(node), pods: node.pods.clone() }
    }

    /// Adds the sets, chains and rules; chains first, since rules and elements name them.
    pub fn declare(&self, transaction: &mut Transaction) {
        for set in &self.sets {
            transaction.push(Op::AddSet(set.clone()));
        }
        for (chain, _) in &self.chains {
            transaction.push(Op::AddChain(chain.clone()));
        }
    }

    pub fn fill(&self, transaction: &mut Transaction) {
        for (chain, rules) in &self.chains {
            for rule in rules {
                transaction.push(Op::AddRule { chain: chain.name.clone(), rule: rule.clone() });
            }
        }
    }

    /// The name of an empty chain that says which layout a table has: sets first, then rules. The comment of a table
    /// would say it more plainly, but cannot be changed.
    pub fn mark(&self) -> String {
        let sets: String = self.sets.iter().map(|set| set.to_string()).collect();
        format!("{}{}_{}", Self::MARK, digest(&sets), digest(&self.to_string()))
    }

    /// How `mark` starts, for every layout with these sets.
    pub fn mark_of_sets(&self) -> String {
        let mark = self.mark();
        mark.rsplit_once('_').map(|(sets, _)| sets.to_owned()).unwrap_or(mark)
    }

    pub const MARK: &str = "layout_";
}

fn digest(text: &str) -> String {
    // Chains that pick are part of the layout too, but not of its text: their version is.
    let hash = Sha256::digest(format!("1 {text}"));
    hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        self.declare(&mut transaction);
        self.fill(&mut transaction);
        write!(f, "{transaction}")?;
        // One line for each network, so that the picks, which name them too, are part of the text.
        write!(f, "{}", self.pods)
    }
}

fn chains(node: &NodeView) -> Vec<(Chain, Vec<Rule>)> {
    let both = |rule: &dyn Fn(bool) -> Rule| vec![rule(false), rule(true)];
    let new = || Statement::HasBits(Value::CtState, ct_state::NEW);
    let pick = || {
        both(&|v6| {
            let class = Value::lookup(destination(v6), &Map::Frontends.name(v6));
            let class = [Value::Const(Datum::Mark(0)), class];
            Rule::new([of_family(v6), Statement::verdict_map(class, &Map::Classes.name(v6))])
        })
    };
    let check = || vec![Rule::new([new(), Statement::goto("unserved")])];
    let guard = || {
        both(&|v6| {
            let firewall = Statement::goto(&format!("firewall{}", suffix(v6)));
            Rule::new([of_family(v6), new(), is_in(destination(v6), Map::Firewalled, v6), firewall])
        })
    };
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
        let pods = from_pods(&node.pods, v6)
            .into_iter()
            .map(|from| Rule::new([of_family(v6), from, Statement::Verdict(linux::nft::Verdict::Return)]));
        let mut rules: Vec<Rule> = pods.collect();
        // Without the pods' network nobody can tell who is outside: then nothing is.
        if !rules.is_empty() {
            rules.push(Rule::new([masquerade()]));
        }
        chains.push((Chain::regular(&masquerade_outside(v6)), rules));
        let source = destination(v6).into_iter().chain([Value::SourceIp { v6 }]);
        let allowed = Statement::is_in(source, &Map::Allowed.name(v6));
        chains.push((
            Chain::regular(&format!("firewall{}", suffix(v6))),
            vec![Rule::new([allowed, Statement::Verdict(linux::nft::Verdict::Return)]), Rule::new([Statement::drop()])],
        ));
    }
    let base = Chain::base;
    chains.extend([
        (Chain::regular("translated"), translated()),
        (base("guard_prerouting", ChainKind::Filter, Hook::Prerouting, -110), guard()),
        (base("guard_output", ChainKind::Filter, Hook::Output, -110), guard()),
        (base("prerouting", ChainKind::Nat, Hook::Prerouting, -100), pick()),
        (base("output", ChainKind::Nat, Hook::Output, -100), pick()),
        // After translation: what still goes to an address of a Service found no endpoint.
        (base("check_input", ChainKind::Filter, Hook::Input, 0), check()),
        (base("check_forward", ChainKind::Filter, Hook::Forward, 0), check()),
        (base("check_output", ChainKind::Filter, Hook::Output, 0), check()),
        (
            base("postrouting", ChainKind::Nat, Hook::Postrouting, 100),
            vec![Rule::new([Statement::HasBits(Value::CtStatus, ct_status::DNAT), Statement::goto("translated")])],
        ),
    ]);
    chains
}

fn masquerade() -> Statement {
    Statement::Masquerade { fully_random: true }
}

fn is_in(key: impl IntoIterator<Item = Value>, map: Map, v6: bool) -> Statement {
    Statement::is_in(key, &map.name(v6))
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

fn translated() -> Vec<Rule> {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let itself = is_in([Value::SourceIp { v6 }, Value::DestinationIp { v6 }], Map::Hairpin, v6);
        rules.push(Rule::new([of_family(v6), itself, masquerade()]));
        let original = || [Value::OriginalDestinationIp { v6 }, Value::L4Proto, Value::OriginalDestinationPort];
        rules.push(Rule::new([of_family(v6), is_in(original(), Map::Masquerade, v6), masquerade()]));
        let outside = Statement::goto(&masquerade_outside(v6));
        rules.push(Rule::new([of_family(v6), is_in(original(), Map::MasqueradeOutside, v6), outside]));
        let from_host = Statement::Equal(Value::FibSourceType, Datum::Mark(ADDRESS_LOCAL));
        rules.push(Rule::new([of_family(v6), is_in(original(), Map::MasqueradeHost, v6), from_host, masquerade()]));
    }
    rules
}
