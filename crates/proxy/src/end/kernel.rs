//! Ends connections in the kernel.
//!
//! TCP: packets of a connection that is over are answered with a reset, by rules of a table of our own that exists only
//! meanwhile and holds one element a connection; clients that are silent are provoked into saying something. Other protocols
//! have no reset: their flows are forgotten, so that the next packet goes to another endpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use linux::connections::{Connection, Connections};
use linux::conntrack::{self, Conntrack, Translator};
use linux::nft::{
    Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Nft, Op, Reject, Rule, Set, Socket,
    Statement, Transaction, Value, ct_state, ct_status,
};
use linux::provoke::Provoker;
use services::Protocol;

use super::plan::{Due, Way};
use crate::Error;

pub(crate) const TABLE: &str = "fairlead_end";
/// After the destination has been translated, and before any routing: there may be no way to the endpoint any more.
const AFTER_DNAT: i32 = -90;

/// What knows the connections of a mode, and ends them.
pub(super) trait Ways: Send {
    /// Does what is due; how many connections have been reset.
    fn act(&mut self, due: Due) -> Result<usize, Error>;

    /// The ways that clients of these addresses have to anybody but these endpoints.
    fn strays(
        &mut self,
        called: &BTreeSet<(Protocol, SocketAddr)>,
        used: &BTreeSet<SocketAddr>,
    ) -> Result<BTreeSet<Way>, Error>;

    /// Leaves nothing behind.
    fn close(&mut self) -> Result<(), Error>;
}

pub(super) struct Kernel {
    /// `None` only while a thread works with them.
    ways: Option<Box<dyn Ways>>,
}

/// Of the modes whose connections conntrack knows.
pub(super) struct Sockets {
    nft: Socket,
    translator: Translator,
    connections: Connections,
    conntrack: conntrack::Socket,
    provoker: Provoker,
    /// The clients whose packets are refused; empty: there is no table.
    held: BTreeMap<Way, BTreeSet<SocketAddr>>,
}

impl Kernel {
    pub fn new(ways: Box<dyn Ways>) -> Self {
        Kernel { ways: Some(ways) }
    }

    /// Works on a thread of its own.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn Ways) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let mut ways = match self.ways.take() {
            Some(ways) => ways,
            // The thread that had them died.
            None => return Err(Error::EndGone),
        };
        let (ways, result) = tokio::task::spawn_blocking(move || {
            let result = work(&mut *ways);
            (ways, result)
        })
        .await
        .map_err(Error::Commit)?;
        self.ways = Some(ways);
        result
    }

    /// Does what is due; how many connections have been reset.
    pub async fn act(&mut self, due: &Due) -> Result<usize, Error> {
        if due.begin.is_empty() && due.forget.is_empty() {
            return Ok(0);
        }
        let due = due.clone();
        self.work(move |ways| ways.act(due)).await
    }

    pub async fn strays(
        &mut self,
        called: &BTreeSet<(Protocol, SocketAddr)>,
        used: &BTreeSet<SocketAddr>,
    ) -> Result<BTreeSet<Way>, Error> {
        let (called, used) = (called.clone(), used.clone());
        self.work(move |ways| ways.strays(&called, &used)).await
    }

    pub async fn close(&mut self) -> Result<(), Error> {
        self.work(|ways| ways.close()).await
    }
}

impl Ways for Sockets {
    fn act(&mut self, due: Due) -> Result<usize, Error> {
        let (tcp, others): (Vec<Way>, Vec<Way>) = due.begin.into_iter().partition(|way| way.protocol == Protocol::Tcp);
        self.forget(&others.into_iter().collect())?;
        self.end(&tcp.into_iter().collect(), &due.forget)
    }

