//! The tries of one request: which endpoint, which connection, and what may be sent once more.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use http::header::{HOST, HeaderMap};
use http::uri::{Authority, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::ext::ReasonPhrase;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

use super::announce::Announcement;
use super::balance::{Active, milliseconds, pick, spare};
use super::body::{Answered, RequestBody, Trouble, Troubles};
use super::http1::{Exchange, Http1, RequestHead};
use super::pool::{Connection, Http2, Peer};
use super::worker::Worker;
use crate::gateway::{BackendTls, Identity};
use crate::policy::{BackendProtocol, Policy};
use crate::route::Route;
use crate::sticky::Wish;
use crate::upstream::{Endpoint, Targets};

/// A connection of the pool may have been closed by its endpoint; so many of them are tried for one request.
const STALE: u32 = 2;

/// What a client is told when no endpoint answers.
pub type Answer = (StatusCode, &'static str);

pub const NOBODY: Answer = (StatusCode::SERVICE_UNAVAILABLE, "the Service has no endpoint that is ready\n");
const UNREACHED: Answer = (StatusCode::BAD_GATEWAY, "no endpoint could be reached\n");
pub const BROKEN: Answer = (StatusCode::BAD_GATEWAY, "the endpoint broke off\n");
pub const LATE: Answer = (StatusCode::GATEWAY_TIMEOUT, "the endpoint did not answer in time\n");

/// The head of a request, to be sent maybe more than once.
pub struct Head {
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
}

impl Head {
    /// HTTP/2 has the host beside the path.
    ///
    /// # Errors
    /// The host is none.
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

    pub fn over_http1(&self) -> RequestHead<'_> {
        RequestHead { method: &self.method, uri: &self.uri, headers: &self.headers }
    }

    pub fn over_http2(&self, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        *request.version_mut() = Version::HTTP_2;
        request
    }
}

/// The answer of an endpoint.
pub struct Sent {
    pub response: Response<Answered>,
    pub active: Active,
    pub peer: Peer,
}

/// The tries of one request.
pub struct Attempts<'a> {
    pub worker: &'a Arc<Worker>,
    pub policy: &'a Policy,
    pub tls: Option<Arc<BackendTls>>,
    pub identity: Option<Arc<Identity>>,
    /// Whose turn it is, where endpoints take turns.
    pub turn: &'a AtomicU32,
    pub targets: &'a Targets,
    pub protocol: BackendProtocol,
    pub trouble: Troubles,
    pub wish: Wish,
    /// What endpoints hear before the first byte.
    pub announce: Option<Announcement>,
}

/// Why one try came to nothing. The body is where it was unless something was sent.
enum Failed {
    /// Nothing was sent: the same request, whatever it does, may go elsewhere.
    Unsent(Answer),
    /// The connection had been closed by then.
    Stale,
    /// Something was sent, maybe all.
    Sent(Answer),
}

