//! Revisioned keys, compare-and-set transactions, watch from a revision, compaction.
//!
//! One trait, three stores: [`LogStore`] is the embedded durable one, [`EtcdStore`] speaks to a real etcd, [`MemoryStore`]
//! is for tests. The words and their meaning are etcd's: one number, the revision, counts transactions that changed
//! something; every key remembers the revision that created it and the one that changed it last.

mod error;
mod etcd;
mod index;
mod log;
mod memory;
mod watch;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

pub use error::Error;
pub use etcd::{EtcdOptions, EtcdStore, EtcdTls};
pub use index::HistoryLimits;
pub use log::{LogOptions, LogStore};
pub use memory::MemoryStore;

/// Counts transactions that changed something. An empty store is at 1; the first write gets 2.
pub type Revision = u64;

/// A key as it stands, or stood, at some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: Arc<str>,
    pub value: Bytes,
    /// The transaction that made the key; a deleted and remade key has a new one.
    pub create_revision: Revision,
    /// The transaction that wrote `value`.
    pub mod_revision: Revision,
}

/// What must hold for a transaction to commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key exists and was last changed at exactly this revision.
    Unchanged(String, Revision),
    /// The key exists.
    Present(String),
}

impl Compare {
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::Unchanged(key, _) | Self::Present(key) => key,
        }
    }

    /// Whether it holds for the key's present state.
    pub fn holds(&self, current: Option<&KeyValue>) -> bool {
        match self {
            Self::Absent(_) => current.is_none(),
            Self::Unchanged(_, revision) => current.is_some_and(|kv| kv.mod_revision == *revision),
            Self::Present(_) => current.is_some(),
        }
    }
}

/// One effect of a transaction. Deleting a key that does not exist is no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put { key: String, value: Bytes },
    Delete { key: String },
}

impl Op {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All of `ops` at one revision if all of `compare` hold, else nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    pub compare: Vec<Compare>,
    pub ops: Vec<Op>,
}

impl Txn {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compare.push(compare);
        self
    }

    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into() });
        self
    }

    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    /// Refuses what stores would not agree on: an empty key, revision 0, or one key twice among `ops` (as etcd does).
    pub fn validate(&self) -> Result<(), Error> {
        let keys = self.compare.iter().map(Compare::key).chain(self.ops.iter().map(Op::key));
        if keys.into_iter().any(str::is_empty) {
            return Err(Error::Invalid("a key is empty: give every compare and every op a key".into()));
        }
        if let Some(Compare::Unchanged(key, _)) = self.compare.iter().find(|c| matches!(c, Compare::Unchanged(_, 0))) {
            return Err(Error::Invalid(format!(
                "no key is of revision 0, not even {key:?}: ask for Absent if that is meant"
            )));
        }
        let mut written: Vec<&str> = self.ops.iter().map(Op::key).collect();
        written.sort_unstable();
        match written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::Invalid(format!("key {:?} is written twice: merge the two ops", pair[0]))),
            None => Ok(()),
        }
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Durable. The revision is the transaction's own, or the store's present one if nothing had to change.
    Committed(Revision),
    /// `compare[index]` is the first that does not hold; `current` is the key it names.
    Failed { index: usize, current: Option<KeyValue> },
}

/// One page of a list, in key order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The revision this is a picture of: the one asked for, else the store's present one. Watch from here misses nothing.
    pub revision: Revision,
    pub items: Vec<KeyValue>,
    /// Keys follow the last item.
    pub more: bool,
    /// How many keys follow the last item.
    pub remaining: u64,
}

/// What one transaction did to the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    pub revision: Revision,
    /// In the order of the transaction's ops; never empty.
    pub events: Vec<WatchEvent>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    pub key: Arc<str>,
    pub revision: Revision,
    pub kind: EventKind,
    /// The value before, if the key existed.
    pub previous: Option<Bytes>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// It is a creation if `create_revision` is the event's own revision.
    Put {
        value: Bytes,
        create_revision: Revision,
    },
    Delete,
}

/// Batches in order of revision, each once. An error is the last item; watch again from the last revision seen, or
/// list again if it is [`Error::Compacted`].
pub type WatchStream = BoxStream<'static, Result<WatchBatch, Error>>;

/// A revisioned key-value store.
///
/// Every answer is linearizable: a read sees all writes acknowledged before it began. A `commit` whose future is
/// dropped, or that ends in [`Error::Unavailable`], may or may not have happened.
pub trait Store: Send + Sync + 'static {
    /// The key, and the store's revision at that moment.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Revision, Option<KeyValue>), Error>>;

    /// Keys that start with `prefix` (all keys if it is empty) and sort after `after`; at most `limit` of them (0: all);
    /// as they are now, or as they were at revision `at` (0 is the same as now).
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<Listing, Error>>;

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, Error>>;

    /// Every change under `prefix` after revision `from` (the first one wanted is `from + 1`), then the ones to come.
    /// `Compacted` comes from here or as the stream's first item.
    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream, Error>>;

    /// Forgets what is older than `revision`: it stays readable itself, as do watches from it. Asking twice is fine.
    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), Error>>;

    fn revision(&self) -> BoxFuture<'_, Result<Revision, Error>>;

    /// An error if writes would be refused now.
    fn health(&self) -> BoxFuture<'_, Result<(), Error>>;
}
