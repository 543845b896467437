//! From and to the ipvs mode while clients talk: connections that IPVS has made are its own, and go on as long as they last.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use linux::ipvs::{self, Ipvs as _};
use proxy::Mode;
use proxy::dataplane::ipvs::{Retired, retire};
use serde_json::json;
use socket2::SockRef;

use super::{connect, echo, file, serve_lines};
use crate::handover::{Road, roads, walk_under_load};
use crate::live::Running;
use crate::net::{World, tcp};
use crate::objects::{service, slice};

/// IPVS tells answers apart by client, client's port and endpoint alone: a client that has the same port for two addresses of
/// an endpoint loses one of its connections. So each address of a client goes one road.
fn walk(modes: &[Mode]) {
    let world = World::new();
    world.client.ip("addr add 203.0.113.10/32 dev eth0");
    world.client.ip("route add 10.96.0.10 via 192.168.49.2 dev eth0 src 203.0.113.10");
    let is_apart = |road: &Road<'_>| !(std::ptr::eq(road.0, &world.client) && road.1 == "192.168.49.2:30007");
    let roads: Vec<Road<'_>> = roads(&world).into_iter().filter(is_apart).collect();
    walk_under_load(&world, &roads, modes);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn no_connection_is_lost_between_ipvs_and_rules() {
    walk(&[Mode::Ipvs, Mode::Nftables, Mode::Ipvs, Mode::Iptables, Mode::Ipvs]);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn no_connection_is_lost_between_ipvs_and_relays() {
    walk(&[Mode::Ipvs, Mode::Userspace, Mode::Ipvs]);
}

/// What the ipvs mode has left serves the connections that need it, and nobody else, until the last one has ended.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn what_ipvs_leaves_goes_with_its_last_connection() {
    let world = World::new();
    serve_lines(&world.pods[0], "first");
    let mut running = Running::start(&world, Mode::Ipvs);
    let port = json!([{"port": 80, "nodePort": 30007, "protocol": "TCP"}]);
    let web = service("web", json!({"type": "NodePort", "ports": port}));
    running.table.write().expect("table").upsert_service(&web).expect("service");
    running
        .table
        .write()
        .expect("table")
        .upsert_service(&service("idle", json!({"clusterIPs": ["10.96.0.11"]})))
        .expect("service");
    for name in ["web", "idle"] {
        let pods = slice(name, 8081, "TCP", &[("10.244.0.11", "node-1")]);
        running.table.write().expect("table").upsert_slice(&pods).expect("slice");
    }
    running.change(|table| table.set_synced());
    // From outside, and from the node itself, whose socket has the Service's address as its own.
    let mut old = [connect(&world.client, "192.168.49.2:30007"), connect(&world.node, "10.96.0.10:80")];
    let speak = |old: &mut [TcpStream]| {
        for stream in old {
            assert_eq!(echo(stream).expect("it goes on"), "first");
        }
    };
    speak(&mut old);
    running.runtime.block_on(running.switch.to(Mode::Iptables)).expect("handed over");
    speak(&mut old);
    let held = || {
        let file = file(&world.node);
        let mut ipvs = ipvs::Socket::open(Some(file.as_fd())).expect("ipvs");
        let services = ipvs.services().expect("services");
        let weights: Vec<u32> = services
            .iter()
            .flat_map(|service| ipvs.destinations(&service.key).expect("destinations"))
            .map(|(destination, _)| destination.weight)
            .collect();
        let names: BTreeSet<String> = services.iter().map(|service| service.key.address.to_string()).collect();
        (names, weights, ipvs.addresses().expect("addresses"))
    };
    let expected = BTreeSet::from(["10.96.0.10:80".to_owned(), "192.168.49.2:30007".to_owned()]);
    let address = "10.96.0.10".parse().expect("address");
    assert_eq!(held(), (expected, vec![0, 0], Some(BTreeSet::from([address]))), "what is idle has gone");
    // The node has that address, but nobody who listens on all addresses answers there.
    world.node.run(|| {
        let listener = std::net::TcpListener::bind("0.0.0.0:82").expect("bind");
        std::thread::spawn(move || listener.incoming().for_each(drop));
    });
    assert_eq!(tcp(&world.pods[1], "10.96.0.10:82"), Err(std::io::ErrorKind::ConnectionRefused));
    // A connection that the new mode makes for the node has the Service's address as its own, too.
    let mut new = [connect(&world.node, "10.96.0.10:80")];
    speak(&mut new);
    // Another start, which knows nothing of it.
    running.stop();
    speak(&mut old);
    for stream in old {
        // A reset ends it: IPVS remembers one that was closed for two minutes, this one for ten seconds.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
    }
    let tend = |in_use: &BTreeSet<std::net::IpAddr>| {
        let file = file(&world.node);
        let mut ipvs = ipvs::Socket::open(Some(file.as_fd())).expect("ipvs");
        let mut nft = linux::nft::Socket::open(Some(file.as_fd())).expect("socket");
        retire(&mut ipvs, &mut nft, in_use).expect("retired")
    };
    let in_use = {
        let file = file(&world.node);
        linux::sock_diag::Socket::open(Some(file.as_fd())).expect("sockets").own_addresses().expect("addresses")
    };
    assert!(in_use.contains(&address), "{in_use:?}");
    let patience = Instant::now() + Duration::from_secs(60);
    while tend(&in_use) != (Retired::Serving { servers: 0 }) {
        assert!(Instant::now() < patience, "{:?}", held());
        std::thread::sleep(Duration::from_millis(500));
    }
    speak(&mut new);
    assert_eq!(tend(&BTreeSet::new()), Retired::Gone);
    assert_eq!(tend(&BTreeSet::new()), Retired::Nothing);
    let left = world.node.command("ip", "link") + &world.node.command("nft", "list tables");
    assert!(!left.contains("ipvs"), "{left}");
}
