//! The loop that keeps the kernel true to the table.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use linux::bpf::{Hooks, Kernel as _, Pinned};
use linux::conntrack::{self, Conntrack};
use linux::iptables::Tools;
use linux::ipvs::{self, Ipvs as _};
use linux::netns::Netns;
use linux::nft::Socket;
use services::{Changes, Frontend, FrontendId, Seed, ServiceTable};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::applied::{Applied, AppliedSlices};
use crate::dataplane::ebpf::{Ebpf, LAYOUT, OBJECT};
use crate::dataplane::iptables::Iptables;
use crate::dataplane::ipvs::Ipvs;
use crate::dataplane::nftables::Nftables;
use crate::dataplane::userspace::{self, Place, Sockets, Userspace};
use crate::dataplane::{Answerers, Change, Dataplane, Kept};
use crate::end::End;
use crate::guard::{self, Guard};
use crate::stale;
use crate::watch::{self as eyes, Alternatives, Target, WatchTable, Watcher, Watching};
use crate::{Error, Metrics, Mode, NodeView, keeper, leftovers};

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// Between two repairs of what somebody else changes.
const REPAIR_PAUSE: Duration = Duration::from_secs(1);
/// So many changed frontends are a large commit.
const LARGE: usize = 64;

/// What a node's proxy needs.
pub struct Config {
    pub mode: Mode,
    /// The node as it is now; a change renders everything anew.
    pub node: watch::Receiver<Arc<NodeView>>,
    /// The network namespace to work in; `None`: the caller's.
    pub namespace: Option<OwnedFd>,
    /// Where commits are counted.
    pub metrics: Arc<Metrics>,
    /// Where the ebpf mode attaches and what it keeps; the other modes remove what it has left there.
    pub hooks: Option<Hooks>,
    pub watching: Watching,
}

impl Config {
    /// The same in another mode.
    pub(crate) fn in_mode(&self, mode: Mode) -> Result<Config, Error> {
        let namespace = self.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)?;
        let (node, hooks, watching) = (self.node.clone(), self.hooks.clone(), self.watching.clone());
        Ok(Config { mode, node, namespace, hooks, metrics: self.metrics.clone(), watching })
    }
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
    /// The mode whose whole plan the kernel holds, without other modes' leftovers; `None` before the first.
    pub mode: Option<Mode>,
    pub commits: u64,
    /// Frontends whose last change is not in the kernel yet.
    pub pending: usize,
    /// Why the last commit failed; `None` after one that did not.
    pub error: Option<String>,
    /// What holds the rules, and how to look at them.
    pub about: String,
    /// The slice versions that the kernel follows; the same `Arc` as long as they do not change.
    pub applied: Arc<AppliedSlices>,
    /// How often an endpoint left the pick because it did not answer.
    pub ejections: u64,
    /// First packets that were sent to another endpoint, or will be when the client repeats them.
    pub retries: u64,
    /// Endpoints that are out now. Of each Service at most half are, whatever is held against them.
    pub ejected: BTreeSet<Target>,
    /// Why endpoints that do not answer go unnoticed; `None` if they do not.
    pub watch_error: Option<String>,
    /// Services that ask for what the mode cannot do, and what that is.
    pub unsupported: BTreeMap<FrontendId, String>,
    /// How often somebody else's change of the proxy's own table was made undone.
    pub repairs: u64,
}

pub type StatusHandle = watch::Receiver<Status>;

/// What an earlier run left in the kernel: give it to `ServiceTable::with_seed`, and a restart changes nothing.
pub fn found(mode: Mode, namespace: Option<std::os::fd::BorrowedFd<'_>>, hooks: Option<&Hooks>) -> Result<Seed, Error> {
    match mode {
        Mode::Nftables => Nftables::new(Socket::open(namespace)?).read(),
        Mode::Iptables | Mode::Userspace => Ok(Seed::default()),
        Mode::Ebpf => Ebpf::new(pinned(namespace, hooks)?).read(),
        Mode::Ipvs => ipvs::Socket::open(namespace).map(|_| Seed::default()).map_err(Error::from),
    }
}

