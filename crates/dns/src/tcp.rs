//! Questions over TCP: each preceded by its length, answered in order, on connections that do not stay for ever.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::chain::Step;
use crate::counts::Way;
use crate::server::{Arrival, Desk};

const MAX_CONNECTIONS: usize = 256;
/// How long a connection may be silent between questions.
const IDLE: Duration = Duration::from_secs(10);
/// How long a client may take to send the rest of a question, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// Answers until the token is cancelled.
pub async fn serve(listener: TcpListener, desk: Arc<Desk>, token: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    // A place is taken before a connection: further clients wait in the kernel's queue.
    while let Some(Ok(place)) = token.run_until_cancelled(places.clone().acquire_owned()).await {
        let Some(accepted) = token.run_until_cancelled(listener.accept()).await else { break };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept a DNS connection");
                // Out of descriptors, most likely: trying again at once would only burn the CPU.
                sleep(PAUSE).await;
                continue;
            }
        };
        let (desk, token) = (desk.clone(), token.clone());
        tasks.spawn(async move {
            if let Some(Err(error)) = token.run_until_cancelled(converse(stream, peer, &desk)).await {
                debug!(%peer, %error, "a DNS connection ended early");
            }
            drop(place);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn converse(mut stream: TcpStream, peer: SocketAddr, desk: &Desk) -> io::Result<()> {
    let way = Way { is_tcp: true, is_ipv6: peer.is_ipv6() };
    let limit = Some(usize::from(u16::MAX));
    let mut out = Vec::new();
    loop {
        let length = match timeout(IDLE, stream.read_u16()).await {
            Ok(Ok(length)) => usize::from(length),
            // Silent for long, or closed: the end of a conversation, not an error.
            Err(_) => return Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
        };
        let mut buffer = vec![0; length];
        timeout(PATIENCE, stream.read_exact(&mut buffer)).await??;

        let arrival = Arrival { at: Instant::now(), way, peer, size: length };
        let step = match desk.resolver.receive(&buffer, peer.ip(), limit, arrival.at, &mut out) {
            Step::Silence => return Ok(()),
            Step::Wait(waiting) => desk.resolver.finish(*waiting, limit, &mut out).await,
            step => step,
        };
        desk.leave(&arrival, &buffer, &step, &out);
        let length = u16::try_from(out.len()).map_err(io::Error::other)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(&out);
        timeout(PATIENCE, stream.write_all(&framed)).await??;
    }
}
