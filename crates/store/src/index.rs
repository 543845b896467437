//! The keys as they are now, and a bounded history of how they came to be so.
//!
//! Nothing here does I/O or waits: a transaction becomes a [`Decision`], a decision becomes a [`Batch`], and applying
//! batches in order is the only way the index changes. History serves watches and reads of the past.

use std::collections::btree_map::Range;
use std::collections::{BTreeMap, VecDeque};
use std::iter::Peekable;
use std::ops::Bound;
use std::sync::{Arc, RwLock};

use bytes::Bytes;

use crate::{Error, EventKind, KeyValue, Listing, Op, Outcome, Revision, Txn, WatchBatch, WatchEvent};

/// How much of the past a store keeps in memory for watches that resume and lists that continue.
#[derive(Debug, Clone, Copy)]
pub struct HistoryLimits {
    /// Transactions.
    pub batches: usize,
    /// Bytes of keys and values in them.
    pub bytes: usize,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { batches: 50_000, bytes: 16 << 20 }
    }
}

/// One key before and after a transaction.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub key: Arc<str>,
    pub before: Option<KeyValue>,
    pub after: Option<KeyValue>,
}

/// All changes of one revision.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub revision: Revision,
    pub changes: Vec<Change>,
}

impl Batch {
    fn bytes(&self) -> usize {
        let len = |kv: &Option<KeyValue>| kv.as_ref().map_or(0, |kv| kv.value.len());
        self.changes.iter().map(|change| change.key.len() + len(&change.before) + len(&change.after)).sum()
    }

    fn events(&self, prefix: &str) -> Vec<WatchEvent> {
        let seen = self.changes.iter().filter(|change| change.key.starts_with(prefix));
        seen.map(|change| WatchEvent {
            key: change.key.clone(),
            revision: self.revision,
            kind: match &change.after {
                Some(kv) => EventKind::Put { value: kv.value.clone(), create_revision: kv.create_revision },
                None => EventKind::Delete,
            },
            previous: change.before.as_ref().map(|kv| kv.value.clone()),
        })
        .collect()
    }
}

/// What a transaction comes to, given the keys it names.
pub(crate) enum Decision {
    Failed {
        index: usize,
        current: Option<KeyValue>,
    },
    /// All compares hold and no op has an effect.
    Nothing,
    Change(Batch),
}

/// Decides a transaction that would become revision `next`.
pub(crate) fn decide(txn: Txn, next: Revision, lookup: impl Fn(&str) -> Option<KeyValue>) -> Decision {
    for (index, compare) in txn.compare.iter().enumerate() {
        let current = lookup(compare.key());
        if !compare.holds(current.as_ref()) {
            return Decision::Failed { index, current };
        }
    }
    let mut changes = Vec::with_capacity(txn.ops.len());
    for op in txn.ops {
        let before = lookup(op.key());
        match op {
            Op::Put { key, value } => changes.push(put(key, value, before, next)),
            Op::Delete { .. } => {
                if let Some(kv) = before {
                    changes.push(Change { key: kv.key.clone(), before: Some(kv), after: None });
                }
            }
        }
    }
    if changes.is_empty() { Decision::Nothing } else { Decision::Change(Batch { revision: next, changes }) }
}

fn put(key: String, value: Bytes, before: Option<KeyValue>, next: Revision) -> Change {
    // One allocation per key, however often it is written and however long history remembers it.
    let key = before.as_ref().map_or_else(|| Arc::from(key), |kv| kv.key.clone());
    let create_revision = before.as_ref().map_or(next, |kv| kv.create_revision);
    let after = KeyValue { key: key.clone(), value, create_revision, mod_revision: next };
    Change { key, before, after: Some(after) }
}

/// Read by everybody, written by one.
pub(crate) type SharedIndex = Arc<RwLock<Index>>;

#[derive(Debug)]
pub(crate) struct Index {
    revision: Revision,
    /// The oldest revision that can be read, and watched from.
    oldest: Revision,
    keys: BTreeMap<Arc<str>, KeyValue>,
    /// Exactly the revisions after `oldest`, without a gap.
    history: VecDeque<Arc<Batch>>,
    history_bytes: usize,
    limits: HistoryLimits,
}

impl Index {
    pub fn new(limits: HistoryLimits) -> Self {
        Self::restored(1, Vec::new(), limits)
    }

    /// As a snapshot remembers it: without a past.
    pub fn restored(revision: Revision, items: Vec<KeyValue>, limits: HistoryLimits) -> Self {
        Self {
            revision,
            oldest: revision,
            keys: items.into_iter().map(|kv| (kv.key.clone(), kv)).collect(),
            history: VecDeque::new(),
            history_bytes: 0,
            limits,
        }
    }

    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn get(&self, key: &str) -> Option<KeyValue> {
        self.keys.get(key).cloned()
    }

    /// Every key, in order.
    pub fn items(&self) -> Vec<KeyValue> {
        self.keys.values().cloned().collect()
    }

