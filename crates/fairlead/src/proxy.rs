//! `fairlead proxy`: the Service data path alone, on a node of any Kubernetes, in kube-proxy's place.
//!
//! It needs what kube-proxy needs: root on the node, and an identity that may do what the cluster role
//! `system:node-proxier` allows. When it ends the rules stay, and the next start begins with what is there.

pub mod events;
mod flags;
mod node;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use api::Resource;
use api::kinds::{ENDPOINT_SLICES, NODES, SERVICE_CIDRS, SERVICES};
use http::Request;
use kube::client::Body;
use linux::cgroup_v1v2::Hierarchies;
use linux::link::{AddressWatch, Links};
use linux::netns::Netns;
use proxy::configuration::{Configuration, Settings};
use proxy::http::{Answer, Respond};
use proxy::{Feature, Features, Feed, Health, HealthChecks, Metrics, Mode, NodeView, Status};
use reconcile::{Change, EventKind, ObjectRef, Recorder, Scope, ServiceFeed};
use serde_json::Value;
use services::ServiceTable;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::node_object::Node;
use crate::service_cidrs::{ServiceCidr, ServiceCidrs};
use crate::{access, barrier, cli, dsr, local, warnings};
pub use flags::ProxyArgs;
use node::Inputs;

/// kube-proxy's name for what it does when nothing is said: it should be the last to go when memory is short.
const OOM_SCORE: i32 = -999;

