//! Create, update and patch.

use super::Call;
use crate::auth::forbidden;
use crate::auth::rbac::Attributes;
use crate::body;
use crate::cache::to_stored;
use crate::catalog::Row;
use crate::decode::{self, FieldValidation};
use crate::json;
use crate::managed;
use crate::registry::{Claims, parse_revision};
use crate::strategy::{validate_meta, validate_meta_update};
use crate::verbs::delete;
use api::{ObjectExt, Status, kinds, time};
use http::{Response, StatusCode};
use patch::{ApplyError, PatchError};
use serde_json::{Map, Value, json};
use store::{Compare, Op, Outcome, Revision, Txn};

/// How often a write is decided again after somebody else's won.
const ATTEMPTS: usize = 8;

pub async fn create(call: &Call) -> Result<Response<body::Body>, Status> {
    let validation = FieldValidation::parse(call.info.query.get("fieldValidation"))?;
    let (mut object, repeated) = decode::object_with_repeats(&call.headers, &call.body)?;
    let warnings = decode::conform(&call.row, &mut object, &repeated, validation)?;
    if !call.info.name.is_empty() {
        return Err(Status::method_not_allowed());
    }
    let manager = managed::manager(&call.info, call.user_agent());
    let (object, _) = create_object(call, object, |object| {
        managed::track(&call.row, None, object, &manager, "", call.registry.now());
    })
    .await?;
    Ok(with_warnings(answer(call, StatusCode::CREATED, &object), &warnings))
}

/// Creates a conforming object. `finish` runs when all but the revision is decided.
async fn create_object(
    call: &Call,
    mut object: Value,
    finish: impl Fn(&mut Value),
) -> Result<(Value, Revision), Status> {
    let row = &call.row;
    place(call, &mut object)?;
    if !object.resource_version().is_empty() {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let generated = object.name().is_empty().then(|| object.text("/metadata/generateName").to_string());
    let now = call.registry.now();
    {
        let metadata = object.metadata_mut();
        for server_owned in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"] {
            metadata.remove(server_owned);
        }
        metadata.insert("uid".into(), json!(super::random_uid()));
        metadata.insert("creationTimestamp".into(), json!(time::seconds(now)));
        metadata.remove("generation");
        if row.strategy.has_generation() {
            metadata.insert("generation".into(), json!(1));
        }
    }
    if row.has_status
        && let Some(map) = object.as_object_mut()
    {
        map.remove("status");
    }
    let original = object;
    for attempt in 0..ATTEMPTS {
        let mut object = original.clone();
        if let Some(prefix) = generated.as_ref().filter(|p| !p.is_empty()) {
            let keep = prefix.len().min(58);
            let name = format!("{}{}", &prefix[..floor_boundary(prefix, keep)], super::random_suffix());
            object.metadata_mut().insert("name".into(), json!(name));
        }
        row.strategy.default(&mut object);
        namespace_takes(call, object.namespace(), object.name())?;
        row.strategy.prepare_for_create(&call.registry, &call.who, &mut object)?;
        if row.has_status && row.schema.is_some_and(|s| s.field("status").is_some_and(|f| !f.pointer)) {
            crate::strategy::set_default(&mut object, "status", json!({}));
        }
        row.strategy.permits(&call.registry, &call.who, &object, None)?;
        let mut causes = validate_meta(&object, row.namespaced, |n| row.strategy.name_problems(n));
        causes.extend(row.strategy.validate(&object, None));
        if !causes.is_empty() {
            return Err(Status::invalid(&row.group, &row.kind, object.name(), causes));
        }
        // Before claims: what a living object of this name holds is no complaint of its own.
        if generated.is_none() && call.registry.cache.get(row, object.namespace(), object.name()).is_some() {
            return Err(Status::already_exists(&row.group, &row.plural, object.name()));
        }
        let claims = row.strategy.claims(&call.registry, &mut object, None)?;
        finish(&mut object);
        let key = row.key(object.namespace(), object.name());
        if call.info.query.is_dry_run() {
            return Ok((object, 0));
        }
        let txn = with_claims(Txn::new().when(Compare::Absent(key.clone())).put(key, to_stored(&object)), &claims);
        match call.registry.commit(txn).await? {
            Outcome::Committed(revision) => {
                object.metadata_mut().insert("resourceVersion".into(), json!(revision.to_string()));
                return Ok((object, revision));
            }
            Outcome::Failed { index: 0, .. } if generated.is_none() => {
                return Err(Status::already_exists(&row.group, &row.plural, object.name()));
            }
            Outcome::Failed { .. } if attempt + 1 == ATTEMPTS => break,
            Outcome::Failed { .. } => {}
        }
    }
    Err(Status::new(409, "AlreadyExists", "the server was not able to generate a unique name or claim for the object"))
}

fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
}

/// Puts the request's namespace into the object, or refuses one that differs.
fn place(call: &Call, object: &mut Value) -> Result<(), Status> {
    if !call.row.namespaced {
        return Ok(());
    }
    let wanted = call.info.namespace.clone();
    if wanted.is_empty() {
        return Err(Status::bad_request("an empty namespace may not be set during creation"));
    }
    let own = object.namespace();
    if !own.is_empty() && own != wanted {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    object.metadata_mut().insert("namespace".into(), json!(wanted));
    Ok(())
}

/// A namespace must be there and not be going to take new objects.
fn namespace_takes(call: &Call, namespace: &str, name: &str) -> Result<(), Status> {
    if !call.row.namespaced {
        return Ok(());
    }
    let Some(found) = call.registry.read(&kinds::NAMESPACES, "", namespace) else {
        return Err(Status::not_found("", "namespaces", namespace));
    };
    // Events may still tell of the end, and reviews store nothing.
    if found.parse().is_deleting() && *call.row.kind != *"Event" {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut status = Status::refused(&call.row.group, &call.row.plural, name, &why);
        if let Some(details) = &mut status.details {
            details.causes = vec![api::Cause {
                reason: "NamespaceTerminating".into(),
                message: format!("namespace {namespace} is being terminated"),
                field: "metadata.namespace".into(),
            }];
        }
        return Err(status);
    }
    Ok(())
}

fn with_claims(mut txn: Txn, claims: &Claims) -> Txn {
    for claim in &claims.take {
        txn.compare.push(Compare::Absent(claim.key.clone()));
        txn.ops.push(Op::Put { key: claim.key.clone(), value: claim.value.clone() });
    }
    txn.compare.extend(claims.given.iter().cloned());
    for key in &claims.release {
        txn.ops.push(Op::Delete { key: key.clone() });
    }
    txn
}

/// What an update is made of, given the live object.
type Change<'a> = dyn Fn(&Value) -> Result<Value, Status> + Send + Sync + 'a;

pub async fn update(call: &Call) -> Result<Response<body::Body>, Status> {
    let validation = FieldValidation::parse(call.info.query.get("fieldValidation"))?;
    let (mut object, repeated) = decode::object_with_repeats(&call.headers, &call.body)?;
    let warnings = decode::conform(&call.row, &mut object, &repeated, validation)?;
    place(call, &mut object)?;
    if object.name() != call.info.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            object.name(),
            call.info.name
        )));
    }
    let manager = managed::manager(&call.info, call.user_agent());
    let live = call.registry.cache.get(&call.row, &call.info.namespace, &call.info.name);
    let unseen = matches!(object.resource_version(), "" | "0");
    if unseen && live.is_some() && !call.row.strategy.updates_unseen() {
        let cause = api::Cause::invalid("metadata.resourceVersion", "0x0", "must be specified for an update");
        return Err(Status::invalid(&call.row.group, &call.row.plural, &call.info.name, vec![cause]));
    }
    if unseen && live.is_none() && call.row.strategy.creates_on_update() && call.info.subresource.is_empty() {
        may_create(call)?;
        let track = |object: &mut Value| {
            managed::track(&call.row, None, object, &manager, "", call.registry.now());
        };
        match create_object(call, object.clone(), track).await {
            // Somebody else was first: then it is an update after all, as far as the kind takes one unseen.
            Err(status) if status.reason == "AlreadyExists" && call.row.strategy.updates_unseen() => {}
            Err(status) => return Err(status),
            Ok((created, _)) => return Ok(with_warnings(answer(call, StatusCode::CREATED, &created), &warnings)),
        }
    }
    let changed = change(call, &|_: &Value| Ok(object.clone()), &|old, new| {
        managed::track(&call.row, Some(old), new, &manager, &call.info.subresource, call.registry.now());
    })
    .await?;
    Ok(with_warnings(answer(call, StatusCode::OK, &changed), &warnings))
}

