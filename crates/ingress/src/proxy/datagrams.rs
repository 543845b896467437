//! UDP from a port of a Gateway to endpoints: each client has an endpoint, and a socket of its own towards it, for as long as it
//! is heard of.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::balance::{Active, pick};
use super::worker::Worker;
use crate::gateway::{Carries, PortTable, StreamRoute};
use crate::policy::Balance;
use crate::sticky::Wish;
use crate::swap::Swap;

/// A client of which nothing was heard in either direction for so long is forgotten.
const IDLE: Duration = Duration::from_secs(60);
const SWEEP: Duration = Duration::from_secs(5);
/// Clients of one worker and port; a datagram of one more is dropped.
const CLIENTS: usize = 8192;
const LARGEST: usize = 65_535;

struct Session {
    socket: Arc<UdpSocket>,
    /// Seconds after the start.
    heard: Arc<AtomicU32>,
    end: CancellationToken,
    _active: Active,
}

/// Carries datagrams until the token is cancelled.
pub async fn carry(
    worker: Arc<Worker>,
    socket: std::net::UdpSocket,
    port: Arc<Swap<PortTable>>,
    token: CancellationToken,
) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => Arc::new(socket),
        Err(error) => {
            tracing::error!(%error, "a socket cannot be listened on");
            return;
        }
    };
    let started = Instant::now();
    let mut sessions: HashMap<SocketAddr, Session> = HashMap::new();
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; LARGEST];
    let mut sweep = interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (length, client) = tokio::select! {
            // An error is an ICMP answer to what was sent to a client that has gone.
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(_) => continue,
            },
            _ = sweep.tick() => {
                let now = seconds(started);
                let idle = |session: &Session| {
                    u64::from(now.saturating_sub(session.heard.load(Ordering::Relaxed))) >= IDLE.as_secs()
                };
                sessions.retain(|_, session| !idle(session) && !session.end.is_cancelled());
                continue;
            }
            Some(_) = answers.join_next() => continue,
            () = token.cancelled() => break,
        };
        let table = port.load();
        let Carries::Udp(Some(route)) = &table.carries else { continue };
        if sessions.get(&client).is_none_or(|session| session.end.is_cancelled()) {
            if sessions.len() >= CLIENTS {
                continue;
            }
            let Some(session) = open(&worker, route, started).await else { continue };
            let back = Back {
                from: session.socket.clone(),
                to: socket.clone(),
                client,
                route: route.clone(),
                heard: session.heard.clone(),
                end: session.end.clone(),
                started,
            };
            answers.spawn(back.run());
            sessions.insert(client, session);
        }
        if let Some(session) = sessions.get(&client) {
            session.heard.store(seconds(started), Ordering::Relaxed);
            route.counts.received.fetch_add(length as u64, Ordering::Relaxed);
            if session.socket.send(&buffer[..length]).await.is_err() {
                // Nobody is at this endpoint's port: the next datagram goes to another one.
                session.end.cancel();
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

fn seconds(started: Instant) -> u32 {
    u32::try_from(started.elapsed().as_secs()).unwrap_or(u32::MAX)
}

async fn open(worker: &Worker, route: &StreamRoute, started: Instant) -> Option<Session> {
    let backend = route.backends.pick(worker.random() as u32).filter(|one| one.instead.is_none())?;
    let targets = backend.upstream.targets();
    let (now, balance) = (worker.milliseconds(), Balance::default());
    let endpoint = pick(&backend.upstream.turn, &targets.endpoints, balance, &[], Wish::None, now, worker.random())?;
    let any = match endpoint.address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(endpoint.address).await.ok()?;
    Some(Session {
        socket: Arc::new(socket),
        heard: Arc::new(AtomicU32::new(seconds(started))),
        end: CancellationToken::new(),
        _active: Active::new(endpoint),
    })
}

/// The way back of one client.
struct Back {
    from: Arc<UdpSocket>,
    to: Arc<UdpSocket>,
    client: SocketAddr,
    route: Arc<StreamRoute>,
    heard: Arc<AtomicU32>,
    end: CancellationToken,
    started: Instant,
}

impl Back {
    async fn run(self) {
        let mut buffer = vec![0; LARGEST];
        loop {
            let length = tokio::select! {
                received = self.from.recv(&mut buffer) => match received {
                    Ok(length) => length,
                    Err(_) => return self.end.cancel(),
                },
                () = self.end.cancelled() => return,
            };
            self.heard.store(seconds(self.started), Ordering::Relaxed);
            self.route.counts.sent.fetch_add(length as u64, Ordering::Relaxed);
            // A client that has gone is forgotten after a while.
            self.to.send_to(&buffer[..length], self.client).await.ok();
        }
    }
}
