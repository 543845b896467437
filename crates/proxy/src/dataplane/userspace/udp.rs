//! UDP through a relay: a session per client, which ends when it was idle, or when its endpoint is no longer one.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use services::Protocol;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::relay::{Door, Place};
use super::tally::{OpenCount, Tally};
use super::tcp::is_refusal as refused;
use crate::watch::Evidence;
use crate::watch::relayed::{Seen, Witness};

/// A session without a datagram for so long has ended: as long as the kernel's own for one that was answered, by default.
const IDLE: Duration = Duration::from_secs(120);
/// Datagrams that may wait for a session that is just being made; more are lost, as UDP may.
const WAITING: usize = 64;
/// Sessions of one relay: strangers must not use up the descriptors of all.
const SESSIONS: usize = 8192;
const LARGEST: usize = 65_535;

pub struct Relay {
    pub door: Door,
    pub place: Place,
    /// Clients talk to it.
    pub socket: UdpSocket,
    /// Room for one datagram each: sessions need it only while they hold one.
    pub buffers: Mutex<Vec<Vec<u8>>>,
    pub witness: Witness,
    pub tally: Arc<Tally>,
}

impl Relay {
    fn buffers(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Datagram = Box<[u8]>;

/// Serves until the relay is closed; its sessions end with it.
pub async fn serve(relay: Arc<Relay>, closed: CancellationToken) {
    let mut sessions: HashMap<SocketAddr, mpsc::Sender<Datagram>> = HashMap::new();
    let mut tasks: JoinSet<SocketAddr> = JoinSet::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        let received = tokio::select! {
            biased;
            () = closed.cancelled() => return,
            Some(Ok(client)) = tasks.join_next(), if !tasks.is_empty() => {
                // Another may have begun meanwhile.
                if sessions.get(&client).is_some_and(mpsc::Sender::is_closed) {
                    sessions.remove(&client);
                }
                continue;
            }
            received = relay.socket.recv_from(&mut buffer) => received,
        };
        // An error is an ICMP message about an earlier answer: its client has gone.
        let Ok((size, client)) = received else { continue };
        let datagram: Datagram = buffer[..size].into();
        let datagram = match sessions.get(&client) {
            Some(session) => match session.try_send(datagram) {
                Err(mpsc::error::TrySendError::Closed(datagram)) => datagram,
                Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => continue,
            },
            None => datagram,
        };
        if sessions.len() >= SESSIONS && !sessions.contains_key(&client) {
            tracing::warn!("proxy: {}: {SESSIONS} clients are served, {client} has to wait", relay.door.name);
            continue;
        }
        let (sender, datagrams) = mpsc::channel(WAITING);
        sender.try_send(datagram).ok();
        sessions.insert(client, sender);
        let relay = relay.clone();
        tasks.spawn(async move {
            if let Err(error) = session(&relay, client, datagrams).await {
                tracing::debug!("proxy: {}: session of {client}: {error}", relay.door.name);
            }
            client
        });
    }
}

/// Why a session leaves its endpoint.
enum Left {
    Idle,
    /// The endpoint is no longer one of the Service's; here is what was meant for it.
    Gone(Datagram),
    Refused,
}

/// One client's datagrams, as long as they come and somebody answers.
async fn session(relay: &Relay, client: SocketAddr, mut datagrams: mpsc::Receiver<Datagram>) -> io::Result<()> {
    let candidates = || VecDeque::from(relay.door.candidates(client.ip()));
    let mut endpoints = candidates();
    if endpoints.is_empty() {
        relay.tally.reject(&relay.door.name);
    }
    // What nobody has answered yet: it goes to the next endpoint if this one refuses.
    let mut unanswered = datagrams.recv().await;
    while let Some(endpoint) = endpoints.pop_front() {
        let upstream = relay.place.connect_udp(endpoint).await?;
        let count = relay.tally.of(&relay.door.name, endpoint);
        count.begin();
        // There is no answer to wait for before datagrams go.
        let open = count.open(Duration::ZERO);
        relay.door.picker.remember(client.ip(), endpoint, Instant::now());
        match exchange(relay, client, (endpoint, &open), &upstream, &mut datagrams, &mut unanswered).await? {
            Left::Idle => return Ok(()),
            Left::Gone(datagram) => {
                endpoints = candidates();
                unanswered = Some(datagram);
            }
            Left::Refused => {
                count.refuse();
                relay.witness.tell(Seen::Evidence((endpoint, Protocol::Udp), Evidence::Refused));
                if unanswered.is_none() || !relay.witness.retry {
                    return Ok(());
                }
                count.retry();
                relay.witness.tell(Seen::Retried);
            }
        }
    }
    Ok(())
}

async fn exchange(
    relay: &Relay,
    client: SocketAddr,
    (endpoint, open): (SocketAddr, &OpenCount),
    upstream: &UdpSocket,
    datagrams: &mut mpsc::Receiver<Datagram>,
    unanswered: &mut Option<Datagram>,
) -> io::Result<Left> {
    let idle = tokio::time::sleep(IDLE);
    tokio::pin!(idle);
    if let Some(datagram) = unanswered.as_ref() {
        open.sent(upstream.send(datagram).await?);
    }
    loop {
        tokio::select! {
            datagram = datagrams.recv() => {
                let Some(datagram) = datagram else { return Ok(Left::Idle) };
                if !relay.door.picker.is_serving(endpoint) {
                    return Ok(Left::Gone(datagram));
                }
                let sent = upstream.send(&datagram).await;
                *unanswered = Some(datagram);
                match sent {
                    Err(error) if refused(&error) => return Ok(Left::Refused),
                    sent => open.sent(sent?),
                }
            }
            ready = upstream.ready(Interest::READABLE | Interest::ERROR) => {
                if ready?.is_error() {
                    match upstream.try_io(Interest::ERROR, || pending_error(upstream)) {
                        Err(error) if refused(&error) => return Ok(Left::Refused),
                        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                        _ => {}
                    }
                }
                let taken = relay.buffers().pop();
                let mut buffer = taken.unwrap_or_else(|| vec![0; LARGEST]);
                match upstream.try_recv(&mut buffer) {
                    Ok(size) => {
                        *unanswered = None;
                        open.received(size);
                        // The client may have gone; the next datagram tells.
                        relay.socket.send_to(&buffer[..size], client).await.ok();
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) if refused(&error) => return Ok(Left::Refused),
                    Err(error) => return Err(error),
                }
                relay.buffers().push(buffer);
            }
            () = &mut idle => return Ok(Left::Idle),
        }
        idle.as_mut().reset(tokio::time::Instant::now() + IDLE);
    }
}

/// An ICMP error does not make a socket readable; it waits to be asked for.
fn pending_error(socket: &UdpSocket) -> io::Result<()> {
    Err(socket.take_error()?.unwrap_or_else(|| io::ErrorKind::WouldBlock.into()))
}
