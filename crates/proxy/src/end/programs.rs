//! Ends connections of the ebpf mode.
//!
//! A socket that was sent to an endpoint when it connected is looked for where it is, in the network namespaces of this
//! machine: what the programs keep for it says whom it asked for. It is aborted. A connection from outside is only
//! packets: those of its client are sent to a port of the node at which nobody can listen, so that the node resets it, and
//! a silent client is provoked into saying something. UDP is forgotten where that lets the next packet go to another
//! endpoint: a connected socket keeps its endpoint until that does not serve any more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use linux::bpf::{Hooks, Pinned};
use linux::netns::{self, Netns};
use linux::provoke::Provoker;
use linux::sock_diag;
use services::Protocol;

use super::kernel::Ways;
use super::plan::{Due, Way};
use crate::Error;
use crate::dataplane::ebpf::contacts::{Pair, flows};
use crate::dataplane::ebpf::ended::{Ended, PEERS, end_flows, forget_flows, forget_senders, node_addresses, peer};
use crate::run::pinned;

pub(super) struct Programs {
    kernel: Pinned,
    peers: OwnedFd,
    provoker: Provoker,
    /// Flows that end: whose packets are refused.
    ending: BTreeMap<Way, Vec<Ended>>,
}

fn way(pair: Pair) -> Way {
    Way { protocol: pair.protocol, called: pair.asked, endpoint: pair.given }
}

impl Programs {
    pub fn open(namespace: Option<&OwnedFd>, hooks: Option<&Hooks>) -> Result<Self, Error> {
        let namespace = namespace.map(|namespace| namespace.as_fd());
        let kernel = pinned(namespace, hooks)?;
        let peers = kernel.descriptor(PEERS)?;
        let provoker = Provoker::open(namespace).map_err(Error::Provoke)?;
        Ok(Programs { kernel, peers, provoker, ending: BTreeMap::new() })
    }

    /// Sockets of this machine that have been sent somewhere by our programs, and where.
    fn sockets(&self, mut visit: impl FnMut(&mut sock_diag::Socket, Way, &sock_diag::Stored)) -> Result<(), Error> {
        for (namespace, pids) in netns::inhabited().map_err(Error::Processes)? {
            let Some(pid) = pids.iter().find(|pid| netns::namespace_of(**pid) == Some(namespace)) else { continue };
            // It may end just now, and then it is no matter.
            let Ok(held) = Netns::open(&PathBuf::from(format!("/proc/{pid}/ns/net"))) else { continue };
            let mut diag = sock_diag::Socket::open(Some(held.as_fd()))?;
            for stored in diag.stored(self.peers.as_fd())? {
                if let Some(pair) = peer(&stored.value) {
                    visit(&mut diag, way(pair), &stored);
                }
            }
        }
        Ok(())
    }

    fn abort_sockets(&self, ways: &BTreeSet<Way>) -> Result<usize, Error> {
        let mut aborted = 0;
        let mut outcome = Ok(());
        self.sockets(|diag, way, stored| {
            if outcome.is_ok() && ways.contains(&way) {
                match diag.destroy(stored) {
                    Ok(was_there) => aborted += usize::from(was_there),
                    Err(error) => outcome = Err(error),
                }
            }
        })?;
        outcome?;
        Ok(aborted)
    }

    /// The flows of some ways that are not over.
    fn open_flows(&mut self, ways: &BTreeSet<Way>) -> Result<BTreeMap<Way, Vec<SocketAddr>>, Error> {
        let mut found: BTreeMap<Way, Vec<SocketAddr>> = BTreeMap::new();
        for flow in flows(&mut self.kernel)? {
            if !flow.is_answer && !flow.is_closed && ways.contains(&way(flow.pair)) {
                found.entry(way(flow.pair)).or_default().push(flow.client);
            }
        }
        Ok(found)
    }

    fn reset_flows(&mut self, ways: &BTreeSet<Way>) -> Result<usize, Error> {
        let addresses = node_addresses(&mut self.kernel)?;
        let mut count = 0;
        for (way, clients) in self.open_flows(ways)? {
            let Some(node) = addresses.iter().find(|address| address.is_ipv6() == way.called.is_ipv6()) else {
                continue;
            };
            let pair = Pair { protocol: way.protocol, asked: way.called, given: way.endpoint };
            let ended: Vec<Ended> =
                clients.iter().map(|client| Ended { client: *client, pair, refuser: (*node, 0).into() }).collect();
            end_flows(&mut self.kernel, &ended)?;
            for client in &clients {
                if let Err(error) = self.provoker.provoke(way.endpoint, *client) {
                    // It hears when it next sends something.
                    tracing::debug!("proxy: cannot provoke {client}: {error}");
                }
            }
            count += ended.len();
            self.ending.entry(way).or_default().extend(ended);
        }
        Ok(count)
    }
}

impl Ways for Programs {
    fn act(&mut self, due: Due) -> Result<usize, Error> {
        for way in &due.forget {
            // Whoever comes later is told nothing: it is as if the flow had never been.
            forget_flows(&mut self.kernel, &self.ending.remove(way).unwrap_or_default())?;
        }
        let (tcp, others): (BTreeSet<Way>, BTreeSet<Way>) =
            due.begin.into_iter().partition(|way| way.protocol == Protocol::Tcp);
        if !others.is_empty() {
            for (way, clients) in self.open_flows(&others)? {
                let pair = Pair { protocol: way.protocol, asked: way.called, given: way.endpoint };
                let gone = |client| Ended { client, pair, refuser: way.endpoint };
                forget_flows(&mut self.kernel, &clients.into_iter().map(gone).collect::<Vec<_>>())?;
            }
            let is_gone =
                |asked, given| others.contains(&Way { protocol: Protocol::Udp, called: asked, endpoint: given });
            forget_senders(&mut self.kernel, is_gone)?;
        }
        if tcp.is_empty() {
            return Ok(0);
        }
        let count = self.abort_sockets(&tcp)? + self.reset_flows(&tcp)?;
        if count > 0 {
            tracing::info!(
                "proxy: reset {count} connections to endpoints that have gone, as their Services' end policies say"
            );
        }
        Ok(count)
    }

    fn strays(
        &mut self,
        called: &BTreeSet<(Protocol, SocketAddr)>,
        used: &BTreeSet<SocketAddr>,
    ) -> Result<BTreeSet<Way>, Error> {
        let is_stray = |way: &Way| called.contains(&(way.protocol, way.called)) && !used.contains(&way.endpoint);
        let mut strays = BTreeSet::new();
        self.sockets(|_, way, _| {
            if is_stray(&way) {
                strays.insert(way);
            }
        })?;
        let flows = flows(&mut self.kernel)?;
        strays.extend(flows.iter().map(|flow| way(flow.pair)).filter(is_stray));
        Ok(strays)
    }

    fn close(&mut self) -> Result<(), Error> {
        for (_, ended) in std::mem::take(&mut self.ending) {
            forget_flows(&mut self.kernel, &ended)?;
        }
        Ok(())
    }
}
