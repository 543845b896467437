//! A pod's status from what is observed of it. Pure.

use std::net::IpAddr;

use jiff::Timestamp;
use runtime::{ContainerState, ContainerStatus, Exit, Started};
use serde_json::{Map, Value, json};

use crate::plan::{ImageState, Observed, deadline, wants_restart};
use crate::pod::{Container, Pod, RestartPolicy};

/// What the status needs besides pod and observation.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub node_ips: Vec<IpAddr>,
    /// Text that containers left behind when they ended, by container id.
    pub messages: std::collections::BTreeMap<String, String>,
    pub now: Timestamp,
}

/// The whole status object, with condition times carried over from the last one.
pub fn pod_status(pod: &Pod, observed: &Observed, facts: &Facts) -> Value {
    let init: Vec<Value> = pod.spec.init_containers.iter().map(|c| container_status(pod, c, observed, facts)).collect();
    let app: Vec<Value> = pod.spec.containers.iter().map(|c| container_status(pod, c, observed, facts)).collect();
    let failed_by_deadline = deadline(pod).is_some_and(|d| d <= facts.now) && !pod.metadata.is_deleting();
    let phase = match phase(pod, observed) {
        "Running" | "Pending" if failed_by_deadline => "Failed",
        phase => phase,
    };
    let start = pod.status.start_time.clone().unwrap_or_else(|| api::time::seconds(facts.now));
    let mut status = json!({
        "phase": phase,
        "conditions": conditions(pod, observed, &init, &app, phase, facts),
        "containerStatuses": app,
        "startTime": start,
        "qosClass": pod.qos().as_str(),
    });
    if failed_by_deadline {
        status["reason"] = json!("DeadlineExceeded");
        status["message"] = json!("Pod was active on the node longer than the specified deadline");
    }
    if !init.is_empty() {
        status["initContainerStatuses"] = json!(init);
    }
    let list = |ips: &[IpAddr]| ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
    if let Some(first) = facts.node_ips.first() {
        status["hostIP"] = json!(first);
        status["hostIPs"] = json!(list(&facts.node_ips));
    }
    let ips = pod_ips(pod, observed, &facts.node_ips);
    if let Some(first) = ips.first() {
        status["podIP"] = json!(first);
        status["podIPs"] = json!(list(&ips));
    }
    status
}

/// Addresses of the pod's sandbox, or the node's for a pod on its network.
pub fn pod_ips(pod: &Pod, observed: &Observed, node_ips: &[IpAddr]) -> Vec<IpAddr> {
    match observed.ready_sandbox() {
        Some(_) if pod.spec.host_network => node_ips.to_vec(),
        Some(sandbox) => sandbox.ips.clone(),
        None => Vec::new(),
    }
}

/// Called getPhase in the kubelet.
fn phase(pod: &Pod, observed: &Observed) -> &'static str {
    // An end is an end, also when the node forgets what ran.
    match pod.status.phase.as_str() {
        "Succeeded" => return "Succeeded",
        "Failed" => return "Failed",
        _ => {}
    }
    let state = |c: &Container| observed.latest(&c.name).map(|s| &s.state);
    let mut init_pending = false;
    for container in &pod.spec.init_containers {
        match state(container) {
            Some(ContainerState::Exited { exit, .. }) if !container.is_sidecar() => {
                if exit.code != 0 {
                    if pod.spec.restart_policy == RestartPolicy::Never {
                        return "Failed";
                    }
                    init_pending = true;
                }
            }
            Some(ContainerState::Running(_)) if container.is_sidecar() => {
                init_pending |= !observed.is_started(&container.name);
            }
            _ => init_pending = true,
        }
    }
    let (mut unknown, mut running, mut waiting, mut stopped, mut succeeded) = (0, 0, 0, 0, 0);
    for container in &pod.spec.containers {
        match state(container) {
            Some(ContainerState::Running(_)) => running += 1,
            Some(ContainerState::Exited { started, exit }) => {
                if wants_restart(pod, container, exit.code) && started.is_none() {
                    waiting += 1;
                } else {
                    stopped += 1;
                    succeeded += usize::from(exit.code == 0);
                }
            }
            Some(ContainerState::Created) => waiting += 1,
            None => unknown += 1,
        }
    }
    if init_pending && running == 0 && stopped == 0 {
        return "Pending";
    }
    if unknown + waiting > 0 && running + stopped == 0 {
        return "Pending";
    }
    if unknown > 0 || waiting > 0 || running > 0 {
        return "Running";
    }
    match pod.spec.restart_policy {
        RestartPolicy::Always => "Running",
        _ if succeeded == stopped => "Succeeded",
        RestartPolicy::Never => "Failed",
        RestartPolicy::OnFailure => "Running",
    }
}

