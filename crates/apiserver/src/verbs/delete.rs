//! Delete, of one object or a collection: preconditions, grace, finalizers, propagation.

use super::Call;
use crate::body;
use crate::cache::to_stored;
use crate::catalog::Row;
use crate::decode;
use crate::strategy::Deletion;
use crate::verbs::read::Selection;
use api::schema;
use api::{ObjectExt, Status, time};
use http::{Response, StatusCode};
use jiff::SignedDuration;
use serde_json::{Value, json};
use store::{Compare, Outcome, Txn};

#[derive(Debug, Clone, Default)]
struct Options {
    grace: Option<i64>,
    uid: Option<String>,
    revision: Option<String>,
    propagation: String,
    dry_run: bool,
}

fn options(call: &Call) -> Result<Options, Status> {
    let query = &call.info.query;
    let mut options = Options {
        grace: query.get("gracePeriodSeconds").parse().ok(),
        propagation: query.get("propagationPolicy").into(),
        dry_run: query.is_dry_run(),
        ..Options::default()
    };
    if !call.body.is_empty() {
        let mut body = decode::object(&call.headers, &call.body)?;
        if let Some(schema) = schema::message("meta.v1.DeleteOptions") {
            decode::conform_to(schema, "DeleteOptions", "v1", &mut body, &[], decode::FieldValidation::Ignore)?;
        }
        let text = |pointer: &str| Some(body.text(pointer).to_string()).filter(|t| !t.is_empty());
        options.grace = body.get("gracePeriodSeconds").and_then(Value::as_i64).or(options.grace);
        options.uid = text("/preconditions/uid");
        options.revision = text("/preconditions/resourceVersion");
        options.propagation = text("/propagationPolicy").unwrap_or(options.propagation);
        let dry_run = body.get("dryRun").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        super::check_dry_run("DeleteOptions", dry_run.iter().filter_map(Value::as_str))?;
        options.dry_run |= !dry_run.is_empty();
        if let Some(orphan) = body.get("orphanDependents").and_then(Value::as_bool) {
            options.propagation = if orphan { "Orphan" } else { "Background" }.into();
        }
    }
    if options.grace.is_some_and(|g| g < 0) {
        return Err(Status::bad_request("gracePeriodSeconds must be a non-negative integer"));
    }
    if !matches!(options.propagation.as_str(), "" | "Background" | "Foreground" | "Orphan") {
        return Err(Status::bad_request(format!(
            "invalid propagationPolicy {:?}: use Background, Foreground or Orphan",
            options.propagation
        )));
    }
    Ok(options)
}

/// The transaction that removes an object and gives back what it claimed.
pub fn txn(row: &Row, old: &Value, compare: Compare) -> Txn {
    let mut txn = Txn::new().when(compare).delete(row.key(old.namespace(), old.name()));
    for key in row.strategy.released(old) {
        txn = txn.delete(key);
    }
    txn
}

pub async fn delete(call: &Call) -> Result<Response<body::Body>, Status> {
    let options = options(call)?;
    match delete_one(call, &call.info.namespace, &call.info.name, &options).await? {
        Deleted::Marked(kept) => Ok(body::value(StatusCode::OK, &kept)),
        Deleted::Gone(last) if call.row.strategy.answers_deleted() => Ok(body::value(StatusCode::OK, &last)),
        Deleted::Gone(last) => Ok(body::value(StatusCode::OK, &success(call, &call.info.name, last.uid()))),
    }
}

