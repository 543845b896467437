//! One task per pod: observe, decide, act, report; again whenever something changes.

mod end;
mod pull;
mod start;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reconcile::{Api, ApiError, Cache, EventKind, ObjectRef, Patch, Recorder};
use runtime::{ImageService, RuntimeService};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::barrier::{Barrier, Gate};
use crate::container::{sandbox_config, unsupported, wants_seccomp};
use crate::dns::{hosts_file, parse_resolv_conf, pod_dns};
use crate::plan::{BackOff, Failure, ImageState, Observed, Step, sync_pod};
use crate::pod::{Pod, PodStatus};
use crate::probe::{Prober, Report, Subject};
use crate::services::Service;
use crate::status::{Facts, duration, pod_ips, pod_status};
use crate::volumes::Volumes;
use crate::{KubeletConfig, NodeFacts};

/// What all workers of a node share.
pub struct Shared {
    pub config: KubeletConfig,
    pub node: NodeFacts,
    pub runtime: Arc<dyn RuntimeService>,
    pub images: Arc<dyn ImageService>,
    pub pods: Api,
    pub volumes: Volumes,
    pub recorder: Recorder,
    pub services: Cache<Service>,
    pub barrier: Arc<Barrier>,
}

/// `None` once the object has gone from the API.
pub type PodInput = watch::Receiver<Option<Arc<Pod>>>;

const REFRESH: Duration = Duration::from_secs(60);
const RETRY: SignedDuration = SignedDuration::from_secs(5);

pub struct Worker {
    shared: Arc<Shared>,
    input: PodInput,
    wake: Arc<Notify>,
    token: CancellationToken,
    /// The last pod seen; kept when the object goes.
    pod: Arc<Pod>,
    memory: Arc<Mutex<Memory>>,
    probers: HashMap<String, Prober>,
    messages: BTreeMap<String, String>,
    written: Option<Value>,
    volumes_checked: Option<tokio::time::Instant>,
    volume_failure: Option<Failure>,
    volume_failures: u32,
    /// What holds its end back, once it is deleted.
    gate: Option<Arc<Gate>>,
    finished: bool,
}

/// What background tasks of a pod tell its worker.
#[derive(Default)]
struct Memory {
    images: BTreeMap<String, ImageState>,
    pull_failures: BTreeMap<String, u32>,
    killing: BTreeMap<String, Killing>,
    failures: BTreeMap<String, Failure>,
    backoffs: BTreeMap<String, BackOff>,
    sandbox_failure: Option<Failure>,
    /// Ids of ended containers whose back-off was announced.
    announced: Vec<String>,
}

/// A container that is being ended, at the latest then.
struct Killing {
    until: Timestamp,
    stop: CancellationToken,
}

impl Worker {
    pub fn new(
        shared: Arc<Shared>,
        pod: Arc<Pod>,
        input: PodInput,
        wake: Arc<Notify>,
        token: CancellationToken,
    ) -> Worker {
        Worker {
            shared,
            input,
            wake,
            token,
            pod,
            memory: Arc::default(),
            probers: HashMap::new(),
            messages: BTreeMap::new(),
            written: None,
            volumes_checked: None,
            volume_failure: None,
            volume_failures: 0,
            gate: None,
            finished: false,
        }
    }

