//! A copy of a request for somebody else, whose answer nobody waits for. The copy never holds up the request: where its endpoint
//! is slower, it is broken off.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Uri};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::attempt::Head;
use super::balance::{Active, pick};
use super::body::{BoxError, RequestBody};
use super::facts::facts;
use super::forward::{number, protocol_of};
use super::http1::Exchange;
use super::pool::{Connection, Peer};
use super::worker::{Client, Worker};
use crate::gateway::{BackendTls, Identity};
use crate::policy::{BackendProtocol, Policy};
use crate::route::{Filter, Mirror, MirrorTo, MirrorUrl};
use crate::sticky::Wish;
use crate::upstream::Targets;
use crate::url::split_port;
use crate::variables::Facts;

/// Parts of a body that a mirror may be behind.
const BEHIND: usize = 64;
/// For the whole of a mirrored request.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the parts of a body go besides its endpoint.
pub struct Copies(Vec<mpsc::Sender<Bytes>>);

impl Copies {
    /// Whoever cannot take it is left behind.
    pub fn put(&mut self, data: &Bytes) {
        self.0.retain(|copy| copy.try_send(data.clone()).is_ok());
    }
}

/// A body's copy. It ends early when its reader is too slow.
pub struct CopiedBody(mpsc::Receiver<Bytes>);

impl CopiedBody {
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

/// Whether this request is one of those that are mirrored.
fn is_drawn(mirror: &Mirror, draw: u64) -> bool {
    u64::from(mirror.part) > draw % u64::from(mirror.whole.max(1))
}

/// A mirror that gets a copy of this request.
pub struct Drawn {
    mirror: Arc<Mirror>,
    /// `None`: as the endpoint gets it.
    aim: Option<Aim>,
}

/// Where the URL of a mirror leads for one request.
struct Aim {
    /// Host, maybe with a port.
    authority: String,
    /// What the copy names as its host.
    host: HeaderValue,
    /// `None`: the path that the endpoint gets.
    uri: Option<Uri>,
    has_body: bool,
}

impl Aim {
    /// `None`: a variable holds what can stand in no head.
    fn of(wanted: &MirrorUrl, facts: &Facts<'_>) -> Option<Self> {
        let url = &wanted.url;
        let authority = url.authority.fill(facts);
        let (host, _) = split_port(&authority, url.is_tls)?;
        let host = wanted.host.as_ref().map_or_else(|| host.to_owned(), |host| host.fill(facts));
        let mut path = url.path.fill(facts);
        if !path.is_empty() && !path.starts_with('/') {
            path.insert(0, '/');
        }
        // As nginx: a path without variables gets the request's query.
        if url.path.constant().is_some_and(|path| !path.is_empty() && !path.contains('?'))
            && !facts.ask.query.is_empty()
        {
            path = format!("{path}?{}", facts.ask.query);
        }
        let uri = match path.is_empty() {
            true => None,
            false => Some(Uri::from(PathAndQuery::try_from(path).ok()?)),
        };
        Some(Aim { host: HeaderValue::try_from(host).ok()?, authority, uri, has_body: wanted.has_body })
    }
}

/// The mirrors that get a copy of this request.
pub fn draw<'a>(
    worker: &Worker,
    client: &Client,
    filters: impl Iterator<Item = &'a Filter>,
    request: &mut Request<Incoming>,
) -> Vec<Drawn> {
    let mirrors = filters.filter_map(|filter| match filter {
        Filter::Mirror(mirror) if is_drawn(mirror, worker.random()) => Some(mirror.clone()),
        _ => None,
    });
    let aimed = mirrors.filter_map(|mirror| {
        let aim = match &mirror.to {
            MirrorTo::Service { .. } => None,
            MirrorTo::Url { wanted, .. } => {
                number(worker, request.headers_mut());
                Some(Aim::of(wanted, &facts(client, request))?)
            }
        };
        Some(Drawn { mirror, aim })
    });
    aimed.collect()
}

