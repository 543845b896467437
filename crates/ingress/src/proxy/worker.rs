//! One thread that carries requests: its own sockets, its own connections to endpoints.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::handle::handle;
use super::io::Io;
use super::log::AccessLog;
use super::pool::Pool;
use super::shared::Shared;

/// How often idle connections are looked through and log lines written.
const TICK: Duration = Duration::from_secs(1);
/// After an error of accepting, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// What all requests of a thread share.
pub struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Arc<Pool>,
    log: Mutex<AccessLog>,
    random: AtomicU64,
    started: Instant,
}

/// What the requests of one client connection share.
pub struct Client {
    pub peer: SocketAddr,
    /// The peer's address as a header's value.
    pub address: HeaderValue,
    pub local_port: HeaderValue,
    pub is_tls: bool,
    /// Its X-Forwarded-* headers are believed.
    pub is_trusted: bool,
}

impl Worker {
    /// Only one thread writes: it never waits for the lock.
    pub fn log(&self) -> MutexGuard<'_, AccessLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that is as likely as any other. Not for secrets.
    pub fn random(&self) -> u64 {
        // xorshift64*
        let mut x = self.random.load(Ordering::Relaxed);
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.random.store(x, Ordering::Relaxed);
        x.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn milliseconds(&self) -> u64 {
        super::balance::milliseconds(self.started.elapsed()) + 1
    }
}

/// A socket that clients come to.
pub struct Entry {
    pub listener: std::net::TcpListener,
    pub is_tls: bool,
}

/// Carries requests until the token is cancelled and what was under way has ended, or took too long.
pub fn run(
    shared: Arc<Shared>,
    entries: Vec<Entry>,
    seed: u64,
    started: Instant,
    token: CancellationToken,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let limits = shared.config.limits;
    let worker = Arc::new(Worker {
        pool: Pool::new(limits.idle_upstream, ticks(limits.idle_upstream_timeout)),
        log: Mutex::new(AccessLog::new(shared.config.log)),
        random: AtomicU64::new(seed | 1),
        started,
        shared,
    });
    let drain = worker.shared.config.drain;
    runtime.block_on(async move {
        let mut loops = JoinSet::new();
        for entry in entries {
            loops.spawn(accept(worker.clone(), entry, token.clone()));
        }
        let ticker = tokio::spawn(tick(worker.clone(), token.clone()));
        let mut connections = JoinSet::new();
        while let Some(ended) = loops.join_next().await {
            if let Ok(mut held) = ended {
                connections.spawn(async move { while held.join_next().await.is_some() {} });
            }
        }
        // Those that take longer end with the thread.
        timeout(drain, async { while connections.join_next().await.is_some() {} }).await.ok();
        ticker.await.ok();
        worker.log().flush();
    });
    Ok(())
}

/// A time in ticks.
fn ticks(time: Duration) -> u32 {
    u32::try_from(time.as_secs() / TICK.as_secs()).unwrap_or(u32::MAX)
}

async fn tick(worker: Arc<Worker>, token: CancellationToken) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = token.cancelled() => return,
        }
        worker.pool.sweep();
        worker.log().flush();
    }
}

/// Accepts until the token is cancelled; what is returned are the connections that go on.
async fn accept(worker: Arc<Worker>, entry: Entry, token: CancellationToken) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    let listener = match TcpListener::from_std(entry.listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "a socket cannot be listened on");
            return connections;
        }
    };
    let server = Arc::new(builder(&worker.shared.config.limits));
    let acceptor = entry.is_tls.then(|| TlsAcceptor::from(worker.shared.tls.clone()));
    loop {
        let shared = &worker.shared;
        let closed = shared.closed.notified();
        tokio::pin!(closed);
        // Before the count is read, so that no end of a connection is missed in between.
        closed.as_mut().enable();
        let has_room = shared.open.load(Ordering::Relaxed) < shared.config.limits.connections;
        let accepted = tokio::select! {
            accepted = listener.accept(), if has_room => accepted,
            Some(_) = connections.join_next() => continue,
            () = closed, if !has_room => continue,
            () = token.cancelled() => return connections,
        };
        match accepted {
            Ok((stream, peer)) => {
                let open = Open::new(shared.clone());
                let (worker, server, acceptor, token) =
                    (worker.clone(), server.clone(), acceptor.clone(), token.clone());
                connections.spawn(async move {
                    let _open = open;
                    serve(worker, server, acceptor, stream, peer, token).await;
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Counts a client connection while it is there.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: Arc<Shared>) -> Self {
        shared.open.fetch_add(1, Ordering::Relaxed);
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        Open(shared)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.closed.notify_waiters();
    }
}

fn builder(limits: &super::config::Limits) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    let head = u32::try_from(limits.head).unwrap_or(u32::MAX);
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(limits.head.max(8192));
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(head)
        .max_send_buf_size(64 * 1024)
        .keep_alive_interval(limits.head_timeout)
        .keep_alive_timeout(limits.head_timeout);
    server
}

async fn serve(
    worker: Arc<Worker>,
    server: Arc<auto::Builder<TokioExecutor>>,
    acceptor: Option<TlsAcceptor>,
    stream: TcpStream,
    peer: SocketAddr,
    token: CancellationToken,
) {
    if stream.set_nodelay(true).is_err() {
        // The client has gone already.
        return;
    }
    let Ok(local) = stream.local_addr() else { return };
    let ip = peer.ip().to_canonical();
    let text = |text: String| HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""));
    let client = Arc::new(Client {
        peer: SocketAddr::new(ip, peer.port()),
        address: text(ip.to_string()),
        local_port: text(local.port().to_string()),
        is_tls: acceptor.is_some(),
        is_trusted: worker.shared.config.trusted.iter().any(|range| range.contains(&ip)),
    });
    match acceptor {
        None => carry(worker, &server, client, Io::new(stream), token).await,
        Some(acceptor) => {
            let patience = worker.shared.config.limits.handshake_timeout;
            match timeout(patience, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => carry(worker, &server, client, TokioIo::new(stream), token).await,
                Ok(Err(_)) | Err(_) => drop(worker.shared.handshakes_failed.fetch_add(1, Ordering::Relaxed)),
            }
        }
    }
}

async fn carry<S>(
    worker: Arc<Worker>,
    server: &auto::Builder<TokioExecutor>,
    client: Arc<Client>,
    stream: S,
    token: CancellationToken,
) where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let service = service_fn(move |request| handle(worker.clone(), client.clone(), request));
    let connection = server.serve_connection_with_upgrades(stream, service);
    tokio::pin!(connection);
    let cancelled = tokio::select! {
        // What a client breaks off is its own affair.
        _ = connection.as_mut() => false,
        () = token.cancelled() => true,
    };
    if cancelled {
        connection.as_mut().graceful_shutdown();
        connection.await.ok();
    }
}