    /// Runs until the pod has ended here, or the agent ends.
    pub async fn run(mut self) {
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let until = match self.turn().await {
                Ok(until) => until,
                Err(e) => {
                    tracing::warn!(pod = %self.pod.key(), "{e}");
                    Some(Timestamp::now() + SignedDuration::from_secs(1))
                }
            };
            if self.finished {
                return;
            }
            let timer = async {
                match until {
                    Some(until) => {
                        let left = until.duration_since(Timestamp::now());
                        tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.token.cancelled() => return,
                changed = self.input.changed() => if changed.is_err() { return },
                () = self.wake.notified() => {}
                () = timer => {}
                _ = refresh.tick() => {}
            }
        }
    }

    /// One round. Returns when to look again, should nothing happen before.
    async fn turn(&mut self) -> Result<Option<Timestamp>, WorkerError> {
        let mut latest: Option<Timestamp> = None;
        // Each round of steps changes what is observed; a pod needs a handful until it rests.
        for _ in 0..50 {
            self.read_input();
            let mut observed = self.observe().await?;
            self.prepare_volumes(&mut observed).await;
            let now = Timestamp::now();
            let pod = self.view();
            let steps = sync_pod(&pod, &observed, now);
            self.announce_backoffs(&pod, &observed, now);
            self.report(&pod, &observed).await?;
            latest = self.volume_failure.as_ref().map(|f| f.until);
            let mut acted = false;
            for step in steps {
                match step {
                    Step::Wait { until } => latest = Some(latest.map_or(until, |l| l.min(until))),
                    step => {
                        acted = true;
                        self.act(&pod, &observed, step).await?;
                    }
                }
                if self.finished {
                    return Ok(None);
                }
            }
            if !acted {
                break;
            }
        }
        Ok(latest)
    }

    fn read_input(&mut self) {
        let input = self.input.borrow_and_update().clone();
        match input {
            Some(pod) => self.pod = pod,
            None if !self.pod.metadata.is_deleting() || self.pod.grace() > 1 => {
                // Removed by force: nobody waits for a grace period any more.
                let mut gone = (*self.pod).clone();
                gone.metadata.deletion_timestamp = Some(api::time::seconds(Timestamp::now()));
                gone.metadata.deletion_grace_period_seconds = Some(1);
                self.pod = Arc::new(gone);
            }
            None => {}
        }
    }

    /// The pod with the status that we wrote last, which the API may not have told us yet.
    fn view(&self) -> Pod {
        let mut pod = (*self.pod).clone();
        if let Some(written) = &self.written
            && let Ok(mut status) = serde_json::from_value::<PodStatus>(written.clone())
        {
            let ours: Vec<Option<&str>> = status.conditions.iter().map(|c| c["type"].as_str()).collect();
            let foreign: Vec<Value> =
                pod.status.conditions.iter().filter(|c| !ours.contains(&c["type"].as_str())).cloned().collect();
            status.conditions.extend(foreign);
            pod.status = status;
        }
        pod
    }

    async fn observe(&mut self) -> Result<Observed, WorkerError> {
        let uid = &self.pod.metadata.uid;
        let mut sandboxes = self.shared.runtime.list_pod_sandboxes().await?;
        sandboxes.retain(|s| s.config.uid == *uid);
        let mut containers = self.shared.runtime.list_containers().await?;
        containers.retain(|c| sandboxes.iter().any(|s| s.id == c.sandbox_id));
        let mut observed = Observed { sandboxes, containers, ..Observed::default() };
        {
            let memory = self.memory();
            observed.images = memory.images.clone();
            observed.killing = memory.killing.iter().map(|(id, k)| (id.clone(), k.until)).collect();
            observed.failures = memory.failures.clone();
            observed.backoffs = memory.backoffs.clone();
            observed.sandbox_failure = memory.sandbox_failure.clone();
        }
        self.tend_probers(&observed);
        observed.probes = self.probers.iter().map(|(id, p)| (id.clone(), p.state())).collect();
        self.read_messages(&observed);
        Ok(observed)
    }

    fn tend_probers(&mut self, observed: &Observed) {
        let pod = self.pod.clone();
        let ending = pod.metadata.is_deleting();
        let running = |id: &str| observed.containers.iter().any(|c| c.id == id && c.state.is_running());
        // What ends with its pod is still ready: where no other endpoint is left, Services go on using it.
        self.probers.retain(|id, _| running(id) && (ending || !observed.killing.contains_key(id)));
        if ending {
            self.probers.values_mut().for_each(Prober::only_readiness);
        }
        let ip = pod_ips(&pod, observed, &self.shared.config.node_ips).first().copied();
        for container in pod.all_containers() {
            let Some(status) = observed.latest(&container.name) else { continue };
            let runtime::ContainerState::Running(started) = &status.state else { continue };
            if self.probers.contains_key(&status.id) || observed.killing.contains_key(&status.id) {
                continue;
            }
            let mut container = container.clone();
            if ending {
                // What is to end is not started anew, but who asks may still learn that it is ready.
                container.liveness_probe = None;
                container.startup_probe = None;
            }
            let id = format!("fairlead://{}", status.id);
            let reported = pod.status.container_statuses.iter().chain(&pod.status.init_container_statuses);
            let reported = reported.into_iter().find(|s| s.container_id == id);
            let age = Timestamp::now().duration_since(started.at);
            let subject = Subject {
                runtime: self.shared.runtime.clone(),
                container_id: status.id.clone(),
                pod_ip: ip,
                wake: self.wake.clone(),
                report: self.reporter(&container.name),
                age: Duration::try_from(age).unwrap_or_default(),
                was_started: reported.is_some_and(|s| s.started),
                was_ready: reported.is_some_and(|s| s.ready),
                container,
            };
            self.probers.insert(status.id.clone(), Prober::start(subject));
        }
    }

    /// Termination messages are read once, when a container is first seen ended.
    fn read_messages(&mut self, observed: &Observed) {
        self.messages.retain(|id, _| observed.containers.iter().any(|c| c.id == *id));
        for status in observed.containers.iter().filter(|c| c.state.exit().is_some()) {
            if self.messages.contains_key(&status.id) {
                continue;
            }
            let container = self.pod.all_containers().find(|c| c.name == status.config.name);
            let file = self.message_file(&status.config.name, status.config.attempt);
            let mut text = read_tail(&file, 4096);
            let falls_back = container.is_some_and(|c| c.termination_message_policy == "FallbackToLogsOnError");
            if text.is_empty() && falls_back && status.state.exit().is_some_and(|e| e.code != 0) {
                let log = read_tail(&status.config.log_path, 8192);
                let lines: Vec<&str> = log.lines().filter_map(|l| l.splitn(4, ' ').nth(3)).collect();
                text = lines[lines.len().saturating_sub(80)..].join("\n");
            }
            self.messages.insert(status.id.clone(), text);
        }
    }

    async fn prepare_volumes(&mut self, observed: &mut Observed) {
        let ended = self.pod.metadata.is_deleting() || crate::plan::is_terminal(&self.view(), observed);
        if ended {
            return;
        }
        let due = self.volumes_checked.is_none_or(|at| at.elapsed() >= REFRESH);
        let blocked = self.volume_failure.as_ref().is_some_and(|f| f.until > Timestamp::now());
        if due && !blocked {
            let sources = self.plain_sources(observed);
            match self.shared.volumes.prepare(&self.pod, &sources).await {
                Ok(_) => {
                    self.volumes_checked = Some(tokio::time::Instant::now());
                    self.volume_failure = None;
                    self.volume_failures = 0;
                }
                Err(e) => {
                    self.event("", EventKind::Warning, "FailedMount", e.to_string());
                    self.volume_failures += 1;
                    let delay = SignedDuration::from_millis(500) * 2_i32.pow(self.volume_failures.min(7));
                    self.volume_failure = Some(Failure {
                        reason: "ContainerCreating".to_owned(),
                        message: e.to_string(),
                        until: Timestamp::now() + delay,
                    });
                }
            }
        }
        observed.volumes_ready = self.volumes_checked.is_some();
    }

    async fn act(&mut self, pod: &Pod, observed: &Observed, step: Step) -> Result<(), WorkerError> {
        let shared = self.shared.clone();
        match step {
            Step::RunSandbox { attempt } => self.run_sandbox(pod, observed, attempt).await,
            Step::StopSandbox { id } => Ok(shared.runtime.stop_pod_sandbox(&id).await?),
            Step::RemoveSandbox { id } => Ok(shared.runtime.remove_pod_sandbox(&id).await?),
            Step::RemoveContainer { id } => Ok(shared.runtime.remove_container(&id).await?),
            Step::PullImage { container } => {
                if let Some(container) = pod.all_containers().find(|c| c.name == container) {
                    self.pull(pod, container).await?;
                }
                Ok(())
            }
            Step::StartContainer { name, attempt } => {
                if let Some(container) = pod.all_containers().find(|c| c.name == name) {
                    self.start_container(pod, container, attempt, observed).await;
                }
                Ok(())
            }
            Step::KillContainer { id, name, grace, why } => {
                self.kill(pod, observed, &id, &name, grace, why);
                Ok(())
            }
            Step::Finish => self.finish(pod).await,
            Step::Wait { .. } => Ok(()),
        }
    }

    async fn run_sandbox(&mut self, pod: &Pod, observed: &Observed, attempt: u32) -> Result<(), WorkerError> {
        if attempt > 0 && !observed.containers.is_empty() {
            let message = "Pod sandbox changed, it will be killed and re-created.";
            self.event("", EventKind::Normal, "SandboxChanged", message.to_owned());
        }
        let sources = self.plain_sources(observed);
        let result = async {
            if let Some(why) = unsupported(pod) {
                return Err(why);
            }
            let tmpfs = self.shared.volumes.prepare(pod, &sources).await.map_err(|e| e.to_string())?;
            let node_dns = std::fs::read_to_string(&self.shared.config.resolv_conf).unwrap_or_default();
            let dns = pod_dns(pod, &self.shared.config.cluster_dns, &parse_resolv_conf(&node_dns));
            let config = sandbox_config(pod, attempt, dns, tmpfs, &self.shared.config.node_name);
            self.shared.runtime.run_pod_sandbox(config).await.map_err(|e| e.to_string())
        }
        .await;
        self.memory().sandbox_failure = None;
        match result {
            Ok(sandbox) => {
                if wants_seccomp(pod) {
                    let message =
                        "seccompProfile RuntimeDefault: this node runs containers without a system call filter";
                    self.event("", EventKind::Warning, "SeccompUnavailable", message.to_owned());
                }
                let ips = if pod.spec.host_network { self.shared.config.node_ips.clone() } else { sandbox.ips };
                self.write_hosts(pod, &ips)?;
            }
            Err(message) => {
                let text = format!("Failed to create pod sandbox: {message}");
                self.event("", EventKind::Warning, "FailedCreatePodSandBox", text);
                self.memory().sandbox_failure =
                    Some(Failure { reason: "ContainerCreating".to_owned(), message, until: Timestamp::now() + RETRY });
            }
        }
        Ok(())
    }

    fn write_hosts(&self, pod: &Pod, ips: &[IpAddr]) -> std::io::Result<()> {
        let directory = self.shared.volumes.pod_directory(&pod.metadata.uid);
        let node = match pod.spec.host_network {
            true => Some(std::fs::read_to_string("/etc/hosts").unwrap_or_default()),
            false => None,
        };
        let text = hosts_file(pod, ips, &self.shared.config.cluster_dns.domain, node.as_deref());
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("etc-hosts"), text)
    }

