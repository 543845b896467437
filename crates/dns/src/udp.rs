//! Questions over UDP: answered on the spot from memory, in a task of their own when an upstream server is asked.

use std::net::SocketAddr;
use std::sync::Arc;

use hickory_proto::op::ResponseCode;
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::answer::Answer;
use crate::chain::Progress;
use crate::message::{Incoming, Request, decode};
use crate::metrics::Way;
use crate::server::Desk;

/// Questions that wait for upstream servers at once; more are turned away, or their memory grows without bound.
const MAX_WAITING: usize = 1000;

/// Answers until the token is cancelled.
pub async fn serve(socket: UdpSocket, desk: Arc<Desk>, token: CancellationToken) {
    let socket = Arc::new(socket);
    let places = Arc::new(Semaphore::new(MAX_WAITING));
    let tasks = TaskTracker::new();
    let mut buffer = vec![0; usize::from(u16::MAX)];
    while let Some(received) = token.run_until_cancelled(socket.recv_from(&mut buffer)).await {
        let (length, peer) = match received {
            Ok(received) => received,
            Err(error) => {
                warn!(%error, "cannot receive DNS questions over UDP");
                continue;
            }
        };
        let way = Way { protocol: "udp", is_ipv6: peer.is_ipv6() };
        let (request, question) = match decode(&buffer[..length]) {
            Incoming::Ignore => continue,
            Incoming::Refuse(request, answer) => {
                let arrival = desk.arrive(way, None);
                desk.leave(arrival, &answer, None);
                send(&socket, peer, &request, answer).await;
                continue;
            }
            Incoming::Ask(request, question) => (request, question),
        };
        let arrival = desk.arrive(way, Some(question.record_type));
        match desk.resolver.begin(&question, arrival.at) {
            Progress::Done(answer, source) => {
                desk.leave(arrival, &answer, Some(source));
                send(&socket, peer, &request, answer).await;
            }
            Progress::Waiting { so_far, question } => {
                let Ok(place) = places.clone().try_acquire_owned() else {
                    let answer = Answer::code(ResponseCode::ServFail);
                    desk.leave(arrival, &answer, None);
                    send(&socket, peer, &request, answer).await;
                    continue;
                };
                let (socket, desk, token) = (socket.clone(), desk.clone(), token.clone());
                tasks.spawn(async move {
                    let asked = desk.resolver.finish(so_far, &question);
                    if let Some((answer, source)) = token.run_until_cancelled(asked).await {
                        desk.leave(arrival, &answer, Some(source));
                        send(&socket, peer, &request, answer).await;
                    }
                    drop(place);
                });
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn send(socket: &UdpSocket, peer: SocketAddr, request: &Request, mut answer: Answer) {
    answer.rotate(usize::from(request.id()));
    let Some(bytes) = request.encode(answer, request.udp_limit()) else {
        debug!(%peer, "a DNS answer cannot be written");
        return;
    };
    if let Err(error) = socket.send_to(&bytes, peer).await {
        debug!(%peer, %error, "a DNS answer could not be sent");
    }
}
