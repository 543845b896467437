//! What to do next about one pod. Pure: the pod as the API wants it and as the node sees it go in, steps come out.
//!
//! Nothing here remembers. A restarted kubelet that observes the same node takes the same steps.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use runtime::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};

use crate::pod::{Container, Pod, RestartPolicy};

/// One thing to do. Steps of one plan are independent of each other and taken in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    RunSandbox {
        attempt: u32,
    },
    /// Ends its processes and releases its network; its containers stay listed.
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    PullImage {
        container: String,
    },
    StartContainer {
        name: String,
        attempt: u32,
    },
    KillContainer {
        id: String,
        name: String,
        grace: i64,
        why: String,
    },
    RemoveContainer {
        id: String,
    },
    /// Everything has ended: remove volumes and directories, then the object itself.
    Finish,
    /// Nothing can happen before this time.
    Wait {
        until: Timestamp,
    },
}

/// One pod as this node sees it.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub sandboxes: Vec<SandboxStatus>,
    pub containers: Vec<ContainerStatus>,
    /// By the name of the container that wants it.
    pub images: BTreeMap<String, ImageState>,
    /// Ids of containers that are being ended, and when they will be killed at the latest.
    pub killing: BTreeMap<String, Timestamp>,
    pub probes: BTreeMap<String, ProbeState>,
    /// Why a container could not be made, and when to try again.
    pub failures: BTreeMap<String, Failure>,
    pub backoffs: BTreeMap<String, BackOff>,
    pub sandbox_failure: Option<Failure>,
    /// Volumes are there and filled.
    pub volumes_ready: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum ImageState {
    Present,
    Pulling,
    /// With the time of the next attempt.
    Failed {
        reason: String,
        message: String,
        until: Timestamp,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub reason: String,
    pub message: String,
    pub until: Timestamp,
}

/// Results of probes of one container, by its id.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProbeState {
    /// The startup probe has succeeded, or there is none.
    pub started: bool,
    pub ready: bool,
    /// Set when the liveness or the startup probe has given up.
    pub unhealthy: Option<Unhealthy>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Unhealthy {
    pub message: String,
    pub grace: Option<i64>,
}

/// Restarts of one container so far: the next waits for `delay` after the last end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BackOff {
    pub delay: SignedDuration,
    pub updated: Timestamp,
}

const FIRST_DELAY: SignedDuration = SignedDuration::from_secs(10);
const LAST_DELAY: SignedDuration = SignedDuration::from_secs(300);
/// After this long without an end a container starts over with the first delay.
const FORGIVEN: SignedDuration = SignedDuration::from_secs(600);

impl BackOff {
    /// The entry after one more restart.
    pub fn next(before: Option<BackOff>, now: Timestamp) -> BackOff {
        match before {
            Some(b) if now.duration_since(b.updated) <= FORGIVEN + b.delay => {
                BackOff { delay: (b.delay * 2).min(LAST_DELAY), updated: now }
            }
            _ => BackOff { delay: FIRST_DELAY, updated: now },
        }
    }

    /// When a container that ended then may start again.
    pub fn until(&self, ended: Timestamp) -> Timestamp {
        if ended.duration_since(self.updated) > FORGIVEN {
            return ended;
        }
        ended.checked_add(self.delay).unwrap_or(ended)
    }
}

impl Observed {
    /// The sandbox in use: the newest.
    pub fn sandbox(&self) -> Option<&SandboxStatus> {
        self.sandboxes.iter().max_by_key(|s| (s.config.attempt, s.created_at))
    }

    pub fn ready_sandbox(&self) -> Option<&SandboxStatus> {
        self.sandbox().filter(|s| s.state == SandboxState::Ready)
    }

    /// The newest container of that name, in any sandbox.
    pub fn latest(&self, name: &str) -> Option<&ContainerStatus> {
        self.containers.iter().filter(|c| c.config.name == name).max_by_key(|c| (c.config.attempt, c.created_at))
    }

    pub fn previous(&self, name: &str) -> Option<&ContainerStatus> {
        let latest = &self.latest(name)?.id;
        self.containers
            .iter()
            .filter(|c| c.config.name == name && c.id != *latest)
            .max_by_key(|c| (c.config.attempt, c.created_at))
    }

    /// The newest container of that name in the sandbox in use.
    fn current(&self, name: &str) -> Option<&ContainerStatus> {
        let sandbox = &self.sandbox()?.id;
        self.latest(name).filter(|c| c.sandbox_id == *sandbox)
    }

