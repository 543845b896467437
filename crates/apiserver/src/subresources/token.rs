//! `serviceaccounts/NAME/token`: a TokenRequest becomes a signed token.

use crate::auth::token::{Claims, TokenKey};
use crate::body::{self, Body};
use crate::decode::{self, FieldValidation};
use crate::server::ApiServer;
use crate::verbs::Call;
use api::{Cause, ObjectExt, Status, kinds, schema};
use http::{Response, StatusCode};
use serde_json::{Value, json};

pub async fn create(server: &ApiServer, call: &Call) -> Result<Response<Body>, Status> {
    let (mut request, repeated) = decode::object_with_repeats(&call.headers, &call.body)?;
    if let Some(message) = schema::message("authentication.v1.TokenRequest") {
        let validation = FieldValidation::parse(call.info.query.get("fieldValidation"))?;
        decode::conform_to(message, "TokenRequest", "v1", &mut request, &repeated, validation)?;
    }
    let account = call
        .registry
        .cache
        .get(&call.row, &call.info.namespace, &call.info.name)
        .ok_or_else(|| call.not_found())?
        .parse();
    let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(3600);
    let invalid = |cause| Status::invalid("authentication.k8s.io", "TokenRequest", &call.info.name, vec![cause]);
    if seconds < 600 {
        return Err(invalid(Cause::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration less than 10 minutes",
        )));
    }
    if seconds > 1 << 32 {
        return Err(invalid(Cause::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration larger than 2^32 seconds",
        )));
    }
    let mut claims = Claims {
        namespace: account.namespace().into(),
        account: account.name().into(),
        account_uid: account.uid().into(),
        audiences: request
            .pointer("/spec/audiences")
            .and_then(Value::as_array)
            .filter(|a| !a.is_empty())
            .map(|a| a.iter().filter_map(Value::as_str).map(str::to_string).collect())
            .unwrap_or_else(|| vec![server.tokens().issuer.clone()]),
        ..Claims::default()
    };
    if let Some(bound) = request.pointer("/spec/boundObjectRef") {
        let (kind, name, uid) = (bound.text("/kind"), bound.text("/name"), bound.text("/uid"));
        match kind {
            "Pod" => {
                let pod = call
                    .registry
                    .read(&kinds::PODS, account.namespace(), name)
                    .ok_or_else(|| Status::not_found("", "pods", name))?
                    .parse();
                if !uid.is_empty() && uid != pod.uid() {
                    return Err(Status::conflict(
                        "",
                        "pods",
                        name,
                        "the UID in the bound object reference does not match the UID in record",
                    ));
                }
                if pod.text("/spec/serviceAccountName") != account.name() {
                    return Err(Status::bad_request(format!(
                        "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                        account.name()
                    )));
                }
                if call.who.node().is_some_and(|node| node != pod.text("/spec/nodeName")) {
                    return Err(Status::forbidden("a node can only request tokens for pods that are bound to it"));
                }
                claims.node = Some(pod.text("/spec/nodeName").to_string()).filter(|n| !n.is_empty());
                claims.pod = Some((pod.name().into(), pod.uid().into()));
            }
            other => {
                return Err(invalid(Cause::unsupported("spec.boundObjectRef.kind", other, &["Pod"])));
            }
        }
    } else if let Some(node) = call.who.node() {
        claims.node = Some(node.into());
    }
    let now = call.registry.now();
    request["status"] = json!({
        "token": server.tokens().sign(&claims, seconds, now),
        "expirationTimestamp": TokenKey::expiry(seconds, now),
    });
    request["spec"]["expirationSeconds"] = json!(seconds);
    request["spec"]["audiences"] = json!(claims.audiences);
    request["metadata"] = json!({"name": call.info.name, "namespace": call.info.namespace});
    Ok(body::value(StatusCode::CREATED, &request))
}
