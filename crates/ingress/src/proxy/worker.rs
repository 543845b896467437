//! One thread that carries requests: its own sockets, its own connections to endpoints.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_rustls::rustls::server::Acceptor;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};
use tokio_util::sync::CancellationToken;

use super::announced;
use super::datagrams;
use super::entrance::Entrance;
use super::handle::handle;
use super::io::Io;
use super::log::AccessLog;
use super::pool::Pool;
use super::shared::Shared;
use super::stream;
use super::{listen, listen_datagrams};
use crate::clients::Shown;
use crate::gateway::{Carries, PortTable, TlsWay, Transport};
use crate::swap::Swap;

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
    /// Where it came to.
    pub local: SocketAddr,
    /// The peer's address as a header's value.
    pub address: HeaderValue,
    pub local_port: HeaderValue,
    pub entrance: Entrance,
    /// The name that its handshake asked for, where that decides about routes.
    pub name: Option<Box<str>>,
    /// The Gateway's port that it came to.
    pub gateway_port: Option<u16>,
    pub is_tls: bool,
    /// Its X-Forwarded-* headers are believed.
    pub is_trusted: bool,
    /// It was asked for a certificate, for its route to judge.
    pub is_asked: bool,
    pub shown: Option<Shown>,
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
    pub entrance: Entrance,
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
        let ports = tokio::spawn(follow_ports(worker.clone(), token.clone()));
        while let Some(ended) = loops.join_next().await {
            adopt(&mut connections, ended);
        }
        adopt(&mut connections, ports.await);
        // Those that take longer end with the thread.
        timeout(drain, async { while connections.join_next().await.is_some() {} }).await.ok();
        ticker.await.ok();
        worker.log().flush();
    });
    // A name that is still being asked for holds up nobody.
    runtime.shutdown_background();
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

/// Opens and closes ports of Gateways until the token is cancelled; what is returned are the connections that go on.
async fn follow_ports(worker: Arc<Worker>, token: CancellationToken) -> JoinSet<()> {
    let mut wanted = worker.shared.ports.subscribe();
    let mut open = HashMap::new();
    let (mut loops, mut connections) = (JoinSet::new(), JoinSet::new());
    loop {
        let ports = wanted.borrow_and_update().clone();
        open.retain(
            |place: &(SocketAddr, Transport), (held, token): &mut (Arc<Swap<PortTable>>, CancellationToken)| {
                let stays = ports.get(place).is_some_and(|port| Arc::ptr_eq(port, held));
                if !stays {
                    token.cancel();
                }
                stays
            },
        );
        for (place, port) in ports.iter() {
            if open.contains_key(place) {
                continue;
            }
            let (address, own) = (place.0, token.child_token());
            let opened = match place.1 {
                Transport::Tcp => listen(address).map(|listener| {
                    let entry = Entry { listener, entrance: Entrance::Gateway(port.clone()) };
                    loops.spawn(accept(worker.clone(), entry, own.clone()));
                }),
                Transport::Udp => listen_datagrams(address).map(|socket| {
                    let carried = datagrams::carry(worker.clone(), socket, port.clone(), own.clone());
                    loops.spawn(async move {
                        carried.await;
                        JoinSet::new()
                    });
                }),
            };
            match opened {
                Ok(()) => drop(open.insert(*place, (port.clone(), own))),
                Err(error) => tracing::warn!(%error, %address, "a port of a Gateway is not open here"),
            }
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { break },
            Some(ended) = loops.join_next() => adopt(&mut connections, ended),
            Some(_) = connections.join_next() => {}
            () = token.cancelled() => break,
        }
    }
    while let Some(ended) = loops.join_next().await {
        adopt(&mut connections, ended);
    }
    connections
}

