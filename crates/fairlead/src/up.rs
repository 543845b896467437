//! `up`: a whole cluster on this machine, made of the same server and agents as on real hosts.

use crate::agent::{NodeProxy, Overlay};
use crate::config::{ClusterConfig, Publish};
use crate::dns::DnsOptions;
use crate::ingress::{self, IngressOptions};
use crate::loadbalancer::LoadBalancerOptions;
use crate::{cli, down, local, server};
use anyhow::{Context, bail};
use clap::Args;
use ipnet::IpNet;
use lab::{Lab, LabConfig};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

#[derive(Args, Debug, Clone)]
pub struct UpArgs {
    #[command(flatten)]
    pub data: cli::DataDir,
    /// How many nodes.
    #[arg(long, default_value_t = 1)]
    pub nodes: u32,
    /// How Services reach the kernel: nftables, iptables, ipvs, ebpf, userspace, or none if each node's proxy is started by
    /// somebody else.
    #[arg(long, default_value = "nftables")]
    pub proxy_mode: String,
    /// Node ports answer on 127.0.0.1 and ::1 of each node, too, through a relay of its agent.
    #[arg(long)]
    pub localhost_node_ports: bool,
    /// How each node's ebpf mode chooses among endpoints: random, maglev or least-load; the annotation
    /// fairlead.io/endpoint-selection of a Service comes before it.
    #[arg(long, default_value = "random")]
    pub endpoint_selection: services::Selection,
    /// Endpoints on other nodes answer clients from outside without the node that was asked (DSR), in the ebpf mode; the
    /// annotation fairlead.io/dsr of a Service comes before it.
    #[arg(long)]
    pub dsr: bool,
    /// Switches of every node's proxy, NAME=false: EndpointEjection, FirstPacketRetry, ServiceTraffic, EndPolicy,
    /// ModeHandOver, RemovalBarrier.
    #[arg(long, value_name = "LIST", default_value = "")]
    pub feature_gates: proxy::Features,
    /// How pods of other nodes are reached.
    #[arg(long, value_enum, default_value = "host-gw")]
    pub overlay: Overlay,
    /// Ranges of pod addresses: one, or one of each family.
    #[arg(long, value_delimiter = ',', default_value = "10.244.0.0/16,fd00:10:244::/56")]
    pub pod_cidr: Vec<IpNet>,
    /// Ranges of cluster IPs; the first is the primary family.
    #[arg(long, value_delimiter = ',', default_value = "10.96.0.0/12,fd00:10:96::/112")]
    pub service_cidr: Vec<IpNet>,
    /// Ranges of node addresses.
    #[arg(long, value_delimiter = ',', default_value = "192.168.49.0/24,fd00:c0a8:31::/64")]
    pub node_cidr: Vec<IpNet>,
    /// A loopback port that leads to a node port: [ADDR:]PORT:NODEPORT; may be repeated.
    #[arg(long)]
    pub publish: Vec<Publish>,
    /// Let nodes and pods reach the real network: one cable to this machine and one masquerade rule on it, until `down`.
    #[arg(long)]
    pub uplink: bool,
    /// Where objects are kept: `log` (in the data directory) or `etcd=URL[,URL…]`.
    #[arg(long, default_value = "log")]
    pub store: String,
    /// host:port of registries that are spoken to without TLS.
    #[arg(long, value_name = "HOST:PORT")]
    pub insecure_registry: Vec<String>,
    #[command(flatten)]
    pub dns: DnsOptions,
    #[command(flatten)]
    pub ingress: IngressOptions,
    #[command(flatten)]
    pub load_balancer: LoadBalancerOptions,
    /// Return when the cluster is ready, and leave it running.
    #[arg(long)]
    pub detach: bool,
}