/// An update or apply that creates needs the right to create, too.
fn may_create(call: &Call) -> Result<(), Status> {
    let asked = Attributes {
        verb: "create".into(),
        group: call.info.group.clone(),
        plural: call.info.plural.clone(),
        namespace: call.info.namespace.clone(),
        name: call.info.name.clone(),
        ..Attributes::default()
    };
    if call.registry.rbac.allows(&call.registry, &call.who, &asked) {
        Ok(())
    } else {
        Err(forbidden(&call.who, &asked))
    }
}

pub async fn patch(call: &Call) -> Result<Response<body::Body>, Status> {
    let media = call.headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or("");
    let media = media.split(';').next().unwrap_or("").trim().to_string();
    let validation = FieldValidation::parse(call.info.query.get("fieldValidation"))?;
    if media == "application/apply-patch+yaml" {
        return apply(call, validation).await;
    }
    let (body, repeated) =
        json::parse(&call.body).map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
    let schema = call.row.schema;
    let manager = managed::manager(&call.info, call.user_agent());
    let warnings = std::sync::Mutex::new(Vec::new());
    let make = |live: &Value| -> Result<Value, Status> {
        let result = match media.as_str() {
            "application/json-patch+json" => patch::json_patch(live, &body),
            "application/merge-patch+json" => patch::merge_patch(live, &body),
            "application/strategic-merge-patch+json" => match schema {
                Some(schema) => patch::strategic_merge_patch(live, &body, schema),
                None => return Err(media_error(&["application/json-patch+json", "application/merge-patch+json"])),
            },
            _ => {
                return Err(media_error(&[
                    "application/json-patch+json",
                    "application/merge-patch+json",
                    "application/strategic-merge-patch+json",
                    "application/apply-patch+yaml",
                ]));
            }
        };
        let mut patched = result.map_err(|e| patch_error(call, &e))?;
        *warnings.lock().expect("nobody panics with the lock") =
            decode::conform(&call.row, &mut patched, &repeated, validation)?;
        Ok(patched)
    };
    let changed = change(call, &make, &|old, new| {
        managed::track(&call.row, Some(old), new, &manager, &call.info.subresource, call.registry.now());
    })
    .await?;
    let warnings = warnings.into_inner().expect("nobody panics with the lock");
    Ok(with_warnings(answer(call, StatusCode::OK, &changed), &warnings))
}

fn media_error(accepted: &[&str]) -> Status {
    Status::unsupported_media_type(format!(
        "the body of the request was in an unknown format - accepted media types include: {}",
        accepted.join(", ")
    ))
}

fn patch_error(call: &Call, error: &PatchError) -> Status {
    match error {
        PatchError::Malformed(_) => Status::bad_request(error.to_string()),
        PatchError::TooLarge(_) => Status::too_large(error.to_string()),
        // What is wrong with the patch stays unsaid, as in Kubernetes' own answer.
        PatchError::DoesNotApply(_) if is_json_patch(call) => {
            Status::new(422, "Invalid", "the server rejected our request due to an error in our request")
        }
        PatchError::DoesNotApply(_) => Status::new(422, "Invalid", error.to_string()),
    }
}

fn is_json_patch(call: &Call) -> bool {
    call.headers
        .get("content-type")
        .and_then(|v| v.to_str().ok())
        .is_some_and(|m| m.starts_with("application/json-patch"))
}

