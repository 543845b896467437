//! What the agent and a pod's helper say to each other: one JSON line a message, descriptors beside it.
//!
//! A connection carries one request. The answer is one line, except for `Exec`, which answers a second time when the
//! process has ended, and `Watch`, which answers whenever a container has.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::types::{Exit, Started, Tmpfs};

/// What a helper is told when it starts, in a file that its only argument names.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    pub socket: PathBuf,
    /// Where libcontainer keeps its notes and sockets.
    pub state: PathBuf,
    pub cgroup: PathBuf,
    pub hostname: String,
    pub host_network: bool,
    pub host_ipc: bool,
    pub own_process_namespace: bool,
    pub sysctls: BTreeMap<String, String>,
    pub tmpfs: Vec<Tmpfs>,
}

/// Printed by the helper once it can be spoken to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Ready {
    Listening {
        /// Process 1 of the pod's shared process namespace.
        init: Option<i32>,
    },
    Failed(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    Run(Run),
    Signal {
        id: String,
        signal: i32,
    },
    /// Descriptors: stdin, stdout, stderr; none with a terminal.
    Exec {
        id: String,
        /// A file with an OCI process.
        process: PathBuf,
        tty: bool,
    },
    /// Descriptors: where stdout and stderr are to be copied from now on.
    Attach {
        id: String,
    },
    /// A stream socket of the pod's network namespace, not yet connected.
    Socket {
        ipv6: bool,
    },
    /// Every container that has ended, now and from now on.
    Watch,
    Shutdown,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    pub id: String,
    /// Holds config.json, rootfs, upper and work; started.json and exit.json are written here.
    pub bundle: PathBuf,
    pub layers_base: PathBuf,
    pub layers: Vec<PathBuf>,
    pub tty: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub log_path: PathBuf,
    pub cgroup: PathBuf,
    pub oom_score_adj: Option<i32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// With a terminal, its master comes along.
    Started(Started),
    /// The container's stdin, if it has one, or its terminal comes along.
    Attached,
    Exited {
        id: String,
        exit: Exit,
    },
    Failed(String),
}

/// File names in a container's bundle.
pub const STARTED: &str = "started.json";
pub const EXIT: &str = "exit.json";
