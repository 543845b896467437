//! What every store must do, and what a durable one must survive.

mod contract;
mod etcd;
mod histories;
mod kill;
mod recovery;
mod scratch;

use std::sync::Arc;

use store::{EtcdOptions, EtcdStore, LogOptions, LogStore, MemoryStore, Store};

use crate::etcd::Etcd;
use crate::scratch::Scratch;

#[tokio::test(flavor = "multi_thread")]
async fn memory_keeps_the_contract() {
    contract::run(async |_| Arc::new(MemoryStore::new()) as Arc<dyn Store>).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_keeps_the_contract() {
    let scratch = Scratch::new();
    contract::run(async |case| {
        let store = LogStore::open(&scratch.path().join(case), LogOptions::default()).expect("the log opens");
        Arc::new(store) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_keeps_the_contract_with_tiny_segments_and_snapshots() {
    let scratch = Scratch::new();
    contract::run(async |case| {
        let options = LogOptions { segment_bytes: 512, snapshot_bytes: 2048, ..LogOptions::default() };
        let store = LogStore::open(&scratch.path().join(case), options).expect("the log opens");
        Arc::new(store) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_keeps_the_contract() {
    let etcd = Etcd::start();
    contract::run(async |case| {
        let mut options = EtcdOptions::new([etcd.url().to_owned()]);
        options.prefix = format!("/{case}");
        Arc::new(EtcdStore::connect(options).await.expect("etcd answers")) as Arc<dyn Store>
    })
    .await;
}
