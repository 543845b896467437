//! What stays in the kernel when another mode takes over: IPVS alone knows the connections that it has made, so virtual
//! servers stay at weight 0, with their addresses, until the last one has ended.
//!
//! New connections do not get here: whatever mode has taken over translates them before. What it does not translate is
//! turned away at addresses that are this host's only because Services have them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use linux::ipvs::{Destination, Ipvs as Kernel, Key as ServerKey, Op};
use linux::nft::{
    self, Chain, ChainKind, Datum, Element, ElementData, Hook, Key, Nft, Rule, Statement, Transaction, Value, ct_state,
};

use super::commit::read;
use super::layout::{FAMILY, Map, TABLE, is_in, spare_pings};
use crate::Error;
use crate::dataplane::frame::{REFUSE, refuse};

/// The layout mark of the table that stays.
pub const MARK: &str = "layout_retired_1";
/// The sets it has.
pub const MAPS: [Map; 2] = [Map::Served, Map::Bound];

/// What is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retired {
    /// There was nothing.
    Nothing,
    /// There is nothing any more.
    Gone,
    /// So many virtual servers with connections. Call again after a while.
    Serving { servers: usize },
}

/// Takes out what nobody uses, and weight from the rest. An address that is in use by a socket of this node stays: the
/// socket could not send any more.
pub fn retire(ipvs: &mut impl Kernel, nft: &mut impl Nft, in_use: &BTreeSet<IpAddr>) -> Result<Retired, Error> {
    let (held, mark) = read(ipvs, nft)?;
    let has_table = nft.table_comment(FAMILY, TABLE)?.is_some();
    if !has_table && ipvs.addresses()?.is_none() {
        return Ok(Retired::Nothing);
    }
    // Before the old table goes: its marks say which servers are ours.
    let all: BTreeSet<ServerKey> = held.servers.keys().copied().collect();
    if mark.as_deref() != Some(MARK) {
        write(nft, &all, &held.addresses)?;
    }
    for (key, server) in &held.servers {
        let open = server.destinations.values().filter(|destination| destination.weight > 0);
        for destination in open {
            ipvs.apply(&Op::SetDestination(*key, Destination { weight: 0, ..destination.clone() }))?;
        }
    }
    // Only now is it sure that none of them gets another connection.
    let mut serving = BTreeSet::new();
    for key in &all {
        let (idle, busy): (Vec<_>, Vec<_>) =
            ipvs.destinations(key)?.into_iter().partition(|(_, connections)| connections.is_idle());
        if busy.is_empty() {
            ipvs.apply(&Op::DeleteService(*key))?;
            continue;
        }
        serving.insert(*key);
        for (destination, _) in idle {
            ipvs.apply(&Op::DeleteDestination(*key, destination.address))?;
        }
    }
    let is_used = |address: &&IpAddr| {
        in_use.contains(*address) || serving.iter().any(|key: &ServerKey| key.address.ip() == **address)
    };
    let (kept, free): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) =
        held.addresses.iter().copied().partition(|address| is_used(&address));
    for address in free {
        ipvs.apply(&Op::Unbind(address))?;
    }
    if serving.is_empty() && kept.is_empty() {
        ipvs.remove_device()?;
        nft.commit(&Transaction { family: FAMILY, table: TABLE.into(), ops: vec![nft::Op::DeleteTable] })?;
        return Ok(Retired::Gone);
    }
    if (serving.len(), kept.len()) != (all.len(), held.addresses.len()) {
        write(nft, &serving, &kept)?;
    }
    Ok(Retired::Serving { servers: serving.len() })
}

/// Makes the table this, at once.
fn write(nft: &mut impl Nft, served: &BTreeSet<ServerKey>, bound: &BTreeSet<IpAddr>) -> Result<(), Error> {
    let mut transaction = Transaction::new(FAMILY, TABLE);
    let table = || nft::Op::AddTable {
        comment: Some("Connections of the ipvs mode that have not ended, by fairlead: changes here are lost".into()),
    };
    transaction.ops.extend([table(), nft::Op::DeleteTable, table()]);
    for (map, v6) in MAPS.into_iter().flat_map(|map| [(map, false), (map, true)]) {
        transaction.push(nft::Op::AddSet(map.set(v6)));
    }
    let chains = [refuse(), (guard(), guarded()), (Chain::regular(MARK), Vec::new())];
    transaction.ops.extend(chains.iter().map(|(chain, _)| nft::Op::AddChain(chain.clone())));
    for (chain, rules) in chains {
        transaction.ops.extend(rules.into_iter().map(|rule| nft::Op::AddRule { chain: chain.name.clone(), rule }));
    }
    let destination = |server: &ServerKey| {
        [server.address.ip().into(), Datum::Proto(server.protocol), Datum::Port(server.address.port())]
    };
    for v6 in [false, true] {
        let served =
            served.iter().filter(|server| server.address.is_ipv6() == v6).map(|server| Key::new(destination(server)));
        let bound = bound.iter().filter(|address| address.is_ipv6() == v6).map(|address| Key::new([(*address).into()]));
        for (map, keys) in [(Map::Served, served.collect::<Vec<_>>()), (Map::Bound, bound.collect())] {
            if keys.is_empty() {
                continue;
            }
            let element = |key| Element { key, end: None, data: ElementData::None };
            let elements = keys.into_iter().map(element).collect();
            transaction.push(nft::Op::AddElements { set: map.name(v6).into(), elements });
        }
    }
    Ok(nft.commit(&transaction)?)
}

/// After every translation of destinations.
fn guard() -> Chain {
    Chain::base("guard", ChainKind::Filter, Hook::Input, 0)
}

fn guarded() -> Vec<Rule> {
    let mut rules = spare_pings().to_vec();
    rules.extend([false, true].map(|v6| {
        let is_new = Statement::HasBits(Value::CtState, ct_state::NEW);
        let is_bound = is_in([Value::DestinationIp { v6 }], Map::Bound, v6);
        Rule::new([is_new, Statement::of_family(v6), is_bound, Statement::goto(REFUSE)])
    }));
    rules
}
