//! Hooks, and the ends of containers and of the pod itself.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reconcile::{DeleteOptions, EventKind};
use tokio_util::sync::CancellationToken;

use super::{Killing, Worker, WorkerError};
use crate::action::{Target, perform};
use crate::barrier::Gate;
use crate::plan::Observed;
use crate::pod::{Container, Pod};
use crate::status::pod_ips;

impl Worker {
    pub(super) fn post_start(
        &self,
        pod: &Pod,
        container: Container,
        hook: crate::pod::Action,
        id: String,
        observed: &Observed,
    ) {
        let ip = pod_ips(pod, observed, &self.shared.config.node_ips).first().copied();
        let (shared, report) = (self.shared.clone(), self.reporter(&container.name));
        let grace = Duration::from_secs(pod.grace().unsigned_abs());
        tokio::spawn(async move {
            let target = Target { runtime: &*shared.runtime, container_id: &id, container: &container, pod_ip: ip };
            if let Err(e) = perform(&hook, &target, Duration::from_secs(600)).await {
                report(EventKind::Warning, "FailedPostStartHook", format!("PostStartHook failed: {e}"));
                if let Err(e) = shared.runtime.stop_container(&id, grace).await {
                    tracing::warn!(container = id, "cannot stop a container whose postStart hook failed: {e}");
                }
            }
        });
    }

    /// In the background: the removal barrier, the preStop hook, then the stop signal, all within the grace period.
    pub(super) fn kill(&mut self, pod: &Pod, observed: &Observed, id: &str, name: &str, grace: i64, why: String) {
        let until = Timestamp::now().saturating_add(SignedDuration::from_secs(grace.max(0))).unwrap_or(Timestamp::MAX);
        let stop = CancellationToken::new();
        match self.memory().killing.insert(id.to_owned(), Killing { until, stop: stop.clone() }) {
            // Its owner has lost patience: the shorter period replaces the longer one.
            Some(before) => before.stop.cancel(),
            None => self.event(name, EventKind::Normal, "Killing", why),
        }
        let container = pod.all_containers().find(|c| c.name == name).cloned().unwrap_or_default();
        let ip = pod_ips(pod, observed, &self.shared.config.node_ips).first().copied();
        let (shared, memory, wake) = (self.shared.clone(), self.memory.clone(), self.wake.clone());
        let (id, report) = (id.to_owned(), self.reporter(name));
        let grace = Duration::from_secs(grace.max(0).unsigned_abs());
        let gate = self.gate(pod, grace);
        let work = async move {
            let began = std::time::Instant::now();
            if let Some(gate) = gate {
                // Whatever happens, half of its time is the container's own.
                tokio::time::timeout(grace / 2, gate.pass()).await.ok();
            }
            if let Some(hook) = container.lifecycle.pre_stop.as_ref().filter(|_| !grace.is_zero()) {
                let target = Target { runtime: &*shared.runtime, container_id: &id, container: &container, pod_ip: ip };
                // A hook that sleeps is cut off by the grace period like any other.
                let left = grace.saturating_sub(began.elapsed());
                let hook = tokio::time::timeout(left, perform(hook, &target, left));
                if let Ok(Err(e)) = hook.await {
                    report(EventKind::Warning, "FailedPreStopHook", format!("PreStopHook failed: {e}"));
                }
            }
            let left = grace.saturating_sub(began.elapsed());
            // Whatever a hook used up, two seconds remain.
            let left = if grace.is_zero() { left } else { left.max(Duration::from_secs(2).min(grace)) };
            if let Err(e) = shared.runtime.stop_container(&id, left).await {
                tracing::warn!(container = id, "cannot stop a container, will try again: {e}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            memory.lock().expect("no holder panics").killing.remove(&id);
            wake.notify_one();
        };
        tokio::spawn(async move {
            tokio::select! {
                () = work => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// A pod that is deleted is no longer stopped under its clients' hands; one that was removed by force is not waited for.
    fn gate(&mut self, pod: &Pod, grace: Duration) -> Option<Arc<Gate>> {
        let is_forced = self.input.borrow().is_none();
        if !pod.metadata.is_deleting() || is_forced || grace.is_zero() {
            return None;
        }
        let barrier = &self.shared.barrier;
        Some(self.gate.get_or_insert_with(|| barrier.gate(pod)).clone())
    }

    pub(super) async fn finish(&mut self, pod: &Pod) -> Result<(), WorkerError> {
        self.probers.clear();
        self.shared.volumes.remove(&pod.metadata.uid)?;
        let options =
            DeleteOptions { grace_period_seconds: Some(0), uid: Some(pod.metadata.uid.clone()), propagation: None };
        match self.shared.pods.delete(&pod.metadata.namespace, &pod.metadata.name, &options).await {
            Ok(()) => {}
            // Another pod has the name already: ours has gone.
            Err(e) if e.is_conflict() => {}
            Err(e) => return Err(e.into()),
        }
        let logs = self.shared.config.pod_log_directory(pod);
        match std::fs::remove_dir_all(&logs) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        self.finished = true;
        Ok(())
    }
}
