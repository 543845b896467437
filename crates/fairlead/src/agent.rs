//! A node: kubelet, runtime, pod network, proxy and DNS, in one process, each with its own identity.

mod cluster;
mod outer;
mod socket;

use crate::node_object::Node;
use crate::proxy as standalone;
use crate::{barrier, cli, dsr, join, local, serve, server, service_cidrs, warnings};
use anyhow::{Context, bail};
use api::kinds::{NODES, SERVICE_CIDRS};
use apiserver::Identity;
use apiserver::auth::authenticate;
use clap::{Args, ValueEnum};
use cluster::{cluster, register};
use dns::{DnsConfig, Listen};
use ipnet::IpNet;
use kubelet::KubeletConfig;
use linux::netns::Netns;
use outer::OuterSockets;
use podnet::{OverlayKind, PeerNode, PodNetConfig};
use proxy::configuration::{HEALTHZ_PORT, METRICS_PORT};
use proxy::{Feature, Mode, NodeView};
use reconcile::{Cache, ObjectRef, Recorder, Scope, ServiceFeed};
use runtime::image::PullConfig;
use runtime::{Builtin, BuiltinConfig};
use serde_json::{Value, json};
use services::{Place, Seed};
use socket::{Local, Socket};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum Overlay {
    /// Nodes on one link are each other's gateways.
    HostGw,
    /// Pod traffic between nodes travels in VXLAN.
    Vxlan,
}

#[derive(Args, Debug, Clone)]
pub struct AgentArgs {
    #[command(flatten)]
    pub data: cli::DataDir,
    /// The API server, such as https://192.0.2.1:6443.
    #[arg(long)]
    pub server: String,
    /// The join token that the server printed.
    #[arg(long, env = "FAIRLEAD_TOKEN", hide_env_values = true)]
    pub token: String,
    /// The cluster's CA certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// sha256:… of the CA's public key, as the server printed it.
    #[arg(long, value_name = "HASH", conflicts_with = "ca_cert")]
    pub ca_hash: Option<String>,
    /// The node's name; the host's name by default.
    #[arg(long)]
    pub node_name: Option<String>,
    /// The node's own addresses, the primary one first.
    #[arg(long, value_delimiter = ',', required = true)]
    pub node_ip: Vec<IpAddr>,
    /// How Services reach the kernel: nftables, iptables, ipvs, ebpf, userspace, or none for a node whose proxy is another process.
    #[arg(long, default_value = "nftables")]
    pub proxy_mode: NodeProxy,
    /// How the ipvs mode chooses among endpoints: rr, lc, dh, sh, sed, nq, wrr, wlc or mh.
    #[arg(long, default_value = "rr")]
    pub ipvs_scheduler: proxy::Scheduler,
    /// In the ipvs mode, answer ARP only for addresses of the interface that was asked. Nodes always do, as one of them
    /// announces each LoadBalancer address; the flag is for scripts that give it.
    #[arg(long)]
    pub ipvs_strict_arp: bool,
    /// How the ebpf mode chooses among endpoints: random, maglev or least-load; the annotation fairlead.io/endpoint-selection of a
    /// Service comes before it.
    #[arg(long, default_value = "random")]
    pub endpoint_selection: services::Selection,
    /// Endpoints on other nodes answer clients from outside without the node that was asked (DSR), where both nodes' proxies are
    /// in the ebpf mode; the annotation fairlead.io/dsr of a Service comes before it.
    #[arg(long)]
    pub dsr: bool,
    /// After how many milliseconds sockets that are sent to an endpoint repeat their first packet; by default after a second,
    /// as the kernel has it. The ebpf mode alone can set it.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(20..=1000))]
    pub first_packet_timeout: Option<u64>,
    /// Node ports answer on 127.0.0.1 and ::1, too, through a relay of this process.
    #[arg(long)]
    pub localhost_node_ports: bool,
    /// Switches of the proxy, NAME=false: EndpointEjection, FirstPacketRetry, ServiceTraffic, EndPolicy, ModeHandOver,
    /// RemovalBarrier.
    #[arg(long, value_name = "LIST", default_value = "")]
    pub feature_gates: proxy::Features,
    /// How pods of other nodes are reached.
    #[arg(long, value_enum, default_value = "host-gw")]
    pub overlay: Overlay,
    #[command(flatten)]
    pub dns: crate::dns::DnsOptions,
    #[command(flatten)]
    pub ingress: crate::ingress::IngressOptions,
    #[command(flatten)]
    pub load_balancer: crate::loadbalancer::LoadBalancerOptions,
    /// Labels of the node, key=value.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// host:port of registries that are spoken to without TLS.
    #[arg(long, value_name = "HOST:PORT")]
    pub insecure_registry: Vec<String>,
    /// The node's share of the pod ranges; given by the server unless set.
    #[arg(long, value_delimiter = ',', hide = true)]
    pub pod_cidr: Vec<IpNet>,
    /// Where registries and upstream name servers are reached from.
    #[arg(long, hide = true)]
    pub outer_netns: Option<PathBuf>,
    #[arg(long, hide = true, default_value = "/run/fairlead-agent")]
    pub run_dir: PathBuf,
    #[arg(long, hide = true, default_value = "fairlead-agent/pods")]
    pub cgroup: PathBuf,
    /// Holds every process of the node, in the cgroup2 hierarchy: a host is all of it.
    #[arg(long, hide = true, default_value = "/")]
    pub node_cgroup: PathBuf,
    /// Image store, shared by the nodes of one machine.
    #[arg(long, hide = true)]
    pub images: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub announce: bool,
}

