//! Random histories, against a model that keeps every state of the store there ever was.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use store::{
    Compare, Error, EtcdOptions, EtcdStore, EventKind, KeyValue, Listing, LogOptions, LogStore, MemoryStore, Op,
    Outcome, Revision, Store, Txn, WatchBatch, WatchEvent,
};

use crate::etcd::Etcd;
use crate::scratch::Scratch;

const STEPS: u64 = 30;
const KEYS: [&str; 8] = ["a", "a/", "a/b", "a/c", "a0", "b", "b/a", "c"];
const PREFIXES: [&str; 7] = ["", "a", "a/", "a/b", "b", "c", "d"];

fn cases() -> u64 {
    match std::env::var("FAIRLEAD_CASES") {
        Ok(cases) => cases.parse().expect("FAIRLEAD_CASES is a number"),
        Err(_) => 200,
    }
}

/// SplitMix64: a seed is a history.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

type State = BTreeMap<&'static str, KeyValue>;

struct Model {
    revision: Revision,
    states: BTreeMap<Revision, State>,
    batches: Vec<WatchBatch>,
    /// From here on, everything must be answered.
    kept: Revision,
    /// Before this, nothing may be.
    compacted: Revision,
}

impl Model {
    fn new(revision: Revision) -> Self {
        let states = BTreeMap::from([(revision, State::new())]);
        Self { revision, states, batches: Vec::new(), kept: revision, compacted: 0 }
    }

    fn now(&self) -> &State {
        &self.states[&self.revision]
    }

    fn commit(&mut self, txn: &Txn) -> Outcome {
        let failing = txn.compare.iter().enumerate().find_map(|(index, compare)| {
            let current = self.now().get(compare.key());
            let holds = match compare {
                Compare::Absent(_) => current.is_none(),
                Compare::Present(_) => current.is_some(),
                Compare::Unchanged(_, revision) => current.map(|kv| kv.mod_revision) == Some(*revision),
            };
            (!holds).then(|| Outcome::Failed { index, current: current.cloned() })
        });
        if let Some(failed) = failing {
            return failed;
        }
        let revision = self.revision + 1;
        let mut state = self.now().clone();
        let mut events = Vec::new();
        for op in &txn.ops {
            let key = KEYS.into_iter().find(|key| *key == op.key()).expect("one of ours");
            let before = state.remove(key);
            let previous = before.as_ref().map(|kv| kv.value.clone());
            let kind = match op {
                Op::Put { value, .. } => {
                    let create_revision = before.map_or(revision, |kv| kv.create_revision);
                    let kv =
                        KeyValue { key: key.into(), value: value.clone(), create_revision, mod_revision: revision };
                    state.insert(key, kv);
                    EventKind::Put { value: value.clone(), create_revision }
                }
                Op::Delete { .. } if before.is_none() => continue,
                Op::Delete { .. } => EventKind::Delete,
            };
            events.push(WatchEvent { key: key.into(), revision, kind, previous });
        }
        if !events.is_empty() {
            self.revision = revision;
            self.states.insert(revision, state);
            self.batches.push(WatchBatch { revision, events });
        }
        Outcome::Committed(self.revision)
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize, at: Revision) -> Listing {
        let wanted = |key: &str| key.starts_with(prefix) && after.is_none_or(|after| key > after);
        let mut items: Vec<_> = self.states[&at].values().filter(|kv| wanted(&kv.key)).cloned().collect();
        let all = items.len();
        items.truncate(if limit == 0 { all } else { limit });
        let remaining = (all - items.len()) as u64;
        Listing { revision: at, items, more: remaining > 0, remaining }
    }

    fn since(&self, prefix: &str, from: Revision) -> Vec<WatchBatch> {
        let later = self.batches.iter().filter(|batch| batch.revision > from);
        let cut = later.map(|batch| WatchBatch {
            revision: batch.revision,
            events: batch.events.iter().filter(|event| event.key.starts_with(prefix)).cloned().collect(),
        });
        cut.filter(|batch| !batch.events.is_empty()).collect()
    }
}

fn random_txn(random: &mut Random, model: &Model, step: u64) -> Txn {
    let mut txn = Txn::new();
    for _ in 0..random.below(3) {
        let key = random.pick(&KEYS).to_owned();
        let current = model.now().get(key.as_str()).map(|kv| kv.mod_revision);
        // Mostly what holds, so that most transactions commit.
        txn.compare.push(match (random.below(8), current) {
            (0, _) => Compare::Absent(key),
            (1, _) => Compare::Present(key),
            (2, _) => Compare::Unchanged(key, model.revision),
            (3..6, Some(revision)) => Compare::Unchanged(key, revision),
            (_, Some(_)) => Compare::Present(key),
            (_, None) => Compare::Absent(key),
        });
    }
    for _ in 0..random.below(5) {
        let key = random.pick(&KEYS);
        if txn.ops.iter().any(|op| op.key() == key) {
            continue;
        }
        if random.below(3) == 0 {
            txn = txn.delete(key);
        } else {
            let fill = "x".repeat(random.below(64) as usize);
            txn = txn.put(key, format!("{step}{fill}"));
        }
    }
    txn
}