impl Attempts<'_> {
    /// Asks one endpoint after the other until one answers.
    ///
    /// # Errors
    /// What to tell the client, as nobody answers and no more may be asked.
    pub async fn run(
        &self,
        head: Head,
        mut body: RequestBody,
        route: &Route,
        started: Instant,
    ) -> Result<Sent, Answer> {
        let (worker, policy) = (self.worker, self.policy);
        let count = u32::try_from(self.targets.endpoints.len()).unwrap_or(u32::MAX);
        let tries = if policy.retry.tries == 0 { count.max(1) } else { policy.retry.tries };
        if let Some(percent) = policy.retry.budget {
            route.counts.budget.earn(percent);
        }
        let may_repeat = body.is_empty() && (policy.retry.non_idempotent || is_idempotent(&head.method));
        let mut tried: Vec<SocketAddr> = Vec::new();
        let (mut stale, mut last, mut is_work) = (0, NOBODY, false);
        for number in 0..tries.saturating_add(STALE) {
            if number > 0 && policy.retry.within.is_some_and(|within| started.elapsed() >= within) {
                break;
            }
            if tried.len() >= tries as usize {
                break;
            }
            let now = worker.milliseconds();
            let endpoint =
                pick(self.turn, &self.targets.endpoints, policy.balance, &tried, self.wish, now, worker.random());
            let Some(mut endpoint) = endpoint else { break };
            // What was sent may be work already; where nobody accepted there is none.
            if std::mem::take(&mut is_work) && policy.retry.budget.is_some() && !route.counts.budget.take(now) {
                break;
            }
            if number > 0 {
                route.counts.retries.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(window) = policy.slow_start.filter(|_| self.wish == Wish::None) {
                let window = milliseconds(window);
                endpoint = spare(endpoint, &self.targets.endpoints, &tried, window, now, worker.random());
            }
            let (answer, may_repeat) = match self.once(&endpoint, &head, &mut body, may_repeat, stale >= STALE).await {
                Ok(sent) => return Ok(sent),
                Err(Failed::Stale) => {
                    stale += 1;
                    continue;
                }
                Err(Failed::Unsent(answer)) => (answer, true),
                Err(Failed::Sent(answer)) => {
                    is_work = true;
                    (answer, may_repeat)
                }
            };
            if let Some(trouble) = self.trouble.get() {
                return Err(match trouble {
                    Trouble::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than allowed here\n"),
                    Trouble::Broken => (StatusCode::BAD_REQUEST, "the body does not come to its end\n"),
                    Trouble::TooSlow => (StatusCode::REQUEST_TIMEOUT, "the body did not come\n"),
                });
            }
            endpoint.failed(now);
            tried.push(endpoint.address);
            last = answer;
            let wanted = if answer == LATE { policy.retry.on_timeout } else { policy.retry.on_error };
            if !may_repeat || !wanted {
                return Err(answer);
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
        head: &Head,
        body: &mut RequestBody,
        may_repeat: bool,
        is_fresh: bool,
    ) -> Result<Sent, Failed> {
        let (pool, policy) = (&self.worker.pool, self.policy);
        let (tls, identity) = (self.tls.clone(), self.identity.clone());
        let peer = Peer { address: endpoint.address, tls, identity, announce: self.announce.map(Box::new) };
        let active = Active::new(endpoint.clone());
        let connection = pool.get(&peer, self.protocol, is_fresh, policy.connect_timeout).await.map_err(|error| {
            let late = error.kind() == std::io::ErrorKind::TimedOut;
            Failed::Unsent(if late { LATE } else { UNREACHED })
        })?;
        let response = match connection {
            Connection::Http1 { connection, is_reused } => {
                self.over_http1(connection, is_reused, head, body, may_repeat).await?
            }
            // Rarely there, and large: in a box it costs the others nothing.
            Connection::Http2(sender) => Box::pin(self.over_http2(sender, &peer, head, body, may_repeat)).await?,
        };
        if may_repeat && policy.retry.on_status.contains(response.status().as_u16()) {
            return Err(Failed::Sent(BROKEN));
        }
        endpoint.succeeded();
        Ok(Sent { response, active, peer })
    }

    async fn over_http1(
        &self,
        connection: Http1,
        is_reused: bool,
        head: &Head,
        body: &mut RequestBody,
        may_repeat: bool,
    ) -> Result<Response<Answered>, Failed> {
        let mut exchange = Box::new(Exchange::new(connection, head.over_http1(), std::mem::take(body)));
        match self.answered(poll_fn(|cx| exchange.poll_head(cx))).await {
            Ok(Ok(read)) => {
                let mut response = Response::new(Answered::Http1(exchange));
                (*response.status_mut(), *response.headers_mut()) = (read.status, read.headers);
                if let Some(reason) = read.reason.and_then(|reason| ReasonPhrase::try_from(&reason[..]).ok()) {
                    response.extensions_mut().insert(reason);
                }
                Ok(response)
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "an endpoint did not answer");
                // An endpoint may have closed the connection as idle while the request was on its way.
                let is_unsent = match exchange.into_unsent() {
                    Some(unsent) => {
                        *body = unsent;
                        true
                    }
                    None => false,
                };
                Err(match is_unsent {
                    _ if is_reused && (is_unsent || may_repeat) => Failed::Stale,
                    true => Failed::Unsent(BROKEN),
                    false => Failed::Sent(BROKEN),
                })
            }
            Err(_) => Err(Failed::Sent(LATE)),
        }
    }

    async fn over_http2(
        &self,
        mut sender: Http2,
        peer: &Peer,
        head: &Head,
        body: &mut RequestBody,
        may_repeat: bool,
    ) -> Result<Response<Answered>, Failed> {
        let request = head.over_http2(std::mem::take(body));
        match self.answered(sender.try_send_request(request)).await {
            Ok(Ok(response)) => Ok(response.map(Answered::Http2)),
            Ok(Err(mut error)) => {
                self.worker.pool.drop_http2(peer);
                match error.take_message() {
                    Some(request) => {
                        *body = request.into_body();
                        Err(Failed::Stale)
                    }
                    None if may_repeat => Err(Failed::Stale),
                    None => Err(Failed::Sent(BROKEN)),
                }
            }
            Err(_) => Err(Failed::Sent(LATE)),
        }
    }
}

/// RFC 9110 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE | Method::TRACE)
}
