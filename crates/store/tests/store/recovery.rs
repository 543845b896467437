//! What the log makes of a directory that a crash, a disk or a person has changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use store::{Error, LogOptions, LogStore, Outcome, Revision, Store, Txn};

use crate::scratch::Scratch;

const SEGMENT_HEADER: usize = 24;

fn open(directory: &Path) -> Result<LogStore, Error> {
    LogStore::open(directory, LogOptions::default())
}

/// A segment per few records, a snapshot per few segments.
fn tiny() -> LogOptions {
    LogOptions { segment_bytes: 512, snapshot_bytes: 4096, ..LogOptions::default() }
}

async fn put(store: &LogStore, key: &str, value: &str) -> Revision {
    match store.commit(Txn::new().put(key, value.to_owned())).await.expect("it commits") {
        Outcome::Committed(revision) => revision,
        failed => panic!("nothing was compared: {failed:?}"),
    }
}

async fn content(store: &LogStore) -> Vec<(String, String)> {
    let items = store.list("", None, 0, None).await.expect("it answers").items;
    items.into_iter().map(|kv| (kv.key.to_string(), String::from_utf8_lossy(&kv.value).into_owned())).collect()
}

fn files(directory: &Path, kind: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("it is a directory").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == kind)).collect();
    files.sort();
    files
}

/// Gives every segment a second name, under which it lives on with all that will be written to it.
fn link_segments(directory: &Path, aside: &Path) -> Vec<(PathBuf, PathBuf)> {
    let link = |path: PathBuf| {
        let kept = aside.join(path.file_name().expect("it is a file"));
        fs::hard_link(&path, &kept).expect("it can be linked");
        (kept, path)
    };
    files(directory, "wal").into_iter().map(link).collect()
}

fn numbered(range: std::ops::Range<usize>) -> Vec<(String, String)> {
    range.map(|n| (format!("key/{n:04}"), format!("value {n}"))).collect()
}

async fn write_numbered(store: &LogStore, range: std::ops::Range<usize>) {
    for (key, value) in numbered(range) {
        put(store, &key, &value).await;
    }
}

/// A log of `count` records in one segment, and the offset behind each record.
async fn short_log(directory: &Path, count: usize) -> (PathBuf, Vec<u8>, Vec<usize>) {
    write_numbered(&open(directory).expect("the log opens"), 0..count).await;
    let mut end = SEGMENT_HEADER;
    let records = numbered(0..count);
    let ends = records.iter().map(|(key, value)| {
        end += 24 + 4 + 1 + 4 + key.len() + 4 + value.len();
        end
    });
    let ends = ends.collect();
    let segment = files(directory, "wal").remove(0);
    let bytes = fs::read(&segment).expect("the segment can be read");
    (segment, bytes, ends)
}

#[tokio::test]
async fn a_log_cut_anywhere_keeps_the_whole_records_before_the_cut() {
    let scratch = Scratch::new();
    let (segment, bytes, ends) = short_log(scratch.path(), 6).await;
    for cut in SEGMENT_HEADER..=ends[5] + 1 {
        fs::write(&segment, &bytes[..cut]).expect("the segment can be written");
        let whole = ends.iter().filter(|end| **end <= cut).count();
        let store = open(scratch.path()).expect("a torn end is cut off");
        assert_eq!(content(&store).await, numbered(0..whole), "cut at {cut}");
        assert_eq!(put(&store, "next", "write").await, whole as u64 + 2, "cut at {cut}");
        drop(store);
        let store = open(scratch.path()).expect("the log opens");
        assert_eq!(content(&store).await.len(), whole + 1, "the write after the cut at {cut} is there");
    }
    for cut in 0..SEGMENT_HEADER {
        fs::write(&segment, &bytes[..cut]).expect("the segment can be written");
        assert_corrupt(open(scratch.path()), &segment, 0);
    }
}

#[track_caller]
fn assert_corrupt(opened: Result<LogStore, Error>, file: &Path, at: usize) {
    match opened {
        Err(Error::Corrupt { path, offset, .. }) => assert_eq!((path.as_path(), offset), (file, at as u64)),
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("{} is damaged at {at} and opens", file.display()),
    }
}

#[tokio::test]
async fn a_flipped_bit_is_found() {
    let scratch = Scratch::new();
    let (segment, bytes, ends) = short_log(scratch.path(), 5).await;
    let starts: Vec<usize> = [SEGMENT_HEADER].into_iter().chain(ends[..4].iter().copied()).collect();
    for at in 0..ends[4] + 9 {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&segment, &damaged).expect("the segment can be written");
        let opened = open(scratch.path());
        match starts.iter().rposition(|start| *start <= at) {
            None => assert_corrupt(opened, &segment, 0),
            Some(record) if record < 4 => assert_corrupt(opened, &segment, starts[record]),
            // The last record, or what follows it, may have been torn by a crash.
            Some(_) => {
                let whole = if at < ends[4] { 4 } else { 5 };
                assert_eq!(content(&opened.expect("a torn end is cut off")).await, numbered(0..whole), "at {at}");
            }
        }
    }
}

