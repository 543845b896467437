//! Watch: the changes after a revision, as lines, for as long as the client listens.

use super::Call;
use super::read::Selection;
use crate::body::{self, Shape};
use crate::cache::{CacheEvent, Stored, WatchType, line};
use crate::registry::parse_revision;
use crate::table;
use api::Status;
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

const BOOKMARK_EVERY: Duration = Duration::from_secs(30);

pub async fn watch(call: &Arc<Call>) -> Result<Response<body::Body>, Status> {
    let mut selection = Selection::parse(call)?;
    if !call.info.name.is_empty() {
        let term =
            api::selector::FieldTerm { path: "metadata.name".into(), value: call.info.name.clone(), equal: true };
        selection.fields.terms.push(term);
    }
    let query = &call.info.query;
    let cache = &call.registry.cache;
    let asked = query.get("resourceVersion");
    let initial_events = query.flag("sendInitialEvents");
    // Without a revision, and with 0, a watch begins with what there is.
    let from_state = asked.is_empty() || asked == "0" || initial_events;
    if !asked.is_empty() && asked != "0" {
        let from = parse_revision(asked)?;
        cache.reached(from).await?;
        if !from_state {
            cache.events_after(&call.row, from)?;
        }
    }
    let (sender, receiver) = mpsc::channel::<Result<Bytes, body::BoxError>>(64);
    let watcher =
        Watcher { call: call.clone(), selection, sender, table: body::shape(&call.headers), include: call.include()? };
    let from = if from_state { None } else { Some(parse_revision(asked)?) };
    let seconds: u64 = query.get("timeoutSeconds").parse().unwrap_or(3600);
    let bookmarks = query.flag("allowWatchBookmarks");
    tokio::spawn(async move {
        let until = Instant::now() + Duration::from_secs(seconds.max(1));
        watcher.run(from, until, bookmarks, initial_events).await;
    });
    let chunks =
        futures::stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|c| (c, receiver)) });
    let mut response = Response::new(body::stream(chunks));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

struct Watcher {
    call: Arc<Call>,
    selection: Selection,
    sender: mpsc::Sender<Result<Bytes, body::BoxError>>,
    table: Shape,
    include: table::Include,
}

impl Watcher {
    async fn run(self, from: Option<u64>, until: Instant, bookmarks: bool, initial_events: bool) {
        let cache = self.call.registry.cache.clone();
        let mut revisions = cache.subscribe();
        let mut at = match from {
            Some(from) => from,
            None => {
                let (revision, items) = cache.list(&self.call.row, &self.call.info.namespace);
                for stored in items.iter().filter(|s| self.selection.selects(&self.call.row, s)) {
                    if !self.send(WatchType::Added, stored, || line(WatchType::Added, stored)).await {
                        return;
                    }
                }
                if initial_events && bookmarks && !self.bookmark(revision, true).await {
                    return;
                }
                revision
            }
        };
        let mut next_bookmark = Instant::now() + BOOKMARK_EVERY;
        loop {
            let seen = *revisions.borrow_and_update();
            match cache.events_after(&self.call.row, at) {
                Ok(events) => {
                    for event in events {
                        at = event.revision;
                        if !self.event(&event).await {
                            return;
                        }
                    }
                    at = at.max(seen);
                }
                Err(status) => {
                    let text = json!({"type": "ERROR", "object": status.to_json()}).to_string() + "\n";
                    // The client is told, if it still listens, and the watch is over either way.
                    self.sender.send(Ok(text.into())).await.ok();
                    return;
                }
            }
            tokio::select! {
                changed = revisions.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = self.sender.closed() => return,
                () = self.call.registry.token.cancelled() => return,
                () = tokio::time::sleep_until(until) => return,
                () = tokio::time::sleep_until(next_bookmark), if bookmarks => {
                    next_bookmark = Instant::now() + BOOKMARK_EVERY;
                    if !self.bookmark(at, false).await {
                        return;
                    }
                }
            }
        }
    }

    /// What a change looks like through the selection: an object may come into sight or go out of it.
    async fn event(&self, event: &CacheEvent) -> bool {
        let namespace = &*self.call.info.namespace;
        let visible = |stored: Option<&Arc<Stored>>| {
            stored.is_some_and(|s| {
                (namespace.is_empty() || !self.call.row.namespaced || *s.namespace == *namespace)
                    && self.selection.selects(&self.call.row, s)
            })
        };
        let kind = match (visible(event.before.as_ref()), visible(event.after.as_ref())) {
            (false, false) => return true,
            (false, true) => WatchType::Added,
            (true, true) => WatchType::Modified,
            (true, false) => WatchType::Deleted,
        };
        let shown = if kind == WatchType::Deleted { event.gone() } else { event.after.clone() };
        match shown {
            Some(stored) => self.send(kind, &stored, || event.line(kind)).await,
            None => true,
        }
    }

    async fn send(&self, kind: WatchType, stored: &Stored, plain: impl FnOnce() -> Bytes) -> bool {
        let wrap = |object: Value| Bytes::from(json!({"type": kind.as_str(), "object": object}).to_string() + "\n");
        let bytes = match self.table {
            Shape::Plain => plain(),
            Shape::Table => wrap(table::one(&self.call.row, &stored.parse(), self.call.registry.now(), self.include)),
            Shape::PartialMetadata => wrap(table::partial(&stored.parse())),
        };
        self.sender.send(Ok(bytes)).await.is_ok()
    }

    async fn bookmark(&self, revision: u64, ends_initial: bool) -> bool {
        let mut object = json!({
            "kind": self.call.row.kind, "apiVersion": self.call.row.api_version(),
            "metadata": {"resourceVersion": revision.to_string(), "creationTimestamp": null},
        });
        if ends_initial {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let text = json!({"type": "BOOKMARK", "object": object}).to_string() + "\n";
        self.sender.send(Ok(text.into())).await.is_ok()
    }
}