async fn apply(call: &Call, validation: FieldValidation) -> Result<Response<body::Body>, Status> {
    let mut config: Value =
        serde_saphyr::from_slice(&call.body).map_err(|e| Status::bad_request(format!("error decoding YAML: {e}")))?;
    let warnings = decode::conform(&call.row, &mut config, &[], validation)?;
    place(call, &mut config)?;
    if config.name() != call.info.name {
        config.metadata_mut().insert("name".into(), json!(call.info.name));
    }
    let manager = call.info.query.get("fieldManager").to_string();
    if manager.is_empty() {
        return Err(Status::invalid(
            "meta.k8s.io",
            "PatchOptions",
            "",
            vec![api::Cause::required("fieldManager", "is required for apply patch")],
        ));
    }
    let force = call.info.query.flag("force");
    let merged = |live: Option<&Value>| -> Result<Value, Status> {
        let time = time::seconds(call.registry.now());
        let version = call.row.api_version();
        patch::apply(live, &config, call.row.schema, &manager, &version, &time, force).map_err(|e| match &e {
            ApplyError::Conflicts(conflicts) => {
                let mut status = Status::new(409, "Conflict", e.to_string());
                status.details = Some(api::status::Details {
                    causes: conflicts
                        .iter()
                        .map(|c| api::Cause {
                            reason: "FieldManagerConflict".into(),
                            message: c.message(),
                            field: c.field.clone(),
                        })
                        .collect(),
                    ..Default::default()
                });
                status
            }
            ApplyError::Malformed(_) => Status::bad_request(e.to_string()),
            ApplyError::Untyped { .. } => Status::internal(e),
        })
    };
    for _ in 0..ATTEMPTS {
        if call.registry.cache.get(&call.row, &call.info.namespace, &call.info.name).is_some() {
            let changed = change(call, &|live: &Value| merged(Some(live)), &|_, _| {}).await?;
            return Ok(with_warnings(answer(call, StatusCode::OK, &changed), &warnings));
        }
        if !call.info.subresource.is_empty() {
            return Err(call.not_found());
        }
        may_create(call)?;
        let fresh = merged(None)?;
        match create_object(call, fresh, |_| {}).await {
            Ok((created, _)) => return Ok(with_warnings(answer(call, StatusCode::CREATED, &created), &warnings)),
            Err(status) if status.reason == "AlreadyExists" => {}
            Err(status) => return Err(status),
        }
    }
    Err(Status::stale(&call.row.group, &call.row.plural, &call.info.name))
}

/// Changes the live object until the store takes it.
pub async fn change(
    call: &Call,
    make: &Change<'_>,
    finish: &(dyn Fn(&Value, &mut Value) + Send + Sync),
) -> Result<Value, Status> {
    let row = &call.row;
    for _ in 0..ATTEMPTS {
        let live =
            call.registry.cache.get(row, &call.info.namespace, &call.info.name).ok_or_else(|| call.not_found())?;
        let old = live.parse();
        let mut new = make(&old)?;
        let asked = new.resource_version().to_string();
        let exact = !asked.is_empty() && asked != "0";
        if exact && parse_revision(&asked)? != live.revision {
            return Err(Status::stale(&row.group, &row.plural, &call.info.name));
        }
        let uid = new.uid();
        if !uid.is_empty() && uid != old.uid() {
            return Err(Status::conflict(
                &row.group,
                &row.plural,
                &call.info.name,
                &format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", old.uid()),
            ));
        }
        carry_over(row, &call.info.subresource, &mut new, &old);
        row.strategy.default(&mut new);
        if call.info.subresource.is_empty() {
            row.strategy.prepare_for_update(&call.registry, &mut new, &old);
            row.strategy.permits(&call.registry, &call.who, &new, Some(&old))?;
        }
        let mut causes = validate_meta(&new, row.namespaced, |_| Vec::new());
        causes.extend(validate_meta_update(&new, &old));
        // These subresources change by their own rule what an update of the object may not.
        if !matches!(call.info.subresource.as_str(), "binding" | "finalize" | "approval") {
            causes.extend(row.strategy.validate(&new, Some(&old)));
        }
        if !causes.is_empty() {
            return Err(Status::invalid(&row.group, &row.kind, &call.info.name, causes));
        }
        let claims = row.strategy.claims(&call.registry, &mut new, Some(&old))?;
        if row.strategy.has_generation() && new.get("spec") != old.get("spec") {
            let generation = old.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0) + 1;
            new.metadata_mut().insert("generation".into(), json!(generation));
        }
        finish(&old, &mut new);
        new.metadata_mut().insert("resourceVersion".into(), json!(live.revision.to_string()));
        if same_but_managed(&new, &old) || call.info.query.is_dry_run() {
            // Nothing to write; managers alone are no reason either.
            return Ok(if call.info.query.is_dry_run() { new } else { old });
        }
        let key = row.key(old.namespace(), old.name());
        let compare = Compare::Unchanged(key.clone(), live.revision);
        let ends = new.is_deleting()
            && new.finalizers().is_empty()
            && new
                .pointer("/spec/finalizers")
                .and_then(Value::as_array)
                .is_none_or(|f| f.is_empty() || *row.kind != *"Namespace")
            && new.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0) == 0;
        let txn = if ends {
            delete::txn(row, &old, compare)
        } else {
            with_claims(Txn::new().when(compare).put(key, to_stored(&new)), &claims)
        };
        match call.registry.commit(txn).await? {
            Outcome::Committed(revision) => {
                new.metadata_mut().insert("resourceVersion".into(), json!(revision.to_string()));
                return Ok(new);
            }
            // The client named the revision it changed: it must decide again, not we.
            Outcome::Failed { index: 0, .. } if exact && media_is_put(call) => {
                return Err(Status::stale(&row.group, &row.plural, &call.info.name));
            }
            Outcome::Failed { .. } => {}
        }
    }
    Err(Status::stale(&row.group, &row.plural, &call.info.name))
}

