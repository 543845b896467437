//! The command line.

use crate::{
    agent, await_dns, client, dns, down, explain, image, ingress, loadbalancer, node, proxy, server, status, top, up,
    vip,
};
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Kubernetes in one binary, built around its Service network.
///
/// `fairlead up` starts a whole cluster on this machine. `fairlead server` and `fairlead agent` are the same roles as
/// single processes on real hosts. Use kubectl with the kubeconfig in the data directory, or `fairlead get`.
#[derive(Parser)]
#[command(name = "fairlead", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where a cluster lives.
#[derive(Args, Debug, Clone)]
pub struct DataDir {
    /// The cluster's directory: certificates, objects, images, kubeconfig.
    #[arg(long, env = "FAIRLEAD_DATA_DIR", default_value = "/var/lib/fairlead")]
    pub data_dir: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Start a whole cluster on this machine, each node in namespaces of its own.
    Up(Box<up::UpArgs>),
    /// End a cluster and leave nothing behind but its data directory.
    Down(down::DownArgs),
    /// Say what runs where and what is wrong.
    Status(status::StatusArgs),
    /// Say where a packet to a Service goes, and why.
    Explain(explain::ExplainArgs),
    /// Show what goes through each Service.
    Top(top::TopArgs),
    /// Run commands in a node, or play its death and return.
    Node(node::NodeArgs),
    /// Import, list and remove images.
    Image(image::ImageArgs),
    /// Run the control plane on this host.
    Server(server::ServerArgs),
    /// Run a node on this host and join it to a server.
    Agent(Box<agent::AgentArgs>),
    /// Run the Service proxy alone, in kube-proxy's place, on a node of any Kubernetes.
    Proxy(Box<proxy::ProxyArgs>),
    /// Run cluster DNS alone, in CoreDNS's place, for any Kubernetes.
    Dns(Box<dns::DnsArgs>),
    /// Run the Ingress controller and its proxy alone, for any Kubernetes.
    Ingress(Box<ingress::IngressArgs>),
    /// Give LoadBalancer Services addresses and announce them, alone, in MetalLB's place, on a node of any Kubernetes.
    Loadbalancer(Box<loadbalancer::LoadBalancerArgs>),
    /// Hold addresses on this host's interface by VRRP, for API servers or for anything else, as keepalived does.
    Vip(Box<vip::VipArgs>),
    /// Create or change objects from files (server-side apply).
    Apply(client::ApplyArgs),
    /// Show objects.
    Get(client::GetArgs),
    /// Delete objects.
    Delete(client::DeleteArgs),
    /// Show a container's output.
    Logs(client::LogsArgs),
    /// Wait until cluster DNS answers here.
    #[command(hide = true)]
    AwaitDns(await_dns::AwaitDnsArgs),
    /// Print a completion script for a shell.
    Completions { shell: clap_complete::Shell },
}

impl Cli {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if !matches!(
            self.command,
            Command::Server(_)
                | Command::Agent(_)
                | Command::Up(_)
                | Command::Proxy(_)
                | Command::Dns(_)
                | Command::Ingress(_)
                | Command::Loadbalancer(_)
                | Command::Vip(_)
        ) {
            linux::sigpipe::end_on_closed_pipe();
        }
        match self.command {
            Command::Up(args) => up::run(*args),
            Command::Down(args) => down::run(&args),
            Command::Status(args) => status::run(&args),
            Command::Explain(args) => blocking(args.run()),
            Command::Top(args) => blocking(args.run()),
            Command::Node(args) => node::run(args),
            Command::Image(args) => image::run(args),
            Command::Server(args) => server::run(args),
            Command::Agent(args) => agent::run(*args),
            Command::Proxy(args) => proxy::run(*args),
            Command::Dns(args) => dns::run(*args),
            Command::Ingress(args) => ingress::run(*args),
            Command::Loadbalancer(args) => loadbalancer::run(*args),
            Command::Vip(args) => vip::run(*args),
            Command::Apply(args) => blocking(args.run()),
            Command::Get(args) => blocking(args.run()),
            Command::Delete(args) => blocking(args.run()),
            Command::Logs(args) => blocking(args.run()),
            Command::AwaitDns(args) => await_dns::run(&args),
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Cli::command(), "fairlead", &mut std::io::stdout());
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// Runs a command that waits for the network, on one thread.
fn blocking(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Log lines go to standard error. `RUST_LOG` chooses them by target and level: `info`, `proxy=debug,info`.
pub fn start_logging() {
    start_logging_at(0);
}

/// The same at one of klog's levels: our own parts tell more from 4 on, and everything from 8 on.
pub fn start_logging_at(verbosity: u32) {
    use tracing_subscriber::filter::Targets;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let wanted = std::env::var("RUST_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let filter = wanted.unwrap_or_else(|| {
        let ours = match verbosity {
            0..4 => tracing::Level::INFO,
            4..8 => tracing::Level::DEBUG,
            _ => tracing::Level::TRACE,
        };
        // The client library tells of every refused connection, without a word of what for; its callers do it better.
        let filter = Targets::new()
            .with_default(tracing::Level::INFO)
            .with_target("kube_client", tracing_subscriber::filter::LevelFilter::OFF);
        ["fairlead", "proxy", "reconcile", "services", "linux"]
            .into_iter()
            .fold(filter, |filter, target| filter.with_target(target, ours))
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    // A second call finds the first subscriber in place, which is as good.
    tracing_subscriber::registry().with(lines).with(filter).try_init().ok();
}
