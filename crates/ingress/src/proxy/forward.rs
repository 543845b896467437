//! A request goes to an endpoint, and to another one where that is safe; its answer comes back.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN, SET_COOKIE, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

use super::balance::{Active, pick};
use super::body::{RequestBody, ResponseBody, Trouble, Troubles};
use super::handle::{Arrival, answer, rewritten};
use super::hygiene;
use super::log::Line;
use super::mirror::{self, is_drawn};
use super::pool::{Connection, Http1, Peer};
use super::upgrade::tunnel;
use super::worker::{Client, Worker};
use crate::gateway::{BackendTls, Identity};
use crate::limits::UnderWay;
use crate::policy::{BackendProtocol, Policy};
use crate::route::{Action, Ask, Filter, Mirror, Route};
use crate::sticky::Wish;
use crate::upstream::{Endpoint, Targets, Upstream};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Old names of the same, which a client must not be able to say instead.
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const X_FORWARDED_SCHEME: HeaderName = HeaderName::from_static("x-forwarded-scheme");
/// A connection of the pool may have been closed by its endpoint; so many of them are tried for one request.
const STALE: u32 = 2;

/// The head of a request, to be sent maybe more than once.
pub struct Head {
    method: Method,
    uri: Uri,
    pub headers: HeaderMap,
}

impl Head {
    pub fn with(self, body: RequestBody, protocol: BackendProtocol) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        if protocol == BackendProtocol::H2c {
            *request.version_mut() = Version::HTTP_2;
        }
        request
    }

    /// HTTP/2 has the host beside the path.
    pub fn make_http2(&mut self) -> Result<(), Answer> {
        let authority = self.headers.remove(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
        let mut uri = std::mem::take(&mut self.uri).into_parts();
        (uri.scheme, uri.authority) = (Some(Scheme::HTTP), authority);
        self.uri = Uri::from_parts(uri).map_err(|_| (StatusCode::BAD_REQUEST, "the request's host is no host\n"))?;
        Ok(())
    }

    pub fn copy(&self) -> Head {
        Head { method: self.method.clone(), uri: self.uri.clone(), headers: self.headers.clone() }
    }
}

/// What remains to be done when an answer is over: on [`Finish::complete`] if it is whole, and when dropped.
pub struct Finish {
    worker: Arc<Worker>,
    route: Arc<Route>,
    active: Option<Active>,
    /// To be kept for others, if the answer is complete.
    connection: Option<(Http1, Peer)>,
    line: Option<Box<Line>>,
    /// What counts the request at its client's limits.
    _under_way: Option<UnderWay>,
    started: Instant,
    bytes: u64,
}

