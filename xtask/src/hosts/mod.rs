//! Machines without `up`: network namespaces joined by a bridge, in which `fairlead server` and `fairlead agent` run by
//! hand, as they would on real hosts. Everything here is made with `ip`, so that nothing of `up` takes part.

mod network;
mod remains;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::image::hex;
use crate::shell;
use network::Network;

/// The host that runs the control plane beside its own agent.
pub const SERVER: &str = "node-1";
const API_PORT: u16 = 6443;

/// The hosts of one data directory. Their names carry a short id of it, so that several can live beside each other.
pub struct Hosts {
    binary: PathBuf,
    data_dir: PathBuf,
    id: String,
}

/// What `fairlead server` prints for those who want to join.
struct Join {
    server: String,
    token: String,
    ca_hash: String,
}

impl Hosts {
    pub fn new(binary: &Path, data_dir: &Path) -> Hosts {
        let id = hex(data_dir.as_os_str().as_encoded_bytes())[..6].to_owned();
        Hosts { binary: binary.to_owned(), data_dir: data_dir.to_owned(), id }
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir(SERVER).join("kubeconfig")
    }

    /// A host's own directory. Server and agent of one host share it, as they do by default.
    pub fn dir(&self, host: &str) -> PathBuf {
        self.data_dir.join(host)
    }

    /// Wires the hosts, starts the control plane on the first one and an agent on each, and returns when the server has
    /// been asked to take them all in. Flags go to whom they concern.
    pub fn start(&self, nodes: usize, flags: &[String]) -> Result<Vec<Child>> {
        if nodes == 0 || nodes > network::MOST_HOSTS {
            bail!("--nodes {nodes}: there can be 1 to {} hosts", network::MOST_HOSTS);
        }
        fs::create_dir_all(self.data_dir.join("log"))?;
        println!("+ ip netns add {}-node-1 …: {nodes} hosts and an outside, joined by a bridge", self.cgroup());
        for mut command in self.network().commands(nodes) {
            shell::output(&mut command)?;
        }
        let (to_server, to_agents) = split(flags);
        let address = network::node(1);
        let mut server = self.role(SERVER, "server")?;
        server.args(["server", "--listen", &format!("{address}:{API_PORT}")]).args(to_server);
        server.arg("--data-dir").arg(self.dir(SERVER));
        let (child, join) = self.serve(server)?;
        let mut children = vec![child];
        for index in 1..=nodes {
            let name = format!("node-{index}");
            let mut agent = self.role(&name, &name)?;
            agent.args(["agent", "--server", &join.server, "--token", &join.token, "--ca-hash", &join.ca_hash]);
            agent.args(["--node-name", &name, "--node-ip", &network::node(index)]).args(&to_agents);
            agent.arg("--data-dir").arg(self.dir(&name));
            // What would be /run and the top cgroup on a machine of its own.
            agent.arg("--run-dir").arg(self.dir(&name).join("run"));
            agent.arg("--cgroup").arg(format!("{}/{name}/pods", self.cgroup()));
            println!("+ on {name}: fairlead agent --server {} --token … --ca-hash {}", join.server, join.ca_hash);
            children.push(agent.stdout(Stdio::null()).spawn().context("cannot start an agent")?);
        }
        Ok(children)
    }

    /// A command in the network namespace of a host or of `outside`.
    pub fn on<S: AsRef<OsStr>>(&self, place: &str, words: &[S]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.network().pin(place).display())).arg("--").args(words);
        command
    }

    /// The end of a role's log, which says why.
    pub fn last_words(&self, role: &str) -> String {
        let text = fs::read_to_string(self.log(role)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Ends every process, and takes the namespaces and cgroups away. What is gone already is fine.
    pub fn end(&self) -> Result<()> {
        println!("+ end all processes of the hosts, then delete their namespaces and cgroups");
        remains::end(&self.network().pins()?, &self.cgroup())
    }

    fn network(&self) -> Network {
        Network::new(&self.cgroup())
    }

    /// The prefix of all names, and the top of the cgroups.
    fn cgroup(&self) -> String {
        format!("fairlead-{}", self.id)
    }

    fn log(&self, role: &str) -> PathBuf {
        self.data_dir.join("log").join(format!("{role}.log"))
    }

    /// `fairlead`, in a host's network namespace, with mounts of its own that end with it, and in a cgroup by which it and
    /// its children are found again. A session of its own keeps the terminal's Ctrl-C for those who clean up.
    fn role(&self, host: &str, role: &str) -> Result<Command> {
        let cgroup = remains::make_cgroup(&format!("{}/{host}/{role}", self.cgroup()))?;
        let become_it = "echo $$ > \"$0\" && exec \"$@\"";
        let mut words: Vec<&OsStr> = ["setsid", "unshare", "--mount", "sh", "-c", become_it].map(OsStr::new).into();
        let procs = cgroup.join("cgroup.procs");
        words.extend([procs.as_os_str(), self.binary.as_os_str()]);
        let mut command = self.on(host, &words);
        let log = self.log(role);
        let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stderr(log);
        Ok(command)
    }

    /// Starts the control plane and reads what it prints until it names the command that joins a node.
    fn serve(&self, mut server: Command) -> Result<(Child, Join)> {
        println!("+ on {SERVER}: fairlead server");
        let mut child = server.stdout(Stdio::piped()).spawn().context("cannot start the server")?;
        let output = child.stdout.take().expect("standard output is a pipe");
        for line in BufReader::new(output).lines() {
            let line = line.context("cannot read what the server prints")?;
            if let Some(join) = Join::read(&line) {
                return Ok((child, join));
            }
        }
        let status = child.wait()?;
        bail!("the server ended ({status}) before a node could join: {}", self.last_words("server"))
    }
}

impl Join {
    fn read(line: &str) -> Option<Join> {
        let words: Vec<&str> = line.strip_prefix("join a node: ")?.split_whitespace().collect();
        let after = |flag: &str| {
            let at = words.iter().position(|word| *word == flag)?;
            words.get(at + 1).map(|word| (*word).to_owned())
        };
        Some(Join { server: after("--server")?, token: after("--token")?, ca_hash: after("--ca-hash")? })
    }
}

/// Flags with their values, as those of the server and those of the agents.
fn split(flags: &[String]) -> (Vec<String>, Vec<String>) {
    const OF_AGENTS: &[&str] = &["--proxy-mode", "--overlay", "--insecure-registry", "--label"];
    let (mut server, mut agents) = (Vec::new(), Vec::new());
    for pair in flags.chunks(2) {
        let concerned = if OF_AGENTS.contains(&pair[0].as_str()) { &mut agents } else { &mut server };
        concerned.extend_from_slice(pair);
    }
    (server, agents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_to_whom_they_concern() {
        let flags = ["--proxy-mode", "iptables", "--store", "log", "--overlay", "vxlan"].map(str::to_owned);
        let (server, agents) = split(&flags);
        assert_eq!(server, ["--store", "log"]);
        assert_eq!(agents, ["--proxy-mode", "iptables", "--overlay", "vxlan"]);
    }

    #[test]
    fn the_line_that_joins_a_node_is_read() {
        assert!(Join::read("API server: https://192.168.49.2:6443").is_none());
        let line = "join a node: fairlead agent --server https://192.168.49.2:6443 --token a.b --ca-hash sha256:c";
        let join = Join::read(line).expect("a whole line");
        assert_eq!((join.server.as_str(), join.token.as_str()), ("https://192.168.49.2:6443", "a.b"));
        assert_eq!(join.ca_hash, "sha256:c");
    }
}
