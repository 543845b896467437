//! Tells people what became of their Ingresses: an event for each fault that is new, and the addresses in the status.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use api::kinds::INGRESSES;
use api::object::Key;
use ingress::{Fault, Ingress, LoadBalancerIngress};
use reconcile::{Api, EventKind, ObjectRef, Patch, Recorder};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// When a status that was not written is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What there is to tell.
#[derive(Default)]
pub struct Report {
    pub ingresses: BTreeMap<Key, Arc<Ingress>>,
    pub faults: BTreeSet<(Key, Fault)>,
    /// `None`: not known, or nobody's to publish.
    pub addresses: Option<Vec<LoadBalancerIngress>>,
}

/// Writes events and addresses until the token is cancelled. A fault that is gone and comes back is told of again.
pub async fn run(
    client: kube::Client,
    recorder: Recorder,
    mut reports: watch::Receiver<Report>,
    token: CancellationToken,
) {
    let api = Api::new(&client, &INGRESSES);
    let mut told: BTreeSet<(Key, Fault)> = BTreeSet::new();
    loop {
        let (ingresses, addresses) = {
            let report = reports.borrow_and_update();
            for (key, fault) in report.faults.difference(&told) {
                let uid = report.ingresses.get(key).map_or("", |ingress| ingress.metadata.uid.as_str());
                let about = ObjectRef::new(&INGRESSES.api_version(), INGRESSES.kind, &key.namespace, &key.name, uid);
                recorder.event(&about, EventKind::Warning, fault.reason, fault.message.clone());
            }
            told.clone_from(&report.faults);
            (report.ingresses.clone(), report.addresses.clone())
        };
        let all_written = match addresses {
            Some(addresses) => write_addresses(&api, &ingresses, &addresses).await,
            None => true,
        };
        tokio::select! {
            changed = reports.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if !all_written => {}
            () = token.cancelled() => return,
        }
    }
}

/// Gives the Ingresses that have others these addresses.
async fn write_addresses(api: &Api, ingresses: &BTreeMap<Key, Arc<Ingress>>, wanted: &[LoadBalancerIngress]) -> bool {
    let list: Vec<Value> = wanted
        .iter()
        .map(|one| if one.ip.is_empty() { json!({"hostname": one.hostname}) } else { json!({"ip": one.ip}) })
        .collect();
    let body =
        json!({"status": {"loadBalancer": {"ingress": if list.is_empty() { Value::Null } else { json!(list) }}}});
    let mut all_written = true;
    for (key, ingress) in ingresses {
        if ingress.status.load_balancer.ingress == wanted {
            continue;
        }
        match api.patch_status(&key.namespace, &key.name, Patch::Merge, &body).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                debug!(%error, namespace = key.namespace, name = key.name, "the status is not written");
                all_written = false;
            }
        }
    }
    all_written
}
