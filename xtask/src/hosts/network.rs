//! The cables between the hosts, as `ip` commands in the order in which they run.
//!
//! ```text
//!   node-1 .2 ──┐
//!   node-2 .3 ──┼── bridge 192.168.49.1, router 203.0.113.1 ── outside 203.0.113.9
//!   node-3 .4 ──┘
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// Addresses of nodes are the second and following ones of a /24.
pub const MOST_HOSTS: usize = 200;
const PINS: &str = "/run/netns";

pub struct Network {
    prefix: String,
}

/// The address of a node, counted from 1.
pub fn node(index: usize) -> String {
    format!("192.168.49.{}", index + 1)
}

impl Network {
    pub fn new(prefix: &str) -> Network {
        Network { prefix: prefix.to_owned() }
    }

    pub fn pin(&self, place: &str) -> PathBuf {
        Path::new(PINS).join(self.name(place))
    }

    /// The namespaces that are there.
    pub fn pins(&self) -> Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(PINS) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot list {PINS}"))?,
        };
        let begin = format!("{}-", self.prefix);
        let ours = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&begin));
        Ok(ours.map(|entry| entry.path()).collect())
    }

    pub fn commands(&self, nodes: usize) -> Vec<Command> {
        let mut all = Vec::new();
        let mut places: Vec<String> = vec!["switch".into(), "outside".into()];
        places.extend((1..=nodes).map(|index| format!("node-{index}")));
        for place in &places {
            all.push(ip(&["netns", "add", &self.name(place)]));
            all.push(self.within(place, "link set lo up"));
        }
        all.push(self.within("switch", "link add br0 up type bridge"));
        all.push(self.within("switch", "address add 192.168.49.1/24 dev br0"));
        for index in 1..=nodes {
            let place = format!("node-{index}");
            all.extend(self.cable(&place, &format!("n{index}"), &node(index), "192.168.49.1"));
            all.push(self.within("switch", &format!("link set n{index} master br0")));
        }
        all.push(self.forwarding());
        all.extend(self.cable("outside", "out", "203.0.113.9", "203.0.113.1"));
        all.push(self.within("switch", "address add 203.0.113.1/24 dev out"));
        all
    }

    /// A place's eth0, whose other end is a link of the switch.
    fn cable(&self, place: &str, link: &str, address: &str, router: &str) -> Vec<Command> {
        let peer = self.name(place);
        vec![
            self.within("switch", &format!("link add {link} up type veth peer name eth0 netns {peer}")),
            self.within(place, "link set eth0 up"),
            self.within(place, &format!("address add {address}/24 dev eth0")),
            self.within(place, &format!("route add default via {router}")),
        ]
    }

    /// The switch routes between the nodes and the outside. The write happens in its namespace, where the file is its own.
    fn forwarding(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.pin("switch").display()));
        command.args(["--", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
        command
    }

    fn within(&self, place: &str, words: &str) -> Command {
        let mut command = ip(&["-netns", &self.name(place)]);
        command.args(words.split(' '));
        command
    }

    fn name(&self, place: &str) -> String {
        format!("{}-{place}", self.prefix)
    }
}

fn ip(words: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(words);
    command
}

#[cfg(test)]
mod tests {
    use super::Network;
    use crate::shell;

    #[test]
    fn every_link_is_made_inside_a_namespace() {
        let commands = Network::new("fairlead-0").commands(2);
        let lines: Vec<String> = commands.iter().map(shell::words).collect();
        for line in lines.iter().filter(|line| line.contains(" link ") || line.contains(" address ")) {
            assert!(line.starts_with("ip -netns fairlead-0-"), "{line}");
        }
        assert!(lines.contains(&"ip -netns fairlead-0-node-2 address add 192.168.49.3/24 dev eth0".to_owned()));
    }
}
