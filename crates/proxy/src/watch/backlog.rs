//! Looks into the accept queues of this machine's pods, whoever started them: every network namespace that has a process.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use linux::netns::{self, Netns};
use linux::process;
use linux::sock_diag::{Listener, Socket};

use super::queues::Queues;
use crate::Error;

/// How long a list of namespaces is good. A new pod's queue is not full of old connections.
const LISTED: Duration = Duration::from_secs(2);

/// The namespaces there are, and what their listeners were seen to do.
#[derive(Default)]
pub struct Backlog {
    /// Processes by namespace.
    namespaces: BTreeMap<u64, Vec<i32>>,
    listed: Option<Duration>,
    /// Kept only while there is something to see: a socket keeps its namespace alive.
    sockets: BTreeMap<u64, Socket>,
    queues: Queues,
}

impl Backlog {
    /// Listeners that take nobody from their queues.
    pub fn look(&mut self, now: Duration) -> Result<BTreeSet<SocketAddr>, Error> {
        if self.listed.is_none_or(|listed| now.saturating_sub(listed) >= LISTED) {
            self.namespaces = netns::inhabited().map_err(Error::Processes)?;
            self.listed = Some(now);
        }
        let mut found: BTreeMap<SocketAddr, BTreeSet<u64>> = BTreeMap::new();
        let mut holders: BTreeMap<SocketAddr, (u64, u32)> = BTreeMap::new();
        for (namespace, pids) in &self.namespaces {
            let Some(pid) = pids.iter().find(|pid| netns::namespace_of(**pid) == Some(*namespace)) else {
                self.sockets.remove(namespace);
                continue;
            };
            if !self.sockets.contains_key(namespace) {
                // It may end just now, and then it is no matter.
                let Ok(held) = Netns::open(&PathBuf::from(format!("/proc/{pid}/ns/net"))) else { continue };
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
