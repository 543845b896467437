//! The cluster as a user has it: the `fairlead` binary, its data directory, and kubectl where there is one.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

pub struct Cluster {
    binary: PathBuf,
    data_dir: PathBuf,
    kubectl: Option<PathBuf>,
}

impl Cluster {
    /// The release build, or what FAIRLEAD_BINARY names.
    pub fn new(data_dir: &Path) -> Result<Cluster> {
        let binary = match std::env::var_os("FAIRLEAD_BINARY") {
            Some(named) => std::path::absolute(named)?,
            None => shell::target_dir()?.join("release/fairlead"),
        };
        if !binary.is_file() {
            bail!("{} is not there: run `cargo build --release`", binary.display());
        }
        Ok(Cluster { binary, data_dir: data_dir.to_path_buf(), kubectl: shell::which("kubectl") })
    }

    pub fn binary(&self) -> &Path {
        &self.binary
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.data_dir.join("kubeconfig")
    }

    pub fn has_kubectl(&self) -> bool {
        self.kubectl.is_some()
    }

    /// `fairlead WORDS… --data-dir DIR`; what follows the flag is the caller's.
    pub fn fairlead(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(words).arg("--data-dir").arg(&self.data_dir).env("KUBECONFIG", self.kubeconfig());
        command
    }

    pub fn up(&self, nodes: usize, flags: &[String]) -> Command {
        let mut command = self.fairlead(&["up"]);
        command.args(["--detach", "--nodes", &nodes.to_string()]).args(flags);
        command
    }

    pub fn down(&self) -> Result<()> {
        shell::step(&mut self.fairlead(&["down"]))
    }

    /// A command in the network namespace of a node or of `outside`.
    pub fn on<S: AsRef<OsStr>>(&self, place: &str, words: &[S]) -> Command {
        let mut command = self.fairlead(&["node", "exec"]);
        command.arg(place).arg("--").args(words);
        command
    }

    /// kubectl with the written kubeconfig, or the binary's own thin client of the same words.
    pub fn kubectl(&self, words: &[&str]) -> Command {
        match &self.kubectl {
            Some(kubectl) => {
                let mut command = Command::new(kubectl);
                command.args(words).env("KUBECONFIG", self.kubeconfig());
                // A free port that an earlier cluster also had must not bring that cluster's discovery back.
                command.env("KUBECACHEDIR", self.data_dir.join("kubectl-cache"));
                command
            }
            None => {
                let (verb, rest) = words.split_first().expect("a kubectl command has a verb");
                let mut command = self.fairlead(&[verb]);
                command.args(rest);
                command
            }
        }
    }

    pub fn get(&self, words: &[&str]) -> Result<Value> {
        let mut command = self.kubectl(&[&["get"], words, &["-o", "json"]].concat());
        let text = shell::output(&mut command)?;
        serde_json::from_str(&text).with_context(|| format!("`{}` did not print JSON", shell::words(&command)))
    }
}
