//! What kube-proxy lets a user choose about a node, with real packets: how pods are told from the outside, where node ports
//! answer, which bit of the mark is used, and that all of it can be cleaned away.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use linux::iptables::{self, Tools};
use linux::netns::Netns;
use linux::nft::{self, Fate, Packet, Socket};
use proxy::configuration::Conntrack;
use proxy::dataplane::Dataplane;
use proxy::dataplane::iptables::Iptables;
use proxy::dataplane::nftables::Nftables;
use proxy::{NodeView, Pods};
use serde_json::json;
use services::ServiceTable;

use crate::modes::whole;
use crate::net::{Namespace, World, node_view, tcp};
use crate::objects::{service, slice};

const POD: &str = "10.244.0.12";
const CLIENT: &str = "203.0.113.9";
const NODE: &str = "192.168.49.2";
const NODE_PORT: u16 = 30007;

/// One Service with one endpoint on this node, and one with policy Local whose endpoint is elsewhere.
fn table() -> ServiceTable {
    let mut table = ServiceTable::new();
    let ports = |node_port: u16| json!([{"port": 80, "nodePort": node_port}]);
    let web = service("web", json!({"type": "NodePort", "ports": ports(NODE_PORT)}));
    table.upsert_service(&web).expect("a Service");
    table.upsert_slice(&slice("web", 8080, "TCP", &[("10.244.0.11", "node-1")])).expect("a slice");
    table.set_synced();
    table
}

fn commit<D: Dataplane>(dataplane: &mut D, node: &NodeView) {
    dataplane.read().expect("read");
    dataplane.commit(Some(&D::base(node)), &whole::<D>(&table(), node)).expect("commit");
}

/// Runs with each mode's real kernel, each in a world of its own.
fn in_each_mode(views: &[NodeView], check: impl Fn(&World, usize, &str)) {
    let world = World::new();
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let mut nftables = Nftables::new(Socket::open(Some(namespace.as_fd())).expect("socket"));
    for (index, view) in views.iter().enumerate() {
        commit(&mut nftables, view);
        check(&world, index, "nftables");
    }
    proxy::cleanup(None, Some(namespace.as_fd())).expect("cleaned");
    assert_eq!(world.node.command("nft", "list ruleset"), "");
    assert!(tcp(&world.pods[1], "10.96.0.10:80").is_err());

    world.node.command("iptables-nft", "-t mangle -N KUBE-IPTABLES-HINT");
    let held = std::fs::File::open(&world.node.path).expect("namespace");
    let mut iptables = Iptables::new(Tools::open(Some(held.into())).expect("tools"));
    for (index, view) in views.iter().enumerate() {
        commit(&mut iptables, view);
        check(&world, index, "iptables");
    }
    proxy::cleanup(None, Some(namespace.as_fd())).expect("cleaned");
    let left = world.node.command("iptables-nft-save", "");
    assert!(!left.contains("KUBE-S") && left.contains("KUBE-IPTABLES-HINT"), "{left}");
}

fn told_by(pods: Pods) -> NodeView {
    NodeView { pods, ..node_view() }
}

#[test]
fn pods_are_told_from_the_outside_as_configured() {
    let views = [
        told_by(Pods::Cidrs(vec!["10.244.0.0/16".parse().expect("net")])),
        told_by(Pods::InterfacePrefix("pod".into())),
        told_by(Pods::Bridge("pod1".into())),
        // Nobody can tell: then nothing is outside.
        told_by(Pods::Cidrs(Vec::new())),
        told_by(Pods::Bridge("cbr0".into())),
    ];
    let expected = [(false, true), (false, true), (false, true), (false, false), (true, true)];
    in_each_mode(&views, |world, index, mode| {
        let seen = |from, own: &str| {
            let (_, seen) = tcp(from, "10.96.0.10:80").expect("answer");
            seen != own.parse::<IpAddr>().expect("address")
        };
        let masqueraded = (seen(&world.pods[1], POD), seen(&world.client, CLIENT));
        assert_eq!(masqueraded, expected[index], "{mode}: {}", views[index].pods);
    });
}

