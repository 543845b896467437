//! The built-in runtime: a helper a pod, overlayfs, libcontainer, and nothing that must be installed.
//!
//! Under `root`, `sandboxes/ID/` holds all that is known of a sandbox: what it was asked to be, its helper's identity,
//! and a bundle for each container, in which the helper writes when the container started and ended. A new agent reads
//! these files, finds the helpers that still live, and goes on; what lives without a record is killed.

mod client;
mod record;
mod services;
mod spec;
mod terminal;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use linux::cgroup::Cgroup;
use linux::process::{PidFd, ProcessId};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::broadcast;

use crate::files::{read_json, write_atomically};
use crate::helper::protocol::{EXIT, Ready, Reply, Request, Start};
use crate::image::{ImageStore, PullConfig};
use crate::network::{PodNetwork, SandboxNetwork};
use crate::service::Result;
use crate::types::{
    ContainerState, ContainerStatus, Context, Exit, RuntimeError, RuntimeEvent, SandboxConfig, SandboxState,
    SandboxStatus,
};
use record::{ContainerRecord, SandboxRecord};

/// Where the runtime keeps things, and whom it asks.
#[derive(Clone)]
pub struct BuiltinConfig {
    /// State that survives a restart of the machine.
    pub root: PathBuf,
    /// Sockets. Keep it short: a socket's path has at most 107 bytes.
    pub run: PathBuf,
    /// The image store; several agents of one machine may share it.
    pub images: PathBuf,
    /// The cgroup, in every hierarchy, below which each pod gets one.
    pub cgroup_parent: PathBuf,
    /// The program whose `helper_arguments` lead to `helper::main`.
    pub helper: PathBuf,
    pub helper_arguments: Vec<String>,
    pub pull: PullConfig,
}

/// `RuntimeService` and `ImageService` of this node.
#[derive(Clone)]
pub struct Builtin(Arc<Inner>);

struct Inner {
    config: BuiltinConfig,
    images: ImageStore,
    network: Arc<dyn PodNetwork>,
    state: Mutex<State>,
    events: broadcast::Sender<RuntimeEvent>,
    own_capabilities: u64,
}

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, ContainerStatus>,
}

struct Sandbox {
    record: SandboxRecord,
    ready: bool,
}

/// Enough for a helper that must share two processors with a hundred others.
const START_PATIENCE: Duration = Duration::from_secs(30);
const END_PATIENCE: Duration = Duration::from_secs(10);

impl Builtin {
    /// Opens the runtime's directories, takes back the pods that still run, and clears what others left behind.
    pub async fn open(config: BuiltinConfig, network: Arc<dyn PodNetwork>) -> Result<Builtin> {
        let images = ImageStore::open(&config.images)?;
        let status = std::fs::read_to_string("/proc/self/status").context(|| "cannot read /proc/self/status".into())?;
        for directory in [config.root.join("sandboxes"), config.run.clone()] {
            std::fs::create_dir_all(&directory).context(|| format!("cannot make {}", directory.display()))?;
        }
        let runtime = Builtin(Arc::new(Inner {
            images,
            network,
            state: Mutex::default(),
            events: broadcast::channel(1024).0,
            own_capabilities: spec::own_capabilities(&status),
            config,
        }));
        runtime.adopt().await?;
        Ok(runtime)
    }

    pub fn images(&self) -> &ImageStore {
        &self.0.images
    }

    async fn adopt(&self) -> Result<()> {
        for record in record::load_all(&self.0.config.root)? {
            let directory = self.sandbox_directory(&record.id);
            let containers = record::load_containers(&directory)?;
            let alive = record.helper.is_some_and(|helper| helper.is_alive());
            let watch = match alive {
                true => client::watch(&self.socket(&record.id)).await.ok(),
                false => None,
            };
            let id = record.id.clone();
            {
                let mut state = self.state();
                for container in containers {
                    state.containers.insert(container.id.clone(), container);
                }
                state.sandboxes.insert(id.clone(), Sandbox { record, ready: watch.is_some() });
            }
            match watch {
                Some(lines) => self.follow(id, lines),
                None => self.helper_is_gone(&id).await,
            }
        }
        self.clear_strangers()
    }

