//! What the store holds, by kind, as raw bytes and little metadata; filled by the store's one watch stream.
//!
//! Reads are answered from here. A write waits until its revision has arrived, so a client reads what it wrote.

use crate::catalog::{Catalog, Row};
use api::Status;
use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;
use store::{EventKind, Revision, Store};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// An object at one revision.
#[derive(Debug)]
pub struct Stored {
    pub namespace: Box<str>,
    pub name: Box<str>,
    pub revision: Revision,
    pub labels: BTreeMap<Box<str>, Box<str>>,
    /// Values of the row's selectable fields, in the row's order.
    fields: Vec<Box<str>>,
    value: Bytes,
    /// Where `"resourceVersion":"N",` goes into `value`.
    splice: usize,
}

impl Stored {
    fn new(row: &Row, value: Bytes, revision: Revision) -> Result<Stored, serde_json::Error> {
        let object: Value = serde_json::from_slice(&value)?;
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or("").into();
        let labels = object
            .pointer("/metadata/labels")
            .and_then(Value::as_object)
            .map(|m| m.iter().filter_map(|(k, v)| Some((k.as_str().into(), v.as_str()?.into()))).collect())
            .unwrap_or_default();
        let fields = row.fields.iter().map(|(path, _)| row.field(&object, path).unwrap_or("").into()).collect();
        let splice = splice_point(&value);
        Ok(Stored {
            namespace: text("/metadata/namespace"),
            name: text("/metadata/name"),
            revision,
            labels,
            fields,
            value,
            splice,
        })
    }

    /// The object's JSON with its resourceVersion.
    pub fn write(&self, out: &mut BytesMut) {
        out.put_slice(&self.value[..self.splice]);
        out.put_slice(b"\"resourceVersion\":\"");
        out.put_slice(self.revision.to_string().as_bytes());
        out.put_slice(b"\",");
        out.put_slice(&self.value[self.splice..]);
    }

    pub fn bytes(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.value.len() + 40);
        self.write(&mut out);
        out.freeze()
    }

    pub fn parse(&self) -> Value {
        serde_json::from_slice(&self.bytes()).expect("what is stored was written as JSON")
    }

    pub fn size(&self) -> usize {
        self.value.len()
    }

    fn at(&self, revision: Revision) -> Stored {
        Stored {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            revision,
            labels: self.labels.clone(),
            fields: self.fields.clone(),
            value: self.value.clone(),
            splice: self.splice,
        }
    }

    pub fn field<'a>(&'a self, row: &Row, path: &str) -> Option<&'a str> {
        match path {
            "metadata.name" => Some(&self.name),
            "metadata.namespace" => Some(&self.namespace),
            _ => row.fields.iter().position(|(p, _)| *p == path).map(|i| &*self.fields[i]),
        }
    }
}

/// The bytes to store: `apiVersion`, `kind` and `metadata` first, so that the resourceVersion can be spliced in.
pub fn to_stored(object: &Value) -> Bytes {
    let mut out = Vec::with_capacity(512);
    out.push(b'{');
    let empty = serde_json::Map::new();
    let map = object.as_object().unwrap_or(&empty);
    let mut first = true;
    let mut put = |key: &str, value: &Value, out: &mut Vec<u8>| {
        if !std::mem::take(&mut first) {
            out.push(b',');
        }
        out.push(b'"');
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\":");
        serde_json::to_writer(&mut *out, value).expect("a JSON value is written to memory");
    };
    for key in ["apiVersion", "kind", "metadata"] {
        if let Some(value) = map.get(key) {
            if key == "metadata" && value.get("resourceVersion").is_some() {
                let mut metadata = value.clone();
                if let Some(m) = metadata.as_object_mut() {
                    m.remove("resourceVersion");
                }
                put(key, &metadata, &mut out);
            } else {
                put(key, value, &mut out);
            }
        }
    }
    for (key, value) in map {
        if !matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
            put(key, value, &mut out);
        }
    }
    out.push(b'}');
    out.into()
}

fn splice_point(value: &[u8]) -> usize {
    const MARK: &[u8] = b"\"metadata\":{";
    value.windows(MARK.len()).position(|w| w == MARK).map_or(0, |p| p + MARK.len())
}

/// One change of one object.
#[derive(Debug)]
pub struct CacheEvent {
    pub revision: Revision,
    pub before: Option<Arc<Stored>>,
    /// `None`: deleted; `before` then carries the revision of the deletion.
    pub after: Option<Arc<Stored>>,
    encoded: [OnceLock<Bytes>; 3],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchType {
    Added,
    Modified,
    Deleted,
}

impl WatchType {
    pub fn as_str(self) -> &'static str {
        match self {
            WatchType::Added => "ADDED",
            WatchType::Modified => "MODIFIED",
            WatchType::Deleted => "DELETED",
        }
    }
}

