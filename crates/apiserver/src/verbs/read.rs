//! Get and list, answered from the cache as the bytes that are stored.

use super::Call;
use crate::body::{self, Shape};
use crate::cache::Stored;
use crate::catalog::Row;
use crate::registry::{parse_revision, store_error};
use crate::table;
use api::{FieldSelector, LabelSelector, ObjectExt, Status};
use base64::Engine;
use bytes::{BufMut, Bytes, BytesMut};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;

/// The label and field selectors of a request.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
}

impl Selection {
    pub fn parse(call: &Call) -> Result<Selection, Status> {
        let labels = LabelSelector::parse(call.info.query.get("labelSelector"))
            .map_err(|e| Status::bad_request(e.to_string()))?;
        let fields = FieldSelector::parse(call.info.query.get("fieldSelector"))
            .map_err(|e| Status::bad_request(e.to_string()))?;
        for term in &fields.terms {
            if !call.row.has_field(&term.path) {
                // Kinds that select by fields of their own say it in other words than the rest.
                let why = if call.row.fields.is_empty() {
                    let known = "only \"metadata.name\", \"metadata.namespace\"";
                    format!("{:?} is not a known field selector: {known}", term.path)
                } else {
                    format!("field label not supported: {}", term.path)
                };
                return Err(Status::bad_request(why));
            }
        }
        Ok(Selection { labels, fields })
    }

    pub fn selects(&self, row: &Row, stored: &Stored) -> bool {
        self.labels.matches(|key| stored.labels.get(key).map(|v| &**v))
            && self.fields.matches(|path| stored.field(row, path))
    }

    fn selects_object(&self, row: &Row, object: &Value) -> bool {
        self.labels.matches_object(object) && self.fields.matches(|path| row.field(object, path))
    }
}

pub async fn get(call: &Call) -> Result<Response<body::Body>, Status> {
    let asked = call.info.query.get("resourceVersion");
    if !asked.is_empty() && asked != "0" {
        call.registry.cache.reached(parse_revision(asked)?).await?;
    }
    let found =
        call.registry.cache.get(&call.row, &call.info.namespace, &call.info.name).ok_or_else(|| call.not_found())?;
    Ok(match body::shape(&call.headers) {
        Shape::Plain => {
            let bytes = found.bytes();
            body::maybe_gzip(&call.headers, body::json(StatusCode::OK, bytes.clone()), &bytes)
        }
        Shape::Table => {
            body::value(StatusCode::OK, &table::one(&call.row, &found.parse(), call.registry.now(), call.include()?))
        }
        Shape::PartialMetadata => body::value(StatusCode::OK, &table::partial(&found.parse())),
    })
}

/// Where a list goes on: a revision and the last key given.
fn encode_continue(revision: u64, key: &str) -> String {
    let text = json!({"v": "meta.k8s.io/v1", "rv": revision, "start": key}).to_string();
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
}

fn decode_continue(token: &str) -> Result<(u64, String), Status> {
    let wrong = || Status::bad_request("continue key is not valid: invalid token");
    let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).map_err(|_| wrong())?;
    let value: Value = serde_json::from_slice(&text).map_err(|_| wrong())?;
    let revision = value.get("rv").and_then(Value::as_u64).ok_or_else(wrong)?;
    Ok((revision, value.text("/start").to_string()))
}

pub async fn list(call: &Call) -> Result<Response<body::Body>, Status> {
    let selection = Selection::parse(call)?;
    let query = &call.info.query;
    let limit: usize = match query.get("limit") {
        "" => 0,
        text => text.parse().map_err(|_| Status::bad_request(format!("limit {text:?} is not a number")))?,
    };
    let asked = query.get("resourceVersion");
    let token = query.get("continue");
    let exact = query.get("resourceVersionMatch") == "Exact";
    let (revision, mut items, more): (u64, Vec<Arc<Stored>>, Option<String>);
    if !token.is_empty() || exact {
        let (at, after) =
            if token.is_empty() { (parse_revision(asked)?, String::new()) } else { decode_continue(token)? };
        return page(call, &selection, at, &after, limit).await;
    }
    if !asked.is_empty() && asked != "0" {
        call.registry.cache.reached(parse_revision(asked)?).await?;
    }
    (revision, items) = call.registry.cache.list(&call.row, &call.info.namespace);
    items.retain(|s| selection.selects(&call.row, s));
    let total = items.len();
    if limit > 0 && total > limit {
        items.truncate(limit);
        let last = items.last().map(|s| call.row.object_key(&s.namespace, &s.name)).unwrap_or_default();
        more = Some(encode_continue(revision, &last));
    } else {
        more = None;
    }
    // With a selector the rest cannot be counted without reading it.
    let counted = selection.labels.is_empty() && selection.fields.is_empty();
    let remaining = counted.then(|| total - items.len());
    Ok(respond(call, revision, &items, more, remaining, call.include()?))
}

