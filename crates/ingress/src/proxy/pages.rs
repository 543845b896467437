//! Error pages: whoever stands in for an endpoint is told what went wrong in ingress-nginx's headers, and its answer is the
//! client's, status and all.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri};
use tokio::time::Instant;

use super::attempt::{Attempts, Head, Sent};
use super::body::{RequestBody, ResponseBody, Troubles};
use super::forward::{Finish, forwarded, number, protocol_of};
use super::hygiene;
use super::worker::{Client, Worker};
use crate::policy::{BackendProtocol, Policy};
use crate::route::Route;
use crate::sticky::Wish;

/// What is kept of a request until it is known whether its answer is replaced.
pub struct Asked {
    method: Method,
    original: HeaderValue,
    headers: HeaderMap,
}

impl Asked {
    /// The request gets its number here, as the page is told the same.
    pub fn of<B>(worker: &Worker, request: &mut Request<B>) -> Self {
        number(worker, request.headers_mut());
        let mut headers = request.headers().clone();
        if let Some(authority) = request.uri().authority()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            headers.entry(HOST).or_insert(host);
        }
        // Only who asks for no body gets none.
        let method = if *request.method() == Method::HEAD { Method::HEAD } else { Method::GET };
        Asked { method, original: original(request.uri()), headers }
    }
}

/// Path and query as they came.
pub fn original(uri: &Uri) -> HeaderValue {
    let text = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("/"))
}

const X_CODE: HeaderName = HeaderName::from_static("x-code");
const X_FORMAT: HeaderName = HeaderName::from_static("x-format");
const X_ORIGINAL_URI: HeaderName = HeaderName::from_static("x-original-uri");
const X_NAMESPACE: HeaderName = HeaderName::from_static("x-namespace");
const X_INGRESS_NAME: HeaderName = HeaderName::from_static("x-ingress-name");
const X_SERVICE_NAME: HeaderName = HeaderName::from_static("x-service-name");
const X_SERVICE_PORT: HeaderName = HeaderName::from_static("x-service-port");

/// Says what went wrong, and where. What the client says of it is not believed.
pub fn explain(headers: &mut HeaderMap, status: StatusCode, route: &Route, original: HeaderValue) {
    let service = route.upstreams().next().map(|upstream| &upstream.key);
    let format = headers.get(ACCEPT).cloned();
    let text = |text: String| HeaderValue::try_from(text).ok();
    for (name, value) in [
        (X_CODE, text(status.as_u16().to_string())),
        (X_FORMAT, format),
        (X_ORIGINAL_URI, Some(original)),
        (X_NAMESPACE, text(route.name.namespace.to_string())),
        (X_INGRESS_NAME, text(route.name.name.to_string())),
        (X_SERVICE_NAME, service.and_then(|key| text(key.service.to_string()))),
        (X_SERVICE_PORT, service.and_then(|key| text(key.port.to_string()))),
    ] {
        match value {
            Some(value) => drop(headers.insert(name, value)),
            None => drop(headers.remove(name)),
        }
    }
}

/// The page for an answer with this status; `None`: nobody gives one, and the answer stays.
pub async fn page(
    worker: &Arc<Worker>,
    client: &Client,
    route: &Arc<Route>,
    asked: Asked,
    status: StatusCode,
) -> Option<Response<ResponseBody>> {
    let pages = route.policy.pages.as_ref()?;
    let mut headers = asked.headers;
    hygiene::strip_request(&mut headers);
    for name in [CONTENT_LENGTH, CONTENT_TYPE] {
        headers.remove(name);
    }
    forwarded(client, &mut headers);
    explain(&mut headers, status, route, asked.original);
    let mut head = Head { method: asked.method, uri: Uri::from(PathAndQuery::from_static("/")), headers };
    let targets = pages.upstream.targets();
    let policy = Policy::shared();
    let protocol = protocol_of(&targets, &policy);
    if protocol == BackendProtocol::H2c {
        head.make_http2().ok()?;
    }
    let attempts = Attempts {
        worker,
        policy: &policy,
        tls: None,
        identity: None,
        turn: &AtomicU32::new(0),
        targets: &targets,
        protocol,
        trouble: Troubles::default(),
        wish: Wish::None,
        announce: None,
    };
    let sent = attempts.run(head, RequestBody::Empty, route, Instant::now()).await.ok()?;
    let Sent { mut response, active, peer } = sent;
    hygiene::strip(response.headers_mut());
    let finish = Finish::unlogged(worker.clone(), route.clone(), active, peer);
    Some(response.map(|body| ResponseBody::endpoint(body, policy.read_timeout, None, finish)))
}