    /// Cgroups and sockets of sandboxes that nobody knows: their agent was killed before it could write a record, or
    /// their directory was removed.
    fn clear_strangers(&self) -> Result<()> {
        let known: Vec<String> = self.state().sandboxes.keys().map(|id| short(id).to_owned()).collect();
        let parent = self.cgroup(&self.0.config.cgroup_parent)?;
        for name in parent.children() {
            let Some(id) = name.strip_prefix("pod-") else { continue };
            if !known.iter().any(|k| k == id) {
                let cgroup = parent.child(&name);
                cgroup.kill(END_PATIENCE).and_then(|()| cgroup.remove()).context(|| format!("clearing {name}"))?;
            }
        }
        let run = &self.0.config.run;
        for entry in std::fs::read_dir(run).context(|| format!("cannot list {}", run.display()))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let id = name.split('.').next().unwrap_or_default();
            if id.len() == SHORT && !known.iter().any(|k| k == id) {
                let path = entry.path();
                let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                removed.context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Keeps the state true from a helper's messages, and notices its end.
    fn follow(&self, id: String, mut lines: client::Lines) {
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(reply) = lines.next().await {
                if let Reply::Exited { id: container, exit } = reply {
                    this.container_ended(&container, exit);
                }
            }
            this.helper_is_gone(&id).await;
        });
    }

    fn container_ended(&self, id: &str, exit: Exit) {
        let sandbox = {
            let mut state = self.state();
            let Some(container) = state.containers.get_mut(id) else { return };
            let started = match &container.state {
                ContainerState::Exited { .. } => return,
                ContainerState::Running(started) => Some(started.clone()),
                ContainerState::Created => None,
            };
            container.state = ContainerState::Exited { started, exit };
            container.sandbox_id.clone()
        };
        self.announce(&sandbox);
    }

    /// Without its helper a pod must not go on: nobody reaps it, logs it or can stop it.
    async fn helper_is_gone(&self, id: &str) {
        if let Err(e) = self.kill_cgroup(id).await {
            tracing::error!(sandbox = %id, "cannot clear a pod whose helper has gone: {e}");
        }
        let orphans: Vec<(String, PathBuf)> = {
            let mut state = self.state();
            if let Some(sandbox) = state.sandboxes.get_mut(id) {
                sandbox.ready = false;
            }
            state
                .containers
                .values()
                .filter(|c| c.sandbox_id == id && c.state.exit().is_none())
                .map(|c| (c.id.clone(), self.bundle(id, &c.id)))
                .collect()
        };
        for (container, bundle) in orphans {
            // The helper's own word, if it managed to leave one, is better than ours.
            let exit = read_json::<Exit>(&bundle.join(EXIT)).ok().flatten().unwrap_or_else(|| Exit {
                code: 137,
                signal: Some(9),
                oom_killed: false,
                at: jiff::Timestamp::now(),
                message: "the pod's helper was killed".to_owned(),
            });
            let bytes = serde_json::to_vec(&exit).expect("plain data");
            if let Err(e) = write_atomically(&bundle.join(EXIT), &bytes) {
                tracing::error!(%container, "cannot record its end: {e}");
            }
            self.container_ended(&container, exit);
        }
        self.announce(id);
    }

    async fn kill_cgroup(&self, id: &str) -> Result<()> {
        let cgroup = self.pod_cgroup(id)?;
        blocking(move || {
            cgroup.kill(END_PATIENCE).and_then(|()| cgroup.remove()).context(|| "ending a pod's cgroup".into())
        })
        .await
    }

    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus> {
        let id = new_id()?;
        let record = SandboxRecord {
            id: id.clone(),
            config,
            created_at: jiff::Timestamp::now(),
            ips: Vec::new(),
            helper: None,
            init: None,
        };
        match self.build_sandbox(record).await {
            Ok(record) => {
                let lines = client::watch(&self.socket(&id)).await?;
                self.state().sandboxes.insert(id.clone(), Sandbox { record, ready: true });
                self.follow(id.clone(), lines);
                self.announce(&id);
                self.sandbox_status(&id)
            }
            Err(e) => {
                if let Err(cleanup) = self.destroy(&id).await {
                    tracing::error!(sandbox = %id, "cannot clear a sandbox that did not start: {cleanup}");
                }
                Err(e)
            }
        }
    }