impl CacheEvent {
    /// The line a watcher gets, encoded once for all watchers.
    pub fn line(&self, kind: WatchType) -> Bytes {
        self.encoded[kind as usize]
            .get_or_init(|| {
                let shown = match kind {
                    WatchType::Deleted => self.gone(),
                    _ => self.after.clone(),
                };
                shown.map(|s| line(kind, &s)).unwrap_or_default()
            })
            .clone()
    }

    /// The last state of an object that went out of sight, at the event's revision.
    pub fn gone(&self) -> Option<Arc<Stored>> {
        self.before.as_ref().map(|b| Arc::new(b.at(self.revision)))
    }
}

pub fn line(kind: WatchType, stored: &Stored) -> Bytes {
    let mut out = BytesMut::with_capacity(stored.size() + 80);
    out.put_slice(b"{\"type\":\"");
    out.put_slice(kind.as_str().as_bytes());
    out.put_slice(b"\",\"object\":");
    stored.write(&mut out);
    out.put_slice(b"}\n");
    out.freeze()
}

/// The objects and recent changes of one kind.
#[derive(Default)]
struct KindCache {
    objects: BTreeMap<Arc<str>, Arc<Stored>>,
    events: VecDeque<Arc<CacheEvent>>,
    /// Revision of the newest event that was dropped from `events`.
    forgotten: Revision,
}

impl KindCache {
    fn take(&mut self, object_key: &str, after: Option<Arc<Stored>>, revision: Revision) {
        let before = match &after {
            Some(after) => self.objects.insert(object_key.into(), after.clone()),
            None => self.objects.remove(object_key),
        };
        self.events.push_back(Arc::new(CacheEvent { revision, before, after, encoded: Default::default() }));
        if self.events.len() > EVENTS_KEPT
            && let Some(event) = self.events.pop_front()
        {
            self.forgotten = event.revision;
        }
    }
}

/// Key, new state (`None`: deleted), revision.
type Change = (Arc<str>, Option<Arc<Stored>>, Revision);

/// How many changes of a kind a watcher may lag behind.
const EVENTS_KEPT: usize = 8192;

pub struct WatchCache {
    catalog: Catalog,
    kinds: HashMap<String, RwLock<KindCache>>,
    /// Keys under `claims/`.
    claims: RwLock<BTreeSet<Arc<str>>>,
    revision: tokio::sync::watch::Sender<Revision>,
}

impl WatchCache {
    /// Reads everything, then follows the store until cancelled.
    ///
    /// # Errors
    /// The store cannot be read, or holds an object that is not JSON.
    pub async fn start(
        catalog: Catalog,
        store: Arc<dyn Store>,
        token: CancellationToken,
    ) -> Result<Arc<WatchCache>, store::Error> {
        let kinds = catalog.rows().iter().map(|r| (r.prefix(), RwLock::default())).collect();
        let listing = store.list("", None, 0, None).await?;
        let cache = Arc::new(WatchCache {
            catalog,
            kinds,
            claims: RwLock::default(),
            revision: tokio::sync::watch::Sender::new(listing.revision),
        });
        cache.apply(listing.items.into_iter().map(|kv| (kv.key, Some(kv.value), kv.mod_revision)));
        for kind in cache.kinds.values() {
            let mut kind = kind.write().expect("no writer of the cache panics");
            kind.events.clear();
            kind.forgotten = listing.revision;
        }
        let (writer, mut from) = (cache.clone(), listing.revision);
        let mut stream = store.watch("", from).await?;
        tokio::spawn(async move {
            loop {
                let item = tokio::select! {
                    item = stream.next() => item,
                    () = token.cancelled() => return,
                };
                match item {
                    Some(Ok(batch)) => {
                        let changes = batch.events.into_iter().map(|event| match event.kind {
                            EventKind::Put { value, .. } => (event.key, Some(value), event.revision),
                            EventKind::Delete => (event.key, None, event.revision),
                        });
                        writer.apply(changes);
                        from = batch.revision;
                        writer.revision.send_replace(from);
                    }
                    Some(Err(problem)) => {
                        warn!(%problem, "the store's watch ended, watching again");
                        stream = loop {
                            match store.watch("", from).await {
                                Ok(stream) => break stream,
                                Err(problem @ store::Error::Compacted { .. }) => {
                                    error!(%problem, "the store forgot changes that were not seen; restart the server");
                                    return;
                                }
                                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                            }
                        };
                    }
                    None => return,
                }
            }
        });
        Ok(cache)
    }

