//! Request bodies become objects: JSON, YAML or protobuf in, one canonical form out.

use crate::catalog::Row;
use crate::json;
use api::protobuf;
use api::schema::{self, Message};
use api::{ObjectExt, Status};
use bytes::Bytes;
use http::HeaderMap;
use serde_json::Value;

/// The largest body that is taken, in bytes.
pub const MAX_BODY: usize = 3 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldValidation {
    Strict,
    Warn,
    Ignore,
}

impl FieldValidation {
    pub fn parse(text: &str) -> Result<Self, Status> {
        match text {
            "Strict" => Ok(Self::Strict),
            "" | "Warn" => Ok(Self::Warn),
            "Ignore" => Ok(Self::Ignore),
            other => Err(Status::new(
                422,
                "Invalid",
                format!(
                    "PatchOptions.meta.k8s.io \"\" is invalid: fieldValidation: Unsupported value: {other:?}: supported values: \"\", \"Ignore\", \"Strict\", \"Warn\""
                ),
            )),
        }
    }
}

/// Decodes a body by its content type.
pub fn object(headers: &HeaderMap, body: &Bytes) -> Result<Value, Status> {
    object_with_repeats(headers, body).map(|(object, _)| object)
}

/// Decodes a body, and names the fields that it holds twice.
pub fn object_with_repeats(headers: &HeaderMap, body: &Bytes) -> Result<(Value, Vec<String>), Status> {
    let content_type = headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or("application/json");
    let media = content_type.split(';').next().unwrap_or("").trim();
    if body.is_empty() {
        return Err(Status::bad_request("the request body is empty: send an object"));
    }
    match media {
        "application/vnd.kubernetes.protobuf" => {
            protobuf::decode(body).map(|o| (o, Vec::new())).map_err(|e| Status::bad_request(e.to_string()))
        }
        "application/yaml" => serde_saphyr::from_slice::<Value>(body)
            .map(|o| (o, Vec::new()))
            .map_err(|e| Status::bad_request(format!("error parsing YAML: {e}"))),
        "" | "application/json" | "*/*" => json::parse(body).map_err(|e| {
            let kind = if e.is_eof() { "unexpected end of JSON input".to_string() } else { e.to_string() };
            Status::bad_request(format!("couldn't get version/kind; json parse error: {kind}"))
        }),
        other => Err(Status::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf (got {other})"
        ))),
    }
}

/// Checks that an object is of the row's kind, and makes it canonical. Returns warnings about unknown and repeated
/// fields.
pub fn conform(
    row: &Row,
    object: &mut Value,
    repeated: &[String],
    validation: FieldValidation,
) -> Result<Vec<String>, Status> {
    if !object.is_object() {
        return Err(Status::bad_request("couldn't get version/kind; json parse error: the body is not a JSON object"));
    }
    let (api_version, kind) = (object.text("/apiVersion").to_string(), object.text("/kind").to_string());
    if kind.is_empty() {
        return Err(Status::bad_request("Object 'Kind' is missing in the request body"));
    }
    if kind != *row.kind || api_version != row.api_version() {
        let group = |v: &str| v.split_once('/').map_or("", |(g, _)| g).to_string();
        let message = if group(&api_version) == *row.group && kind == *row.kind {
            format!(
                "the API version in the data ({api_version}) does not match the expected API version ({})",
                row.api_version()
            )
        } else {
            format!(
                "{kind} in version {api_version:?} cannot be handled as a {}: no kind {kind:?} is registered for version {api_version:?}",
                row.kind
            )
        };
        return Err(Status::bad_request(message));
    }
    match row.schema {
        Some(schema) => conform_to(schema, &row.kind, &row.version, object, repeated, validation),
        None => Ok(Vec::new()),
    }
}

/// `conform` for a body that is no object of a row, such as a subresource's.
pub fn conform_to(
    schema: &'static Message,
    kind: &str,
    version: &str,
    object: &mut Value,
    repeated: &[String],
    validation: FieldValidation,
) -> Result<Vec<String>, Status> {
    let unknown = schema::normalize(object, schema).map_err(|e| {
        Status::bad_request(format!("{kind} in version {version:?} cannot be handled as a {kind}: {e}"))
    })?;
    let repeated = repeated.iter().map(|path| format!("duplicate field {path:?}"));
    let sentences: Vec<String> = repeated.chain(unknown.iter().map(|path| format!("unknown field {path:?}"))).collect();
    match validation {
        FieldValidation::Strict if !sentences.is_empty() => Err(Status::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: strict decoding error: {}",
            sentences.join(", ")
        ))),
        FieldValidation::Ignore => Ok(Vec::new()),
        _ => Ok(sentences),
    }
}