const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    args.dns.check()?;
    let proxy = args.proxy_mode.parse::<NodeProxy>().map_err(|e| anyhow::anyhow!("{e}"))?;
    if !nix::unistd::geteuid().is_root() {
        bail!("`fairlead up` makes namespaces and cgroups, which only root may; run it with sudo");
    }
    // What this kernel lacks is said here, not in the log of every node.
    if args.proxy_mode == ::proxy::Mode::Ipvs.to_string() {
        ::proxy::found(::proxy::Mode::Ipvs, None, None)?;
    }
    let started = Instant::now();
    let dir = &args.data.data_dir;
    crate::pki::private_directory(dir)?;
    let held = ClusterConfig::load(dir)?;
    let nodes = held.as_ref().map_or(args.nodes, |h| h.nodes.max(args.nodes));
    let lab = Lab::create(LabConfig {
        data_dir: dir.clone(),
        nodes,
        node_cidrs: args.node_cidr.clone(),
        pod_cidrs: args.pod_cidr.clone(),
        service_cidrs: args.service_cidr.clone(),
        uplink: args.uplink,
    })?;
    let config = ClusterConfig {
        api_port: match &held {
            Some(held) => held.api_port,
            None => free_port()?,
        },
        // Another mode for the cluster is meant for all of its nodes.
        node_proxy_modes: match &held {
            Some(held) if held.proxy_mode == args.proxy_mode => held.node_proxy_modes.clone(),
            _ => BTreeMap::new(),
        },
        proxy_mode: args.proxy_mode.clone(),
        overlay: if args.overlay == Overlay::Vxlan { "vxlan" } else { "host-gw" }.into(),
        store: args.store.clone(),
        publish: args.publish.iter().map(|p| format!("{}:{}", p.listen, p.node_port)).collect(),
        nodes,
        localhost_node_ports: args.localhost_node_ports,
        dns: args.dns.clone().absolute()?,
        ingress: args.ingress.clone(),
        load_balancer: args.load_balancer.clone(),
        feature_gates: args.feature_gates.to_string(),
        endpoint_selection: args.endpoint_selection.to_string(),
        dsr: args.dsr,
    };
    config.save(dir)?;
    let outcome = bring_up(&args, &lab, &config).and_then(|()| match proxy {
        NodeProxy::Ours(_) => wait_for_dns(&lab, &args.service_cidr),
        // Cluster DNS has a cluster IP, to which nothing leads yet.
        NodeProxy::Others => Ok(()),
    });
    if let Err(error) = outcome {
        // What was half made is ended, so that nothing is left and the next `up` begins clean.
        if !args.detach {
            Lab::destroy(lab.id()).ok();
        }
        return Err(error);
    }
    println!(
        "cluster is ready after {:.1} s: {} node(s), {} mode",
        started.elapsed().as_secs_f64(),
        nodes,
        args.proxy_mode
    );
    println!("export KUBECONFIG={}", dir.join("kubeconfig").display());
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    println!("press Ctrl-C to end it");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(local::wait_for_end())?;
    println!("ending");
    down::end(lab.id())?;
    Ok(ExitCode::SUCCESS)
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))
        .context("find a free port for the API server")?
        .local_addr()?
        .port())
}

/// A process that was started, and the pipe on which it says that it is ready.
struct Started {
    role: String,
    child: Option<Child>,
    log: std::path::PathBuf,
}

fn bring_up(args: &UpArgs, lab: &Lab, config: &ClusterConfig) -> anyhow::Result<()> {
    let dir = &lab.config().data_dir;
    let alive = |role: &str| lab.processes().map(|all| all.iter().any(|p| p.role == role && p.is_alive()));
    if !alive("server")? {
        println!("starting the control plane");
        let mut command = Command::new(std::env::current_exe()?);
        command.args(server_arguments(args, lab, config));
        let started = start(command, "server", &dir.join("log"))?;
        ready(started, PATIENCE)?;
    }
    let token = server::join_token(dir)?;
    let mut agents = Vec::new();
    for node in lab.nodes() {
        if alive(&node.name)? {
            continue;
        }
        println!("starting {}", node.name);
        agents.push(start_agent(lab, &node.name, config, &token, &args.insecure_registry)?);
    }
    for agent in agents {
        ready(agent, PATIENCE)?;
    }
    Ok(())
}

fn server_arguments(args: &UpArgs, lab: &Lab, config: &ClusterConfig) -> Vec<String> {
    let join = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut all: Vec<String> = vec![
        "server".into(),
        "--announce".into(),
        "--data-dir".into(),
        lab.config().data_dir.display().to_string(),
        "--lab".into(),
        lab.id().into(),
        "--listen".into(),
        format!("127.0.0.1:{}", config.api_port),
        "--service-cidr".into(),
        join(&args.service_cidr),
        "--pod-cidr".into(),
        join(&args.pod_cidr),
        "--store".into(),
        config.store.clone(),
    ];
    for publish in &config.publish {
        all.extend(["--publish".into(), publish.clone()]);
    }
    all.extend(config.load_balancer.flags());
    all
}