fn media_is_put(call: &Call) -> bool {
    call.info.verb == "update"
}

fn same_but_managed(a: &Value, b: &Value) -> bool {
    let strip = |v: &Value| {
        let mut v = v.clone();
        v.metadata_mut().remove("managedFields");
        v
    };
    a == b || strip(a) == strip(b) && same_managers(a, b)
}

/// Whether the managers own the same, whatever the times say.
fn same_managers(a: &Value, b: &Value) -> bool {
    let strip = |v: &Value| -> Vec<Value> {
        let list = v.pointer("/metadata/managedFields").and_then(Value::as_array).cloned().unwrap_or_default();
        list.into_iter()
            .map(|mut entry| {
                if let Some(map) = entry.as_object_mut() {
                    map.remove("time");
                }
                entry
            })
            .collect()
    };
    strip(a) == strip(b)
}

/// What no client changes, and the half of the object that the other endpoint owns.
fn carry_over(row: &Row, subresource: &str, new: &mut Value, old: &Value) {
    if subresource == "status" {
        // A status write changes status, and metadata only where controllers need it.
        let status = new.get("status").cloned();
        let metadata = new.get("metadata").cloned();
        *new = old.clone();
        if let Some(map) = new.as_object_mut() {
            match status {
                Some(status) => map.insert("status".into(), status),
                None => map.remove("status"),
            };
        }
        for field in ["labels", "annotations", "managedFields"] {
            match metadata.as_ref().and_then(|m| m.get(field)) {
                Some(value) => new.metadata_mut().insert(field.into(), value.clone()),
                None => new.metadata_mut().remove(field),
            };
        }
    } else if row.has_status
        && subresource.is_empty()
        && let Some(map) = new.as_object_mut()
    {
        match old.get("status") {
            Some(status) => map.insert("status".into(), status.clone()),
            None => map.remove("status"),
        };
    }
    let empty = Map::new();
    let before = old.get("metadata").and_then(Value::as_object).unwrap_or(&empty).clone();
    let metadata = new.metadata_mut();
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
        "selfLink",
    ] {
        match before.get(field) {
            Some(value) => metadata.insert(field.into(), value.clone()),
            None => metadata.remove(field),
        };
    }
}

fn answer(call: &Call, code: StatusCode, object: &Value) -> Response<body::Body> {
    if body::shape(&call.headers) == body::Shape::Table {
        return body::value(
            code,
            &crate::table::one(&call.row, object, call.registry.now(), crate::table::Include::Metadata),
        );
    }
    body::value(code, object)
}

/// Warnings of a write, as kubectl shows them.
fn with_warnings(mut response: Response<body::Body>, warnings: &[String]) -> Response<body::Body> {
    for warning in warnings {
        let text = format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""));
        if let Ok(value) = http::HeaderValue::from_str(&text) {
            response.headers_mut().append("warning", value);
        }
    }
    response
}
