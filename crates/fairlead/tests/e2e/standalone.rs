//! `fairlead server` and `fairlead agent` by themselves, as on real hosts: a lab gives the machines, nothing of `up` takes part.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use lab::{Lab, LabConfig, LabNode};

use crate::cluster::{Cluster, kubectls};
use crate::death::{answers, containers, expect, leftovers, until};
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
    let mut server = serve(&mut cluster);
    // The server is on its host's address only.
    cluster.move_into(&lab.netns("node-1"), "kubectl");
    for node in lab.nodes() {
        cluster.import(&node.dir.to_string_lossy(), &["nginx-test1.tar"]);
    }
    let mut agents = serve_nodes(&cluster, &lab);

    let mut differences = Vec::new();
    for (name, text) in
        [("road.txt", include_str!("../cases/road.txt")), ("joining.txt", include_str!("../cases/joining.txt"))]
    {
        differences.extend(play::play(&Script::parse(name, text).expect("the script can be read"), &cluster));
    }
    if !differences.is_empty() {
        eprintln!("{}", expect(&cluster, "tail -n 5 $TMP/*.log"));
    }
    settle(&differences);

    // What a person who upgrades does: each role ends when asked to, and begins again; pods do not notice.
    let address = expect(&cluster, "kubectl get service nginx-service -o jsonpath='{.spec.clusterIP}'");
    let before = containers(lab.id());
    end(server);
    answers(&cluster, &address, "without a server");
    server = serve(&mut cluster);
    agents.into_iter().for_each(end);
    answers(&cluster, &address, "without agents");
    agents = serve_nodes(&cluster, &lab);
    expect(&cluster, "kubectl scale deployment/nginx-deployment --replicas=4");
    expect(&cluster, "kubectl rollout status deployment/nginx-deployment --timeout=60s");
    answers(&cluster, &address, "with all of them again");
    let after = containers(lab.id());
    let lost: Vec<_> = before.iter().filter(|(process, _)| !after.contains_key(process)).collect();
    assert!(lost.is_empty() && after.len() > before.len(), "the same containers, and more: {lost:?} ended");

    cluster.down();
    for mut role in agents.into_iter().chain([server]) {
        role.wait().expect("a role can be waited for");
    }
    assert_eq!(leftovers(&cluster, lab.id()), Vec::<String>::new(), "down leaves nothing");
}

/// Starts an agent on every host.
fn serve_nodes(cluster: &Cluster, lab: &Lab) -> Vec<Child> {
    let agent = |node: &LabNode| {
        let address = node.ipv4.expect("a node has an IPv4 address");
        // On a host of its own it would be the only one to use the default cgroup.
        let line = format!(
            "exec fairlead node exec --data-dir $DIR {name} -- fairlead agent --server $JOIN --token $TOKEN --ca-hash $HASH \
             --node-name {name} --node-ip {address} --data-dir $DIR/nodes/{name} --cgroup {cgroup}/pods 2>> $TMP/{name}.log",
            name = node.name,
            cgroup = node.cgroup,
        );
        cluster.shell(&line, SECONDS_OF_LIFE).spawn().expect("an agent can be started")
    };
    lab.nodes().iter().map(agent).collect()
}

/// Asks a role to end: `timeout`, its first process, passes the signal on to all below it.
fn end(mut role: Child) {
    let asked = Command::new("kill").arg(role.id().to_string()).status().expect("kill can be run");
    assert!(asked.success());
    role.wait().expect("a role can be waited for");
    // Those below it end by themselves, and whoever was between them and `timeout` is gone sooner.
    let group = nix::unistd::Pid::from_raw(-(role.id() as i32));
    until("the role has ended", || nix::sys::signal::kill(group, None).is_err());
}

/// Starts the control plane on the first host, and takes from what it prints how to join.
fn serve(cluster: &mut Cluster) -> Child {
    let line = format!(
        "exec fairlead node exec --data-dir $DIR node-1 -- fairlead server --data-dir $DIR --listen {SERVER} 2>> $TMP/server.log"
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
