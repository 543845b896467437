//! What is written about sandboxes and containers, so that another agent can go on.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use linux::process::ProcessId;
use serde::{Deserialize, Serialize};

use crate::files::{read_json, write_atomically};
use crate::helper::protocol::{EXIT, STARTED};
use crate::service::Result;
use crate::types::{ContainerState, ContainerStatus, Context, Exit, SandboxConfig, Started};

pub const SANDBOX: &str = "sandbox.json";
const CONTAINER: &str = "container.json";

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub id: String,
    pub config: SandboxConfig,
    pub created_at: jiff::Timestamp,
    pub ips: Vec<IpAddr>,
    pub helper: Option<ProcessId>,
    /// Process 1 of the pod's shared process namespace.
    pub init: Option<i32>,
}

impl SandboxRecord {
    pub fn save(&self, directory: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(self).expect("plain data");
        write_atomically(&directory.join(SANDBOX), &bytes).context(|| format!("cannot record sandbox {}", self.id))
    }

    pub fn load(directory: &Path) -> Result<Option<SandboxRecord>> {
        read_json(&directory.join(SANDBOX)).context(|| format!("cannot read {}", directory.display()))
    }
}

/// A container's bundle as a place for its record.
pub struct ContainerRecord {
    pub bundle: PathBuf,
}

impl ContainerRecord {
    pub fn save(&self, status: &ContainerStatus) -> Result<()> {
        let bytes = serde_json::to_vec(status).expect("plain data");
        write_atomically(&self.bundle.join(CONTAINER), &bytes)
            .context(|| format!("cannot record container {}", status.id))
    }
}

/// Every sandbox that has a record. A directory without one was never finished and is removed.
pub fn load_all(root: &Path) -> Result<Vec<SandboxRecord>> {
    let mut records = Vec::new();
    let directory = root.join("sandboxes");
    for entry in std::fs::read_dir(&directory).context(|| format!("cannot list {}", directory.display()))?.flatten() {
        match SandboxRecord::load(&entry.path())? {
            Some(record) => records.push(record),
            None => {
                std::fs::remove_dir_all(entry.path()).context(|| format!("cannot remove {}", entry.path().display()))?
            }
        }
    }
    Ok(records)
}

/// A sandbox's containers as its helper's files tell of them.
pub fn load_containers(sandbox: &Path) -> Result<Vec<ContainerStatus>> {
    let mut containers = Vec::new();
    for entry in std::fs::read_dir(sandbox.join("containers")).into_iter().flatten().flatten() {
        let bundle = entry.path();
        let what = || format!("cannot read {}", bundle.display());
        let Some(mut status) = read_json::<ContainerStatus>(&bundle.join(CONTAINER)).context(what)? else {
            std::fs::remove_dir_all(&bundle).context(|| format!("cannot remove {}", bundle.display()))?;
            continue;
        };
        let started = read_json::<Started>(&bundle.join(STARTED)).context(what)?;
        let exit = read_json::<Exit>(&bundle.join(EXIT)).context(what)?;
        status.state = match (started, exit) {
            (started, Some(exit)) => ContainerState::Exited { started, exit },
            (Some(started), None) => ContainerState::Running(started),
            (None, None) => ContainerState::Created,
        };
        containers.push(status);
    }
    Ok(containers)
}
