//! What all workers share: the tables they read, and what they count.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::ServerConfig;
use tokio_util::sync::CancellationToken;

use super::config::ProxyConfig;
use crate::certificates::{Certificates, Resolver};
use crate::crypto;
use crate::error::IngressError;
use crate::swap::Swap;
use crate::table::RouteTable;

pub struct Shared {
    pub config: ProxyConfig,
    pub routes: Arc<Swap<RouteTable>>,
    pub tls: Arc<ServerConfig>,
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
        Ok(Shared {
            config,
            routes,
            tls: tls(certificates)?,
            open: AtomicUsize::new(0),
            closed: Notify::new(),
            accepted: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            unrouted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            token,
        })
    }

    /// The first tables are complete.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}

/// TLS 1.2 and 1.3, with tickets so that a client that comes again need not shake hands in full, on whichever worker.
fn tls(certificates: Arc<Swap<Certificates>>) -> Result<Arc<ServerConfig>, IngressError> {
    let wrong = |error: tokio_rustls::rustls::Error| IngressError::Tls(error.to_string());
    let mut config = ServerConfig::builder_with_provider(crypto::provider())
        .with_safe_default_protocol_versions()
        .map_err(wrong)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Resolver(certificates)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ignore_client_order = true;
    // One is what a client needs that comes again; each costs two draws of random numbers and an encryption.
    config.send_tls13_tickets = 1;
    config.ticketer = ring::Ticketer::new().map_err(wrong)?;
    Ok(Arc::new(config))
}