pub fn run(args: ProxyArgs) -> anyhow::Result<ExitCode> {
    if args.cleanup {
        cli::start_logging();
        proxy::cleanup(Some(&hooks(&args.node_cgroup, &args.state_dir)?), None)?;
        println!("no rule of the proxy is left");
        return Ok(ExitCode::SUCCESS);
    }
    let from_flags = args.configuration();
    let configuration = match &args.config {
        None => from_flags,
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            let file = Configuration::parse(&text).with_context(|| path.display().to_string())?;
            args.over(file)
        }
    };
    if let Some(path) = &args.write_config_to {
        std::fs::write(path, flags::written(&configuration)?).with_context(|| format!("write {}", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut settings = configuration.settings()?;
    args.switch_off(&mut settings);
    cli::start_logging_at(settings.verbosity);
    if args.config.is_some() {
        let ignored = args.ignored();
        if !ignored.is_empty() {
            warn!("with --config the file decides, as with kube-proxy; flags for {} are ignored", ignored.join(", "));
        }
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("the proxy changes the kernel's rules, which only root may; run it as root on the node");
    }
    prepare(&settings)?;
    if args.init_only {
        return Ok(ExitCode::SUCCESS);
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(start(args, settings))
}

/// What needs more rights than the rest, and is done once.
fn prepare(settings: &Settings) -> anyhow::Result<()> {
    let score = settings.oom_score_adj.unwrap_or(OOM_SCORE);
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        let level_matters = settings.oom_score_adj.is_some();
        if level_matters {
            warn!(%error, score, "oomScoreAdj could not be set; this needs CAP_SYS_RESOURCE");
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let sysctls = settings.conntrack.sysctls(cores);
    let sysctls: Vec<(&str, &str)> = sysctls.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Netns::current()?.sysctls(&sysctls).context(
        "the settings of connection tracking; where they are read-only, set conntrack.maxPerCore to 0 and leave the \
         others out",
    )
}

/// Where the node's own sockets are in the cgroup2 hierarchy, and a place for what outlives this process.
pub fn hooks(node_cgroup: &Path, dir: &Path) -> anyhow::Result<proxy::Hooks> {
    let mounted = Hierarchies::mounted().context("look for the cgroup2 mount")?.v2;
    let root = mounted.unwrap_or_else(|| "/sys/fs/cgroup".into());
    let cgroup = root.join(node_cgroup.strip_prefix("/").unwrap_or(node_cgroup));
    Ok(proxy::Hooks { cgroup, pins: dir.join("bpf") })
}

async fn client(args: &ProxyArgs, settings: &Settings, metrics: Arc<Metrics>) -> anyhow::Result<kube::Client> {
    let sources = "--kubeconfig nor clientConnection.kubeconfig";
    let mut config = access::config(settings.kubeconfig.as_deref(), sources).await?;
    if let Some(master) = &args.master {
        config.cluster_url = master.parse().with_context(|| format!("--master {master:?} is not a URL"))?;
    }
    let plain = kube::Client::try_from(config).context("prepare a client of the API server")?;
    let service = tower::service_fn(move |request: Request<Body>| {
        let (plain, metrics) = (plain.clone(), metrics.clone());
        async move {
            let method = request.method().to_string();
            let answer = plain.send(request).await;
            metrics.requested(&method, answer.as_ref().ok().map(|answer| answer.status().as_u16()));
            answer
        }
    });
    Ok(kube::Client::new(service, "default"))
}

/// Whether the API server has the kind and lets us watch it.
async fn can_list(client: &kube::Client, resource: &Resource) -> bool {
    let path = format!("{}?limit=1", resource.path(""));
    reconcile::api::request::<Value>(client, "GET", &path, "", None).await.is_ok()
}

async fn start(args: ProxyArgs, settings: Settings) -> anyhow::Result<ExitCode> {
    let token = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let metrics: Arc<Metrics> = Arc::default();
    let name = match &settings.node_name {
        Some(name) => name.clone(),
        None => nix::unistd::gethostname()?.to_string_lossy().trim().to_lowercase(),
    };
    let client = client(&args, &settings, metrics.clone()).await?;
    let events = Recorder::new(&client, "fairlead-proxy", &name);
    let about = ObjectRef::new("v1", "Node", "", &name, &name);

    // Probes are answered from the first moment on: with 503 until the first commit.
    let health = Arc::new(Health::new(settings.sync_period));
    if let Some(at) = settings.healthz
        && let Some(listener) = listen("healthzBindAddress", at, settings.bind_hard_fail)?
    {
        tasks.spawn(proxy::http::serve(listener, proxy::probes(health.clone(), metrics.clone()), token.clone()));
    }
    access::check_rights(&client, &[&SERVICES, &ENDPOINT_SLICES, &NODES], "system:node-proxier").await?;

    let mode = settings.mode;
    let features = args.features(&settings);
    if args.first_packet_timeout.is_some() && mode != proxy::Mode::Ebpf {
        anyhow::bail!("--first-packet-timeout: the {mode} mode cannot set it; leave it out, or use --proxy-mode=ebpf");
    }
    let hooks = hooks(&args.node_cgroup, &args.state_dir)?;
    let seed = {
        let hooks = hooks.clone();
        tokio::task::spawn_blocking(move || {
            proxy::prepare(mode, None, Some(&hooks))?;
            proxy::found(mode, None, Some(&hooks))
        })
        .await??
    };
    let mut table = ServiceTable::with_seed(seed);
    if let Some(name) = &args.service_proxy_name {
        table = table.for_proxy(name);
    }
    let feed = ServiceFeed::start_with(&client, table, &token);
    let changes = feed.subscribe();
    let check_changes = feed.subscribe();

    let mut inputs = Inputs::new(settings.clone());
    inputs.selection = args.endpoint_selection;
    inputs.direct_return = args.dsr;
    let (said, own_said) = watch::channel(None);
    let (lost_nodes, lost_seen) = watch::channel(BTreeSet::new());
    let mut sources = Sources {
        name: name.clone(),
        nodes: reconcile::watch(&client, &NODES, Scope::all()),
        lost_nodes,
        said,
        service_cidrs: match can_list(&client, &SERVICE_CIDRS).await {
            true => Some(reconcile::watch(&client, &SERVICE_CIDRS, Scope::all())),
            // An older API server, or fewer rights: then packets to a cluster IP that nobody has are not ours to drop.
            false => {
                inputs.service_cidrs = Some(ServiceCidrs::default());
                None
            }
        },
        addresses: match settings.node_port_addresses.is_empty() {
            true => None,
            false => Some(AddressWatch::open(None)?),
        },
    };
    if sources.addresses.is_some() {
        inputs.held = held_addresses()?;
    }
    info!(node = name, "waiting for the Node object");
    let ended = local::wait_for_end();
    tokio::pin!(ended);
    let view = loop {
        if let Some(view) = inputs.view() {
            break view;
        }
        tokio::select! {
            changed = sources.next(&mut inputs, &health) => changed?,
            ended = &mut ended => return ended.map(|()| ExitCode::SUCCESS),
        }
    };
    let (views, view_seen) = watch::channel(Arc::new(view));
    let (status, status_seen) = watch::channel(Status::default());
    if let Some(at) = settings.metrics
        && let Some(listener) = listen("metricsBindAddress", at, settings.bind_hard_fail)?
    {
        let scraped = Scraped {
            mode,
            features: features.clone(),
            hooks: hooks.clone(),
            metrics: metrics.clone(),
            feed: feed.clone(),
            view: view_seen.clone(),
            status: status_seen.clone(),
        };
        tasks.spawn(proxy::http::serve(listener, scraped.respond(), token.clone()));
    }
    tasks.spawn({
        let (health, status, token) = (health.clone(), status_seen.clone(), token.clone());
        async move { health.follow(status, token).await }
    });
    // Without the right to write a Lease it says so once; only kubelets of ours wait for it.
    if features.is_on(Feature::Barrier) {
        tasks.spawn(barrier::report(client.clone(), name.clone(), status_seen.clone(), token.clone()));
    }
    tasks.spawn(dsr::announce(client.clone(), name.clone(), args.dsr, status_seen.clone(), own_said, token.clone()));
    tasks.spawn(warnings::tell(feed.clone(), feed.subscribe(), events.clone(), token.clone()));
    tasks.spawn(events::follow(status_seen, events.clone(), about.clone(), token.clone()));
    tasks.spawn(proxy::serve_health_checks(
        HealthChecks {
            namespace: None,
            node: view_seen.clone(),
            feed: Feed { table: feed.table.clone(), changes: check_changes },
            health: health.clone(),
            events: Some(events.clone()),
        },
        token.clone(),
    ));
    tasks.spawn({
        let token = token.clone();
        async move {
            loop {
                let changed = tokio::select! {
                    changed = sources.next(&mut inputs, &health) => changed,
                    () = token.cancelled() => return,
                };
                if let Err(error) = changed {
                    warn!(%error, "the node is not followed any more; restart the proxy");
                    return;
                }
                // Without a Node or its addresses the last view is the best there is.
                let Some(view) = inputs.view() else { continue };
                views.send_if_modified(|held| {
                    let differs = **held != view;
                    if differs {
                        *held = Arc::new(view);
                    }
                    differs
                });
            }
        }
    });
    let recorder = events.clone();
    let watching = proxy::Watching {
        first_timeout: args.first_packet_timeout.map(std::time::Duration::from_millis),
        lost_nodes: Some(lost_seen),
        notices: Some(Arc::new(move |notice| events::tell(&recorder, notice))),
        ..proxy::Watching::by(&features)
    };
    let config = proxy::Config { mode, node: view_seen, namespace: None, hooks: Some(hooks), metrics, watching };
    let run = proxy::run(config, Feed { table: feed.table.clone(), changes }, status, token.clone());
    events.event(&about, EventKind::Normal, "Starting", "");
    info!(node = name, %mode, "serving Services");
    tokio::pin!(run);
    let outcome = tokio::select! {
        ended = &mut run => ended.context("the proxy cannot go on"),
        ended = &mut ended => {
            info!("ending; the rules stay");
            token.cancel();
            ended.and(run.await.map_err(Into::into))
        }
    };
    token.cancel();
    let drained = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(std::time::Duration::from_secs(5), drained).await.is_err() {
        warn!("some tasks did not end in time");
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Where the view of the node comes from.
struct Sources {
    /// This node's.
    name: String,
    nodes: mpsc::Receiver<Change<Node>>,
    /// Nodes that have stopped sending their heartbeat.
    lost_nodes: watch::Sender<BTreeSet<Arc<str>>>,
    /// What this node says of itself.
    said: watch::Sender<dsr::Said>,
    service_cidrs: Option<mpsc::Receiver<Change<ServiceCidr>>>,
    addresses: Option<AddressWatch>,
}

impl Sources {
    /// Waits for one event and takes it in.
    async fn next(&mut self, inputs: &mut Inputs, health: &Health) -> anyhow::Result<()> {
        let cidrs = async {
            match &mut self.service_cidrs {
                Some(changes) => changes.recv().await,
                None => std::future::pending().await,
            }
        };
        let addresses = async {
            match &self.addresses {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            change = self.nodes.recv() => {
                match change.context("the watch on this node has ended")? {
                    Change::Reset(nodes) => {
                        let lost = nodes.iter().filter(|node| node.has_no_heartbeat()).map(|node| node.name().into());
                        self.lost_nodes.send_replace(lost.collect());
                        inputs.takers = dsr::takers(&nodes, &self.name);
                        inputs.node = nodes.into_iter().find(|node| node.name() == self.name).or(inputs.node.take());
                    }
                    Change::Apply(node) => {
                        self.lost_nodes.send_if_modified(|lost| match node.has_no_heartbeat() {
                            true => lost.insert(node.name().into()),
                            false => lost.remove(node.name()),
                        });
                        if node.name() == self.name {
                            inputs.node = Some(node);
                        } else {
                            dsr::notice(&mut inputs.takers, node.name(), Some(&node));
                        }
                    }
                    // A Node that is registered anew comes back soon; until then ours is what it was.
                    Change::Delete(node) => {
                        self.lost_nodes.send_if_modified(|lost| lost.remove(node.name()));
                        dsr::notice(&mut inputs.takers, node.name(), None);
                    }
                }
                if let Some(node) = &inputs.node {
                    let now = Some(node.annotation(services::DSR_ANNOTATION).map(str::to_owned));
                    self.said.send_if_modified(|said| std::mem::replace(said, now.clone()) != now);
                    health.set_taints(node.taints());
                }
            }
            change = cidrs => {
                inputs.service_cidrs.get_or_insert_default().take(change.context("the watch on ServiceCIDRs has ended")?);
            }
            changed = addresses => {
                changed?;
                inputs.held = held_addresses()?;
            }
        }
        Ok(())
    }
}

/// The addresses of this host's interfaces.
fn held_addresses() -> anyhow::Result<Vec<std::net::IpAddr>> {
    let all = Links::current()?.addresses()?;
    Ok(all.iter().filter(|held| node::is_node_port_link(&held.link)).map(|held| held.address.addr()).collect())
}

/// A listener; `None` if its port is taken and that is no reason to end.
pub fn listen(field: &str, at: SocketAddr, hard_fail: bool) -> anyhow::Result<Option<TcpListener>> {
    let opened = std::net::TcpListener::bind(at).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    match opened {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if hard_fail => Err(error).with_context(|| format!("{field}: listen on {at}")),
        Err(error) => {
            warn!("{field}: listen on {at}: {error}; nobody is answered there");
            Ok(None)
        }
    }
}

/// What a scrape is answered from.
pub struct Scraped {
    /// The mode that the proxy was started in.
    pub mode: Mode,
    pub features: Features,
    pub hooks: proxy::Hooks,
    pub metrics: Arc<Metrics>,
    pub feed: ServiceFeed,
    pub view: watch::Receiver<Arc<NodeView>>,
    pub status: watch::Receiver<Status>,
}

impl Scraped {
    /// `/metrics`, `/proxyMode` and `/healthz` of the metrics port.
    pub fn respond(self) -> Respond {
        Arc::new(move |path| match path {
            "/metrics" => {
                Answer { content_type: "text/plain; version=0.0.4; charset=utf-8", ..Answer::text(self.text()) }
            }
            "/proxyMode" => Answer::text(self.mode().to_string()),
            "/healthz" => Answer::text("ok"),
            _ => Answer::not_found(),
        })
    }

    fn mode(&self) -> Mode {
        self.status.borrow().mode.unwrap_or(self.mode)
    }

    fn text(&self) -> String {
        let (mode, status) = (self.mode(), self.status.borrow().clone());
        let mut view = NodeView::clone(&self.view.borrow());
        view.ejected.extend(&status.ejected);
        let table = self.feed.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut text = self.metrics.text(mode, &table, &view, &status);
        if self.features.is_on(Feature::Traffic) {
            match proxy::traffic(mode, None, Some(&self.hooks), &self.metrics, &table, &view) {
                Ok(traffic) => text.push_str(&traffic.metrics()),
                Err(error) => warn!(%error, "this scrape says nothing of Services' traffic"),
            }
        }
        text
    }
}