    fn is_running(&self, name: &str) -> bool {
        self.current(name).is_some_and(|c| c.state.is_running())
    }

    pub fn is_started(&self, name: &str) -> bool {
        self.current(name).is_some_and(|c| c.state.is_running() && self.probes.get(&c.id).is_some_and(|p| p.started))
    }
}

/// Whether a container that ended so is to run again.
pub fn wants_restart(pod: &Pod, container: &Container, code: i32) -> bool {
    if container.is_sidecar() {
        return true;
    }
    let is_init = pod.spec.init_containers.iter().any(|c| c.name == container.name);
    match pod.spec.restart_policy {
        RestartPolicy::Always => !is_init || code != 0,
        RestartPolicy::OnFailure => code != 0,
        RestartPolicy::Never => false,
    }
}

/// The pod's work is over and will not be started again.
pub fn is_terminal(pod: &Pod, observed: &Observed) -> bool {
    if matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
        return true;
    }
    let over = |container: &Container| {
        observed
            .latest(&container.name)
            .and_then(|c| c.state.exit())
            .is_some_and(|exit| !wants_restart(pod, container, exit.code))
    };
    let init_failed =
        pod.spec.init_containers.iter().filter(|c| !c.is_sidecar()).any(|c| {
            over(c) && observed.latest(&c.name).and_then(|c| c.state.exit()).is_some_and(|exit| exit.code != 0)
        });
    init_failed || (!pod.spec.containers.is_empty() && pod.spec.containers.iter().all(over))
}

/// The time after which activeDeadlineSeconds fails the pod.
pub fn deadline(pod: &Pod) -> Option<Timestamp> {
    let start: Timestamp = pod.status.start_time.as_ref()?.parse().ok()?;
    start.checked_add(SignedDuration::from_secs(pod.spec.active_deadline_seconds?)).ok()
}

pub fn sync_pod(pod: &Pod, observed: &Observed, now: Timestamp) -> Vec<Step> {
    let expired = deadline(pod).is_some_and(|d| d <= now);
    if pod.metadata.is_deleting() {
        return end(pod, observed, pod.grace(), now, Some(Step::Finish));
    }
    if is_terminal(pod, observed) || expired {
        return end(pod, observed, pod.spec.termination_grace_period_seconds.unwrap_or(30), now, None);
    }
    let mut steps = Vec::new();
    let Some(sandbox) = observed.ready_sandbox() else {
        if let Some(gone) = observed.sandbox() {
            // Its network is given back; its containers stay, for their numbers and last states.
            steps.push(Step::StopSandbox { id: gone.id.clone() });
        }
        match &observed.sandbox_failure {
            _ if !observed.volumes_ready => {}
            Some(failure) if failure.until > now => steps.push(Step::Wait { until: failure.until }),
            _ => {
                let attempt = observed.sandbox().map_or(0, |s| s.config.attempt + 1);
                steps.push(Step::RunSandbox { attempt });
            }
        }
        return steps;
    };
    for old in observed.sandboxes.iter().filter(|s| s.id != sandbox.id) {
        // Kept while it holds the last that is known of some container.
        let superseded = |c: &ContainerStatus| observed.latest(&c.config.name).is_none_or(|l| l.sandbox_id != old.id);
        if observed.containers.iter().filter(|c| c.sandbox_id == old.id).all(superseded) {
            steps.push(Step::RemoveSandbox { id: old.id.clone() });
        }
    }
    for container in &observed.containers {
        let name = &container.config.name;
        let is_kept = observed.latest(name).is_some_and(|l| l.id == container.id)
            || observed.previous(name).is_some_and(|p| p.id == container.id);
        if !is_kept && !container.state.is_running() && container.sandbox_id == sandbox.id {
            steps.push(Step::RemoveContainer { id: container.id.clone() });
        }
    }
    for container in pod.all_containers() {
        let Some(current) = observed.current(&container.name).filter(|c| c.state.is_running()) else { continue };
        if let Some(unhealthy) = observed.probes.get(&current.id).and_then(|p| p.unhealthy.as_ref())
            && !observed.killing.contains_key(&current.id)
        {
            let grace = unhealthy.grace.or(pod.spec.termination_grace_period_seconds).unwrap_or(30);
            steps.push(Step::KillContainer {
                id: current.id.clone(),
                name: container.name.clone(),
                grace,
                why: format!("Container {} {}, will be restarted", container.name, unhealthy.message),
            });
        }
    }
    // Once an app container runs in this sandbox, its init containers are over, whatever became of their records.
    let initialized = pod.spec.containers.iter().any(|c| observed.current(&c.name).is_some());
    for container in &pod.spec.init_containers {
        if container.is_sidecar() {
            start_if_wanted(pod, container, observed, now, &mut steps);
            if !initialized && !observed.is_started(&container.name) {
                return with_deadline(pod, steps);
            }
            continue;
        }
        if initialized {
            continue;
        }
        let done = observed.current(&container.name).and_then(|c| c.state.exit()).is_some_and(|e| e.code == 0);
        if !done {
            start_if_wanted(pod, container, observed, now, &mut steps);
            return with_deadline(pod, steps);
        }
    }
    for container in &pod.spec.containers {
        start_if_wanted(pod, container, observed, now, &mut steps);
    }
    with_deadline(pod, steps)
}