    async fn build_sandbox(&self, mut record: SandboxRecord) -> Result<SandboxRecord> {
        let id = record.id.clone();
        let directory = self.sandbox_directory(&id);
        let config = &record.config;
        let write = |name: &str, text: String| {
            let path = directory.join(name);
            std::fs::write(&path, text).context(|| format!("cannot write {}", path.display()))
        };
        std::fs::create_dir_all(directory.join("containers"))
            .context(|| format!("cannot make {}", directory.display()))?;
        record.save(&directory)?;
        write("resolv.conf", resolv_conf(config))?;
        write("hostname", format!("{}\n", config.hostname))?;
        let mut tmpfs = config.tmpfs.clone();
        tmpfs.push(crate::types::Tmpfs { path: directory.join("shm"), size: Some(64 << 20) });
        let start = Start {
            socket: self.socket(&id),
            state: self.0.config.run.join(short(&id)),
            cgroup: self.pod_cgroup(&id)?.path(),
            hostname: config.hostname.clone(),
            host_network: config.host_network,
            host_ipc: config.host_ipc,
            own_process_namespace: config.share_process_namespace,
            sysctls: config.sysctls.clone(),
            tmpfs,
        };
        write("start.json", serde_json::to_string(&start).expect("plain data"))?;
        let (helper, init) = self.start_helper(&directory).await?;
        record.helper = Some(helper);
        record.init = init;
        record.save(&directory)?;
        if !record.config.host_network {
            record.ips = self.0.network.add(&sandbox_network(&record)).await?;
            record.save(&directory)?;
        }
        Ok(record)
    }

    async fn start_helper(&self, directory: &Path) -> Result<(ProcessId, Option<i32>)> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(io::Error::from)
            .context(|| "cannot make a pipe".into())?;
        let start = directory.join("start.json");
        let mut arguments: Vec<&str> = self.0.config.helper_arguments.iter().map(String::as_str).collect();
        let start = start.to_str().ok_or_else(|| {
            RuntimeError::InvalidConfig(format!("{} is not UTF-8: choose another directory", start.display()))
        })?;
        arguments.push(start);
        let mut child = linux::process::spawn(&self.0.config.helper, &arguments, write, &directory.join("helper.log"))
            .context(|| format!("cannot start {}", self.0.config.helper.display()))?;
        let pid = child.id().map(|pid| pid as i32);
        // Somebody has to reap it while this agent lives.
        tokio::spawn(async move { child.wait().await });
        let pid = pid.ok_or_else(|| RuntimeError::Helper("it ended at once".to_owned()))?;
        let output = tokio::net::unix::pipe::Receiver::from_owned_fd(read).context(|| "a pipe".into())?;
        let mut text = String::new();
        tokio::time::timeout(START_PATIENCE, BufReader::new(output).read_line(&mut text))
            .await
            .map_err(|_| RuntimeError::Timeout { what: "a pod's helper".into(), seconds: START_PATIENCE.as_secs() })?
            .context(|| "reading from a pod's helper".into())?;
        match serde_json::from_str(&text) {
            Ok(Ready::Listening { init }) => {
                let helper = ProcessId::of(pid).context(|| "a pod's helper has gone".into())?;
                Ok((helper, init))
            }
            Ok(Ready::Failed(message)) => Err(RuntimeError::Helper(message)),
            Err(_) => {
                let log = std::fs::read_to_string(directory.join("helper.log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or("it said nothing");
                Err(RuntimeError::Helper(format!("it did not start: {last}")))
            }
        }
    }

    /// Ends a sandbox's processes and gives its network back; idempotent.
    async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let directory = self.sandbox_directory(id);
        let Some(record) = SandboxRecord::load(&directory)? else { return Ok(()) };
        if !record.config.host_network {
            // While its namespace still exists.
            self.0.network.remove(&sandbox_network(&record)).await?;
        }
        if let Some(helper) = record.helper.filter(ProcessId::is_alive) {
            // An error means that it is ending already.
            let _ = client::ask(&self.socket(id), &Request::Shutdown, Vec::new()).await;
            blocking(move || {
                if let Ok(process) = PidFd::open(helper.pid) {
                    process.wait(END_PATIENCE).context(|| "waiting for a pod's helper".into())?;
                }
                Ok(())
            })
            .await?;
        }
        self.helper_is_gone(id).await;
        self.kill_cgroup(id).await
    }

    async fn destroy(&self, id: &str) -> Result<()> {
        self.stop_sandbox(id).await?;
        let (directory, socket, state) =
            (self.sandbox_directory(id), self.socket(id), self.0.config.run.join(short(id)));
        blocking(move || {
            // The record goes first: without it, what is left counts as nobody's and is cleared at the next start.
            for file in [&directory.join(record::SANDBOX), &socket] {
                gone(std::fs::remove_file(file)).context(|| format!("cannot remove {}", file.display()))?;
            }
            for tree in [&directory, &state] {
                gone(std::fs::remove_dir_all(tree)).context(|| format!("cannot remove {}", tree.display()))?;
            }
            Ok(())
        })
        .await?;
        let removed = {
            let mut state = self.state();
            state.containers.retain(|container, c| {
                let is_other = c.sandbox_id != id;
                if !is_other {
                    self.images().unpin(container);
                }
                is_other
            });
            state.sandboxes.remove(id)
        };
        if let Some(sandbox) = removed {
            self.send(id, &sandbox.record.config.uid);
        }
        Ok(())
    }

