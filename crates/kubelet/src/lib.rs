//! Makes the node match its pods.
//!
//! The pods bound to this node are watched; each has a worker (`worker`) that observes, decides (`plan`, pure), acts
//! and reports (`status`, pure). `node` keeps the node's own object and lease. `server` answers for logs, exec and
//! port-forward.

mod action;
mod barrier;
mod container;
mod dns;
mod docker;
mod env;
mod insecure;
mod logs;
mod node;
mod payload;
mod plan;
mod pod;
mod probe;
mod server;
mod services;
mod status;
mod streaming;
mod volumes;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use api::kinds::{PODS, SERVICES};
use reconcile::{Api, Change, Recorder, Scope};
use runtime::{ImageService, RuntimeService};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use action::probe_http;
pub use dns::ClusterDns;
pub use plan::{Observed, Step, sync_pod};
pub use pod::Pod;
pub use server::{Authorize, Caller, Server, ServerConfig, serve};
use volumes::Volumes;
use worker::{Shared, Worker};

/// One node as its kubelet should run it.
#[derive(Debug, Clone)]
pub struct KubeletConfig {
    pub node_name: String,
    /// The node's addresses, the primary one first.
    pub node_ips: Vec<IpAddr>,
    /// Volumes and other files of pods.
    pub root: PathBuf,
    /// Container logs, in Kubernetes' layout below.
    pub logs: PathBuf,
    pub cluster_dns: ClusterDns,
    /// The resolv.conf that pods with dnsPolicy Default inherit.
    pub resolv_conf: PathBuf,
    pub labels: BTreeMap<String, String>,
    /// `{"key": …, "value": …, "effect": …}`, set when the node registers.
    pub taints: Vec<Value>,
    /// Set when the node registers; leave empty where a controller assigns them.
    pub pod_cidrs: Vec<String>,
    pub max_pods: u32,
    /// What the node reports as its port for logs and exec.
    pub port: u16,
    /// `v1.33.0`
    pub version: String,
}

impl KubeletConfig {
    fn pod_log_directory(&self, pod: &Pod) -> PathBuf {
        let metadata = &pod.metadata;
        self.logs.join(format!("{}_{}_{}", metadata.namespace, metadata.name, metadata.uid))
    }

    fn log_path(&self, pod: &Pod, container: &str, attempt: u32) -> PathBuf {
        self.pod_log_directory(pod).join(container).join(format!("{attempt}.log"))
    }
}

/// What the machine is, read once.
#[derive(Debug, Clone, Default)]
pub struct NodeFacts {
    pub cpu_milli: i64,
    pub memory: i64,
    pub storage: i64,
    pub kernel: String,
    pub os_image: String,
    pub machine_id: String,
    pub boot_id: String,
}

