//! What all workers share: the tables they read, and what they count.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{Notify, watch};
use tokio_rustls::rustls::server::ServerConfig;
use tokio_util::sync::CancellationToken;

use super::config::ProxyConfig;
use super::entrance::OpenPorts;
use super::names::Names;
use crate::certificates::{Certificates, Resolver};
use crate::clients::AnyCertificate;
use crate::error::IngressError;
use crate::swap::Swap;
use crate::table::RouteTable;
use crate::tls;

pub struct Shared {
    pub config: ProxyConfig,
    pub routes: Arc<Swap<RouteTable>>,
    pub tls: Arc<ServerConfig>,
    /// For names whose clients are asked for a certificate.
    pub asking_tls: Arc<ServerConfig>,
    /// Where Gateways' clients come in.
    pub ports: watch::Sender<Arc<OpenPorts>>,
    /// Client connections that are there.
    pub open: AtomicUsize,
    /// Rung when there is room again.
    pub closed: Notify,
    pub accepted: AtomicU64,
    pub handshakes_failed: AtomicU64,
    /// Requests that no route was found for.
    pub unrouted: AtomicU64,
    /// Requests that two readers could read differently, or that ask for what is not served.
    pub refused: AtomicU64,
    /// Names outside the cluster.
    pub names: Names,
    pub ready: AtomicBool,
    /// Cancelled when the proxy is to end.
    pub token: CancellationToken,
}

impl Shared {
    pub fn new(
        config: ProxyConfig,
        routes: Arc<Swap<RouteTable>>,
        certificates: Arc<Swap<Certificates>>,
        token: CancellationToken,
    ) -> Result<Self, IngressError> {
        let server = |clients| tls::server(Arc::new(Resolver(certificates.clone())), clients, &[b"h2", b"http/1.1"]);
        Ok(Shared {
            config,
            routes,
            tls: server(None)?,
            asking_tls: server(Some(AnyCertificate::new()))?,
            ports: watch::Sender::default(),
            open: AtomicUsize::new(0),
            closed: Notify::new(),
            accepted: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            unrouted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            names: Names::default(),
            ready: AtomicBool::new(false),
            token,
        })
    }

    /// The first tables are complete.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}
