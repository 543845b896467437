//! The words of the runtime: what a sandbox and a container are asked to be, and what they are.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::network::PortMapping;

/// What a pod's sandbox is to be. Fixed for its life.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SandboxConfig {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub attempt: u32,
    pub hostname: String,
    pub dns: DnsConfig,
    pub host_network: bool,
    pub host_pid: bool,
    pub host_ipc: bool,
    /// One process namespace for all containers of the pod.
    pub share_process_namespace: bool,
    pub port_mappings: Vec<PortMapping>,
    /// Written in the pod's own namespaces before any container starts.
    pub sysctls: BTreeMap<String, String>,
    /// File systems in memory that live as long as the sandbox, for `emptyDir` volumes of medium Memory.
    pub tmpfs: Vec<Tmpfs>,
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    pub path: PathBuf,
    pub size: Option<u64>,
}

/// The lines of resolv.conf. Empty means an empty file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxStatus {
    pub id: String,
    pub config: SandboxConfig,
    pub state: SandboxState,
    pub created_at: jiff::Timestamp,
    pub ips: Vec<IpAddr>,
    /// The helper that holds the namespaces.
    pub pid: Option<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SandboxState {
    Ready,
    NotReady,
}

/// What a container is to be. Fixed for its life.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerConfig {
    pub name: String,
    /// How many containers of this name ran in the pod before.
    pub attempt: u32,
    /// A reference or an image id that the image service knows.
    pub image: String,
    /// Replaces the image's entrypoint when not empty.
    pub command: Vec<String>,
    /// Replaces the image's cmd when not empty, or when `command` is given.
    pub args: Vec<String>,
    pub working_dir: Option<String>,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub stdin: bool,
    /// Close stdin when the first attached client has gone.
    pub stdin_once: bool,
    pub tty: bool,
    /// The log file, in CRI's format; its directory is made.
    pub log_path: PathBuf,
    pub resources: Resources,
    pub security: Security,
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub container_path: String,
    pub host_path: PathBuf,
    pub readonly: bool,
    /// Later mounts of the machine below `host_path` also appear (HostToContainer).
    pub follow_host_mounts: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu_shares: Option<u64>,
    pub cpu_quota: Option<i64>,
    pub cpu_period: Option<u64>,
    pub memory_limit: Option<i64>,
    pub pids_limit: Option<i64>,
    pub oom_score_adj: Option<i32>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    pub privileged: bool,
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub supplemental_groups: Vec<i64>,
    pub readonly_rootfs: bool,
    /// Names without the `CAP_` prefix, or `ALL`.
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub no_new_privileges: bool,
    /// Leave /proc as it is (procMount Unmasked).
    pub unmasked_proc: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    pub id: String,
    pub sandbox_id: String,
    pub config: ContainerConfig,
    /// The image's id (the digest of its configuration).
    pub image_id: String,
    /// What the image can be fetched by again: `NAME@DIGEST` if it was pulled, or else its id. Called imageRef in CRI.
    pub image_ref: String,
    pub created_at: jiff::Timestamp,
    pub state: ContainerState,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ContainerState {
    Created,
    Running(Started),
    Exited { started: Option<Started>, exit: Exit },
}

impl ContainerState {
    pub fn is_running(&self) -> bool {
        matches!(self, ContainerState::Running(_))
    }

    pub fn exit(&self) -> Option<&Exit> {
        match self {
            ContainerState::Exited { exit, .. } => Some(exit),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    pub pid: i32,
    /// Together with the pid this names a process for all time.
    pub start_time: u64,
    pub at: jiff::Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 128 + N after signal N, as shells say it.
    pub code: i32,
    pub signal: Option<i32>,
    pub oom_killed: bool,
    pub at: jiff::Timestamp,
    pub message: String,
}

/// An image as the kubelet needs to see it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// `sha256:…` of the image's configuration.
    pub id: String,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// Bytes, unpacked.
    pub size: u64,
    /// The image's USER, as written: `uid`, `name`, `uid:gid` …; empty means root.
    pub user: String,
}

/// Something changed; look at the sandbox again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeEvent {
    pub sandbox_id: String,
    pub pod_uid: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

/// What to use towards a registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullAuth {
    pub username: String,
    pub password: String,
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{kind} {id} not found: list what the runtime holds")]
    NotFound { kind: &'static str, id: String },
    #[error("container {id} is not running")]
    NotRunning { id: String },
    #[error("sandbox {id} is not ready: remove it and run another")]
    SandboxNotReady { id: String },
    #[error("image {0} is not present: pull or import it")]
    ImageMissing(String),
    #[error("{0}")]
    InvalidConfig(String),
    #[error("{0}")]
    StartFailed(String),
    #[error("the pod's helper: {0}")]
    Helper(String),
    #[error("pod network: {0}")]
    Network(#[from] crate::network::NetworkError),
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("no answer within {seconds} s from {what}")]
    Timeout { what: String, seconds: u64 },
}

/// Names what was being done when an operation of the system failed.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, RuntimeError>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, RuntimeError> {
        self.map_err(|source| RuntimeError::Io { what: what(), source })
    }
}