fn with_deadline(pod: &Pod, mut steps: Vec<Step>) -> Vec<Step> {
    steps.extend(deadline(pod).map(|until| Step::Wait { until }));
    steps
}

fn start_if_wanted(pod: &Pod, container: &Container, observed: &Observed, now: Timestamp, steps: &mut Vec<Step>) {
    let name = &container.name;
    if observed.is_running(name) || observed.current(name).is_some_and(|c| c.state == ContainerState::Created) {
        return;
    }
    let latest = observed.latest(name);
    if let Some(exit) = latest.and_then(|c| c.state.exit()) {
        // In a new sandbox init containers run once more; others only as their policy says.
        let is_init = pod.spec.init_containers.iter().any(|c| c.name == *name);
        let again = is_init && observed.current(name).is_none();
        if !again && !wants_restart(pod, container, exit.code) {
            return;
        }
        if let Some(until) = observed.backoffs.get(name).map(|b| b.until(exit.at))
            && until > now
        {
            steps.push(Step::Wait { until });
            return;
        }
    }
    if let Some(failure) = observed.failures.get(name).filter(|f| f.until > now) {
        steps.push(Step::Wait { until: failure.until });
        return;
    }
    match observed.images.get(name) {
        Some(ImageState::Present) => {
            let attempt = latest.map_or_else(|| reported_restarts(pod, name), |c| c.config.attempt + 1);
            steps.push(Step::StartContainer { name: name.clone(), attempt });
        }
        Some(ImageState::Pulling) => {}
        Some(ImageState::Failed { until, .. }) if *until > now => steps.push(Step::Wait { until: *until }),
        _ => steps.push(Step::PullImage { container: name.clone() }),
    }
}

/// Zero for a container that never ran; one more than reported when its records were lost with the node's files.
fn reported_restarts(pod: &Pod, name: &str) -> u32 {
    let reported = pod.status.container_statuses.iter().chain(&pod.status.init_container_statuses);
    reported.into_iter().find(|s| s.name == name && s.restart_count > 0).map_or(0, |s| s.restart_count + 1)
}

