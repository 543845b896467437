//! The node's own object: registered once, its status kept true, its lease renewed.

use std::time::Duration;

use api::kinds::{LEASES, NODES};
use api::{ObjectExt, Quantity, time};
use jiff::Timestamp;
use reconcile::{Api, ApiError, EventKind, ObjectRef, Patch, Recorder};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::worker::Shared;
use crate::{KubeletConfig, NodeFacts};

const LEASE_DURATION: i64 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// Called nodeStatusReportFrequency in the kubelet.
const STATUS_EVERY: u32 = 30;

/// Keeps registering, reporting and renewing until cancelled.
pub async fn keep(shared: &Shared, client: &kube::Client, recorder: &Recorder, token: &CancellationToken) {
    let nodes = Api::new(client, &NODES);
    let leases = Api::new(client, &LEASES);
    let config = &shared.config;
    let mut rounds = 0u32;
    let mut registered = false;
    let mut timer = tokio::time::interval(RENEW);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            () = token.cancelled() => return,
        }
        while !registered {
            match register(&nodes, shared).await {
                Ok(uid) => {
                    registered = true;
                    let about = ObjectRef::new("v1", "Node", "", &config.node_name, &uid);
                    recorder.event(&about, EventKind::Normal, "Starting", "Starting kubelet.");
                    recorder.event(
                        &about,
                        EventKind::Normal,
                        "NodeReady",
                        format!("Node {} status is now: NodeReady", config.node_name),
                    );
                }
                Err(e) => {
                    tracing::debug!("cannot register the node yet: {e}");
                    tokio::select! {
                        // The API server may be starting beside us: it is worth asking often.
                        () = tokio::time::sleep(Duration::from_millis(100)) => {}
                        () = token.cancelled() => return,
                    }
                }
            }
        }
        if let Err(e) = renew(&leases, config).await {
            tracing::warn!("cannot renew the node's lease: {e}");
        }
        rounds += 1;
        if rounds.is_multiple_of(STATUS_EVERY) {
            match report(&nodes, shared).await {
                // Deleted behind our back: come again.
                Err(e) if e.is_not_found() => registered = false,
                Err(e) => tracing::warn!("cannot report the node's status: {e}"),
                Ok(()) => {}
            }
        }
    }
}

/// Returns the node's uid.
async fn register(nodes: &Api, shared: &Shared) -> Result<String, ApiError> {
    let config = &shared.config;
    let uid = match nodes.find("", &config.node_name).await? {
        Some(found) => {
            let patch = json!({"metadata": {"labels": labels(config)}});
            nodes.patch("", &config.node_name, Patch::Merge, &patch).await?;
            found.uid().to_owned()
        }
        None => {
            let mut spec = json!({});
            if let Some(first) = config.pod_cidrs.first() {
                spec["podCIDR"] = json!(first);
                spec["podCIDRs"] = json!(config.pod_cidrs);
            }
            if !config.taints.is_empty() {
                spec["taints"] = json!(config.taints);
            }
            let node = json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": config.node_name, "labels": labels(config)},
                "spec": spec,
            });
            nodes.create("", &node).await?.uid().to_owned()
        }
    };
    report(nodes, shared).await?;
    Ok(uid)
}

fn labels(config: &KubeletConfig) -> Value {
    let mut labels = json!({
        "kubernetes.io/hostname": config.node_name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": architecture(),
    });
    for (key, value) in &config.labels {
        labels[key] = json!(value);
    }
    labels
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

async fn report(nodes: &Api, shared: &Shared) -> Result<(), ApiError> {
    let name = &shared.config.node_name;
    let before = nodes.get("", name).await?;
    let images = shared.images.list_images().await.unwrap_or_default();
    let images: Vec<Value> = images
        .iter()
        .take(50)
        .map(|i| {
            let names: Vec<&String> = i.repo_digests.iter().chain(&i.repo_tags).collect();
            json!({"names": names, "sizeBytes": i.size})
        })
        .collect();
    let status = status(&shared.config, &shared.node, &shared.runtime.version(), &before, images, Timestamp::now());
    nodes.patch_status("", name, Patch::Merge, &json!({"status": status})).await.map(drop)
}

/// Pure. Transition times are carried over while a condition stays what it was.
fn status(
    config: &KubeletConfig,
    node: &NodeFacts,
    runtime: &str,
    before: &Value,
    images: Vec<Value>,
    now: Timestamp,
) -> Value {
    let conditions: Vec<Value> = [
        ("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
    ]
    .into_iter()
    .map(|(kind, status, reason, message)| {
        let old = before["status"]["conditions"].as_array().and_then(|all| all.iter().find(|c| c["type"] == kind));
        let since = old
            .filter(|c| c["status"] == status)
            .and_then(|c| c["lastTransitionTime"].as_str().map(str::to_owned))
            .unwrap_or_else(|| time::seconds(now));
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": time::seconds(now), "lastTransitionTime": since,
        })
    })
    .collect();
    let mut addresses: Vec<Value> =
        config.node_ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    addresses.push(json!({"type": "Hostname", "address": config.node_name}));
    let bytes = |n: i64| Quantity::from_bytes(n.max(0).unsigned_abs()).to_string();
    let resources = json!({
        "cpu": Quantity::from_milli(node.cpu_milli).to_string(),
        "memory": bytes(node.memory),
        "ephemeral-storage": bytes(node.storage),
        "pods": config.max_pods.to_string(),
    });
    // Conditions of others, such as NetworkUnavailable, are theirs.
    let ours = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"];
    let foreign = before["status"]["conditions"].as_array().into_iter().flatten();
    let foreign = foreign.filter(|c| !ours.contains(&c["type"].as_str().unwrap_or_default())).cloned();
    json!({
        "capacity": resources,
        "allocatable": resources,
        "conditions": foreign.chain(conditions).collect::<Vec<_>>(),
        "addresses": addresses,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": config.port}},
        "nodeInfo": {
            "machineID": node.machine_id, "systemUUID": node.machine_id, "bootID": node.boot_id,
            "kernelVersion": node.kernel, "osImage": node.os_image, "operatingSystem": "linux",
            "architecture": architecture(), "containerRuntimeVersion": runtime,
            "kubeletVersion": config.version, "kubeProxyVersion": config.version,
        },
        "images": images,
    })
}

async fn renew(leases: &Api, config: &KubeletConfig) -> Result<(), ApiError> {
    let (namespace, name) = ("kube-node-lease", config.node_name.as_str());
    let now = time::micros(Timestamp::now());
    let spec = json!({"holderIdentity": name, "leaseDurationSeconds": LEASE_DURATION, "renewTime": now});
    match leases.patch(namespace, name, Patch::Merge, &json!({"spec": spec})).await {
        Ok(_) => Ok(()),
        Err(e) if e.is_not_found() => {
            let lease = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": name, "namespace": namespace}, "spec": spec,
            });
            leases.create(namespace, &lease).await.map(drop)
        }
        Err(e) => Err(e),
    }
}
