//! The access log: one line a request, written by each worker for many requests at once.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode};
use tokio::time::Instant;

use super::body::ResponseBody;
use super::config::LogFormat;
use super::worker::{Client, Worker};
use crate::route::Route;

/// Bytes that are kept back at most.
const KEPT: usize = 16 * 1024;

pub struct AccessLog {
    format: LogFormat,
    buffer: String,
}

/// What is told of a request.
pub struct Line {
    time: jiff::Timestamp,
    peer: SocketAddr,
    method: http::Method,
    uri: http::Uri,
    version: http::Version,
    host: Option<HeaderValue>,
    referer: Option<HeaderValue>,
    agent: Option<HeaderValue>,
    status: StatusCode,
    /// Namespace and name of what the route is from.
    route: Option<(std::sync::Arc<str>, std::sync::Arc<str>)>,
    endpoint: Option<SocketAddr>,
    /// `traceparent`, where requests are traced.
    pub trace: Option<HeaderValue>,
}

impl Line {
    pub fn new<B>(client: &Client, request: &Request<B>) -> Self {
        let header = |name| request.headers().get(name).cloned();
        Line {
            time: jiff::Timestamp::now(),
            peer: client.peer,
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            host: header(http::header::HOST),
            referer: header(http::header::REFERER),
            agent: header(http::header::USER_AGENT),
            status: StatusCode::OK,
            route: None,
            endpoint: None,
            trace: None,
        }
    }

    pub fn answered(&mut self, status: StatusCode, route: &Route, endpoint: SocketAddr) {
        (self.status, self.endpoint) = (status, Some(endpoint));
        self.route = Some((route.name.namespace.clone(), route.name.name.clone()));
    }
}

impl AccessLog {
    pub fn new(format: LogFormat) -> Self {
        AccessLog { format, buffer: String::new() }
    }

    pub fn is_on(&self) -> bool {
        self.format != LogFormat::Off
    }

    pub fn write(&mut self, line: &Line, bytes: u64, took: Duration) {
        // Writing to a String cannot fail.
        let _ = match self.format {
            LogFormat::Off => Ok(()),
            LogFormat::Text => text(&mut self.buffer, line, bytes, took),
            LogFormat::Json => json(&mut self.buffer, line, bytes, took),
        };
        if self.buffer.len() >= KEPT {
            self.flush();
        }
    }

    pub fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        // A reader that has gone must not end the proxy.
        std::io::stdout().lock().write_all(self.buffer.as_bytes()).ok();
        self.buffer.clear();
    }
}

impl Worker {
    /// Tells of a request that was answered without an endpoint.
    pub fn tell(
        &self,
        line: Option<Box<Line>>,
        response: &Response<ResponseBody>,
        route: Option<&Route>,
        started: Instant,
    ) {
        let Some(mut line) = line else { return };
        line.status = response.status();
        line.route = route.map(|route| (route.name.namespace.clone(), route.name.name.clone()));
        let bytes = http_body::Body::size_hint(response.body()).lower();
        self.log().write(&line, bytes, started.elapsed());
    }
}

/// What a client wrote, so that it can neither end a line nor a quotation.
fn quoted(value: Option<&HeaderValue>) -> String {
    let bytes = value.map_or(&b"-"[..], HeaderValue::as_bytes);
    bytes.iter().flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect()
}

fn text(out: &mut String, line: &Line, bytes: u64, took: Duration) -> std::fmt::Result {
    let path = line.uri.path_and_query().map_or("/", |path| path.as_str());
    let (namespace, name) = line.route.as_ref().map_or(("-", "-"), |(namespace, name)| (&**namespace, &**name));
    let endpoint = line.endpoint.map_or("-".to_owned(), |endpoint| endpoint.to_string());
    let trace = line.trace.as_ref().map(|trace| format!(" {}", quoted(Some(trace)))).unwrap_or_default();
    writeln!(
        out,
        "{} - - [{}] \"{} {path} {:?}\" {} {bytes} \"{}\" \"{}\" {:.3} [{namespace}/{name}] {endpoint}{trace}",
        line.peer.ip(),
        line.time,
        line.method,
        line.version,
        line.status.as_u16(),
        quoted(line.referer.as_ref()),
        quoted(line.agent.as_ref()),
        took.as_secs_f64(),
    )
}

fn json(out: &mut String, line: &Line, bytes: u64, took: Duration) -> std::fmt::Result {
    let text = |value: &Option<HeaderValue>| value.as_ref().map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    let entry = serde_json::json!({
        "time": line.time.to_string(), "client": line.peer.ip(), "method": line.method.as_str(),
        "host": text(&line.host).or_else(|| line.uri.authority().map(ToString::to_string)),
        "path": line.uri.path_and_query().map(|path| path.as_str()), "protocol": format!("{:?}", line.version),
        "status": line.status.as_u16(), "bytes": bytes, "seconds": took.as_secs_f64(),
        "referer": text(&line.referer), "userAgent": text(&line.agent),
        "namespace": line.route.as_ref().map(|(namespace, _)| namespace), "ingress": line.route.as_ref().map(|(_, name)| name),
        "endpoint": line.endpoint, "trace": text(&line.trace),
    });
    writeln!(out, "{entry}")
}