#[test]
fn node_ports_answer_where_they_should() {
    let at = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|address| address.parse().expect("address")).collect();
        NodeView { node_port_addresses: Some(addresses), ..node_view() }
    };
    let views = [
        node_view(),
        at(&[NODE, "10.244.0.1"]),
        at(&["10.244.0.1"]),
        at(&[]),
        at(&[NODE, "127.0.0.1"]),
        NodeView { localhost_node_ports: false, masquerade_bit: 9, ..node_view() },
    ];
    // At the primary address, at the one that pods see, at localhost.
    let nftables = [
        [true, false, false],
        [true, true, false],
        [false, true, false],
        [false; 3],
        [true, false, false],
        [true, false, false],
    ];
    let iptables =
        [[true; 3], [true, true, false], [false, true, false], [false; 3], [true, false, true], [true, true, false]];
    in_each_mode(&views, |world, index, mode| {
        let answers = |from, address: &str| tcp(from, &format!("{address}:{NODE_PORT}")).is_ok();
        let found =
            [answers(&world.client, NODE), answers(&world.pods[1], "10.244.0.1"), answers(&world.node, "127.0.0.1")];
        let expected = if mode == "nftables" { nftables[index] } else { iptables[index] };
        assert_eq!(found, expected, "{mode}, view {index}");
    });
}

/// A replacement with a name of its own takes the Services that name it, and leaves those of the node's usual proxy alone.
#[test]
fn a_named_proxy_serves_those_that_name_it() {
    let labels = json!({"service.kubernetes.io/service-proxy-name": "mine"});
    let mut named: serde_json::Value = serde_json::from_slice(&service("web", json!({}))).expect("json");
    named["metadata"]["labels"] = labels;
    let usual = service("else", json!({"clusterIPs": ["10.96.0.11"]}));
    let served = |mut table: ServiceTable| {
        table.upsert_service(named.to_string().as_bytes()).expect("a Service");
        table.upsert_service(&usual).expect("a Service");
        table.frontends().map(|frontend| frontend.name.service.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(served(ServiceTable::new()), ["else"]);
    assert_eq!(served(ServiceTable::new().for_proxy("mine")), ["web"]);
    assert!(served(ServiceTable::new().for_proxy("other")).is_empty());
}

/// Settings of connection tracking are written where they are configured and differ, and nowhere else.
#[test]
fn connection_tracking_is_set_as_configured() {
    let namespace = Namespace::new();
    let held = Netns::open(Path::new(&namespace.path)).expect("a namespace");
    let read = |name: &str| held.read_sysctl(&format!("net/netfilter/nf_conntrack_{name}")).expect("readable");
    let before = read("udp_timeout");
    let wanted = Conntrack {
        tcp_established: Some(Duration::from_secs(3600)),
        tcp_close_wait: Some(Duration::from_secs(1800)),
        tcp_be_liberal: true,
        udp_stream: Some(Duration::from_secs(77)),
        ..Conntrack::default()
    };
    let sysctls = wanted.sysctls(1);
    let sysctls: Vec<(&str, &str)> = sysctls.iter().map(|(name, value)| (*name, value.as_str())).collect();
    held.sysctls(&sysctls).expect("written");
    let names = ["tcp_timeout_established", "tcp_timeout_close_wait", "tcp_be_liberal", "udp_timeout_stream"];
    assert_eq!(names.map(read), ["3600", "1800", "1", "77"].map(|value| Some(value.to_owned())));
    assert_eq!(read("udp_timeout"), before);
    let error = held.sysctls(&[("net/netfilter/nf_conntrack_nothing", "1")]).expect_err("no such setting");
    assert!(error.to_string().contains("nf_conntrack_nothing=1"), "{error}");
}

/// The tracer knows interfaces too, so that plans can be judged without a kernel.
#[test]
fn the_tracer_tells_pods_by_their_interface() {
    let node = told_by(Pods::InterfacePrefix("veth".into()));
    let fates = |source: &str| {
        let packet = Packet {
            from: format!("{source}:40000").parse().expect("source"),
            to: "10.96.0.10:80".parse().expect("destination"),
            protocol: 6,
        };
        let mut nft = Nftables::new(nft::Fake::default());
        nft.nft().comes_through("10.244.0.0/24".parse().expect("net"), "veth7");
        commit(&mut nft, &node);
        let mut iptables = Iptables::new(iptables::Fake::default());
        iptables.kernel().comes_through("10.244.0.0/24".parse().expect("net"), "veth7");
        commit(&mut iptables, &node);
        [
            nft.nft().trace(packet.clone(), &node.addresses, &mut |_| 0),
            iptables.kernel().trace(packet, &node.addresses, &mut |_| 0),
        ]
    };
    let sent = |masqueraded| Fate::Sent { to: "10.244.0.11:8080".parse().expect("endpoint"), masqueraded };
    assert_eq!(fates(POD), [sent(false), sent(false)]);
    // A pod of another node is outside, where interfaces tell.
    assert_eq!(fates("10.244.1.9"), [sent(true), sent(true)]);
    assert_eq!(fates(NODE), [sent(true), sent(true)]);
}
