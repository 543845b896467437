//! The whole pod network of a node, as the agent starts it.

use std::future::pending;
use std::os::fd::AsFd;
use std::sync::Arc;

use futures::{Stream, StreamExt, stream};
use ipnet::IpNet;
use linux::netns::Netns;
use linux::nft::Socket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{Masquerade, OverlayKind, PeerNode, PodNet, PodNetConfig, PodnetError, rules, run_overlay};

/// A pod network that follows the list of nodes.
pub struct Running {
    pub podnet: Arc<PodNet>,
    pub rules: watch::Receiver<rules::Status>,
    /// They end after the token is cancelled. Bridge, cables, routes and rules stay: pods live on.
    pub tasks: JoinSet<()>,
}

/// Starts the pod network in the calling thread's namespace. Pods reach `direct` with their own addresses, besides the
/// cluster's pods: the ranges of Services, for one. The list of nodes has this node in it; while it is empty it counts as
/// not known yet, and what an earlier agent left in the kernel stays.
pub async fn run(
    config: PodNetConfig,
    direct: Vec<IpNet>,
    nodes: watch::Receiver<Vec<PeerNode>>,
    stop: CancellationToken,
) -> Result<Running, PodnetError> {
    let namespace = Netns::current()?;
    run_in(config, direct, namespace, nodes, stop).await
}

pub async fn run_in(
    config: PodNetConfig,
    direct: Vec<IpNet>,
    namespace: Netns,
    nodes: watch::Receiver<Vec<PeerNode>>,
    stop: CancellationToken,
) -> Result<Running, PodnetError> {
    let overlay = config.overlay;
    let start = move || -> Result<(PodNet, Socket), PodnetError> {
        let podnet = PodNet::start_in(config, &namespace)?;
        Ok((podnet, Socket::open(Some(namespace.as_fd()))?))
    };
    let (podnet, socket) = match tokio::task::spawn_blocking(start).await {
        Ok(started) => started?,
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    };
    let mut base = podnet.masquerade();
    base.except.extend(direct);
    let podnet = Arc::new(podnet);
    let (status, rules) = watch::channel(rules::Status::default());
    let mut tasks = JoinSet::new();
    tasks.spawn(run_overlay(Arc::clone(&podnet), known(nodes.clone()), stop.clone()));
    let ports = podnet.host_ports();
    tasks.spawn(async move {
        let mut lists = known(nodes);
        let first = tokio::select! {
            () = stop.cancelled() => return,
            first = lists.next() => first,
        };
        // Without a list nobody will say more: then all that is known is the configuration.
        let (tell, told) = watch::channel(masquerade(&base, overlay, &first.unwrap_or_default()));
        let follow = async {
            while let Some(nodes) = lists.next().await {
                let now = masquerade(&base, overlay, &nodes);
                tell.send_if_modified(|held| {
                    let differs = *held != now;
                    *held = now;
                    differs
                });
            }
            pending::<()>().await
        };
        tokio::select! {
            () = rules::run(socket, ports, told, status, stop) => {}
            () = follow => {}
        }
    });
    Ok(Running { podnet, rules, tasks })
}

fn masquerade(base: &Masquerade, overlay: OverlayKind, nodes: &[PeerNode]) -> Masquerade {
    let mut masquerade = base.clone();
    match overlay {
        // Nodes route pods' addresses over the link that they share, so they may see them.
        OverlayKind::HostGateway => {
            masquerade.except.extend(nodes.iter().flat_map(|node| &node.addresses).copied().map(IpNet::from));
        }
        // The network between the nodes need not know pods' addresses, and may drop them.
        OverlayKind::Vxlan => {}
    }
    masquerade
}

/// The lists of nodes from now on, the present one first, without empty ones.
fn known(mut nodes: watch::Receiver<Vec<PeerNode>>) -> impl Stream<Item = Vec<PeerNode>> + Send + Unpin {
    nodes.mark_changed();
    Box::pin(stream::unfold(nodes, |mut nodes| async move {
        loop {
            nodes.changed().await.ok()?;
            let list = nodes.borrow_and_update().clone();
            if !list.is_empty() {
                return Some((list, nodes));
            }
        }
    }))
}
