//! A request goes to an endpoint, and to another one where that is safe; its answer comes back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN, SET_COOKIE, UPGRADE};
use http::uri::{PathAndQuery, Uri};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};

use super::announce::Announcement;
use super::attempt::{Answer, Attempts, BROKEN, Head, LATE, NOBODY, Sent};
use super::balance::Active;
use super::body::{Answered, RequestBody, ResponseBody};
use super::facts::facts;
use super::handle::{Arrival, answer, location, redirect, rewritten};
use super::http1::Http1;
use super::hygiene;
use super::log::Line;
use super::mirror;
use super::pages;
use super::pool::Peer;
use super::upgrade::tunnel;
use super::worker::{Client, Worker};
use crate::limits::UnderWay;
use crate::policy::{BackendProtocol, Policy};
use crate::route::{Action, Filter, Instead, Route, WeightedBackend};
use crate::sticky::Wish;
use crate::upstream::Targets;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Old names of the same, which a client must not be able to say instead.
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const X_FORWARDED_SCHEME: HeaderName = HeaderName::from_static("x-forwarded-scheme");
/// What remains to be done when an answer is over: on [`Finish::complete`] if it is whole, and when dropped.
pub struct Finish {
    worker: Arc<Worker>,
    route: Arc<Route>,
    active: Option<Active>,
    /// Whose connection it came over.
    peer: Peer,
    line: Option<Box<Line>>,
    /// What counts the request at its client's limits.
    _under_way: Option<UnderWay>,
    started: Instant,
    bytes: u64,
}

impl Finish {
    /// Of an answer that no line of the log is about.
    pub fn unlogged(worker: Arc<Worker>, route: Arc<Route>, active: Active, peer: Peer) -> Self {
        let started = Instant::now();
        Finish { worker, route, active: Some(active), peer, line: None, _under_way: None, started, bytes: 0 }
    }

    pub fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// The answer is whole; its connection may carry another request.
    pub fn complete(&mut self, connection: Option<Http1>) {
        if let (Some(_), Some(connection)) = (&self.active, connection) {
            self.worker.pool.put(&self.peer, connection);
        }
        self.active = None;
    }
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.route.counts.sent.fetch_add(self.bytes, Ordering::Relaxed);
        if let Some(line) = self.line.take() {
            self.worker.log().write(&line, self.bytes, self.started.elapsed());
        }
    }
}

/// Sends the request on and returns the answer, ours if no endpoint gives one.
pub async fn forward(
    worker: Arc<Worker>,
    client: Arc<Client>,
    mut arrival: Arrival,
    request: Request<Incoming>,
    mut line: Option<Box<Line>>,
) -> Response<ResponseBody> {
    let (route, started) = (arrival.route.clone(), arrival.started);
    let cors = route.filters.iter().find_map(|filter| match filter {
        Filter::Cors(cors) => Some((cors, request.headers().get(ORIGIN).cloned())),
        _ => None,
    });
    let backend = match &route.action {
        Action::Forward(backends) => backends.pick(worker.random() as u32),
        Action::Redirect(_) | Action::Respond(_) => None,
    };
    if let Some(Instead::Redirect(wanted)) = backend.and_then(|one| one.instead.as_ref()) {
        let response = redirect(wanted.status, &location(wanted, &client, &arrival, &request));
        route.counts.answered(response.status().as_u16(), started.elapsed());
        worker.tell(line, &response, Some(&route), started);
        return response;
    }
    let wish = wish(&client, &arrival, &request);
    let under_way = arrival.under_way.take();
    let trying = attempt(&worker, &client, &arrival, backend, request, wish);
    let outcome = match route.policy.request_timeout {
        None => trying.await,
        Some(limit) => timeout(limit, trying).await.unwrap_or(Err(LATE)),
    };
    let status = match &outcome {
        Ok(sent) => sent.response.status(),
        Err(problem) => problem.0,
    };
    route.counts.answered(status.as_u16(), started.elapsed());
    match outcome {
        Err((status, text)) => {
            let response = answer(status, text);
            worker.tell(line, &response, Some(&route), started);
            response
        }
        Ok(sent) => {
            if let Some(line) = &mut line {
                line.answered(status, &route, sent.active.0.address);
            }
            let Sent { response, active, peer } = sent;
            let patience = route.policy.read_timeout;
            let (mut parts, body) = response.into_parts();
            for filter in route.filters.iter().chain(backend.iter().flat_map(|one| &one.filters)) {
                match filter {
                    Filter::ResponseHeaders(changes) => changes.apply(&mut parts.headers),
                    Filter::Redirects(replacement) => replacement.redirects(&mut parts.headers),
                    Filter::Cookies(changes) => changes.apply(&mut parts.headers),
                    _ => {}
                }
            }
            if let Some((cors, origin)) = cors {
                cors.apply(origin.as_ref(), &mut parts.headers);
            }
            if let Some(affinity) = &route.policy.affinity
                && wish != Wish::Endpoint(active.0.number)
                && let Ok(cookie) = HeaderValue::try_from(affinity.header(active.0.number, client.is_tls))
            {
                parts.headers.append(SET_COOKIE, cookie);
            }
            let finish = Finish {
                worker,
                route: route.clone(),
                active: Some(active),
                peer,
                line,
                _under_way: under_way,
                started,
                bytes: 0,
            };
            Response::from_parts(parts, ResponseBody::endpoint(body, patience, route.policy.rate, finish))
        }
    }
}