/// A page of the list as it was at a revision, from the store's history.
async fn page(
    call: &Call,
    selection: &Selection,
    at: u64,
    after: &str,
    limit: usize,
) -> Result<Response<body::Body>, Status> {
    let row = &call.row;
    let mut prefix = row.prefix();
    if row.namespaced && !call.info.namespace.is_empty() {
        prefix = format!("{prefix}{}/", call.info.namespace);
    }
    let mut from = (!after.is_empty()).then(|| format!("{}{after}", row.prefix()));
    let mut objects = Vec::new();
    loop {
        let want = if limit == 0 { 0 } else { limit - objects.len() + 1 };
        let listing = call.registry.store.list(&prefix, from.as_deref(), want, Some(at)).await.map_err(|e| match e {
            store::Error::Compacted { .. } => Status::gone(
                "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.",
            ),
            other => store_error(other),
        })?;
        from = listing.items.last().map(|kv| kv.key.to_string());
        for kv in &listing.items {
            let mut object: Value = serde_json::from_slice(&kv.value).map_err(Status::internal)?;
            if selection.selects_object(row, &object) {
                object.metadata_mut().insert("resourceVersion".into(), json!(kv.mod_revision.to_string()));
                objects.push(object);
            }
        }
        if !listing.more || limit > 0 && objects.len() > limit {
            break;
        }
    }
    let more = limit > 0 && objects.len() > limit;
    if more {
        objects.truncate(limit);
    }
    let token = objects.last().filter(|_| more).map(|o| encode_continue(at, &row.object_key(o.namespace(), o.name())));
    if body::shape(&call.headers) == Shape::Table {
        let mut table = table::many(row, objects.iter(), call.registry.now(), call.include()?);
        table["metadata"] = list_meta(at, token.as_deref(), None);
        return Ok(body::value(StatusCode::OK, &table));
    }
    let list = json!({
        "kind": format!("{}List", row.kind), "apiVersion": row.api_version(),
        "metadata": list_meta(at, token.as_deref(), None), "items": objects,
    });
    Ok(body::value(StatusCode::OK, &list))
}

fn list_meta(revision: u64, token: Option<&str>, remaining: Option<usize>) -> Value {
    let mut meta = json!({"resourceVersion": revision.to_string()});
    if let Some(token) = token {
        meta["continue"] = json!(token);
        if let Some(remaining) = remaining {
            meta["remainingItemCount"] = json!(remaining);
        }
    }
    meta
}

fn respond(
    call: &Call,
    revision: u64,
    items: &[Arc<Stored>],
    token: Option<String>,
    remaining: Option<usize>,
    include: table::Include,
) -> Response<body::Body> {
    let row = &call.row;
    let meta = list_meta(revision, token.as_deref(), remaining);
    let bytes: Bytes = match body::shape(&call.headers) {
        Shape::Plain => {
            let size: usize = items.iter().map(|s| s.size() + 48).sum();
            let mut out = BytesMut::with_capacity(size + 256);
            let head = format!(
                "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{meta},\"items\":[",
                row.kind,
                row.api_version()
            );
            out.put_slice(head.as_bytes());
            for (i, stored) in items.iter().enumerate() {
                if i > 0 {
                    out.put_u8(b',');
                }
                stored.write(&mut out);
            }
            out.put_slice(b"]}\n");
            out.freeze()
        }
        Shape::Table => {
            let objects: Vec<Value> = items.iter().map(|s| s.parse()).collect();
            let mut table = table::many(row, objects.iter(), call.registry.now(), include);
            table["metadata"] = meta;
            table.to_string().into()
        }
        Shape::PartialMetadata => {
            let items: Vec<Value> = items.iter().map(|s| table::partial(&s.parse())).collect();
            let list = json!({
                "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "items": items,
            });
            list.to_string().into()
        }
    };
    body::maybe_gzip(&call.headers, body::json(StatusCode::OK, bytes.clone()), &bytes)
}