/// Connections of a port that is closed go on.
fn adopt(connections: &mut JoinSet<()>, ended: Result<JoinSet<()>, tokio::task::JoinError>) {
    if let Ok(mut held) = ended {
        connections.spawn(async move { while held.join_next().await.is_some() {} });
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
    let entrance = entry.entrance;
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
                let (worker, server, entrance, token) =
                    (worker.clone(), server.clone(), entrance.clone(), token.clone());
                connections.spawn(async move {
                    let _open = open;
                    serve(worker, server, entrance, stream, peer, token).await;
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
    entrance: Entrance,
    mut stream: TcpStream,
    mut peer: SocketAddr,
    token: CancellationToken,
) {
    if stream.set_nodelay(true).is_err() {
        // The client has gone already.
        return;
    }
    let Ok(local) = stream.local_addr() else { return };
    let config = &worker.shared.config;
    if config.announcers.iter().any(|range| range.contains(&peer.ip().to_canonical())) {
        match timeout(config.limits.head_timeout, announced::read(&mut stream)).await {
            Ok(Ok(said)) => peer = said.unwrap_or(peer),
            // Nobody knows who asks: nobody is served.
            Ok(Err(_)) | Err(_) => {
                worker.shared.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
    let table = match &entrance {
        Entrance::Ingress { .. } => None,
        Entrance::Gateway(port) => Some(port.load()),
    };
    let is_tls = match (&entrance, &table) {
        (Entrance::Ingress { is_tls }, _) => *is_tls,
        (Entrance::Gateway(_), table) => table.as_ref().is_some_and(|table| matches!(table.carries, Carries::Tls(_))),
    };
    let ip = peer.ip().to_canonical();
    let text = |text: String| HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""));
    let gateway_port = table.as_ref().map(|table| table.number);
    let client = Client {
        peer: SocketAddr::new(ip, peer.port()),
        local,
        address: text(ip.to_string()),
        local_port: text(gateway_port.unwrap_or(local.port()).to_string()),
        entrance,
        name: None,
        gateway_port,
        is_tls,
        is_trusted: worker.shared.config.trusted.iter().any(|range| range.contains(&ip)),
        is_asked: false,
        shown: None,
    };
    match table.as_ref().map(|table| &table.carries) {
        // The name is read first only where somebody wants that.
        None if is_tls && worker.shared.routes.load().passes_any() => {
            let Some((stream, name)) = within_patience(&worker, stream::hello(stream)).await else { return };
            let passing = worker.shared.routes.load().passes(&name).cloned();
            match passing {
                Some(route) => stream::carry(&worker, &route, stream).await,
                None => end_tls(worker, &server, client, stream, token).await,
            }
        }
        None if is_tls => end_tls(worker, &server, client, stream, token).await,
        None | Some(Carries::Http(_)) => {
            drop(table);
            carry(worker, &server, Arc::new(client), Io::new(stream), token).await;
        }
        Some(Carries::Tls(_)) => {
            if let Some(table) = table {
                serve_tls(worker, &server, client, table, stream, token).await;
            }
        }
        Some(Carries::Tcp(Some(route))) => {
            let route = route.clone();
            drop(table);
            stream::carry(&worker, &route, stream).await;
        }
        Some(Carries::Tcp(None) | Carries::Udp(_)) => {}
    }
}

/// Takes the TLS off a connection for Ingresses.
async fn end_tls<S>(
    worker: Arc<Worker>,
    server: &auto::Builder<TokioExecutor>,
    client: Client,
    stream: S,
    token: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if worker.shared.routes.load().asks_anybody() {
        return ask_client(worker, server, client, stream, token).await;
    }
    let acceptor = TlsAcceptor::from(worker.shared.tls.clone());
    if let Some(stream) = within_patience(&worker, acceptor.accept(stream)).await {
        carry(worker, server, Arc::new(client), TokioIo::new(stream), token).await;
    }
}

/// The name of the handshake decides whether the client is asked for a certificate.
async fn ask_client<S>(
    worker: Arc<Worker>,
    server: &auto::Builder<TokioExecutor>,
    mut client: Client,
    stream: S,
    token: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shared = worker.shared.clone();
    let shaking = async {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let name = start.client_hello().server_name().unwrap_or_default().to_ascii_lowercase();
        let is_asked = shared.routes.load().asks(&name);
        let config = if is_asked { &shared.asking_tls } else { &shared.tls };
        Ok((start.into_stream(config.clone()).await?, is_asked))
    };
    let Some((stream, is_asked)) = within_patience(&worker, shaking).await else { return };
    client.is_asked = is_asked;
    client.shown = Shown::of(stream.get_ref().1.peer_certificates());
    carry(worker, server, Arc::new(client), TokioIo::new(stream), token).await;
}

/// The name of the handshake decides what becomes of the connection.
async fn serve_tls(
    worker: Arc<Worker>,
    server: &auto::Builder<TokioExecutor>,
    mut client: Client,
    table: Arc<PortTable>,
    stream: TcpStream,
    token: CancellationToken,
) {
    let Some((stream, name)) = within_patience(&worker, stream::hello(stream)).await else { return };
    let Carries::Tls(tls) = &table.carries else { return };
    let (way, https, streams) = (tls.ways.find(&name).cloned(), tls.https_config.clone(), tls.stream_config.clone());
    // Whoever stays for long does not keep what has been replaced meanwhile.
    drop(table);
    match way {
        None => drop(worker.shared.handshakes_failed.fetch_add(1, Ordering::Relaxed)),
        Some(TlsWay::Passthrough(route)) => stream::carry(&worker, &route, stream).await,
        Some(TlsWay::Terminate(route)) => {
            let acceptor = TlsAcceptor::from(streams);
            if let Some(stream) = within_patience(&worker, acceptor.accept(stream)).await {
                stream::carry(&worker, &route, stream).await;
            }
        }
        Some(TlsWay::Https) => {
            client.name = Some(name.into());
            let acceptor = TlsAcceptor::from(https);
            if let Some(stream) = within_patience(&worker, acceptor.accept(stream)).await {
                carry(worker, server, Arc::new(client), TokioIo::new(stream), token).await;
            }
        }
    }
}

/// A handshake that fails, or takes too long, is counted.
async fn within_patience<T>(worker: &Worker, handshake: impl Future<Output = std::io::Result<T>>) -> Option<T> {
    match timeout(worker.shared.config.limits.handshake_timeout, handshake).await {
        Ok(Ok(done)) => Some(done),
        Ok(Err(_)) | Err(_) => {
            worker.shared.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            None
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