impl NodeFacts {
    pub fn read(root: &std::path::Path) -> NodeFacts {
        let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let memory = file("/proc/meminfo")
            .lines()
            .find_map(|l| l.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<i64>().ok())
            .unwrap_or(0);
        let os_image = file("/etc/os-release")
            .lines()
            .find_map(|l| Some(l.strip_prefix("PRETTY_NAME=")?.trim_matches('"').to_owned()))
            .unwrap_or_else(|| "Linux".to_owned());
        let storage = nix::sys::statvfs::statvfs(root)
            .map(|s| i64::try_from(s.blocks() * s.fragment_size()).unwrap_or(i64::MAX))
            .unwrap_or(0);
        NodeFacts {
            cpu_milli: std::thread::available_parallelism().map_or(1, |n| n.get() as i64) * 1000,
            memory: memory * 1024,
            storage,
            kernel: file("/proc/sys/kernel/osrelease").trim().to_owned(),
            os_image,
            machine_id: file("/etc/machine-id").trim().to_owned(),
            boot_id: file("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    #[error("cannot make {path}: {source}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Runtime(#[from] runtime::RuntimeError),
}

/// Runs until cancelled. Containers go on after it returns.
pub async fn run(
    config: KubeletConfig,
    client: kube::Client,
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
    token: CancellationToken,
) -> Result<(), KubeletError> {
    for path in [&config.root, &config.logs] {
        std::fs::create_dir_all(path).map_err(|source| KubeletError::Directory { path: path.clone(), source })?;
    }
    let recorder = Recorder::new(&client, "kubelet", &config.node_name);
    let shared = Arc::new(Shared {
        node: NodeFacts::read(&config.root),
        volumes: Volumes::new(config.root.join("pods"), &client),
        pods: Api::new(&client, &PODS),
        barrier: barrier::Barrier::new(&client),
        services: reconcile::feed(&client, &SERVICES, Scope::all(), &token, |_, _| {}),
        recorder: recorder.clone(),
        runtime,
        images,
        config,
    });
    let pods = Pods { shared: shared.clone(), workers: HashMap::new(), tasks: JoinSet::new(), token: token.clone() };
    let scope = Scope::fields(format!("spec.nodeName={}", shared.config.node_name));
    let changes = reconcile::watch::<Value>(&client, &PODS, scope);
    tokio::join!(pods.follow(changes), node::keep(&shared, &client, &recorder, &token));
    Ok(())
}

/// The workers of this node, by pod uid.
struct Pods {
    shared: Arc<Shared>,
    workers: HashMap<String, Handle>,
    tasks: JoinSet<String>,
    token: CancellationToken,
}

struct Handle {
    input: watch::Sender<Option<Arc<Pod>>>,
    wake: Arc<Notify>,
}

impl Pods {
    async fn follow(mut self, mut changes: tokio::sync::mpsc::Receiver<Change<Value>>) {
        let mut events = self.shared.runtime.events();
        loop {
            tokio::select! {
                () = self.token.cancelled() => break,
                change = changes.recv() => match change {
                    Some(change) => self.apply(change).await,
                    None => break,
                },
                event = events.recv() => match event {
                    Ok(event) => self.wake(Some(&event.pod_uid)),
                    // Too much happened to tell apart: everybody looks.
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => self.wake(None),
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
                },
                Some(ended) = self.tasks.join_next() => if let Ok(uid) = ended {
                    self.workers.remove(&uid);
                },
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    fn wake(&self, uid: Option<&str>) {
        match uid {
            Some(uid) => self.workers.get(uid).into_iter().for_each(|w| w.wake.notify_one()),
            None => self.workers.values().for_each(|w| w.wake.notify_one()),
        }
    }

    async fn apply(&mut self, change: Change<Value>) {
        match change {
            Change::Apply(pod) => self.set(pod),
            Change::Delete(pod) => {
                if let Some(worker) = self.workers.get(api::ObjectExt::uid(&pod)) {
                    worker.input.send_replace(None);
                }
            }
            Change::Reset(all) => {
                let present: Vec<String> = all.iter().map(|p| api::ObjectExt::uid(p).to_owned()).collect();
                all.into_iter().for_each(|pod| self.set(pod));
                for (uid, worker) in &self.workers {
                    if !present.contains(uid) {
                        worker.input.send_replace(None);
                    }
                }
                self.clear_strangers(&present).await;
            }
        }
    }

    /// Sandboxes and files of pods that the API no longer knows: they were deleted while nobody was here.
    async fn clear_strangers(&self, present: &[String]) {
        let known = |uid: &str| present.iter().any(|p| p == uid) || self.workers.contains_key(uid);
        let sandboxes = self.shared.runtime.list_pod_sandboxes().await.unwrap_or_default();
        for sandbox in sandboxes.iter().filter(|s| !known(&s.config.uid)) {
            tracing::info!(pod = %sandbox.config.name, "removing a pod that was deleted meanwhile");
            if let Err(e) = self.shared.runtime.remove_pod_sandbox(&sandbox.id).await {
                tracing::warn!(sandbox = %sandbox.id, "cannot remove it: {e}");
            }
        }
        let directory = self.shared.config.root.join("pods");
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let uid = entry.file_name().to_string_lossy().into_owned();
            if !known(&uid)
                && let Err(e) = self.shared.volumes.remove(&uid)
            {
                tracing::warn!(%uid, "cannot remove a deleted pod's files: {e}");
            }
        }
    }

    fn set(&mut self, mut object: Value) {
        strip_nulls(&mut object);
        let pod = match serde_json::from_value::<Pod>(object.clone()) {
            Ok(pod) => Arc::new(pod),
            Err(e) => {
                use api::ObjectExt;
                let (namespace, name) = (object.namespace(), object.name());
                tracing::warn!("pod {namespace}/{name} is not understood: {e}");
                let about = reconcile::ObjectRef::new("v1", "Pod", namespace, name, object.uid());
                let message = format!("this node does not understand the pod: {e}");
                self.shared.recorder.event(&about, reconcile::EventKind::Warning, "FailedToParse", message);
                return;
            }
        };
        let uid = pod.metadata.uid.clone();
        if let Some(worker) = self.workers.get(&uid) {
            worker.input.send_replace(Some(pod));
            return;
        }
        let (sender, receiver) = watch::channel(Some(pod.clone()));
        let wake = Arc::new(Notify::new());
        let worker = Worker::new(self.shared.clone(), pod, receiver, wake.clone(), self.token.clone());
        self.workers.insert(uid.clone(), Handle { input: sender, wake });
        self.tasks.spawn(async move {
            worker.run().await;
            uid
        });
    }
}

/// An explicit null means the same as nothing.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}
