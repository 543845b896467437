//! `--publish`: a loopback port of the host leads to a node port, through a socket made in the lab's namespace.

use linux::netns::Netns;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Accepts until cancelled; each connection goes to the next node in turn, or to another when that one refuses.
pub async fn forward(listener: TcpListener, namespace: Netns, nodes: Vec<IpAddr>, port: u16, token: CancellationToken) {
    let turn = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = token.cancelled() => return,
        };
        let mut client = match accepted {
            Ok((client, _)) => client,
            Err(error) => {
                warn!(%error, "a published port could not accept a connection");
                continue;
            }
        };
        let (namespace, nodes, token, turn) = (namespace.clone(), nodes.clone(), token.clone(), turn.clone());
        tokio::spawn(async move {
            let first = turn.fetch_add(1, Ordering::Relaxed);
            for i in 0..nodes.len() {
                let node = nodes[(first + i) % nodes.len()];
                match namespace.tcp_connect(SocketAddr::new(node, port)).await {
                    Ok(mut server) => {
                        tokio::select! {
                            ended = tokio::io::copy_bidirectional(&mut client, &mut server) => {
                                if let Err(error) = ended {
                                    debug!(%error, "a published connection ended");
                                }
                            }
                            () = token.cancelled() => {}
                        }
                        return;
                    }
                    Err(error) => debug!(%error, %node, port, "node port refused"),
                }
            }
        });
    }
}
