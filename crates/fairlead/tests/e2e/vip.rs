//! `fairlead vip` on two hosts of a lab: an address follows what it is for.

use std::net::{IpAddr, TcpListener};

use lab::{Lab, LabConfig};
use linux::link::Links;

use crate::cluster::{Cluster, kubectls};
use crate::daemon::Daemon;
use crate::death::{leftovers, until};

const ADDRESSES: [&str; 2] = ["192.168.49.100", "fd00:c0a8:31::100"];

fn has(lab: &Lab, node: &str) -> bool {
    let namespace = lab.node(node).expect("a node").namespace().expect("its namespace");
    let held = Links::open(&namespace).expect("its links").addresses().expect("listed");
    let wanted = ADDRESSES.map(|text| text.parse::<IpAddr>().expect("an address"));
    wanted.iter().all(|address| held.iter().any(|one| one.address.addr() == *address))
}

fn has_none(lab: &Lab, node: &str) -> bool {
    let namespace = lab.node(node).expect("a node").namespace().expect("its namespace");
    let held = Links::open(&namespace).expect("its links").addresses().expect("listed");
    !held.iter().any(|one| ADDRESSES.contains(&one.address.addr().to_string().as_str()))
}

/// What the address is for.
fn serve(lab: &Lab, node: &str) -> TcpListener {
    let namespace = lab.node(node).expect("a node").namespace().expect("its namespace");
    namespace.run(|| TcpListener::bind("127.0.0.1:7000")).expect("entered").expect("bound")
}

fn start(cluster: &Cluster, lab: &Lab, node: &str, config: &str) -> Daemon {
    let net = format!("--net={}", lab.netns(node).display());
    let binary = cluster.dir().join("bin/fairlead").display().to_string();
    let words = ["nsenter", &net, &binary, "vip", "--config", config];
    Daemon::start(&words, &cluster.dir().join(format!("{node}-vip.log")))
}

#[test]
fn an_address_follows_what_it_is_for() {
    let cluster = Cluster::new(&kubectls()[0]);
    let lab = Lab::create(LabConfig::new(cluster.data_dir(), 2)).expect("a lab can be made");
    let config = |node: &str, priority: u8| {
        let text = format!(
            "routers:\n  - name: api\n    interface: eth0\n    id: 7\n    priority: {priority}\n    interval: 200ms\n    \
             addresses: ['{}', '{}']\n    checks:\n      - {{url: 'tcp://127.0.0.1:7000', interval: 200ms}}\n",
            ADDRESSES[0], ADDRESSES[1]
        );
        let path = cluster.dir().join(format!("{node}-vip.yaml"));
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let first = start(&cluster, &lab, "node-1", &config("node-1", 150));
    let _second = start(&cluster, &lab, "node-2", &config("node-2", 100));
    let behind_second = serve(&lab, "node-2");
    until("the one that serves has it", || has(&lab, "node-2") && has_none(&lab, "node-1"));
    let behind_first = serve(&lab, "node-1");
    until("the greater one has it", || has(&lab, "node-1") && has_none(&lab, "node-2"));
    drop(behind_first);
    until("it left what does not serve", || has(&lab, "node-2") && has_none(&lab, "node-1"));
    let _behind_first = serve(&lab, "node-1");
    until("it came back", || has(&lab, "node-1") && has_none(&lab, "node-2"));
    // Dropping it kills it: it can give nothing up, but the kernel takes what is not renewed.
    drop(first);
    until("the other one has it", || has(&lab, "node-2"));
    until("the dead one has lost it", || has_none(&lab, "node-1"));
    drop(behind_second);
    until("nobody has it", || has_none(&lab, "node-2"));

    let id = lab.id().to_owned();
    cluster.down();
    drop(_second);
    assert_eq!(leftovers(&cluster, &id), Vec::<String>::new(), "down leaves nothing");
}

#[test]
fn flags_of_vip_that_cannot_be_meant_are_refused() {
    let cluster = Cluster::new(&kubectls()[0]);
    for (flags, part) in [
        ("", "--interface"),
        ("--config /nowhere", "/nowhere"),
        ("--interface lo --id 0 --address 192.0.2.1", "0 is not in 1..=255"),
        ("--interface nowhere --id 1 --address 192.0.2.1", "interface nowhere is not there"),
        ("--interface lo --id 1 --address 192.0.2.1 --interval 15ms", "interval is 15ms"),
        ("--interface lo --id 1 --address 192.0.2.1 --check tcp://nowhere:1", "tcp://ADDRESS:PORT"),
        ("--interface lo --id 1 --address 192.0.2.1 --peer 2001:db8::1", "no peer of that family"),
        ("--interface lo --config x", "cannot be used with"),
    ] {
        let seen = cluster.run(&format!("fairlead vip {flags}"), "", 60);
        assert!(!seen.success && seen.output.contains(part), "{flags}: {}", seen.output);
    }
}
