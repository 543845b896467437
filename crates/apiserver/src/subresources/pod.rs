//! `binding` puts a pod on a node; `eviction` asks it to leave, within disruption budgets.

use crate::body::{self, Body};
use crate::decode;
use crate::request::{Query, RequestInfo};
use crate::verbs::{self, Call};
use api::{LabelSelector, ObjectExt, Status, time};
use http::{Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

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
    let dry = eviction.pointer("/deleteOptions/dryRun").and_then(Value::as_array).is_some_and(|d| !d.is_empty());
    spend(call, &pod, dry || call.info.query.is_dry_run()).await?;
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

/// Takes this pod's disruption from every budget that covers it, in a write of the budget: of two evictions at once, the
/// second sees the first.
async fn spend(call: &Call, pod: &Value, dry: bool) -> Result<(), Status> {
    let Some(row) = call.registry.catalog.find("policy", "v1", "poddisruptionbudgets") else { return Ok(()) };
    // A pod that serves nobody costs no disruption.
    if !is_ready(pod) {
        return Ok(());
    }
    let (_, budgets) = call.registry.cache.list(row, pod.namespace());
    for budget in budgets.iter().map(|b| b.parse()).filter(|b| selector(b).is_some_and(|s| s.matches_object(pod))) {
        let write = Call {
            registry: call.registry.clone(),
            row: row.clone(),
            info: RequestInfo {
                verb: "patch",
                is_resource: true,
                group: "policy".into(),
                version: "v1".into(),
                namespace: pod.namespace().into(),
                plural: row.plural.to_string(),
                name: budget.name().into(),
                subresource: "status".into(),
                query: if dry { Query::dry_run() } else { Query::default() },
                ..RequestInfo::default()
            },
            headers: call.headers.clone(),
            who: call.who.clone(),
            body: bytes::Bytes::new(),
        };
        let now = call.registry.now();
        let spent = |live: &Value| {
            let (_, pods) = call.registry.cache.list(&call.row, pod.namespace());
            let pods: Vec<Value> = pods.iter().map(|p| p.parse()).collect();
            without(live, pod, &pods, now).ok_or_else(|| too_many(live.name()))
        };
        match verbs::change(&write, &spent, &|_, _| {}).await {
            // A budget that has just gone binds nobody.
            Err(status) if status.is_not_found() => {}
            other => drop(other?),
        }
    }
    Ok(())
}

fn too_many(budget: &str) -> Status {
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
    status
}

fn selector(budget: &Value) -> Option<LabelSelector> {
    let selector = budget.pointer("/spec/selector").cloned().unwrap_or(json!({}));
    serde_json::from_value(selector).ok().and_then(|s| LabelSelector::from_spec(&s).ok())
}

/// How long an eviction counts whose pod does not go.
const DISRUPTION: SignedDuration = SignedDuration::from_mins(2);

/// The budget after this pod's eviction; `None` if it cannot spare the pod.
fn without(budget: &Value, pod: &Value, pods: &[Value], now: Timestamp) -> Option<Value> {
    let selector = selector(budget)?;
    let covered: Vec<&Value> = pods.iter().filter(|p| selector.matches_object(p)).collect();
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
        (None, None) => 0,
    };
    // Evicted pods that are still to be seen going.
    let leaving: Map<String, Value> = budget
        .pointer("/status/disruptedPods")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(name, at)| {
            let at = at.as_str().and_then(time::parse);
            let made = covered.iter().find(|p| p.name() == *name && !p.is_deleting());
            let made = made.and_then(|p| time::parse(p.text("/metadata/creationTimestamp")));
            matches!((at, made), (Some(at), Some(made)) if made <= at && now.duration_since(at) < DISRUPTION)
        })
        .map(|(name, at)| (name.clone(), at.clone()))
        .collect();
    let others = covered.iter().filter(|p| is_ready(p) && p.name() != pod.name() && !leaving.contains_key(p.name()));
    let allowed = others.count().checked_sub(needed)?;
    let mut new = budget.clone();
    crate::strategy::set_default(&mut new, "status", json!({}));
    for field in ["currentHealthy", "desiredHealthy", "expectedPods"] {
        crate::strategy::set_default(&mut new["status"], field, json!(0));
    }
    new["status"]["disruptionsAllowed"] = json!(allowed);
    new["status"]["disruptedPods"] = Value::Object(leaving);
    new["status"]["disruptedPods"][pod.name()] = json!(time::seconds(now));
    Some(new)
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    !pod.is_deleting()
        && conditions.into_iter().flatten().any(|c| c.text("/type") == "Ready" && c.text("/status") == "True")
}
