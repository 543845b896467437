//! The loop that keeps the kernel true to the table.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use linux::conntrack::{self, Conntrack};
use linux::iptables::Tools;
use linux::netns::Netns;
use linux::nft::Socket;
use services::{Changes, Frontend, FrontendId, Seed, ServiceTable};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::dataplane::iptables::Iptables;
use crate::dataplane::nftables::Nftables;
use crate::dataplane::userspace::{self, Place, Sockets, Userspace};
use crate::dataplane::{Answerers, Change, Dataplane};
use crate::stale;
use crate::{Error, Metrics, Mode, NodeView, leftovers};

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// What a node's proxy needs.
pub struct Config {
    pub mode: Mode,
    /// The node as it is now; a change renders everything anew.
    pub node: watch::Receiver<Arc<NodeView>>,
    /// The network namespace to work in; `None`: the caller's.
    pub namespace: Option<OwnedFd>,
    /// Where commits are counted.
    pub metrics: Arc<Metrics>,
}

/// The service table and what happens to it. Subscribe before the table's first list is complete.
pub struct Feed {
    pub table: Arc<RwLock<ServiceTable>>,
    pub changes: broadcast::Receiver<Arc<Changes>>,
}

/// How the proxy is doing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The kernel has held a whole plan since the start.
    pub synced: bool,
    pub commits: u64,
    /// Frontends whose last change is not in the kernel yet.
    pub pending: usize,
    /// Why the last commit failed; `None` after one that did not.
    pub error: Option<String>,
    /// What holds the rules, and how to look at them.
    pub about: String,
}

pub type StatusHandle = watch::Receiver<Status>;

/// What an earlier run left in the kernel: give it to `ServiceTable::with_seed`, and a restart changes nothing.
pub fn found(mode: Mode, namespace: Option<std::os::fd::BorrowedFd<'_>>) -> Result<Seed, Error> {
    match mode {
        Mode::Nftables => Nftables::new(Socket::open(namespace)?).read(),
        Mode::Iptables | Mode::Userspace => Ok(Seed::default()),
    }
}

/// Keeps the kernel true to the table until the token is cancelled; then returns and leaves the rules in place, so that
/// Services go on answering. An error is returned only if the mode cannot start at all.
pub async fn run(
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    token: CancellationToken,
) -> Result<(), Error> {
    let namespace = || config.namespace.as_ref().map(|namespace| namespace.as_fd());
    let conntrack: Option<Box<dyn Conntrack>> = match conntrack::Socket::open(namespace()) {
        Ok(socket) => Some(Box::new(socket)),
        // That mode does without, and says what it does not do then.
        Err(error) if config.mode == Mode::Userspace && error.is_forbidden() => None,
        Err(error) => return Err(error.into()),
    };
    let held = config.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)?;
    match config.mode {
        Mode::Nftables => {
            let nft = Socket::open(namespace())?;
            let mut others = Socket::open(namespace())?;
            let clear = Box::new(move || {
                leftovers::clear_userspace(&mut others)?;
                leftovers::clear_iptables(held.as_ref().map(|namespace| namespace.as_fd()))
            });
            let kernel = Kernel { dataplane: Nftables::new(nft), conntrack, clear: Some(clear) };
            Loop::new(kernel, config, feed, status).run(token).await
        }
        Mode::Iptables => {
            let mut nft = Socket::open(namespace())?;
            let tools = tokio::task::spawn_blocking(move || Tools::open(held)).await.map_err(Error::Commit)??;
            let clear = Box::new(move || {
                leftovers::clear_userspace(&mut nft)?;
                leftovers::clear_nftables(&mut nft)
            });
            let kernel = Kernel { dataplane: Iptables::new(tools), conntrack, clear: Some(clear) };
            Loop::new(kernel, config, feed, status).run(token).await
        }
        Mode::Userspace => {
            let nft = userspace::open(namespace())?;
            let place = match held.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)? {
                Some(namespace) => Place::Within(Netns::from_fd(namespace)?),
                None => Place::Here,
            };
            let relays = Sockets::new(place, Handle::current());
            let clear: Option<Clear> = if nft.is_some() {
                let mut others = Socket::open(namespace())?;
                Some(Box::new(move || {
                    leftovers::clear_nftables(&mut others)?;
                    leftovers::clear_iptables(held.as_ref().map(|namespace| namespace.as_fd()))
                }))
            } else {
                None
            };
            let kernel = Kernel { dataplane: Userspace::new(nft, relays), conntrack, clear };
            Loop::new(kernel, config, feed, status).run(token).await
        }
    }
}

