//! The store for tests: an index and nothing else.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::index::{HistoryLimits, Index, SharedIndex};
use crate::{Error, KeyValue, Listing, Outcome, Revision, Store, Txn, WatchStream};

/// Keeps everything in memory and all of history up to its limits; can refuse commits so that callers' retries are tested.
#[derive(Debug)]
pub struct MemoryStore {
    index: SharedIndex,
    revisions: watch::Sender<Revision>,
    /// Every commit with this ordinal is refused. 0: none.
    refuse_every: u64,
    commits: AtomicU64,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::with_limits(HistoryLimits::default())
    }

    pub fn with_limits(limits: HistoryLimits) -> Self {
        Self {
            index: Arc::new(RwLock::new(Index::new(limits))),
            revisions: watch::Sender::new(1),
            refuse_every: 0,
            commits: AtomicU64::new(0),
        }
    }

    /// Refuses every `every`th commit with [`Error::Unavailable`], before it has any effect.
    #[must_use]
    pub fn refusing_every(mut self, every: u64) -> Self {
        self.refuse_every = every;
        self
    }

    fn read<T>(&self, read: impl FnOnce(&Index) -> T) -> T {
        read(&self.index.read().expect("the index is never left locked by a panic"))
    }

    fn write<T>(&self, write: impl FnOnce(&mut Index) -> T) -> T {
        let mut index = self.index.write().expect("the index is never left locked by a panic");
        let answer = write(&mut index);
        // Sent under the lock, so that revisions arrive in order.
        self.revisions.send_if_modified(|seen| std::mem::replace(seen, index.revision()) != index.revision());
        answer
    }

    fn is_refused(&self) -> bool {
        let ordinal = self.commits.fetch_add(1, Ordering::Relaxed) + 1;
        self.refuse_every != 0 && ordinal.is_multiple_of(self.refuse_every)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Store for MemoryStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Revision, Option<KeyValue>), Error>> {
        Box::pin(async move { Ok(self.read(|index| (index.revision(), index.get(key)))) })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<Listing, Error>> {
        Box::pin(async move { self.read(|index| index.list(prefix, after, limit, at)) })
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, Error>> {
        Box::pin(async move {
            txn.validate()?;
            if self.is_refused() {
                return Err(Error::Unavailable("a fault injected by a test".into()));
            }
            Ok(self.write(|index| index.commit(txn)))
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream, Error>> {
        Box::pin(async move { crate::watch::stream(self.index.clone(), self.revisions.subscribe(), prefix, from) })
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.write(|index| index.compact(revision)) })
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, Error>> {
        Box::pin(async move { Ok(self.read(Index::revision)) })
    }

    fn health(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { Ok(()) })
    }
}
