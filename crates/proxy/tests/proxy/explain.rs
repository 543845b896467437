//! Plays `tests/explain.txt`: objects in, what a person is told out; and what is said when somebody edits the kernel.
//!
//! A section `-- MODE FROM -> TO --` holds the report, without the rules that the packet meets. The node is `node-1` in
//! zone `a`, and 10.244.9.9:80 is ejected. FAIRLEAD_EXPLAIN=write writes what is said now into the file, for review.

use std::os::fd::AsFd;

use linux::nft::Packet;
use proxy::explain::Report;
use proxy::{Mode, NodeView};
use serde_json::json;
use services::{Protocol, ServiceTable};

use crate::case::{self, Objects};
use crate::live::Running;
use crate::net::{World, node_view};
use crate::objects::{service, slice};

fn node() -> NodeView {
    let ejected = [("10.244.9.9:80".parse().expect("address"), Protocol::Tcp)];
    NodeView { ejected: ejected.into(), ..case::node() }
}

/// `nftables 10.244.0.7 -> 10.96.0.10:80/UDP`
fn ask(question: &str, table: &ServiceTable) -> Report {
    let words: Vec<&str> = question.split_whitespace().collect();
    let [mode, from, "->", to] = words[..] else { panic!("not a question: {question}") };
    let (to, protocol) = to.split_once('/').unwrap_or((to, "TCP"));
    let packet = Packet {
        from: std::net::SocketAddr::new(from.parse().expect("a source"), 40_000),
        to: to.parse().expect("a destination"),
        protocol: Protocol::parse(protocol).expect("a protocol").number(),
    };
    proxy::explain::report(mode.parse().expect("a mode"), table, &node(), &packet).expect("a report")
}

#[test]
fn people_are_told_why() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/explain.txt");
    let text = std::fs::read_to_string(path).expect("readable");
    let mut said = String::new();
    for case in text.split_inclusive('\n').collect::<Vec<_>>().split(|line| line.trim().is_empty()) {
        let lines: Vec<&str> = case.iter().map(|line| line.trim_end()).collect();
        let sections = lines.iter().filter_map(|line| line.strip_prefix("-- ")?.strip_suffix(" --"));
        let objects: Vec<&str> = lines.iter().skip(2).take_while(|line| !line.starts_with("-- ")).copied().collect();
        let table = Objects::parse(&objects).table();
        if !said.is_empty() {
            said.push('\n');
        }
        said += &format!("{}\n-- objects --\n", lines[0]);
        objects.iter().for_each(|line| said += &format!("{line}\n"));
        for question in sections.filter(|section| *section != "objects") {
            let mut report = ask(question, &table);
            // JSON says the same.
            let json = serde_json::to_string(&report).expect("JSON");
            assert_eq!(serde_json::from_str::<Report>(&json).expect("a report"), report);
            assert!(!report.kernel.rules.is_empty() || report.kernel.fates[0].starts_with("left alone"), "{question}");
            report.kernel.rules.clear();
            said += &format!("-- {question} --\n{report}");
        }
    }
    if std::env::var("FAIRLEAD_EXPLAIN").is_ok_and(|wish| wish == "write") {
        std::fs::write(path, &said).expect("writable");
    }
    let differs = text.lines().zip(said.lines()).find(|(expected, said)| expected != said);
    assert!(text == said, "expected (left), said (right): {differs:?}\n{said}");
}

/// Whatever the kernel has lost or gained is told; a kernel that nobody touched holds the plan, in each mode.
#[test]
fn drift_is_what_somebody_changed_by_hand() {
    let world = World::new();
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let iptables = "iptables-nft";
    for (mode, edit, line) in [
        (
            Mode::Nftables,
            "nft delete element inet fairlead cluster_ips4 { 10.96.0.10 }",
            "missing: cluster_ips4 10.96.0.10",
        ),
        (
            Mode::Userspace,
            "nft add element inet fairlead-userspace refused4 { 10.96.0.99 . tcp . 80 }",
            "unexpected: refused4 10.96.0.99 . tcp . 80",
        ),
        (
            Mode::Iptables,
            "iptables-nft -t nat -F KUBE-SERVICES",
            "IPv4 nat chain KUBE-SERVICES has 0 rules instead of 2",
        ),
    ] {
        if mode == Mode::Iptables {
            world.node.command(iptables, "-t mangle -N KUBE-IPTABLES-HINT");
        }
        let mut running = Running::start(&world, mode);
        {
            let mut table = running.table.write().expect("table");
            table.upsert_service(&service("web", json!({"sessionAffinity": "ClientIP"}))).expect("service");
            table.upsert_slice(&slice("web", 8080, "TCP", &[("10.244.0.11", "node-1")])).expect("slice");
        }
        running.change(|table| table.set_synced());
        // A chain for two, which is left idle.
        let two = [("10.244.0.11", "node-1"), ("10.244.0.12", "node-1")];
        running.change(|table| table.upsert_slice(&slice("web", 8080, "TCP", &two)).expect("slice"));
        running.change(|table| table.upsert_slice(&slice("web", 8080, "TCP", &two[..1])).expect("slice"));
        assert!(crate::net::tcp(&world.pods[1], "10.96.0.10:80").is_ok());
        let frontends: Vec<_> = running.table.read().expect("table").frontends().cloned().collect();
        let drift =
            || proxy::explain::drift(mode, &frontends, &node_view(), Some(namespace.as_fd()), None).expect("compared");
        assert_eq!(drift(), Vec::<String>::new(), "{mode}");
        // A proxy that runs would make it right at once.
        running.stop();
        let (program, arguments) = edit.split_once(' ').expect("a command");
        world.node.command(program, arguments);
        assert_eq!(drift(), [line], "{mode}");
    }
    world.node.command("nft", "flush ruleset");
    let lost =
        proxy::explain::drift(Mode::Nftables, &[], &node_view(), Some(namespace.as_fd()), None).expect("compared");
    assert_eq!(lost, ["missing: the whole table inet fairlead"]);
}
