//! A copy of a request for somebody else, whose answer nobody waits for. The copy never holds up the request: where its endpoint
//! is slower, it is broken off.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH};
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::attempt::Head;
use super::balance::{Active, pick};
use super::body::{BoxError, RequestBody};
use super::forward::protocol_of;
use super::http1::Exchange;
use super::pool::{Connection, Peer};
use super::worker::Worker;
use crate::gateway::Identity;
use crate::policy::{BackendProtocol, Policy};
use crate::route::Mirror;
use crate::sticky::Wish;

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
pub fn is_drawn(mirror: &Mirror, draw: u64) -> bool {
    u64::from(mirror.part) > draw % u64::from(mirror.whole.max(1))
}

/// Sends copies of a request to the mirrors. The body gives what it gets to all of them.
pub fn send(
    worker: &Arc<Worker>,
    mirrors: &[Arc<Mirror>],
    head: &Head,
    body: &mut RequestBody,
    policy: &Arc<Policy>,
    identity: Option<&Arc<Identity>>,
) {
    let mut copies = Vec::new();
    for mirror in mirrors {
        let copied = match body.is_empty() {
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
        let one = one(worker.clone(), mirror.clone(), head, copied, policy.clone(), identity.cloned());
        tokio::spawn(async move { drop(timeout(PATIENCE, one).await) });
    }
    if !copies.is_empty() {
        body.copy_to(Copies(copies));
    }
}

async fn one(
    worker: Arc<Worker>,
    mirror: Arc<Mirror>,
    mut head: Head,
    body: RequestBody,
    policy: Arc<Policy>,
    identity: Option<Arc<Identity>>,
) {
    let targets = mirror.upstream.targets();
    let now = worker.milliseconds();
    let balance = crate::policy::Balance::default();
    let chosen = pick(&mirror.upstream.turn, &targets.endpoints, balance, &[], Wish::None, now, worker.random());
    let Some(endpoint) = chosen else { return };
    let active = Active::new(endpoint.clone());
    let peer = Peer { address: endpoint.address, tls: mirror.tls.clone(), identity, announce: None };
    let protocol = protocol_of(&targets, &policy);
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
