//! What of a message may go on to the next connection, and which requests are refused since two readers could read them
//! differently (RFC 9110 7.6.1, RFC 9112 6 and 7, RFC 9113 8.2).

use std::borrow::Cow;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, Request, Version};

use crate::host::host_of;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoHost,
    ManyHosts,
    BadHost,
    /// Both lengths: one reader believes the one, another the other.
    TwoLengths,
    BadPath,
    /// CONNECT and TRACE.
    Method,
}

impl Refusal {
    pub fn status(self) -> http::StatusCode {
        match self {
            Refusal::Method => http::StatusCode::METHOD_NOT_ALLOWED,
            _ => http::StatusCode::BAD_REQUEST,
        }
    }

    pub fn text(self) -> &'static str {
        match self {
            Refusal::NoHost => "the request names no host\n",
            Refusal::ManyHosts => "the request names its host twice\n",
            Refusal::BadHost => "the request's host is no host\n",
            Refusal::TwoLengths => "the request has both Content-Length and Transfer-Encoding\n",
            Refusal::BadPath => "the request's path leads out of the root\n",
            Refusal::Method => "this method is not served\n",
        }
    }
}

/// The host that a request is for: of its URI if that has one, otherwise of its Host header.
///
/// # Errors
/// The request must not go anywhere.
pub fn host<B>(request: &Request<B>) -> Result<&str, Refusal> {
    let headers = request.headers();
    let mut hosts = headers.get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err(Refusal::ManyHosts);
    }
    if matches!(*request.method(), Method::CONNECT | Method::TRACE) {
        return Err(Refusal::Method);
    }
    if headers.contains_key(TRANSFER_ENCODING)
        && (headers.contains_key(CONTENT_LENGTH) || request.version() != Version::HTTP_11)
    {
        return Err(Refusal::TwoLengths);
    }
    let named = match header {
        Some(value) => Some(value.to_str().map_err(|_| Refusal::BadHost)?),
        None => None,
    };
    let text = match (request.uri().authority(), named) {
        (Some(authority), named) => {
            let authority = authority.as_str();
            // The other reader may believe the header.
            if named.is_some_and(|named| !named.eq_ignore_ascii_case(authority)) {
                return Err(Refusal::BadHost);
            }
            authority
        }
        (None, Some(named)) => named,
        (None, None) => return Err(Refusal::NoHost),
    };
    host_of(text).ok_or(Refusal::BadHost)
}

/// The path without `.` and `..`, in any spelling of these: what a back end would make of it is what is matched and sent.
///
/// # Errors
/// It leads out of the root.
pub fn plain_path(path: &str) -> Result<Cow<'_, str>, Refusal> {
    if !has_dots(path) {
        return Ok(Cow::Borrowed(path));
    }
    let mut out: Vec<&str> = Vec::new();
    let mut ends_open = false;
    for element in path.split('/').skip(1) {
        ends_open = false;
        match dots(element) {
            1 => ends_open = true,
            2 => {
                out.pop().ok_or(Refusal::BadPath)?;
                ends_open = true;
            }
            _ => out.push(element),
        }
    }
    let mut text = String::with_capacity(path.len());
    for element in &out {
        text.push('/');
        text.push_str(element);
    }
    if ends_open || out.is_empty() {
        text.push('/');
    }
    Ok(Cow::Owned(text))
}

fn has_dots(path: &str) -> bool {
    let bytes = path.as_bytes();
    let mut rest = bytes;
    // An element that is made of dots begins with one.
    while let Some(at) = rest.iter().position(|byte| *byte == b'/') {
        rest = &rest[at + 1..];
        if matches!(rest, [b'.', ..] | [b'%', b'2', b'e' | b'E', ..]) {
            let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
            // Cut at a slash, so still whole characters.
            if std::str::from_utf8(&rest[..end]).is_ok_and(|element| dots(element) > 0) {
                return true;
            }
        }
    }
    false
}

/// 1 and 2 for elements that mean this one and the one above, 0 for all others.
fn dots(element: &str) -> u8 {
    let mut rest = element;
    for count in 0..=2 {
        if rest.is_empty() {
            return count;
        }
        let next = rest.strip_prefix('.').or_else(|| {
            let head = rest.get(..3)?;
            head.eq_ignore_ascii_case("%2e").then(|| &rest[3..])
        });
        let Some(next) = next else { return 0 };
        rest = next;
    }
    0
}

