//! `fairlead ingress`: the Ingress controller and its proxy alone, for any Kubernetes; and what a node's agent shares with it.
//!
//! It needs to list and watch Services, EndpointSlices, Ingresses and IngressClasses, to read the Secrets that its Ingresses
//! name, to write their status, and a Lease; see `examples/ingress`.

mod follow;
mod gateways;
pub mod leader;
mod options;
mod provision;
mod report;
mod secrets;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use api::kinds::{ENDPOINT_SLICES, INGRESS_CLASSES, INGRESSES, SERVICES};
use api::object::Key;
use clap::Args;
use ingress::{CONTROLLER, Certificates, Compiler, Proxy, ProxyConfig, Swap, gateway};
use reconcile::{Recorder, ServiceFeed};
use services::ServiceTable;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{access, cli, local};
use follow::Follower;
pub use options::IngressOptions;
use report::Report;

/// Where nodes of a cluster listen; the Service `kube-system/fairlead-ingress` leads here.
pub const HTTP_PORT: u16 = 10080;
pub const HTTPS_PORT: u16 = 10443;
/// Where they answer /healthz, /readyz and /metrics.
pub const STATUS_PORT: u16 = 10254;
/// A node that has this label, with any value but `false`, runs the proxy.
pub const LABEL: &str = "fairlead.io/ingress";
/// The Service whose addresses are those of every Ingress, and the Lease of who writes them.
pub const NAMESPACE: &str = "kube-system";
pub const SERVICE: &str = "fairlead-ingress";

#[derive(Args, Debug, Clone)]
pub struct IngressArgs {
    /// Who to be, and which API server to ask; in a pod, its service account.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where HTTP comes in; may be repeated.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:80")]
    pub http: Vec<SocketAddr>,
    /// Where HTTPS comes in; may be repeated.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:443")]
    pub https: Vec<SocketAddr>,
    /// Answers /healthz, /readyz and, to Prometheus, /metrics.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10254")]
    pub status_bind_address: SocketAddr,
    /// Serves the IngressClasses with this controller.
    #[arg(long, value_name = "NAME", default_value = CONTROLLER)]
    pub controller_name: String,
    /// Serves the GatewayClasses with this controller, where the cluster has Gateway API.
    #[arg(long, value_name = "NAME", default_value = gateway::CONTROLLER)]
    pub gateway_controller_name: String,
    /// The Service whose addresses are written into the status of each Ingress, NAMESPACE/NAME.
    #[arg(long, value_name = "SERVICE", value_parser = parse_key)]
    pub publish_service: Option<Key>,
    /// Of all that run, the one that holds this Lease writes events and status, NAMESPACE/NAME.
    #[arg(long, value_name = "LEASE", default_value = "kube-system/fairlead-ingress", value_parser = parse_key)]
    pub lease: Key,
    /// Who this one is among them; the host's name by default.
    #[arg(long, value_name = "NAME")]
    pub identity: Option<String>,
    #[command(flatten)]
    pub options: IngressOptions,
}

fn parse_key(text: &str) -> Result<Key, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(Key::new(namespace, name))
        }
        _ => Err(format!("{text:?} is not NAMESPACE/NAME")),
    }
}

pub fn run(args: IngressArgs) -> anyhow::Result<ExitCode> {
    cli::start_logging();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(start(args))
}

async fn start(args: IngressArgs) -> anyhow::Result<ExitCode> {
    let mut config = ProxyConfig::new(args.http.clone(), args.https.clone());
    args.options.apply(&mut config);
    let status = TcpListener::bind(args.status_bind_address)
        .with_context(|| format!("--status-bind-address {}", args.status_bind_address))?;
    let access = access::config(args.kubeconfig.as_deref(), "--kubeconfig").await?;
    let client = kube::Client::try_from(access).context("prepare a client of the API server")?;
    let needed = [&SERVICES, &ENDPOINT_SLICES, &INGRESSES, &INGRESS_CLASSES];
    access::check_rights(&client, &needed, "fairlead-ingress-controller of examples/ingress").await?;
    let identity = match &args.identity {
        Some(identity) => identity.clone(),
        None => nix::unistd::gethostname()?.to_string_lossy().to_lowercase(),
    };
    let token = CancellationToken::new();
    let feed = ServiceFeed::start_with(&client, ServiceTable::new().without_frontends(), &token);
    let place = Place {
        identity,
        controller: args.controller_name,
        gateway_controller: args.gateway_controller_name,
        publish: args.publish_service,
        lease: args.lease,
        status: Some(status),
    };
    let serving = serve(client, feed, config, place, token.clone());
    tokio::pin!(serving);
    let ended = tokio::select! {
        served = &mut serving => bail!("the proxy ended: {served:?}"),
        ended = local::wait_for_end() => ended,
    };
    token.cancel();
    serving.await?;
    ended.map(|()| ExitCode::SUCCESS)
}

/// Where and as whom the proxy runs.
pub struct Place {
    /// Its name among those that share the Lease.
    pub identity: String,
    /// `spec.controller` of the classes that are served.
    pub controller: String,
    /// `spec.controllerName` of the GatewayClasses that are served.
    pub gateway_controller: String,
    pub publish: Option<Key>,
    pub lease: Key,
    pub status: Option<TcpListener>,
}

