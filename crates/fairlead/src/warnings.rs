//! Tells people, beside a Service or a slice, what of it the data path does not understand.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use api::kinds::{ENDPOINT_SLICES, SERVICES};
use reconcile::{EventKind, ObjectRef, Recorder, ServiceFeed};
use services::{Changes, Refused, Service, ServiceKey};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

/// An event for each new warning, until cancelled. Subscribe before the table's first list is complete.
pub async fn tell(
    feed: ServiceFeed,
    mut changes: broadcast::Receiver<Arc<Changes>>,
    recorder: Recorder,
    token: CancellationToken,
) {
    let mut told = Told { recorder, warnings: HashMap::new() };
    loop {
        let received = tokio::select! {
            received = changes.recv() => received,
            () = token.cancelled() => return,
        };
        let table = || feed.table.read().unwrap_or_else(PoisonError::into_inner);
        match received {
            Ok(changes) => {
                if let Some(refused) = &changes.refused {
                    told.refuse(refused);
                }
                let table = table();
                changes.services.iter().for_each(|key| told.look(key, table.service(&key.0, &key.1)));
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {
                let table = table();
                table.services().for_each(|s| told.look(&(s.namespace.clone(), s.name.clone()), Some(s)));
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

struct Told {
    recorder: Recorder,
    warnings: HashMap<ServiceKey, Vec<String>>,
}

impl Told {
    /// An object that the table does not take, since a field of it makes no sense.
    fn refuse(&self, refused: &Refused) {
        let version =
            if refused.kind == SERVICES.kind { SERVICES.api_version() } else { ENDPOINT_SLICES.api_version() };
        let about = ObjectRef::new(&version, refused.kind, &refused.namespace, &refused.name, &refused.uid);
        self.recorder.event(&about, EventKind::Warning, "NotUnderstood", refused.why.clone());
    }

    fn look(&mut self, key: &ServiceKey, service: Option<&Service>) {
        let Some((service, warnings)) = service.and_then(|s| Some((s, s.warnings.as_deref()?))) else {
            self.warnings.remove(key);
            return;
        };
        let before = self.warnings.insert(key.clone(), warnings.texts.clone()).unwrap_or_default();
        let about = ObjectRef::new("v1", "Service", &service.namespace, &service.name, &warnings.uid);
        for text in warnings.texts.iter().filter(|text| !before.contains(text)) {
            self.recorder.event(&about, EventKind::Warning, "NotUnderstood", text.clone());
        }
    }
}
