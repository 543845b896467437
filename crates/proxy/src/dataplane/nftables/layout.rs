//! The table without any Service: sets, maps, and the chains that look things up in them.

use std::fmt::{Display, Formatter};

use linux::nft::{
    Chain, ChainKind, DataType, Datum, Family, Hook, Rule, Set, Statement, Transaction, Value, ct_state, ct_status,
};

use crate::dataplane::frame::{self, Frame, from_host, is_in, masquerade, named};
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
            Map::Refused => frame::REFUSED,
            Map::Silent => frame::SILENT,
            Map::ClusterIps => frame::CLUSTER_IPS,
            Map::Firewalled => frame::FIREWALLED,
            Map::Allowed => frame::ALLOWED,
        };
        named(stem, v6)
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

/// Masquerades what does not come from a pod.
fn masquerade_outside(v6: bool) -> String {
    named("from_outside", v6)
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
    pub frame: Frame,
    pub pods: Pods,
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        let sets = [false, true].into_iter().flat_map(|v6| Map::ALL.map(|map| map.set(v6)));
        let sets = sets.chain(frame::tallies()).collect();
        Base { frame: Frame { sets, chains: chains(node) }, pods: node.pods.clone() }
    }

    /// The name of an empty chain that says which layout a table has: sets first, then rules. The comment of a table
    /// would say it more plainly, but cannot be changed.
    pub fn mark(&self) -> String {
        let sets: String = self.frame.sets.iter().map(|set| set.to_string()).collect();
        // Chains that pick are part of the layout too, but not of its text: their version is.
        let digest = |text: &str| frame::digest(&format!("2 {text}"));
        format!("{}{}_{}", Self::MARK, digest(&sets), digest(&self.to_string()))
    }

    /// How `mark` starts, for every layout with these sets.
    pub fn mark_of_sets(&self) -> String {
        let mark = self.mark();
        mark.rsplit_once('_').map(|(sets, _)| sets.to_owned()).unwrap_or(mark)
    }

    pub const MARK: &str = "layout_";
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        self.frame.declare(&mut transaction);
        self.frame.fill(&mut transaction);
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
            let class = Value::lookup(Value::destination(v6), &Map::Frontends.name(v6));
            let class = [Value::Const(Datum::Mark(0)), class];
            Rule::new([Statement::of_family(v6), Statement::verdict_map(class, &Map::Classes.name(v6))])
        })
    };
    let check = || vec![Rule::new([new(), Statement::goto("unserved")])];
    let guard = || {
        both(&|v6| {
            let firewall = Statement::goto(&named("firewall", v6));
            Rule::new([Statement::of_family(v6), new(), is_in(Value::destination(v6), frame::FIREWALLED, v6), firewall])
        })
    };
    // Regular chains first: base chains name them.
    let mut chains = vec![frame::refuse(), frame::unserved(node)];
    for v6 in [false, true] {
        let pods = from_pods(&node.pods, v6)
            .into_iter()
            .map(|from| Rule::new([Statement::of_family(v6), from, Statement::returns()]));
        let mut rules: Vec<Rule> = pods.collect();
        // Without the pods' network nobody can tell who is outside: then nothing is.
        if !rules.is_empty() {
            rules.push(Rule::new([masquerade()]));
        }
        chains.push((Chain::regular(&masquerade_outside(v6)), rules));
        chains.push(frame::firewall(v6));
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

fn translated() -> Vec<Rule> {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let itself = [Value::SourceIp { v6 }, Value::DestinationIp { v6 }];
        let itself = Statement::is_in(itself, &Map::Hairpin.name(v6));
        rules.push(Rule::new([Statement::of_family(v6), itself, masquerade()]));
        let masquerades = |map: Map| Statement::is_in(Value::original_destination(v6), &map.name(v6));
        rules.push(Rule::new([Statement::of_family(v6), masquerades(Map::Masquerade), masquerade()]));
        let outside = Statement::goto(&masquerade_outside(v6));
        rules.push(Rule::new([Statement::of_family(v6), masquerades(Map::MasqueradeOutside), outside]));
        rules.push(Rule::new([Statement::of_family(v6), masquerades(Map::MasqueradeHost), from_host(), masquerade()]));
    }
    rules
}