/// Everything that can be asked, at every moment there was.
async fn compare_all(store: &dyn Store, model: &Model, random: &mut Random) {
    assert_eq!(store.revision().await.expect("it answers"), model.revision);
    for key in KEYS {
        assert_eq!(store.get(key).await.expect("it answers"), (model.revision, model.now().get(key).cloned()));
    }
    for at in model.states.keys().copied() {
        let prefix = random.pick(&PREFIXES);
        let after = if random.below(2) == 0 { None } else { Some(random.pick(&KEYS)) };
        let limit = random.below(5) as usize;
        match store.list(prefix, after, limit, Some(at)).await {
            Ok(listing) => {
                assert!(at >= model.compacted, "revision {at} is compacted");
                assert_eq!(listing, model.list(prefix, after, limit, at), "{prefix:?} after {after:?} at {at}");
            }
            Err(Error::Compacted { .. }) => assert!(at < model.kept, "revision {at} must still be there"),
            Err(error) => panic!("list at {at}: {error}"),
        }
    }
    let from = random.pick(&model.states.keys().copied().collect::<Vec<_>>());
    let prefix = random.pick(&PREFIXES);
    let expected = model.since(prefix, from);
    let stream = match store.watch(prefix, from).await {
        Ok(stream) => stream,
        Err(Error::Compacted { .. }) => return assert!(from < model.kept, "revision {from} must still be there"),
        Err(error) => panic!("watch from {from}: {error}"),
    };
    assert!(from >= model.compacted, "revision {from} is compacted");
    let seen = stream.take(expected.len()).map(|batch| batch.expect("the watch goes on")).collect::<Vec<_>>();
    let seen = tokio::time::timeout(Duration::from_secs(20), seen).await.expect("the events come in time");
    assert_eq!(seen, expected, "watch of {prefix:?} from {from}");
}

/// `reopen` closes a store and opens it again, or gives it back as it is.
/// Closes a store and opens it again.
type Reopen<'a> = &'a dyn Fn(Arc<dyn Store>) -> Arc<dyn Store>;

async fn run(seed: u64, mut store: Arc<dyn Store>, reopen: Option<Reopen<'_>>) {
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut model = Model::new(store.revision().await.expect("it answers"));
    let mut live = store.watch("", model.revision).await.expect("the watch starts");
    let mut told = model.revision;
    for step in 0..STEPS {
        let txn = random_txn(&mut random, &model, step);
        let outcome = store.commit(txn.clone()).await.expect("it answers");
        assert_eq!(outcome, model.commit(&txn), "step {step}: {txn:?}");
        match (random.below(20), reopen) {
            (0, _) => {
                let revision = model.kept + random.below(model.revision - model.kept + 1);
                store.compact(revision).await.expect("it forgets");
                model.compacted = revision;
                model.kept = revision;
            }
            (1, Some(reopen)) => {
                store = reopen(store);
                // It may have forgotten what is older than its snapshot, and may have forgotten that it forgot.
                model.kept = model.revision;
                model.compacted = 0;
                live = store.watch("", model.revision).await.expect("the watch starts");
                told = model.revision;
            }
            (2, _) => compare_all(&*store, &model, &mut random).await,
            _ => {}
        }
        // A watch that lags behind a compaction may or may not have read what is forgotten.
        if told < model.compacted {
            live = store.watch("", model.revision).await.expect("the watch starts");
            told = model.revision;
        }
        if random.below(4) == 0 {
            for expected in model.since("", told) {
                let batch = tokio::time::timeout(Duration::from_secs(20), live.next()).await;
                let batch = batch.expect("the event comes in time").expect("the watch goes on");
                assert_eq!(batch.expect("the watch is well"), expected);
                told = expected.revision;
            }
        }
    }
    compare_all(&*store, &model, &mut random).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_agrees_with_the_model() {
    for seed in 0..cases() {
        run(seed, Arc::new(MemoryStore::new()), None).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_agrees_with_the_model_and_remembers() {
    for seed in 0..cases().div_ceil(4) {
        let scratch = Scratch::new();
        // From a segment per record and a snapshot every few, to one segment and none.
        let size = 64 << (seed % 8);
        let options = LogOptions { segment_bytes: size, snapshot_bytes: 4 * size, ..LogOptions::default() };
        let open =
            || -> Arc<dyn Store> { Arc::new(LogStore::open(scratch.path(), options.clone()).expect("the log opens")) };
        let reopen = |store: Arc<dyn Store>| {
            drop(store);
            open()
        };
        run(seed, open(), Some(&reopen)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_agrees_with_the_model() {
    let etcd = Etcd::start();
    for seed in 0..cases().div_ceil(20) {
        let mut options = EtcdOptions::new([etcd.url().to_owned()]);
        options.prefix = format!("/history-{seed}");
        run(seed, Arc::new(EtcdStore::connect(options).await.expect("etcd answers")), None).await;
    }
}

#[tokio::test]
async fn a_watch_that_falls_out_of_the_history_is_told() {
    let limits = store::HistoryLimits { batches: 10, bytes: 1 << 20 };
    let store = MemoryStore::with_limits(limits);
    let mut slow = store.watch("", 1).await.expect("the watch starts");
    for step in 0..100 {
        store.commit(Txn::new().put("key", Bytes::from(format!("{step}")))).await.expect("it commits");
    }
    assert!(matches!(slow.next().await, Some(Err(Error::Compacted { requested: 1 }))));
    assert!(slow.next().await.is_none());
    assert!(store.list("", None, 0, Some(91)).await.is_ok(), "ten steps back");
    assert!(matches!(store.list("", None, 0, Some(90)).await, Err(Error::Compacted { .. })));
}

#[tokio::test]
async fn a_memory_store_refuses_as_often_as_told() {
    let store = MemoryStore::new().refusing_every(10);
    let mut refused = 0;
    for step in 0..100 {
        match store.commit(Txn::new().put("key", Bytes::from(format!("{step}")))).await {
            Ok(_) => {}
            Err(Error::Unavailable(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(refused, 10);
    assert_eq!(store.revision().await.expect("it answers"), 91, "a refused commit has no effect");
}
