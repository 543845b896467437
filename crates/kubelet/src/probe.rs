//! Probes of one running container: a task that runs them and a state that others read.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reconcile::EventKind;
use runtime::RuntimeService;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::action::{Target, perform};
use crate::plan::{ProbeState, Unhealthy};
use crate::pod::{Container, Probe};

/// Called with an event's kind, reason and message.
pub type Report = Arc<dyn Fn(EventKind, &str, String) + Send + Sync>;

/// Runs until dropped.
pub struct Prober {
    state: Arc<Mutex<ProbeState>>,
    _readiness: JoinSet<()>,
    /// Startup and liveness: what they find may restart the container.
    others: JoinSet<()>,
}

/// What the probes of one container need.
#[derive(Clone)]
pub struct Subject {
    pub runtime: Arc<dyn RuntimeService>,
    pub container_id: String,
    pub container: Container,
    pub pod_ip: Option<IpAddr>,
    /// Woken when a result changes.
    pub wake: Arc<Notify>,
    pub report: Report,
    /// How long the container has been running already, when it was taken over.
    pub age: Duration,
    /// What was reported of this very container before the agent was restarted: it holds until a probe says otherwise.
    pub was_started: bool,
    pub was_ready: bool,
}

impl Prober {
    pub fn start(subject: Subject) -> Prober {
        let container = &subject.container;
        let state = Arc::new(Mutex::new(ProbeState {
            started: container.startup_probe.is_none() || subject.was_started,
            ready: container.readiness_probe.is_none() || subject.was_ready,
            unhealthy: None,
        }));
        let (mut readiness, mut others) = (JoinSet::new(), JoinSet::new());
        let is_started = container.startup_probe.is_none() || subject.was_started;
        let started = Arc::new(tokio::sync::watch::channel(is_started).0);
        let probes = [
            (Kind::Startup, container.startup_probe.clone().filter(|_| !is_started)),
            (Kind::Liveness, container.liveness_probe.clone()),
            (Kind::Readiness, container.readiness_probe.clone()),
        ];
        for (kind, probe) in probes {
            if let Some(probe) = probe {
                let tasks = if kind == Kind::Readiness { &mut readiness } else { &mut others };
                tasks.spawn(run(kind, probe, subject.clone(), state.clone(), started.clone()));
            }
        }
        Prober { state, _readiness: readiness, others }
    }

    /// The container is to end and not to be restarted; whether it answers still matters, as long as somebody is sent to it.
    pub fn only_readiness(&mut self) {
        self.others.abort_all();
    }

    pub fn state(&self) -> ProbeState {
        self.state.lock().expect("no holder panics").clone()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Liveness => "Liveness",
            Kind::Readiness => "Readiness",
        }
    }
}

/// Consecutive results against their thresholds. Pure.
#[derive(Debug, Default, Clone, Copy)]
struct Streak {
    successes: u32,
    failures: u32,
}

impl Streak {
    /// `Some(result)` once a threshold is reached.
    fn count(&mut self, success: bool, probe: &Probe) -> Option<bool> {
        if success {
            self.failures = 0;
            self.successes = self.successes.saturating_add(1);
            (self.successes >= probe.success_threshold.unwrap_or(1).max(1)).then_some(true)
        } else {
            self.successes = 0;
            self.failures = self.failures.saturating_add(1);
            (self.failures >= probe.failure_threshold.unwrap_or(3).max(1)).then_some(false)
        }
    }
}

async fn run(
    kind: Kind,
    probe: Probe,
    subject: Subject,
    state: Arc<Mutex<ProbeState>>,
    started: Arc<tokio::sync::watch::Sender<bool>>,
) {
    if kind != Kind::Startup {
        let mut started = started.subscribe();
        // The sender lives in this very task's arguments: an error cannot happen.
        let _ = started.wait_for(|s| *s).await;
    }
    let timeout = Duration::from_secs(probe.timeout_seconds.unwrap_or(1).max(1));
    let period = Duration::from_secs(probe.period_seconds.unwrap_or(10).max(1));
    let initial = Duration::from_secs(probe.initial_delay_seconds);
    tokio::time::sleep(initial.saturating_sub(subject.age)).await;
    // A container is not up the moment it starts. During its first period, failures neither count nor are reported, and
    // the next try comes soon: so it is ready as soon as it can be.
    let warm_up = if initial.is_zero() { period.saturating_sub(subject.age) } else { Duration::ZERO };
    let begin = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(25);
    let mut streak = Streak::default();
    let mut is_first = true;
    loop {
        if !is_first {
            tokio::time::sleep(period).await;
        }
        let target = Target {
            runtime: &*subject.runtime,
            container_id: &subject.container_id,
            container: &subject.container,
            pod_ip: subject.pod_ip,
        };
        let result = perform(&probe.action, &target, timeout).await;
        if result.is_err() && is_first && begin.elapsed() + pause < warm_up {
            tokio::time::sleep(pause).await;
            pause *= 2;
            continue;
        }
        is_first = false;
        if let Err(message) = &result {
            (subject.report)(EventKind::Warning, "Unhealthy", format!("{} probe failed: {message}", kind.name()));
        }
        let Some(verdict) = streak.count(result.is_ok(), &probe) else { continue };
        let finished = {
            let mut state = state.lock().expect("no holder panics");
            let before = state.clone();
            match kind {
                Kind::Readiness => state.ready = verdict,
                Kind::Startup if verdict => state.started = true,
                Kind::Liveness if verdict => {}
                Kind::Startup | Kind::Liveness => {
                    state.unhealthy = Some(Unhealthy {
                        message: format!("failed {} probe", kind.name().to_lowercase()),
                        grace: probe.termination_grace_period_seconds,
                    });
                }
            }
            if *state != before {
                subject.wake.notify_one();
            }
            state.unhealthy.is_some() || kind == Kind::Startup
        };
        if finished {
            started.send_replace(verdict || kind != Kind::Startup);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_its_threshold_in_a_row() {
        let probe = Probe { failure_threshold: Some(2), success_threshold: Some(2), ..Probe::default() };
        let mut streak = Streak::default();
        let results = [false, true, false, false, true, true].map(|r| streak.count(r, &probe));
        assert_eq!(results, [None, None, None, Some(false), None, Some(true)]);
    }
}
