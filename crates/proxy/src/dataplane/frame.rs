//! What the modes' own nftables tables have in common: how one is declared and recognized, and the chains for packets that
//! nobody serves.

use linux::nft::{ADDRESS_LOCAL, Chain, Datum, Op, Reject, Rule, Set, Statement, Transaction, Value};
use sha2::{Digest, Sha256};

use crate::NodeView;

/// Destinations without an endpoint anywhere, and those without one in their scope.
pub const REFUSED: &str = "refused";
pub const SILENT: &str = "silent";
pub const CLUSTER_IPS: &str = "cluster_ips";
/// Load balancer addresses that only some sources may use, and these sources.
pub const FIREWALLED: &str = "firewalled";
pub const ALLOWED: &str = "allowed";

/// The chain that answers with a refusal.
pub const REFUSE: &str = "refuse";

/// The sets and chains of a table, without any element.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    pub sets: Vec<Set>,
    pub chains: Vec<(Chain, Vec<Rule>)>,
}

impl Frame {
    /// Adds the sets and chains. Rules come after them, and so do elements, since both name chains.
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

    /// Replaces the rules in place, so that translated connections live on.
    pub fn refill(&self, transaction: &mut Transaction) {
        for (chain, _) in &self.chains {
            transaction.push(Op::FlushChain(chain.name.clone()));
        }
        self.fill(transaction);
    }
}

/// Twelve digits by which a layout is recognized.
pub fn digest(text: &str) -> String {
    Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a set or chain that there is one of for each family.
pub fn named(stem: &str, v6: bool) -> String {
    format!("{stem}{}", if v6 { '6' } else { '4' })
}

pub fn is_in(key: impl IntoIterator<Item = Value>, set: &str, v6: bool) -> Statement {
    Statement::is_in(key, &named(set, v6))
}

pub fn masquerade() -> Statement {
    Statement::Masquerade { fully_random: true }
}

/// The packet comes from a process of this host.
pub fn from_host() -> Statement {
    Statement::Equal(Value::FibSourceType, Datum::Mark(ADDRESS_LOCAL))
}

/// Refuses as a host does where nobody listens.
pub fn refuse() -> (Chain, Vec<Rule>) {
    let rules = vec![
        Rule::new([Statement::Equal(Value::L4Proto, Datum::Proto(6)), Statement::Reject(Reject::TcpReset)]),
        Rule::new([Statement::Reject(Reject::PortUnreachable)]),
    ];
    (Chain::regular(REFUSE), rules)
}

/// Lets through who may use a load balancer's address.
pub fn firewall(v6: bool) -> (Chain, Vec<Rule>) {
    let source = Value::destination(v6).into_iter().chain([Value::SourceIp { v6 }]);
    let rules = vec![Rule::new([is_in(source, ALLOWED, v6), Statement::returns()]), Rule::new([Statement::drop()])];
    (Chain::regular(&named("firewall", v6)), rules)
}

/// What becomes of packets that still go to an address of a Service after translation.
pub fn unserved(node: &NodeView) -> (Chain, Vec<Rule>) {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let family = || Statement::of_family(v6);
        let destination = || Value::destination(v6);
        rules.push(Rule::new([family(), is_in(destination(), REFUSED, v6), Statement::goto(REFUSE)]));
        rules.push(Rule::new([family(), is_in(destination(), SILENT, v6), Statement::drop()]));
        let undefined_port = is_in([Value::DestinationIp { v6 }], CLUSTER_IPS, v6);
        rules.push(Rule::new([family(), undefined_port, Statement::goto(REFUSE)]));
    }
    rules.extend(nobodys(node));
    (Chain::regular("unserved"), rules)
}

/// Drops what goes to a cluster IP that no Service has, before it loops.
pub fn nobodys(node: &NodeView) -> impl Iterator<Item = Rule> {
    node.service_cidrs.iter().map(|cidr| {
        let v6 = cidr.addr().is_ipv6();
        let to_nobody = Statement::InNet(Value::DestinationIp { v6 }, *cidr);
        Rule::new([Statement::of_family(v6), to_nobody, Statement::drop()])
    })
}
