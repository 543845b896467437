//! What is there without any Service: sets, the chains that look things up in them, and sysctls.

use std::fmt::{Display, Formatter};

use linux::ipvs::{Op as IpvsOp, Timeouts};
use linux::nft::{
    ADDRESS_LOCAL, Chain, ChainKind, DataType, Datum, Family, Hook, Op, Rule, Set, Statement, Transaction, Value,
    ct_state,
};

use crate::NodeView;
use crate::dataplane::frame::{
    REFUSE, count_rejected, digest, firewall, from_host, masquerade, named, nobodys, refuse, tallies,
};

pub const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-ipvs";

/// The sets and maps, each once per address family. A destination is address . protocol . port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Map {
    /// Destinations that have a virtual server, from before it is made until after it has gone: so a start tells our servers
    /// from somebody else's.
    Served,
    /// Addresses that are on this host only because Services have them: whatever listens on all addresses must not answer
    /// there.
    Bound,
    /// Destinations that the cluster's own clients reach at the cluster IP instead: `externalTrafficPolicy: Local` is not
    /// for them.
    ShortCircuit,
    /// Original destinations of what is masqueraded whoever sent it, if it came from outside, if a process of this node
    /// sent it.
    Masquerade,
    MasqueradeOutside,
    MasqueradeHost,
    /// source . destination of a pod that reached itself
    Hairpin,
    /// Destinations without an endpoint anywhere, without one in their scope, and without one for outside clients.
    Refused,
    Silent,
    SilentOutside,
    /// Load balancer addresses that only some sources may use, and these sources.
    Firewalled,
    Allowed,
}

impl Map {
    pub const ALL: [Map; 12] = [
        Map::Served,
        Map::Bound,
        Map::ShortCircuit,
        Map::Masquerade,
        Map::MasqueradeOutside,
        Map::MasqueradeHost,
        Map::Hairpin,
        Map::Refused,
        Map::Silent,
        Map::SilentOutside,
        Map::Firewalled,
        Map::Allowed,
    ];

    pub fn name(self, v6: bool) -> String {
        let stem = match self {
            Map::Served => "served",
            Map::Bound => "bound",
            Map::ShortCircuit => "short_circuit",
            Map::Masquerade => "masquerade",
            Map::MasqueradeOutside => "masquerade_outside",
            Map::MasqueradeHost => "masquerade_host",
            Map::Hairpin => "hairpin",
            Map::Refused => "refused",
            Map::Silent => "silent",
            Map::SilentOutside => "silent_outside",
            Map::Firewalled => "firewalled",
            Map::Allowed => "allowed",
        };
        named(stem, v6)
    }

    pub fn set(self, v6: bool) -> Set {
        use DataType::{InetProto, InetService};
        let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let destination = [ip, InetProto, InetService];
        let name = &self.name(v6);
        match self {
            Map::Bound => Set::of(name, &[ip]),
            Map::ShortCircuit => Set::map(name, &destination, &[ip, InetService]),
            Map::Hairpin => Set::of(name, &[ip, ip]),
            Map::Allowed => Set::of(name, &[ip, InetProto, InetService, ip]).interval(),
            Map::Served
            | Map::Masquerade
            | Map::MasqueradeOutside
            | Map::MasqueradeHost
            | Map::Refused
            | Map::Silent
            | Map::SilentOutside
            | Map::Firewalled => Set::of(name, &destination),
        }
    }
}

