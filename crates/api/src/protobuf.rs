//! Protobuf bodies of built-in kinds, decoded to the JSON they stand for.
//!
//! A body is `k8s\0` and a `runtime.Unknown` {1: typeMeta {1: apiVersion, 2: kind}, 2: raw}. The raw message is walked with
//! the schema table, so no generated code is needed. Go writes every non-pointer scalar even when zero; those are dropped by
//! `schema::normalize`, which runs on every body.

use crate::schema::{self, Message, Type, Wire};
use base64::Engine;
use serde_json::{Map, Value, json};

pub const MAGIC: &[u8; 4] = b"k8s\0";
const MAX_DEPTH: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    #[error("the body does not begin with the protobuf prefix \"k8s\\0\"; send JSON or a Kubernetes protobuf envelope")]
    Magic,
    #[error("unexpected EOF: the protobuf body is truncated at {0}")]
    Truncated(&'static str),
    #[error("the protobuf body is malformed: {0}")]
    Malformed(&'static str),
    #[error("no kind {kind:?} is registered for version {api_version:?}")]
    UnknownKind { api_version: String, kind: String },
}

/// Decodes an envelope to an object with `apiVersion` and `kind`.
///
/// # Errors
/// A body that is no envelope, is truncated or malformed, or whose kind is not built in.
pub fn decode(body: &[u8]) -> Result<Value, ProtobufError> {
    let envelope = body.strip_prefix(MAGIC).ok_or(ProtobufError::Magic)?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut reader = Reader(envelope);
    while let Some((number, field)) = reader.field()? {
        match (number, field) {
            (1, Raw::Bytes(meta)) => {
                let mut meta = Reader(meta);
                while let Some((number, field)) = meta.field()? {
                    match (number, field) {
                        (1, Raw::Bytes(text)) => api_version = utf8(text)?,
                        (2, Raw::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Raw::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    let message = schema::for_kind(group, version, &kind)
        .or_else(|| {
            (group == "meta.k8s.io" || kind == "DeleteOptions").then(|| schema::message(&format!("meta.v1.{kind}")))?
        })
        .ok_or_else(|| ProtobufError::UnknownKind { api_version: api_version.clone(), kind: kind.clone() })?;
    let mut out = Map::new();
    message_into(&mut out, raw, message, 0)?;
    out.insert("apiVersion".into(), json!(api_version));
    out.insert("kind".into(), json!(kind));
    Ok(Value::Object(out))
}

enum Raw<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, ProtobufError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(ProtobufError::Truncated("a number"))?;
            self.0 = rest;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ProtobufError::Malformed("a number of more than 64 bits"))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], ProtobufError> {
        let length = usize::try_from(length).map_err(|_| ProtobufError::Malformed("a length out of range"))?;
        if length > self.0.len() {
            return Err(ProtobufError::Truncated("a field"));
        }
        let (head, rest) = self.0.split_at(length);
        self.0 = rest;
        Ok(head)
    }

    fn field(&mut self) -> Result<Option<(u32, Raw<'a>)>, ProtobufError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| ProtobufError::Malformed("a field number out of range"))?;
        let raw = match tag & 7 {
            0 => Raw::Varint(self.varint()?),
            1 => {
                let bytes = self.take(8)?;
                Raw::Fixed64(u64::from_le_bytes(bytes.try_into().map_err(|_| ProtobufError::Truncated("a field"))?))
            }
            2 => {
                let length = self.varint()?;
                Raw::Bytes(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Raw::Fixed32
            }
            _ => return Err(ProtobufError::Malformed("a wire type that is not used by Kubernetes")),
        };
        Ok(Some((number, raw)))
    }
}

fn utf8(bytes: &[u8]) -> Result<String, ProtobufError> {
    std::str::from_utf8(bytes).map(str::to_string).map_err(|_| ProtobufError::Malformed("a string is not UTF-8"))
}

fn message_into(
    out: &mut Map<String, Value>,
    bytes: &[u8],
    message: &'static Message,
    depth: usize,
) -> Result<(), ProtobufError> {
    if depth > MAX_DEPTH {
        return Err(ProtobufError::Malformed("messages nested too deeply"));
    }
    let mut reader = Reader(bytes);
    while let Some((number, raw)) = reader.field()? {
        match message.wire(number) {
            // An unknown number is a field newer than the version served.
            None => {}
            Some(Wire::Embedded(name)) => {
                if let (Raw::Bytes(inner), Some(embedded)) = (raw, schema::message(name)) {
                    message_into(out, inner, embedded, depth + 1)?;
                }
            }
            Some(Wire::Field(index)) => {
                let field = &message.fields[index];
                match &field.ty {
                    Type::List(inner) => {
                        let list = out.entry(field.name).or_insert_with(|| json!([]));
                        let Value::Array(items) = list else { continue };
                        match (raw, &**inner) {
                            // Packed scalars.
                            (Raw::Bytes(packed), Type::Int32 | Type::Int64 | Type::Bool) => {
                                let mut packed = Reader(packed);
                                while !packed.0.is_empty() {
                                    let number = packed.varint()?;
                                    items.push(value(Raw::Varint(number), inner, depth)?);
                                }
                            }
                            (raw, inner) => items.push(value(raw, inner, depth)?),
                        }
                    }
                    Type::Map(inner) => {
                        let Raw::Bytes(entry) = raw else {
                            return Err(ProtobufError::Malformed("a map entry is no message"));
                        };
                        let (mut key, mut item) = (String::new(), None);
                        let mut entry = Reader(entry);
                        while let Some((number, raw)) = entry.field()? {
                            match (number, raw) {
                                (1, Raw::Bytes(text)) => key = utf8(text)?,
                                (2, Raw::Bytes(bytes)) => {
                                    item = Some(match &**inner {
                                        // A named list type is a message {1: items} on the wire.
                                        Type::List(of) => items_message(bytes, of, depth)?,
                                        inner => value(Raw::Bytes(bytes), inner, depth)?,
                                    });
                                }
                                (2, raw) => item = Some(value(raw, inner, depth)?),
                                _ => {}
                            }
                        }
                        let map = out.entry(field.name).or_insert_with(|| json!({}));
                        if let Value::Object(map) = map {
                            map.insert(key, item.unwrap_or_else(|| json!("")));
                        }
                    }
                    ty => {
                        out.insert(field.name.into(), value(raw, ty, depth)?);
                    }
                }
            }
        }
    }
    Ok(())
}

fn items_message(bytes: &[u8], of: &Type, depth: usize) -> Result<Value, ProtobufError> {
    let mut items = Vec::new();
    let mut reader = Reader(bytes);
    while let Some((number, raw)) = reader.field()? {
        if number == 1 {
            items.push(value(raw, of, depth)?);
        }
    }
    Ok(Value::Array(items))
}

fn value(raw: Raw<'_>, ty: &Type, depth: usize) -> Result<Value, ProtobufError> {
    Ok(match (raw, ty) {
        (Raw::Varint(n), Type::Bool) => json!(n != 0),
        // Negative int32 and int64 are both ten bytes of two's complement.
        (Raw::Varint(n), Type::Int32) => json!(n as i64 as i32),
        (Raw::Varint(n), Type::Int64) => json!(n as i64),
        (Raw::Fixed64(bits), Type::Double) => json!(f64::from_bits(bits)),
        (Raw::Bytes(text), Type::String) => Value::String(utf8(text)?),
        (Raw::Bytes(bytes), Type::Bytes) => Value::String(base64::engine::general_purpose::STANDARD.encode(bytes)),
        (Raw::Bytes(bytes), Type::Quantity) => {
            let mut text = String::new();
            let mut reader = Reader(bytes);
            while let Some((number, raw)) = reader.field()? {
                if let (1, Raw::Bytes(bytes)) = (number, raw) {
                    text = utf8(bytes)?;
                }
            }
            Value::String(if text.is_empty() { "0".into() } else { text })
        }
        (Raw::Bytes(bytes), Type::Time | Type::MicroTime) => {
            let (mut seconds, mut nanos) = (None, 0);
            let mut reader = Reader(bytes);
            while let Some((number, raw)) = reader.field()? {
                match (number, raw) {
                    (1, Raw::Varint(n)) => seconds = Some(n as i64),
                    (2, Raw::Varint(n)) => nanos = n as i64 as i32,
                    _ => {}
                }
            }
            // The zero time of Go is an empty message.
            match seconds.and_then(|s| crate::time::from_unix(s, nanos)) {
                Some(time) if *ty == Type::MicroTime => json!(crate::time::micros(time)),
                Some(time) => json!(crate::time::seconds(time)),
                None => Value::Null,
            }
        }
        (Raw::Bytes(bytes), Type::IntOrString) => {
            let (mut is_text, mut number, mut text) = (false, 0, String::new());
            let mut reader = Reader(bytes);
            while let Some((field, raw)) = reader.field()? {
                match (field, raw) {
                    (1, Raw::Varint(n)) => is_text = n == 1,
                    (2, Raw::Varint(n)) => number = n as i64 as i32,
                    (3, Raw::Bytes(bytes)) => text = utf8(bytes)?,
                    _ => {}
                }
            }
            if is_text { json!(text) } else { json!(number) }
        }
        (Raw::Bytes(bytes), Type::Raw | Type::Fields) => {
            let mut json = &[][..];
            let mut reader = Reader(bytes);
            while let Some((number, raw)) = reader.field()? {
                if let (1, Raw::Bytes(bytes)) = (number, raw) {
                    json = bytes;
                }
            }
            if json.is_empty() {
                Value::Null
            } else {
                serde_json::from_slice(json).map_err(|_| ProtobufError::Malformed("an embedded object is not JSON"))?
            }
        }
        (Raw::Bytes(bytes), Type::Message(name)) => {
            let mut inner = Map::new();
            if let Some(message) = schema::message(name) {
                message_into(&mut inner, bytes, message, depth + 1)?;
            }
            Value::Object(inner)
        }
        (Raw::Fixed32, _) => return Err(ProtobufError::Malformed("a 32-bit field where none is known")),
        _ => return Err(ProtobufError::Malformed("a field has the wrong wire type")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).expect("test fields are short")];
        out.extend(bytes);
        out
    }

    fn envelope(kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [field(1, b"v1"), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
    }

    #[test]
    fn a_service_decodes_to_its_json() {
        let port = [field(1, b"http"), vec![3 << 3, 80], field(4, &[1 << 3, 0, 2 << 3, 81]), vec![5 << 3, 0]].concat();
        let spec = [field(1, &port), field(2, &[field(1, b"app"), field(2, b"web")].concat())].concat();
        let raw = [field(1, &field(1, b"web")), field(2, &spec)].concat();
        let mut value = decode(&envelope("Service", &raw)).expect("a good body");
        schema::normalize(&mut value, schema::message("core.v1.Service").expect("built in")).expect("fits");
        assert_eq!(
            value,
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 81}]}})
        );
    }

    #[test]
    fn no_truncation_panics() {
        let raw = field(1, &field(1, b"web"));
        let body = envelope("Service", &raw);
        for end in 0..body.len() {
            let _ = decode(&body[..end]);
        }
        assert!(decode(b"{}").is_err());
        assert!(matches!(decode(&envelope("Nothing", &[])), Err(ProtobufError::UnknownKind { .. })));
    }
}
