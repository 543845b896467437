//! The embedded durable store: a write-ahead log, an index in memory, snapshots.
//!
//! A commit is acknowledged after the sync of the log has returned, never before, so that an acknowledged write survives
//! the end of the process and of the power. Reads are answered from memory. The log's files:
//!
//! - `REVISION.wal`: a segment, with the records of the transactions after that revision (`segment`, `record`)
//! - `REVISION.snap`: all keys as of that revision; older segments and snapshots are then removed (`snapshot`)
//! - `lock`: held while the directory is open

mod crc32c;
mod directory;
mod record;
mod recovery;
mod segment;
mod snapshot;
mod writer;

use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock, RwLock};
use std::thread::{self, JoinHandle};

use futures::future::BoxFuture;
use tokio::sync::{oneshot, watch};

use self::directory::Directory;
use self::recovery::Recovered;
use self::writer::{Request, Writer};
use crate::index::{HistoryLimits, Index, SharedIndex};
use crate::{Error, KeyValue, Listing, Outcome, Revision, Store, Txn, WatchStream};

#[derive(Debug, Clone)]
pub struct LogOptions {
    /// A segment that has reached this size is followed by a new one.
    pub segment_bytes: u64,
    /// A snapshot is made whenever the log has grown by this much.
    pub snapshot_bytes: u64,
    pub history: HistoryLimits,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, snapshot_bytes: 64 << 20, history: HistoryLimits::default() }
    }
}

/// Dropping it waits for the write in progress, then releases the directory.
#[derive(Debug)]
pub struct LogStore {
    index: SharedIndex,
    /// Its sender is the writer's, so that watches end with the store.
    revisions: watch::Receiver<Revision>,
    requests: Sender<Request>,
    failure: Arc<OnceLock<Error>>,
    writer: Option<JoinHandle<()>>,
}

impl LogStore {
    /// Opens the store in `dir`, which is made if it does not exist, and reads it whole. Blocks the thread.
    pub fn open(dir: &Path, options: LogOptions) -> Result<Self, Error> {
        let directory = Directory::open(dir)?;
        let Recovered { index, segment, logged } = recovery::recover(&directory, &options)?;
        let (sender, receiver) = mpsc::channel();
        let (revisions, seen) = watch::channel(index.revision());
        let index = Arc::new(RwLock::new(index));
        let failure = Arc::new(OnceLock::new());
        let writer = Writer {
            directory: Arc::new(directory),
            options,
            index: index.clone(),
            revisions,
            requests: receiver,
            failure: failure.clone(),
            segment,
            logged,
            snapshot: None,
        };
        let thread = thread::Builder::new().name("store-log".into()).spawn(move || writer.run());
        let thread = thread.map_err(|e| Error::disk("start the thread that writes", dir, e))?;
        Ok(Self { index, revisions: seen, requests: sender, failure, writer: Some(thread) })
    }

    fn read<T>(&self, read: impl FnOnce(&Index) -> T) -> T {
        read(&self.index.read().expect("the index is never left locked by a panic"))
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(request(answer)).map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }
}

impl Drop for LogStore {
    fn drop(&mut self) {
        // The thread is gone already only if it panicked, which has been printed.
        self.requests.send(Request::Close).ok();
        if let Some(writer) = self.writer.take() {
            writer.join().ok();
        }
    }
}

impl Store for LogStore {
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
            let bytes = record::payload_len(&txn);
            if bytes > record::MAX_PAYLOAD {
                return Err(Error::TooLarge { bytes, limit: record::MAX_PAYLOAD });
            }
            self.ask(|answer| Request::Commit { txn, answer }).await
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream, Error>> {
        Box::pin(async move { crate::watch::stream(self.index.clone(), self.revisions.clone(), prefix, from) })
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.ask(move |answer| Request::Compact { revision, answer }))
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, Error>> {
        Box::pin(async move { Ok(self.read(Index::revision)) })
    }

    fn health(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.failure.get().map_or(Ok(()), |error| Err(error.clone())) })
    }
}
