//! Why the proxy cannot start.

use std::net::SocketAddr;

#[derive(Debug, thiserror::Error)]
pub enum IngressError {
    #[error("listen on {address}: {source}; is something else there?")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("make the fallback certificate: {0}")]
    Fallback(String),
    #[error("set up TLS: {0}")]
    Tls(String),
    #[error("start a worker thread: {0}; raise the limit of threads")]
    Thread(std::io::Error),
}