fn container_status(pod: &Pod, container: &Container, observed: &Observed, facts: &Facts) -> Value {
    let latest = observed.latest(&container.name);
    let reported = pod.status.container_statuses.iter().chain(&pod.status.init_container_statuses);
    let reported = reported.into_iter().find(|s| s.name == container.name).map_or(0, |s| s.restart_count);
    let mut status = json!({
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "ready": false,
        "started": false,
        "restartCount": latest.map_or(reported, |c| c.config.attempt.max(reported)),
    });
    let is_init = pod.spec.init_containers.iter().any(|c| c.name == container.name);
    let mut last = observed.previous(&container.name);
    let state = match latest {
        Some(current) => {
            status["containerID"] = json!(container_id(current));
            status["imageID"] = json!(current.image_ref);
            match &current.state {
                ContainerState::Running(started) => {
                    let probes = observed.probes.get(&current.id);
                    status["started"] = json!(probes.is_some_and(|p| p.started));
                    status["ready"] = json!(probes.is_some_and(|p| p.ready && p.started));
                    json!({"running": {"startedAt": api::time::seconds(started.at)}})
                }
                ContainerState::Created => waiting("ContainerCreating", ""),
                ContainerState::Exited { started, exit } => {
                    let ended = terminated(current, started.as_ref(), exit, facts);
                    // A regular init container is ready when it has succeeded.
                    status["ready"] = json!(is_init && !container.is_sidecar() && exit.code == 0);
                    match waiting_reason(pod, container, observed, exit, facts.now) {
                        Some((reason, message)) if wants_restart(pod, container, exit.code) => {
                            last = Some(current);
                            waiting(&reason, &message)
                        }
                        _ => ended,
                    }
                }
            }
        }
        None => never_ran(pod, container, observed, is_init),
    };
    status["state"] = state;
    status["lastState"] = match last.map(|c| (&c.state, c)) {
        Some((ContainerState::Exited { started, exit }, c)) => terminated(c, started.as_ref(), exit, facts),
        _ => json!({}),
    };
    status
}

fn container_id(container: &ContainerStatus) -> String {
    format!("fairlead://{}", container.id)
}

fn waiting(reason: &str, message: &str) -> Value {
    let mut inner = json!({"reason": reason});
    if !message.is_empty() {
        inner["message"] = json!(message);
    }
    json!({"waiting": inner})
}

fn never_ran(pod: &Pod, container: &Container, observed: &Observed, is_init: bool) -> Value {
    if let Some(failure) = observed.failures.get(&container.name) {
        return waiting(&failure.reason, &failure.message);
    }
    if let Some(ImageState::Failed { reason, message, .. }) = observed.images.get(&container.name) {
        return waiting(reason, message);
    }
    if !is_init && !pod.spec.init_containers.is_empty() {
        return waiting("PodInitializing", "");
    }
    waiting("ContainerCreating", "")
}

/// Why an ended container that is to run again does not yet.
fn waiting_reason(
    pod: &Pod,
    container: &Container,
    observed: &Observed,
    exit: &Exit,
    now: Timestamp,
) -> Option<(String, String)> {
    if let Some(failure) = observed.failures.get(&container.name).filter(|f| f.until > now) {
        return Some((failure.reason.clone(), failure.message.clone()));
    }
    if let Some(ImageState::Failed { reason, message, .. }) = observed.images.get(&container.name) {
        return Some((reason.clone(), message.clone()));
    }
    let backoff = observed.backoffs.get(&container.name)?;
    if backoff.until(exit.at) <= now {
        return None;
    }
    let message = format!(
        "back-off {} restarting failed container={} pod={}_{}({})",
        duration(backoff.delay.as_secs()),
        container.name,
        pod.metadata.name,
        pod.metadata.namespace,
        pod.metadata.uid
    );
    Some(("CrashLoopBackOff".to_owned(), message))
}