/// App containers first, then sidecars from the last to the first, then the sandbox.
fn end(pod: &Pod, observed: &Observed, grace: i64, now: Timestamp, last: Option<Step>) -> Vec<Step> {
    let kill = |container: &ContainerStatus| Step::KillContainer {
        id: container.id.clone(),
        name: container.config.name.clone(),
        grace,
        why: format!("Stopping container {}", container.config.name),
    };
    let running: Vec<&ContainerStatus> = observed.containers.iter().filter(|c| c.state.is_running()).collect();
    let is_sidecar =
        |c: &ContainerStatus| pod.spec.init_containers.iter().any(|i| i.name == c.config.name && i.is_sidecar());
    let (sidecars, others): (Vec<_>, Vec<_>) = running.into_iter().partition(|c| is_sidecar(c));
    let due: Vec<&ContainerStatus> = if others.is_empty() {
        let rank = |c: &&ContainerStatus| pod.spec.init_containers.iter().position(|i| i.name == c.config.name);
        sidecars.into_iter().max_by_key(rank).into_iter().collect()
    } else {
        others
    };
    if !due.is_empty() {
        // A kill under way is replaced only by one that ends at least a second sooner.
        let sooner = now.saturating_add(SignedDuration::from_secs(grace.saturating_add(1))).unwrap_or(Timestamp::MAX);
        let is_due = |c: &&ContainerStatus| observed.killing.get(&c.id).is_none_or(|until| sooner < *until);
        return due.into_iter().filter(is_due).map(kill).collect();
    }
    let ready = observed.sandboxes.iter().filter(|s| s.state == SandboxState::Ready);
    let mut steps: Vec<Step> = ready.map(|s| Step::StopSandbox { id: s.id.clone() }).collect();
    if let Some(last) = last {
        steps.extend(observed.sandboxes.iter().map(|s| Step::RemoveSandbox { id: s.id.clone() }));
        steps.push(last);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::{ContainerConfig, Exit, SandboxConfig, Started};
    use serde_json::{Value, json};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).expect("a time")
    }

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": spec})).expect("a pod")
    }

    /// `s0`, `s0!` (not ready); `a.0 run`, `a.1 exit 1 @5`; `img a`, `ok a.0` (started and ready), `kill a.0`.
    fn observed(words: &[&str]) -> Observed {
        let mut o = Observed { volumes_ready: true, ..Observed::default() };
        for word in words {
            let parts: Vec<&str> = word.split(' ').collect();
            let split = |id: &str| {
                let (name, attempt) = id.split_once('.').expect("name.attempt");
                (name.to_owned(), attempt.parse::<u32>().expect("a number"))
            };
            match parts[..] {
                ["img", name] => {
                    o.images.insert(name.to_owned(), ImageState::Present);
                }
                ["ok", id] => {
                    let state = ProbeState { started: true, ready: true, unhealthy: None };
                    o.probes.insert(id.to_owned(), state);
                }
                ["kill", id] => {
                    o.killing.insert(id.to_owned(), at(107));
                }
                ["kill", id, until] => {
                    o.killing.insert(id.to_owned(), at(until[1..].parse().expect("a number")));
                }
                ["sick", id] => {
                    let unhealthy = Some(Unhealthy { message: "failed liveness probe".into(), grace: None });
                    o.probes.insert(id.to_owned(), ProbeState { started: true, ready: true, unhealthy });
                }
                ["back", name, seconds] => {
                    let delay = SignedDuration::from_secs(seconds.parse().expect("a number"));
                    o.backoffs.insert(name.to_owned(), BackOff { delay, updated: at(0) });
                }
                [sandbox] => {
                    let id = sandbox.trim_end_matches('!');
                    let attempt = id[1..].parse().expect("a number");
                    o.sandboxes.push(SandboxStatus {
                        id: id.to_owned(),
                        config: SandboxConfig { attempt, ..SandboxConfig::default() },
                        state: if sandbox.ends_with('!') { SandboxState::NotReady } else { SandboxState::Ready },
                        created_at: at(0),
                        ips: vec![],
                        pid: None,
                    });
                }
                [id, ref state @ ..] => {
                    let (name, attempt) = split(id);
                    let started = Started { pid: 1, start_time: 1, at: at(0) };
                    let state = match state[..] {
                        ["run"] => ContainerState::Running(started),
                        ["exit", code, ended] => ContainerState::Exited {
                            started: Some(started),
                            exit: Exit {
                                code: code.parse().expect("a number"),
                                signal: None,
                                oom_killed: false,
                                at: at(ended[1..].parse().expect("a number")),
                                message: String::new(),
                            },
                        },
                        _ => panic!("{word}"),
                    };
                    o.containers.push(ContainerStatus {
                        id: id.to_owned(),
                        sandbox_id: o.sandboxes.last().expect("a sandbox first").id.clone(),
                        config: ContainerConfig { name, attempt, ..ContainerConfig::default() },
                        image_id: String::new(),
                        image_ref: String::new(),
                        created_at: at(i64::from(attempt)),
                        state,
                    });
                }
                [] => {}
            }
        }
        o
    }

    fn show(steps: &[Step]) -> String {
        let one = |step: &Step| match step {
            Step::RunSandbox { attempt } => format!("run sandbox {attempt}"),
            Step::StopSandbox { id } => format!("stop {id}"),
            Step::RemoveSandbox { id } => format!("remove {id}"),
            Step::PullImage { container } => format!("pull {container}"),
            Step::StartContainer { name, attempt } => format!("start {name}.{attempt}"),
            Step::KillContainer { id, grace, .. } => format!("kill {id} in {grace}"),
            Step::RemoveContainer { id } => format!("remove {id}"),
            Step::Finish => "finish".to_owned(),
            Step::Wait { until } => format!("wait {}", until.as_second() - 1_000_000),
        };
        steps.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn steps_follow_from_what_is_seen() {
        let two = json!({"containers": [{"name": "a"}, {"name": "b"}]});
        let once = json!({"restartPolicy": "Never", "containers": [{"name": "a"}]});
        let retry = json!({"restartPolicy": "OnFailure", "containers": [{"name": "a"}]});
        let init = json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]});
        let side = json!({"initContainers": [{"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "a"}]});
        let cases: &[(&str, &Value, &[&str], &str)] = &[
            ("a new pod gets a sandbox", &two, &[], "run sandbox 0"),
            ("then its images", &two, &["s0"], "pull a, pull b"),
            ("then its containers", &two, &["s0", "img a", "img b"], "start a.0, start b.0"),
            ("one that runs is left alone", &two, &["s0", "a.0 run", "img b"], "start b.0"),
            ("the first restart is immediate", &two, &["s0", "a.0 exit 0 @9", "b.0 run", "img a"], "start a.1"),
            ("later ones wait", &two, &["s0", "a.1 exit 1 @95", "b.0 run", "back a 10"], "wait 105"),
            ("and then happen", &two, &["s0", "a.1 exit 1 @80", "b.0 run", "back a 10", "img a"], "start a.2"),
            ("old records go", &two, &["s0", "a.0 exit 1 @1", "a.1 exit 1 @2", "a.2 run", "b.0 run"], "remove a.0"),
            ("Never means never", &once, &["s0", "a.0 exit 1 @9"], "stop s0"),
            ("success ends OnFailure", &retry, &["s0", "a.0 exit 0 @9"], "stop s0"),
            ("failure does not", &retry, &["s0", "a.0 exit 2 @9", "img a"], "start a.1"),
            ("init containers come first", &init, &["s0", "img i", "img a"], "start i.0"),
            ("while one runs nothing else does", &init, &["s0", "i.0 run", "img a"], ""),
            ("a failed one runs again", &init, &["s0", "i.0 exit 1 @9", "img i"], "start i.1"),
            ("after success the others start", &init, &["s0", "i.0 exit 0 @9", "img a"], "start a.0"),
            ("a sidecar must be started first", &side, &["s0", "s.0 run", "img a"], ""),
            ("once started the others go", &side, &["s0", "s.0 run", "ok s.0", "img a"], "start a.0"),
            ("a sick container is killed", &two, &["s0", "a.0 run", "b.0 run", "sick a.0"], "kill a.0 in 30"),
            ("but once", &two, &["s0", "a.0 run", "b.0 run", "sick a.0", "kill a.0"], ""),
            ("a lost sandbox is replaced", &two, &["s0!", "a.0 exit 137 @9"], "stop s0, run sandbox 1"),
            (
                "its numbers go on",
                &two,
                &["s0!", "a.0 exit 137 @9", "b.0 exit 137 @9", "s1", "img a", "img b"],
                "start a.1, start b.1",
            ),
            ("then its records go", &two, &["s0!", "a.0 exit 137 @9", "s1", "a.1 run", "b.0 run"], "remove s0"),
            ("a lost Never is over", &once, &["s0!", "a.0 exit 137 @9"], ""),
        ];
        for (title, spec, words, expected) in cases {
            let steps = sync_pod(&pod((*spec).clone()), &observed(words), at(100));
            assert_eq!(show(&steps), *expected, "{title}");
        }
    }

    #[test]
    fn a_deleted_pod_ends_in_order() {
        let mut deleted = pod(json!({
            "initContainers": [{"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "a"}, {"name": "b"}]
        }));
        deleted.metadata.deletion_timestamp = Some("2026-01-01T00:00:00Z".into());
        deleted.metadata.deletion_grace_period_seconds = Some(7);
        let cases: &[(&[&str], &str)] = &[
            (&["s0", "s.0 run", "a.0 run", "b.0 run"], "kill a.0 in 7, kill b.0 in 7"),
            (&["s0", "s.0 run", "a.0 run", "kill a.0"], ""),
            (&["s0", "a.0 run", "kill a.0 @130"], "kill a.0 in 7"),
            (&["s0", "s.0 run", "a.0 exit 0 @1"], "kill s.0 in 7"),
            (&["s0", "a.0 exit 0 @1"], "stop s0, remove s0, finish"),
            (&["s0!"], "remove s0, finish"),
            (&[], "finish"),
        ];
        for (words, expected) in cases {
            assert_eq!(show(&sync_pod(&deleted, &observed(words), at(100))), *expected, "{words:?}");
        }
    }

    #[test]
    fn back_off_doubles_to_five_minutes_and_is_forgiven() {
        let mut entry = None;
        let mut delays = Vec::new();
        for i in 0..7 {
            let next = BackOff::next(entry, at(i * 300));
            delays.push(next.delay.as_secs());
            entry = Some(next);
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(BackOff::next(entry, at(100_000)).delay.as_secs(), 10);
    }
}