impl Finish {
    pub fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    pub fn complete(&mut self) {
        if let Some((connection, peer)) = self.connection.take() {
            self.worker.pool.put(&peer, connection);
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
    let wish = wish(&client, &arrival, &request);
    let under_way = arrival.under_way.take();
    let trying = attempt(&worker, &client, &arrival, request, wish);
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
            let Sent { response, connection, active } = sent;
            let patience = route.policy.read_timeout;
            let (mut parts, body) = response.into_parts();
            for filter in &route.filters {
                if let Filter::ResponseHeaders(changes) = filter {
                    changes.apply(&mut parts.headers);
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
                connection,
                line,
                _under_way: under_way,
                started,
                bytes: 0,
            };
            Response::from_parts(parts, ResponseBody::endpoint(body, patience, finish))
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
    let ask = Ask {
        host: hygiene::host(request).unwrap_or_default(),
        path: request.uri().path(),
        query: request.uri().query().unwrap_or_default(),
        method: request.method(),
        headers: request.headers(),
    };
    by.wish(&ask, client.peer.ip())
}

/// An answer of our own.
pub type Answer = (StatusCode, &'static str);

struct Sent {
    response: Response<Incoming>,
    /// `None`: it is shared, or not to be used again.
    connection: Option<(Http1, Peer)>,
    active: Active,
}

const NOWHERE: &str = "this route leads to a backend that it may not or cannot use\n";
const NOBODY: Answer = (StatusCode::SERVICE_UNAVAILABLE, "the Service has no endpoint that is ready\n");
const UNREACHED: Answer = (StatusCode::BAD_GATEWAY, "no endpoint could be reached\n");
const BROKEN: Answer = (StatusCode::BAD_GATEWAY, "the endpoint broke off\n");
const LATE: Answer = (StatusCode::GATEWAY_TIMEOUT, "the endpoint did not answer in time\n");

async fn attempt(
    worker: &Arc<Worker>,
    client: &Client,
    arrival: &Arrival,
    mut request: Request<Incoming>,
    wish: Wish,
) -> Result<Sent, Answer> {
    let route = &arrival.route;
    let policy = &*route.policy;
    let Action::Forward(backends) = &route.action else { return Err(NOBODY) };
    let backend = backends.pick(worker.random() as u32).ok_or(NOBODY)?;
    if let Some(status) = backend.refusal {
        return Err((status, NOWHERE));
    }
    let targets = backend.upstream.targets();
    let protocol = protocol_of(&targets, policy);
    let upgrade = match protocol {
        BackendProtocol::Http1 => hygiene::upgrade_of(request.headers(), request.version()),
        BackendProtocol::H2c => None,
    };
    let on_upgrade = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (parts, incoming) = request.into_parts();
    let mut head = Head { method: parts.method, uri: parts.uri, headers: parts.headers };
    let patience = worker.shared.config.limits.body_timeout;
    let (mut body, trouble) = RequestBody::new(incoming, policy.body_limit, patience);
    prepare(worker, client, arrival, &mut head, protocol, upgrade.as_ref());
    for filter in backend.filters.iter() {
        apply(filter, route, arrival, &mut head);
    }
    let identity = client.entrance.identity();
    let mirrors: Vec<Arc<Mirror>> = route
        .filters
        .iter()
        .chain(&backend.filters)
        .filter_map(|filter| match filter {
            Filter::Mirror(mirror) if is_drawn(mirror, worker.random()) => Some(mirror.clone()),
            _ => None,
        })
        .collect();
    if !mirrors.is_empty() {
        mirror::send(worker, &mirrors, &head, &mut body, &route.policy, identity.as_ref());
    }
    if protocol == BackendProtocol::H2c {
        head.make_http2()?;
    }
    let tls = backend.tls.clone();
    let attempts = Attempts {
        worker,
        policy,
        tls,
        identity,
        upstream: &backend.upstream,
        targets: &targets,
        protocol,
        trouble,
        wish,
    };
    let mut sent = attempts.run(head, body, route, arrival.started).await?;
    if sent.response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let (Some(on_upgrade), Some(_)) = (on_upgrade, upgrade) else { return Err(BROKEN) };
        let chosen = sent.response.headers().get(UPGRADE).cloned();
        let theirs = hyper::upgrade::on(&mut sent.response);
        hygiene::strip(sent.response.headers_mut());
        if let Some(chosen) = chosen {
            sent.response.headers_mut().insert(UPGRADE, chosen);
            sent.response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
        // The tunnel counts as a request under way for as long as it is there.
        let active = Active::new(sent.active.0.clone());
        tokio::spawn(tunnel(on_upgrade, theirs, active, worker.shared.token.clone()));
        sent.connection = None;
    } else {
        hygiene::strip(sent.response.headers_mut());
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
    if !headers.contains_key(X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, request_id(worker));
    }
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
        Filter::ResponseHeaders(_) | Filter::Cors(_) | Filter::Mirror(_) => {}
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
fn forwarded(client: &Client, headers: &mut HeaderMap) {
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

/// The tries of one request.
struct Attempts<'a> {
    worker: &'a Arc<Worker>,
    policy: &'a Policy,
    tls: Option<Arc<BackendTls>>,
    identity: Option<Arc<Identity>>,
    upstream: &'a Upstream,
    targets: &'a Targets,
    protocol: BackendProtocol,
    trouble: Troubles,
    wish: Wish,
}

/// What came of one try.
#[allow(clippy::large_enum_variant, reason = "nearly every try is done")]
enum Try {
    Done(Sent),
    /// Nothing was sent: the same request, whatever it does, may go elsewhere.
    Unsent(Answer, Box<(Head, RequestBody)>),
    /// The connection had been closed by then.
    Stale(Box<(Head, RequestBody)>),
    /// Something was sent, maybe all; with it, if it may be sent again.
    Failed(Answer, Option<Box<Head>>),
}

impl Attempts<'_> {
    async fn run(
        &self,
        mut head: Head,
        mut body: RequestBody,
        route: &Route,
        started: Instant,
    ) -> Result<Sent, Answer> {
        let (worker, policy) = (self.worker, self.policy);
        let count = u32::try_from(self.targets.endpoints.len()).unwrap_or(u32::MAX);
        let tries = if policy.retry.tries == 0 { count.max(1) } else { policy.retry.tries };
        let may_repeat = body.is_empty() && (policy.retry.non_idempotent || is_idempotent(&head.method));
        let mut tried: Vec<SocketAddr> = Vec::new();
        let (mut stale, mut last) = (0, NOBODY);
        for number in 0..tries.saturating_add(STALE) {
            if number > 0 {
                if policy.retry.within.is_some_and(|within| started.elapsed() >= within) {
                    break;
                }
                route.counts.retries.fetch_add(1, Ordering::Relaxed);
            }
            if tried.len() >= tries as usize {
                break;
            }
            let now = worker.milliseconds();
            let endpoint =
                pick(self.upstream, &self.targets.endpoints, policy.balance, &tried, self.wish, now, worker.random());
            let Some(endpoint) = endpoint else { break };
            let address = endpoint.address;
            let (answer, rest) = match self.once(&endpoint, head, body, may_repeat, stale >= STALE).await {
                Try::Done(sent) => return Ok(sent),
                Try::Stale(rest) => {
                    stale += 1;
                    (head, body) = *rest;
                    continue;
                }
                Try::Unsent(answer, rest) => (answer, Some(*rest)),
                Try::Failed(answer, head) => (answer, head.map(|head| (*head, RequestBody::Empty))),
            };
            if let Some(trouble) = self.trouble.get() {
                return Err(match trouble {
                    Trouble::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than allowed here\n"),
                    Trouble::TooSlow => (StatusCode::REQUEST_TIMEOUT, "the body did not come\n"),
                });
            }
            endpoint.failed(now);
            tried.push(address);
            last = answer;
            let wanted = if answer == LATE { policy.retry.on_timeout } else { policy.retry.on_error };
            match rest.filter(|_| wanted) {
                Some(rest) => (head, body) = rest,
                None => return Err(answer),
            }
        }
        Err(last)
    }

    /// Waits for an answer: as long as it takes while the body moves, and then as long as the policy says.
    async fn answered<F: Future>(&self, sending: F) -> Result<F::Output, Elapsed> {
        let mut sending = pin!(sending);
        loop {
            let before = self.trouble.progress();
            let limit = if before.1 { self.policy.read_timeout } else { self.policy.send_timeout };
            match timeout(limit, &mut sending).await {
                Err(_) if self.trouble.progress() != before => {}
                outcome => return outcome,
            }
        }
    }

    async fn once(
        &self,
        endpoint: &Arc<Endpoint>,
        head: Head,
        body: RequestBody,
        may_repeat: bool,
        is_fresh: bool,
    ) -> Try {
        let (pool, policy) = (&self.worker.pool, self.policy);
        let peer = Peer { address: endpoint.address, tls: self.tls.clone(), identity: self.identity.clone() };
        let active = Active::new(endpoint.clone());
        let connection = match is_fresh && self.protocol == BackendProtocol::Http1 {
            true => pool
                .open_http1(&peer, policy.connect_timeout)
                .await
                .map(|sender| Connection::Http1 { sender, is_reused: false }),
            false => pool.get(&peer, self.protocol, policy.connect_timeout).await,
        };
        let connection = match connection {
            Ok(connection) => connection,
            Err(error) => {
                let late = error.kind() == std::io::ErrorKind::TimedOut;
                return Try::Unsent(if late { LATE } else { UNREACHED }, Box::new((head, body)));
            }
        };
        let spare = may_repeat.then(|| Box::new(head.copy()));
        let request = head.with(body, self.protocol);
        let (answered, connection, is_reused) = match connection {
            Connection::Http1 { mut sender, is_reused } => {
                let answered = self.answered(sender.try_send_request(request)).await;
                (answered, Some(sender), is_reused)
            }
            Connection::Http2(mut sender) => {
                let answered = self.answered(sender.try_send_request(request)).await;
                (answered, None, true)
            }
        };
        match answered {
            Ok(Ok(response)) if policy.retry.on_status.contains(response.status().as_u16()) && spare.is_some() => {
                Try::Failed(BROKEN, spare)
            }
            Ok(Ok(response)) => {
                endpoint.succeeded();
                Try::Done(Sent { response, connection: connection.map(|sender| (sender, peer)), active })
            }
            Ok(Err(mut error)) => {
                if connection.is_none() {
                    pool.drop_http2(&peer);
                }
                match error.take_message() {
                    Some(request) => {
                        let (parts, body) = request.into_parts();
                        let head = Head { method: parts.method, uri: parts.uri, headers: parts.headers };
                        match is_reused {
                            true => Try::Stale(Box::new((head, body))),
                            false => Try::Unsent(BROKEN, Box::new((head, body))),
                        }
                    }
                    // The endpoint may have closed the connection as idle while the request was on its way.
                    None => match spare {
                        Some(head) if is_reused => Try::Stale(Box::new((*head, RequestBody::Empty))),
                        spare => Try::Failed(BROKEN, spare),
                    },
                }
            }
            Err(_) => Try::Failed(LATE, spare),
        }
    }
}

/// RFC 9110 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE | Method::TRACE)
}