    /// Takes over changes. Those of one kind become visible together: nobody sees half of a transaction in a kind,
    /// and a watcher that stands at a revision has seen all of it.
    fn apply(&self, changes: impl Iterator<Item = (Arc<str>, Option<Bytes>, Revision)>) {
        let mut by_kind: BTreeMap<&str, Vec<Change>> = BTreeMap::new();
        for (key, value, revision) in changes {
            if key.starts_with("claims/") {
                let mut claims = self.claims.write().expect("no writer of the cache panics");
                match value {
                    Some(_) => claims.insert(key),
                    None => claims.remove(&key),
                };
                continue;
            }
            let Some((prefix, row)) = self.place(&key) else { continue };
            match value.map(|v| Stored::new(row, v, revision)).transpose() {
                Ok(after) => by_kind.entry(prefix).or_default().push((key, after.map(Arc::new), revision)),
                Err(problem) => error!(%key, %problem, "the store holds an object that is not JSON; it is not served"),
            }
        }
        for (prefix, changes) in by_kind {
            let Some(kind) = self.kinds.get(prefix) else { continue };
            let mut kind = kind.write().expect("no writer of the cache panics");
            for (key, after, revision) in changes {
                kind.take(&key[prefix.len()..], after, revision);
            }
        }
    }

    /// The prefix and row of the kind that a key belongs to.
    fn place(&self, key: &str) -> Option<(&str, &Row)> {
        let mut parts = key.splitn(4, '/');
        let (Some("registry"), Some(group), Some(plural), Some(_)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let (prefix, _) = self.kinds.get_key_value(&format!("registry/{group}/{plural}/"))?;
        Some((prefix, self.catalog.stored_under(prefix)?))
    }

    fn kind(&self, row: &Row) -> std::sync::RwLockReadGuard<'_, KindCache> {
        self.kinds[&row.prefix()].read().expect("no writer of the cache panics")
    }

    pub fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    /// Returns when the cache holds `revision`.
    pub async fn reached(&self, revision: Revision) -> Result<(), Status> {
        let mut receiver = self.revision.subscribe();
        let wait = receiver.wait_for(|r| *r >= revision);
        match tokio::time::timeout(Duration::from_secs(3), wait).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let current = self.revision();
                let mut status =
                    Status::timeout(format!("Timeout: Too large resource version: {revision}, current: {current}"));
                status.details = Some(api::status::Details {
                    // By this cause clients know that they must list from another revision.
                    causes: vec![api::Cause {
                        reason: "ResourceVersionTooLarge".into(),
                        message: "Too large resource version".into(),
                        field: String::new(),
                    }],
                    retry_after_seconds: Some(1),
                    ..Default::default()
                });
                Err(status)
            }
        }
    }

    pub fn subscribe(&self) -> tokio::sync::watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    pub fn get(&self, row: &Row, namespace: &str, name: &str) -> Option<Arc<Stored>> {
        self.kind(row).objects.get(row.object_key(namespace, name).as_str()).cloned()
    }

    /// Objects of a namespace (or all) in key order, and the revision they are a picture of.
    pub fn list(&self, row: &Row, namespace: &str) -> (Revision, Vec<Arc<Stored>>) {
        let kind = self.kind(row);
        // Under the lock no later change of this kind can be in, and all up to the revision are.
        let revision = self.revision().max(kind.events.back().map_or(0, |e| e.revision));
        if namespace.is_empty() || !row.namespaced {
            return (revision, kind.objects.values().cloned().collect());
        }
        let prefix = format!("{namespace}/");
        let range = (Bound::Included(prefix.as_str()), Bound::Unbounded);
        let items = kind
            .objects
            .range::<str, _>(range)
            .take_while(|(key, _)| key.starts_with(&prefix))
            .map(|(_, stored)| stored.clone())
            .collect();
        (revision, items)
    }

    /// Changes of a kind after `from`, oldest first.
    ///
    /// # Errors
    /// 410 when changes after `from` are no longer remembered.
    pub fn events_after(&self, row: &Row, from: Revision) -> Result<Vec<Arc<CacheEvent>>, Status> {
        let kind = self.kind(row);
        if from < kind.forgotten {
            return Err(Status::gone(format!("too old resource version: {from} ({})", kind.forgotten)));
        }
        let start = kind.events.partition_point(|e| e.revision <= from);
        Ok(kind.events.range(start..).cloned().collect())
    }

    /// A number that changes whenever an object of the kind does.
    pub fn last_change(&self, row: &Row) -> Revision {
        let kind = self.kind(row);
        kind.events.back().map_or(kind.forgotten, |e| e.revision)
    }

    pub fn is_claimed(&self, key: &str) -> bool {
        self.claims.read().expect("no writer of the cache panics").contains(key)
    }
}
