//! `fairlead server` and `fairlead agent` by themselves, as on real hosts: a lab gives the machines, nothing of `up` takes part.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use lab::{Lab, LabConfig};

use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, leftovers};
use crate::script::Script;
use crate::{play, settle};

const NODES: u32 = 2;
/// Longer than the test, in case nobody ends them.
const SECONDS_OF_LIFE: u32 = 300;
const SERVER: &str = "192.168.49.2:6443";

#[test]
fn a_server_and_agents_are_a_cluster_without_up() {
    let mut cluster = Cluster::new(&kubectls()[0]);
    let lab = Lab::create(LabConfig::new(cluster.data_dir(), NODES)).expect("a lab can be made");
    let mut roles = vec![serve(&mut cluster)];
    // The server is on its host's address only.
    cluster.move_into(&lab.netns("node-1"), "kubectl");
    for node in lab.nodes() {
        let address = node.ipv4.expect("a node has an IPv4 address");
        // On a host of its own it would be the only one to use the default cgroup.
        let line = format!(
            "exec fairlead node exec --data-dir $DIR {name} -- fairlead agent --server $JOIN --token $TOKEN --ca-hash $HASH \
             --node-name {name} --node-ip {address} --data-dir $DIR/nodes/{name} --cgroup {cgroup}/pods 2> $TMP/{name}.log",
            name = node.name,
            cgroup = node.cgroup,
        );
        roles.push(cluster.shell(&line, SECONDS_OF_LIFE).spawn().expect("an agent can be started"));
        cluster.import(&node.dir.to_string_lossy(), &["nginx-test1.tar"]);
    }

    let mut differences = Vec::new();
    for (name, text) in
        [("road.txt", include_str!("../cases/road.txt")), ("joining.txt", include_str!("../cases/joining.txt"))]
    {
        differences.extend(play::play(&Script::parse(name, text).expect("the script can be read"), &cluster));
    }
    let logs = expect(&cluster, "tail -n 5 $TMP/*.log");
    cluster.down();
    for mut role in roles {
        role.wait().expect("a role can be waited for");
    }
    if !differences.is_empty() {
        eprintln!("{logs}");
    }
    settle(&differences);
    assert_eq!(leftovers(&cluster, lab.id()), Vec::<String>::new(), "down leaves nothing");
}

/// Starts the control plane on the first host, and takes from what it prints how to join.
fn serve(cluster: &mut Cluster) -> Child {
    let line = format!(
        "exec fairlead node exec --data-dir $DIR node-1 -- fairlead server --data-dir $DIR --listen {SERVER} 2> $TMP/server.log"
    );
    let mut server = cluster.shell(&line, SECONDS_OF_LIFE).stdout(Stdio::piped()).spawn().expect("sh can be started");
    let output = server.stdout.take().expect("standard output is a pipe");
    let lines = BufReader::new(output).lines().map_while(Result::ok);
    let Some(line) = lines.into_iter().find(|line| line.starts_with("join a node: ")) else {
        panic!("the server ended: {}", expect(cluster, "cat $TMP/server.log"));
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    for (name, flag) in [("JOIN", "--server"), ("TOKEN", "--token"), ("HASH", "--ca-hash")] {
        let at = words.iter().position(|word| *word == flag).unwrap_or_else(|| panic!("{flag} is in {line:?}"));
        cluster.set(name, words[at + 1]);
    }
    server
}
