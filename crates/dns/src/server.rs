//! Binds the sockets of cluster DNS and runs its loops.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use hickory_proto::rr::Name;
use services::Changes;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::chain::{Parts, Resolver, Step};
use crate::config::{DnsConfig, Listen, SocketMaker, Upstreams};
use crate::counts::{CODES, Counts, Outcome, Way, code_index};
use crate::error::DnsError;
use crate::forward::{Forward, Group};
use crate::metrics::{self, Metrics};
use crate::names::{Compiler, Feed};
use crate::resolv_conf::parse_resolv_conf;
use crate::reverse::ReverseZones;
use crate::search::SearchPath;
use crate::upstream::{Upstream, UpstreamServer};
use crate::wire::{Incoming, decode};
use crate::zone::Zone;
use crate::{message, tcp, udp};

/// How often the kernel may choose a port that is free for UDP only.
const PORT_TRIES: usize = 16;

/// Where every question is received and counted.
pub struct Desk {
    pub resolver: Arc<Resolver>,
    metrics: Metrics,
    log: bool,
}

/// A question that came and waits for its answer.
pub struct Arrival {
    pub at: Instant,
    pub way: Way,
    pub peer: SocketAddr,
    pub size: usize,
}

impl Desk {
    /// Takes note of a question that is answered with these bytes.
    pub fn leave(&self, arrival: &Arrival, packet: &[u8], step: &Step, reply: &[u8]) {
        let Step::Replied { kind, code, source } = *step else { return };
        let outcome = Outcome {
            way: arrival.way,
            kind,
            code,
            source,
            took: arrival.at.elapsed(),
            request_size: arrival.size,
            response_size: reply.len(),
        };
        self.metrics.counts.add(&outcome);
        if self.log {
            log(arrival, packet, &outcome);
        }
    }
}

/// One line a question, as CoreDNS's log plugin writes it.
fn log(arrival: &Arrival, packet: &[u8], outcome: &Outcome) {
    let Incoming::Ask(ask) = decode(packet) else {
        let code = CODES[code_index(outcome.code)];
        return info!(target: "dns::log", "{} - {} {code}", arrival.peer, arrival.way.protocol());
    };
    let Some(question) = message::question(&ask) else { return };
    let (edns, size) = (ask.edns.is_some_and(|edns| edns.dnssec_ok), ask.udp_limit());
    info!(
        target: "dns::log",
        "{} - {} \"{} IN {} {} {} {edns} {size}\" {} {} {:.6}s",
        arrival.peer,
        ask.id(),
        question.record_type,
        question.name,
        arrival.way.protocol(),
        outcome.request_size,
        CODES[code_index(outcome.code)],
        outcome.response_size,
        outcome.took.as_secs_f64(),
    );
}

/// Cluster DNS with its sockets bound: clients' questions wait until [`Server::run`].
pub struct Server {
    desk: Arc<Desk>,
    compiler: Compiler,
    changes: broadcast::Receiver<Arc<Changes>>,
    sockets: Vec<(UdpSocket, TcpListener)>,
    metrics: Option<TcpListener>,
}

