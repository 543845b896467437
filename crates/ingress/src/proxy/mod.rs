//! The proxy: client connections in, requests to endpoints out. What a request must look like is decided elsewhere.

mod announce;
mod announced;
mod attempt;
mod balance;
mod body;
mod clients;
mod config;
mod datagrams;
mod entrance;
mod external;
mod facts;
mod forward;
mod handle;
mod http1;
mod hygiene;
mod io;
mod log;
mod metrics;
mod mirror;
mod names;
mod pace;
mod pages;
mod pool;
mod shared;
mod status;
mod stream;
mod trace;
mod upgrade;
mod worker;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::certificates::Certificates;
use crate::error::IngressError;
use crate::swap::Swap;
use crate::table::RouteTable;
pub use config::{Limits, LogFormat, ProxyConfig};
use entrance::Entrance;
pub use entrance::OpenPorts;
use shared::Shared;
use worker::Entry;

/// Clients that wait to be accepted, by each worker.
const BACKLOG: i32 = 4096;

/// The proxy with its sockets bound: clients wait until [`Proxy::run`].
pub struct Proxy {
    shared: Arc<Shared>,
    /// Of each worker.
    entries: Vec<Vec<Entry>>,
    http: Vec<SocketAddr>,
    https: Vec<SocketAddr>,
    status: Option<std::net::TcpListener>,
    token: CancellationToken,
}

impl Proxy {
    /// Binds the sockets. Another process of the same user may hold the same ports: a new proxy takes over from an old one
    /// without a gap.
    ///
    /// # Errors
    /// An address is somebody else's, or TLS cannot be set up.
    pub fn bind(
        config: ProxyConfig,
        routes: Arc<Swap<RouteTable>>,
        certificates: Arc<Swap<Certificates>>,
        status: Option<std::net::TcpListener>,
    ) -> Result<Self, IngressError> {
        let workers = config.workers.max(1);
        let (mut http, mut https) = (config.http.clone(), config.https.clone());
        let mut entries: Vec<Vec<Entry>> = (0..workers).map(|_| Vec::new()).collect();
        for (addresses, is_tls) in [(&mut http, false), (&mut https, true)] {
            for address in addresses {
                for held in &mut entries {
                    let listener =
                        listen(*address).map_err(|source| IngressError::Listen { address: *address, source })?;
                    // The first worker's port is everybody's, where the kernel chose it.
                    *address = listener.local_addr().unwrap_or(*address);
                    held.push(Entry { listener, entrance: Entrance::Ingress { is_tls } });
                }
            }
        }
        let token = CancellationToken::new();
        let shared = Arc::new(Shared::new(config, routes, certificates, token.clone())?);
        Ok(Proxy { shared, entries, http, https, status, token })
    }

    /// Where plain HTTP comes in.
    pub fn http(&self) -> &[SocketAddr] {
        &self.http
    }

    pub fn https(&self) -> &[SocketAddr] {
        &self.https
    }

    /// What `/metrics` shows.
    pub fn metrics(&self) -> impl Fn() -> String + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || metrics::text(&shared)
    }

    /// Opens ports of Gateways, and closes those that are not among them any more.
    pub fn port_opener(&self) -> PortOpener {
        PortOpener(self.shared.clone())
    }

    /// To be set when the first tables are complete.
    pub fn readiness(&self) -> Readiness {
        Readiness(self.shared.clone())
    }

    /// Carries requests until the token is cancelled. When this returns, all of its threads have ended.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub async fn run(self, token: CancellationToken) -> Result<(), IngressError> {
        info!(http = ?self.http, https = ?self.https, "ingress answers");
        let started = Instant::now();
        let own = self.token.clone();
        let mut threads: Vec<JoinHandle<std::io::Result<()>>> = Vec::new();
        for (number, entries) in self.entries.into_iter().enumerate() {
            let (shared, token) = (self.shared.clone(), own.clone());
            let seed = seed(number);
            let thread = std::thread::Builder::new()
                .name(format!("ingress-{number}"))
                .spawn(move || worker::run(shared, entries, seed, started, token))
                .map_err(IngressError::Thread);
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    own.cancel();
                    return Err(error);
                }
            }
        }
        let status = async {
            match self.status.map(tokio_listener) {
                Some(Ok(listener)) => status::serve(listener, self.shared.clone(), own.clone()).await,
                Some(Err(error)) => {
                    warn!(%error, "metrics cannot be listened for");
                    own.cancelled().await;
                }
                None => own.cancelled().await,
            }
        };
        tokio::select! {
            () = status => {}
            () = token.cancelled() => own.cancel(),
        }
        let ended = tokio::task::spawn_blocking(move || {
            for thread in threads {
                match thread.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => warn!(%error, "a worker ended early"),
                    Err(_) => warn!("a worker panicked"),
                }
            }
        });
        ended.await.ok();
        Ok(())
    }
}

/// Says that the proxy has routes.
#[derive(Clone)]
pub struct Readiness(Arc<Shared>);

impl Readiness {
    pub fn set(&self) {
        self.0.ready.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Says which ports of Gateways are open.
#[derive(Clone)]
pub struct PortOpener(Arc<Shared>);

impl PortOpener {
    pub fn open(&self, ports: OpenPorts) {
        self.0.ports.send_replace(Arc::new(ports));
    }
}

/// Only to tell workers apart and draws from each other: no secret depends on it.
fn seed(number: usize) -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_usize(number);
    hasher.finish()
}

fn tokio_listener(listener: std::net::TcpListener) -> std::io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

fn listen(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    let socket = bound(address, Type::STREAM, Protocol::TCP)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn listen_datagrams(address: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    Ok(bound(address, Type::DGRAM, Protocol::UDP)?.into())
}

fn bound(address: SocketAddr, kind: Type, protocol: Protocol) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), Some(protocol))?;
    if address.is_ipv6() {
        // IPv4 has an address of its own.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
