//! `binding` puts a pod on a node; `eviction` asks it to leave, within disruption budgets.

use crate::body::{self, Body};
use crate::decode;
use crate::verbs::{self, Call};
use api::{LabelSelector, ObjectExt, Status, time};
use http::{Response, StatusCode};
use serde_json::{Value, json};

pub async fn bind(call: &Call) -> Result<Response<Body>, Status> {
    let binding = decode::object(&call.headers, &call.body)?;
    let node = binding.text("/target/name").to_string();
    if node.is_empty() {
        return Err(Status::bad_request("target.name is required: name the node to bind to"));
    }
    let uid = binding.uid().to_string();
    let name = call.info.name.clone();
    let now = time::seconds(call.registry.now());
    verbs::change(
        call,
        &|live| {
            let conflict = |why: &str| Err(Status::conflict("", "pods/binding", &name, why));
            if !uid.is_empty() && uid != live.uid() {
                return conflict("the pod was replaced by another of the same name");
            }
            if live.is_deleting() {
                return conflict(&format!("pod {name} is being deleted, cannot be assigned to a host"));
            }
            let bound = live.text("/spec/nodeName");
            if !bound.is_empty() {
                return conflict(&format!("pod {name} is already assigned to node {bound:?}"));
            }
            let mut new = live.clone();
            new["spec"]["nodeName"] = json!(node);
            set_condition(&mut new, "PodScheduled", "True", &now);
            Ok(new)
        },
        &|_, _| {},
    )
    .await?;
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    Ok(body::value(StatusCode::CREATED, &status))
}

fn set_condition(pod: &mut Value, kind: &str, status: &str, now: &str) {
    crate::strategy::set_default(pod, "status", json!({}));
    crate::strategy::set_default(&mut pod["status"], "conditions", json!([]));
    let Some(conditions) = pod["status"]["conditions"].as_array_mut() else { return };
    conditions.retain(|c| c.text("/type") != kind);
    conditions.push(json!({"type": kind, "status": status, "lastProbeTime": null, "lastTransitionTime": now}));
}

pub async fn evict(call: &Call) -> Result<Response<Body>, Status> {
    let eviction = decode::object(&call.headers, &call.body)?;
    let pod = call
        .registry
        .cache
        .get(&call.row, &call.info.namespace, &call.info.name)
        .ok_or_else(|| call.not_found())?
        .parse();
    if let Some(budget) = blocking_budget(call, &pod) {
        let mut status =
            Status::new(429, "TooManyRequests", "Cannot evict pod as it would violate the pod's disruption budget.");
        status.details = Some(api::status::Details {
            causes: vec![api::Cause {
                reason: "DisruptionBudget".into(),
                message: format!("The disruption budget {budget} does not allow evicting pods currently"),
                field: String::new(),
            }],
            retry_after_seconds: Some(5),
            ..Default::default()
        });
        return Err(status);
    }
    let options = eviction.get("deleteOptions").cloned().unwrap_or(json!({}));
    let mut query = call.info.clone();
    query.subresource.clear();
    let mut options = options;
    options["kind"] = json!("DeleteOptions");
    options["apiVersion"] = json!("v1");
    let mut headers = call.headers.clone();
    headers.insert("content-type", http::HeaderValue::from_static("application/json"));
    let delete = Call {
        registry: call.registry.clone(),
        row: call.row.clone(),
        info: query,
        headers,
        who: call.who.clone(),
        body: options.to_string().into(),
    };
    verbs::delete(&delete).await?;
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    Ok(body::value(StatusCode::CREATED, &status))
}

/// The name of a budget that this eviction would break.
fn blocking_budget(call: &Call, pod: &Value) -> Option<String> {
    let row = call.registry.catalog.find("policy", "v1", "poddisruptionbudgets")?;
    let (_, budgets) = call.registry.cache.list(row, pod.namespace());
    let (_, pods) = call.registry.cache.list(&call.row, pod.namespace());
    let pods: Vec<Value> = pods.iter().map(|p| p.parse()).collect();
    for budget in budgets {
        let budget = budget.parse();
        let selector = budget.pointer("/spec/selector").cloned().unwrap_or(json!({}));
        let Some(selector) = serde_json::from_value(selector).ok().and_then(|s| LabelSelector::from_spec(&s).ok())
        else {
            continue;
        };
        if !selector.matches_object(pod) {
            continue;
        }
        let covered: Vec<&Value> = pods.iter().filter(|p| selector.matches_object(p)).collect();
        let healthy = covered.iter().filter(|p| is_ready(p)).count();
        let total = covered.len();
        let scaled = |value: &Value| match value {
            Value::Number(n) => n.as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0),
            Value::String(text) => {
                let percent: usize = text.trim_end_matches('%').parse().unwrap_or(0);
                (total * percent).div_ceil(100)
            }
            _ => 0,
        };
        let needed = match (budget.pointer("/spec/minAvailable"), budget.pointer("/spec/maxUnavailable")) {
            (Some(min), _) => scaled(min),
            (None, Some(max)) => total.saturating_sub(scaled(max)),
            (None, None) => continue,
        };
        let after = healthy - usize::from(is_ready(pod));
        if is_ready(pod) && after < needed {
            return Some(budget.name().to_string());
        }
    }
    None
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    !pod.is_deleting()
        && conditions.into_iter().flatten().any(|c| c.text("/type") == "Ready" && c.text("/status") == "True")
}