impl Server {
    /// Binds everything that the configuration names. The table's own `is_synced` decides when answers begin.
    pub async fn bind(config: DnsConfig, feed: Feed) -> Result<Self, DnsError> {
        let zone = Zone::new(&config.zone, config.ttl, config.pods)?;
        let reverse = ReverseZones::new(zone.origin().clone(), config.ttl, config.reverse);
        let servers = upstream_servers(config.upstreams).await?;
        let domains = config.search_domains.iter().filter_map(|domain| absolute(domain)).collect();
        let group = |servers: Vec<UpstreamServer>| -> Result<Group, DnsError> {
            let sockets: &Arc<dyn SocketMaker> = &config.sockets;
            let servers = servers.into_iter().map(|one| Upstream::new(one, sockets.clone(), config.tls.as_ref()));
            Ok(Group::new(servers.collect::<Result<_, _>>()?))
        };
        let mut stubs = Vec::new();
        for (domain, servers) in config.stubs {
            let wrong = |reason: String| DnsError::Stub { text: domain.clone(), reason };
            let name = absolute(&domain).ok_or_else(|| wrong("it is no DNS name".to_owned()))?;
            let own = absolute(&config.zone).ok_or_else(|| wrong("the cluster's zone is none".to_owned()))?;
            if own.zone_of(&name) {
                return Err(wrong(format!("{} is answered here; no other server is asked about it", config.zone)));
            }
            stubs.push((name, group(servers)?));
        }
        let forward = Forward::new(stubs, group(servers)?);
        let mut sockets = Vec::new();
        for listen in config.listen {
            sockets.push(bind(listen).await?);
        }
        let metrics = config.metrics.map(tokio_listener).transpose()?;
        let server = match sockets.first().map(|(udp, _)| udp.local_addr()) {
            Some(Ok(address)) => format!("dns://:{}", address.port()),
            _ => "dns://".to_owned(),
        };
        let (resolver, compiler) = Resolver::new(Parts {
            zone,
            reverse,
            table: feed.table,
            objects: config.objects,
            hosts: config.hosts,
            search: SearchPath { clients: config.search_clients, domains },
            forward,
        });
        let metrics_text = Metrics { server, counts: Counts::default(), outage: config.outage };
        let desk = Arc::new(Desk { resolver, metrics: metrics_text, log: config.log });
        Ok(Server { desk, compiler, changes: feed.changes, sockets, metrics })
    }

    /// The bound addresses, where the configuration left the port to the kernel.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|(udp, _)| udp.local_addr().ok()).collect()
    }

    /// Answers until the token is cancelled; every task has ended when this returns.
    pub async fn run(self, token: CancellationToken) {
        info!(addresses = ?self.addresses(), "cluster DNS answers");
        let loops = TaskTracker::new();
        loops.spawn(self.compiler.follow(self.changes, token.clone()));
        for (udp_socket, tcp_listener) in self.sockets {
            loops.spawn(udp::serve(udp_socket, self.desk.clone(), token.clone()));
            loops.spawn(tcp::serve(tcp_listener, self.desk.clone(), token.clone()));
        }
        if let Some(listener) = self.metrics {
            let desk = self.desk.clone();
            let text = move || desk.metrics.text(&desk.resolver);
            loops.spawn(metrics::serve(listener, text, self.desk.resolver.clone(), token.clone()));
        }
        loops.close();
        // A loop that panicked must not end the others: stay until the token says so.
        self.desk.resolver.drain(&token).await;
        loops.wait().await;
    }
}

async fn upstream_servers(upstreams: Upstreams) -> Result<Vec<UpstreamServer>, DnsError> {
    let path = match upstreams {
        Upstreams::Servers(servers) => return Ok(servers),
        Upstreams::ResolvConf(path) => path,
    };
    match tokio::fs::read_to_string(&path).await {
        Ok(text) => Ok(parse_resolv_conf(&text).servers.into_iter().map(UpstreamServer::from).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            info!(path = %path.display(), "there is no such file: names outside the cluster are refused");
            Ok(Vec::new())
        }
        Err(source) => Err(DnsError::ResolvConf { path, source }),
    }
}

fn absolute(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}

async fn bind(listen: Listen) -> Result<(UdpSocket, TcpListener), DnsError> {
    match listen {
        Listen::Address(address) => {
            let taken = |source| DnsError::Listen { address, source };
            for _ in 0..PORT_TRIES {
                let udp = UdpSocket::bind(address).await.map_err(taken)?;
                // With port 0 the kernel has chosen for UDP, and TCP follows, if nobody else has that one.
                let same = udp.local_addr().map_err(taken)?;
                match TcpListener::bind(same).await {
                    Ok(tcp) => return Ok((udp, tcp)),
                    Err(error) if address.port() == 0 && error.kind() == ErrorKind::AddrInUse => {}
                    Err(error) => return Err(taken(error)),
                }
            }
            Err(taken(ErrorKind::AddrInUse.into()))
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
