//! `/openapi/v3`: made from catalog and schema table, so it cannot say anything else than what is served.

use crate::body::{self, Body};
use crate::catalog::{Catalog, Row};
use api::schema::{self, Field, ListKind, Message, Type};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// A document as it is sent, and the hash that names its content.
#[derive(Clone)]
pub struct Document {
    hash: String,
    bytes: Bytes,
}

impl Document {
    pub fn new(bytes: impl Into<Bytes>) -> Document {
        let bytes = bytes.into();
        let hash =
            ring::digest::digest(&ring::digest::SHA256, &bytes).as_ref().iter().map(|b| format!("{b:02X}")).collect();
        Document { hash, bytes }
    }

    /// The document, or that what the client holds is still the same.
    pub fn answer(&self, headers: &HeaderMap, content_type: &'static str) -> Response<Body> {
        let tag = format!("\"{}\"", self.hash);
        let unchanged = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()) == Some(tag.as_str());
        let mut response = if unchanged {
            body::typed(StatusCode::NOT_MODIFIED, content_type, Bytes::new())
        } else {
            let whole = body::typed(StatusCode::OK, content_type, self.bytes.clone());
            body::maybe_gzip(headers, whole, &self.bytes)
        };
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            response.headers_mut().insert(header::ETAG, tag);
        }
        response
    }
}

/// Documents are made on first use and kept; they are the same for the life of the server.
#[derive(Default)]
pub struct OpenApi {
    documents: Mutex<BTreeMap<String, Document>>,
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

impl OpenApi {
    fn document(&self, catalog: &Catalog, path: &str) -> Option<Document> {
        let mut documents = self.documents.lock().expect("no holder of the lock panics");
        if let Some(found) = documents.get(path) {
            return Some(found.clone());
        }
        let rows: Vec<&Arc<Row>> = catalog.rows().iter().filter(|r| path_of(&r.group, &r.version) == path).collect();
        if rows.is_empty() {
            return None;
        }
        let made = Document::new(document(&rows).to_string());
        documents.insert(path.into(), made.clone());
        Some(made)
    }

    pub fn index(&self, catalog: &Catalog) -> Response<Body> {
        let mut paths = Map::new();
        for (group, versions) in catalog.groups() {
            for version in versions {
                let path = path_of(&group, &version);
                if let Some(Document { hash, .. }) = self.document(catalog, &path) {
                    let url = format!("/openapi/v3/{path}?hash={hash}");
                    paths.insert(path, json!({"serverRelativeURL": url}));
                }
            }
        }
        body::value(StatusCode::OK, &json!({"paths": paths}))
    }

    pub fn serve(&self, catalog: &Catalog, path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
        let mut response = self.document(catalog, path)?.answer(headers, "application/json");
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        Some(response)
    }
}

/// The name a message has in the published documents.
fn component(message: &Message) -> String {
    match message.name.strip_prefix("meta.v1.") {
        Some(name) => format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}"),
        None => format!("io.k8s.api.{}", message.name),
    }
}

fn reference(message: &Message) -> Value {
    json!({"$ref": format!("#/components/schemas/{}", component(message))})
}

fn document(rows: &[&Arc<Row>]) -> Value {
    let mut schemas = Map::new();
    let mut seen: BTreeSet<&'static str> = BTreeSet::new();
    let mut todo: Vec<&'static Message> = Vec::new();
    let mut paths = Map::new();
    let mut kinds: BTreeMap<&'static str, Vec<Value>> = BTreeMap::new();
    for row in rows {
        if let Some(message) = row.schema {
            todo.push(message);
            kinds.entry(message.name).or_default().push(kind_of(row));
        }
        paths.extend(paths_of(row));
    }
    todo.extend(schema::message("meta.v1.DeleteOptions"));
    while let Some(message) = todo.pop() {
        if !seen.insert(message.name) {
            continue;
        }
        todo.extend(message.fields.iter().filter_map(|f| f.ty.message()));
        let mut value = object_schema(message);
        if let Some(kinds) = kinds.get(message.name) {
            value["x-kubernetes-group-version-kind"] = json!(kinds);
        }
        schemas.insert(component(message), value);
    }
    json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.33.0"},
        "paths": paths, "components": {"schemas": schemas},
    })
}

