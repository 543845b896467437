//! Binds the sockets of cluster DNS and runs its loops.

use std::net::SocketAddr;
use std::sync::{Arc, RwLock};

use hickory_proto::rr::RecordType;
use services::ServiceTable;
use tokio::net::{TcpListener, UdpSocket};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::answer::Answer;
use crate::chain::{Resolver, Source};
use crate::config::{DnsConfig, Listen, Upstreams};
use crate::error::DnsError;
use crate::forward::Forward;
use crate::metrics::{self, Metrics, Way};
use crate::resolv_conf::parse_resolv_conf;
use crate::reverse::ReverseZones;
use crate::zone::Zone;
use crate::{tcp, udp};

/// Where every question is received and counted.
pub struct Desk {
    pub resolver: Arc<Resolver>,
    metrics: Arc<Metrics>,
}

/// A question that came and waits for its answer.
pub struct Arrival {
    pub at: Instant,
    way: Way,
    record_type: Option<RecordType>,
}

impl Desk {
    pub fn arrive(&self, way: Way, record_type: Option<RecordType>) -> Arrival {
        Arrival { at: Instant::now(), way, record_type }
    }

    pub fn leave(&self, arrival: Arrival, answer: &Answer, source: Option<Source>) {
        self.metrics.count(arrival.way, arrival.record_type, answer.code, source, arrival.at.elapsed());
    }
}

/// Cluster DNS with its sockets bound: clients' questions wait until [`Server::run`].
pub struct Server {
    desk: Arc<Desk>,
    sockets: Vec<(UdpSocket, TcpListener)>,
    metrics: Option<TcpListener>,
}

impl Server {
    /// Binds everything that the configuration names. The table's own `is_synced` decides when answers begin.
    pub async fn bind(config: DnsConfig, table: Arc<RwLock<ServiceTable>>) -> Result<Self, DnsError> {
        let zone = Zone::new(&config.zone, config.ttl, config.pods)?;
        let reverse = ReverseZones::new(zone.origin().clone(), config.ttl, config.reverse);
        let forward = Forward::new(upstream_servers(config.upstreams).await?, config.sockets);
        let mut sockets = Vec::new();
        for listen in config.listen {
            sockets.push(bind(listen).await?);
        }
        let metrics = config.metrics.map(tokio_listener).transpose()?;
        let label = match sockets.first().map(|(udp, _)| udp.local_addr()) {
            Some(Ok(address)) => format!("dns://:{}", address.port()),
            _ => "dns://".to_owned(),
        };
        let desk = Desk {
            resolver: Arc::new(Resolver::new(zone, reverse, table, forward)),
            metrics: Arc::new(Metrics::new(label)),
        };
        Ok(Server { desk: Arc::new(desk), sockets, metrics })
    }

    /// The bound addresses, where the configuration left the port to the kernel.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|(udp, _)| udp.local_addr().ok()).collect()
    }

    /// Answers until the token is cancelled; every task has ended when this returns.
    pub async fn run(self, token: CancellationToken) {
        info!(addresses = ?self.addresses(), "cluster DNS answers");
        let loops = TaskTracker::new();
        for (udp_socket, tcp_listener) in self.sockets {
            loops.spawn(udp::serve(udp_socket, self.desk.clone(), token.clone()));
            loops.spawn(tcp::serve(tcp_listener, self.desk.clone(), token.clone()));
        }
        if let Some(listener) = self.metrics {
            let (counts, resolver) = (self.desk.metrics.clone(), self.desk.resolver.clone());
            loops.spawn(metrics::serve(listener, counts, resolver, token.clone()));
        }
        loops.close();
        // A loop that panicked must not end the others: stay until the token says so.
        token.cancelled().await;
        loops.wait().await;
    }
}

/// Binds and answers until the token is cancelled.
pub async fn run(
    config: DnsConfig,
    table: Arc<RwLock<ServiceTable>>,
    token: CancellationToken,
) -> Result<(), DnsError> {
    Server::bind(config, table).await?.run(token).await;
    Ok(())
}

async fn upstream_servers(upstreams: Upstreams) -> Result<Vec<SocketAddr>, DnsError> {
    match upstreams {
        Upstreams::Servers(servers) => Ok(servers),
        Upstreams::ResolvConf(path) => match tokio::fs::read_to_string(&path).await {
            Ok(text) => Ok(parse_resolv_conf(&text)),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
                info!(path = %path.display(), "there is no such file: names outside the cluster are refused");
                Ok(Vec::new())
            }
            Err(source) => Err(DnsError::ResolvConf { path, source }),
        },
    }
}

async fn bind(listen: Listen) -> Result<(UdpSocket, TcpListener), DnsError> {
    match listen {
        Listen::Address(address) => {
            let taken = |source| DnsError::Listen { address, source };
            let udp = UdpSocket::bind(address).await.map_err(taken)?;
            // With port 0 the kernel has chosen for UDP, and TCP follows.
            let address = udp.local_addr().map_err(taken)?;
            let tcp = TcpListener::bind(address).await.map_err(taken)?;
            Ok((udp, tcp))
        }
        Listen::Bound { udp, tcp } => {
            udp.set_nonblocking(true).map_err(DnsError::Socket)?;
            Ok((UdpSocket::from_std(udp).map_err(DnsError::Socket)?, tokio_listener(tcp)?))
        }
    }
}

fn tokio_listener(listener: std::net::TcpListener) -> Result<TcpListener, DnsError> {
    listener.set_nonblocking(true).map_err(DnsError::Socket)?;
    TcpListener::from_std(listener).map_err(DnsError::Socket)
}