/// Which endpoint the request belongs to, if its route asks for that.
fn wish(client: &Client, arrival: &Arrival, request: &Request<Incoming>) -> Wish {
    let policy = &arrival.route.policy;
    if let Some(affinity) = &policy.affinity {
        return affinity.wish(request.headers());
    }
    let Some(by) = &policy.hash_by else { return Wish::None };
    Wish::of(&by.fill(&facts(client, request)))
}

const NOWHERE: &str = "this route leads to a backend that it may not or cannot use\n";

async fn attempt(
    worker: &Arc<Worker>,
    client: &Client,
    arrival: &Arrival,
    backend: Option<&WeightedBackend>,
    mut request: Request<Incoming>,
    wish: Wish,
) -> Result<Sent, Answer> {
    let route = &arrival.route;
    let policy = &*route.policy;
    let backend = backend.ok_or(NOBODY)?;
    if let Some(Instead::Refusal(status)) = backend.instead {
        return Err((status, NOWHERE));
    }
    let (mut upstream, mut targets) = (&backend.upstream, backend.upstream.targets());
    let protocol = protocol_of(&targets, policy);
    if let Some((name, port)) = &targets.name {
        targets = Box::pin(worker.shared.names.find(name, *port)).await;
    }
    // Without an endpoint whoever gives pages gets the request itself.
    let stand_in = policy.pages.as_ref().filter(|_| targets.endpoints.is_empty());
    if let Some(pages) = stand_in {
        (upstream, targets) = (&pages.upstream, pages.upstream.targets());
    }
    let protocol = if stand_in.is_some() { protocol_of(&targets, &Policy::shared()) } else { protocol };
    let upgrade = match protocol {
        BackendProtocol::Http1 => hygiene::upgrade_of(request.headers(), request.version()),
        BackendProtocol::H2c => None,
    };
    let on_upgrade = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let mirrors = mirror::draw(worker, client, route.filters.iter().chain(&backend.filters), &mut request);
    let (parts, incoming) = request.into_parts();
    let mut head = Head { method: parts.method, uri: parts.uri, headers: parts.headers };
    let patience = worker.shared.config.limits.body_timeout;
    let (mut body, trouble) = RequestBody::new(incoming, policy.body_limit, patience);
    let original = stand_in.map(|_| pages::original(&head.uri));
    prepare(worker, client, arrival, &mut head, protocol, upgrade.as_ref());
    if let Some(original) = original {
        pages::explain(&mut head.headers, StatusCode::SERVICE_UNAVAILABLE, route, original);
    }
    if let Some(granted) = &arrival.granted {
        granted.set_headers(&mut head.headers);
    }
    for filter in backend.filters.iter() {
        apply(filter, route, arrival, &mut head);
    }
    let identity = client.entrance.identity();
    if !mirrors.is_empty() {
        mirror::send(worker, mirrors, &head, &mut body, &route.policy, identity.as_ref());
    }
    if protocol == BackendProtocol::H2c {
        head.make_http2()?;
    }
    let tls = backend.tls.clone().filter(|_| stand_in.is_none());
    let announce = policy.announces.map(|version| Announcement { version, client: client.peer, local: client.local });
    let attempts = Attempts {
        announce,
        worker,
        policy,
        tls,
        identity,
        turn: &upstream.turn,
        targets: &targets,
        protocol,
        trouble,
        wish,
    };
    let mut sent = attempts.run(head, body, route, arrival.started).await?;
    if sent.response.status() != StatusCode::SWITCHING_PROTOCOLS {
        hygiene::strip(sent.response.headers_mut());
    } else {
        let (Some(on_upgrade), Some(_)) = (on_upgrade, upgrade) else { return Err(BROKEN) };
        let Answered::Http1(exchange) = std::mem::replace(sent.response.body_mut(), Answered::Nothing) else {
            return Err(BROKEN);
        };
        let chosen = sent.response.headers().get(UPGRADE).cloned();
        hygiene::strip(sent.response.headers_mut());
        if let Some(chosen) = chosen {
            sent.response.headers_mut().insert(UPGRADE, chosen);
            sent.response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
        // The tunnel counts as a request under way for as long as it is there.
        let active = Active::new(sent.active.0.clone());
        tokio::spawn(tunnel(on_upgrade, exchange.into_upgraded(), active, worker.shared.token.clone()));
    }
    Ok(sent)
}

/// What is spoken to these endpoints.
pub fn protocol_of(targets: &Targets, policy: &Policy) -> BackendProtocol {
    match targets.app_protocol.as_deref() {
        Some("kubernetes.io/h2c" | "grpc") => BackendProtocol::H2c,
        _ => policy.protocol,
    }
}

/// Makes the client's head the one that an endpoint gets.
fn prepare(
    worker: &Worker,
    client: &Client,
    arrival: &Arrival,
    head: &mut Head,
    protocol: BackendProtocol,
    upgrade: Option<&HeaderValue>,
) {
    let headers = &mut head.headers;
    hygiene::strip_request(headers);
    // For what is added below.
    headers.reserve(8);
    if !headers.contains_key(HOST)
        && let Some(authority) = head.uri.authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        headers.insert(HOST, host);
    }
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    forwarded(client, headers);
    number(worker, headers);
    if head.uri.authority().is_some() || arrival.path.is_some() {
        let uri = std::mem::take(&mut head.uri).into_parts();
        let path = match (&arrival.path, uri.path_and_query) {
            (Some(path), held) => with_query(path, held.as_ref().and_then(PathAndQuery::query)),
            (None, held) => held,
        };
        head.uri = path.map(Uri::from).unwrap_or_default();
    }
    if protocol == BackendProtocol::Http1 {
        // A Cookie header that HTTP/2 has cut into pieces is one again (RFC 9113 8.2.3).
        join_cookies(headers);
    }
    for filter in &arrival.route.filters {
        apply(filter, &arrival.route, arrival, head);
    }
}