/// Who serves Services on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeProxy {
    Ours(Mode),
    /// Another process, such as `fairlead proxy` or kube-proxy.
    Others,
}

impl std::str::FromStr for NodeProxy {
    type Err = proxy::Error;

    fn from_str(text: &str) -> Result<Self, proxy::Error> {
        if text == "none" { Ok(NodeProxy::Others) } else { text.parse().map(NodeProxy::Ours) }
    }
}

impl NodeProxy {
    fn mode(self) -> Option<Mode> {
        match self {
            NodeProxy::Ours(mode) => Some(mode),
            NodeProxy::Others => None,
        }
    }
}

pub fn run(args: AgentArgs) -> anyhow::Result<ExitCode> {
    cli::start_logging();
    if args.announce {
        // The terminal's signals are for the one who waits there.
        nix::unistd::setsid().ok();
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(start(args))
}

async fn start(args: AgentArgs) -> anyhow::Result<ExitCode> {
    let token = CancellationToken::new();
    let dir = args.data.data_dir.clone();
    std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let name = match &args.node_name {
        Some(name) => name.clone(),
        None => nix::unistd::gethostname()?.to_string_lossy().to_lowercase(),
    };
    if let Some(problem) = api::names::dns_subdomain(&name).first() {
        bail!("node name {name:?}: {problem}; give another with --node-name");
    }
    let trust = match (&args.ca_cert, &args.ca_hash) {
        (Some(path), _) => {
            join::Trust::Pem(std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?)
        }
        (None, Some(hash)) => join::Trust::Hash(hash.clone()),
        (None, None) => bail!("say whom to trust: --ca-hash as the server printed it, or --ca-cert FILE"),
    };
    let identity = join::join(&args.server, trust, &args.token, &name, &args.node_ip, &dir.join("pki")).await?;
    let kept = identity.keep_renewed(&args.server, token.clone())?;
    let node_client = kept.client.clone();
    let mut cluster = cluster(&node_client).await?;
    let mut labels =
        json!({"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"});
    for label in &args.label {
        let (key, value) = label.split_once('=').with_context(|| format!("--label {label:?} is not KEY=VALUE"))?;
        labels[key] = json!(value);
    }
    let registered = register(&node_client, &name, &args.pod_cidr, &labels).await?;
    let pod_cidrs = registered.pod_cidrs();

    // Pod network.
    let outer = args.outer_netns.as_deref().map(Netns::open).transpose()?;
    let podnet_client = join::component_client(&node_client, &args.server, &identity, "fairlead-podnet").await?;
    let (peers, peers_seen) = watch::channel(Vec::<PeerNode>::new());
    let overlay = match args.overlay {
        Overlay::HostGw => OverlayKind::HostGateway,
        Overlay::Vxlan => OverlayKind::Vxlan,
    };
    let net_config = PodNetConfig {
        dir: dir.join("podnet"),
        node: name.clone(),
        node_addresses: args.node_ip.clone(),
        pod_cidrs: pod_cidrs.clone(),
        cluster_cidrs: cluster.pod_cidrs.clone(),
        overlay,
        mtu: None,
    };
    let mut tasks = tokio::task::JoinSet::new();
    let network = podnet::run(net_config, cluster.service_cidrs.clone(), peers_seen, token.clone()).await?;

    // Proxy and DNS over one service table.
    let proxy_client = join::component_client(&node_client, &args.server, &identity, "fairlead-proxy").await?;
    let mode = args.proxy_mode.mode();
    if args.first_packet_timeout.is_some() && mode != Some(Mode::Ebpf) {
        bail!("--first-packet-timeout: only the ebpf mode can set it; leave it out, or use --proxy-mode=ebpf");
    }
    let hooks = standalone::hooks(&args.node_cgroup, &dir)?;
    let seed = match mode {
        Some(mode) => {
            let hooks = hooks.clone();
            tokio::task::spawn_blocking(move || {
                proxy::prepare(mode, None, Some(&hooks))?;
                proxy::found(mode, None, Some(&hooks))
            })
            .await??
        }
        None => Seed::default(),
    };
    let feed = ServiceFeed::start(&proxy_client, seed, &token);
    let dns_feed = dns::Feed { table: feed.table.clone(), changes: feed.subscribe() };
    let mut view = NodeView::new(
        Place { node: name.as_str().into(), zone: registered.zone() },
        args.node_ip.clone(),
        cluster.pod_cidrs.clone(),
        cluster.service_cidrs.clone(),
    );
    view.relay_localhost = args.localhost_node_ports;
    view.ipvs.scheduler = args.ipvs_scheduler.clone();
    // The addresses that this mode puts on an interface of each node are announced by one of them.
    view.ipvs.strict_arp = true;
    view.selection = args.endpoint_selection;
    view.direct_return = args.dsr;
    let (views, view_seen) = watch::channel(Arc::new(view));
    let (proxy_status, proxy_seen) = watch::channel(proxy::Status::default());
    let (lost_nodes, lost_seen) = watch::channel(BTreeSet::new());
    let health = Arc::new(proxy::Health::new(PROXY_SYNC_PERIOD));
    let metrics: Arc<proxy::Metrics> = Arc::default();
    let (said, own_said) = watch::channel(None);
    let mut switchable = (None, None);
    if let Some(mode) = mode {
        let proxy_events = Recorder::new(&proxy_client, "fairlead-proxy", &name);
        let (switch, requests) = proxy::switch();
        let is_switchable = args.feature_gates.is_on(Feature::HandOver);
        switchable = (is_switchable.then_some(switch), Some(proxy_events.clone()));
        let recorder = proxy_events.clone();
        let watching = proxy::Watching {
            first_timeout: args.first_packet_timeout.map(std::time::Duration::from_millis),
            lost_nodes: Some(lost_seen),
            notices: Some(Arc::new(move |notice| standalone::events::tell(&recorder, notice))),
            ..proxy::Watching::by(&args.feature_gates)
        };
        let proxy_config = proxy::Config {
            mode,
            node: view_seen.clone(),
            namespace: None,
            hooks: Some(hooks.clone()),
            metrics: metrics.clone(),
            watching,
        };
        let subscribe = || proxy::Feed { table: feed.table.clone(), changes: feed.subscribe() };
        let (proxy_feed, check_feed) = (subscribe(), subscribe());
        let checks = proxy::HealthChecks {
            namespace: None,
            node: view_seen.clone(),
            feed: check_feed,
            health: health.clone(),
            events: Some(proxy_events.clone()),
        };
        tasks.spawn(proxy::serve_health_checks(checks, token.clone()));
        // As kube-proxy does: probes for everybody, metrics for this host.
        let any = match args.node_ip.iter().all(IpAddr::is_ipv4) {
            true => IpAddr::from([0u8; 4]),
            false => IpAddr::from([0u8; 16]),
        };
        if let Some(listener) = standalone::listen("probes", SocketAddr::new(any, HEALTHZ_PORT), false)? {
            let respond = proxy::probes(health.clone(), metrics.clone());
            tasks.spawn(proxy::http::serve(listener, respond, token.clone()));
        }
        let local = SocketAddr::from(([127, 0, 0, 1], METRICS_PORT));
        if let Some(listener) = standalone::listen("metrics", local, false)? {
            let scraped = standalone::Scraped {
                mode,
                features: args.feature_gates.clone(),
                hooks: hooks.clone(),
                metrics: metrics.clone(),
                feed: feed.clone(),
                view: view_seen.clone(),
                status: proxy_seen.clone(),
            };
            tasks.spawn(proxy::http::serve(listener, scraped.respond(), token.clone()));
        }
        let ranges = reconcile::watch(&proxy_client, &SERVICE_CIDRS, Scope::all());
        tasks.spawn(service_cidrs::follow(ranges, views.clone(), token.clone()));
        tasks.spawn(warnings::tell(feed.clone(), feed.subscribe(), proxy_events.clone(), token.clone()));
        if args.feature_gates.is_on(Feature::Barrier) {
            tasks.spawn(barrier::report(proxy_client.clone(), name.clone(), proxy_seen.clone(), token.clone()));
        }
        let (client, status) = (node_client.clone(), proxy_seen.clone());
        tasks.spawn(dsr::announce(client, name.clone(), args.dsr, status, own_said, token.clone()));
        let about = ObjectRef::new("v1", "Node", "", &name, &name);
        tasks.spawn(standalone::events::follow(proxy_seen.clone(), proxy_events, about, token.clone()));
        let (health, status, health_token) = (health.clone(), proxy_seen.clone(), token.clone());
        tasks.spawn(async move { health.follow(status, health_token).await });
        let proxy_token = token.clone();
        tasks.spawn(async move {
            let ended = proxy::run_switchable(proxy_config, proxy_feed, proxy_status, requests, proxy_token).await;
            if let Err(error) = ended {
                warn!(%error, "the proxy ended");
            }
        });
    }
    let (ready, ready_seen) = watch::channel(false);
    let (ingress, ingress_wanted) = watch::channel(false);
    let nodes: Cache<Node> = {
        let own = name.clone();
        reconcile::feed(
            &podnet_client,
            &NODES,
            Scope::all(),
            &token,
            move |before: Option<&Arc<Node>>, after: Option<&Arc<Node>>| {
                if let Some(node) = before.or(after) {
                    let name = node.name();
                    let is_lost = after.is_some_and(|node| node.has_no_heartbeat());
                    lost_nodes.send_if_modified(|lost: &mut BTreeSet<Arc<str>>| match is_lost {
                        true => lost.insert(name.into()),
                        false => lost.remove(name),
                    });
                    if name == own {
                        let now = after.map(|node| node.annotation(services::DSR_ANNOTATION).map(str::to_owned));
                        said.send_if_modified(|said| std::mem::replace(said, now.clone()) != now);
                    } else {
                        views.send_if_modified(|view| dsr::notice_in(view, name, after.map(Arc::as_ref)));
                    }
                }
                if let Some(node) = after.filter(|node| node.name() == own) {
                    ready.send_replace(node.is_ready());
                    health.set_taints(node.taints());
                    ingress.send_replace(node.wants_ingress());
                    views.send_if_modified(|view| {
                        let zone = node.zone();
                        let changed = view.place.zone != zone;
                        if changed {
                            let mut next = (**view).clone();
                            next.place.zone = zone;
                            *view = Arc::new(next);
                        }
                        changed
                    });
                }
            },
        )
    };
    {
        // The list of peers follows the cache; heartbeats do not change it.
        let (nodes, token) = (nodes.clone(), token.clone());
        let changed = reconcile::watch::<Value>(&podnet_client, &NODES, Scope::all());
        tasks.spawn(follow_peers(nodes, changed, peers, token));
    }
    let mut dns_config =
        DnsConfig::new(args.node_ip.iter().map(|ip| Listen::Address(SocketAddr::new(*ip, server::DNS_PORT))).collect());
    dns_config.zone = cluster.dns.domain.clone();
    dns_config.reverse = cluster.service_cidrs.iter().chain(&cluster.pod_cidrs).copied().collect();
    dns_config.search_clients = cluster.pod_cidrs.clone();
    args.dns.apply(&mut dns_config)?;
    dns_config.listen.extend(crate::dns::local_address(&args.dns)?);
    crate::dns::servers_of_pods(&args.dns, &mut cluster.dns.servers);
    dns_config.metrics = args
        .node_ip
        .first()
        .map(|ip| std::net::TcpListener::bind(SocketAddr::new(*ip, server::DNS_METRICS_PORT)))
        .transpose()
        .context("listen for DNS metrics")?;
    if let Some(outer) = &outer {
        dns_config.sockets = Arc::new(OuterSockets(outer.clone()));
    }
    let dns_client = join::component_client(&node_client, &args.server, &identity, "fairlead-dns").await?;
    let (dns_client, outage) = crate::dns::observed(dns_client);
    dns_config.outage = Some(outage);
    crate::dns::follow_objects(&dns_client, &mut dns_config, &args.dns, &mut tasks, &token);
    let dns_server = dns::Server::bind(dns_config, dns_feed).await.context("start cluster DNS")?;
    let dns_token = token.clone();
    tasks.spawn(async move {
        dns_server.run(dns_token).await;
    });

    let ingress_client = join::component_client(&node_client, &args.server, &identity, "fairlead-ingress").await?;
    let ingress_node = crate::ingress::Node { name: name.clone(), addresses: args.node_ip.clone() };
    tasks.spawn(crate::ingress::serve_while_labelled(
        ingress_client,
        feed.clone(),
        args.ingress.clone(),
        ingress_node,
        ingress_wanted,
        token.clone(),
    ));

    if args.load_balancer.is_on() {
        let client = join::component_client(&node_client, &args.server, &identity, "fairlead-layer2").await?;
        let node = crate::loadbalancer::Node { name: name.clone(), addresses: args.node_ip.clone() };
        let metrics = Arc::default();
        let at = args.node_ip.first().map(|ip| SocketAddr::new(*ip, crate::loadbalancer::METRICS_PORT));
        if let Some(listener) =
            at.map(|at| standalone::listen("load balancer metrics", at, false)).transpose()?.flatten()
        {
            let respond = crate::loadbalancer::respond(Arc::clone(&metrics), name.clone());
            tasks.spawn(proxy::http::serve(listener, respond, token.clone()));
        }
        tasks.spawn(crate::loadbalancer::announce(client, feed.clone(), node, metrics, token.clone()));
    }

    // Runtime and kubelet.
    let dialer = match &outer {
        Some(outer) => outer::dialer(outer.clone()),
        None => runtime::image::tcp_dialer(),
    };
    let images_dir = args.images.clone().unwrap_or_else(|| dir.join("images"));
    let builtin = Builtin::open(
        BuiltinConfig {
            root: dir.join("runtime"),
            run: args.run_dir.clone(),
            images: images_dir,
            cgroup_parent: args.cgroup.clone(),
            helper: std::env::current_exe()?,
            helper_arguments: vec!["pod-helper".into()],
            pull: PullConfig {
                dialer,
                insecure_registries: args.insecure_registry.clone(),
                certificate_authorities: None,
            },
        },
        network.podnet.clone(),
    )
    .await?;
    let runtime = Arc::new(builtin);
    let kubelet_config = KubeletConfig {
        node_name: name.clone(),
        node_ips: args.node_ip.clone(),
        root: dir.join("kubelet"),
        logs: dir.join("pods"),
        cluster_dns: cluster.dns,
        resolv_conf: "/etc/resolv.conf".into(),
        labels: labels
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.as_str().unwrap_or("").to_string()))
            .collect(),
        taints: Vec::new(),
        pod_cidrs: pod_cidrs.iter().map(ToString::to_string).collect(),
        max_pods: 110,
        port: KUBELET_PORT,
        version: "v1.33.0".into(),
    };
    {
        let (client, runtime, token) = (node_client.clone(), runtime.clone(), token.clone());
        tasks.spawn(async move {
            if let Err(error) = kubelet::run(kubelet_config, client, runtime.clone(), runtime, token).await {
                warn!(%error, "the kubelet ended");
            }
        });
    }

    // Logs, exec and port-forward, for the API server.
    let kubelet_server = kubelet::Server::new(runtime.clone(), dir.join("pods"));
    let tls = serve::tls_config(kept.serving.clone(), &identity.ca_pem)?;
    for ip in &args.node_ip {
        let listener = tokio::net::TcpListener::bind(SocketAddr::new(*ip, KUBELET_PORT))
            .await
            .with_context(|| format!("listen on {ip} port {KUBELET_PORT}; is another kubelet running?"))?;
        let config = kubelet::ServerConfig { listener, tls: tls.clone(), authorize: authorize() };
        tasks.spawn(kubelet::serve(config, kubelet_server.clone(), token.clone()));
    }

    // The local socket.
    let state = Arc::new(Local {
        name: name.clone(),
        first_mode: mode,
        switch: switchable.0,
        events: switchable.1,
        feed: feed.clone(),
        view: view_seen,
        hooks,
        proxy: proxy_seen.clone(),
        metrics,
        images: runtime.clone(),
        store: runtime.images().clone(),
    });
    tasks.spawn(Socket::bind(&dir.join("agent.sock"))?.serve(state, token.clone()));
    let mut network_tasks = network.tasks;
    tasks.spawn(async move { while network_tasks.join_next().await.is_some() {} });
    tasks.spawn(async move {
        // Its end is the token's.
        kept.task.await.ok();
    });

    let mut ready = ready_seen;
    ready.wait_for(|ready| *ready).await.context("nobody follows this node any more")?;
    if mode.is_some() {
        let mut synced = proxy_seen;
        synced.wait_for(|s| s.synced).await.context("the proxy ended before its first commit")?;
    }
    info!(node = name, "the node is ready");
    if args.announce {
        local::announce(&json!({"node": name}).to_string())?;
    }
    local::wait_for_end().await?;
    info!("ending; pods go on");
    token.cancel();
    let drained =
        tokio::time::timeout(std::time::Duration::from_secs(5), async { while tasks.join_next().await.is_some() {} });
    if drained.await.is_err() {
        warn!("some tasks did not end in time");
    }
    Ok(ExitCode::SUCCESS)
}

