//! `fairlead loadbalancer`: addresses for LoadBalancer Services and their announcement, alone, for any Kubernetes, in MetalLB's
//! place.
//!
//! It runs on every node that announces; of all of them the holder of a Lease gives addresses. It needs what the role in
//! `examples/loadbalancer` says.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::kinds::{ENDPOINT_SLICES, IP_ADDRESS_POOLS, L2_ADVERTISEMENTS, NAMESPACES, NODES, SERVICES};
use clap::Args;
use loadbalancer::Metrics;
use proxy::http::{Answer, Respond};
use reconcile::{Api, ServiceFeed};
use services::ServiceTable;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Node, allocate, announce};
use crate::dns::Switch;
use crate::{access, cli, local, node_object};

/// MetalLB's, too.
pub const METRICS_PORT: u16 = 7472;
/// When the API server is asked again for the node's addresses.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Args, Debug, Clone)]
pub struct LoadBalancerArgs {
    /// Who to be, and which API server to ask; in a pod, its service account.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The name of the Node that this process runs on; the host's name by default.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// The node's own addresses, the primary one first; those of its Node object by default.
    #[arg(long, value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Answers /metrics, to Prometheus, and /healthz.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7472")]
    pub metrics_bind_address: SocketAddr,
    /// Serve Services without a loadBalancerClass, too; off where another load balancer does. Those of class
    /// fairlead.io/loadbalancer are served in any case.
    #[arg(long, value_enum, default_value = "on")]
    pub load_balancer_classless: Switch,
}

pub fn run(args: LoadBalancerArgs) -> anyhow::Result<ExitCode> {
    cli::start_logging();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(start(args))
}

async fn start(args: LoadBalancerArgs) -> anyhow::Result<ExitCode> {
    let listener = tokio::net::TcpListener::bind(args.metrics_bind_address)
        .await
        .with_context(|| format!("--metrics-bind-address {}", args.metrics_bind_address))?;
    let name = match args.node_name {
        Some(name) => name,
        None => nix::unistd::gethostname()?.to_string_lossy().to_lowercase(),
    };
    let access = access::config(args.kubeconfig.as_deref(), "--kubeconfig").await?;
    let client = kube::Client::try_from(access).context("prepare a client of the API server")?;
    let needed = [&SERVICES, &ENDPOINT_SLICES, &NAMESPACES, &NODES, &IP_ADDRESS_POOLS, &L2_ADVERTISEMENTS];
    access::check_rights(&client, &needed, "fairlead-load-balancer of examples/loadbalancer").await?;

    let (token, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let metrics: Arc<Metrics> = Arc::default();
    tasks.spawn(proxy::http::serve(listener, respond(metrics.clone(), name.clone()), token.clone()));
    let classless = args.load_balancer_classless == Switch::On;
    tasks.spawn(allocate(client.clone(), name.clone(), classless, metrics.clone(), token.clone()));
    let announcing = {
        let (token, given) = (token.clone(), args.node_ip);
        async move {
            let addresses = match given.is_empty() {
                true => addresses_of(&client, &name, &token).await,
                false => given,
            };
            if token.is_cancelled() {
                return;
            }
            let feed = ServiceFeed::start_with(&client, ServiceTable::new().without_frontends(), &token);
            announce(client, feed, Node { name, addresses }, metrics, token).await;
        }
    };
    tasks.spawn(announcing);
    let ended = local::wait_for_end().await;
    token.cancel();
    while tasks.join_next().await.is_some() {}
    ended.map(|()| ExitCode::SUCCESS)
}

/// The addresses of this process's Node, as soon as it has any. None when the token is cancelled before.
async fn addresses_of(client: &kube::Client, name: &str, token: &CancellationToken) -> Vec<IpAddr> {
    let nodes = Api::new(client, &NODES);
    loop {
        let found = nodes.get("", name).await.map_err(|error| error.to_string());
        let node = found
            .and_then(|object| serde_json::from_value::<node_object::Node>(object).map_err(|error| error.to_string()));
        match node.map(|node| node.addresses()) {
            Ok(addresses) if !addresses.is_empty() => return addresses,
            Ok(_) => warn!(node = name, "the Node has no address yet"),
            Err(error) => warn!(error, node = name, "announcing waits for the Node; --node-name says which it is"),
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = token.cancelled() => return Vec::new(),
        }
    }
}

/// `/metrics` and `/healthz`.
pub fn respond(metrics: Arc<Metrics>, node: String) -> Respond {
    Arc::new(move |path| match path {
        "/metrics" => {
            Answer { content_type: "text/plain; version=0.0.4; charset=utf-8", ..Answer::text(metrics.text(&node)) }
        }
        "/healthz" => Answer::text("ok"),
        _ => Answer::not_found(),
    })
}
