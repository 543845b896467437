//! Where evidence comes from: the kernel's connection table and its log, or the counts and the ring of the ebpf mode's
//! programs. Both tell that there are new connections at all, and which ones are refused; who stays silent is looked up.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use linux::bpf::Ring;
use linux::conntrack::{self, Conntrack, Translator};
use linux::nflog;
use linux::provoke::Provoker;
use services::Protocol;
use tokio::io::unix::AsyncFd;

use super::layout::{BEGUN, REFUSED};
use super::suspects::Suspects;
use super::table::Destinations;
use crate::Error;
use crate::dataplane::ebpf::contacts::Event;

/// What is looked at while there is something to see.
pub(super) trait Source: Send {
    fn look(&mut self, now: Duration) -> Result<Found, Error>;

    /// Nothing is looked at for a while.
    fn rest(&mut self) {}
}

/// What one look found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Endpoints that let a first packet wait for too long.
    pub silent: BTreeSet<SocketAddr>,
    /// First packets since the last look that go, or will go, to another endpoint when the client repeats them.
    pub retried: u64,
    /// Somebody waits for an answer.
    pub goes_on: bool,
}

/// The connection table. A flow that is not answered is deleted, so that the repeated packet is picked anew.
pub(super) struct Flows {
    conntrack: Box<dyn Conntrack>,
    by: Translator,
    /// IPVS remembers endpoints beside the connection table: it has to take them for refused.
    refuser: Option<Provoker>,
    destinations: Destinations,
    suspects: Suspects,
    retry: bool,
}

impl Flows {
    pub fn open(
        namespace: Option<BorrowedFd<'_>>,
        by: Translator,
        destinations: Destinations,
        retry: bool,
    ) -> Result<Self, Error> {
        let conntrack = Box::new(conntrack::Socket::open(namespace)?);
        let refuser = match by {
            Translator::Nat => None,
            Translator::Ipvs => Some(Provoker::open(namespace).map_err(Error::Provoke)?),
        };
        Ok(Flows { conntrack, by, refuser, destinations, suspects: Suspects::default(), retry })
    }
}

impl Source for Flows {
    fn look(&mut self, now: Duration) -> Result<Found, Error> {
        let mut flows = self.conntrack.unanswered(Protocol::Tcp.number(), self.by)?;
        flows.retain(|flow| self.destinations.has_alternative(flow.original.1, flow.reply.0));
        let old = self.suspects.look(flows, now);
        let mut retried = 0;
        if self.retry {
            for flow in &old {
                self.conntrack.delete(flow)?;
                if let Some(refuser) = &self.refuser {
                    refuser.refuse(flow.reply.0, flow.original.0).map_err(Error::Provoke)?;
                }
                retried += 1;
            }
        }
        let silent = old.iter().map(|flow| flow.reply.0).collect();
        Ok(Found { silent, retried, goes_on: !self.suspects.is_empty() })
    }

    fn rest(&mut self) {
        self.suspects = Suspects::default();
    }
}

/// What the kernel has told.
#[derive(Debug, Default)]
pub(super) struct Rung {
    /// There are new connections.
    pub begun: bool,
    /// Endpoints that refused one.
    pub refusers: BTreeSet<SocketAddr>,
    /// How many clients do not hear of that, and are picked another endpoint.
    pub held: u64,
}

/// Where the kernel tells.
pub(super) enum Bell {
    Log { begun: AsyncFd<nflog::Socket>, refused: AsyncFd<nflog::Socket>, retry: bool },
    Ring { ring: AsyncFd<Ring>, destinations: Destinations },
}

impl Bell {
    /// The log groups of a namespace.
    pub fn log(namespace: Option<BorrowedFd<'_>>, retry: bool) -> Result<Self, Error> {
        let listen = |group, bytes| -> Result<AsyncFd<nflog::Socket>, Error> {
            nflog::Socket::open(namespace, group, bytes)?.register().map_err(Error::Namespace)
        };
        // An IPv6 header, one of ICMPv6, and what that quotes.
        Ok(Bell::Log { begun: listen(BEGUN, 20)?, refused: listen(REFUSED, 128)?, retry })
    }

    /// Waits until something is told. Of new connections only somebody who rests needs to hear. Can be cancelled.
    pub async fn wait(&mut self, resting: bool) -> Result<Rung, Error> {
        match self {
            Bell::Log { begun, refused, retry } => tokio::select! {
                ready = begun.readable_mut(), if resting => {
                    let mut ready = ready.map_err(Error::Namespace)?;
                    let drained = ready.get_inner_mut().packets(|_| ());
                    ready.clear_ready();
                    // What the kernel left out are more of the same.
                    drained?;
                    Ok(Rung { begun: true, ..Rung::default() })
                }
                ready = refused.readable_mut() => {
                    let mut ready = ready.map_err(Error::Namespace)?;
                    let mut refusers = Vec::new();
                    let drained = ready.get_inner_mut().packets(|packet| refusers.extend(nflog::refuser(packet)));
                    ready.clear_ready();
                    drained?;
                    let held = if *retry { refusers.len() as u64 } else { 0 };
                    Ok(Rung { begun: false, refusers: refusers.into_iter().collect(), held })
                }
            },
            Bell::Ring { ring, destinations } => {
                let mut ready = ring.readable_mut().await.map_err(Error::Namespace)?;
                let rung = read(ready.get_inner_mut(), destinations);
                ready.clear_ready();
                Ok(rung)
            }
        }
    }

    /// Takes what was told of new connections since the last time, before somebody looks anyway.
    pub fn take(&mut self) -> Result<Rung, Error> {
        match self {
            Bell::Log { begun, .. } => {
                let mut rung = Rung::default();
                begun.get_mut().packets(|_| rung.begun = true)?;
                Ok(rung)
            }
            Bell::Ring { ring, destinations } => Ok(read(ring.get_mut(), destinations)),
        }
    }
}

fn read(ring: &mut Ring, destinations: &Destinations) -> Rung {
    let mut rung = Rung::default();
    ring.drain(|message| match Event::read(message) {
        Some(Event::Begun) => rung.begun = true,
        // The last endpoint refuses whoever comes.
        Some(Event::Refused(pair)) if destinations.has_alternative(pair.asked, pair.given) => {
            rung.refusers.insert(pair.given);
        }
        Some(Event::Refused(_)) | None => {}
    });
    rung
}