#[tokio::test]
async fn damage_in_an_older_segment_is_named() {
    let scratch = Scratch::new();
    let options = LogOptions { snapshot_bytes: u64::MAX, ..tiny() };
    let reopen = || LogStore::open(scratch.path(), options.clone());
    write_numbered(&reopen().expect("the log opens"), 0..100).await;
    let segments = files(scratch.path(), "wal");
    assert!(segments.len() > 5, "{segments:?}");
    let segment = &segments[2];
    let bytes = fs::read(segment).expect("the segment can be read");
    // Even its very end, which in the last segment would be a torn write.
    let mut damaged = bytes.clone();
    *damaged.last_mut().expect("it has records") ^= 1;
    fs::write(segment, &damaged).expect("the segment can be written");
    assert!(matches!(reopen(), Err(Error::Corrupt { path, .. }) if path == *segment));
    fs::write(segment, &bytes[..bytes.len() - 1]).expect("the segment can be written");
    assert!(matches!(reopen(), Err(Error::Corrupt { path, .. }) if path == *segment));
    fs::remove_file(segment).expect("it is there");
    assert!(matches!(reopen(), Err(Error::Corrupt { path, .. }) if path == segments[3]));
    fs::write(segment, &bytes).expect("the segment can be written");
    assert_eq!(content(&reopen().expect("all is as it was")).await, numbered(0..100));
    fs::remove_file(&segments[0]).expect("it is there");
    assert!(matches!(reopen(), Err(Error::Corrupt { .. })));
}

#[tokio::test]
async fn snapshots_replace_the_log_before_them() {
    let scratch = Scratch::new();
    let reopen = || LogStore::open(scratch.path(), tiny()).expect("the log opens");
    for round in 0..10 {
        let store = reopen();
        assert_eq!(content(&store).await, numbered(0..round * 100));
        write_numbered(&store, round * 100..(round + 1) * 100).await;
        assert_eq!(store.revision().await.expect("it answers"), (round as u64 + 1) * 100 + 1);
    }
    assert_eq!(files(scratch.path(), "snap").len(), 1);
    let size: u64 = files(scratch.path(), "wal").iter().map(|path| path.metadata().expect("it is there").len()).sum();
    assert!(files(scratch.path(), "wal").len() < 60, "old segments go");
    assert!(size < 4 << 20, "{size} bytes of log");
    let store = reopen();
    let kv = store.get("key/0000").await.expect("it answers").1.expect("the key is there");
    assert_eq!((kv.create_revision, kv.mod_revision), (2, 2), "snapshots keep revisions");
    let mut stream = store.watch("", 1001).await.expect("the watch starts");
    put(&store, "more", "").await;
    assert_eq!(stream.next().await.expect("an event").expect("of the write").revision, 1002);
}

#[tokio::test]
async fn a_crash_around_a_snapshot_does_no_harm() {
    let scratch = Scratch::new();
    let without = LogOptions { snapshot_bytes: u64::MAX, ..tiny() };
    write_numbered(&LogStore::open(scratch.path(), without).expect("the log opens"), 0..100).await;
    let aside = Scratch::new();
    let old = link_segments(scratch.path(), aside.path());
    let store = LogStore::open(scratch.path(), tiny()).expect("the log opens");
    write_numbered(&store, 100..101).await;
    drop(store);
    let snapshots = files(scratch.path(), "snap");
    assert_eq!(snapshots.len(), 1);
    // Died after the snapshot, before the old segments were removed, and in the middle of the next snapshot and segment.
    let mut brought_back = 0;
    for (kept, path) in &old {
        if !path.exists() {
            fs::copy(kept, path).expect("it can be copied");
            brought_back += 1;
        }
    }
    assert!(brought_back > 0, "the snapshot removed segments");
    for name in ["snapshot.tmp", "segment.tmp"] {
        fs::write(scratch.path().join(name), b"half of").expect("it can be written");
    }
    let store = LogStore::open(scratch.path(), tiny()).expect("the log opens");
    assert_eq!(content(&store).await, numbered(0..101));
    write_numbered(&store, 101..200).await;
    drop(store);
    assert_eq!(content(&open(scratch.path()).expect("the log opens")).await, numbered(0..200));
    assert!(!old[0].1.exists(), "what was left behind is removed later");
}