fn object_schema(message: &Message) -> Value {
    let properties: Map<String, Value> = message.fields.iter().map(|f| (f.name.to_string(), field_schema(f))).collect();
    let required: Vec<&str> = message.fields.iter().filter(|f| f.required).map(|f| f.name).collect();
    let mut value = json!({"type": "object", "description": "", "properties": properties});
    if !required.is_empty() {
        value["required"] = json!(required);
    }
    value
}

fn field_schema(field: &Field) -> Value {
    let mut value = type_schema(&field.ty);
    // A reference may have no siblings, so it is wrapped when it needs any.
    if value.get("$ref").is_some() {
        value = json!({"allOf": [value], "description": ""});
    }
    if let Type::List(_) = field.ty {
        let kind = match field.list {
            ListKind::Atomic => "atomic",
            ListKind::Set => "set",
            ListKind::Map => "map",
        };
        value["x-kubernetes-list-type"] = json!(kind);
        if !field.map_keys.is_empty() {
            value["x-kubernetes-list-map-keys"] = json!(field.map_keys);
        }
    } else if field.atomic {
        value["x-kubernetes-map-type"] = json!("atomic");
    }
    if field.patch_merge {
        value["x-kubernetes-patch-strategy"] = json!(if field.retain_keys { "merge,retainKeys" } else { "merge" });
        if let Some(key) = field.merge_key {
            value["x-kubernetes-patch-merge-key"] = json!(key);
        }
    }
    value
}

fn type_schema(ty: &Type) -> Value {
    match ty {
        Type::String => json!({"type": "string"}),
        Type::Int32 => json!({"type": "integer", "format": "int32"}),
        Type::Int64 => json!({"type": "integer", "format": "int64"}),
        Type::Bool => json!({"type": "boolean"}),
        Type::Double => json!({"type": "number", "format": "double"}),
        Type::Bytes => json!({"type": "string", "format": "byte"}),
        Type::Quantity => json!({"oneOf": [{"type": "string"}, {"type": "number"}], "description": ""}),
        Type::Time | Type::MicroTime => json!({"type": "string", "format": "date-time"}),
        Type::IntOrString => {
            json!({"oneOf": [{"type": "integer"}, {"type": "string"}], "format": "int-or-string", "description": ""})
        }
        Type::Raw | Type::Fields => json!({"type": "object"}),
        Type::Message(name) => schema::message(name).map_or(json!({"type": "object"}), reference),
        Type::List(inner) => json!({"type": "array", "items": type_schema(inner)}),
        Type::Map(inner) => json!({"type": "object", "additionalProperties": type_schema(inner)}),
    }
}

fn kind_of(row: &Row) -> Value {
    json!({"group": row.group, "version": row.version, "kind": row.kind})
}

/// A row's paths with their path items.
pub fn paths_of(row: &Row) -> Vec<(String, Value)> {
    let kind = kind_of(row);
    let root = format!("/{}", path_of(&row.group, &row.version));
    let collection = if row.namespaced {
        format!("{root}/namespaces/{{namespace}}/{}", row.plural)
    } else {
        format!("{root}/{}", row.plural)
    };
    let param = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let body = row.schema.map_or(json!({"type": "object"}), reference);
    let answer = json!({"200": {"description": "OK", "content": {"application/json": {"schema": body}}}});
    let operation = |action: &str, params: &[&str], media: &[&str]| {
        let mut value = json!({
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": kind, "responses": answer,
            "parameters": params.iter().map(|p| param(p)).collect::<Vec<_>>(),
        });
        if !media.is_empty() {
            let content: Map<String, Value> =
                media.iter().map(|m| ((*m).to_string(), json!({"schema": body}))).collect();
            value["requestBody"] = json!({"content": content, "required": true});
        }
        value
    };
    const WRITE: &[&str] = &["dryRun", "fieldManager", "fieldValidation"];
    const JSON: &[&str] = &["application/json"];
    let post = operation("post", WRITE, JSON);
    if row.is_virtual {
        return vec![(collection, json!({"post": post}))];
    }
    let patches = &[
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
        "application/apply-patch+yaml",
    ];
    let list = operation("list", &["labelSelector", "fieldSelector", "limit", "continue", "watch"], &[]);
    let one = json!({
        "get": operation("get", &[], &[]),
        "put": operation("put", WRITE, JSON),
        "patch": operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"], patches),
        "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"], &[]),
    });
    vec![(collection.clone(), json!({"get": list, "post": post})), (format!("{collection}/{{name}}"), one)]
}
