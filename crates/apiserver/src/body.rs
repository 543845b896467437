//! Answer bodies: whole, streamed, or spliced; and the negotiation of their encoding.

use api::Status;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use serde_json::Value;
use std::io::Write;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub fn stream<S>(chunks: S) -> Body
where
    S: futures::Stream<Item = Result<Bytes, BoxError>> + Send + 'static,
{
    use futures::StreamExt;
    StreamBody::new(chunks.map(|c| c.map(hyper::body::Frame::data))).boxed_unsync()
}

pub fn json(code: StatusCode, bytes: impl Into<Bytes>) -> Response<Body> {
    typed(code, "application/json", bytes)
}

pub fn typed(code: StatusCode, content_type: &'static str, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub fn value(code: StatusCode, value: &Value) -> Response<Body> {
    json(code, serde_json::to_vec(value).expect("a JSON value is written to memory"))
}

pub fn status(status: &Status) -> Response<Body> {
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = value(code, &status.to_json());
    if let Some(seconds) = status.details.as_ref().and_then(|d| d.retry_after_seconds) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// Smaller answers are not worth compressing.
const GZIP_FROM: usize = 128 * 1024;

/// Compresses a large whole answer when the client takes gzip.
pub fn maybe_gzip(request: &HeaderMap, response: Response<Body>, bytes: &Bytes) -> Response<Body> {
    let takes = request.get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains("gzip"));
    if !takes || bytes.len() < GZIP_FROM {
        return response;
    }
    let mut encoder = flate2::write::GzEncoder::new(Vec::with_capacity(bytes.len() / 4), flate2::Compression::fast());
    let compressed = encoder.write_all(bytes).and_then(|()| encoder.finish());
    match compressed {
        Ok(compressed) => {
            let (mut parts, _) = response.into_parts();
            parts.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            parts.headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
            Response::from_parts(parts, full(compressed))
        }
        Err(_) => response,
    }
}

/// How the client wants objects shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Plain,
    Table,
    PartialMetadata,
}

/// Reads `Accept`: the first form that is served wins.
pub fn shape(headers: &HeaderMap) -> Shape {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    for part in accept.split(',') {
        let part = part.trim();
        if part.contains("as=Table") && part.contains("g=meta.k8s.io") {
            return Shape::Table;
        }
        if part.contains("as=PartialObjectMetadata") {
            return Shape::PartialMetadata;
        }
        if part.starts_with("application/json") || part.starts_with("*/*") {
            return Shape::Plain;
        }
    }
    Shape::Plain
}
