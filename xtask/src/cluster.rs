//! The cluster as a user has it: the `fairlead` binary, its data directory, and kubectl where there is one.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::hosts::{self, Hosts};
use crate::shell;

pub struct Cluster {
    binary: PathBuf,
    data_dir: PathBuf,
    kubectl: Option<PathBuf>,
    made: Made,
}

/// How a cluster comes to be.
enum Made {
    ByUp,
    ByHand(Hosts),
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
        let kubectl = shell::which("kubectl");
        Ok(Cluster { binary, data_dir: data_dir.to_path_buf(), kubectl, made: Made::ByUp })
    }

    /// A cluster that is a server and agents by themselves, without `up`.
    pub fn standalone(data_dir: &Path) -> Result<Cluster> {
        let cluster = Cluster::new(data_dir)?;
        let hosts = Hosts::new(&cluster.binary, data_dir);
        Ok(Cluster { made: Made::ByHand(hosts), ..cluster })
    }

    pub fn binary(&self) -> &Path {
        &self.binary
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn kubeconfig(&self) -> PathBuf {
        match &self.made {
            Made::ByUp => self.data_dir.join("kubeconfig"),
            Made::ByHand(hosts) => hosts.kubeconfig(),
        }
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

    /// Starts the cluster, and returns when its nodes are Ready and DNS answers.
    pub fn start(&self, nodes: usize, flags: &[String]) -> Result<()> {
        match &self.made {
            Made::ByUp => shell::step(&mut self.up(nodes, flags)),
            Made::ByHand(hosts) => self.wait_for(hosts, nodes, hosts.start(nodes, flags)?),
        }
    }

    fn wait_for(&self, hosts: &Hosts, nodes: usize, mut children: Vec<Child>) -> Result<()> {
        shell::until("all nodes are Ready and serve DNS", || {
            for (index, child) in children.iter_mut().enumerate() {
                if let Some(status) = child.try_wait()? {
                    let role = if index == 0 { "server".to_owned() } else { format!("node-{index}") };
                    bail!("{role} ended ({status}): {}", hosts.last_words(&role));
                }
            }
            let ready = count(&self.get(&["nodes"])?, "/items", is_ready);
            let labels = ["endpointslices", "-n", "kube-system", "-l", "kubernetes.io/service-name=kube-dns"];
            let serving = count(&self.get(&labels)?, "/items/0/endpoints", |endpoint| {
                endpoint.pointer("/conditions/ready") == Some(&Value::Bool(true))
            });
            Ok(ready == nodes && serving == nodes)
        })
    }

    /// Makes an archive's images known to every node.
    pub fn import(&self, archive: &Path, nodes: usize) -> Result<()> {
        let dirs = match &self.made {
            Made::ByUp => vec![self.data_dir.clone()],
            Made::ByHand(hosts) => (1..=nodes).map(|index| hosts.dir(&format!("node-{index}"))).collect(),
        };
        for dir in dirs {
            let mut import = Command::new(&self.binary);
            shell::step(import.args(["image", "--data-dir"]).arg(dir).arg("import").arg(archive))?;
        }
        Ok(())
    }

    pub fn down(&self) -> Result<()> {
        match &self.made {
            Made::ByUp => shell::step(&mut self.fairlead(&["down"])),
            Made::ByHand(hosts) => hosts.end(),
        }
    }

    /// A command in the network namespace of a node or of `outside`.
    pub fn on<S: AsRef<OsStr>>(&self, place: &str, words: &[S]) -> Command {
        if let Made::ByHand(hosts) = &self.made {
            return hosts.on(place, words);
        }
        let mut command = self.fairlead(&["node", "exec"]);
        command.arg(place).arg("--").args(words);
        command
    }

    /// kubectl with the written kubeconfig, or the binary's own thin client of the same words.
    pub fn kubectl(&self, words: &[&str]) -> Command {
        match &self.kubectl {
            Some(kubectl) => {
                let mut command = self.where_the_server_is(kubectl);
                command.args(words).env("KUBECONFIG", self.kubeconfig());
                // A free port that an earlier cluster also had must not bring that cluster's discovery back.
                command.env("KUBECACHEDIR", self.data_dir.join("kubectl-cache"));
                command
            }
            None => {
                let (verb, rest) = words.split_first().expect("a kubectl command has a verb");
                let mut command = self.where_the_server_is(&self.binary);
                command.arg(verb).arg("--data-dir").arg(&self.data_dir).env("KUBECONFIG", self.kubeconfig());
                command.args(rest);
                command
            }
        }
    }

    /// `up` listens on this machine's loopback; a server by itself on its host's address.
    fn where_the_server_is(&self, program: &Path) -> Command {
        match &self.made {
            Made::ByUp => Command::new(program),
            Made::ByHand(hosts) => hosts.on(hosts::SERVER, &[program]),
        }
    }

    pub fn get(&self, words: &[&str]) -> Result<Value> {
        let mut command = self.kubectl(&[&["get"], words, &["-o", "json"]].concat());
        let text = shell::output(&mut command)?;
        serde_json::from_str(&text).with_context(|| format!("`{}` did not print JSON", shell::words(&command)))
    }
}

fn is_ready(node: &Value) -> bool {
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
}

fn count(value: &Value, pointer: &str, is_so: impl Fn(&Value) -> bool) -> usize {
    value.pointer(pointer).and_then(Value::as_array).map_or(0, |all| all.iter().filter(|one| is_so(one)).count())
}