    pub fn decide(&self, txn: Txn) -> Decision {
        decide(txn, self.revision + 1, |key| self.get(key))
    }

    /// Takes the next revision's batch.
    pub fn apply(&mut self, batch: Batch) {
        debug_assert_eq!(batch.revision, self.revision + 1, "batches come in order, without a gap");
        self.revision = batch.revision;
        for change in &batch.changes {
            match &change.after {
                Some(kv) => self.keys.insert(change.key.clone(), kv.clone()),
                None => self.keys.remove(&*change.key),
            };
        }
        self.history_bytes += batch.bytes();
        self.history.push_back(Arc::new(batch));
        while self.history.len() > self.limits.batches || self.history_bytes > self.limits.bytes {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        if let Some(batch) = self.history.pop_front() {
            self.history_bytes -= batch.bytes();
            self.oldest = batch.revision;
        }
    }

    /// Decides and applies: the whole life of a transaction in a store that has no disk.
    pub fn commit(&mut self, txn: Txn) -> Outcome {
        match self.decide(txn) {
            Decision::Failed { index, current } => Outcome::Failed { index, current },
            Decision::Nothing => Outcome::Committed(self.revision),
            Decision::Change(batch) => {
                self.apply(batch);
                Outcome::Committed(self.revision)
            }
        }
    }

    pub fn compact(&mut self, revision: Revision) -> Result<(), Error> {
        if revision > self.revision {
            return Err(Error::Future { requested: revision });
        }
        while self.history.front().is_some_and(|batch| batch.revision <= revision) {
            self.forget_first();
        }
        self.oldest = self.oldest.max(revision);
        Ok(())
    }

    pub fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<Listing, Error> {
        let revision = match at {
            None | Some(0) => self.revision,
            Some(at) if at > self.revision => {
                return Err(Error::Future { requested: at });
            }
            Some(at) if at < self.oldest => {
                return Err(Error::Compacted { requested: at });
            }
            Some(at) => at,
        };
        let undone = self.undone(prefix, revision);
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let range = (start, Bound::<&str>::Unbounded);
        let mut past = Merged {
            now: self.keys.range::<str, _>(range).peekable(),
            undone: undone.range::<str, _>(range).peekable(),
        }
        .take_while(|kv| kv.key.starts_with(prefix));
        let wanted = if limit == 0 { usize::MAX } else { limit };
        let items: Vec<KeyValue> = past.by_ref().take(wanted).cloned().collect();
        let remaining = past.count() as u64;
        Ok(Listing { revision, items, more: remaining > 0, remaining })
    }

    /// The keys under `prefix` that changed after `revision`, as they were then. (`None`: not there.)
    fn undone(&self, prefix: &str, revision: Revision) -> BTreeMap<Arc<str>, Option<KeyValue>> {
        let later = self.history.iter().rev().take_while(|batch| batch.revision > revision);
        later
            .flat_map(|batch| batch.changes.iter())
            .filter(|change| change.key.starts_with(prefix))
            .map(|change| (change.key.clone(), change.before.clone()))
            // Newest first, so the oldest change of a key is inserted last and stays.
            .collect()
    }

    /// At most `limit` batches after `from`, cut down to `prefix`, and the revision up to which they are complete.
    pub fn since(&self, from: Revision, prefix: &str, limit: usize) -> Result<(Vec<WatchBatch>, Revision), Error> {
        // Revision 1 is the empty store: nothing happened in it.
        let from = from.max(1);
        if from < self.oldest {
            return Err(Error::Compacted { requested: from });
        }
        let skip = usize::try_from(from - self.oldest).unwrap_or(usize::MAX);
        let mut complete = from;
        let mut found = Vec::new();
        for batch in self.history.iter().skip(skip).take(limit) {
            complete = batch.revision;
            let events = batch.events(prefix);
            if !events.is_empty() {
                found.push(WatchBatch { revision: batch.revision, events });
            }
        }
        Ok((found, complete))
    }
}

/// The keys of now with those of the past laid over them, in order.
struct Merged<'a> {
    now: Peekable<Range<'a, Arc<str>, KeyValue>>,
    undone: Peekable<Range<'a, Arc<str>, Option<KeyValue>>>,
}

impl<'a> Iterator for Merged<'a> {
    type Item = &'a KeyValue;

    fn next(&mut self) -> Option<&'a KeyValue> {
        loop {
            let next_now = self.now.peek().map(|(key, _)| *key);
            let next_undone = self.undone.peek().map(|(key, _)| *key);
            match (next_now, next_undone) {
                (Some(now), Some(undone)) if now < undone => return self.now.next().map(|(_, kv)| kv),
                (Some(_), None) => return self.now.next().map(|(_, kv)| kv),
                (None, None) => return None,
                (now, Some(undone)) => {
                    if now == Some(undone) {
                        self.now.next();
                    }
                    if let Some((_, Some(kv))) = self.undone.next() {
                        return Some(kv);
                    }
                }
            }
        }
    }
}