/// Starts one node's agent inside its namespaces; `node start` does the same.
fn start_agent(
    lab: &Lab,
    name: &str,
    config: &ClusterConfig,
    token: &str,
    insecure: &[String],
) -> anyhow::Result<Started> {
    let node = lab.node(name)?;
    let dir = &lab.config().data_dir;
    let switch = lab.plan().switch.first().context("the lab has no address")?.addr();
    let join = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let ips = node.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut arguments: Vec<String> = vec![
        "agent".into(),
        "--announce".into(),
        "--data-dir".into(),
        node.dir.display().to_string(),
        "--server".into(),
        format!("https://{}", SocketAddr::new(switch, 6443)),
        "--ca-cert".into(),
        dir.join("pki/ca.crt").display().to_string(),
        "--node-name".into(),
        name.into(),
        "--node-ip".into(),
        ips,
        "--proxy-mode".into(),
        config.proxy_mode_of(name).into(),
        "--overlay".into(),
        config.overlay.clone(),
        "--pod-cidr".into(),
        join(&node.pod_cidrs),
        "--outer-netns".into(),
        lab.netns("host").display().to_string(),
        "--run-dir".into(),
        lab.run_dir().join(format!("pods-{}", node.index)).display().to_string(),
        "--cgroup".into(),
        format!("{}/pods", node.cgroup),
        "--node-cgroup".into(),
        node.cgroup.clone(),
        "--images".into(),
        dir.join("images").display().to_string(),
    ];
    for registry in insecure {
        arguments.extend(["--insecure-registry".into(), registry.clone()]);
    }
    if config.localhost_node_ports {
        arguments.push("--localhost-node-ports".into());
    }
    if !config.endpoint_selection.is_empty() {
        arguments.extend(["--endpoint-selection".into(), config.endpoint_selection.clone()]);
    }
    if config.dsr {
        arguments.push("--dsr".into());
    }
    arguments.extend(config.dns.flags());
    arguments.extend(config.ingress.flags());
    arguments.extend(config.load_balancer.flags());
    arguments.push(format!("--label={}=true", ingress::LABEL));
    if !config.feature_gates.is_empty() {
        arguments.extend(["--feature-gates".into(), config.feature_gates.clone()]);
    }
    let mut command = node.command(std::env::current_exe()?, arguments)?;
    command.env("FAIRLEAD_TOKEN", token);
    let started = start(command, name, &dir.join("log"))?;
    if let Some(child) = &started.child {
        lab.record(name, child.id())?;
    }
    Ok(started)
}

/// Starts a node that is not running, and waits for it.
pub fn start_node(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let dir = &lab.config().data_dir;
    let config = ClusterConfig::load(dir)?.context("this data directory has no cluster; run `fairlead up`")?;
    let token = server::join_token(dir)?;
    ready(start_agent(lab, name, &config, &token, &[])?, PATIENCE)
}

fn start(mut command: Command, role: &str, logs: &Path) -> anyhow::Result<Started> {
    crate::pki::private_directory(logs)?;
    let log = logs.join(format!("{role}.log"));
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("open {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
    let child = command.spawn().with_context(|| format!("start {role}"))?;
    Ok(Started { role: role.into(), child: Some(child), log })
}

/// Waits for the line that says the process is ready, or for its end.
fn ready(mut started: Started, patience: Duration) -> anyhow::Result<()> {
    let mut child = started.child.take().context("a started process is waited for once")?;
    let out = child.stdout.take().context("standard output is a pipe")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(out).read_line(&mut line);
        // The one who waits may have given up; then nobody needs the answer.
        sender.send(read.map(|_| line)).ok();
    });
    match receiver.recv_timeout(patience) {
        Ok(Ok(line)) if !line.is_empty() => Ok(()),
        Ok(_) => {
            let code = child.wait().map(|s| s.to_string()).unwrap_or_default();
            bail!("{} ended ({code}): {}", started.role, last_lines(&started.log))
        }
        Err(_) => bail!(
            "{} is not ready after {patience:?}; its log is {}: {}",
            started.role,
            started.log.display(),
            last_lines(&started.log)
        ),
    }
}

/// The end of a log, which says why.
fn last_lines(log: &Path) -> String {
    let mut text = String::new();
    if std::fs::File::open(log).and_then(|mut f| f.read_to_string(&mut text)).is_err() {
        return format!("no log at {}", log.display());
    }
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Asks cluster DNS, through the Service network of a node, until it answers.
fn wait_for_dns(lab: &Lab, service_cidrs: &[IpNet]) -> anyhow::Result<()> {
    let dns = *server::dns_addresses(service_cidrs)?.first().context("no service range")?;
    let node = lab.nodes().first().context("no node")?;
    // As a process of the node: in the ebpf mode, Services are for these only.
    let asked = node.command(std::env::current_exe()?, ["await-dns".to_owned(), dns.to_string()])?.status()?;
    if !asked.success() {
        bail!("the Service network of {} does not work; `fairlead status` tells more", node.name);
    }
    Ok(())
}