/// Sends copies of a request to the mirrors. The body gives what it gets to all of them.
pub fn send(
    worker: &Arc<Worker>,
    mirrors: Vec<Drawn>,
    head: &Head,
    body: &mut RequestBody,
    policy: &Arc<Policy>,
    identity: Option<&Arc<Identity>>,
) {
    let mut copies = Vec::new();
    for Drawn { mirror, aim } in mirrors {
        let copied = match body.is_empty() || aim.as_ref().is_some_and(|aim| !aim.has_body) {
            true => RequestBody::Empty,
            false => {
                let (sender, receiver) = mpsc::channel(BEHIND);
                copies.push(sender);
                RequestBody::Copy(CopiedBody(receiver))
            }
        };
        let mut head = head.copy();
        head.headers.remove(CONNECTION);
        if !body.is_empty() {
            // It may end early, which a length would make an error of the connection instead of the request's.
            head.headers.remove(CONTENT_LENGTH);
        }
        if let Some(aim) = &aim {
            head.headers.insert(HOST, aim.host.clone());
            if let Some(uri) = &aim.uri {
                head.uri = uri.clone();
            }
        }
        let aim = aim.map(|aim| aim.authority);
        let one = one(worker.clone(), mirror, aim, head, copied, policy.clone(), identity.cloned());
        tokio::spawn(async move { drop(timeout(PATIENCE, one).await) });
    }
    if !copies.is_empty() {
        body.copy_to(Copies(copies));
    }
}

/// Endpoints to copy to, and how they are spoken to.
async fn find(
    worker: &Worker,
    to: &MirrorTo,
    authority: Option<&str>,
    policy: &Policy,
) -> Option<(Arc<Targets>, Option<Arc<BackendTls>>, BackendProtocol)> {
    let names = &worker.shared.names;
    let (targets, tls, policy) = match to {
        MirrorTo::Service { upstream, tls } => (upstream.targets(), tls.clone(), policy),
        MirrorTo::Url { wanted, place } => {
            let (host, port) = split_port(authority?, wanted.url.is_tls)?;
            let targets = match &place.upstream {
                Some(upstream) => upstream.targets(),
                None => names.find(host, port).await,
            };
            let tls = if wanted.url.is_tls { Some(place.tls(host)?) } else { None };
            // What is said of the route's endpoints is not said of these.
            (targets, tls, &*Policy::shared())
        }
    };
    let protocol = protocol_of(&targets, policy);
    Some(match &targets.name {
        Some((name, port)) => (names.find(name, *port).await, tls, protocol),
        None => (targets, tls, protocol),
    })
}

async fn one(
    worker: Arc<Worker>,
    mirror: Arc<Mirror>,
    authority: Option<String>,
    mut head: Head,
    body: RequestBody,
    policy: Arc<Policy>,
    identity: Option<Arc<Identity>>,
) {
    let found = find(&worker, &mirror.to, authority.as_deref(), &policy).await;
    let Some((targets, tls, protocol)) = found else { return };
    let now = worker.milliseconds();
    let balance = crate::policy::Balance::default();
    let fresh = AtomicU32::new(0);
    let turn = mirror.to.upstream().map_or(&fresh, |upstream| &upstream.turn);
    let chosen = pick(turn, &targets.endpoints, balance, &[], Wish::None, now, worker.random());
    let Some(endpoint) = chosen else { return };
    let active = Active::new(endpoint.clone());
    let peer = Peer { address: endpoint.address, tls, identity, announce: None };
    if protocol == BackendProtocol::H2c && head.make_http2().is_err() {
        return;
    }
    let Ok(connection) = worker.pool.get(&peer, protocol, false, policy.connect_timeout).await else {
        endpoint.failed(now);
        return;
    };
    // Read to its end, so that the connection can be used again.
    match connection {
        Connection::Http1 { connection, .. } => {
            let mut exchange = Exchange::new(connection, head.over_http1(), body);
            if poll_fn(|cx| exchange.poll_head(cx)).await.is_err() {
                return;
            }
            while let Some(frame) = poll_fn(|cx| exchange.poll_body(cx)).await {
                if frame.is_err() {
                    return;
                }
            }
            if let Some(connection) = exchange.into_connection() {
                worker.pool.put(&peer, connection);
            }
        }
        Connection::Http2(mut sender) => {
            let Ok(response) = sender.send_request(head.over_http2(body)).await else { return };
            let mut rest = response.into_body();
            while let Some(Ok(_)) = rest.frame().await {}
        }
    }
    drop(active);
}

impl RequestBody {
    fn copy_to(&mut self, copies: Copies) {
        if let RequestBody::Client(body) = self {
            body.copies = Some(copies);
        }
    }
}
