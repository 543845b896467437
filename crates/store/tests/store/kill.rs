//! `kill -9` of a process that writes: everything it was told is durable is there afterwards.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use futures::future::join_all;
use store::{LogOptions, LogStore, Store, Txn};

use crate::scratch::Scratch;

const DIRECTORY: &str = "FAIRLEAD_TEST_STORE";

fn options() -> LogOptions {
    LogOptions { segment_bytes: 64 << 10, snapshot_bytes: 256 << 10, ..LogOptions::default() }
}

/// Not a test of its own but the process that the next one kills.
#[tokio::test(flavor = "multi_thread")]
async fn child_writes_until_killed() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let store = Arc::new(LogStore::open(&directory, options()).expect("the log opens"));
    let writers = (0..16).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for write in 0_u64.. {
                let txn = Txn::new().put(format!("{writer}/{write}"), vec![b'x'; 700]);
                store.commit(txn).await.expect("it commits");
                println!("acknowledged {writer}/{write}");
            }
        })
    });
    join_all(writers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_a_kill() {
    let scratch = Scratch::new();
    let mut acknowledged = Vec::new();
    for round in 1..=5 {
        let mut child = Command::new(std::env::current_exe().expect("a test has a binary"))
            .args(["--exact", "kill::child_writes_until_killed", "--nocapture", "--test-threads=1"])
            .env(DIRECTORY, scratch.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary can be executed");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines().map_while(Result::ok);
        // The harness may print before the first of ours on the same line.
        let keys = lines.filter_map(|line| line.split_once("acknowledged ").map(|(_, key)| key.to_owned()));
        let before = acknowledged.len();
        for key in keys {
            acknowledged.push(key);
            if acknowledged.len() == before + 300 * round {
                child.kill().expect("it is our child");
            }
        }
        child.wait().expect("it is our child");
        assert!(acknowledged.len() >= before + 300 * round, "the child wrote before it was killed");
        let store = LogStore::open(scratch.path(), options()).expect("a kill leaves a log that opens");
        for key in &acknowledged {
            let (_, kv) = store.get(key).await.expect("it answers");
            assert_eq!(kv.map(|kv| kv.value.len()), Some(700), "{key} was acknowledged");
        }
    }
}