/// As Go prints it: 10s, 1m20s, 5m0s.
pub fn duration(seconds: i64) -> String {
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

fn terminated(container: &ContainerStatus, started: Option<&Started>, exit: &Exit, facts: &Facts) -> Value {
    let reason = match exit {
        Exit { oom_killed: true, .. } => "OOMKilled",
        Exit { code: 0, .. } => "Completed",
        _ if started.is_none() => "StartError",
        _ => "Error",
    };
    let mut inner = json!({
        "exitCode": exit.code,
        "reason": reason,
        "containerID": container_id(container),
        "startedAt": api::time::seconds(started.map_or(container.created_at, |s| s.at)),
        "finishedAt": api::time::seconds(exit.at),
    });
    let message = facts.messages.get(&container.id).filter(|m| !m.is_empty()).unwrap_or(&exit.message);
    if !message.is_empty() {
        inner["message"] = json!(message);
    }
    if let Some(signal) = exit.signal {
        inner["signal"] = json!(signal);
    }
    json!({"terminated": inner})
}

fn conditions(pod: &Pod, observed: &Observed, init: &[Value], app: &[Value], phase: &str, facts: &Facts) -> Vec<Value> {
    let names = |statuses: &[Value], wanted: bool| -> Vec<String> {
        statuses
            .iter()
            .filter(|s| s["ready"].as_bool() != Some(wanted))
            .filter_map(|s| s["name"].as_str().map(str::to_owned))
            .collect()
    };
    let over = phase == "Succeeded";
    let unready = names(app, true);
    let sidecars = |name: &str| pod.spec.init_containers.iter().any(|c| c.name == name && c.is_sidecar());
    let incomplete: Vec<String> = init
        .iter()
        .filter(|s| {
            let name = s["name"].as_str().unwrap_or_default();
            if sidecars(name) { s["started"] != json!(true) } else { s["ready"] != json!(true) }
        })
        .filter_map(|s| s["name"].as_str().map(str::to_owned))
        .collect();
    // App containers run only after the init containers: then these are over, whatever is still known of them.
    let initialized = incomplete.is_empty() || app.iter().any(|s| s["state"]["running"].is_object());
    let (ready, reason) = match (over, unready.is_empty(), phase) {
        (true, ..) => (false, "PodCompleted"),
        (_, _, "Failed") => (false, "PodFailed"),
        (_, true, _) => (true, ""),
        _ => (false, "ContainersNotReady"),
    };
    let message = match reason {
        "ContainersNotReady" => format!("containers with unready status: [{}]", unready.join(" ")),
        _ => String::new(),
    };
    let gate_is_true = |kind: &str| {
        pod.status.conditions.iter().any(|c| c["type"].as_str() == Some(kind) && c["status"].as_str() == Some("True"))
    };
    let open_gate = pod.spec.readiness_gates.iter().find(|g| !gate_is_true(&g.condition_type));
    let (pod_ready, pod_reason, pod_message) = match open_gate {
        Some(gate) if ready => (
            false,
            "ReadinessGatesNotReady",
            format!("the status of pod readiness gate {:?} is not \"True\"", gate.condition_type),
        ),
        _ => (ready, reason, message.clone()),
    };
    let (init_status, init_reason, init_message) = match (over, initialized) {
        (true, _) => (true, "PodCompleted", String::new()),
        (_, true) => (true, "", String::new()),
        _ => (
            false,
            "ContainersNotInitialized",
            format!("containers with incomplete status: [{}]", incomplete.join(" ")),
        ),
    };
    let ours = [
        ("PodReadyToStartContainers", observed.ready_sandbox().is_some(), "", String::new()),
        ("Initialized", init_status, init_reason, init_message),
        ("Ready", pod_ready, pod_reason, pod_message),
        ("ContainersReady", ready, reason, message),
        ("PodScheduled", true, "", String::new()),
    ];
    let old = |kind: &str| pod.status.conditions.iter().find(|c| c["type"].as_str() == Some(kind));
    let mut all: Vec<Value> = ours
        .into_iter()
        .map(|(kind, status, reason, message)| {
            let status = if status { "True" } else { "False" };
            let since = old(kind)
                .filter(|o| o["status"].as_str() == Some(status))
                .and_then(|o| o["lastTransitionTime"].as_str().map(str::to_owned))
                .unwrap_or_else(|| api::time::seconds(facts.now));
            let mut condition = Map::new();
            condition.insert("type".into(), json!(kind));
            condition.insert("status".into(), json!(status));
            condition.insert("lastProbeTime".into(), Value::Null);
            condition.insert("lastTransitionTime".into(), json!(since));
            if !reason.is_empty() {
                condition.insert("reason".into(), json!(reason));
            }
            if !message.is_empty() {
                condition.insert("message".into(), json!(message));
            }
            Value::Object(condition)
        })
        .collect();
    // Conditions of others, such as readiness gates, are theirs.
    let known: Vec<&str> = ours_names().to_vec();
    all.extend(
        pod.status.conditions.iter().filter(|c| !known.contains(&c["type"].as_str().unwrap_or_default())).cloned(),
    );
    all
}

fn ours_names() -> [&'static str; 5] {
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::{ContainerConfig, SandboxConfig, SandboxState, SandboxStatus};

    /// `phase` and the states of all containers, for a pod of one container `a` in the given state.
    fn show(policy: &str, state: Option<ContainerState>, backoff: bool) -> String {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"restartPolicy": policy, "containers": [{"name": "a"}]}
        }))
        .expect("a pod");
        let now = Timestamp::from_second(1_000_000).expect("a time");
        let mut observed = Observed::default();
        observed.sandboxes.push(SandboxStatus {
            id: "s".into(),
            config: SandboxConfig::default(),
            state: SandboxState::Ready,
            created_at: now,
            ips: vec![[10, 0, 0, 1].into()],
            pid: None,
        });
        observed.containers.extend(state.map(|state| ContainerStatus {
            id: "c".into(),
            sandbox_id: "s".into(),
            config: ContainerConfig { name: "a".into(), ..ContainerConfig::default() },
            image_id: String::new(),
            image_ref: String::new(),
            created_at: now,
            state,
        }));
        if backoff {
            observed.backoffs.insert("a".into(), crate::plan::BackOff::next(None, now));
        }
        let probe = crate::plan::ProbeState { started: true, ready: true, unhealthy: None };
        observed.probes.insert("c".into(), probe);
        let status = pod_status(&pod, &observed, &Facts { now, ..Facts::default() });
        let ready = status["conditions"].as_array().and_then(|all| all.iter().find(|c| c["type"] == "Ready"));
        let state = &status["containerStatuses"][0]["state"];
        let (kind, inner) = state.as_object().and_then(|s| s.iter().next()).expect("one state");
        format!(
            "{} {kind} {} ready={}",
            status["phase"].as_str().unwrap_or_default(),
            inner["reason"].as_str().unwrap_or("-"),
            ready.and_then(|c| c["status"].as_str()).unwrap_or_default()
        )
    }

    #[test]
    fn phases_and_reasons_are_those_of_kubernetes() {
        let at = Timestamp::from_second(1_000_000).expect("a time");
        let started = Started { pid: 1, start_time: 1, at };
        let exit = |code, oom_killed| {
            let exit = Exit { code, signal: None, oom_killed, at, message: String::new() };
            Some(ContainerState::Exited { started: Some(started.clone()), exit })
        };
        let unstarted = {
            let exit = Exit { code: 128, signal: None, oom_killed: false, at, message: "no such file".into() };
            Some(ContainerState::Exited { started: None, exit })
        };
        for (policy, state, backoff, expected) in [
            ("Always", None, false, "Pending waiting ContainerCreating ready=False"),
            ("Always", Some(ContainerState::Running(started.clone())), false, "Running running - ready=True"),
            ("Always", exit(0, false), false, "Running terminated Completed ready=False"),
            ("Always", exit(1, false), true, "Running waiting CrashLoopBackOff ready=False"),
            ("OnFailure", exit(1, false), false, "Running terminated Error ready=False"),
            ("OnFailure", exit(0, false), false, "Succeeded terminated Completed ready=False"),
            ("Never", exit(0, false), false, "Succeeded terminated Completed ready=False"),
            ("Never", exit(137, true), false, "Failed terminated OOMKilled ready=False"),
            ("Never", unstarted, false, "Failed terminated StartError ready=False"),
        ] {
            assert_eq!(show(policy, state, backoff), expected, "{policy}");
        }
        assert_eq!(duration(10), "10s");
        assert_eq!(duration(300), "5m0s");
    }
}
