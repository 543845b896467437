//! Somebody edits the proxy's table by hand: it is made right again, and said.

use std::os::fd::AsFd;
use std::time::Duration;

use proxy::Mode;

use crate::case::Objects;
use crate::net::Namespace;
use crate::ring::Proxy;

fn objects(host: u32) -> Objects {
    let lines = [
        "service web 10.96.0.10 80/TCP nodePort=30080".to_owned(),
        format!("endpoint web 10.244.1.{host}:80 node-2"),
        "endpoint web 10.244.1.200:80 node-2".to_owned(),
    ];
    Objects::parse(&lines)
}

fn is_repaired(mode: Mode, edits: &[&str]) {
    let node = Namespace::new();
    for address in objects(1).node.addresses {
        node.ip(&format!("addr add {address} dev lo"));
    }
    let mut proxy = Proxy::start(&node.path, mode, &objects(1), None);
    // Neither the proxy's own commits nor tables of others are edits.
    for host in 2..6 {
        proxy.apply(&objects(host));
    }
    node.command("nft", "add table inet other");
    node.command("nft", "add chain inet other empty");
    let drift = |proxy: &Proxy| {
        let frontends: Vec<_> = proxy.table.read().expect("table").frontends().cloned().collect();
        let file = std::fs::File::open(&node.path).expect("namespace");
        proxy::explain::drift(mode, &frontends, &objects(5).node, Some(file.as_fd()), None).expect("compared")
    };
    let rules = || node.command("nft", "list ruleset inet");
    let right = rules();
    for (number, edit) in edits.iter().enumerate() {
        let commits = proxy.status.borrow().commits;
        assert_eq!(proxy.status.borrow().repairs, number as u64, "before {edit}");
        node.command("nft", edit);
        let repaired = proxy.wait_for(Duration::from_secs(20), move |status| {
            status.repairs > number as u64 && status.commits > commits && status.error.is_none()
        });
        assert!(repaired, "{mode}: nothing was done about {edit}");
        assert_eq!(drift(&proxy), Vec::<String>::new(), "{mode}: after {edit}");
        // Rules too, and the tables of others are left alone but for who flushed them.
        let lines = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
            lines.sort();
            lines
        };
        if !edit.starts_with("flush ruleset") {
            assert_eq!(lines(&rules()), lines(&right), "{mode}: after {edit}");
        }
    }
    // And it goes on.
    proxy.apply(&objects(7));
    proxy.stop();
}

#[test]
fn nftables_is_repaired_and_says_so() {
    is_repaired(
        Mode::Nftables,
        &[
            "delete element inet fairlead frontends4 { 192.168.49.2 . tcp . 30080 }",
            "flush chain inet fairlead prerouting",
            "insert rule inet fairlead guard_prerouting drop",
            "delete table inet fairlead",
            "flush ruleset",
        ],
    );
}

#[test]
fn userspace_is_repaired_and_says_so() {
    is_repaired(
        Mode::Userspace,
        &[
            "flush map inet fairlead-userspace redirect4",
            "flush chain inet fairlead-userspace prerouting",
            "flush ruleset",
        ],
    );
}
