//! The loop that keeps the kernel true to the table.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use services::{Changes, Frontend, FrontendId, ServiceTable};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::applied::Applied;
use crate::commit::{Attempt, Kernel, commit};
use crate::dataplane::{Answerers, Change, Dataplane, Kept};
use crate::end::End;
use crate::guard::{self, Guard};
use crate::stale;
use crate::watch::{Alternatives, Target, WatchTable, Watcher};
use crate::{Config, Error, Feed, Mode, NodeView, Status, Unsupported};

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// Between two repairs of what somebody else changes.
const REPAIR_PAUSE: Duration = Duration::from_secs(1);
/// So many changed frontends are a large commit.
const LARGE: usize = 64;

pub struct Loop<D> {
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
    /// Other nodes take packets, or do so no longer, and the data path has not been told: no Service asked for it.
    takers_wait: bool,
}

impl<D: Dataplane> Loop<D> {
    pub fn new(kernel: Kernel<D>, config: Config, feed: Feed, status: Arc<watch::Sender<Status>>) -> Self {
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
            takers_wait: false,
        }
    }

    /// With somebody who says which endpoints do not answer.
    pub fn watched_by(self, watcher: Option<Watcher>) -> Self {
        Loop { watcher, ..self }
    }

    pub async fn run(mut self, token: CancellationToken) -> Result<Kept, Error> {
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
        self.end = End::new(namespace, &self.config)?;
        let mut attempt = Attempt::Whole;
        let mut back_off = FIRST_RETRY;
        let mut retry_at: Option<Instant> = None;
        let mut changes_open = true;
        let mut node_open = true;
        let mut judged = false;
        let mut guard = self.guard();
        let mut repaired: Option<Instant> = None;
        loop {
            if self.takers_wait && self.asks_for_takers() {
                attempt = Attempt::Whole;
            }
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
                        attempt = attempt.next();
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
                        Some(before) if before.differs_in_ejected_only(&now, self.goes_past(&now, self.committed.values())) => {
                            self.takers_wait |= before.takers != now.takers;
                            judged = true;
                        }
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

    /// Whether one of these answers past this node: then other nodes matter.
    fn goes_past<'a>(&self, node: &NodeView, mut frontends: impl Iterator<Item = &'a Arc<Frontend>>) -> bool {
        let asks = |frontend: &Arc<Frontend>| frontend.direct_return.unwrap_or(node.direct_return);
        self.config.mode == Mode::Ebpf && frontends.any(asks)
    }

    /// Whether a change is the first that does.
    fn asks_for_takers(&self) -> bool {
        let (table, node) = (self.read_table(), self.config.node.borrow().clone());
        self.goes_past(&node, self.pending.iter().filter_map(|id| table.frontend(*id)))
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
            let frontend = self.read_table().frontend(change.id).cloned();
            let (Some(after), Some(frontend)) = (&change.after, frontend) else {
                told.remove(&change.id);
                continue;
            };
            let mode = self.config.mode;
            let ignored =
                mode.ignores(frontend.selection).into_iter().chain(mode.ignores_direct_return(frontend.direct_return));
            let what = D::unsupported(after).into_iter().chain(self.end.unsupported(&frontend)).chain(ignored);
            let what: Vec<&'static str> = what.collect();
            if what.is_empty() {
                told.remove(&change.id);
                continue;
            }
            let now = Unsupported { name: frontend.name.clone(), what };
            if told.get(&change.id) != Some(&now) {
                tracing::warn!("proxy: {now}");
                told.insert(change.id, now);
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
        let mut changes: Vec<Change<D::Entries>> = after
            .iter()
            .map(|(id, after)| Change {
                id: *id,
                before: before_node
                    .as_ref()
                    .and_then(|node| self.committed.get(id).map(|before| D::entries(before, node))),
                after: after.as_ref().map(|after| D::entries(after, &node)),
            })
            .collect();
        // What a mode cannot do may be all that a Service says anew.
        self.tell_unsupported(&changes);
        changes.retain(|change| whole || change.before != change.after);
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
        let base = whole.then(|| D::base(&node));
        let apart = attempt == Attempt::Apart;
        let begun = Instant::now();
        let mut kernel = self.kernel.take().expect("a commit gives it back");
        let (kernel, table, result, watched) = tokio::task::spawn_blocking(move || {
            let result = commit(&mut kernel, whole, apart, base.as_ref(), &changes, answerers);
            let result = result.and_then(|()| kernel.tend());
            // What Services need comes first, and does not wait for this.
            let watch = |table: &mut Box<WatchTable>| table.commit(whole, &alternatives, &frozen);
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
        if whole {
            self.takers_wait = false;
        }
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

    async fn tend(&mut self) -> Result<(), Error> {
        let mut kernel = self.kernel.take().expect("a commit gives it back");
        let (kernel, result) = tokio::task::spawn_blocking(move || {
            let result = kernel.tend();
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

/// Has the guard hear of changes, or not: while it does not, the kernel tells nobody.
fn listen(guard: &mut Option<Guard>, listens: bool) {
    if let Some(held) = guard
        && let Err(error) = held.listen(listens)
    {
        tracing::warn!("proxy: {error}; changes of its table by others go unnoticed until it is restarted");
        *guard = None;
    }
}

/// Returns when other endpoints are out than before.
async fn verdicts_change(watcher: &mut Option<Watcher>) {
    if let Some(watcher) = watcher
        && watcher.verdicts.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
