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
    #[error("line {line} of the hosts entries: {reason}; write an address and its names")]
    Hosts { line: usize, reason: String },
    #[error(
        "{text:?} is not an upstream server ({reason}); write 192.0.2.1, [2001:db8::1]:5353, tcp://192.0.2.1 or \
         tls://192.0.2.1#name.example"
    )]
    Upstream { text: String, reason: String },
    #[error(
        "{text:?} is not a stub domain ({reason}); write corp.example=192.0.2.1 with one server or several, by comma"
    )]
    Stub { text: String, reason: String },
    #[error("{server} is reached over TLS, and there is no certificate authority to trust; give one")]
    NoAuthorities { server: SocketAddr },
}
