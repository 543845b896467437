//! Heads: a request's is written, an answer's is read and decides how long its body is (RFC 9112 6.3).

use std::io::Write;
use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Method, StatusCode, Uri};

use super::Http1Error;
use super::decode::Decoder;

/// Headers of an answer at most.
const HEADERS: usize = 128;

/// What is asked. How long its body is stands apart: the headers of that are ours to write.
#[derive(Clone, Copy)]
pub struct RequestHead<'a> {
    pub method: &'a Method,
    pub uri: &'a Uri,
    pub headers: &'a HeaderMap,
}

/// How a request's body is told from what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    None,
    /// Bytes that are still to come.
    Length(u64),
    Chunked,
}

pub fn write(out: &mut Vec<u8>, head: RequestHead<'_>, framing: Framing) {
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(head.uri.path_and_query().map_or("/", |path| path.as_str()).as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in head.headers {
        if matches!(*name, CONTENT_LENGTH | TRANSFER_ENCODING) {
            continue;
        }
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    match framing {
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        // Writing to a Vec cannot fail.
        Framing::Length(length) => drop(write!(out, "content-length: {length}\r\n")),
        Framing::None => {
            let is_expected = matches!(*head.method, Method::POST | Method::PUT | Method::PATCH);
            if is_expected || head.headers.contains_key(CONTENT_LENGTH) {
                out.extend_from_slice(b"content-length: 0\r\n");
            }
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// The head of an answer.
#[derive(Debug)]
pub struct ResponseHead {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// If it is not the usual one.
    pub reason: Option<Bytes>,
    pub decoder: Decoder,
    /// The connection may carry another request afterwards.
    pub is_kept: bool,
}

/// Reads a head from the beginning of `bytes`; returned with it is its length. `None`: there must come more.
///
/// # Errors
/// It is no head, or its body's end could be seen in two places.
pub fn read(bytes: &Bytes, asked: &Method) -> Result<Option<(ResponseHead, usize)>, Http1Error> {
    let mut slots = [const { MaybeUninit::uninit() }; HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let status = config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut slots);
    let length = match status.map_err(|_| Http1Error::NotHttp("its head is none"))? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Ok(None),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(Http1Error::NotHttp("its status is none"))?;
    let mut headers = HeaderMap::with_capacity(parsed.headers.len() + 2);
    for header in parsed.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let name = name.map_err(|_| Http1Error::NotHttp("a header's name is none"))?;
        let value = match header.value {
            [] => Ok(HeaderValue::from_static("")),
            value => HeaderValue::from_maybe_shared(bytes.slice_ref(value)),
        };
        headers.append(name, value.map_err(|_| Http1Error::NotHttp("a header's value is none"))?);
    }
    let is_new = parsed.version == Some(1);
    let mut is_kept = is_kept(&headers, is_new);
    let has_body = *asked != Method::HEAD && !matches!(status.as_u16(), 100..=199 | 204 | 304);
    let decoder = match has_body {
        true => framing(&mut headers, is_new, &mut is_kept)?,
        false => Decoder::Done,
    };
    let reason = parsed.reason.filter(|reason| Some(*reason) != status.canonical_reason() && !reason.is_empty());
    let reason = reason.map(|reason| bytes.slice_ref(reason.as_bytes()));
    Ok(Some((ResponseHead { status, headers, reason, decoder, is_kept }, length)))
}

fn is_kept(headers: &HeaderMap, is_new: bool) -> bool {
    let mut words = headers.get_all(CONNECTION).iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    let word = if is_new { &b"close"[..] } else { &b"keep-alive"[..] };
    words.any(|one| one.trim_ascii().eq_ignore_ascii_case(word)) != is_new
}

fn framing(headers: &mut HeaderMap, is_new: bool, is_kept: &mut bool) -> Result<Decoder, Http1Error> {
    if let Some(last) = headers.get_all(TRANSFER_ENCODING).iter().next_back() {
        if !is_new {
            return Err(Http1Error::NotHttp("HTTP/1.0 has no Transfer-Encoding"));
        }
        let last = last.as_bytes().rsplit(|byte| *byte == b',').next().unwrap_or_default();
        let is_chunked = last.trim_ascii().eq_ignore_ascii_case(b"chunked");
        // Who says both may be two: what comes behind this answer is nobody's.
        *is_kept &= headers.remove(CONTENT_LENGTH).is_none() && is_chunked;
        return Ok(if is_chunked { Decoder::chunked() } else { Decoder::UntilClosed });
    }
    let mut length = None;
    for line in headers.get_all(CONTENT_LENGTH) {
        for one in line.as_bytes().split(|byte| *byte == b',') {
            let one = number(one.trim_ascii()).ok_or(Http1Error::NotHttp("its Content-Length is no number"))?;
            if *length.get_or_insert(one) != one {
                return Err(Http1Error::NotHttp("it has two lengths"));
            }
        }
    }
    let Some(length) = length else {
        *is_kept = false;
        return Ok(Decoder::UntilClosed);
    };
    if headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some() {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(Decoder::length(length))
}

/// Digits and nothing else.
fn number(text: &[u8]) -> Option<u64> {
    let are_digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| are_digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<(StatusCode, Decoder, bool), String> {
        match read(&Bytes::copy_from_slice(text.as_bytes()), &Method::GET) {
            Ok(Some((head, length))) if length == text.len() => Ok((head.status, head.decoder, head.is_kept)),
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_head_says_how_long_the_body_is_and_whether_the_connection_stays() {
        let ok = StatusCode::OK;
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", (ok, Decoder::length(5), true)),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5, 5\r\n\r\n", (ok, Decoder::length(5), true)),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n", (ok, Decoder::length(5), true)),
            ("HTTP/1.1 200\r\ncontent-length: 0\r\nConnection: Close\r\n\r\n", (ok, Decoder::Done, false)),
            ("HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n", (ok, Decoder::length(5), false)),
            ("HTTP/1.0 200 OK\r\ncontent-length: 5\r\nConnection: keep-alive\r\n\r\n", (ok, Decoder::length(5), true)),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", (ok, Decoder::chunked(), true)),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", (ok, Decoder::UntilClosed, false)),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
                (ok, Decoder::chunked(), false),
            ),
            ("HTTP/1.1 200 OK\r\n\r\n", (ok, Decoder::UntilClosed, false)),
            ("HTTP/1.1 204 No Content\r\n\r\n", (StatusCode::NO_CONTENT, Decoder::Done, true)),
            ("HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", (StatusCode::NOT_MODIFIED, Decoder::Done, true)),
        ] {
            assert_eq!(head(text).as_ref(), Ok(&expected), "{text}");
        }
        for text in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: \r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551616\r\n\r\n",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\na b: c\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "hello\r\n\r\n",
        ] {
            assert!(head(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_request_is_written_with_one_length() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("7"));
        headers.insert("host", HeaderValue::from_static("a.example"));
        let uri = Uri::from_static("/p?q=1");
        let text = |method: Method, framing| {
            let mut out = Vec::new();
            write(&mut out, RequestHead { method: &method, uri: &uri, headers: &headers }, framing);
            String::from_utf8(out).expect("text")
        };
        let head = "/p?q=1 HTTP/1.1\r\nhost: a.example\r\n";
        assert_eq!(text(Method::GET, Framing::None), format!("GET {head}content-length: 0\r\n\r\n"));
        assert_eq!(text(Method::PUT, Framing::Length(3)), format!("PUT {head}content-length: 3\r\n\r\n"));
        assert_eq!(text(Method::POST, Framing::Chunked), format!("POST {head}transfer-encoding: chunked\r\n\r\n"));
    }
}
