//! Watches: what changes look like through a selection, from where they go on, and that none is lost or told twice.

use crate::cluster::{CONFIG_MAPS, Client, Cluster, Options, Watch, config_map};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use store::{Op, Txn};

/// The revision of the list now: where a client that has listed begins to watch.
async fn now(client: &Client) -> String {
    client.get(CONFIG_MAPS).await.text("/metadata/resourceVersion")
}

async fn make(client: &Client, name: &str, labels: Value) -> String {
    let made = client.send("POST", CONFIG_MAPS, &config_map(name, labels)).await;
    assert_eq!(made.code, 201, "{made:?}");
    made.text("/metadata/resourceVersion")
}

async fn merge(client: &Client, name: &str, patch: Value) -> String {
    let changed = client.patch(&format!("{CONFIG_MAPS}/{name}"), "merge-patch+json", &patch).await;
    assert_eq!(changed.code, 200, "{changed:?}");
    changed.text("/metadata/resourceVersion")
}

async fn expect(watch: &mut Watch, kind: &str, name: &str) -> Value {
    let (got_kind, got_name, object) = watch.event().await;
    assert_eq!((got_kind.as_str(), got_name.as_str()), (kind, name), "{object}");
    object
}

#[tokio::test]
async fn an_object_comes_into_sight_and_goes_out_of_it() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let from = now(&admin).await;
    let path = format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}&labelSelector=app%3Dweb");
    let mut watch = admin.watch(&path, &[]).await;

    make(&admin, "other", json!({"app": "db"})).await;
    make(&admin, "a", json!({"app": "web"})).await;
    merge(&admin, "a", json!({"data": {"k": "v"}})).await;
    let hidden = merge(&admin, "a", json!({"metadata": {"labels": {"app": "db"}}})).await;
    merge(&admin, "a", json!({"data": {"k": "unseen"}})).await;
    merge(&admin, "a", json!({"metadata": {"labels": {"app": "web"}}})).await;
    assert_eq!(admin.delete(&format!("{CONFIG_MAPS}/a")).await.code, 200);

    expect(&mut watch, "ADDED", "a").await;
    let changed = expect(&mut watch, "MODIFIED", "a").await;
    assert_eq!(changed["data"]["k"], "v");
    // Out of sight is the last state that was seen, at the revision of the change.
    let gone = expect(&mut watch, "DELETED", "a").await;
    assert_eq!(gone["metadata"]["labels"]["app"], "web");
    assert_eq!(gone["metadata"]["resourceVersion"], json!(hidden));
    let back = expect(&mut watch, "ADDED", "a").await;
    assert_eq!(back["data"]["k"], "unseen");
    expect(&mut watch, "DELETED", "a").await;
}

#[tokio::test]
async fn a_watch_of_one_name_and_one_namespace_sees_no_other() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let from = now(&admin).await;
    let path = format!(
        "{CONFIG_MAPS}?allowWatchBookmarks=true&fieldSelector=metadata.name%3Da&resourceVersion={from}&watch=true"
    );
    let mut one = admin.watch(&path, &[]).await;
    let mut space = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}"), &[]).await;
    let mut all = admin.watch(&format!("/api/v1/configmaps?watch=true&resourceVersion={from}"), &[]).await;

    let elsewhere = admin.send("POST", "/api/v1/namespaces/kube-system/configmaps", &config_map("a", json!({}))).await;
    assert_eq!(elsewhere.code, 201);
    make(&admin, "b", json!({})).await;
    make(&admin, "a", json!({})).await;

    assert_eq!(expect(&mut one, "ADDED", "a").await["metadata"]["namespace"], "default");
    expect(&mut space, "ADDED", "b").await;
    expect(&mut space, "ADDED", "a").await;
    assert_eq!(expect(&mut all, "ADDED", "a").await["metadata"]["namespace"], "kube-system");
    expect(&mut all, "ADDED", "b").await;
    expect(&mut all, "ADDED", "a").await;
}

#[tokio::test]
async fn a_watch_goes_on_from_a_revision() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    make(&admin, "a", json!({})).await;
    let seen = make(&admin, "b", json!({})).await;
    make(&admin, "c", json!({})).await;
    merge(&admin, "a", json!({"data": {"k": "v"}})).await;
    let mut watch = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={seen}"), &[]).await;
    expect(&mut watch, "ADDED", "c").await;
    expect(&mut watch, "MODIFIED", "a").await;
    make(&admin, "d", json!({})).await;
    expect(&mut watch, "ADDED", "d").await;
}

