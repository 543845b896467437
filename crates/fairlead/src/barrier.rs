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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http_body_util::BodyExt;
    use kube::client::Body;
    use proxy::Status;
    use tokio::sync::watch;

    use super::*;

    type Requests = Arc<Mutex<Vec<String>>>;

    /// An API server that answers everything with these codes, the last one for ever. A request is told as `METHOD holder applied`.
    fn server(codes: &[u16]) -> (kube::Client, Requests) {
        let requests = Requests::default();
        let (told, codes) = (requests.clone(), codes.to_vec());
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (told, codes) = (told.clone(), codes.clone());
            async move {
                let method = request.method().to_string();
                let body = request.into_body().collect().await?.to_bytes();
                let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                let holder = body["spec"]["holderIdentity"].as_str().unwrap_or("?");
                let applied = body["metadata"]["annotations"][APPLIED].as_str().unwrap_or("?");
                let mut told = told.lock().expect("no panic");
                let code = codes[told.len().min(codes.len() - 1)];
                told.push(format!("{method} {holder:?} {applied}"));
                let answer = json!({"kind": "Status", "code": code, "message": "no", "reason": ""}).to_string();
                let answer = http::Response::builder().status(code).body(Body::from(answer.into_bytes()));
                answer.map_err(|error| kube::Error::Service(Box::new(error)))
            }
        });
        (kube::Client::new(service, "default"), requests)
    }

    fn status(slices: &[(&str, &str)]) -> Status {
        let applied: AppliedSlices = slices.iter().map(|(uid, version)| ((*uid).into(), (*version).into())).collect();
        Status { synced: true, applied: Arc::new(applied), ..Status::default() }
    }

    async fn until(requests: &Requests, count: usize) -> Vec<String> {
        while requests.lock().expect("no panic").len() < count {
            tokio::task::yield_now().await;
        }
        requests.lock().expect("no panic").clone()
    }

    #[tokio::test]
    async fn the_lease_says_what_is_applied_until_the_proxy_ends() {
        // There is none at first, and one write is lost.
        let (client, requests) = server(&[404, 201, 500, 200]);
        let (change, seen) = watch::channel(Status::default());
        let token = CancellationToken::new();
        let task = tokio::spawn(report(client, "node-1".to_owned(), seen, token.clone()));
        change.send_replace(status(&[]));
        until(&requests, 2).await;
        // What changes meanwhile is said in one write, and what comes to the same in none.
        change.send_replace(status(&[("b", "7")]));
        change.send_replace(status(&[("b", "8"), ("a", "9")]));
        until(&requests, 4).await;
        change.send_replace(status(&[("a", "9"), ("b", "8")]));
        token.cancel();
        task.await.expect("no panic");
        let both = r#"PATCH "node-1" {"a":"9","b":"8"}"#;
        let expected = [r#"PATCH "node-1" {}"#, r#"POST "node-1" {}"#, both, both, r#"PATCH "" {}"#];
        assert_eq!(*requests.lock().expect("no panic"), expected);
    }

    #[tokio::test]
    async fn without_the_right_to_write_it_is_off() {
        let (client, requests) = server(&[403]);
        let (_change, seen) = watch::channel(status(&[("a", "1")]));
        report(client, "node-1".to_owned(), seen, CancellationToken::new()).await;
        assert_eq!(requests.lock().expect("no panic").len(), 1);
    }
}
