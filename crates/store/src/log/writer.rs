//! The one thread that writes.
//!
//! It takes all transactions that wait, decides them in order, appends the records of those that commit, syncs once,
//! and only then applies them, tells the watchers and answers. What it has decided but not yet synced lies over the index
//! where only it can see it, so that no reader ever sees what a crash could take back.

use std::collections::HashMap;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use tokio::sync::{oneshot, watch};

use super::LogOptions;
use super::directory::{Directory, SEGMENT, SNAPSHOT};
use super::segment::Segment;
use super::{record, snapshot};
use crate::index::{self, Batch, Decision, SharedIndex};
use crate::{Error, KeyValue, Outcome, Revision, Txn};

/// A group is closed when its records reach this size: its writers should not wait for ever more of others.
const GROUP_BYTES: usize = 4 << 20;

pub(crate) enum Request {
    Commit { txn: Txn, answer: oneshot::Sender<Result<Outcome, Error>> },
    Compact { revision: Revision, answer: oneshot::Sender<Result<(), Error>> },
    Close,
}

pub(crate) struct Writer {
    pub directory: Arc<Directory>,
    pub options: LogOptions,
    pub index: SharedIndex,
    pub revisions: watch::Sender<Revision>,
    pub requests: Receiver<Request>,
    /// Set once: after a failed write or sync nobody knows what the disk holds, until it is read again.
    pub failure: Arc<OnceLock<Error>>,
    pub segment: Segment,
    pub logged: u64,
    pub snapshot: Option<JoinHandle<()>>,
}

/// Transactions that share one sync.
struct Group {
    /// The offset at which its records will be written.
    start: u64,
    records: Vec<u8>,
    batches: Vec<Batch>,
    /// The keys that `batches` change, as they leave them.
    changed: HashMap<Arc<str>, Option<KeyValue>>,
    /// The revision after `batches`.
    revision: Revision,
    answers: Vec<(oneshot::Sender<Result<Outcome, Error>>, Outcome)>,
}

impl Writer {
    /// Until told to close, or the store is gone.
    pub fn run(mut self) {
        let mut is_open = true;
        while is_open && let Ok(request) = self.requests.recv() {
            let mut group = self.new_group();
            let mut next = Some(request);
            while let Some(request) = next {
                match request {
                    Request::Commit { txn, answer } => self.admit(&mut group, txn, answer),
                    Request::Compact { revision, answer } => self.compact(revision, answer),
                    Request::Close => is_open = false,
                }
                let is_full = !is_open || group.records.len() >= GROUP_BYTES;
                next = if is_full { None } else { self.requests.try_recv().ok() };
            }
            self.finish(group);
            if let Err(error) = self.tidy() {
                self.fail(error);
            }
        }
        if let Some(snapshot) = self.snapshot.take() {
            // The directory must be quiet when its lock goes. The snapshot logs its own failure.
            snapshot.join().ok();
        }
    }

    fn new_group(&self) -> Group {
        Group {
            start: self.segment.end(),
            records: Vec::new(),
            batches: Vec::new(),
            changed: HashMap::new(),
            revision: self.index.read().expect("the index is never left locked by a panic").revision(),
            answers: Vec::new(),
        }
    }

    fn admit(&self, group: &mut Group, txn: Txn, answer: oneshot::Sender<Result<Outcome, Error>>) {
        if let Some(error) = self.failure.get() {
            // Nobody to tell if the caller has given up.
            answer.send(Err(error.clone())).ok();
            return;
        }
        let decision = {
            let index = self.index.read().expect("the index is never left locked by a panic");
            index::decide(txn, group.revision + 1, |key| match group.changed.get(key) {
                Some(changed) => changed.clone(),
                None => index.get(key),
            })
        };
        let outcome = match decision {
            Decision::Failed { index, current } => Outcome::Failed { index, current },
            Decision::Nothing => Outcome::Committed(group.revision),
            Decision::Change(batch) => {
                record::encode(&batch, group.start, &mut group.records);
                group.changed.extend(batch.changes.iter().map(|change| (change.key.clone(), change.after.clone())));
                group.revision = batch.revision;
                group.batches.push(batch);
                Outcome::Committed(group.revision)
            }
        };
        // Even a refusal waits for the sync: it may tell of a change that is not durable yet.
        group.answers.push((answer, outcome));
    }

    fn compact(&self, revision: Revision, answer: oneshot::Sender<Result<(), Error>>) {
        let mut index = self.index.write().expect("the index is never left locked by a panic");
        answer.send(index.compact(revision)).ok();
    }

    fn finish(&mut self, group: Group) {
        if !group.records.is_empty() {
            if let Err(error) = self.segment.append(&group.records) {
                for (answer, _) in group.answers {
                    answer.send(Err(error.clone())).ok();
                }
                self.fail(error);
                return;
            }
            self.logged += group.records.len() as u64;
            {
                let mut index = self.index.write().expect("the index is never left locked by a panic");
                group.batches.into_iter().for_each(|batch| index.apply(batch));
            }
            self.revisions.send_replace(group.revision);
        }
        for (answer, outcome) in group.answers {
            answer.send(Ok(outcome)).ok();
        }
    }

    fn fail(&self, error: Error) {
        tracing::error!(%error, "the store takes no more writes");
        // The first failure is the one to report.
        self.failure.set(error).ok();
    }

    /// Goes on to a new segment, and starts a snapshot, when it is time.
    fn tidy(&mut self) -> Result<(), Error> {
        if self.failure.get().is_some() {
            return Ok(());
        }
        let is_busy = self.snapshot.as_ref().is_some_and(|snapshot| !snapshot.is_finished());
        let is_due = self.logged >= self.options.snapshot_bytes && !is_busy;
        let is_full = self.segment.end() >= self.options.segment_bytes;
        if !(is_due || is_full) {
            return Ok(());
        }
        let (revision, items) = {
            let index = self.index.read().expect("the index is never left locked by a panic");
            (index.revision(), if is_due { index.items() } else { Vec::new() })
        };
        if self.segment.has_records() {
            let next = Segment::create(&self.directory, revision, self.options.segment_bytes)?;
            std::mem::replace(&mut self.segment, next).seal()?;
        }
        if is_due {
            self.logged = 0;
            self.snapshot = self.start_snapshot(revision, items);
        }
        Ok(())
    }

    /// Writes the snapshot beside the log and removes what it replaces. If that fails the log is merely longer.
    fn start_snapshot(&self, revision: Revision, items: Vec<KeyValue>) -> Option<JoinHandle<()>> {
        let directory = self.directory.clone();
        let write = move || {
            let written = snapshot::write(&directory, revision, &items)
                .and_then(|()| directory.remove_before(revision, SEGMENT))
                .and_then(|()| directory.remove_before(revision, SNAPSHOT));
            if let Err(error) = written {
                tracing::warn!(%error, revision, "the snapshot failed; the log is kept and the next one will try again");
            }
        };
        match thread::Builder::new().name("store-snapshot".into()).spawn(write) {
            Ok(thread) => Some(thread),
            Err(error) => {
                tracing::warn!(%error, revision, "cannot start the snapshot's thread; the next one will try again");
                None
            }
        }
    }
}
