//! What the modes' own nftables tables have in common: how one is declared and recognized, and the chains for packets that
//! nobody serves.

use std::net::SocketAddr;

use linux::nft::{
    ADDRESS_LOCAL, Chain, DataType, Datum, Family, Op, Reject, Rule, Set, Socket, Statement, Transaction, Value,
};
use services::Protocol;
use sha2::{Digest, Sha256};

use crate::{Error, NodeView};

/// Destinations without an endpoint anywhere, and those without one in their scope.
pub const REFUSED: &str = "refused";
pub const SILENT: &str = "silent";
pub const CLUSTER_IPS: &str = "cluster_ips";
/// Load balancer addresses that only some sources may use, and these sources.
pub const FIREWALLED: &str = "firewalled";
pub const ALLOWED: &str = "allowed";

/// The chain that answers with a refusal.
pub const REFUSE: &str = "refuse";

/// Addresses of Services that are counted at a time for want of an endpoint, and how long one is remembered.
const REJECTED: u32 = 1 << 16;
const REJECTED_SECONDS: u32 = 3600;

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

/// address . protocol . port of Services, filled by first packets that found no endpoint.
fn rejected(v6: bool) -> Set {
    use DataType::{InetProto, InetService};
    let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
    Set::of(&named("rejected", v6), &[ip, InetProto, InetService]).dynamic(REJECTED)
}

/// The sets that packets fill, of both families.
pub fn tallies() -> [Set; 2] {
    [false, true].map(rejected)
}

/// `None` if the datum is no address.
pub fn at(ip: &Datum, port: u16) -> Option<SocketAddr> {
    match ip {
        Datum::V4(ip) => Some(SocketAddr::from((*ip, port))),
        Datum::V6(ip) => Some(SocketAddr::from((*ip, port))),
        _ => None,
    }
}

/// Counts a packet by where it goes.
pub fn count_rejected(v6: bool) -> Statement {
    let (set, key) = (rejected(v6).name, Value::destination(v6).into());
    Statement::Count { set, key, timeout_seconds: REJECTED_SECONDS }
}

/// First packets that found no endpoint, by the address that they went to, since it was last idle for an hour; none if the
/// table is not there.
pub fn rejections(nft: &mut Socket, family: Family, table: &str) -> Result<Vec<(Protocol, SocketAddr, u64)>, Error> {
    let mut found = Vec::new();
    for set in tallies() {
        let counters = match nft.counters(family, table, &set) {
            Err(error) if error.is_absent() => return Ok(Vec::new()),
            counters => counters?,
        };
        found.extend(counters.iter().filter_map(|(key, count)| match &key.0[..] {
            [ip, Datum::Proto(protocol), Datum::Port(port)] => {
                Some((Protocol::from_number(*protocol)?, at(ip, *port)?, *count))
            }
            _ => None,
        }));
    }
    Ok(found)
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
        let count = || count_rejected(v6);
        rules.push(Rule::new([family(), is_in(destination(), REFUSED, v6), count(), Statement::goto(REFUSE)]));
        rules.push(Rule::new([family(), is_in(destination(), SILENT, v6), count(), Statement::drop()]));
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
