//! `fairlead dns`: cluster DNS alone, for any Kubernetes, in CoreDNS's place; and what a node's agent shares with it.
//!
//! It needs to list and watch Services, EndpointSlices and namespaces, and pods where their names are verified; see
//! `examples/dns`.

mod follow;
mod options;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use api::kinds::{ENDPOINT_SLICES, SERVICES};
use clap::Args;
use dns::{DnsConfig, Feed, Listen, Objects, Server};
use ipnet::IpNet;
use linux::link::{Address, Item, Links};
use reconcile::ServiceFeed;
use services::ServiceTable;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{access, cli, local};
pub use follow::observed;
pub use options::{DnsOptions, Pods, Switch};

const PORT: u16 = 53;

#[derive(Args, Debug, Clone)]
pub struct DnsArgs {
    /// Who to be, and which API server to ask; in a pod, its service account.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where to answer, over UDP and TCP; may be repeated. On a host that has several addresses, name them.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:53")]
    pub listen: Vec<SocketAddr>,
    /// Where Prometheus scrapes; also answers /health and /ready.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:9153")]
    pub metrics_bind_address: SocketAddr,
    /// The cluster's domain.
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Ranges of cluster IPs: addresses in them that nobody has do not exist.
    #[arg(long, value_delimiter = ',')]
    pub service_cidr: Vec<IpNet>,
    /// Ranges of pod addresses: the same, and their search path is walked for them.
    #[arg(long, value_delimiter = ',')]
    pub pod_cidr: Vec<IpNet>,
    #[command(flatten)]
    pub options: DnsOptions,
}

pub fn run(args: DnsArgs) -> anyhow::Result<ExitCode> {
    cli::start_logging();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(start(args))
}

async fn start(args: DnsArgs) -> anyhow::Result<ExitCode> {
    let mut config = DnsConfig::new(args.listen.iter().map(|at| Listen::Address(*at)).collect());
    config.zone = args.cluster_domain.clone();
    config.reverse = args.service_cidr.iter().chain(&args.pod_cidr).copied().collect();
    config.search_clients = args.pod_cidr.clone();
    args.options.apply(&mut config)?;
    config.listen.extend(local_address(&args.options)?);
    let metrics = TcpListener::bind(args.metrics_bind_address)
        .with_context(|| format!("--metrics-bind-address {}", args.metrics_bind_address))?;
    config.metrics = Some(metrics);

    let access = access::config(args.kubeconfig.as_deref(), "--kubeconfig").await?;
    let client = kube::Client::try_from(access).context("prepare a client of the API server")?;
    let (client, outage) = observed(client);
    config.outage = Some(outage);
    let with_pods = args.options.dns_pods == Pods::Verified;
    let mut needed = vec![&SERVICES, &ENDPOINT_SLICES];
    needed.extend(follow::resources(with_pods));
    access::check_rights(&client, &needed, "fairlead-cluster-dns of examples/dns").await?;

    let (token, mut tasks) = (CancellationToken::new(), JoinSet::new());
    follow_objects(&client, &mut config, &args.options, &mut tasks, &token);
    let feed = ServiceFeed::start_with(&client, ServiceTable::new().without_frontends(), &token);
    let server = Server::bind(config, Feed { table: feed.table.clone(), changes: feed.subscribe() }).await?;
    tasks.spawn(server.run(token.clone()));
    let ended = local::wait_for_end().await;
    token.cancel();
    while tasks.join_next().await.is_some() {}
    ended.map(|()| ExitCode::SUCCESS)
}

/// Follows namespaces, and pods if their names are verified, for who answers with this configuration.
pub fn follow_objects(
    client: &kube::Client,
    config: &mut DnsConfig,
    options: &DnsOptions,
    tasks: &mut JoinSet<()>,
    token: &CancellationToken,
) {
    let objects: Arc<Objects> = config.objects.clone();
    tasks.spawn(follow::follow(client.clone(), objects, options.dns_pods == Pods::Verified, token.clone()));
}

/// Gives this host the address at which DNS answers beside others. It stays when the process ends: who asks there meanwhile
/// learns at once that nobody answers, and asks the next server.
pub fn local_address(options: &DnsOptions) -> anyhow::Result<Option<Listen>> {
    let Some(ip) = options.dns_local_address else { return Ok(None) };
    let address = IpNet::new(ip, if ip.is_ipv4() { 32 } else { 128 })?;
    let item = Item::Address(Address { link: "lo".into(), address });
    Links::current()?
        .ensure(&item)
        .with_context(|| format!("--dns-local-address {ip}: give it to the loopback; this needs CAP_NET_ADMIN"))?;
    Ok(Some(Listen::Address(SocketAddr::new(ip, PORT))))
}

/// Pods ask there first, and at the cluster's own address when nobody answers.
pub fn servers_of_pods(options: &DnsOptions, servers: &mut Vec<IpAddr>) {
    servers.splice(0..0, options.dns_local_address);
}
