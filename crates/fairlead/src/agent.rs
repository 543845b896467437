//! A node: kubelet, runtime, pod network, proxy and DNS, in one process, each with its own identity.

use crate::proxy as standalone;
use crate::{barrier, cli, explain, join, local, serve, server, top, warnings};
use anyhow::{Context, bail};
use api::kinds::{CONFIG_MAPS, NODES};
use api::{ObjectExt, object::Metadata};
use apiserver::Identity;
use apiserver::auth::authenticate;
use clap::{Args, ValueEnum};
use dns::{DnsConfig, Listen, SocketMaker, Upstreams};
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use kubelet::{ClusterDns, KubeletConfig};
use linux::cgroup_v1v2::Hierarchies;
use linux::netns::Netns;
use podnet::{OverlayKind, PeerNode, PodNetConfig};
use proxy::configuration::{HEALTHZ_PORT, METRICS_PORT};
use proxy::{Mode, NodeView};
use reconcile::{Api, Cache, Named, ObjectRef, Recorder, Scope, ServiceFeed};
use runtime::image::PullConfig;
use runtime::{Builtin, BuiltinConfig, ImageService};
use serde::Deserialize;
use serde_json::{Value, json};
use services::{Place, Seed};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
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
    #[arg(long, default_value = "rr", value_parser = parse_scheduler)]
    pub ipvs_scheduler: proxy::Scheduler,
    /// In the ipvs mode, answer ARP only for addresses of the interface that was asked.
    #[arg(long)]
    pub ipvs_strict_arp: bool,
    /// Node ports answer on 127.0.0.1 and ::1, too, through a relay of this process.
    #[arg(long)]
    pub localhost_node_ports: bool,
    /// How pods of other nodes are reached.
    #[arg(long, value_enum, default_value = "host-gw")]
    pub overlay: Overlay,
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

fn parse_scheduler(text: &str) -> Result<proxy::Scheduler, String> {
    text.parse().map_err(|error: linux::ipvs::Error| error.to_string())
}