/// Follows Ingresses and carries their requests until the token is cancelled. Clients wait from the first moment on; they are
/// answered when the first tables are complete.
///
/// # Errors
/// A socket cannot be bound.
pub async fn serve(
    client: kube::Client,
    feed: ServiceFeed,
    config: ProxyConfig,
    place: Place,
    token: CancellationToken,
) -> anyhow::Result<()> {
    // Before the table is read, so that no change is missed.
    let changes = feed.subscribe();
    let fallback = ingress::fallback()?;
    let routes = Arc::default();
    let certificates = Arc::new(Swap::new(Certificates::new(fallback.clone())));
    let follows_names = config.external_names;
    let proxy = Proxy::bind(config, Arc::clone(&routes), certificates.clone(), place.status)?;
    let readiness = proxy.readiness();
    let (opener, addresses) = (proxy.port_opener(), own_addresses(proxy.http()));
    let mut tasks = JoinSet::new();
    let (leads, leads_seen) = watch::channel(false);
    tasks.spawn(leader::run(
        client.clone(),
        place.lease,
        place.identity.clone(),
        leader::Terms::CALM,
        leads,
        token.clone(),
    ));
    let mut compiler = Compiler::new(&place.controller, feed.table.clone(), fallback);
    if !follows_names {
        compiler.refuse_external_names();
    }
    let recorder = Recorder::new(&client, "fairlead-ingress", &place.identity);
    let (complete, is_complete) = oneshot::channel();
    let (reports, reports_seen) = watch::channel(Report::default());
    tasks.spawn(report::run(client.clone(), recorder, reports_seen, token.clone()));
    let (gateway_reports, gateway_reports_seen) = watch::channel(provision::Report::default());
    let parts = gateways::Parts {
        client: client.clone(),
        changes: feed.subscribe(),
        feed: feed.clone(),
        opener,
        addresses,
        controller: place.gateway_controller,
        publish: place.publish.clone(),
        leads: leads_seen.clone(),
        reports: gateway_reports,
    };
    tasks.spawn(gateways::run(parts, token.clone()));
    tasks.spawn(provision::run(client.clone(), gateway_reports_seen, token.clone()));
    let follower = Follower::new(client, feed, changes, compiler, routes, certificates, leads_seen, reports);
    tasks.spawn(follower.run(place.publish, complete, token.clone()));
    let served = tokio::select! {
        complete = is_complete => match complete {
            Ok(()) => {
                readiness.set();
                proxy.run(token.clone()).await.context("carry requests")
            }
            // The follower ended with the token.
            Err(_) => Ok(()),
        },
        () = token.cancelled() => Ok(()),
    };
    token.cancel();
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            warn!(%error, "a task of ingress ended badly");
        }
    }
    served
}

/// Where ports of Gateways are opened: beside those of HTTP.
fn own_addresses(http: &[SocketAddr]) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = http.iter().map(SocketAddr::ip).collect();
    all.sort();
    all.dedup();
    all
}

/// Runs the proxy while the node is labelled for it, until the token is cancelled.
pub async fn serve_while_labelled(
    client: kube::Client,
    feed: ServiceFeed,
    options: IngressOptions,
    node: Node,
    mut labelled: watch::Receiver<bool>,
    token: CancellationToken,
) {
    loop {
        tokio::select! {
            labelled = labelled.wait_for(|is_labelled| *is_labelled) => if labelled.is_err() { return },
            () = token.cancelled() => return,
        }
        let at = |port: u16| node.addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
        let mut config = ProxyConfig::new(at(HTTP_PORT), at(HTTPS_PORT));
        options.apply(&mut config);
        let status = node.addresses.first().map(|ip| TcpListener::bind(SocketAddr::new(*ip, STATUS_PORT)));
        let status = match status.transpose() {
            Ok(status) => status,
            Err(error) => {
                warn!(%error, port = STATUS_PORT, "nobody is told of ingress's health here");
                None
            }
        };
        let place = Place {
            identity: node.name.clone(),
            controller: CONTROLLER.to_owned(),
            gateway_controller: gateway::CONTROLLER.to_owned(),
            publish: Some(Key::new(NAMESPACE, SERVICE)),
            lease: Key::new(NAMESPACE, SERVICE),
            status,
        };
        let own = token.child_token();
        let serving = serve(client.clone(), feed.clone(), config, place, own.clone());
        tokio::pin!(serving);
        let ended = tokio::select! {
            ended = &mut serving => Some(ended),
            _ = labelled.wait_for(|is_labelled| !*is_labelled) => None,
        };
        own.cancel();
        let ended = match ended {
            Some(ended) => ended,
            None => serving.await,
        };
        if let Err(error) = ended {
            warn!(error = format!("{error:#}"), "ingress does not run on this node");
            // Until somebody takes the label away and gives it again.
            if labelled.wait_for(|is_labelled| !*is_labelled).await.is_err() {
                return;
            }
        }
    }
}

/// What ingress needs to know of its node.
pub struct Node {
    pub name: String,
    pub addresses: Vec<IpAddr>,
}
