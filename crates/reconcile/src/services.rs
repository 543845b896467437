//! Feeds one `ServiceTable` from the API: Services and EndpointSlices in, changes out.
//!
//! In one process one task feeds one table; proxy, dns and whoever else get read handles and the stream of changes.

use crate::watch::{Change, Scope, watch};
use api::kinds::{ENDPOINT_SLICES, SERVICES};
use api::object::Metadata;
use serde::Deserialize;
use serde_json::value::RawValue;
use services::{Changes, Refused, Seed, ServiceTable};
use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Handles on the one table of a process.
#[derive(Clone)]
pub struct ServiceFeed {
    pub table: Arc<RwLock<ServiceTable>>,
    changes: broadcast::Sender<Arc<Changes>>,
}

/// Changes kept for a reader that lags; one that lags more reads the whole table again.
const KEPT: usize = 4096;

#[derive(Deserialize)]
struct Head {
    metadata: Metadata,
}

#[derive(Clone, Copy)]
enum Kind {
    Service,
    Slice,
}

impl ServiceFeed {
    /// What will happen to the table from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Changes>> {
        self.changes.subscribe()
    }

    /// Starts following the API. `seed` is what an earlier run left in the kernel.
    pub fn start(client: &kube::Client, seed: Seed, token: &CancellationToken) -> ServiceFeed {
        ServiceFeed::start_with(client, ServiceTable::with_seed(seed), token)
    }

    /// The same, into a table that was made with further choices.
    pub fn start_with(client: &kube::Client, table: ServiceTable, token: &CancellationToken) -> ServiceFeed {
        let feed = ServiceFeed { table: Arc::new(RwLock::new(table)), changes: broadcast::Sender::new(KEPT) };
        let mut services = watch::<Box<RawValue>>(client, &SERVICES, Scope::all());
        let mut slices = watch::<Box<RawValue>>(client, &ENDPOINT_SLICES, Scope::all());
        let (writer, token) = (feed.clone(), token.clone());
        tokio::spawn(async move {
            let (mut has_services, mut has_slices) = (false, false);
            loop {
                let (kind, change) = tokio::select! {
                    change = services.recv() => (Kind::Service, change),
                    change = slices.recv() => (Kind::Slice, change),
                    () = token.cancelled() => return,
                };
                let Some(change) = change else { return };
                let is_reset = matches!(change, Change::Reset(_));
                match kind {
                    Kind::Service => has_services |= is_reset,
                    Kind::Slice => has_slices |= is_reset,
                }
                writer.apply(kind, change);
                if is_reset && has_services && has_slices {
                    writer.write(|table| table.set_synced());
                }
            }
        });
        feed
    }

    fn write(&self, change: impl FnOnce(&mut ServiceTable) -> Changes) {
        let changes = change(&mut self.table.write().unwrap_or_else(PoisonError::into_inner));
        if !changes.is_empty() {
            // Nobody listening yet is no fault: a reader begins with the whole table.
            self.changes.send(Arc::new(changes)).ok();
        }
    }

    fn apply(&self, kind: Kind, change: Change<Box<RawValue>>) {
        match change {
            Change::Reset(items) => {
                let mut names = HashSet::new();
                for item in &items {
                    if let Some(head) = head(item) {
                        names.insert((head.metadata.namespace, head.metadata.name));
                    }
                    self.upsert(kind, item);
                }
                let listed = |namespace: &str, name: &str| names.contains(&(namespace.to_string(), name.to_string()));
                self.write(|table| match kind {
                    Kind::Service => table.retain_services(listed),
                    Kind::Slice => table.retain_slices(listed),
                });
            }
            Change::Apply(item) => self.upsert(kind, &item),
            Change::Delete(item) => {
                let Some(Head { metadata }) = head(&item) else { return };
                self.write(|table| match kind {
                    Kind::Service => table.delete_service(&metadata.namespace, &metadata.name),
                    Kind::Slice => table.delete_slice(&metadata.namespace, &metadata.name),
                });
            }
        }
    }

    fn upsert(&self, kind: Kind, item: &RawValue) {
        let bytes = item.get().as_bytes();
        self.write(|table| {
            let result = match kind {
                Kind::Service => table.upsert_service(bytes),
                Kind::Slice => table.upsert_slice(bytes),
            };
            result.unwrap_or_else(|error| {
                warn!(%error, "an object is not taken into the service table, which holds what it said before");
                let metadata = head(item).map(|head| head.metadata).unwrap_or_default();
                let Metadata { namespace, name, uid, .. } = metadata;
                let kind = match kind {
                    Kind::Service => SERVICES.kind,
                    Kind::Slice => ENDPOINT_SLICES.kind,
                };
                let refused = Refused { kind, namespace, name, uid, why: error.to_string() };
                Changes { refused: Some(Box::new(refused)), ..Changes::default() }
            })
        });
    }
}

fn head(item: &RawValue) -> Option<Head> {
    serde_json::from_str(item.get()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Such an object comes from an API server that checks less than ours.
    #[test]
    fn an_object_that_makes_no_sense_is_told_of() {
        let feed =
            ServiceFeed { table: Arc::new(RwLock::new(ServiceTable::new())), changes: broadcast::Sender::new(4) };
        let mut changes = feed.subscribe();
        let slice = r#"{"metadata": {"namespace": "shop", "name": "web-1", "uid": "u"}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.244.0.1"]}], "ports": [{"port": 70000}]}"#;
        feed.upsert(Kind::Slice, &RawValue::from_string(slice.into()).expect("JSON"));
        let told = changes.try_recv().expect("a change");
        let refused = told.refused.as_deref().expect("what was refused");
        assert_eq!(
            (refused.kind, refused.namespace.as_str(), refused.name.as_str()),
            ("EndpointSlice", "shop", "web-1")
        );
        assert!(refused.uid == "u" && refused.why.contains("ports.port is \"70000\""), "{refused:?}");
    }
}