    fn strays(
        &mut self,
        called: &BTreeSet<(Protocol, SocketAddr)>,
        used: &BTreeSet<SocketAddr>,
    ) -> Result<BTreeSet<Way>, Error> {
        let mut strays = BTreeSet::new();
        let asked: BTreeSet<(bool, Protocol)> =
            called.iter().map(|(protocol, address)| (address.is_ipv6(), *protocol)).collect();
        for (v6, protocol) in asked {
            for flow in self.conntrack.flows(v6, protocol.number())? {
                let way = Way { protocol, called: flow.original.1, endpoint: flow.reply.0 };
                // What was refused answers itself: it is nobody's connection.
                let is_translated = way.called != way.endpoint;
                if is_translated && called.contains(&(protocol, way.called)) && !used.contains(&way.endpoint) {
                    strays.insert(way);
                }
            }
        }
        Ok(strays)
    }

    fn close(&mut self) -> Result<(), Error> {
        self.hold(BTreeMap::new())
    }
}

impl Sockets {
    pub fn open(namespace: Option<&OwnedFd>, translator: Translator) -> Result<Self, Error> {
        let namespace = namespace.map(|namespace| namespace.as_fd());
        Ok(Sockets {
            nft: Socket::open(namespace)?,
            translator,
            connections: Connections::open(namespace)?,
            conntrack: conntrack::Socket::open(namespace)?,
            provoker: Provoker::open(namespace).map_err(Error::Provoke)?,
            held: BTreeMap::new(),
        })
    }

    /// Refuses the connections of some ways from now on, and those of others no longer.
    fn end(&mut self, begin: &BTreeSet<Way>, forget: &[Way]) -> Result<usize, Error> {
        let mut wanted = self.held.clone();
        let mut late: BTreeMap<Way, BTreeSet<SocketAddr>> = BTreeMap::new();
        for way in forget {
            late.extend(wanted.remove(way).map(|clients| (*way, clients)));
        }
        let mut ended = Vec::new();
        let addresses: BTreeSet<IpAddr> = begin.iter().map(|way| way.endpoint.ip()).collect();
        for address in addresses {
            for connection in self.connections.open_to(address)? {
                let Connection { client, called, endpoint, .. } = connection;
                let way = Way { protocol: Protocol::Tcp, called, endpoint };
                if begin.contains(&way) {
                    wanted.entry(way).or_default().insert(client);
                    ended.push(connection);
                }
            }
        }
        self.hold(wanted)?;
        for connection in &ended {
            if let Err(error) = self.provoker.provoke(connection.endpoint, connection.answered) {
                // It hears when it next sends something.
                tracing::debug!("proxy: cannot provoke {}: {error}", connection.client);
            }
        }
        let count = ended.len();
        if count > 0 {
            tracing::info!(
                "proxy: reset {count} connections to endpoints that have gone, as their Services' end policies say"
            );
        }
        // Whoever still has a flow did not hear: its next packet is looked at as if it were the first.
        let is_late = |way: &Way, client: &SocketAddr| late.get(way).is_some_and(|clients| clients.contains(client));
        self.delete_flows(late.keys(), is_late)?;
        Ok(count)
    }

    /// Makes the table hold these connections and no others.
    fn hold(&mut self, wanted: BTreeMap<Way, BTreeSet<SocketAddr>>) -> Result<(), Error> {
        let (before, after) = (elements(&self.held), elements(&wanted));
        if before != after {
            let mut transaction = Transaction::new(Family::Inet, TABLE);
            transaction.push(Op::AddTable { comment: None });
            if before.is_empty() {
                declare(&mut transaction, self.translator);
            }
            if after.is_empty() {
                transaction.push(Op::DeleteTable);
            } else {
                let less = before.difference(&after).cloned().collect();
                let more = after.difference(&before).cloned().collect();
                change(&mut transaction, less, |set, elements| Op::DeleteElements { set, elements });
                change(&mut transaction, more, |set, elements| Op::AddElements { set, elements });
            }
            if let Err(error) = self.nft.commit(&transaction) {
                // Perhaps somebody removed the table under our feet: the next time begins with none.
                self.held.clear();
                self.nft.remove_table(Family::Inet, TABLE)?;
                return Err(error.into());
            }
        }
        self.held = wanted;
        Ok(())
    }

