//! TCP through a relay: connect to the first endpoint that answers, then splice both directions, each to its own end.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use linux::splice::{self, Pool};
use services::Protocol;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::relay::{Door, Place};
use super::tally::{Count, OpenCount, Tally};
use crate::watch::Evidence;
use crate::watch::relayed::{Seen, Witness};

/// How long each attempt to connect may take; the last holds for all that follow. Who refuses is left at once.
const PATIENCE: [Duration; 4] =
    [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];
/// How many attempts one client's connection is worth.
const ATTEMPTS: usize = 8;
/// After an accept that failed: descriptors or memory are short, and others must end first.
const PAUSE: Duration = Duration::from_millis(100);

pub struct Relay {
    pub door: Door,
    pub place: Place,
    pub pipes: Arc<Pool>,
    pub witness: Witness,
    pub tally: Arc<Tally>,
}

/// Accepts until the relay is closed. Connections go on then, until they end.
pub async fn serve(listener: TcpListener, relay: Arc<Relay>, closed: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = closed.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, from)) => drop(tokio::spawn(carry(client, from.ip(), relay.clone()))),
            Err(error) => {
                tracing::warn!(
                    "proxy: {}: cannot accept: {error}; is the limit of open files too low?",
                    relay.door.name
                );
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    // Whoever stands in the queue is connected as far as its client knows.
    while let Some(Ok((client, from))) = listener.accept().now_or_never() {
        tokio::spawn(carry(client, from.ip(), relay.clone()));
    }
}

async fn carry(client: TcpStream, from: IpAddr, relay: Arc<Relay>) {
    let Some((server, open)) = connect(&relay, from).await else {
        // Dropped with a reset: the client must not take it for an answer that is empty.
        client.set_zero_linger().ok();
        return;
    };
    client.set_nodelay(true).ok();
    let pipes = &relay.pipes;
    let (sent, received) = (|bytes| open.sent(bytes), |bytes| open.received(bytes));
    if tokio::try_join!(transfer(&client, &server, pipes, sent), transfer(&server, &client, pipes, received)).is_err() {
        open.reset();
        // One side has reset the connection: the other is to know.
        client.set_zero_linger().ok();
        server.set_zero_linger().ok();
    }
}

/// A connection to the first endpoint that answers; `None` if none does.
async fn connect(relay: &Relay, from: IpAddr) -> Option<(TcpStream, OpenCount)> {
    let mut endpoints = VecDeque::from(relay.door.candidates(from));
    if endpoints.is_empty() {
        relay.tally.reject(&relay.door.name);
    }
    let mut before: Option<Arc<Count>> = None;
    let attempts = if relay.witness.retry { ATTEMPTS } else { 1 };
    for attempt in 0..attempts {
        let endpoint = endpoints.pop_front()?;
        if let Some(before) = before {
            before.retry();
        }
        let count = relay.tally.of(&relay.door.name, endpoint);
        count.begin();
        let begun = Instant::now();
        let patience = PATIENCE[attempt.min(PATIENCE.len() - 1)];
        match timeout(patience, relay.place.connect(endpoint)).await {
            Ok(Ok(stream)) => {
                relay.door.picker.remember(from, endpoint, Instant::now());
                if attempt > 0 {
                    relay.witness.tell(Seen::Retried);
                }
                return Some((stream, count.open(begun.elapsed())));
            }
            Ok(Err(error)) => {
                tracing::debug!("proxy: {}: {endpoint}: {error}", relay.door.name);
                if is_refusal(&error) {
                    count.refuse();
                    relay.witness.tell(Seen::Evidence((endpoint, Protocol::Tcp), Evidence::Refused));
                }
            }
            // Perhaps only slow: its turn comes again after all others.
            Err(_) => {
                relay.witness.tell(Seen::Evidence((endpoint, Protocol::Tcp), Evidence::Unanswered));
                endpoints.push_back(endpoint);
            }
        }
        before = Some(count);
    }
    None
}

/// A reset or an ICMP error; anything else is this node's own trouble.
pub fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | HostUnreachable | NetworkUnreachable)
}

/// Carries one direction until its sender ends it, then says so to the receiver.
async fn transfer(from: &TcpStream, to: &TcpStream, pipes: &Pool, carried: impl Fn(usize)) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut pipe = pipes.take()?;
        match from.try_io(Interest::READABLE, || pipe.fill(from)) {
            Ok(0) => {
                pipes.give(pipe);
                return splice::end_stream(to);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                pipes.give(pipe);
                continue;
            }
            Err(error) => return Err(error),
        }
        while pipe.held() > 0 {
            to.writable().await?;
            match to.try_io(Interest::WRITABLE, || pipe.drain(to)) {
                Ok(bytes) => carried(bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        pipes.give(pipe);
    }
}
