//! Subresources beyond status: one file per kind of work.

mod pod;
mod scale;
mod stream;
mod token;

pub use stream::{BoxedIo, Connector};

use crate::body::Body;
use crate::server::ApiServer;
use crate::verbs::{self, Call};
use api::{ObjectExt, Status};
use http::Response;
use hyper::upgrade::OnUpgrade;
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers a request for a subresource that the row names.
pub async fn serve(server: &ApiServer, call: &Arc<Call>, upgrade: Option<OnUpgrade>) -> Result<Response<Body>, Status> {
    let info = &call.info;
    match (&*call.row.plural, info.subresource.as_str(), info.verb) {
        (_, "status", "get") => verbs::get(call).await,
        (_, "status", "update") => verbs::update(call).await,
        (_, "status", "patch") => verbs::patch(call).await,
        (_, "scale", _) => scale::serve(call).await,
        ("pods", "binding", "create") => pod::bind(call).await,
        ("pods", "eviction", "create") => pod::evict(call).await,
        ("pods", "log", "get") => stream::logs(server, call).await,
        ("pods", "exec" | "attach" | "portforward", "create") => stream::upgrade(server, call, upgrade).await,
        ("serviceaccounts", "token", "create") => token::create(server, call).await,
        ("namespaces", "finalize", "update") => finalize(call).await,
        ("certificatesigningrequests", "approval", "update" | "patch") => approve(call).await,
        ("certificatesigningrequests", "approval", "get") => verbs::get(call).await,
        _ => Err(Status::method_not_allowed()),
    }
}

/// Replaces a namespace's `spec.finalizers`; without any, and marked, it is gone.
async fn finalize(call: &Call) -> Result<Response<Body>, Status> {
    let wanted = crate::decode::object(&call.headers, &call.body)?;
    let finalizers = wanted.pointer("/spec/finalizers").cloned().unwrap_or(json!([]));
    let changed = verbs::change(
        call,
        &|live| {
            let mut new = live.clone();
            new["spec"] = if finalizers == json!([]) { json!({}) } else { json!({"finalizers": finalizers}) };
            Ok(new)
        },
        &|_, _| {},
    )
    .await?;
    Ok(crate::body::value(http::StatusCode::OK, &changed))
}

/// Takes over the conditions of the request's status: Approved or Denied.
async fn approve(call: &Call) -> Result<Response<Body>, Status> {
    let wanted = if call.info.verb == "patch" {
        let patch: Value = serde_json::from_slice(&call.body).map_err(|e| Status::bad_request(e.to_string()))?;
        let live = call.registry.cache.get(&call.row, "", &call.info.name).ok_or_else(|| call.not_found())?.parse();
        patch::merge_patch(&live, &patch).map_err(|e| Status::bad_request(e.to_string()))?
    } else {
        crate::decode::object(&call.headers, &call.body)?
    };
    let conditions = wanted.pointer("/status/conditions").cloned().unwrap_or(json!([]));
    let revision = wanted.resource_version().to_string();
    let changed = verbs::change(
        call,
        &|live| {
            let mut new = live.clone();
            crate::strategy::set_default(&mut new, "status", json!({}));
            new["status"]["conditions"] = conditions.clone();
            if !revision.is_empty() {
                new.metadata_mut().insert("resourceVersion".into(), json!(revision));
            }
            Ok(new)
        },
        &|_, _| {},
    )
    .await?;
    Ok(crate::body::value(http::StatusCode::OK, &changed))
}