    fn forget(&mut self, ways: &BTreeSet<Way>) -> Result<(), Error> {
        self.delete_flows(ways.iter(), |way, _| ways.contains(way))
    }

    fn delete_flows<'a>(
        &mut self,
        ways: impl Iterator<Item = &'a Way>,
        is_wanted: impl Fn(&Way, &SocketAddr) -> bool,
    ) -> Result<(), Error> {
        let kinds: BTreeSet<(bool, Protocol)> = ways.map(|way| (way.called.is_ipv6(), way.protocol)).collect();
        for (v6, protocol) in kinds {
            for flow in self.conntrack.flows(v6, protocol.number())? {
                let way = Way { protocol, called: flow.original.1, endpoint: flow.reply.0 };
                if is_wanted(&way, &flow.original.0) {
                    self.conntrack.delete(&flow)?;
                }
            }
        }
        Ok(())
    }
}

fn elements(held: &BTreeMap<Way, BTreeSet<SocketAddr>>) -> BTreeSet<Element> {
    let each = held.iter().flat_map(|(way, clients)| clients.iter().map(move |client| (client, way)));
    each.map(|(client, way)| element(client, &way.called)).collect()
}

fn change(transaction: &mut Transaction, elements: Vec<Element>, op: fn(Box<str>, Vec<Element>) -> Op) {
    let is_v6 = |element: &Element| matches!(element.key.0.first(), Some(Datum::V6(_)));
    let (v6, v4): (Vec<Element>, Vec<Element>) = elements.into_iter().partition(is_v6);
    for (elements, is_v6) in [(v4, false), (v6, true)] {
        if !elements.is_empty() {
            transaction.push(op(set_name(is_v6).into(), elements));
        }
    }
}

fn set_name(v6: bool) -> &'static str {
    if v6 { "ended6" } else { "ended4" }
}

fn element(client: &SocketAddr, called: &SocketAddr) -> Element {
    let key = [client.ip().into(), Datum::Port(client.port()), called.ip().into(), Datum::Port(called.port())];
    Element { key: Key::new(key), end: None, data: ElementData::None }
}

fn declare(transaction: &mut Transaction, translator: Translator) {
    let hooks = [("prerouting", Hook::Prerouting), ("output", Hook::Output)];
    for v6 in [false, true] {
        let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let key = [ip, DataType::InetService, ip, DataType::InetService];
        transaction.push(Op::AddSet(Set::of(set_name(v6), &key)));
    }
    for (name, hook) in hooks {
        transaction.push(Op::AddChain(Chain::base(name, ChainKind::Filter, hook, AFTER_DNAT)));
        for v6 in [false, true] {
            let key = [
                Value::SourceIp { v6 },
                Value::SourcePort,
                Value::OriginalDestinationIp { v6 },
                Value::OriginalDestinationPort,
            ];
            // The set alone is enough; this is cheaper to look at, where it shows.
            let translated = Statement::HasBits(Value::CtStatus, ct_status::DNAT);
            let rule = [
                // A client that comes back with the same port begins a new connection.
                Statement::HasBits(Value::CtState, ct_state::ESTABLISHED),
                Statement::of_family(v6),
                Statement::Equal(Value::L4Proto, Datum::Proto(Protocol::Tcp.number())),
                Statement::is_in(key, set_name(v6)),
                Statement::Reject(Reject::TcpReset),
            ];
            let rule = Rule::new((translator == Translator::Nat).then_some(translated).into_iter().chain(rule));
            transaction.push(Op::AddRule { chain: name.into(), rule });
        }
    }
}

/// Removes what a proxy left that did not come to its end.
pub(crate) fn clear(namespace: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    Socket::open(namespace)?.remove_table(Family::Inet, TABLE)?;
    Ok(())
}
