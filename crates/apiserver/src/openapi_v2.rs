//! `/openapi/v2`: what older kubectls read before they apply, and newer ones before they refuse an unknown kind.
//!
//! It says what `/openapi/v3` says of paths, in the one form that is asked for: a `Document` of gnostic's
//! `openapiv2/OpenAPIv2.proto`. It has no `definitions`: kubectl knows the built-in types itself, and reads
//! here only which operation takes which parameter.

use crate::body::Body;
use crate::catalog::Catalog;
use crate::openapi::{Document, paths_of};
use api::Status;
use http::{HeaderMap, Response, header};
use serde_json::Value;
use std::sync::OnceLock;

/// `@` is no character of a media type (RFC 9110, token), so it is understood in a question and not used in an answer.
const ASKED: &[&str] = &[
    "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
];
const ANSWERED: &str = ASKED[1];

/// Made on first use and kept, as the catalog stays the same.
#[derive(Default)]
pub struct OpenApiV2 {
    document: OnceLock<Document>,
}

impl OpenApiV2 {
    /// # Errors
    /// The client takes no form that is served.
    pub fn serve(&self, catalog: &Catalog, headers: &HeaderMap) -> Result<Response<Body>, Status> {
        let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok());
        let is_asked = |part: &str| ASKED.contains(&part.split(';').next().unwrap_or_default().trim());
        if !accepted.any(|value| value.split(',').any(is_asked)) {
            let message =
                format!("/openapi/v2 is served as {ANSWERED} only: ask for that type, or read /openapi/v3 as JSON");
            return Err(Status::new(406, "NotAcceptable", message));
        }
        Ok(self.document.get_or_init(|| Document::new(document(catalog).0)).answer(headers, ANSWERED))
    }
}

/// A protobuf message being written. Every field here is length-delimited or a bool.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: usize) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    fn bytes(mut self, field: usize, bytes: &[u8]) -> Message {
        const LENGTH_DELIMITED: usize = 2;
        self.varint(field << 3 | LENGTH_DELIMITED);
        self.varint(bytes.len());
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, field: usize, text: &str) -> Message {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: usize, message: &Message) -> Message {
        self.bytes(field, &message.0)
    }

    fn truth(mut self, field: usize) -> Message {
        self.varint(field << 3);
        self.0.push(1);
        self
    }

    fn each<T>(self, items: impl IntoIterator<Item = T>, add: impl Fn(Message, T) -> Message) -> Message {
        items.into_iter().fold(self, add)
    }
}

fn named(name: &str, value: &Message) -> Message {
    Message::default().text(1, name).message(2, value)
}

/// `NamedAny`. Any JSON is YAML.
fn extension(name: &str, value: &Value) -> Message {
    named(name, &Message::default().text(2, &value.to_string()))
}

fn document(catalog: &Catalog) -> Message {
    let rows = catalog.rows().iter().flat_map(|row| paths_of(row));
    let paths = Message::default().each(rows, |m, (path, item)| m.message(2, &named(&path, &path_item(&item))));
    let info = Message::default().text(1, "Kubernetes").text(2, "v1.33.0");
    Message::default().text(1, "2.0").message(2, &info).message(8, &paths)
}

/// `PathItem`, from the one of the third version.
fn path_item(item: &Value) -> Message {
    let methods = [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")];
    let present = methods.iter().filter_map(|(field, method)| Some((*field, item.get(method)?)));
    Message::default().each(present, |m, (field, value)| m.message(field, &operation(value)))
}

fn operation(value: &Value) -> Message {
    let takes = value["requestBody"]["content"].as_object();
    let parameters = value["parameters"].as_array().into_iter().flatten().map(query_parameter);
    let extensions = ["x-kubernetes-action", "x-kubernetes-group-version-kind"];
    Message::default()
        .text(6, "application/json")
        .each(takes.into_iter().flat_map(|t| t.keys()), |m, media| m.text(7, media))
        .each(takes.map(|_| body_parameter()), |m, body| m.message(8, &body))
        .each(parameters, |m, parameter| m.message(8, &parameter))
        .message(9, &responses())
        .each(extensions, |m, name| m.message(13, &extension(name, &value[name])))
}

/// `ParametersItem` of a `Parameter` of a `NonBodyParameter` of a `QueryParameterSubSchema`.
fn query_parameter(value: &Value) -> Message {
    let name = value["name"].as_str().unwrap_or_default();
    let query = Message::default().text(2, "query").text(4, name).text(6, "string").truth(20);
    let other = Message::default().message(3, &query);
    Message::default().message(1, &Message::default().message(2, &other))
}

/// `ParametersItem` of a `Parameter` of a `BodyParameter`.
fn body_parameter() -> Message {
    let object = Message::default().message(22, &Message::default().text(1, "object"));
    let body = Message::default().text(2, "body").text(3, "body").truth(4).message(5, &object);
    Message::default().message(1, &Message::default().message(1, &body))
}

/// `Responses` of one `NamedResponseValue`.
fn responses() -> Message {
    let ok = Message::default().text(1, "OK");
    Message::default().message(1, &named("200", &Message::default().message(1, &ok)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::builtin;

    /// The length-delimited fields of a message with this number.
    fn fields(mut bytes: &[u8], wanted: usize) -> Vec<&[u8]> {
        fn varint(bytes: &mut &[u8]) -> usize {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = bytes[0];
                *bytes = &bytes[1..];
                value |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        }
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let length = varint(&mut bytes);
            if key & 7 == 0 {
                continue;
            }
            assert_eq!(key & 7, 2, "field {} is a varint or has a length", key >> 3);
            let (value, rest) = bytes.split_at(length);
            bytes = rest;
            if key >> 3 == wanted {
                found.push(value);
            }
        }
        found
    }

    /// Goes down through the first field of each number.
    fn first<'a>(bytes: &'a [u8], path: &[usize]) -> &'a [u8] {
        path.iter().fold(bytes, |bytes, field| fields(bytes, *field)[0])
    }

    #[test]
    fn a_patch_says_its_kind_and_that_fields_are_validated() {
        let written = document(&Catalog::new(builtin::rows())).0;
        assert_eq!(first(&written, &[1]), b"2.0");
        let paths = fields(first(&written, &[8]), 2);
        let wanted: &[u8] = b"/apis/apps/v1/namespaces/{namespace}/deployments/{name}";
        let item = paths.iter().find(|p| first(p, &[1]) == wanted).expect("deployments have a path");
        let patch = first(item, &[2, 8]);
        let queries: Vec<&[u8]> = fields(patch, 8)
            .iter()
            .filter_map(|p| fields(first(p, &[1]), 2).first().map(|other| first(other, &[3, 4])))
            .collect();
        assert!(queries.contains(&&b"fieldValidation"[..]), "{queries:?}");
        let kind = fields(patch, 13)
            .into_iter()
            .find(|e| first(e, &[1]) == b"x-kubernetes-group-version-kind")
            .map(|e| first(e, &[2, 2]));
        let kind: Value = serde_json::from_slice(kind.expect("a kind is named")).expect("it is JSON");
        assert_eq!(kind, serde_json::json!({"group": "apps", "version": "v1", "kind": "Deployment"}));
    }

    #[test]
    fn a_length_over_one_byte_is_a_varint() {
        let long = "x".repeat(300);
        let written = Message::default().text(4, &long).truth(20).text(2, "end").0;
        assert_eq!(written[..3], [0x22, 0xac, 0x02]);
        assert_eq!(first(&written, &[2]), b"end");
    }
}
