//! Starts one container: what the pod says and the API holds becomes a configuration of the runtime.

use std::path::PathBuf;

use jiff::Timestamp;
use reconcile::{ApiError, EventKind};
use runtime::Mount;

use super::{RETRY, Worker};
use crate::container::{Given, check_non_root, container_config};
use crate::env::{Sources, environment, service_variables};
use crate::plan::{BackOff, Failure, Observed};
use crate::pod::{Container, Pod};
use crate::status::pod_ips;

impl Worker {
    pub(super) async fn start_container(
        &mut self,
        pod: &Pod,
        container: &Container,
        attempt: u32,
        observed: &Observed,
    ) {
        let name = &container.name;
        // A later start decides about the image anew.
        self.memory().images.remove(name);
        let failed = |reason: &str, message: String| {
            self.event(name, EventKind::Warning, "Failed", format!("Error: {message}"));
            let failure = Failure { reason: reason.to_owned(), message, until: Timestamp::now() + RETRY };
            self.memory().failures.insert(name.clone(), failure);
        };
        let (config, sandbox) = match self.make_config(pod, container, attempt, observed).await {
            Ok(made) => made,
            Err(message) => return failed("CreateContainerConfigError", message),
        };
        let id = match self.shared.runtime.create_container(&sandbox, config).await {
            Ok(id) => id,
            Err(e) => return failed("CreateContainerError", e.to_string()),
        };
        self.event(name, EventKind::Normal, "Created", format!("Created container: {name}"));
        {
            let mut memory = self.memory();
            memory.failures.remove(name);
            if observed.latest(name).is_some() {
                let next = BackOff::next(memory.backoffs.get(name).copied(), Timestamp::now());
                memory.backoffs.insert(name.clone(), next);
            }
        }
        if let Err(e) = self.shared.runtime.start_container(&id).await {
            self.event(name, EventKind::Warning, "Failed", format!("Error: {e}"));
            return;
        }
        self.event(name, EventKind::Normal, "Started", format!("Started container {name}"));
        if let Some(hook) = container.lifecycle.post_start.clone() {
            self.post_start(pod, container.clone(), hook, id, observed);
        }
    }

    pub(super) async fn make_config(
        &self,
        pod: &Pod,
        container: &Container,
        attempt: u32,
        observed: &Observed,
    ) -> Result<(runtime::ContainerConfig, String), String> {
        let sandbox = observed.ready_sandbox().ok_or("the pod has no sandbox")?.id.clone();
        let image = self.shared.images.image_status(&container.image).await.map_err(|e| e.to_string())?;
        check_non_root(pod, container, &image.map(|i| i.user).unwrap_or_default())?;
        let sources = self.sources(pod, container, observed).await.map_err(|e| e.to_string())?;
        let environment = environment(pod, container, &sources)?;
        let mounts = self.mounts(pod, container, attempt, &environment)?;
        let given = Given {
            environment,
            mounts,
            attempt,
            log_path: self.shared.config.log_path(pod, &container.name, attempt),
            node_memory: self.shared.node.memory,
        };
        Ok((container_config(pod, container, given), sandbox))
    }

    pub(super) fn mounts(
        &self,
        pod: &Pod,
        container: &Container,
        attempt: u32,
        environment: &[(String, String)],
    ) -> Result<Vec<Mount>, String> {
        let mut mounts = Vec::new();
        for wanted in &container.volume_mounts {
            let expanded = crate::env::arguments(std::slice::from_ref(&wanted.sub_path_expr), environment).concat();
            let sub_path = if wanted.sub_path_expr.is_empty() { &wanted.sub_path } else { &expanded };
            let follow_host_mounts = match wanted.mount_propagation.as_str() {
                "" | "None" => false,
                "HostToContainer" => true,
                other => return Err(format!("mountPropagation {other} is not supported: use None or HostToContainer")),
            };
            mounts.push(Mount {
                container_path: wanted.mount_path.clone(),
                host_path: self.shared.volumes.mount_source(pod, wanted, sub_path)?,
                readonly: wanted.read_only,
                follow_host_mounts,
            });
        }
        let mut own = |path: &str, host_path: PathBuf| {
            if !container.volume_mounts.iter().any(|m| m.mount_path == path) {
                let container_path = path.to_owned();
                mounts.push(Mount { container_path, host_path, readonly: false, follow_host_mounts: false });
            }
        };
        let directory = self.shared.volumes.pod_directory(&pod.metadata.uid);
        own("/etc/hosts", directory.join("etc-hosts"));
        let file = self.message_file(&container.name, attempt);
        let made = file.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| {
            std::fs::write(&file, "")?;
            std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666))
        });
        made.map_err(|e| format!("cannot make {}: {e}", file.display()))?;
        let path = match container.termination_message_path.as_str() {
            "" => "/dev/termination-log",
            path => path,
        };
        own(path, file);
        Ok(mounts)
    }

    pub(super) fn message_file(&self, container: &str, attempt: u32) -> PathBuf {
        let directory = self.shared.volumes.pod_directory(&self.pod.metadata.uid);
        directory.join("containers").join(container).join(attempt.to_string())
    }

    pub(super) fn plain_sources(&self, observed: &Observed) -> Sources {
        Sources {
            pod_ips: pod_ips(&self.pod, observed, &self.shared.config.node_ips),
            node_ips: self.shared.config.node_ips.clone(),
            node_name: self.shared.config.node_name.clone(),
            node_cpu_milli: self.shared.node.cpu_milli,
            node_memory: self.shared.node.memory,
            ..Sources::default()
        }
    }

    pub(super) async fn sources(
        &self,
        pod: &Pod,
        container: &Container,
        observed: &Observed,
    ) -> Result<Sources, ApiError> {
        let mut sources = self.plain_sources(observed);
        let namespace = &pod.metadata.namespace;
        let (mut maps, mut secrets) = (Vec::new(), Vec::new());
        for from in &container.env_from {
            maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
        }
        for from in container.env.iter().filter_map(|e| e.value_from.as_ref()) {
            maps.extend(from.config_map_key_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(from.secret_key_ref.as_ref().map(|r| r.name.clone()));
        }
        for name in maps {
            if let Some(data) = self.shared.volumes.config_map(namespace, &name).await? {
                sources.config_maps.insert(name, data);
            }
        }
        for name in secrets {
            if let Some(data) = self.shared.volumes.secret(namespace, &name).await? {
                sources.secrets.insert(name, data);
            }
        }
        let links = pod.spec.enable_service_links.unwrap_or(true);
        for service in self.shared.services.list() {
            let is_master = service.metadata.namespace == "default" && service.metadata.name == "kubernetes";
            if (is_master || links && service.metadata.namespace == *namespace)
                && let Some((ip, ports)) = service.linkable()
            {
                sources.services.extend(service_variables(&service.metadata.name, ip, &ports));
            }
        }
        Ok(sources)
    }
}