/// Whether this kernel can do what the mode needs. The ebpf mode loads and attaches its programs, which do nothing until
/// they are told of Services.
pub fn prepare(mode: Mode, namespace: Option<std::os::fd::BorrowedFd<'_>>, hooks: Option<&Hooks>) -> Result<(), Error> {
    match mode {
        Mode::Nftables | Mode::Iptables | Mode::Userspace => Ok(()),
        Mode::Ipvs => Ok(ipvs::Socket::open(namespace)?.prepare(&[])?),
        Mode::Ebpf => Ok(pinned(namespace, hooks)?.attach()?),
    }
}

fn pinned(namespace: Option<std::os::fd::BorrowedFd<'_>>, hooks: Option<&Hooks>) -> Result<Pinned, Error> {
    Ok(Pinned::open(OBJECT, LAYOUT, hooks.ok_or(Error::NoHooks)?.clone(), namespace)?)
}

/// Keeps the kernel true to the table until the token is cancelled; then returns and leaves the rules in place, so that
/// Services go on answering. An error is returned only if the mode cannot start at all.
pub async fn run(
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    token: CancellationToken,
) -> Result<(), Error> {
    let localhost = localhost(&config, &feed, &token)?;
    let result = hold(config, feed, status, token).await.map(drop);
    if let Some(task) = localhost {
        // It ends with the token; without the mode it is of no use.
        task.abort();
        drop(task.await);
    }
    result
}

/// Relays for node ports on 127.0.0.1 and ::1 beside another mode, if they are asked for: the userspace mode as it is
/// without privileges, over the same table.
pub(crate) fn localhost(
    config: &Config,
    feed: &Feed,
    token: &CancellationToken,
) -> Result<Option<JoinHandle<Result<Kept, Error>>>, Error> {
    if config.mode == Mode::Userspace || !config.node.borrow().relay_localhost {
        return Ok(None);
    }
    let held = config.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)?;
    let relays = Sockets::new(place(held)?, Handle::current(), eyes::relayed::Witness::blind());
    let config = Config {
        mode: Mode::Userspace,
        node: config.node.clone(),
        namespace: None,
        hooks: None,
        // Of the mode beside it commits are told.
        metrics: Arc::default(),
        watching: Watching { ejection: false, ..Watching::default() },
    };
    let feed = Feed { table: feed.table.clone(), changes: feed.changes.resubscribe() };
    let dataplane = Userspace::<Socket, Sockets>::new(None, relays);
    let status = Arc::new(watch::channel(Status::default()).0);
    let kernel = Kernel { dataplane, conntrack: None, clear: None };
    Ok(Some(tokio::spawn(Loop::new(kernel, config, feed, status).run(token.clone()))))
}

fn place(namespace: Option<OwnedFd>) -> Result<Place, Error> {
    Ok(match namespace {
        Some(namespace) => Place::Within(Netns::from_fd(namespace)?),
        None => Place::Here,
    })
}