    fn sandbox_status(&self, id: &str) -> Result<SandboxStatus> {
        let state = self.state();
        let sandbox = state.sandboxes.get(id).ok_or_else(|| not_found("sandbox", id))?;
        Ok(status_of(sandbox))
    }

    fn container(&self, id: &str) -> Result<ContainerStatus> {
        self.state().containers.get(id).cloned().ok_or_else(|| not_found("container", id))
    }

    /// Waits for a container's end; false when `patience` ran out.
    async fn wait_for_exit(&self, id: &str, patience: Duration) -> Result<bool> {
        let mut events = self.0.events.subscribe();
        let ended = async {
            loop {
                match self.container(id) {
                    Ok(status) if status.state.exit().is_none() => {}
                    // Removed counts as ended.
                    _ => return,
                }
                // An overrun of the channel means that much happened: look again.
                let _ = events.recv().await;
            }
        };
        Ok(tokio::time::timeout(patience, ended).await.is_ok())
    }

    fn announce(&self, sandbox: &str) {
        let uid = self.state().sandboxes.get(sandbox).map(|s| s.record.config.uid.clone());
        if let Some(uid) = uid {
            self.send(sandbox, &uid);
        }
    }

    fn send(&self, sandbox: &str, uid: &str) {
        // Nobody listening is fine: the state itself is what counts.
        let _ = self.0.events.send(RuntimeEvent { sandbox_id: sandbox.to_owned(), pod_uid: uid.to_owned() });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no holder of this lock panics")
    }

    fn sandbox_directory(&self, id: &str) -> PathBuf {
        self.0.config.root.join("sandboxes").join(id)
    }

    fn bundle(&self, sandbox: &str, container: &str) -> PathBuf {
        self.sandbox_directory(sandbox).join("containers").join(container)
    }

    fn socket(&self, sandbox: &str) -> PathBuf {
        self.0.config.run.join(format!("{}.sock", short(sandbox)))
    }

    fn cgroup(&self, path: &Path) -> Result<Cgroup> {
        Cgroup::new(path).context(|| "cannot read the mount table".into())
    }

    fn pod_cgroup(&self, sandbox: &str) -> Result<Cgroup> {
        Ok(self.cgroup(&self.0.config.cgroup_parent)?.child(format!("pod-{}", short(sandbox))))
    }

    fn container_record(&self, sandbox: &str, container: &str) -> ContainerRecord {
        ContainerRecord { bundle: self.bundle(sandbox, container) }
    }
}

fn status_of(sandbox: &Sandbox) -> SandboxStatus {
    let record = &sandbox.record;
    SandboxStatus {
        id: record.id.clone(),
        config: record.config.clone(),
        state: if sandbox.ready { SandboxState::Ready } else { SandboxState::NotReady },
        created_at: record.created_at,
        ips: record.ips.clone(),
        pid: record.helper.map(|h| h.pid),
    }
}

fn sandbox_network(record: &SandboxRecord) -> SandboxNetwork {
    SandboxNetwork {
        id: record.id.clone(),
        namespace: record.config.namespace.clone(),
        name: record.config.name.clone(),
        netns: PathBuf::from(format!("/proc/{}/ns/net", record.helper.map_or(0, |h| h.pid))),
        port_mappings: record.config.port_mappings.clone(),
    }
}

fn resolv_conf(config: &SandboxConfig) -> String {
    let mut text = String::new();
    if !config.dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", config.dns.searches.join(" ")));
    }
    for server in &config.dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !config.dns.options.is_empty() {
        text.push_str(&format!("options {}\n", config.dns.options.join(" ")));
    }
    text
}

/// Long enough to be unique on a node, short enough for socket paths.
const SHORT: usize = 12;

fn short(id: &str) -> &str {
    id.get(..SHORT).unwrap_or(id)
}

/// 64 hexadecimal digits, as every runtime names things.
fn new_id() -> Result<String> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| io::Read::read_exact(&mut f, &mut bytes))
        .context(|| "cannot read /dev/urandom".into())?;
    Ok(crate::image::hex(&bytes))
}

fn not_found(kind: &'static str, id: &str) -> RuntimeError {
    RuntimeError::NotFound { kind, id: id.to_owned() }
}

/// What is not there need not be removed.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| RuntimeError::Helper(format!("interrupted: {e}")))?
}
