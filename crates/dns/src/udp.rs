//! Questions over UDP: answered on the spot from memory, in a task of their own when an upstream server is asked.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::chain::Step;
use crate::counts::Way;
use crate::server::{Arrival, Desk};
use crate::wire::code;

/// Questions that wait for upstream servers at once; more are turned away, or their memory grows without bound.
const MAX_WAITING: usize = 1000;
/// Questions that are answered before other tasks get their turn.
const BATCH: usize = 64;

/// Answers until the token is cancelled.
pub async fn serve(socket: UdpSocket, desk: Arc<Desk>, token: CancellationToken) {
    let mut place = Place {
        socket: Arc::new(socket),
        desk,
        waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        tasks: TaskTracker::new(),
        token: token.clone(),
        out: Vec::with_capacity(2048),
    };
    let mut buffer = vec![0; usize::from(u16::MAX)];
    while let Some(ready) = token.run_until_cancelled(place.socket.readable()).await {
        if let Err(error) = ready {
            warn!(%error, "cannot receive DNS questions over UDP");
            break;
        }
        for _ in 0..BATCH {
            match place.socket.try_recv_from(&mut buffer) {
                Ok((length, peer)) => place.receive(&buffer[..length], peer).await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What the kernel tells of an earlier answer: its client has gone.
                Err(error) => debug!(%error, "a client did not take its DNS answer"),
            }
        }
    }
    place.tasks.close();
    place.tasks.wait().await;
}

struct Place {
    socket: Arc<UdpSocket>,
    desk: Arc<Desk>,
    waiting: Arc<Semaphore>,
    tasks: TaskTracker,
    token: CancellationToken,
    /// For one reply after the other.
    out: Vec<u8>,
}

impl Place {
    async fn receive(&mut self, packet: &[u8], peer: SocketAddr) {
        let way = Way { is_tcp: false, is_ipv6: peer.is_ipv6() };
        let arrival = Arrival { at: Instant::now(), way, peer, size: packet.len() };
        let step = self.desk.resolver.receive(packet, peer.ip(), None, arrival.at, &mut self.out);
        let waiting = match step {
            Step::Silence => return,
            Step::Replied { .. } => {
                self.desk.leave(&arrival, packet, &step, &self.out);
                return send(&self.socket, peer, &self.out).await;
            }
            Step::Wait(waiting) => waiting,
        };
        let Ok(permit) = self.waiting.clone().try_acquire_owned() else {
            waiting.ask.refuse(&mut self.out, code::SERV_FAIL);
            let step = Step::Replied { kind: Some(waiting.ask.kind), code: code::SERV_FAIL, source: None };
            self.desk.leave(&arrival, packet, &step, &self.out);
            return send(&self.socket, peer, &self.out).await;
        };
        let (socket, desk, token, packet) =
            (self.socket.clone(), self.desk.clone(), self.token.clone(), packet.to_vec());
        self.tasks.spawn(async move {
            let mut out = Vec::new();
            let finished = desk.resolver.finish(*waiting, None, &mut out);
            if let Some(step) = token.run_until_cancelled(finished).await {
                desk.leave(&arrival, &packet, &step, &out);
                send(&socket, peer, &out).await;
            }
            drop(permit);
        });
    }
}

async fn send(socket: &UdpSocket, peer: SocketAddr, reply: &[u8]) {
    let sent = match socket.try_send_to(reply, peer) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.send_to(reply, peer).await,
        sent => sent,
    };
    if let Err(error) = sent {
        debug!(%peer, %error, "a DNS answer could not be sent");
    }
}