/// One mode, and what must outlive it while connections that it took are on their way to it.
pub(crate) async fn hold(
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    token: CancellationToken,
) -> Result<Kept, Error> {
    let namespace = || config.namespace.as_ref().map(|namespace| namespace.as_fd());
    let conntrack: Option<Box<dyn Conntrack>> = match conntrack::Socket::open(namespace()) {
        Ok(socket) => Some(Box::new(socket)),
        // That mode does without, and says what it does not do then.
        Err(error) if config.mode == Mode::Userspace && error.is_forbidden() => None,
        Err(error) => return Err(error.into()),
    };
    if config.mode.is_translated_by_netfilter() {
        match Socket::open(namespace()).and_then(|mut nft| keeper::keep(&mut nft)) {
            // Without privileges nothing is translated.
            Err(error) if config.mode == Mode::Userspace && error.is_forbidden() => {}
            kept => kept?,
        }
    }
    let hold = || config.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace);
    let (mode, held, hooks) = (config.mode, hold()?, config.hooks.clone());
    let clear: Option<Clear> = Some(Box::new(move || {
        leftovers::clear_others(mode, hooks.as_ref(), held.as_ref().map(|namespace| namespace.as_fd()))
    }));
    let status = Arc::new(status);
    let watcher = eyes::start_if_wanted(&config, &feed, &status, &token)?;
    match mode {
        Mode::Nftables => {
            let dataplane = Nftables::new(Socket::open(namespace())?);
            Loop::new(Kernel { dataplane, conntrack, clear }, config, feed, status).watched_by(watcher).run(token).await
        }
        Mode::Iptables => {
            let held = hold()?;
            let tools = tokio::task::spawn_blocking(move || Tools::open(held)).await.map_err(Error::Commit)??;
            let dataplane = Iptables::new(tools);
            Loop::new(Kernel { dataplane, conntrack, clear }, config, feed, status).watched_by(watcher).run(token).await
        }
        Mode::Ipvs => {
            let mut kernel = ipvs::Socket::open(namespace())?;
            // What is missing is said before anything is promised.
            kernel.prepare(&[])?;
            let dataplane = Ipvs::new(kernel, Socket::open(namespace())?);
            Loop::new(Kernel { dataplane, conntrack, clear }, config, feed, status).watched_by(watcher).run(token).await
        }
        Mode::Ebpf => {
            let dataplane = Ebpf::new(pinned(namespace(), config.hooks.as_ref())?);
            Loop::new(Kernel { dataplane, conntrack, clear }, config, feed, status).run(token).await
        }
        Mode::Userspace => {
            let nft = userspace::open(namespace())?;
            let place = place(hold()?)?;
            let (witness, watcher) = eyes::relayed::start(
                &config.watching,
                place.clone(),
                feed.table.clone(),
                status.clone(),
                token.clone(),
            );
            let relays = Sockets::new(place, Handle::current(), witness);
            let clear = clear.filter(|_| nft.is_some());
            let kernel = Kernel { dataplane: Userspace::new(nft, relays), conntrack, clear };
            Loop::new(kernel, config, feed, status).watched_by(Some(watcher)).run(token).await
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
    status: Arc<watch::Sender<Status>>,
    watcher: Option<Watcher>,
    /// What the kernel holds.
    committed: HashMap<FrontendId, Arc<Frontend>>,
    /// For which node `committed` was rendered.
    node: Option<Arc<NodeView>>,
    pending: BTreeSet<FrontendId>,
    /// When the data path wants to be tended.
    tend_at: Option<Instant>,
    applied: Applied,
    end: End,
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
    fn new(kernel: Kernel<D>, config: Config, feed: Feed, status: Arc<watch::Sender<Status>>) -> Self {
        Loop {
            kernel: Some(kernel),
            config,
            feed,
            status,
            watcher: None,
            committed: HashMap::new(),
            node: None,
            pending: BTreeSet::new(),
            tend_at: None,
            applied: Applied::default(),
            end: End::default(),
        }
    }

    /// With somebody who says which endpoints do not answer.
    fn watched_by(self, watcher: Option<Watcher>) -> Self {
        Loop { watcher, ..self }
    }

    async fn run(mut self, token: CancellationToken) -> Result<Kept, Error> {
        let result = self.follow(&token).await;
        self.end.finish().await;
        if let Some(watcher) = self.watcher.take() {
            // It ends with the token; without the loop it has nobody to talk to.
            watcher.task.abort();
            drop(watcher.task.await);
        }
        result.map(|()| self.kernel.and_then(|kernel| kernel.dataplane.retire()))
    }

    async fn follow(&mut self, token: &CancellationToken) -> Result<(), Error> {
        if let Some(kernel) = &self.kernel {
            let about = kernel.dataplane.about();
            self.status.send_modify(|status| status.about = about);
        }
        let namespace = self.config.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)?;
        self.end = End::new(namespace, self.config.mode)?;
        let mut attempt = Attempt::Whole;
        let mut back_off = FIRST_RETRY;
        let mut retry_at: Option<Instant> = None;
        let mut changes_open = true;
        let mut node_open = true;
        let mut judged = false;
        let mut guard = self.guard();
        let mut repaired: Option<Instant> = None;
        loop {
            let work = attempt == Attempt::Whole || !self.pending.is_empty() || judged;
            if work && retry_at.is_none() && self.read_table().is_synced() {
                // A large commit is cheaper if the kernel tells nobody of it.
                let is_large = attempt == Attempt::Whole || self.pending.len() > LARGE;
                if is_large {
                    listen(&mut guard, false);
                }
                let committed = self.commit(attempt).await;
                if is_large {
                    listen(&mut guard, true);
                }
                match committed {
                    Ok(Watched::Known) => {
                        attempt = Attempt::Together;
                        judged = false;
                        back_off = FIRST_RETRY;
                    }
                    Ok(Watched::Unknown) => {
                        attempt = Attempt::Whole;
                        retry_at = Some(Instant::now() + back_off);
                        back_off = (back_off * 2).min(LAST_RETRY);
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
                    let now = self.config.node.borrow().clone();
                    match &self.node {
                        Some(before) if before.differs_in_ejected_only(&now) => judged = true,
                        _ => attempt = Attempt::Whole,
                    }
                }
                () = verdicts_change(&mut self.watcher) => judged = true,
                edit = guard::edit(&mut guard) => match edit {
                    Ok(edit) => {
                        let table = guard.as_ref().map(Guard::table).unwrap_or_default();
                        tracing::warn!("proxy: {} changed table {table}, which is the proxy's own; it is made right", edit.by);
                        if let Some(kernel) = self.kernel.as_mut().filter(|_| edit.rules) {
                            kernel.dataplane.distrust();
                        }
                        self.status.send_modify(|status| status.repairs += 1);
                        attempt = Attempt::Whole;
                        // Who insists must not keep both busy.
                        let again = repaired.filter(|last| last.elapsed() < REPAIR_PAUSE);
                        retry_at = again.map(|last| last + REPAIR_PAUSE).or(retry_at);
                        repaired = Some(retry_at.unwrap_or_else(Instant::now));
                    }
                    Err(error) => {
                        tracing::warn!("proxy: {error}; changes of its table by others go unnoticed until it is restarted");
                        guard = None;
                    }
                },
                received = self.feed.changes.recv(), if changes_open => match received {
                    Ok(changes) => self.notice(&changes),
                    Err(broadcast::error::RecvError::Lagged(_)) => attempt = Attempt::Whole,
                    Err(broadcast::error::RecvError::Closed) => changes_open = false,
                },
                () = async { sleep_until(retry_at.unwrap_or_else(Instant::now)).await }, if retry_at.is_some() => {
                    retry_at = None;
                }
                () = async { sleep_until(self.tend_at.unwrap_or_else(Instant::now)).await }, if self.tend_at.is_some() => {
                    self.tend().await?;
                }
            }
            // Whatever else has happened meanwhile goes into the same commit.
            while let Ok(changes) = self.feed.changes.try_recv() {
                self.notice(&changes);
            }
            let (pending, applied) = (self.pending.len(), self.applied.settle(&self.pending));
            self.status.send_if_modified(|status| {
                let before = std::mem::replace(&mut status.applied, applied.clone());
                std::mem::replace(&mut status.pending, pending) != pending || !Arc::ptr_eq(&before, &applied)
            });
        }
    }

    /// Somebody who notices when others change our table. Without it Services work all the same.
    fn guard(&self) -> Option<Guard> {
        let table = self.kernel.as_ref()?.dataplane.own_table()?;
        let namespace = self.config.namespace.as_ref().map(|namespace| namespace.as_fd());
        let guard = Guard::open(namespace, table);
        guard.inspect_err(|error| tracing::warn!("proxy: {error}; changes of its table by others go unnoticed")).ok()
    }

    fn notice(&mut self, changes: &Changes) {
        self.config.metrics.noticed(changes);
        self.pending.extend(changes.frontends.iter().map(|change| change.id));
        self.applied.notice(changes);
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, ServiceTable> {
        // A writer that panicked left a table that is whole: each event is applied in one call.
        self.feed.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node, with what this proxy itself knows of endpoints that do not answer; and frozen listeners.
    fn view(&mut self) -> (Arc<NodeView>, BTreeSet<SocketAddr>) {
        let node = self.config.node.borrow_and_update().clone();
        let Some(watcher) = &mut self.watcher else { return (node, BTreeSet::new()) };
        let verdicts = watcher.verdicts.borrow_and_update().clone();
        if verdicts.ejected.is_empty() {
            return (node, verdicts.frozen.clone());
        }
        let mut view = NodeView::clone(&node);
        view.ejected.extend(&verdicts.ejected);
        (Arc::new(view), verdicts.frozen.clone())
    }

    /// Frontends that have an endpoint which has left the pick or is back in it.
    fn judged(&self, node: &NodeView) -> BTreeSet<FrontendId> {
        let before = self.node.as_ref().map(|node| &node.ejected);
        let changed: BTreeSet<Target> = match before {
            Some(before) => before.symmetric_difference(&node.ejected).copied().collect(),
            None => node.ejected.clone(),
        };
        if changed.is_empty() {
            return BTreeSet::new();
        }
        // Rare, and a walk over a hundred thousand frontends takes milliseconds: no index is worth its memory.
        let is_hit = |frontend: &Frontend| {
            let protocol = frontend.name.protocol;
            frontend.endpoints.iter().any(|endpoint| changed.contains(&(endpoint.address, protocol)))
        };
        self.committed.iter().filter(|(_, frontend)| is_hit(frontend)).map(|(id, _)| *id).collect()
    }

    /// Says once of each Service what of it the mode cannot do.
    fn tell_unsupported(&self, changes: &[Change<D::Entries>]) {
        let mut told = self.status.borrow().unsupported.clone();
        for change in changes {
            let what = change.after.as_ref().and_then(D::unsupported);
            let Some(what) = what else {
                told.remove(&change.id);
                continue;
            };
            let name = self.read_table().frontend(change.id).map(|frontend| frontend.name.to_string());
            let what = format!("{}: {what}", name.unwrap_or_default());
            if told.get(&change.id) != Some(&what) {
                tracing::warn!("proxy: {what}");
                told.insert(change.id, what);
            }
        }
        self.status.send_if_modified(|status| {
            let differs = status.unsupported != told;
            if differs {
                status.unsupported = told;
            }
            differs
        });
    }

    async fn commit(&mut self, attempt: Attempt) -> Result<Watched, Error> {
        let (node, frozen) = self.view();
        D::check(&node)?;
        let whole = attempt == Attempt::Whole;
        let ids: BTreeSet<FrontendId> = if whole {
            let table = self.read_table();
            table.frontends().map(|frontend| frontend.id).chain(self.committed.keys().copied()).collect()
        } else {
            self.pending.iter().copied().chain(self.judged(&node)).collect()
        };
        let slices;
        let after: Vec<(FrontendId, Option<Arc<Frontend>>)> = {
            let table = self.read_table();
            slices = whole.then(|| table.terminating_slices());
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
        let mut table = self.watcher.as_mut().and_then(|watcher| watcher.table.take());
        let alternatives: Vec<(Alternatives, Alternatives)> = after
            .iter()
            .filter(|_| table.is_some())
            .map(|(id, after)| {
                let before = before_node.as_ref().zip(self.committed.get(id));
                let before = before.map(|(node, before)| Alternatives::new(before, node)).unwrap_or_default();
                let after = after.as_ref().map(|after| Alternatives::new(after, &node)).unwrap_or_default();
                (before, after)
            })
            .collect();
        self.tell_unsupported(&changes);
        let base = whole.then(|| D::base(&node));
        let apart = attempt == Attempt::Apart;
        let begun = Instant::now();
        let mut kernel = self.kernel.take().expect("a commit gives it back");
        let (kernel, table, result, watched) = tokio::task::spawn_blocking(move || {
            let result = commit(&mut kernel, whole, apart, base.as_ref(), &changes, answerers);
            let result = result.and_then(|()| kernel.dataplane.tend());
            // What Services need comes first, and does not wait for this.
            let watch = |table: &mut WatchTable<Socket>| table.commit(whole, &alternatives, &frozen);
            let watched = if result.is_ok() { table.as_mut().map(watch) } else { None };
            if whole {
                // A whole plan takes twice the memory of what is kept of it, and comes once.
                drop((changes, alternatives));
                linux::memory::trim();
            }
            (kernel, table, result, watched)
        })
        .await
        .map_err(Error::Commit)?;
        self.kernel = Some(kernel);
        self.config.metrics.committed(whole, begun.elapsed(), result.is_ok());
        if let Some(watcher) = &mut self.watcher {
            watcher.table = table;
        }
        self.tend_at = result?.map(|after| Instant::now() + after);
        for (id, after) in after {
            self.pending.remove(&id);
            self.end.notice(self.committed.get(&id), after.as_ref(), &node);
            match after {
                Some(after) => drop(self.committed.insert(id, after)),
                None => drop(self.committed.remove(&id)),
            }
        }
        let (ejected, mode) = (node.ejected.clone(), self.config.mode);
        self.node = Some(node);
        if let Some(slices) = slices {
            self.applied.restart(slices);
        }
        let (pending, applied) = (self.pending.len(), self.applied.settle(&self.pending));
        self.status.send_modify(|status| {
            status.ejected = ejected;
            status.synced = true;
            status.mode = Some(mode);
            status.commits += 1;
            status.pending = pending;
            status.applied = applied;
            status.error = None;
        });
        Ok(match watched {
            Some(Err(error)) => {
                tracing::warn!("proxy: {error}; endpoints that do not answer may stay in the pick");
                self.status.send_modify(|status| status.watch_error = Some(error.to_string()));
                Watched::Unknown
            }
            Some(Ok(())) | None => Watched::Known,
        })
    }
}

impl<D: Dataplane> Loop<D> {
    async fn tend(&mut self) -> Result<(), Error> {
        let mut kernel = self.kernel.take().expect("a commit gives it back");
        let (kernel, result) = tokio::task::spawn_blocking(move || {
            let result = kernel.dataplane.tend();
            (kernel, result)
        })
        .await
        .map_err(Error::Commit)?;
        self.kernel = Some(kernel);
        let after = result.unwrap_or_else(|error| {
            tracing::warn!("proxy: {error}");
            Some(LAST_RETRY)
        });
        self.tend_at = after.map(|after| Instant::now() + after);
        Ok(())
    }
}

/// Whether the watch's own table is what it should be.
enum Watched {
    Known,
    Unknown,
}

/// Returns when other endpoints are out than before.
fn listen(guard: &mut Option<Guard>, listens: bool) {
    if let Some(held) = guard
        && let Err(error) = held.listen(listens)
    {
        tracing::warn!("proxy: {error}; changes of its table by others go unnoticed until it is restarted");
        *guard = None;
    }
}

async fn verdicts_change(watcher: &mut Option<Watcher>) {
    if let Some(watcher) = watcher
        && watcher.verdicts.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
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
    } else if base.is_some() || !changes.is_empty() {
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