fn with_query(path: &str, query: Option<&str>) -> Option<PathAndQuery> {
    let text = match query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    PathAndQuery::try_from(text).ok()
}

fn apply(filter: &Filter, route: &Route, arrival: &Arrival, head: &mut Head) {
    match filter {
        Filter::RequestHeaders(changes) => changes.apply(&mut head.headers),
        Filter::ResponseHeaders(_)
        | Filter::Redirects(_)
        | Filter::Cookies(_)
        | Filter::Cors(_)
        | Filter::Mirror(_) => {}
        Filter::RewriteHost(host) => drop(head.headers.insert(HOST, host.clone())),
        Filter::RewritePath(rewrite) => {
            let held = arrival.path.as_deref().unwrap_or(head.uri.path());
            let path = rewritten(rewrite, route, held);
            // A template may bring a query of its own.
            let query = head.uri.query().filter(|_| !path.contains('?'));
            if let Some(path) = with_query(&path, query) {
                head.uri = Uri::from(path);
            }
        }
    }
}

/// Says who asked and how. What somebody says who is not trusted is replaced.
pub fn forwarded(client: &Client, headers: &mut HeaderMap) {
    let scheme = HeaderValue::from_static(if client.is_tls { "https" } else { "http" });
    if client.is_trusted {
        let chain = headers.get(X_FORWARDED_FOR).and_then(|held| held.to_str().ok());
        let chain = chain.map(|held| format!("{held}, {}", client.peer.ip()));
        let chain = chain.and_then(|text| HeaderValue::try_from(text).ok()).unwrap_or_else(|| client.address.clone());
        headers.insert(X_FORWARDED_FOR, chain);
        headers.entry(X_REAL_IP).or_insert_with(|| client.address.clone());
        headers.entry(X_FORWARDED_PROTO).or_insert(scheme);
        headers.entry(X_FORWARDED_PORT).or_insert_with(|| client.local_port.clone());
        if let Some(host) = headers.get(HOST).cloned() {
            headers.entry(X_FORWARDED_HOST).or_insert(host);
        }
        return;
    }
    headers.remove(FORWARDED);
    headers.remove(X_FORWARDED_SCHEME);
    headers.insert(X_FORWARDED_FOR, client.address.clone());
    headers.insert(X_REAL_IP, client.address.clone());
    headers.insert(X_FORWARDED_PROTO, scheme);
    headers.insert(X_FORWARDED_PORT, client.local_port.clone());
    match headers.get(HOST).cloned() {
        Some(host) => drop(headers.insert(X_FORWARDED_HOST, host)),
        None => drop(headers.remove(X_FORWARDED_HOST)),
    }
}

/// A request without a number gets one.
pub fn number(worker: &Worker, headers: &mut HeaderMap) {
    if !headers.contains_key(X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, request_id(worker));
    }
}

fn request_id(worker: &Worker) -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let number = u128::from(worker.random()) << 64 | u128::from(worker.random());
    let text: [u8; 32] = std::array::from_fn(|at| DIGITS[(number >> (4 * at)) as usize & 15]);
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("none"))
}

fn join_cookies(headers: &mut HeaderMap) {
    use http::header::COOKIE;
    let mut all = headers.get_all(COOKIE).iter();
    if all.next().is_none() || all.next().is_none() {
        return;
    }
    let pieces: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&pieces.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}