/// Everything but the Services.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    pub sets: Vec<Set>,
    pub chains: Vec<(Chain, Vec<Rule>)>,
    /// The last rules of the chain that looks at first packets: whatever is for a Service's address and for no Service is
    /// turned away. While another mode hands over, its Services are none of ours yet.
    pub closing: Vec<Rule>,
    pub sysctls: Vec<(&'static str, &'static str)>,
    pub timeouts: Timeouts,
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        let sets = [false, true].into_iter().flat_map(|v6| Map::ALL.map(|map| map.set(v6)));
        let sets = sets.chain(tallies()).collect();
        Base {
            sets,
            chains: chains(node),
            closing: closing(node),
            sysctls: sysctls(node),
            timeouts: node.ipvs.timeouts,
        }
    }

    /// Adds the sets and chains; chains before rules, since rules name them.
    pub fn declare(&self, transaction: &mut Transaction) {
        for set in &self.sets {
            transaction.push(Op::AddSet(set.clone()));
        }
        for (chain, _) in &self.chains {
            transaction.push(Op::AddChain(chain.clone()));
        }
    }

    /// All rules.
    pub fn fill(&self, transaction: &mut Transaction) {
        self.open(transaction);
        self.close(transaction);
    }

    /// The rules but for the closing ones.
    pub fn open(&self, transaction: &mut Transaction) {
        for (chain, rules) in &self.chains {
            for rule in rules {
                transaction.push(Op::AddRule { chain: chain.name.clone(), rule: rule.clone() });
            }
        }
    }

    pub fn close(&self, transaction: &mut Transaction) {
        for rule in &self.closing {
            transaction.push(Op::AddRule { chain: CHECK.into(), rule: rule.clone() });
        }
    }

    /// The name of an empty chain that says which layout a table has: sets and chains first, then rules.
    pub fn mark(&self) -> String {
        let mut rules = Transaction::new(FAMILY, TABLE);
        self.fill(&mut rules);
        format!("{}{}_{}", Self::MARK, self.frame(), digest(&rules.to_string()))
    }

    /// The same while the closing rules are missing.
    pub fn opening_mark(&self) -> String {
        let mut rules = Transaction::new(FAMILY, TABLE);
        self.open(&mut rules);
        format!("{}{}_open{}", Self::MARK, self.frame(), digest(&rules.to_string()))
    }

    fn frame(&self) -> String {
        let mut frame = Transaction::new(FAMILY, TABLE);
        self.declare(&mut frame);
        digest(&frame.to_string())
    }

    /// Whether a table with this mark has our sets and chains, whatever its rules.
    pub fn has_frame_of(&self, mark: &str) -> bool {
        let ours = self.mark();
        ours.rsplit_once('_').is_some_and(|(frame, _)| mark.rsplit_once('_').is_some_and(|(held, _)| held == frame))
    }

    pub const MARK: &str = "layout_";
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        self.declare(&mut transaction);
        self.fill(&mut transaction);
        write!(f, "{transaction}")?;
        for (name, value) in &self.sysctls {
            writeln!(f, "sysctl {} = {value}", name.replace('/', "."))?;
        }
        if self.timeouts != Timeouts::default() {
            writeln!(f, "ipvsadm {}", IpvsOp::SetTimeouts(self.timeouts))?;
        }
        Ok(())
    }
}

fn sysctls(node: &NodeView) -> Vec<(&'static str, &'static str)> {
    let mut sysctls = vec![
        ("net/ipv4/ip_forward", "1"),
        // Masquerading needs to see the connections that IPVS translates.
        ("net/ipv4/vs/conntrack", "1"),
        // Packets of a flow whose destination has gone are scheduled anew, and so are clients that persistence ties to a
        // destination of weight 0.
        ("net/ipv4/vs/expire_nodest_conn", "1"),
        ("net/ipv4/vs/expire_quiescent_template", "1"),
    ];
    if node.ipvs.strict_arp {
        sysctls.extend([("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")]);
    }
    sysctls
}

pub fn is_in(key: impl IntoIterator<Item = Value>, map: Map, v6: bool) -> Statement {
    Statement::is_in(key, &map.name(v6))
}

fn to_host() -> Statement {
    Statement::Equal(Value::FibDestinationType, Datum::Mark(ADDRESS_LOCAL))
}

const CHECK: &str = "check";

/// Service addresses answer pings, as those of any host.
pub fn spare_pings() -> [Rule; 2] {
    [1, 58].map(|icmp| Rule::new([Statement::Equal(Value::L4Proto, Datum::Proto(icmp)), Statement::returns()]))
}