fn success(call: &Call, name: &str, uid: &str) -> Value {
    let mut details = json!({"name": name, "kind": call.row.plural});
    if !call.row.group.is_empty() {
        details["group"] = json!(call.row.group);
    }
    if !uid.is_empty() {
        details["uid"] = json!(uid);
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
}

/// What became of an object.
enum Deleted {
    /// It was removed; this was its last state.
    Gone(Value),
    /// It stays for now, marked, and waits for grace or finalizers.
    Marked(Value),
}

/// Deletes one object.
async fn delete_one(call: &Call, namespace: &str, name: &str, options: &Options) -> Result<Deleted, Status> {
    let row = &call.row;
    let not_found = || Status::not_found(&row.group, &row.plural, name);
    for _ in 0..16 {
        let live = call.registry.cache.get(row, namespace, name).ok_or_else(not_found)?;
        let old = live.parse();
        if let Some(why) = row.strategy.keeps(&old) {
            return Err(Status::refused(&row.group, &row.plural, name, why));
        }
        if let Some(uid) = options.uid.as_ref().filter(|u| u.as_str() != old.uid()) {
            return Err(Status::conflict(
                &row.group,
                &row.plural,
                name,
                &format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", old.uid()),
            ));
        }
        if let Some(revision) = options.revision.as_ref().filter(|r| r.as_str() != old.resource_version()) {
            return Err(Status::conflict(
                &row.group,
                &row.plural,
                name,
                &format!(
                    "Precondition failed: ResourceVersion in precondition: {revision}, ResourceVersion in object meta: {}",
                    old.resource_version()
                ),
            ));
        }
        let now = call.registry.now();
        let mut new = old.clone();
        let mut finalizers: Vec<String> = old.finalizers().iter().map(|f| (*f).to_string()).collect();
        match options.propagation.as_str() {
            "Foreground" if !finalizers.iter().any(|f| f == "foregroundDeletion") => {
                finalizers.push("foregroundDeletion".into());
            }
            "Orphan" if !finalizers.iter().any(|f| f == "orphan") => finalizers.push("orphan".into()),
            "Background" => finalizers.retain(|f| f != "orphan" && f != "foregroundDeletion"),
            _ => {}
        }
        if finalizers.is_empty() {
            new.metadata_mut().remove("finalizers");
        } else {
            new.metadata_mut().insert("finalizers".into(), json!(finalizers));
        }
        let held_by_spec = *row.kind == *"Namespace"
            && old.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|f| !f.is_empty());
        let deletion = row.strategy.deletion(&old, options.grace);
        let waits = !finalizers.is_empty() || held_by_spec || matches!(deletion, Deletion::Graceful(_));
        let compare = Compare::Unchanged(row.key(namespace, name), live.revision);
        if !waits {
            if options.dry_run {
                return Ok(Deleted::Gone(old));
            }
            match call.registry.commit(txn(row, &old, compare)).await? {
                Outcome::Committed(_) => return Ok(Deleted::Gone(old)),
                Outcome::Failed { .. } => continue,
            }
        }
        let seconds = match deletion {
            Deletion::Graceful(seconds) => seconds,
            Deletion::Now => 0,
        };
        let metadata = new.metadata_mut();
        let before = metadata.get("deletionGracePeriodSeconds").and_then(Value::as_i64);
        // A second deletion may only shorten the wait.
        if before.is_none_or(|b| seconds < b) {
            let at = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
            metadata.insert("deletionTimestamp".into(), json!(time::seconds(at)));
            metadata.insert("deletionGracePeriodSeconds".into(), json!(seconds));
        }
        if row.strategy.has_generation() && before.is_none() {
            let generation = metadata.get("generation").and_then(Value::as_i64).unwrap_or(0) + 1;
            metadata.insert("generation".into(), json!(generation));
        }
        if held_by_spec {
            new["status"] = json!({"phase": "Terminating"});
        }
        if options.dry_run || new == old {
            return Ok(Deleted::Marked(new));
        }
        let txn = Txn::new().when(compare).put(row.key(namespace, name), to_stored(&new));
        match call.registry.commit(txn).await? {
            Outcome::Committed(revision) => {
                new.metadata_mut().insert("resourceVersion".into(), json!(revision.to_string()));
                return Ok(Deleted::Marked(new));
            }
            Outcome::Failed { .. } => {}
        }
    }
    Err(Status::stale(&row.group, &row.plural, name))
}

pub async fn delete_collection(call: &Call) -> Result<Response<body::Body>, Status> {
    let options = options(call)?;
    let selection = Selection::parse(call)?;
    let (revision, items) = call.registry.cache.list(&call.row, &call.info.namespace);
    let mut deleted = Vec::new();
    for stored in items.iter().filter(|s| selection.selects(&call.row, s)) {
        match delete_one(call, &stored.namespace, &stored.name, &options).await {
            Ok(Deleted::Gone(object) | Deleted::Marked(object)) => deleted.push(object),
            Err(status) if status.is_not_found() => {}
            Err(status) => return Err(status),
        }
    }
    let list = json!({
        "kind": format!("{}List", call.row.kind), "apiVersion": call.row.api_version(),
        "metadata": {"resourceVersion": revision.to_string()}, "items": deleted,
    });
    Ok(body::value(StatusCode::OK, &list))
}
