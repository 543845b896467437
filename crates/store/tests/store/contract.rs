//! The contract of `trait Store`, case by case. Each case gets a store of its own, without keys.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::{BoxFuture, join_all};
use store::{Compare, Error, EventKind, Listing, Outcome, Revision, Store, Txn, WatchBatch, WatchStream};

type Shared = Arc<dyn Store>;
type Case = fn(Shared) -> BoxFuture<'static, ()>;

macro_rules! cases {
    ($($name:ident)*) => { const CASES: &[(&str, Case)] = &[$((stringify!($name), |store| Box::pin($name(store)))),*]; };
}

cases! {
    empty_store
    keys_remember_their_revisions
    one_revision_per_transaction
    first_failing_compare_is_named
    failed_transaction_changes_nothing
    nothing_to_do_takes_no_revision
    invalid_transactions_are_refused
    prefixes_are_exact
    pages_make_the_whole
    past_can_be_listed
    future_cannot_be_listed
    compaction_forgets_the_past_only
    watch_tells_past_and_present_once
    watch_of_an_exact_moment
    watch_from_the_future
    watch_resumes_without_loss
    counters_lose_no_increment
    values_are_any_bytes
}

/// Runs every case on the store that `make` gives for its name.
pub async fn run(make: impl AsyncFn(&'static str) -> Shared) {
    let fresh = make("fresh").await;
    assert_eq!(fresh.revision().await.expect("it answers"), 1, "an empty store is at revision 1");
    assert_eq!(commit(&fresh, Txn::new().put("key", "value")).await, 2, "the first write gets revision 2");
    drop(fresh);
    for &(name, case) in CASES {
        println!("case {name}");
        let store = make(name).await;
        case(store.clone()).await;
        store.health().await.expect("the store is well after the case");
    }
}

async fn commit(store: &Shared, txn: Txn) -> Revision {
    match store.commit(txn).await.expect("the store takes the transaction") {
        Outcome::Committed(revision) => revision,
        failed => panic!("the transaction should commit: {failed:?}"),
    }
}

async fn put(store: &Shared, key: &str, value: &str) -> Revision {
    commit(store, Txn::new().put(key, value.to_owned())).await
}

async fn value(store: &Shared, key: &str) -> Option<String> {
    let (_, kv) = store.get(key).await.expect("it answers");
    kv.map(|kv| String::from_utf8_lossy(&kv.value).into_owned())
}

async fn list(store: &Shared, prefix: &str, after: Option<&str>, limit: usize, at: Option<Revision>) -> Listing {
    store.list(prefix, after, limit, at).await.expect("it answers")
}

fn text(listing: &Listing) -> String {
    let items = listing.items.iter().map(|kv| format!("{}={}", kv.key, String::from_utf8_lossy(&kv.value)));
    items.collect::<Vec<_>>().join(" ")
}

async fn watch(store: &Shared, prefix: &str, from: Revision) -> WatchStream {
    store.watch(prefix, from).await.expect("the watch starts")
}

async fn next(stream: &mut WatchStream) -> WatchBatch {
    let next = tokio::time::timeout(Duration::from_secs(20), stream.next()).await.expect("an event comes in time");
    next.expect("the watch goes on").expect("the watch is well")
}

/// `+key=value` is a creation, `~key=old>new` a change, `-key=old` a deletion.
fn events(batch: &WatchBatch) -> String {
    let string = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let events = batch.events.iter().map(|event| {
        assert_eq!(event.revision, batch.revision);
        let old = event.previous.as_ref().map(string);
        match (&event.kind, old) {
            (EventKind::Put { value, create_revision }, None) => {
                assert_eq!(*create_revision, batch.revision, "a key without a previous value is created now");
                format!("+{}={}", event.key, string(value))
            }
            (EventKind::Put { value, create_revision }, Some(old)) => {
                assert!(*create_revision < batch.revision, "a changed key was created before");
                format!("~{}={old}>{}", event.key, string(value))
            }
            (EventKind::Delete, old) => format!("-{}={}", event.key, old.unwrap_or_default()),
        }
    });
    events.collect::<Vec<_>>().join(" ")
}

async fn empty_store(store: Shared) {
    let now = store.revision().await.expect("it answers");
    assert_eq!(store.get("key").await.expect("it answers"), (now, None));
    let nothing = Listing { revision: now, items: Vec::new(), more: false, remaining: 0 };
    assert_eq!(list(&store, "", None, 0, None).await, nothing);
    assert_eq!(list(&store, "a", Some("b"), 3, Some(now)).await, nothing);
    assert_eq!(list(&store, "a", None, 0, Some(0)).await, nothing, "revision 0 stands for now");
}

async fn keys_remember_their_revisions(store: Shared) {
    let made = put(&store, "key", "1").await;
    let changed = put(&store, "key", "2").await;
    assert_eq!(changed, made + 1);
    let (now, kv) = store.get("key").await.expect("it answers");
    let kv = kv.expect("the key is there");
    assert_eq!((now, &*kv.key, &*kv.value), (changed, "key", &b"2"[..]));
    assert_eq!((kv.create_revision, kv.mod_revision), (made, changed));
    let deleted = commit(&store, Txn::new().delete("key")).await;
    assert_eq!(store.get("key").await.expect("it answers"), (deleted, None));
    let remade = put(&store, "key", "3").await;
    let kv = store.get("key").await.expect("it answers").1.expect("the key is there");
    assert_eq!((kv.create_revision, kv.mod_revision), (remade, remade), "a new life begins");
}

async fn one_revision_per_transaction(store: Shared) {
    let before = put(&store, "c", "old").await;
    let mut stream = watch(&store, "", before).await;
    let txn = Txn::new().put("b", "1").put("a", "2").delete("c").delete("never");
    let revision = commit(&store, txn).await;
    assert_eq!(revision, before + 1);
    let listing = list(&store, "", None, 0, None).await;
    assert_eq!(listing.revision, revision);
    assert_eq!(text(&listing), "a=2 b=1");
    assert!(listing.items.iter().all(|kv| kv.mod_revision == revision));
    let batch = next(&mut stream).await;
    assert_eq!((batch.revision, events(&batch).as_str()), (revision, "+b=1 +a=2 -c=old"));
}

async fn first_failing_compare_is_named(store: Shared) {
    let revision = put(&store, "key", "value").await;
    let kv = store.get("key").await.expect("it answers").1;
    let key = || "key".to_owned();
    let gone = || "gone".to_owned();
    let holds = [Compare::Absent(gone()), Compare::Present(key()), Compare::Unchanged(key(), revision)];
    let fails = [
        (Compare::Absent(key()), kv.clone()),
        (Compare::Present(gone()), None),
        (Compare::Unchanged(key(), revision - 1), kv.clone()),
        (Compare::Unchanged(key(), revision + 1), kv.clone()),
        (Compare::Unchanged(gone(), revision), None),
    ];
    for (compare, current) in &fails {
        for index in 0..=holds.len() {
            let mut txn = Txn { compare: holds[..index].to_vec(), ops: Vec::new() }.put("effect", "");
            txn.compare.extend([compare.clone(), Compare::Absent(key())]);
            let expected = Outcome::Failed { index, current: current.clone() };
            assert_eq!(store.commit(txn).await.expect("it answers"), expected, "{compare:?}");
        }
    }
    assert_eq!(value(&store, "effect").await, None);
    commit(&store, Txn { compare: holds.to_vec(), ops: Vec::new() }.put("effect", "")).await;
    assert_eq!(value(&store, "effect").await.as_deref(), Some(""));
}

async fn failed_transaction_changes_nothing(store: Shared) {
    let before = put(&store, "a", "1").await;
    let txn = Txn::new().when(Compare::Absent("a".into())).put("b", "2").delete("a");
    assert!(matches!(store.commit(txn).await, Ok(Outcome::Failed { index: 0, .. })));
    let after = list(&store, "", None, 0, None).await;
    assert_eq!((after.revision, text(&after).as_str()), (before, "a=1"));
}

async fn nothing_to_do_takes_no_revision(store: Shared) {
    let before = put(&store, "a", "1").await;
    let mut stream = watch(&store, "", before).await;
    assert_eq!(commit(&store, Txn::new()).await, before);
    assert_eq!(commit(&store, Txn::new().delete("b").delete("c")).await, before);
    assert_eq!(commit(&store, Txn::new().when(Compare::Present("a".into())).delete("b")).await, before);
    let same = put(&store, "a", "1").await;
    assert_eq!(same, before + 1, "the same value again is a change");
    assert_eq!(events(&next(&mut stream).await), "~a=1>1");
}

async fn invalid_transactions_are_refused(store: Shared) {
    let before = store.revision().await.expect("it answers");
    let invalid = [
        Txn::new().put("", "1"),
        Txn::new().delete(""),
        Txn::new().when(Compare::Absent(String::new())).put("a", "1"),
        Txn::new().put("a", "1").put("a", "2"),
        Txn::new().put("a", "1").put("b", "1").delete("a"),
        Txn::new().when(Compare::Unchanged("a".into(), 0)).put("a", "1"),
    ];
    for txn in invalid {
        let outcome = store.commit(txn.clone()).await;
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{txn:?}: {outcome:?}");
    }
    assert_eq!(store.revision().await.expect("it answers"), before);
}

async fn prefixes_are_exact(store: Shared) {
    let txn = Txn::new().put("a", "1").put("a/", "2").put("a/b", "3").put("a/b/c", "4").put("a0", "5").put("b", "6");
    commit(&store, txn).await;
    let cases = [
        ("", None, "a=1 a/=2 a/b=3 a/b/c=4 a0=5 b=6"),
        ("a", None, "a=1 a/=2 a/b=3 a/b/c=4 a0=5"),
        ("a/", None, "a/=2 a/b=3 a/b/c=4"),
        ("a/b", None, "a/b=3 a/b/c=4"),
        ("c", None, ""),
        ("a/", Some(""), "a/=2 a/b=3 a/b/c=4"),
        ("a/", Some("a"), "a/=2 a/b=3 a/b/c=4"),
        ("a/", Some("a/"), "a/b=3 a/b/c=4"),
        ("a/", Some("a/a"), "a/b=3 a/b/c=4"),
        ("a/", Some("a/b/c"), ""),
        ("a/", Some("a0"), ""),
        ("a/", Some("z"), ""),
        ("", Some("a/b/c"), "a0=5 b=6"),
    ];
    for (prefix, after, expected) in cases {
        let listing = list(&store, prefix, after, 0, None).await;
        assert_eq!(text(&listing), expected, "{prefix:?} after {after:?}");
        assert_eq!((listing.more, listing.remaining), (false, 0));
    }
}

async fn pages_make_the_whole(store: Shared) {
    for start in [0, 50] {
        let keys = start..start + 50;
        commit(&store, keys.fold(Txn::new(), |txn, n| txn.put(format!("item/{n:03}"), n.to_string()))).await;
    }
    commit(&store, Txn::new().put("item", "").put("itemize", "")).await;
    let whole = list(&store, "item/", None, 0, None).await;
    assert_eq!(whole.items.len(), 100);
    for limit in [1, 7, 50, 99, 100, 101] {
        let mut items = Vec::new();
        loop {
            let after = items.last().map(|kv: &store::KeyValue| kv.key.clone());
            let page = list(&store, "item/", after.as_deref(), limit, Some(whole.revision)).await;
            assert!(page.items.len() <= limit);
            items.extend(page.items);
            assert_eq!(page.remaining, 100 - items.len() as u64, "limit {limit}");
            assert_eq!(page.more, page.remaining > 0);
            if !page.more {
                break;
            }
        }
        assert_eq!(items, whole.items, "limit {limit}");
    }
}

async fn past_can_be_listed(store: Shared) {
    let first = commit(&store, Txn::new().put("k/a", "1").put("k/c", "1")).await;
    put(&store, "k/a", "2").await;
    put(&store, "k/a", "3").await;
    let deleted = commit(&store, Txn::new().delete("k/a").put("k/b", "4")).await;
    put(&store, "k/a", "5").await;
    put(&store, "other", "6").await;
    let last = commit(&store, Txn::new().delete("k/c").put("k/d", "7")).await;
    let cases = [
        (first - 1, ""),
        (first, "k/a=1 k/c=1"),
        (first + 1, "k/a=2 k/c=1"),
        (first + 2, "k/a=3 k/c=1"),
        (deleted, "k/b=4 k/c=1"),
        (deleted + 1, "k/a=5 k/b=4 k/c=1"),
        (last - 1, "k/a=5 k/b=4 k/c=1"),
        (last, "k/a=5 k/b=4 k/d=7"),
    ];
    for (at, expected) in cases {
        let listing = list(&store, "k/", None, 0, Some(at)).await;
        assert_eq!((listing.revision, text(&listing).as_str()), (at, expected));
        let page = list(&store, "k/", Some("k/a"), 1, Some(at)).await;
        let after: Vec<_> = listing.items.iter().filter(|kv| &*kv.key > "k/a").collect();
        assert_eq!(page.items.iter().collect::<Vec<_>>(), after[..after.len().min(1)], "at {at}");
        assert_eq!(page.remaining, after.len().saturating_sub(1) as u64);
        // What a client does: list, then watch from the list's revision.
        let mut stream = watch(&store, "other", listing.revision).await;
        if at < last - 1 {
            assert_eq!(events(&next(&mut stream).await), "+other=6");
        }
    }
    let kv = list(&store, "k/a", None, 0, Some(first + 2)).await.items.remove(0);
    assert_eq!((kv.create_revision, kv.mod_revision), (first, first + 2), "the revisions of then");
}

async fn future_cannot_be_listed(store: Shared) {
    let now = put(&store, "a", "1").await;
    for ahead in [1, 1000, u64::MAX - now] {
        let listing = store.list("a", None, 0, Some(now + ahead)).await;
        assert!(matches!(listing, Err(Error::Future { requested }) if requested > now), "{listing:?}");
    }
}

async fn compaction_forgets_the_past_only(store: Shared) {
    let first = put(&store, "a", "1").await;
    let second = put(&store, "a", "2").await;
    let third = commit(&store, Txn::new().delete("a").put("b", "3")).await;
    let fourth = put(&store, "b", "4").await;
    store.compact(third).await.expect("the past can be forgotten");
    store.compact(third).await.expect("and once more");
    store.compact(first).await.expect("and what is forgotten already");
    for gone in [first, second] {
        let listing = store.list("", None, 0, Some(gone)).await;
        assert!(matches!(listing, Err(Error::Compacted { .. })), "{listing:?}");
        let error = match store.watch("", gone).await {
            Err(error) => error,
            Ok(mut stream) => stream.next().await.expect("an item").expect_err("the past is forgotten"),
        };
        assert!(matches!(error, Error::Compacted { .. }), "{error}");
    }
    assert_eq!(text(&list(&store, "", None, 0, Some(third)).await), "b=3");
    assert_eq!(text(&list(&store, "", None, 0, None).await), "b=4");
    let batch = next(&mut watch(&store, "", third).await).await;
    assert_eq!((batch.revision, batch.events.len()), (fourth, 1));
    assert!(matches!(store.compact(fourth + 1).await, Err(Error::Future { .. })));
    put(&store, "c", "5").await;
    assert_eq!(text(&list(&store, "", None, 0, None).await), "b=4 c=5");
}

async fn watch_tells_past_and_present_once(store: Shared) {
    let start = put(&store, "w/a", "1").await;
    put(&store, "w/a", "2").await;
    put(&store, "x", "other").await;
    commit(&store, Txn::new().put("w/b", "3").put("x", "again").delete("w/a")).await;
    let mut all = watch(&store, "w/", start - 1).await;
    let mut some = watch(&store, "w/", start).await;
    let mut none = watch(&store, "w/", store.revision().await.expect("it answers")).await;
    assert_eq!(events(&next(&mut all).await), "+w/a=1");
    for stream in [&mut all, &mut some] {
        assert_eq!(events(&next(stream).await), "~w/a=1>2");
        assert_eq!(events(&next(stream).await), "+w/b=3 -w/a=2");
    }
    put(&store, "x", "quiet").await;
    let live = put(&store, "w/a", "4").await;
    for stream in [&mut all, &mut some, &mut none] {
        let batch = next(stream).await;
        assert_eq!((batch.revision, events(&batch).as_str()), (live, "+w/a=4"));
    }
}

/// A watch of one key's prefix started while the key is written: it begins exactly where it was told to.
async fn watch_of_an_exact_moment(store: Shared) {
    let mut last = put(&store, "key", "0").await;
    for round in 1..20 {
        let wanted = round.to_string();
        let (stream, written) = tokio::join!(watch(&store, "key", last), put(&store, "key", &wanted));
        let mut stream = stream;
        let batch = next(&mut stream).await;
        assert_eq!((batch.revision, batch.events.len()), (written, 1));
        last = written;
    }
}

async fn watch_from_the_future(store: Shared) {
    let now = put(&store, "key", "0").await;
    let mut stream = watch(&store, "key", now + 2).await;
    for value in ["1", "2", "3"] {
        put(&store, "key", value).await;
    }
    assert_eq!(events(&next(&mut stream).await), "~key=2>3");
}

/// Watches that break off after a few batches and go on from the last one seen, while others write.
async fn watch_resumes_without_loss(store: Shared) {
    const WRITERS: usize = 8;
    const WRITES: usize = 25;
    let start = store.revision().await.expect("it answers");
    let writers = (0..WRITERS).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for write in 0..WRITES {
                put(&store, &format!("r/{writer}"), &write.to_string()).await;
                put(&store, &format!("noise/{writer}"), "").await;
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut seen = start;
    let mut counts = [0; WRITERS];
    let mut breaks = 1;
    while counts.iter().sum::<usize>() < WRITERS * WRITES {
        let mut stream = watch(&store, "r/", seen).await;
        for _ in 0..breaks {
            let batch = next(&mut stream).await;
            assert!(batch.revision > seen, "in order, and none twice");
            seen = batch.revision;
            for event in &batch.events {
                let writer: usize = event.key.trim_start_matches("r/").parse().expect("a number");
                let EventKind::Put { value, .. } = &event.kind else { panic!("nothing is deleted") };
                assert_eq!(&value[..], counts[writer].to_string().as_bytes(), "none is lost");
                counts[writer] += 1;
            }
            if counts.iter().sum::<usize>() == WRITERS * WRITES {
                break;
            }
        }
        breaks = breaks % 13 + 1;
    }
    for writer in writers {
        writer.await.expect("the writer ends well");
    }
    assert_eq!(counts, [WRITES; WRITERS]);
}

/// 64 writers, each adding 1 five times by compare-and-set.
async fn counters_lose_no_increment(store: Shared) {
    let start = put(&store, "counter", "0").await;
    let writers = (0..64).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut current = store.get("counter").await.expect("it answers").1;
            let mut done = 0;
            while done < 5 {
                let kv = current.clone().expect("the counter is never deleted");
                let count: u64 = std::str::from_utf8(&kv.value).expect("digits").parse().expect("a number");
                let txn = Txn::new().when(Compare::Unchanged("counter".into(), kv.mod_revision));
                match store.commit(txn.put("counter", (count + 1).to_string())).await.expect("it answers") {
                    Outcome::Failed { current: newer, .. } => current = newer,
                    Outcome::Committed(_) => {
                        done += 1;
                        current = store.get("counter").await.expect("it answers").1;
                    }
                }
            }
        })
    });
    for writer in join_all(writers).await {
        writer.expect("the writer ends well");
    }
    assert_eq!(value(&store, "counter").await.as_deref(), Some("320"));
    assert_eq!(store.revision().await.expect("it answers"), start + 320, "failed ones took no revision");
}

async fn values_are_any_bytes(store: Shared) {
    let all: Bytes = (0..=255).collect();
    let large: Bytes = all.repeat(4096).into();
    let keys = ["/", "//", "a b", "schlüssel/鍵", "quote\"'`", "new\nline", "a\u{1}"];
    for (n, key) in keys.into_iter().enumerate() {
        for value in [Bytes::new(), all.clone(), if n == 0 { large.clone() } else { all.clone() }] {
            let revision = commit(&store, Txn::new().put(key, value.clone())).await;
            let kv = store.get(key).await.expect("it answers").1.expect("the key is there");
            assert_eq!((&*kv.key, &kv.value), (key, &value));
            let mut stream = watch(&store, key, revision - 1).await;
            let batch = next(&mut stream).await;
            assert!(matches!(&batch.events[0].kind, EventKind::Put { value: seen, .. } if *seen == value));
        }
    }
    let mut sorted = keys.to_vec();
    sorted.sort_unstable();
    let listing = list(&store, "", None, 0, None).await;
    assert_eq!(listing.items.iter().map(|kv| &*kv.key).collect::<Vec<_>>(), sorted, "in the order of their bytes");
}