fn chains(node: &NodeView) -> Vec<(Chain, Vec<Rule>)> {
    // Regular chains first: others name them.
    let mut chains = vec![refuse()];
    for v6 in [false, true] {
        let pods = || {
            node.pod_cidrs(v6)
                .map(move |cidr| [Statement::of_family(v6), Statement::InNet(Value::SourceIp { v6 }, *cidr)])
        };
        let from_pods =
            || pods().map(|from| Rule::new(from.into_iter().chain([Statement::returns()]))).collect::<Vec<_>>();
        let regular = |stem: &str, rules: Vec<Rule>| (Chain::regular(&named(stem, v6)), rules);
        chains.push(firewall(v6));
        let mut inside_only = from_pods();
        let drop = Rule::new([count_rejected(v6), Statement::drop()]);
        inside_only.extend([Rule::new([from_host(), Statement::returns()]), drop]);
        chains.push(regular("inside_only", inside_only));
        let mut outside = from_pods();
        // Without the pods' network nobody can tell who is outside: then nothing is but the host, whose packets come from
        // the Service's own address otherwise.
        outside.push(match outside.is_empty() {
            true => Rule::new([from_host(), masquerade()]),
            false => Rule::new([masquerade()]),
        });
        chains.push(regular("from_outside", outside));
        let shortcut = || {
            let to = Value::lookup(Value::destination(v6), &Map::ShortCircuit.name(v6));
            [Statement::Choose(to), Statement::Dnat { v6 }]
        };
        let mut inside: Vec<Rule> = pods().map(|from| Rule::new(from.into_iter().chain(shortcut()))).collect();
        inside.push(Rule::new([Statement::of_family(v6), from_host()].into_iter().chain(shortcut())));
        chains.push(regular("short_circuit", inside));
    }
    let base = Chain::base;
    let enter = || {
        let new = Statement::HasBits(Value::CtState, ct_state::NEW);
        vec![Rule::new([new, Statement::jump(CHECK)])]
    };
    let inside = || [false, true].map(|v6| Rule::new([Statement::jump(&named("short_circuit", v6))])).to_vec();
    chains.extend([
        (Chain::regular(CHECK), check()),
        // Before any translation: IPVS looks at packets last thing at input, and early at output.
        (base("check_prerouting", ChainKind::Filter, Hook::Prerouting, -110), enter()),
        (base("check_output", ChainKind::Filter, Hook::Output, -110), enter()),
        (base("prerouting", ChainKind::Nat, Hook::Prerouting, -100), inside()),
        (base("output", ChainKind::Nat, Hook::Output, -100), inside()),
        (base("postrouting", ChainKind::Nat, Hook::Postrouting, 100), postrouting()),
    ]);
    chains
}

/// What becomes of the first packet of a connection before IPVS sees it.
fn check() -> Vec<Rule> {
    let mut rules = spare_pings().to_vec();
    for v6 in [false, true] {
        let rule = |map: Map, then: Statement| {
            Rule::new([Statement::of_family(v6), is_in(Value::destination(v6), map, v6), then])
        };
        let reject = |map: Map, then: Statement| {
            Rule::new([Statement::of_family(v6), is_in(Value::destination(v6), map, v6), count_rejected(v6), then])
        };
        rules.extend([
            rule(Map::Firewalled, Statement::jump(&named("firewall", v6))),
            reject(Map::Refused, Statement::goto(REFUSE)),
            reject(Map::Silent, Statement::drop()),
            rule(Map::SilentOutside, Statement::jump(&named("inside_only", v6))),
            // Until its address is ours, a packet would leave for elsewhere.
            Rule::new([
                Statement::of_family(v6),
                is_in(Value::destination(v6), Map::Served, v6),
                to_host(),
                Statement::returns(),
            ]),
        ]);
    }
    rules
}

fn closing(node: &NodeView) -> Vec<Rule> {
    let bound = |v6| is_in([Value::DestinationIp { v6 }], Map::Bound, v6);
    let mut rules =
        [false, true].map(|v6| Rule::new([Statement::of_family(v6), bound(v6), Statement::goto(REFUSE)])).to_vec();
    rules.extend(nobodys(node));
    rules
}

/// The destination is translated by now; conntrack still knows the original one.
fn postrouting() -> Vec<Rule> {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let itself = is_in([Value::SourceIp { v6 }, Value::DestinationIp { v6 }], Map::Hairpin, v6);
        rules.push(Rule::new([Statement::of_family(v6), itself, masquerade()]));
        let original = || [Value::OriginalDestinationIp { v6 }, Value::L4Proto, Value::OriginalDestinationPort];
        rules.push(Rule::new([Statement::of_family(v6), is_in(original(), Map::Masquerade, v6), masquerade()]));
        let outside = Statement::goto(&named("from_outside", v6));
        rules.push(Rule::new([Statement::of_family(v6), is_in(original(), Map::MasqueradeOutside, v6), outside]));
        rules.push(Rule::new([
            Statement::of_family(v6),
            is_in(original(), Map::MasqueradeHost, v6),
            from_host(),
            masquerade(),
        ]));
    }
    rules
}