#[tokio::test]
async fn a_damaged_snapshot_is_named_unless_the_log_has_it_all() {
    let scratch = Scratch::new();
    let without = LogOptions { snapshot_bytes: u64::MAX, ..tiny() };
    write_numbered(&LogStore::open(scratch.path(), without).expect("the log opens"), 0..100).await;
    let aside = Scratch::new();
    let old = link_segments(scratch.path(), aside.path());
    let store = LogStore::open(scratch.path(), tiny()).expect("the log opens");
    write_numbered(&store, 100..101).await;
    drop(store);
    let snapshot = files(scratch.path(), "snap").remove(0);
    let mut bytes = fs::read(&snapshot).expect("it can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&snapshot, &bytes).expect("it can be written");
    assert!(matches!(open(scratch.path()), Err(Error::Corrupt { path, .. }) if path == snapshot));
    for (kept, path) in old.iter().filter(|(_, path)| !path.exists()) {
        fs::copy(kept, path).expect("it can be copied");
    }
    assert_eq!(content(&open(scratch.path()).expect("the log has it all")).await, numbered(0..101));
}

#[tokio::test]
async fn one_directory_has_one_owner_and_is_private() {
    let scratch = Scratch::new();
    let directory = scratch.path().join("made/on/the/way");
    let store = open(&directory).expect("the log opens");
    put(&store, "key", "value").await;
    assert!(matches!(open(&directory), Err(Error::Locked { path }) if path == directory.join("lock")));
    let mode = |path: &Path| path.metadata().expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    for file in fs::read_dir(&directory).expect("it is a directory") {
        assert_eq!(mode(&file.expect("an entry").path()), 0o600);
    }
    drop(store);
    assert_eq!(content(&open(&directory).expect("it is free again")).await.len(), 1);
}

/// The disk refuses a new segment: here because a directory is in its way.
#[tokio::test]
async fn a_failing_disk_stops_writes_and_loses_none() {
    let scratch = Scratch::new();
    let reopen = || LogStore::open(scratch.path(), tiny()).expect("the log opens");
    let store = reopen();
    let obstacle = scratch.path().join("segment.tmp");
    fs::create_dir(&obstacle).expect("the name is free");
    let mut acknowledged = 0;
    let error = loop {
        let (key, value) = numbered(acknowledged..acknowledged + 1).remove(0);
        match store.commit(Txn::new().put(key, value)).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged < 1000, "a segment is full long before");
    };
    assert!(acknowledged > 0);
    assert!(matches!(error, Error::Disk { .. }), "{error}");
    fs::remove_dir(&obstacle).expect("it is empty");
    assert!(store.commit(Txn::new().put("key", "")).await.is_err(), "refused until reopened");
    assert!(matches!(store.health().await, Err(Error::Disk { .. })));
    assert_eq!(content(&store).await, numbered(0..acknowledged), "reads go on");
    drop(store);
    let store = reopen();
    store.health().await.expect("all is well again");
    assert_eq!(content(&store).await, numbered(0..acknowledged));
    write_numbered(&store, acknowledged..acknowledged + 50).await;
}

#[tokio::test]
async fn too_large_a_transaction_is_refused_and_the_next_taken() {
    let scratch = Scratch::new();
    let store = open(scratch.path()).expect("the log opens");
    let refused = store.commit(Txn::new().put("key", vec![0; 33 << 20])).await;
    assert!(matches!(refused, Err(Error::TooLarge { .. })));
    assert!(store.commit(Txn::new().put("key", vec![1; 20 << 20])).await.is_ok());
    drop(store);
    let store = open(scratch.path()).expect("the log opens");
    assert_eq!(store.get("key").await.expect("it answers").1.map(|kv| kv.value.len()), Some(20 << 20));
}

#[tokio::test]
async fn watches_end_with_the_store() {
    let scratch = Scratch::new();
    let store = open(scratch.path()).expect("the log opens");
    let mut stream = store.watch("", 1).await.expect("the watch starts");
    put(&store, "key", "value").await;
    drop(store);
    assert!(stream.next().await.expect("the last event").is_ok());
    assert!(matches!(stream.next().await, Some(Err(Error::Closed))));
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn history_outlives_a_restart() {
    let scratch = Scratch::new();
    write_numbered(&open(scratch.path()).expect("the log opens"), 0..10).await;
    let store = open(scratch.path()).expect("the log opens");
    let seen: Vec<_> = store.watch("", 5).await.expect("the log has it").take(6).collect().await;
    let seen: Vec<_> = seen.into_iter().map(|batch| batch.expect("the watch is well").revision).collect();
    assert_eq!(seen, [6, 7, 8, 9, 10, 11]);
    assert_eq!(store.list("", None, 0, Some(5)).await.expect("the log has it").items.len(), 4);
}