#[tokio::test]
async fn a_watch_from_no_revision_begins_with_what_is_there() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    make(&admin, "a", json!({})).await;
    make(&admin, "b", json!({})).await;
    for query in ["watch=true", "watch=true&resourceVersion=0"] {
        let mut watch = admin.watch(&format!("{CONFIG_MAPS}?{query}"), &[]).await;
        expect(&mut watch, "ADDED", "a").await;
        expect(&mut watch, "ADDED", "b").await;
    }
}

/// KEP-3157: the initial state as events, then a bookmark that says that it is complete.
#[tokio::test]
async fn a_list_by_watch_ends_in_a_bookmark() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    make(&admin, "a", json!({})).await;
    let newest = make(&admin, "b", json!({})).await;
    let path = format!(
        "{CONFIG_MAPS}?watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
    );
    let mut watch = admin.watch(&path, &[]).await;
    expect(&mut watch, "ADDED", "a").await;
    expect(&mut watch, "ADDED", "b").await;
    let bookmark = expect(&mut watch, "BOOKMARK", "").await;
    assert_eq!(bookmark["kind"], "ConfigMap");
    assert_eq!(bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(bookmark["metadata"]["resourceVersion"], json!(newest));
    merge(&admin, "a", json!({"data": {"k": "v"}})).await;
    expect(&mut watch, "MODIFIED", "a").await;
}

#[tokio::test]
async fn a_watch_shows_tables_and_metadata() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let from = now(&admin).await;
    let path = format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}");
    let mut table =
        admin.watch(&path, &[("accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json")]).await;
    let mut partial = admin
        .watch(&path, &[("accept", "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io,application/json")])
        .await;
    make(&admin, "a", json!({})).await;
    let (kind, _, object) = table.event().await;
    assert_eq!(
        (kind.as_str(), &object["kind"], &object["rows"][0]["cells"][0]),
        ("ADDED", &json!("Table"), &json!("a"))
    );
    let (kind, name, object) = partial.event().await;
    assert_eq!((kind.as_str(), name.as_str(), &object["kind"]), ("ADDED", "a", &json!("PartialObjectMetadata")));
    assert_eq!(object.get("data"), None);
}

#[tokio::test]
async fn a_watch_ends_when_its_time_is_over() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let from = now(&admin).await;
    let path = format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}&timeoutSeconds=1");
    let mut watch = admin.watch(&path, &[]).await;
    assert_eq!(watch.next::<Value>().await, None);
}

/// A server that has just started remembers no changes: clients must list again, and are told so.
#[tokio::test]
async fn what_is_forgotten_is_gone() {
    let cluster = Cluster::new(Options::default()).await;
    make(&cluster.admin(), "a", json!({})).await;
    let again = Cluster::bare(cluster.store.clone(), Options::default()).await;
    let admin = again.admin();
    let answer =
        admin.open("GET", &format!("{CONFIG_MAPS}?watch=true&resourceVersion=2"), &[], Default::default()).await;
    // Clients take it as the answer and as the first event alike.
    if answer.status().as_u16() == 200 {
        let mut watch = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion=2"), &[]).await;
        let event: Value = watch.next().await.expect("the client is told");
        assert_eq!((&event["type"], &event["object"]["code"]), (&json!("ERROR"), &json!(410)));
        assert_eq!(event["object"]["reason"], "Expired");
    } else {
        assert_eq!(answer.status().as_u16(), 410);
    }
    let from = now(&admin).await;
    let mut watch = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}"), &[]).await;
    make(&admin, "b", json!({})).await;
    expect(&mut watch, "ADDED", "b").await;
}

/// Answered after the wait that a lagging replica is given.
#[tokio::test]
async fn a_revision_of_the_future_is_too_large() {
    let cluster = Cluster::new(Options::default()).await;
    let answer = cluster.admin().get(&format!("{CONFIG_MAPS}?resourceVersion=999999")).await;
    assert_eq!((answer.code, answer.text("/reason").as_str()), (504, "Timeout"), "{answer:?}");
    assert!(answer.text("/message").contains("Too large resource version: 999999, current: "), "{answer:?}");
    // By this cause client-go knows that it must list from another revision.
    assert_eq!(answer.text("/details/causes/0/reason"), "ResourceVersionTooLarge", "{answer:?}");
}