/// Everything that talks to the kernel; it moves to a thread of its own for each commit.
struct Kernel<D> {
    dataplane: D,
    /// `None` where no rule of ours makes flows.
    conntrack: Option<Box<dyn Conntrack>>,
    /// Removes what other modes left, once this one's first plan is in place: so that there is always one, and translated
    /// connections live on.
    clear: Option<Clear>,
}

type Clear = Box<dyn FnMut() -> Result<(), Error> + Send>;

struct Loop<D> {
    /// `None` only while a commit runs.
    kernel: Option<Kernel<D>>,
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    /// What the kernel holds.
    committed: HashMap<FrontendId, Arc<Frontend>>,
    /// For which node `committed` was rendered.
    node: Option<Arc<NodeView>>,
    pending: BTreeSet<FrontendId>,
}

/// How the next commit is made.
#[derive(Clone, Copy, PartialEq)]
enum Attempt {
    /// Read the kernel, commit everything.
    Whole,
    /// What changed, in one transaction.
    Together,
    /// What changed, one transaction each, so that one bad frontend holds up nobody else.
    Apart,
}

impl<D: Dataplane> Loop<D> {
    fn new(kernel: Kernel<D>, config: Config, feed: Feed, status: watch::Sender<Status>) -> Self {
        Loop {
            kernel: Some(kernel),
            config,
            feed,
            status,
            committed: HashMap::new(),
            node: None,
            pending: BTreeSet::new(),
        }
    }

    async fn run(mut self, token: CancellationToken) -> Result<(), Error> {
        if let Some(kernel) = &self.kernel {
            let about = kernel.dataplane.about();
            self.status.send_modify(|status| status.about = about);
        }
        let mut attempt = Attempt::Whole;
        let mut back_off = FIRST_RETRY;
        let mut retry_at: Option<Instant> = None;
        let mut changes_open = true;
        let mut node_open = true;
        loop {
            let work = attempt == Attempt::Whole || !self.pending.is_empty();
            if work && retry_at.is_none() && self.read_table().is_synced() {
                match self.commit(attempt).await {
                    Ok(()) => {
                        attempt = Attempt::Together;
                        back_off = FIRST_RETRY;
                    }
                    // A commit that panicked took the data path with it.
                    Err(error) if self.kernel.is_none() => return Err(error),
                    Err(error) => {
                        tracing::warn!("proxy: {error}");
                        self.status.send_modify(|status| status.error = Some(error.to_string()));
                        attempt = next_attempt(attempt);
                        retry_at = Some(Instant::now() + back_off);
                        back_off = (back_off * 2).min(LAST_RETRY);
                    }
                }
            }
            tokio::select! {
                biased;
                () = token.cancelled() => return Ok(()),
                changed = self.config.node.changed(), if node_open => {
                    node_open = changed.is_ok();
                    attempt = Attempt::Whole;
                }
                received = self.feed.changes.recv(), if changes_open => match received {
                    Ok(changes) => self.notice(&changes),
                    Err(broadcast::error::RecvError::Lagged(_)) => attempt = Attempt::Whole,
                    Err(broadcast::error::RecvError::Closed) => changes_open = false,
                },
                () = async { sleep_until(retry_at.unwrap_or_else(Instant::now)).await }, if retry_at.is_some() => {
                    retry_at = None;
                }
            }
            // Whatever else has happened meanwhile goes into the same commit.
            while let Ok(changes) = self.feed.changes.try_recv() {
                self.notice(&changes);
            }
            let pending = self.pending.len();
            self.status.send_if_modified(|status| std::mem::replace(&mut status.pending, pending) != pending);
        }
    }

