//! What can keep cluster DNS from starting.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

#[derive(Debug, Error)]
pub enum DnsError {
    #[error("{zone:?} is not a DNS zone ({reason}); give one like cluster.local")]
    Zone { zone: String, reason: String },
    #[error("cannot listen for DNS on {address}: {source}; look with `ss -lnp` who holds it")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot use a socket that was handed over for DNS: {0}")]
    Socket(io::Error),
    #[error("cannot read the upstream servers from {path}: {source}; name them in the configuration instead")]
    ResolvConf { path: PathBuf, source: io::Error },
}
