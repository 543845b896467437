//! The way to the real network, for those who ask for it: one cable from the lab to the machine, and one masquerade rule at
//! each end.
//!
//! ```text
//!   lab namespace ── up-ID ═══ fl-ID ── the machine, which forwards
//!   nodes become the cable's address     the cable's address becomes the machine's
//! ```
//!
//! Translating twice lets any number of clusters have the same ranges: the machine knows nothing but the cable. Pods come
//! as their node, because the pod network masquerades what leaves the cluster.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::link::{Address, Item, Links, Mac, Route, Veth};
use linux::netns::Netns;
use linux::nft::{Chain, ChainKind, Family, Hook, Nft, Op, Rule, Socket, Statement, Transaction, Value};

use crate::LabError;

/// Where cables get their addresses: the range for carriers, which neither a home nor an office uses.
const CABLES: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 0);
/// A range of a cable is a /30, and there are so many in 100.64.0.0/10.
const RANGES: u32 = 1 << 20;
/// How many ranges are tried if some are taken.
const TRIES: u32 = 16;
const CABLES_V6: [u16; 2] = [0xfdfa, 0x1ead];

const TABLE_IN_LAB: &str = "fairlead-uplink";

/// The two ends of a cable in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ends {
    lab: IpNet,
    host: IpNet,
}

impl Ends {
    fn v4(id: u32, attempt: u32) -> Self {
        let range = u32::from(CABLES) + (id.wrapping_add(attempt) % RANGES) * 4;
        let end = |n: u32| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(range + n), 30));
        Ends { lab: end(2), host: end(1) }
    }

    fn v6(id: u32) -> Self {
        let [a, b] = CABLES_V6;
        let end = |n: u16| {
            let address = Ipv6Addr::new(a, b, (id >> 16) as u16, id as u16, 0, 0, 0, n);
            IpNet::V6(Ipv6Net::new_assert(address, 126))
        };
        Ends { lab: end(2), host: end(1) }
    }
}

/// Connects the lab with the machine, or completes what is there. IPv6 is connected if the machine forwards it.
pub(crate) fn connect(
    id: &str,
    lab: &Netns,
    host: &Netns,
    node_cidrs: &[IpNet],
    inside: &[IpNet],
) -> Result<(), LabError> {
    let forwards = |name: &str| Ok::<bool, LabError>(host.read_sysctl(name)?.as_deref() == Some("1"));
    if !forwards("net/ipv4/ip_forward")? {
        return Err(LabError::NoForwarding);
    }
    let has_ipv6 = node_cidrs.iter().any(|cidr| cidr.addr().is_ipv6()) && forwards("net/ipv6/conf/all/forwarding")?;
    let number = u32::from_str_radix(id, 16).unwrap_or_default();
    let there = Links::open(host)?;
    let mut ends = vec![free(&there, id, number)?];
    if has_ipv6 {
        ends.push(Ends::v6(number));
    }

    let (name, peer) = (in_lab(id), on_host(id));
    let veth = Veth {
        name: name.clone(),
        peer: peer.clone(),
        peer_netns: host.clone(),
        peer_mac: Some(Mac::of(ends[0].host.addr())),
        mtu: None,
    };
    let mut items = vec![Item::Veth(veth), Item::Up(name.clone())];
    for end in &ends {
        items.push(Item::Address(Address { link: name.clone(), address: end.lab }));
    }
    let mut of_host = vec![Item::Up(peer.clone())];
    of_host.extend(ends.iter().map(|end| Item::Address(Address { link: peer.clone(), address: end.host })));
    // The cable first: `disconnect` looks for it to know whether there is a table.
    let here = Links::open(lab)?;
    here.ensure_all(&items)?;
    there.ensure_all(&of_host)?;
    let routes: Vec<Item> =
        ends.iter().map(|end| Item::Route(Route::default_via(end.host.addr()).link(&name))).collect();
    here.ensure_all(&routes)?;

    let leaving: Vec<Rule> = node_cidrs.iter().map(|cidr| masquerade(*cidr, inside)).collect();
    lay(lab, TABLE_IN_LAB, "nodes' way out, by fairlead --uplink", leaving)?;
    let onward = ends.iter().map(|end| masquerade(end.lab.trunc(), &[end.lab.trunc()])).collect();
    lay(host, &on_host_table(id), "a cluster's way out, by fairlead --uplink", onward)
}