    fn notice(&mut self, changes: &Changes) {
        self.config.metrics.noticed(changes);
        self.pending.extend(changes.frontends.iter().map(|change| change.id));
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, ServiceTable> {
        // A writer that panicked left a table that is whole: each event is applied in one call.
        self.feed.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    async fn commit(&mut self, attempt: Attempt) -> Result<(), Error> {
        let node = self.config.node.borrow_and_update().clone();
        D::check(&node)?;
        let whole = attempt == Attempt::Whole;
        let ids: BTreeSet<FrontendId> = if whole {
            let table = self.read_table();
            table.frontends().map(|frontend| frontend.id).chain(self.committed.keys().copied()).collect()
        } else {
            self.pending.clone()
        };
        let after: Vec<(FrontendId, Option<Arc<Frontend>>)> = {
            let table = self.read_table();
            ids.iter().map(|id| (*id, table.frontend(*id).cloned())).collect()
        };
        // After `read` nothing is known of who owns what the kernel holds: all entries are claimed anew.
        let before_node = if whole { None } else { self.node.clone() };
        let changes: Vec<Change<D::Entries>> = after
            .iter()
            .map(|(id, after)| Change {
                id: *id,
                before: before_node
                    .as_ref()
                    .and_then(|node| self.committed.get(id).map(|before| D::entries(before, node))),
                after: after.as_ref().map(|after| D::entries(after, &node)),
            })
            .filter(|change| whole || change.before != change.after)
            .collect();
        let mut answerers = Answerers::new();
        for (id, after) in &after {
            stale::answerers(self.committed.get(id), after.as_ref(), &node, &mut answerers);
        }
        let base = whole.then(|| D::base(&node));
        let apart = attempt == Attempt::Apart;
        let begun = Instant::now();
        let mut kernel = self.kernel.take().expect("a commit gives it back");
        let (kernel, result) = tokio::task::spawn_blocking(move || {
            let result = commit(&mut kernel, whole, apart, base.as_ref(), &changes, answerers);
            if whole {
                // A whole plan takes twice the memory of what is kept of it, and comes once.
                drop(changes);
                linux::memory::trim();
            }
            (kernel, result)
        })
        .await
        .map_err(Error::Commit)?;
        self.kernel = Some(kernel);
        self.config.metrics.committed(whole, begun.elapsed(), result.is_ok());
        result?;
        for (id, after) in after {
            self.pending.remove(&id);
            match after {
                Some(after) => drop(self.committed.insert(id, after)),
                None => drop(self.committed.remove(&id)),
            }
        }
        self.node = Some(node);
        let pending = self.pending.len();
        self.status.send_modify(|status| {
            status.synced = true;
            status.commits += 1;
            status.pending = pending;
            status.error = None;
        });
        Ok(())
    }
}

fn commit<D: Dataplane>(
    kernel: &mut Kernel<D>,
    whole: bool,
    apart: bool,
    base: Option<&D::Base>,
    changes: &[Change<D::Entries>],
    answerers: Answerers,
) -> Result<(), Error> {
    let dataplane = &mut kernel.dataplane;
    if whole {
        dataplane.read()?;
    }
    if apart {
        // The first error is told; the others have had their chance.
        let results: Vec<_> = changes.chunks(1).map(|change| dataplane.commit(None, change)).collect();
        results.into_iter().collect::<Result<(), Error>>()?;
    } else {
        dataplane.commit(base, changes)?;
    }
    if let Some(clear) = &mut kernel.clear {
        clear()?;
        kernel.clear = None;
    }
    // Only now: before, the old rules would have made the same flows again.
    let deleted = match &mut kernel.conntrack {
        Some(conntrack) => stale::sweep(&mut **conntrack, &kernel.dataplane.answerers(answerers))?,
        None => 0,
    };
    if deleted > 0 {
        tracing::info!("proxy: forgot {deleted} UDP flows to endpoints that have gone");
    }
    Ok(())
}

fn next_attempt(failed: Attempt) -> Attempt {
    match failed {
        Attempt::Together => Attempt::Apart,
        // Perhaps the kernel does not hold what we think: somebody may have flushed it.
        Attempt::Apart | Attempt::Whole => Attempt::Whole,
    }
}