pub fn parse_mode(text: &str) -> Result<Mode, String> {
    text.parse().map_err(|e: proxy::Error| e.to_string())
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

/// Where the node's own sockets are, and a place for what outlives the agent.
fn proxy_hooks(args: &AgentArgs, dir: &Path) -> anyhow::Result<proxy::Hooks> {
    let mounted = Hierarchies::mounted().context("look for the cgroup2 mount")?.v2;
    let root = mounted.unwrap_or_else(|| "/sys/fs/cgroup".into());
    let cgroup = root.join(args.node_cgroup.strip_prefix("/").unwrap_or(&args.node_cgroup));
    Ok(proxy::Hooks { cgroup, pins: dir.join("bpf") })
}

/// What an agent keeps of a Node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Node {
    metadata: Metadata,
    spec: NodeSpec,
    status: NodeStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NodeSpec {
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<IpNet>,
    taints: Vec<Taint>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Taint {
    key: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct NodeStatus {
    addresses: Vec<NodeAddress>,
    conditions: Vec<NodeCondition>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct NodeCondition {
    r#type: String,
    status: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct NodeAddress {
    r#type: String,
    address: String,
}

impl Named for Node {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Node {
    fn peer(&self) -> PeerNode {
        let internal = self.status.addresses.iter().filter(|a| a.r#type == "InternalIP");
        PeerNode {
            name: self.metadata.name.clone(),
            addresses: internal.filter_map(|a| a.address.parse().ok()).collect(),
            pod_cidrs: self.spec.pod_cidrs.clone(),
        }
    }

    fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|c| c.r#type == "Ready" && c.status == "True")
    }

    /// The node lifecycle controller waits for its Lease in vain.
    fn has_no_heartbeat(&self) -> bool {
        self.status.conditions.iter().any(|c| c.r#type == "Ready" && c.status == "Unknown")
    }

    fn zone(&self) -> Option<Arc<str>> {
        self.metadata.labels.get("topology.kubernetes.io/zone").map(|z| z.as_str().into())
    }
}

/// Sockets to upstream name servers, made where the cluster was started.
struct OuterSockets(Netns);

impl SocketMaker for OuterSockets {
    fn udp(&self, server: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
        let any: IpAddr = if server.is_ipv4() { IpAddr::from([0u8; 4]) } else { IpAddr::from([0u8; 16]) };
        self.0.udp_bind(SocketAddr::new(any, 0)).map_err(std::io::Error::other)
    }

    fn tcp(&self, server: SocketAddr) -> std::io::Result<tokio::net::TcpSocket> {
        Ok(tokio::net::TcpSocket::from_std_stream(self.0.tcp_socket(server).map_err(std::io::Error::other)?))
    }
}

/// What the server tells every agent: the cluster's ranges and its DNS.
struct Cluster {
    pod_cidrs: Vec<IpNet>,
    service_cidrs: Vec<IpNet>,
    dns: ClusterDns,
}

async fn cluster(node: &kube::Client) -> anyhow::Result<Cluster> {
    let settings =
        Api::new(node, &CONFIG_MAPS).get("kube-system", "fairlead").await.context("read the cluster's settings")?;
    let list = |key: &str| {
        settings
            .text(&format!("/data/{key}"))
            .split(',')
            .filter(|t| !t.is_empty())
            .map(str::to_string)
            .collect::<Vec<_>>()
    };
    let nets = |key: &str| list(key).iter().map(|t| t.parse::<IpNet>()).collect::<Result<Vec<_>, _>>();
    Ok(Cluster {
        pod_cidrs: nets("podCIDRs")?,
        service_cidrs: nets("serviceCIDRs")?,
        dns: ClusterDns {
            servers: list("clusterDNS").iter().map(|t| t.parse()).collect::<Result<Vec<_>, _>>()?,
            domain: settings.text("/data/clusterDomain").to_string(),
        },
    })
}

/// Makes sure the Node exists, and returns its share of the pod ranges.
async fn register(node: &kube::Client, name: &str, wanted: &[IpNet], labels: &Value) -> anyhow::Result<Vec<IpNet>> {
    let nodes = Api::new(node, &NODES);
    let mut object =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": {}});
    if let Some(first) = wanted.first() {
        object["spec"] = json!({"podCIDR": first, "podCIDRs": wanted});
    }
    let live = match nodes.create("", &object).await {
        Ok(created) => created,
        Err(error) if error.is_already_exists() => nodes.get("", name).await?,
        Err(error) => return Err(error).context("register this node"),
    };
    let node: Node = serde_json::from_value(live).context("read this node")?;
    if node.spec.pod_cidrs.is_empty() {
        bail!("node {name} has no pod range; start the server with --pod-cidr");
    }
    Ok(node.spec.pod_cidrs)
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
    let cluster = cluster(&node_client).await?;
    let mut labels =
        json!({"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"});
    for label in &args.label {
        let (key, value) = label.split_once('=').with_context(|| format!("--label {label:?} is not KEY=VALUE"))?;
        labels[key] = json!(value);
    }
    let pod_cidrs = register(&node_client, &name, &args.pod_cidr, &labels).await?;

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
    let hooks = proxy_hooks(&args, &dir)?;
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
    let mut view = NodeView::new(
        Place { node: name.as_str().into(), zone: None },
        args.node_ip.clone(),
        cluster.pod_cidrs.clone(),
        cluster.service_cidrs.clone(),
    );
    view.relay_localhost = args.localhost_node_ports;
    view.ipvs.scheduler = args.ipvs_scheduler.clone();
    view.ipvs.strict_arp = args.ipvs_strict_arp;
    let (views, view_seen) = watch::channel(Arc::new(view));
    let (proxy_status, proxy_seen) = watch::channel(proxy::Status::default());
    let (lost_nodes, lost_seen) = watch::channel(BTreeSet::new());
    let health = Arc::new(proxy::Health::new(PROXY_SYNC_PERIOD));
    let mut switchable = (None, None);
    if let Some(mode) = mode {
        let proxy_events = Recorder::new(&proxy_client, "fairlead-proxy", &name);
        let (switch, requests) = proxy::switch();
        switchable = (Some(switch), Some(proxy_events.clone()));
        let metrics: Arc<proxy::Metrics> = Arc::default();
        let recorder = proxy_events.clone();
        let watching = proxy::Watching {
            lost_nodes: Some(lost_seen),
            notices: Some(Arc::new(move |notice| standalone::tell(&recorder, notice))),
            ..proxy::Watching::default()
        };
        let (node, metrics_of_run) = (view_seen.clone(), metrics.clone());
        let proxy_config = proxy::Config {
            mode,
            node,
            namespace: None,
            hooks: Some(hooks.clone()),
            metrics: metrics_of_run,
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
            let respond = standalone::scrapes(mode, metrics, feed.clone(), view_seen.clone(), proxy_seen.clone());
            tasks.spawn(proxy::http::serve(listener, respond, token.clone()));
        }
        tasks.spawn(warnings::tell(feed.clone(), feed.subscribe(), proxy_events.clone(), token.clone()));
        tasks.spawn(barrier::report(proxy_client.clone(), name.clone(), proxy_seen.clone(), token.clone()));
        let about = ObjectRef::new("v1", "Node", "", &name, &name);
        tasks.spawn(standalone::tell_errors(proxy_seen.clone(), proxy_events, about, token.clone()));
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
    let nodes: Cache<Node> = {
        let own = name.clone();
        reconcile::feed(
            &podnet_client,
            &NODES,
            Scope::all(),
            &token,
            move |before: Option<&Arc<Node>>, after: Option<&Arc<Node>>| {
                if let Some(node) = before.or(after) {
                    let name = node.metadata.name.as_str();
                    let is_lost = after.is_some_and(|node| node.has_no_heartbeat());
                    lost_nodes.send_if_modified(|lost: &mut BTreeSet<Arc<str>>| match is_lost {
                        true => lost.insert(name.into()),
                        false => lost.remove(name),
                    });
                }
                if let Some(node) = after.filter(|n| n.metadata.name == own) {
                    ready.send_replace(node.is_ready());
                    health.set_taints(node.spec.taints.iter().map(|taint| taint.key.as_str()));
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
    dns_config.upstreams = Upstreams::ResolvConf("/etc/resolv.conf".into());
    dns_config.metrics = args
        .node_ip
        .first()
        .map(|ip| std::net::TcpListener::bind(SocketAddr::new(*ip, server::DNS_METRICS_PORT)))
        .transpose()
        .context("listen for DNS metrics")?;
    if let Some(outer) = &outer {
        dns_config.sockets = Arc::new(OuterSockets(outer.clone()));
    }
    let dns_server = dns::Server::bind(dns_config, feed.table.clone()).await.context("start cluster DNS")?;
    let dns_token = token.clone();
    tasks.spawn(async move {
        dns_server.run(dns_token).await;
    });

    // Runtime and kubelet.
    let dialer = match &outer {
        Some(outer) => outer_dialer(outer.clone()),
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
        images: runtime.clone(),
        store: runtime.images().clone(),
    });
    let socket = dir.join("agent.sock");
    tasks.spawn(serve_local(bind_local(&socket)?, state, token.clone()));
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
    // Another agent may have taken the path meanwhile; then it is not ours to remove.
    std::fs::remove_file(&socket).ok();
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
        let list: Vec<PeerNode> = nodes.list().iter().map(|n| n.peer()).collect();
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

fn outer_dialer(outer: Netns) -> runtime::image::Dialer {
    Arc::new(move |host, port| {
        let outer = outer.clone();
        Box::pin(async move {
            // Names are looked up with the host's resolv.conf, in the host's namespace.
            let place = outer.clone();
            let found = tokio::task::spawn_blocking(move || {
                place.run(|| {
                    std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), port)).map(Iterator::collect::<Vec<_>>)
                })
            })
            .await
            .map_err(std::io::Error::other)?
            .map_err(std::io::Error::other)??;
            let mut last = std::io::Error::other("the registry's name has no address");
            for address in found {
                match outer.tcp_connect(address).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = std::io::Error::other(error),
                }
            }
            Err(last)
        }) as BoxFuture<'static, _>
    })
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

/// What local commands may ask.
struct Local {
    name: String,
    /// The mode that the agent was started in. `None`: Services are another process's affair.
    first_mode: Option<Mode>,
    switch: Option<proxy::Switch>,
    events: Option<Recorder>,
    feed: ServiceFeed,
    view: watch::Receiver<Arc<NodeView>>,
    hooks: proxy::Hooks,
    proxy: watch::Receiver<proxy::Status>,
    images: Arc<Builtin>,
    store: runtime::image::ImageStore,
}

impl Local {
    fn mode(&self) -> Option<Mode> {
        self.proxy.borrow().mode.or(self.first_mode)
    }

    /// Returns when the node is in the mode, or says why it stays in its own.
    async fn change_mode(&self, mode: Mode) -> anyhow::Result<()> {
        let from = self.mode().context(NO_PROXY)?;
        let (switch, events) = (self.switch.as_ref().context(NO_PROXY)?, self.events.as_ref().context(NO_PROXY)?);
        let node = ObjectRef::new("v1", "Node", "", &self.name, "");
        let outcome = switch.to(mode).await;
        match &outcome {
            Ok(()) if from == mode => {}
            Ok(()) => {
                let message = format!("Services of this node have changed from {from} to {mode} mode");
                events.event(&node, reconcile::EventKind::Normal, "ProxyModeChanged", message);
            }
            Err(error) => events.event(&node, reconcile::EventKind::Warning, "ProxyModeNotChanged", error.to_string()),
        }
        Ok(outcome?)
    }
}

fn bind_local(path: &std::path::Path) -> anyhow::Result<tokio::net::UnixListener> {
    // A socket file outlives its process; nobody answers on an old one.
    std::fs::remove_file(path).ok();
    let listener = tokio::net::UnixListener::bind(path).with_context(|| {
        format!("listen on {}; a socket's path has at most 107 bytes, choose a shorter --data-dir", path.display())
    })?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

async fn serve_local(listener: tokio::net::UnixListener, state: Arc<Local>, token: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = token.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else { continue };
        let state = state.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let state = state.clone();
                async move { Ok::<_, Infallible>(answer(&state, request).await) }
            });
            // A local command that goes away early is no fault of ours.
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok();
        });
    }
}

async fn answer(state: &Local, request: Request<hyper::body::Incoming>) -> Response<Full<bytes::Bytes>> {
    let result = local_request(state, request).await;
    let (code, text) = match result {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}")),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = code;
    response
}

const NO_PROXY: &str = "Services are another process's affair on this node (--proxy-mode none)";

async fn local_request(state: &Local, request: Request<hyper::body::Incoming>) -> anyhow::Result<String> {
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let body = request.into_body().collect().await?.to_bytes();
    match (&method, path.as_str()) {
        (&Method::GET, "/status") => {
            let proxy = state.proxy.borrow().clone();
            let table = state.feed.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            Ok(json!({
                "node": state.name, "proxyMode": state.mode().map_or("none".to_owned(), |mode| mode.to_string()),
                "proxy": {"synced": proxy.synced, "commits": proxy.commits, "pending": proxy.pending, "error": proxy.error, "about": proxy.about,
                    "ejections": proxy.ejections, "retries": proxy.retries, "watchError": proxy.watch_error,
                    "ejected": proxy.ejected.iter().map(|(address, _)| address.to_string()).collect::<Vec<_>>()},
                "services": table.services().count(), "synced": table.is_synced(),
            })
            .to_string())
        }
        (&Method::POST, "/mode") => {
            state.change_mode(std::str::from_utf8(&body)?.parse()?).await?;
            Ok(String::new())
        }
        (&Method::GET, "/plan") => {
            let view = state.view.borrow().clone();
            let table = state.feed.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            Ok(proxy::dump(state.mode().context(NO_PROXY)?, &table, &view))
        }
        (&Method::GET, "/traffic") => {
            let mode = state.mode().context(NO_PROXY)?;
            if matches!(mode, Mode::Userspace | Mode::Ebpf | Mode::Ipvs) {
                bail!("the {mode} mode does not count what goes through each Service; nftables and iptables do");
            }
            let table = state.feed.table.clone();
            let mut view = NodeView::clone(&state.view.borrow());
            view.ejected.extend(&state.proxy.borrow().ejected);
            let traffic = tokio::task::spawn_blocking(move || {
                let table = table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                proxy::traffic(None, &table, &view)
            })
            .await??;
            Ok(serde_json::to_string(&top::Traffic::from(traffic))?)
        }
        (&Method::POST, "/explain") => {
            let question: explain::Question = serde_json::from_slice(&body).context("read the question")?;
            let mode = state.mode().context(NO_PROXY)?;
            let table = state.feed.table.clone();
            let mut view = NodeView::clone(&state.view.borrow());
            let pending = {
                let proxy = state.proxy.borrow();
                view.ejected.extend(&proxy.ejected);
                proxy.pending
            };
            let hooks = state.hooks.clone();
            let report = tokio::task::spawn_blocking(move || {
                let (mut report, frontends) = {
                    let table = table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let frontends: Vec<_> = table.frontends().cloned().collect();
                    (proxy::explain::report(mode, &table, &view, &question.packet())?, frontends)
                };
                // The kernel is asked without holding up those who follow the table.
                let mut drift = proxy::explain::drift(mode, &frontends, &view, None, Some(&hooks))?;
                if pending > 0 {
                    drift.push(format!("{pending} changed ports of Services are being committed"));
                }
                report.drift = Some(drift);
                anyhow::Ok(report)
            })
            .await??;
            Ok(serde_json::to_string(&report)?)
        }
        (&Method::GET, "/images") => {
            let images = state.images.list_images().await?;
            Ok(json!(
                images.iter().map(|i| json!({"id": i.id, "names": i.repo_tags, "size": i.size})).collect::<Vec<_>>()
            )
            .to_string())
        }
        (&Method::POST, "/images") => {
            let archive = PathBuf::from(String::from_utf8(body.to_vec())?);
            let store = state.store.clone();
            let imported = tokio::task::spawn_blocking(move || {
                let file = std::fs::File::open(&archive).with_context(|| format!("open {}", archive.display()))?;
                Ok::<_, anyhow::Error>(store.import(file, None)?)
            })
            .await??;
            Ok(json!(imported.iter().map(|i| i.status().repo_tags).collect::<Vec<_>>()).to_string())
        }
        (&Method::DELETE, "/images") => {
            state.images.remove_image(std::str::from_utf8(&body)?).await?;
            Ok(String::new())
        }
        _ => bail!("the agent has no {method} {path}"),
    }
}
