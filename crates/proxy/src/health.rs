//! Whether this node's proxy keeps up, for load balancers (`/healthz`) and for the kubelet (`/livez`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::http::{Answer, Respond};
use crate::{Metrics, Status};

/// The taint of a node that the cluster autoscaler is about to remove: load balancers should turn to others first
/// (KEP-3836).
pub const REMOVAL_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// What is known of the proxy's health; times are arguments.
#[derive(Clone, Debug)]
struct State {
    /// How long a change may wait for its commit.
    patience: Duration,
    last_commit: Option<Timestamp>,
    commits: u64,
    /// Since when something waits for a commit.
    waiting_since: Option<Instant>,
    /// The node is not about to be removed.
    node_eligible: bool,
}

impl State {
    fn observe(&mut self, status: &Status, now: Instant, clock: Timestamp) {
        if status.commits > self.commits {
            self.commits = status.commits;
            self.last_commit = Some(clock);
            // Whatever still waits came after that commit began.
            self.waiting_since = None;
        }
        let waits = status.pending > 0 || status.error.is_some();
        self.waiting_since = if waits { self.waiting_since.or(Some(now)) } else { None };
    }

    /// A proxy that has nothing to do is as healthy as one that does it in time.
    fn is_live(&self, now: Instant) -> bool {
        let late = |since: Instant| now.saturating_duration_since(since) >= self.patience;
        self.last_commit.is_some() && !self.waiting_since.is_some_and(late)
    }
}

/// The health of one proxy.
pub struct Health(Mutex<State>);

impl Health {
    /// `sync_period` is kube-proxy's: a change that waits for twice as long is late.
    pub fn new(sync_period: Duration) -> Self {
        Health(Mutex::new(State {
            patience: sync_period * 2,
            last_commit: None,
            commits: 0,
            waiting_since: None,
            node_eligible: true,
        }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Each change is one assignment after the other: a panic between them leaves nothing unsound.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows what the proxy says of itself until it ends.
    pub async fn follow(&self, mut status: watch::Receiver<Status>, token: CancellationToken) {
        loop {
            self.state().observe(&status.borrow_and_update(), Instant::now(), Timestamp::now());
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                () = token.cancelled() => return,
            }
        }
    }

    /// The taints of the node, by key.
    pub fn set_taints<'a>(&self, mut keys: impl Iterator<Item = &'a str>) {
        let eligible = !keys.any(|key| key == REMOVAL_TAINT);
        self.state().node_eligible = eligible;
    }

    /// The kernel holds what it should, or will in time.
    pub fn is_live(&self) -> bool {
        self.state().is_live(Instant::now())
    }

    fn answer(&self, with_node: bool) -> Answer {
        let state = self.state().clone();
        let good = state.is_live(Instant::now()) && (state.node_eligible || !with_node);
        let last = state.last_commit.map(|at| at.to_string()).unwrap_or_default();
        let mut body = json!({"lastUpdated": last, "currentTime": Timestamp::now().to_string()});
        if with_node {
            body["nodeEligible"] = json!(state.node_eligible);
        }
        Answer::json(if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string())
    }
}

/// `/healthz` and `/livez`, counted.
pub fn probes(health: Arc<Health>, metrics: Arc<Metrics>) -> Respond {
    Arc::new(move |path| {
        let with_node = match path {
            "/healthz" => true,
            "/livez" => false,
            _ => return Answer::not_found(),
        };
        let answer = health.answer(with_node);
        metrics.probed(with_node, answer.status.as_u16());
        answer
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(commits: u64, pending: usize, error: Option<&str>) -> Status {
        Status { synced: commits > 0, commits, pending, error: error.map(str::to_owned), ..Status::default() }
    }

    /// (second, commits, pending, failed), and the seconds at which it is asked with what is expected then.
    type Case = (&'static str, &'static [(u64, u64, usize, bool)], &'static [(u64, bool)]);

    #[test]
    fn a_proxy_is_live_as_long_as_no_change_waits_for_two_sync_periods() {
        let cases: &[Case] = &[
            ("before the first commit", &[(0, 0, 3, false)], &[(0, false), (100, false)]),
            ("nothing to do for a long time", &[(0, 1, 0, false)], &[(0, true), (9000, true)]),
            ("a change waits", &[(0, 1, 0, false), (10, 1, 2, false)], &[(10, true), (69, true), (70, false)]),
            (
                "more changes do not make the first one younger",
                &[(0, 1, 0, false), (10, 1, 2, false), (60, 1, 5, false)],
                &[(69, true), (70, false)],
            ),
            (
                "a commit, while the next change waits already",
                &[(0, 1, 0, false), (10, 1, 2, false), (60, 2, 1, false)],
                &[(70, true), (119, true), (120, false)],
            ),
            ("a whole plan that fails", &[(0, 1, 0, false), (10, 1, 0, true)], &[(69, true), (70, false)]),
            ("and succeeds", &[(0, 1, 0, false), (10, 1, 0, true), (90, 2, 0, false)], &[(91, true)]),
        ];
        let zero = Instant::now();
        let at = |second: u64| zero + Duration::from_secs(second);
        for (title, history, asked) in cases {
            let health = Health::new(Duration::from_secs(30));
            let mut state = health.state().clone();
            for (second, commits, pending, failed) in *history {
                let status = status(*commits, *pending, failed.then_some("no"));
                state.observe(&status, at(*second), Timestamp::UNIX_EPOCH);
            }
            for (second, expected) in *asked {
                assert_eq!(state.is_live(at(*second)), *expected, "{title}, second {second}");
            }
        }
    }

    #[test]
    fn a_node_that_is_to_be_removed_is_live_and_not_healthy() {
        let health = Arc::new(Health::new(Duration::from_secs(30)));
        health.state().observe(&status(1, 0, None), Instant::now(), Timestamp::UNIX_EPOCH);
        let ask = probes(health.clone(), Arc::default());
        let codes = |ask: &Respond| ["/healthz", "/livez", "/else"].map(|path| ask(path).status.as_u16());
        assert_eq!(codes(&ask), [200, 200, 404]);
        health.set_taints(["other", REMOVAL_TAINT].into_iter());
        assert_eq!(codes(&ask), [503, 200, 404]);
        assert!(ask("/healthz").body.contains("\"nodeEligible\":false"));
        assert!(!ask("/livez").body.contains("nodeEligible"));
        health.set_taints(["other"].into_iter());
        assert_eq!(codes(&ask), [200, 200, 404]);
    }
}