/// A watcher that does not read holds nobody up; one that falls out of memory is told so and ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_watcher_is_told_that_it_is_too_slow() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let from = now(&admin).await;
    let mut watch = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}"), &[]).await;
    // Past the API, because only the number of changes matters: far more than a kind's cache remembers.
    for round in 0..14 {
        let mut txn = Txn::new();
        for i in 0..1000 {
            let name = format!("c{i}");
            let object = json!({"apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": name, "namespace": "default"}, "data": {"round": round.to_string()}});
            let key = format!("registry/core/configmaps/default/{name}");
            txn.ops.push(Op::Put { key, value: object.to_string().into() });
        }
        cluster.store.commit(txn).await.expect("the store takes it");
    }
    make(&admin, "last", json!({})).await;
    let mut seen = 0;
    loop {
        let (kind, _, object) = watch.event().await;
        if kind == "ERROR" {
            assert_eq!((&object["code"], &object["reason"]), (&json!(410), &json!("Expired")));
            break;
        }
        seen += 1;
        assert!(seen < 14_000, "the watcher was never told");
    }
    assert_eq!(watch.next::<Value>().await, None);
}

/// What a watcher needs of an event to know its place.
#[derive(Deserialize)]
struct Line {
    r#type: String,
    object: LineObject,
}

#[derive(Deserialize)]
struct LineObject {
    metadata: LineMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LineMetadata {
    name: String,
    resource_version: String,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_watchers_see_a_thousand_creates_once_and_in_order() {
    const WATCHERS: usize = 50;
    const CREATES: usize = 1000;
    let cluster = Cluster::new(Options::default()).await;
    let from = now(&cluster.admin()).await;
    let mut watchers = Vec::new();
    for i in 0..WATCHERS {
        // Some begin with the state, some from a revision; they must see the same.
        let query = if i % 2 == 0 { format!("&resourceVersion={from}") } else { String::new() };
        let mut watch = cluster.admin().watch(&format!("{CONFIG_MAPS}?watch=true{query}"), &[]).await;
        watchers.push(tokio::spawn(async move {
            let (mut names, mut last) = (BTreeSet::new(), 0u64);
            while names.len() < CREATES {
                let line: Line = watch.next().await.expect("the watch goes on");
                let metadata = line.object.metadata;
                let revision: u64 = metadata.resource_version.parse().expect("a revision is a number");
                assert_eq!(line.r#type, "ADDED");
                assert!(revision > last || i % 2 == 1, "{revision} comes after {last}");
                last = revision;
                assert!(names.insert(metadata.name.clone()), "{} is told twice", metadata.name);
            }
            names
        }));
    }
    let writers: Vec<_> = (0..CREATES)
        .map(|i| {
            let admin = cluster.admin();
            tokio::spawn(async move { make(&admin, &format!("c{i}"), json!({})).await })
        })
        .collect();
    let mut revisions = BTreeSet::new();
    for writer in writers {
        revisions.insert(writer.await.expect("the writer ends"));
    }
    assert_eq!(revisions.len(), CREATES, "two writes have one revision");
    for watcher in watchers {
        assert_eq!(watcher.await.expect("the watcher ends").len(), CREATES);
    }
}

/// A transaction is seen whole: no list shows half of it, and a watcher that reads while it is taken over misses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_is_seen_whole() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    let from = now(&admin).await;
    let mut watch = admin.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={from}"), &[]).await;
    const OBJECTS: usize = 50;
    const ROUNDS: usize = 60;
    let store = cluster.store.clone();
    let writer = tokio::spawn(async move {
        for round in 0..ROUNDS {
            let mut txn = Txn::new();
            for i in 0..OBJECTS {
                let name = format!("c{i:02}");
                let object = json!({"apiVersion": "v1", "kind": "ConfigMap",
                    "metadata": {"name": name, "namespace": "default"}, "data": {"round": round.to_string()}});
                let key = format!("registry/core/configmaps/default/{name}");
                txn.ops.push(Op::Put { key, value: object.to_string().into() });
            }
            store.commit(txn).await.expect("the store takes it");
        }
    });
    let last = json!((ROUNDS - 1).to_string());
    let mut seen = json!(null);
    while seen != last {
        let list = admin.get(CONFIG_MAPS).await.json();
        let items = list["items"].as_array().expect("a list has items");
        assert!(items.is_empty() || items.len() == OBJECTS, "{} of {OBJECTS}", items.len());
        assert!(items.iter().all(|i| i["data"] == items[0]["data"]), "half of a transaction is shown");
        seen = list["items"][0]["data"]["round"].clone();
    }
    writer.await.expect("the writer is done");
    for round in 0..ROUNDS {
        for i in 0..OBJECTS {
            let (_, name, object) = watch.event().await;
            assert_eq!((name, &object["data"]["round"]), (format!("c{i:02}"), &json!(round.to_string())));
        }
    }
}
