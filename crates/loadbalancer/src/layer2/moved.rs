//! Connections that were made while another node had an address go on: their packets are handed to that node, which knows
//! where they belong, for as long as it may take them to end.
//!
//! What is known here, and what begins a connection, is served here. Only TCP tells the one from the other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use linux::nft::{
    Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Nft, Op, Rule, Set, Socket, Statement,
    TCP_SYN, Transaction, Value, ct_state,
};
use tracing::{debug, info, warn};

use crate::elect::MEMORY;

const TABLE: &str = "fairlead-moved";
/// From an address of a load balancer to the node that had it.
const BEFORE: &str = "before";
const MOST: u32 = 1 << 16;
/// Behind connection tracking, and before anybody translates (`mangle`).
const PRIORITY: i32 = -150;
const TCP: u8 = 6;

pub(super) struct Moved {
    /// The kernel can do it.
    is_on: bool,
    /// Who had an address before, and until when its connections go on there.
    before: BTreeMap<IpAddr, (IpAddr, Duration)>,
}

impl Moved {
    /// Adds its tables, one of each family, as a copy of a packet is routed by its own.
    pub fn open(nft: &mut Socket) -> Moved {
        let added = [false, true].into_iter().try_for_each(|v6| nft.commit(&table(v6)));
        if let Err(error) = &added {
            warn!(%error, "connections end when their address moves; this needs nftables' dup (CONFIG_NFT_DUP_IPV4 and 6)");
        }
        Moved { is_on: added.is_ok(), before: BTreeMap::new() }
    }

    /// Of addresses that are no longer here nothing is handed on; of those that have come, from whom they did.
    pub fn change(&mut self, nft: &mut Socket, lost: &BTreeSet<IpAddr>, from: BTreeMap<IpAddr, IpAddr>, now: Duration) {
        let had = self.before.clone();
        self.before.retain(|address, (_, until)| !lost.contains(address) && *until > now);
        for (address, node) in from {
            info!(%address, %node, "old connections go on where they were");
            self.before.insert(address, (node, now + MEMORY));
        }
        if self.before == had || !self.is_on {
            return;
        }
        for v6 in [false, true] {
            let mut transaction = Transaction::new(family(v6), TABLE);
            transaction.push(Op::FlushSet(BEFORE.into()));
            let mut by_end: BTreeMap<Duration, Vec<Element>> = BTreeMap::new();
            for (address, (node, until)) in self.before.iter().filter(|(address, _)| address.is_ipv6() == v6) {
                let key = |address: IpAddr| Key::new([Datum::from(address)]);
                let element = Element { key: key(*address), end: None, data: ElementData::Value(key(*node)) };
                by_end.entry(*until).or_default().push(element);
            }
            for (until, elements) in by_end {
                let milliseconds = until.saturating_sub(now).as_millis().max(1) as u64;
                transaction.push(Op::AddFor { set: BEFORE.into(), elements, milliseconds });
            }
            if let Err(error) = nft.commit(&transaction) {
                warn!(%error, "connections of addresses that moved here are not handed on");
            }
        }
    }

    pub fn close(&self, nft: &mut Socket) {
        for v6 in [false, true] {
            if let Err(error) = nft.remove_table(family(v6), TABLE) {
                debug!(%error, "the table of moved connections stays");
            }
        }
    }
}

fn family(v6: bool) -> Family {
    if v6 { Family::Ip6 } else { Family::Ip }
}

fn table(v6: bool) -> Transaction {
    let mut transaction = Transaction::new(family(v6), TABLE);
    transaction.replace_table("connections to addresses that have moved here");
    let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
    transaction.push(Op::AddSet(Set::map(BEFORE, &[ip], &[ip]).dynamic(MOST)));
    let chain = "prerouting";
    transaction.push(Op::AddChain(Chain::base(chain, ChainKind::Filter, Hook::Prerouting, PRIORITY)));
    transaction.push(Op::AddRule {
        chain: chain.into(),
        rule: Rule::new([
            Statement::Equal(Value::L4Proto, Datum::Proto(TCP)),
            // In the middle of a connection that this node has seen nothing of.
            Statement::HasBits(Value::CtState, ct_state::NEW),
            Statement::LacksBits(Value::TcpFlags, TCP_SYN),
            Statement::Duplicate { to: Value::lookup([Value::DestinationIp { v6 }], BEFORE) },
            Statement::drop(),
        ]),
    });
    transaction
}
