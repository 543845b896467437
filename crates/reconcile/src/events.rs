//! Events: what a component wants people to see beside an object. Repeated ones count up instead of piling up.

use crate::api::{Api, Patch};
use ::api::kinds::EVENTS;
use ::api::{ObjectExt, time};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::HashMap;
use tokio::sync::mpsc;
use tracing::debug;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    Normal,
    Warning,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct ObjectRef {
    pub api_version: String,
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// Such as `spec.containers{nginx}`.
    pub field_path: String,
}

impl ObjectRef {
    pub fn new(api_version: &str, kind: &str, namespace: &str, name: &str, uid: &str) -> ObjectRef {
        ObjectRef {
            api_version: api_version.into(),
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            field_path: String::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Event {
    about: ObjectRef,
    kind: EventKind,
    reason: String,
    message: String,
}

/// Hands events to a task that writes them; recording never waits and never fails its caller.
#[derive(Clone)]
pub struct Recorder {
    sender: mpsc::Sender<Event>,
}

/// How many distinct events are remembered for counting.
const REMEMBERED: usize = 1024;

impl Recorder {
    /// `component` is the event's source, `host` the node it speaks from, or empty.
    pub fn new(client: &kube::Client, component: &str, host: &str) -> Recorder {
        let (sender, mut receiver) = mpsc::channel::<Event>(256);
        let api = Api::new(client, &EVENTS);
        let (component, host) = (component.to_string(), host.to_string());
        tokio::spawn(async move {
            let mut known: HashMap<Event, (String, u64)> = HashMap::new();
            while let Some(event) = receiver.recv().await {
                if known.len() >= REMEMBERED {
                    known.clear();
                }
                let namespace = namespace_of(&event.about).to_string();
                let now = time::seconds(Timestamp::now());
                if let Some((name, count)) = known.get_mut(&event) {
                    *count += 1;
                    let patch = json!({"count": *count, "lastTimestamp": now});
                    match api.patch(&namespace, name, Patch::Merge, &patch).await {
                        Ok(_) => continue,
                        Err(error) if error.is_not_found() => {}
                        Err(error) => {
                            debug!(%error, "an event was not counted");
                            continue;
                        }
                    }
                }
                let body = body(&event, &component, &host, &now);
                match api.create(&namespace, &body).await {
                    Ok(created) => {
                        known.insert(event, (created.name().to_string(), 1));
                    }
                    Err(error) => debug!(%error, reason = event.reason, "an event was not written"),
                }
            }
        });
        Recorder { sender }
    }

    pub fn event(&self, about: &ObjectRef, kind: EventKind, reason: &str, message: impl Into<String>) {
        let event = Event { about: about.clone(), kind, reason: reason.into(), message: message.into() };
        if self.sender.try_send(event).is_err() {
            debug!(reason, "an event was dropped: too many at once");
        }
    }
}

fn namespace_of(about: &ObjectRef) -> &str {
    if about.namespace.is_empty() { "default" } else { &about.namespace }
}

fn body(event: &Event, component: &str, host: &str, now: &str) -> Value {
    let about = &event.about;
    let mut involved = json!({"kind": about.kind, "name": about.name, "apiVersion": about.api_version});
    if let Some(map) = involved.as_object_mut() {
        for (key, value) in [("namespace", &about.namespace), ("uid", &about.uid), ("fieldPath", &about.field_path)] {
            if !value.is_empty() {
                map.insert(key.into(), json!(value));
            }
        }
    }
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"generateName": format!("{}.", about.name), "namespace": namespace_of(about)},
        "involvedObject": involved,
        "reason": event.reason, "message": event.message,
        "type": match event.kind { EventKind::Normal => "Normal", EventKind::Warning => "Warning" },
        "source": {"component": component, "host": host},
        "reportingComponent": component, "reportingInstance": host,
        "firstTimestamp": now, "lastTimestamp": now, "count": 1,
    })
}
