//! Connections to endpoints, kept by each worker for itself: nothing here is shared between threads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::announce::Announcement;
use super::body::RequestBody;
use super::http1::{Http1, Stream};
use super::io::Io;
use crate::gateway::{BackendTls, Identity};
use crate::policy::BackendProtocol;

pub type Http2 = http2::SendRequest<RequestBody>;

/// A connection that one request may use now.
pub enum Connection {
    Http1 { connection: Http1, is_reused: bool },
    Http2(Http2),
}

/// Whom a connection is to.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    pub tls: Option<Arc<BackendTls>>,
    pub identity: Option<Arc<Identity>>,
    /// What is said first: of one request's client, so that no other request uses the connection.
    pub announce: Option<Box<Announcement>>,
}

/// Connections of one place can stand in for each other: the address, and the numbers of its TLS and of who we are in it.
type Place = (SocketAddr, u64, u64);

impl Peer {
    fn place(&self) -> Place {
        let tls = self.tls.as_ref().map_or(0, |tls| tls.id);
        (self.address, tls, self.identity.as_ref().filter(|_| tls != 0).map_or(0, |identity| identity.id))
    }
}

struct Idle {
    connection: Http1,
    /// The sweep after which it was put here.
    since: u32,
}

#[derive(Default)]
struct Kept {
    http1: HashMap<Place, Vec<Idle>>,
    http2: HashMap<Place, Http2>,
}

/// Connections without a request, by endpoint.
pub struct Pool {
    /// Only one thread uses it: it never waits for the lock.
    kept: Mutex<Kept>,
    limit: usize,
    /// In sweeps.
    age: u32,
    sweeps: AtomicU32,
}

impl Pool {
    /// At most `limit` idle connections to one endpoint, none idle for more than `age` sweeps.
    pub fn new(limit: usize, age: u32) -> Arc<Self> {
        Arc::new(Pool { kept: Mutex::default(), limit, age, sweeps: AtomicU32::new(0) })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to the endpoint: an idle one unless it must be fresh, or a new one.
    ///
    /// # Errors
    /// It does not accept one in time.
    pub async fn get(
        &self,
        peer: &Peer,
        protocol: BackendProtocol,
        is_fresh: bool,
        within: Duration,
    ) -> std::io::Result<Connection> {
        let is_fresh = is_fresh || peer.announce.is_some();
        match protocol {
            BackendProtocol::Http1 => {
                if !is_fresh && let Some(connection) = self.take(&peer.place()) {
                    return Ok(Connection::Http1 { connection, is_reused: true });
                }
                // Most requests find one that is open: the future of those that do not is apart from theirs.
                let connection = Http1::new(Box::pin(secured(peer, false, within)).await?);
                Ok(Connection::Http1 { connection, is_reused: false })
            }
            BackendProtocol::H2c => {
                let is_shared = peer.announce.is_none();
                let held = self.kept().http2.get(&peer.place()).filter(|held| !held.is_closed() && is_shared).cloned();
                if let Some(sender) = held {
                    return Ok(Connection::Http2(sender));
                }
                let sender = Box::pin(self.open_http2(peer, within)).await?;
                if !is_shared {
                    return Ok(Connection::Http2(sender));
                }
                self.kept().http2.insert(peer.place(), sender.clone());
                Ok(Connection::Http2(sender))
            }
        }
    }

    async fn open_http2(&self, peer: &Peer, within: Duration) -> std::io::Result<Http2> {
        match secured(peer, true, within).await? {
            Stream::Plain(stream) => shake_http2(Io::new(stream)).await,
            Stream::Tls(stream) => shake_http2(TokioIo::new(*stream)).await,
        }
    }

    fn take(&self, place: &Place) -> Option<Http1> {
        let mut kept = self.kept();
        let list = kept.http1.get_mut(place)?;
        // The last one that was used is the least likely to be closed.
        while let Some(idle) = list.pop() {
            if idle.connection.is_quiet() {
                return Some(idle.connection);
            }
        }
        None
    }

    /// Takes a connection back whose answer is complete.
    pub fn put(&self, peer: &Peer, connection: Http1) {
        if peer.announce.is_some() {
            return;
        }
        let mut kept = self.kept();
        let list = kept.http1.entry(peer.place()).or_default();
        if list.len() < self.limit {
            list.push(Idle { connection, since: self.sweeps.load(Ordering::Relaxed) });
        }
    }

    /// Forgets an HTTP/2 connection that did not do.
    pub fn drop_http2(&self, peer: &Peer) {
        self.kept().http2.remove(&peer.place());
    }

    /// Closes what nobody has used for a while.
    pub fn sweep(&self) {
        let now = self.sweeps.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.kept();
        kept.http1.retain(|_, list| {
            list.retain(|idle| idle.connection.is_quiet() && now.wrapping_sub(idle.since) < self.age);
            !list.is_empty()
        });
        kept.http2.retain(|_, sender| !sender.is_closed());
    }
}

/// A connection, over TLS where the peer wants it, with the protocol named that will be spoken.
async fn secured(peer: &Peer, is_http2: bool, within: Duration) -> std::io::Result<Stream> {
    let mut stream = connect(peer.address, within).await?;
    if let Some(announcement) = &peer.announce {
        // Less than what a new connection takes at once.
        stream.write_all(&announcement.bytes()).await?;
    }
    let Some(tls) = &peer.tls else { return Ok(Stream::Plain(stream)) };
    let config = tls.config(peer.identity.as_deref(), is_http2).map_err(std::io::Error::other)?;
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, "the endpoint does not shake hands");
    let shaking = TlsConnector::from(config).connect(tls.name.clone(), stream);
    let stream = timeout(within, shaking).await.map_err(|_| late())??;
    Ok(Stream::Tls(Box::new(stream)))
}

async fn shake_http2<S>(stream: S) -> std::io::Result<Http2>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30)).adaptive_window(true);
    let (sender, connection) = builder.handshake(stream).await.map_err(std::io::Error::other)?;
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// # Errors
/// Nobody accepts in time.
pub async fn connect(address: SocketAddr, within: Duration) -> std::io::Result<TcpStream> {
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, "the endpoint does not accept");
    let stream = timeout(within, TcpStream::connect(address)).await.map_err(|_| late())??;
    stream.set_nodelay(true)?;
    Ok(stream)
}