    fn announce_backoffs(&self, pod: &Pod, observed: &Observed, now: Timestamp) {
        for container in pod.all_containers() {
            let Some(status) = observed.latest(&container.name) else { continue };
            let Some(exit) = status.state.exit() else { continue };
            let Some(backoff) = observed.backoffs.get(&container.name) else { continue };
            let mut memory = self.memory();
            if backoff.until(exit.at) > now && !memory.announced.contains(&status.id) {
                memory.announced.retain(|id| observed.containers.iter().any(|c| c.id == *id));
                memory.announced.push(status.id.clone());
                drop(memory);
                let message = format!(
                    "Back-off restarting failed container {} in pod {}_{}({})",
                    container.name, pod.metadata.name, pod.metadata.namespace, pod.metadata.uid
                );
                tracing::debug!(pod = %pod.key(), delay = %duration(backoff.delay.as_secs()), "backing off");
                self.event(&container.name, EventKind::Warning, "BackOff", message);
            }
        }
    }

    /// Writes the status when it differs from what was written last.
    async fn report(&mut self, pod: &Pod, observed: &Observed) -> Result<(), WorkerError> {
        let facts = Facts {
            node_ips: self.shared.config.node_ips.clone(),
            messages: self.messages.clone(),
            now: Timestamp::now(),
        };
        let status = pod_status(pod, observed, &facts);
        if self.written.as_ref() == Some(&status) {
            return Ok(());
        }
        let body = json!({"metadata": {"uid": pod.metadata.uid}, "status": status});
        let (namespace, name) = (&pod.metadata.namespace, &pod.metadata.name);
        match self.shared.pods.patch_status(namespace, name, Patch::Merge, &body).await {
            Ok(_) => {}
            // The object has gone; its end is on its way to us.
            Err(e) if e.is_not_found() || e.is_conflict() => {}
            Err(e) => return Err(e.into()),
        }
        self.written = Some(status);
        Ok(())
    }

    fn event(&self, container: &str, kind: EventKind, reason: &str, message: String) {
        self.reporter(container)(kind, reason, message);
    }

    fn reporter(&self, container: &str) -> Report {
        let metadata = &self.pod.metadata;
        let mut about = ObjectRef::new("v1", "Pod", &metadata.namespace, &metadata.name, &metadata.uid);
        if !container.is_empty() {
            let is_init = self.pod.spec.init_containers.iter().any(|c| c.name == container);
            let list = if is_init { "initContainers" } else { "containers" };
            about.field_path = format!("spec.{list}{{{container}}}");
        }
        let recorder = self.shared.recorder.clone();
        Arc::new(move |kind, reason, message| recorder.event(&about, kind, reason, message))
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().expect("no holder panics")
    }
}

/// The end of a file that may not be there.
fn read_tail(path: &Path, limit: u64) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Runtime(#[from] runtime::RuntimeError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("the pod's files: {0}")]
    Io(#[from] std::io::Error),
}
