//! Connections to endpoints, kept by each worker for itself: nothing here is shared between threads.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use super::body::RequestBody;
use super::worker::LocalExecutor;
use crate::policy::BackendProtocol;

pub type Http1 = http1::SendRequest<RequestBody>;
pub type Http2 = http2::SendRequest<RequestBody>;

/// A connection that one request may use now.
pub enum Connection {
    Http1 { sender: Http1, is_reused: bool },
    Http2(Http2),
}

struct Idle {
    sender: Http1,
    since: Instant,
}

#[derive(Default)]
struct Kept {
    http1: HashMap<SocketAddr, Vec<Idle>>,
    http2: HashMap<SocketAddr, Http2>,
}

/// Connections without a request, by endpoint.
pub struct Pool {
    kept: RefCell<Kept>,
    limit: usize,
    age: Duration,
    buffer: usize,
}

impl Pool {
    /// At most `limit` idle connections to one endpoint, none idle for longer than `age`.
    pub fn new(limit: usize, age: Duration, buffer: usize) -> Rc<Self> {
        Rc::new(Pool { kept: RefCell::default(), limit, age, buffer })
    }

    /// A connection to the endpoint: an idle one, or a new one.
    ///
    /// # Errors
    /// It does not accept one in time.
    pub async fn get(
        &self,
        address: SocketAddr,
        protocol: BackendProtocol,
        within: Duration,
    ) -> std::io::Result<Connection> {
        match protocol {
            BackendProtocol::Http1 => {
                if let Some(sender) = self.take(address) {
                    return Ok(Connection::Http1 { sender, is_reused: true });
                }
                let sender = self.open_http1(address, within).await?;
                Ok(Connection::Http1 { sender, is_reused: false })
            }
            BackendProtocol::H2c => {
                let held = self.kept.borrow().http2.get(&address).filter(|held| !held.is_closed()).cloned();
                if let Some(sender) = held {
                    return Ok(Connection::Http2(sender));
                }
                let sender = self.open_http2(address, within).await?;
                self.kept.borrow_mut().http2.insert(address, sender.clone());
                Ok(Connection::Http2(sender))
            }
        }
    }

    /// A new connection, whatever is idle.
    ///
    /// # Errors
    /// As [`Pool::get`].
    pub async fn open_http1(&self, address: SocketAddr, within: Duration) -> std::io::Result<Http1> {
        let stream = connect(address, within).await?;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(self.buffer);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
        // Its errors are those of the request that it carries.
        spawn_local(async move { drop(connection.with_upgrades().await) });
        Ok(sender)
    }

    async fn open_http2(&self, address: SocketAddr, within: Duration) -> std::io::Result<Http2> {
        let stream = connect(address, within).await?;
        let mut builder = http2::Builder::new(LocalExecutor);
        builder.timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30)).adaptive_window(true);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
        spawn_local(async move { drop(connection.await) });
        Ok(sender)
    }

    fn take(&self, address: SocketAddr) -> Option<Http1> {
        let mut kept = self.kept.borrow_mut();
        let list = kept.http1.get_mut(&address)?;
        // The last one that was used is the least likely to be closed. One that is not ready has been closed, or has not come
        // to an end of its last request yet.
        let at = list.iter().rposition(|idle| idle.sender.is_ready())?;
        Some(list.swap_remove(at).sender)
    }

    /// Takes a connection back whose answer is complete.
    pub fn put(&self, address: SocketAddr, sender: Http1) {
        if sender.is_closed() {
            return;
        }
        let mut kept = self.kept.borrow_mut();
        let list = kept.http1.entry(address).or_default();
        if list.len() < self.limit {
            list.push(Idle { sender, since: Instant::now() });
        }
    }

    /// Forgets an HTTP/2 connection that did not do.
    pub fn drop_http2(&self, address: SocketAddr) {
        self.kept.borrow_mut().http2.remove(&address);
    }

    /// Closes what nobody has used for a while.
    pub fn sweep(&self) {
        let (now, mut kept) = (Instant::now(), self.kept.borrow_mut());
        kept.http1.retain(|_, list| {
            list.retain(|idle| !idle.sender.is_closed() && now.duration_since(idle.since) < self.age);
            !list.is_empty()
        });
        kept.http2.retain(|_, sender| !sender.is_closed());
    }
}

async fn connect(address: SocketAddr, within: Duration) -> std::io::Result<TcpStream> {
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, "the endpoint does not accept");
    let stream = timeout(within, TcpStream::connect(address)).await.map_err(|_| late())??;
    stream.set_nodelay(true)?;
    Ok(stream)
}
