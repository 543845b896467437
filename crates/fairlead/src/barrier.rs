//! Tells every kubelet which slice versions this node's proxy has applied: the proxy's half of the removal barrier.
//!
//! The Lease `kube-system/fairlead-proxy-NODE` has the label `fairlead.io/component: proxy`, so that one watch sees them all. Its annotation
//! `fairlead.io/applied-slices` is a JSON object, slice uid → resourceVersion, of the slices that have a terminating
//! endpoint. Versions are to be compared for equality only. `spec.holderIdentity` is the node's name while the proxy runs,
//! and empty once it has ended; `renewTime` is when the annotation was last written, and nothing expires.

use std::time::Duration;

use api::kinds::LEASES;
use api::time;
use proxy::{AppliedSlices, StatusHandle};
use reconcile::{Api, ApiError, Patch};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "kube-system";
const APPLIED: &str = "fairlead.io/applied-slices";
/// Changes within this time share a write.
const COALESCE: Duration = Duration::from_millis(20);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// An object's annotations may take 256 KiB in all; a slice takes about 60 bytes.
const MOST: usize = 4000;

/// Reports until cancelled. Returns early if the identity may not write the Lease: the proxy does all else.
pub async fn report(client: kube::Client, node: String, mut status: StatusHandle, token: CancellationToken) {
    let lease = ProxyLease { leases: Api::new(&client, &LEASES), name: format!("fairlead-proxy-{node}"), node };
    let mut written: Option<String> = None;
    let mut back_off = FIRST_RETRY;
    loop {
        let (synced, applied) = {
            let status = status.borrow_and_update();
            (status.synced, status.applied.clone())
        };
        let text = annotation(&applied);
        if synced && written.as_ref() != Some(&text) {
            let pause = match lease.write(&text, &lease.node).await {
                Ok(()) => {
                    written = Some(text);
                    back_off = FIRST_RETRY;
                    COALESCE
                }
                Err(error) if error.is_forbidden() => {
                    tracing::warn!(
                        "the removal barrier is off for this node, pods are stopped without waiting for its proxy: {error}; grant create, get and patch of leases in {NAMESPACE}"
                    );
                    return;
                }
                Err(error) => {
                    tracing::warn!("cannot say which slices are applied, will try again: {error}");
                    let pause = back_off;
                    back_off = (back_off * 2).min(LAST_RETRY);
                    pause
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => continue,
                () = token.cancelled() => break,
            }
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() { break },
            () = token.cancelled() => break,
        }
    }
    if written.is_some() {
        // Rules stay as they are, and nobody should wait for what no longer follows.
        let end = lease.write("{}", "");
        if !matches!(tokio::time::timeout(Duration::from_secs(2), end).await, Ok(Ok(()))) {
            tracing::warn!("could not say that the proxy has ended: pods are stopped a second later until it is back");
        }
    }
}

/// In order of uid, so that the same state is the same text.
fn annotation(applied: &AppliedSlices) -> String {
    if applied.len() > MOST {
        tracing::warn!("{} slices have terminating endpoints, only {MOST} fit the report", applied.len());
    }
    let told: serde_json::Map<String, Value> =
        applied.iter().take(MOST).map(|(uid, version)| (uid.to_string(), json!(**version))).collect();
    Value::Object(told).to_string()
}

struct ProxyLease {
    leases: Api,
    name: String,
    node: String,
}

impl ProxyLease {
    async fn write(&self, applied: &str, holder: &str) -> Result<(), ApiError> {
        let now = time::micros(jiff::Timestamp::now());
        let body = json!({
            "metadata": {"labels": {"fairlead.io/component": "proxy"}, "annotations": {APPLIED: applied}},
            "spec": {"holderIdentity": holder, "renewTime": now},
        });
        match self.leases.patch(NAMESPACE, &self.name, Patch::Merge, &body).await {
            Err(error) if error.is_not_found() => {
                let mut lease = body;
                lease["apiVersion"] = json!("coordination.k8s.io/v1");
                lease["kind"] = json!("Lease");
                lease["metadata"]["name"] = json!(self.name);
                lease["metadata"]["namespace"] = json!(NAMESPACE);
                self.leases.create(NAMESPACE, &lease).await.map(drop)
            }
            other => other.map(drop),
        }
    }
}