pub const KUBELET_PORT: u16 = 10250;
/// A change that waits twice as long for its commit makes a node's health check ports say so.
const PROXY_SYNC_PERIOD: std::time::Duration = std::time::Duration::from_secs(30);

async fn follow_peers(
    nodes: Cache<Node>,
    mut changed: tokio::sync::mpsc::Receiver<reconcile::Change<Value>>,
    peers: watch::Sender<Vec<PeerNode>>,
    token: CancellationToken,
) {
    nodes.synced().await;
    loop {
        let list: Vec<PeerNode> = nodes.list().iter().map(|node| peer(node)).collect();
        peers.send_if_modified(|known| {
            let changed = *known != list;
            *known = list;
            changed
        });
        tokio::select! {
            change = changed.recv() => if change.is_none() { return },
            () = token.cancelled() => return,
        }
    }
}

/// A node as the pod network sees it.
fn peer(node: &Node) -> PeerNode {
    PeerNode { name: node.name().to_owned(), addresses: node.internal_addresses(), pod_cidrs: node.pod_cidrs() }
}

/// Only the API server, and administrators with a certificate, may ask a kubelet; the API server has authorized its own
/// callers already.
fn authorize() -> kubelet::Authorize {
    Arc::new(|caller, _, path| {
        let identity = caller.certificates.first().and_then(|c| authenticate::from_certificate(c));
        let allowed = identity.as_ref().is_some_and(Identity::is_master);
        let who = identity.map_or("an unknown caller".to_string(), |i| i.user);
        Box::pin(async move {
            if allowed {
                Ok(())
            } else {
                Err((403, format!("{who} may not ask this kubelet for {path}; ask the API server")))
            }
        })
    })
}
