//! Looks into the accept queues of this node's pods, whoever started them: every network namespace that has a process and a
//! link to the node's own. Others may be of another cluster, with the same addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use linux::link::Links;
use linux::netns::{self, Netns, NetnsError};
use linux::process;
use linux::sock_diag::{Listener, Socket};

use super::queues::Queues;
use crate::Error;

/// How long a list of namespaces is good. A new pod's queue is not full of old connections.
const LISTED: Duration = Duration::from_secs(2);

/// The namespaces there are, and what their listeners were seen to do.
pub struct Backlog {
    /// The node's own namespace: its inode number and its links.
    node: u64,
    links: Links,
    /// Processes by namespace.
    namespaces: BTreeMap<u64, Vec<i32>>,
    listed: Option<Duration>,
    /// Kept only while there is something to see: a socket keeps its namespace alive.
    sockets: BTreeMap<u64, Socket>,
    queues: Queues,
}

impl Backlog {
    /// Of a node whose own namespace this is.
    pub fn new(node: &Netns) -> Result<Self, Error> {
        Ok(Backlog {
            node: node.inode()?,
            links: Links::open(node).map_err(NetnsError::from)?,
            namespaces: BTreeMap::new(),
            listed: None,
            sockets: BTreeMap::new(),
            queues: Queues::default(),
        })
    }

    fn is_of_node(&self, namespace: u64, pids: &[i32]) -> Result<bool, Error> {
        if namespace == self.node {
            return Ok(true);
        }
        match open(namespace, pids) {
            Some(held) => Ok(self.links.reach(&held).map_err(NetnsError::from)?),
            None => Ok(false),
        }
    }

    /// Listeners that take nobody from their queues.
    pub fn look(&mut self, now: Duration) -> Result<BTreeSet<SocketAddr>, Error> {
        if self.listed.is_none_or(|listed| now.saturating_sub(listed) >= LISTED) {
            self.namespaces.clear();
            for (namespace, pids) in netns::inhabited().map_err(Error::Processes)? {
                if self.is_of_node(namespace, &pids)? {
                    self.namespaces.insert(namespace, pids);
                }
            }
            self.listed = Some(now);
        }
        let mut found: BTreeMap<SocketAddr, BTreeSet<u64>> = BTreeMap::new();
        let mut holders: BTreeMap<SocketAddr, (u64, u32)> = BTreeMap::new();
        for (namespace, pids) in &self.namespaces {
            if !pids.iter().any(|pid| netns::namespace_of(*pid) == Some(*namespace)) {
                self.sockets.remove(namespace);
                continue;
            }
            if !self.sockets.contains_key(namespace) {
                let Some(held) = open(*namespace, pids) else { continue };
                self.sockets.insert(*namespace, Socket::open(Some(std::os::fd::AsFd::as_fd(&held)))?);
            }
            let Some(socket) = self.sockets.get_mut(namespace) else { continue };
            let listeners: BTreeMap<u16, u32> =
                socket.backlogged()?.into_iter().map(|Listener { port, inode }| (port, inode)).collect();
            for (port, inode) in listeners {
                for waiting in socket.waiting(port)? {
                    found.entry(waiting.local).or_default().insert(waiting.cookie);
                    holders.insert(waiting.local, (*namespace, inode));
                }
            }
        }
        self.sockets.retain(|namespace, _| self.namespaces.contains_key(namespace));
        let namespaces = &self.namespaces;
        let is_stopped = |address: SocketAddr| {
            let Some((namespace, inode)) = holders.get(&address) else { return false };
            let pids = namespaces.get(namespace).into_iter().flatten();
            let mut owners = pids.filter(|pid| process::has_socket(**pid, *inode)).peekable();
            // One of several that runs may still take what waits.
            owners.peek().is_some() && owners.all(|pid| process::is_stopped(*pid) == Some(true))
        };
        Ok(self.queues.look(found, now, is_stopped))
    }

    pub fn is_undecided(&self) -> bool {
        self.queues.is_undecided()
    }

    /// Lets namespaces go, until the next look.
    pub fn rest(&mut self) {
        self.sockets.clear();
    }
}

/// `None` if it has no process any more: it may end at any time, and then it is no matter.
fn open(namespace: u64, pids: &[i32]) -> Option<Netns> {
    let pid = pids.iter().find(|pid| netns::namespace_of(**pid) == Some(namespace))?;
    let held = Netns::open(&PathBuf::from(format!("/proc/{pid}/ns/net"))).ok()?;
    (held.inode().ok()? == namespace).then_some(held)
}