/// Takes the cable and the rule away from the machine. Absent is fine.
pub(crate) fn disconnect(id: &str, host: &Netns) -> Result<(), LabError> {
    let links = Links::open(host)?;
    if links.link(&on_host(id))?.is_none() {
        return Ok(());
    }
    let table = on_host_table(id);
    host.run(|| Socket::open(None).and_then(|mut socket| socket.remove_table(Family::Inet, &table)))??;
    Ok(links.remove_link(&on_host(id))?)
}

fn in_lab(id: &str) -> String {
    format!("up-{id}")
}

fn on_host(id: &str) -> String {
    format!("fl-{id}")
}

fn on_host_table(id: &str) -> String {
    format!("fairlead-{id}")
}

/// The range that this cluster has, or the first that nobody routes.
fn free(links: &Links, id: &str, number: u32) -> Result<Ends, LabError> {
    let held = links.addresses()?;
    let routes = links.routes()?;
    let mine = on_host(id);
    for attempt in 0..TRIES {
        let ends = Ends::v4(number, attempt);
        if held.iter().any(|held| held.link == mine && held.address == ends.host) {
            return Ok(ends);
        }
        let range = ends.host.trunc();
        let overlaps = |other: &IpNet| other.contains(&range) || range.contains(other);
        // A default route leads everywhere and claims nothing.
        let is_taken = routes.iter().any(|route| route.to.prefix_len() > 0 && overlaps(&route.to))
            || held.iter().any(|held| overlaps(&held.address.trunc()));
        if !is_taken {
            return Ok(ends);
        }
    }
    Err(LabError::NoRange { first: Ends::v4(number, 0).host.trunc() })
}

/// What comes from the range and leaves for none of these gets the address of the link it leaves by.
fn masquerade(from: IpNet, not_to: &[IpNet]) -> Rule {
    let v6 = from.addr().is_ipv6();
    let family = Statement::of_family(v6);
    let mut statements = vec![family, Statement::InNet(Value::SourceIp { v6 }, from)];
    for range in not_to.iter().filter(|range| range.addr().is_ipv6() == v6) {
        statements.push(Statement::NotInNet(Value::DestinationIp { v6 }, *range));
    }
    statements.push(Statement::Masquerade { fully_random: false });
    Rule::new(statements)
}

fn lay(namespace: &Netns, table: &str, comment: &str, rules: Vec<Rule>) -> Result<(), LabError> {
    let mut transaction = Transaction::new(Family::Inet, table);
    transaction.replace_table(comment);
    transaction.push(Op::AddChain(Chain::base("postrouting", ChainKind::Nat, Hook::Postrouting, 100)));
    transaction.ops.extend(rules.into_iter().map(|rule| Op::AddRule { chain: "postrouting".into(), rule }));
    commit(namespace, &transaction)
}

fn commit(namespace: &Netns, transaction: &Transaction) -> Result<(), LabError> {
    let done = namespace.run(|| Socket::open(None).and_then(|mut socket| socket.commit(transaction)))?;
    Ok(done?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cables_of_two_clusters_differ() {
        let ends = Ends::v4(0x0000_0001, 0);
        assert_eq!((ends.host.to_string(), ends.lab.to_string()), ("100.64.0.5/30".into(), "100.64.0.6/30".into()));
        assert_ne!(Ends::v4(1, 0), Ends::v4(2, 0));
        assert_eq!(Ends::v4(0xffff_ffff, 1).host.to_string(), "100.64.0.1/30");
        assert_eq!(Ends::v6(0x0102_0304).lab.to_string(), "fdfa:1ead:102:304::2/126");
    }
}