/// The protocol that a client wants to change to, if it may.
pub fn upgrade_of(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    let wanted = headers.get(UPGRADE)?;
    // To change to HTTP/2 here would hide all that follows from us.
    let is_http = wanted.as_bytes().split(|b| *b == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(b"h2c"));
    (version == Version::HTTP_11 && !is_http && names(headers, "upgrade")).then(|| wanted.clone())
}

fn names(headers: &HeaderMap, word: &str) -> bool {
    let lines = headers.get_all(CONNECTION).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|one| one.trim().eq_ignore_ascii_case(word))
}

/// Most messages have nothing of the kind: one look at all names is cheaper than one for each name that could be there.
fn has_own(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| {
        matches!(
            *name,
            CONNECTION | TE | TRANSFER_ENCODING | UPGRADE | EXPECT | PROXY_AUTHORIZATION | PROXY_AUTHENTICATE
        ) || matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings")
    })
}

/// Takes away what is for this connection only: by name, and what the Connection header names.
pub fn strip(headers: &mut HeaderMap) {
    if !has_own(headers) {
        return;
    }
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|line| line.to_str().ok())
            .flat_map(|line| line.split(','))
            .filter_map(|one| HeaderName::from_bytes(one.trim().as_bytes()).ok())
            // What a message is for and how long it is cannot be for one connection only.
            .filter(|name| !matches!(*name, HOST | CONTENT_LENGTH | http::header::AUTHORIZATION | http::header::COOKIE))
            .filter(|name| !name.as_str().starts_with("x-forwarded-"))
            .collect();
        headers.remove(CONNECTION);
        for name in named {
            headers.remove(name);
        }
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE, HTTP2_SETTINGS] {
        headers.remove(name);
    }
}

/// The same for a request, and what the proxy answers itself.
pub fn strip_request(headers: &mut HeaderMap) {
    if !has_own(headers) {
        return;
    }
    let wants_trailers = headers.get(TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    strip(headers);
    headers.remove(TE);
    if wants_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    for name in [EXPECT, PROXY_AUTHORIZATION, PROXY_AUTHENTICATE] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_are_resolved_in_every_spelling() {
        for (path, plain) in [
            ("/a/b", Some("/a/b")),
            ("/a/../b", Some("/b")),
            ("/a/%2e%2E/b", Some("/b")),
            ("/a/.%2e/b/./c/", Some("/b/c/")),
            ("/a/..", Some("/")),
            ("/a/b/..", Some("/a/")),
            ("/.", Some("/")),
            ("/a/.hidden/..x/...", Some("/a/.hidden/..x/...")),
            ("/a//b", Some("/a//b")),
            ("/..", None),
            ("/a/../../b", None),
            ("/%2e%2e/etc", None),
        ] {
            assert_eq!(plain_path(path).ok().as_deref(), plain, "{path}");
        }
    }

    fn request(version: Version, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request")
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        let h1 = Version::HTTP_11;
        for (uri, headers, expected) in [
            ("/", &[("host", "a.example:80")][..], Ok("a.example")),
            ("/", &[], Err(Refusal::NoHost)),
            ("/", &[("host", "a.example"), ("host", "b.example")], Err(Refusal::ManyHosts)),
            ("/", &[("host", "a.example/b")], Err(Refusal::BadHost)),
            ("http://a.example/", &[("host", "b.example")], Err(Refusal::BadHost)),
            ("http://a.example/", &[("host", "a.example")], Ok("a.example")),
            (
                "/",
                &[("host", "a.example"), ("content-length", "3"), ("transfer-encoding", "chunked")],
                Err(Refusal::TwoLengths),
            ),
        ] {
            assert_eq!(host(&request(h1, uri, headers)), expected, "{uri} {headers:?}");
        }
        let old = request(Version::HTTP_10, "/", &[("host", "a.example"), ("transfer-encoding", "chunked")]);
        assert_eq!(host(&old), Err(Refusal::TwoLengths));
    }

    #[test]
    fn headers_of_one_connection_stay_on_it() {
        let mut headers = request(
            Version::HTTP_11,
            "/",
            &[
                ("connection", "x-secret, close, content-length, x-forwarded-for"),
                ("x-secret", "1"),
                ("content-length", "3"),
                ("x-forwarded-for", "192.0.2.1"),
                ("keep-alive", "5"),
                ("te", "trailers"),
                ("upgrade", "h2c"),
                ("http2-settings", "AAA"),
                ("x-kept", "1"),
            ],
        )
        .headers()
        .clone();
        strip_request(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "te", "x-forwarded-for", "x-kept"]);
    }
}
