//! What the proxy is told at start.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

/// Everything that [`crate::Proxy`] needs besides its tables.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Where plain HTTP comes in, HTTP/1.1 and HTTP/2 on one port.
    pub http: Vec<SocketAddr>,
    /// The same over TLS.
    pub https: Vec<SocketAddr>,
    /// Threads that carry requests, each with sockets and connections of its own.
    pub workers: usize,
    pub limits: Limits,
    pub log: LogFormat,
    /// Whose X-Forwarded-* headers are believed and added to; everybody else's are replaced.
    pub trusted: Vec<IpNet>,
    /// Load balancers that say by the PROXY protocol who their client is, and must.
    pub announcers: Vec<IpNet>,
    /// Backends of the kind ExternalName lead where their name does.
    pub external_names: bool,
    /// Requests without a trace (W3C Trace Context) get one, where their route does not say otherwise.
    pub trace: bool,
    /// How long requests under way may take to end when the proxy is told to.
    pub drain: Duration,
}

impl ProxyConfig {
    pub fn new(http: Vec<SocketAddr>, https: Vec<SocketAddr>) -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        ProxyConfig {
            http,
            https,
            workers,
            limits: Limits::default(),
            log: LogFormat::Off,
            trusted: Vec::new(),
            announcers: Vec::new(),
            external_names: true,
            trace: false,
            drain: Duration::from_secs(4),
        }
    }
}

/// Bounds on what clients can make the proxy hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Client connections of all workers. Others wait to be accepted.
    pub connections: usize,
    /// Bytes of a request's head.
    pub head: usize,
    /// For a request's head to be complete, and for a connection without a request to be closed.
    pub head_timeout: Duration,
    pub handshake_timeout: Duration,
    /// Between two parts of a request's body.
    pub body_timeout: Duration,
    /// Requests at once on one HTTP/2 connection.
    pub streams: u32,
    /// Idle connections kept to one endpoint, by each worker.
    pub idle_upstream: usize,
    /// How long those are kept.
    pub idle_upstream_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 16_384,
            head: 64 * 1024,
            head_timeout: Duration::from_secs(60),
            handshake_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            streams: 128,
            idle_upstream: 128,
            idle_upstream_timeout: Duration::from_secs(50),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Off,
    /// As nginx's combined format, with the upstream behind.
    Text,
    Json,
}
