//! A container of the API becomes one of the runtime. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use runtime::{ContainerConfig, Mount, PortMapping, Resources, SandboxConfig, Security};

use crate::env::arguments;
use crate::pod::{Container, Pod, Qos};

/// What has been found out for this container.
pub struct Given {
    pub environment: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub attempt: u32,
    pub log_path: PathBuf,
    pub node_memory: i64,
}

pub fn container_config(pod: &Pod, container: &Container, given: Given) -> ContainerConfig {
    ContainerConfig {
        name: container.name.clone(),
        attempt: given.attempt,
        image: container.image.clone(),
        command: arguments(&container.command, &given.environment),
        args: arguments(&container.args, &given.environment),
        working_dir: Some(container.working_dir.clone()).filter(|d| !d.is_empty()),
        env: given.environment,
        mounts: given.mounts,
        stdin: container.stdin,
        stdin_once: container.stdin_once,
        tty: container.tty,
        log_path: given.log_path,
        resources: resources(pod, container, given.node_memory),
        security: security(pod, container),
        labels: BTreeMap::new(),
    }
}

fn resources(pod: &Pod, container: &Container, node_memory: i64) -> Resources {
    let limit = |name: &str| container.resources.limits.get(name).map(|a| a.0);
    let request = |name: &str| container.resources.requests.get(name).map(|a| a.0).or(limit(name));
    let shares = request("cpu").map_or(2, |q| (q.milli() * 1024 / 1000).clamp(2, 262_144));
    let quota = limit("cpu").map(|q| q.milli()).filter(|milli| *milli > 0).map(|milli| (milli * 100).max(1000));
    let memory_request = request("memory").map_or(0, |q| q.value());
    Resources {
        cpu_shares: u64::try_from(shares).ok(),
        cpu_quota: quota,
        cpu_period: quota.map(|_| 100_000),
        memory_limit: limit("memory").map(|q| q.value()).filter(|bytes| *bytes > 0),
        pids_limit: None,
        oom_score_adj: Some(oom_score(pod.qos(), memory_request, node_memory)),
    }
}

/// Called GetContainerOOMScoreAdjust in the kubelet: the more of its node a pod asked for, the later it is killed.
fn oom_score(qos: Qos, request: i64, node_memory: i64) -> i32 {
    match qos {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let share = i128::from(request) * 1000 / i128::from(node_memory.max(1));
            i32::try_from(1000 - share).unwrap_or(3).clamp(3, 999)
        }
    }
}

fn security(pod: &Pod, container: &Container) -> Security {
    let (of_pod, own) = (&pod.spec.security_context, &container.security_context);
    let mut groups = of_pod.supplemental_groups.clone();
    groups.extend(of_pod.fs_group);
    Security {
        privileged: own.privileged,
        run_as_user: own.run_as_user.or(of_pod.run_as_user),
        run_as_group: own.run_as_group.or(of_pod.run_as_group),
        supplemental_groups: groups,
        readonly_rootfs: own.read_only_root_filesystem,
        add_capabilities: own.capabilities.add.clone(),
        drop_capabilities: own.capabilities.drop.clone(),
        no_new_privileges: own.allow_privilege_escalation == Some(false),
        unmasked_proc: own.proc_mount == "Unmasked",
    }
}

/// runAsNonRoot against the user that the container would have. The image's USER decides when nothing else does.
pub fn check_non_root(pod: &Pod, container: &Container, image_user: &str) -> Result<(), String> {
    let (of_pod, own) = (&pod.spec.security_context, &container.security_context);
    if !own.run_as_non_root.or(of_pod.run_as_non_root).unwrap_or(false) {
        return Ok(());
    }
    match own.run_as_user.or(of_pod.run_as_user) {
        Some(0) => Err("container's runAsUser breaks non-root policy".to_owned()),
        Some(_) => Ok(()),
        None => match image_user.split(':').next().unwrap_or_default() {
            "" | "0" | "root" => Err("container has runAsNonRoot and image will run as root".to_owned()),
            user if user.parse::<u32>().is_err() => Err(format!(
                "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root"
            )),
            _ => Ok(()),
        },
    }
}

/// What a pod asks for that nothing here can give. Running it without would be a lie.
pub fn unsupported(pod: &Pod) -> Option<String> {
    let spec = &pod.spec;
    if !spec.runtime_class_name.is_empty() {
        return Some(format!("runtimeClassName {:?} is not supported: leave it out", spec.runtime_class_name));
    }
    if spec.host_users == Some(false) {
        return Some("hostUsers: false (user namespaces) is not supported: leave it out".to_owned());
    }
    let of_containers = pod.all_containers().map(|c| &c.security_context.seccomp_profile);
    let profiles = std::iter::once(&spec.security_context.seccomp_profile).chain(of_containers);
    if profiles.flatten().any(|p| p.kind == "Localhost") {
        return Some("seccompProfile of type Localhost is not supported: use Unconfined".to_owned());
    }
    let device = pod.all_containers().find(|c| !c.volume_devices.is_empty());
    device.map(|c| format!("container {} has volumeDevices, which are not supported: use volumeMounts", c.name))
}

/// RuntimeDefault is a wish that most manifests make; it is not refused, but its owner is told.
pub fn wants_seccomp(pod: &Pod) -> bool {
    let of_containers = pod.all_containers().map(|c| &c.security_context.seccomp_profile);
    let mut profiles = std::iter::once(&pod.spec.security_context.seccomp_profile).chain(of_containers).flatten();
    profiles.any(|p| p.kind == "RuntimeDefault")
}

pub fn sandbox_config(
    pod: &Pod,
    attempt: u32,
    dns: runtime::DnsConfig,
    tmpfs: Vec<runtime::Tmpfs>,
    node_name: &str,
) -> SandboxConfig {
    let ports = pod.all_containers().flat_map(|c| &c.ports).filter(|p| p.host_port > 0 && !pod.spec.host_network);
    let mut hostname = pod.hostname().to_owned();
    if pod.spec.host_network {
        hostname = node_name.to_owned();
    }
    SandboxConfig {
        uid: pod.metadata.uid.clone(),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        attempt,
        hostname,
        dns,
        host_network: pod.spec.host_network,
        host_pid: pod.spec.host_pid,
        host_ipc: pod.spec.host_ipc,
        share_process_namespace: pod.spec.share_process_namespace,
        port_mappings: ports
            .map(|p| PortMapping {
                host_ip: p.host_ip.parse().ok(),
                host_port: p.host_port,
                container_port: p.container_port,
                protocol: if p.protocol.is_empty() { "TCP".to_owned() } else { p.protocol.clone() },
            })
            .collect(),
        sysctls: pod.spec.security_context.sysctls.iter().map(|s| (s.name.clone(), s.value.clone())).collect(),
        tmpfs,
        labels: pod.metadata.labels.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_become_what_cgroups_understand() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {"containers": [
            {"name": "c", "resources": {"limits": {"cpu": "250m", "memory": "64Mi"}, "requests": {"cpu": "100m"}}}
        ]}}))
        .expect("a pod");
        let found = resources(&pod, &pod.spec.containers[0], 1 << 30);
        assert_eq!(found.cpu_shares, Some(102));
        assert_eq!((found.cpu_quota, found.cpu_period), (Some(25_000), Some(100_000)));
        assert_eq!(found.memory_limit, Some(64 << 20));
        assert_eq!(found.oom_score_adj, Some(938));
    }
}
