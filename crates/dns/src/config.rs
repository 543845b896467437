//! What cluster DNS is told at start.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::rustls::ClientConfig;

use crate::hosts::Hosts;
use crate::objects::Objects;
use crate::upstream::UpstreamServer;

/// Everything that [`crate::Server::bind`] needs besides the table.
pub struct DnsConfig {
    /// The cluster's domain, such as `cluster.local`.
    pub zone: String,
    /// Seconds that clients may keep an answer from the table.
    pub ttl: u32,
    pub pods: PodMode,
    /// Service and pod ranges: an address in them that the table does not know has no name, and nobody else is asked.
    pub reverse: Vec<IpNet>,
    pub listen: Vec<Listen>,
    pub upstreams: Upstreams,
    /// Domains that other servers know, and these servers.
    pub stubs: Vec<(String, Vec<UpstreamServer>)>,
    pub hosts: Hosts,
    /// Addresses of pods, whose search path is walked for them; empty: for nobody.
    pub search_clients: Vec<IpNet>,
    /// The node's own search domains, which pods have behind the cluster's.
    pub search_domains: Vec<String>,
    /// Whom upstream servers over TLS have to be known to.
    pub tls: Option<Arc<ClientConfig>>,
    /// Namespaces and pods, if somebody follows them.
    pub objects: Arc<Objects>,
    /// Since when the API does not answer; `None` inside while it does.
    pub outage: Option<watch::Receiver<Option<Instant>>>,
    /// A log line for every question.
    pub log: bool,
    /// Makes the sockets to upstream servers, maybe in another network namespace.
    pub sockets: Arc<dyn SocketMaker>,
    /// Where Prometheus scrapes; also answers `/health` and `/ready`.
    pub metrics: Option<TcpListener>,
}

impl DnsConfig {
    /// The defaults of a cluster: zone `cluster.local`, 5 seconds, no pod names, upstreams of the host.
    pub fn new(listen: Vec<Listen>) -> Self {
        DnsConfig {
            zone: "cluster.local".to_owned(),
            ttl: 5,
            pods: PodMode::Disabled,
            reverse: Vec::new(),
            listen,
            upstreams: Upstreams::ResolvConf(PathBuf::from("/etc/resolv.conf")),
            stubs: Vec::new(),
            hosts: Hosts::default(),
            search_clients: Vec::new(),
            search_domains: Vec::new(),
            tls: None,
            objects: Arc::default(),
            outage: None,
            log: false,
            sockets: Arc::new(HostSockets),
            metrics: None,
        }
    }
}

/// Where questions arrive, over UDP and TCP.
pub enum Listen {
    Address(SocketAddr),
    /// Sockets made elsewhere, for example in a node's network namespace.
    Bound {
        udp: UdpSocket,
        tcp: TcpListener,
    },
}

/// Whether `10-244-1-5.NAMESPACE.pod.ZONE` has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PodMode {
    #[default]
    Disabled,
    /// The name's own address is echoed, whether or not there is such a pod.
    Insecure,
    /// Only the address of a pod of that namespace is.
    Verified,
}

/// Who answers names that are not the cluster's.
#[derive(Debug, Clone)]
pub enum Upstreams {
    Servers(Vec<UpstreamServer>),
    /// Read once at start. A file that does not exist names no server.
    ResolvConf(PathBuf),
}

/// Makes sockets that can reach an upstream server.
pub trait SocketMaker: Send + Sync {
    /// A socket of the server's family, not yet connected.
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket>;
    /// A socket of the server's family, not yet connected.
    fn tcp(&self, server: SocketAddr) -> io::Result<TcpSocket>;
}

/// Sockets in the caller's own network namespace.
pub struct HostSockets;

impl SocketMaker for HostSockets {
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        match server {
            SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
        }
    }

    fn tcp(&self, server: SocketAddr) -> io::Result<TcpSocket> {
        match server {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }
    }
}
