//! `scale`: the number of replicas of a workload, alone.

use crate::body::{self, Body};
use crate::decode;
use crate::verbs::{self, Call};
use api::selector::LabelSelectorSpec;
use api::{Cause, ObjectExt, Status, schema};
use http::{Response, StatusCode};
use serde_json::{Value, json};

fn scale_of(object: &Value) -> Value {
    let spec: LabelSelectorSpec =
        object.pointer("/spec/selector").and_then(|s| serde_json::from_value(s.clone()).ok()).unwrap_or_default();
    let mut selector: Vec<String> = spec.match_labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    for expression in &spec.match_expressions {
        let (key, values) = (&expression.key, expression.values.join(","));
        selector.push(match expression.operator.as_str() {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.clone(),
            _ => format!("!{key}"),
        });
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": object.name(), "namespace": object.namespace(), "uid": object.uid(),
            "resourceVersion": object.resource_version(), "creationTimestamp": object.text("/metadata/creationTimestamp")},
        "spec": {"replicas": object.pointer("/spec/replicas").cloned().unwrap_or(json!(0))},
        "status": {"replicas": object.pointer("/status/replicas").cloned().unwrap_or(json!(0)),
            "selector": selector.join(",")},
    })
}

pub async fn serve(call: &Call) -> Result<Response<Body>, Status> {
    let live = call
        .registry
        .cache
        .get(&call.row, &call.info.namespace, &call.info.name)
        .ok_or_else(|| call.not_found())?
        .parse();
    let current = scale_of(&live);
    let mut wanted = match call.info.verb {
        "get" => return Ok(body::value(StatusCode::OK, &current)),
        "update" => decode::object(&call.headers, &call.body)?,
        _ => {
            let patch: Value = serde_json::from_slice(&call.body)
                .map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
            let media = call.headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or("");
            let result = if media.starts_with("application/json-patch+json") {
                patch::json_patch(&current, &patch)
            } else {
                // A Scale has no lists, so strategic and merge patches mean the same.
                patch::merge_patch(&current, &patch)
            };
            result.map_err(|e| Status::bad_request(e.to_string()))?
        }
    };
    if let Some(message) = schema::message("autoscaling.v1.Scale") {
        let validation = decode::FieldValidation::parse(call.info.query.get("fieldValidation"))?;
        decode::conform_to(message, "Scale", "v1", &mut wanted, &[], validation)?;
    }
    let replicas = wanted.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
    if replicas < 0 {
        let cause = Cause::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(Status::invalid("autoscaling", "Scale", &call.info.name, vec![cause]));
    }
    let asked = wanted.resource_version().to_string();
    let exact = !asked.is_empty() && call.info.verb == "update";
    if exact && asked != live.resource_version() {
        return Err(Status::stale(&call.row.group, &call.row.plural, &call.info.name));
    }
    let changed = verbs::change(
        call,
        &|live| {
            let mut new = live.clone();
            new["spec"]["replicas"] = json!(replicas);
            Ok(new)
        },
        &|old, new| {
            let manager = crate::managed::manager(&call.info, call.user_agent());
            crate::managed::track(&call.row, Some(old), new, &manager, "scale", call.registry.now());
        },
    )
    .await?;
    Ok(body::value(StatusCode::OK, &scale_of(&changed)))
}
