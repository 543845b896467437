//! Four nodes of which two are cut off: neither half is a majority, and the half that holds the Lease at the API server gets
//! the address. What nodes say is watched on each port of their switch.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lab::Lab;
use linux::link::{Bridge, Item, Links, Mac, Port};
use linux::netns::Netns;
use linux::packet::{PacketSocket, Protocol, Tap};

use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};

const NODES: u8 = 4;
/// Of the nodes that are cut off from the others and from the API server.
const APART: &str = "br-apart";

const SECOND: Duration = Duration::from_secs(1);

/// Who said when that it has the address: ports of the switch, in order of time.
type Said = Vec<(Duration, String)>;

/// Asks both halves all the time who has the address, and notes which port an answer came in at.
fn watch(switch: &Netns, address: Ipv4Addr, said: &Mutex<Said>, stop: &AtomicBool) {
    let listen = || {
        let links = Links::current().expect("links").links().expect("listed");
        let ports: BTreeMap<u32, String> = links.iter().map(|link| (link.index, link.name.clone())).collect();
        let tap = Tap::open().expect("a tap");
        let bridges = links.iter().filter(|link| link.kind == "bridge");
        let ask = bridges.map(|bridge| {
            let mac = bridge.mac.expect("a bridge has an address").0;
            let socket = PacketSocket::open(bridge.index, Protocol::Arp, 0).expect("a packet socket");
            // Asked as by a host that wants to know whether the address is taken (RFC 5227).
            let parts: [&[u8]; 5] = [&[0, 1, 8, 0, 6, 4, 0, 1], &mac, &[0; 4], &[0; 6], &address.octets()];
            (socket, parts.concat())
        });
        let ask: Vec<(PacketSocket, Vec<u8>)> = ask.collect();
        let mut buffer = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            for (socket, packet) in &ask {
                socket.send(packet, Mac([0xff; 6])).expect("the bridges are up");
            }
            while let Some(seen) = tap.receive(&mut buffer).expect("received") {
                let frame = &buffer[..seen.length];
                // The sender's protocol address of ARP (RFC 826), and not what the bridge hands on.
                let is_claim = frame.get(12..14) == Some(&[8, 6]) && frame.get(28..32) == Some(&address.octets());
                if let Some(port) = ports.get(&seen.index).filter(|port| is_claim && port.starts_with('n')) {
                    said.lock().expect("held briefly").push((seen.at, port.clone()));
                }
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    };
    switch.run(listen).expect("the switch can be entered");
}

#[test]
fn an_even_split_is_decided_by_the_lease_at_the_api_server() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    expect(cluster, "kubectl create service loadbalancer web --tcp=80");
    let status = "kubectl get service web -o jsonpath='{.status.loadBalancer.ingress[0].ip}'";
    until("it has an address", || expect(cluster, status).trim().parse::<IpAddr>().is_ok());
    let address: Ipv4Addr = expect(cluster, status).trim().parse().expect("an IPv4 address");
    let events = "kubectl get events --field-selector reason=nodeAssigned,involvedObject.name=web -o name";
    until("a node announces it", || !expect(cluster, events).trim().is_empty());

    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = Lab::open(&id).expect("the cluster is a lab");
    let switch = Links::open(&lab.switch().expect("the switch")).expect("its links");
    let home = switch.links().expect("listed").into_iter().find(|link| link.kind == "bridge").expect("a switch").name;
    let apart = Bridge { name: APART.into(), mac: Some(Mac([2, 0, 0, 0, 0, 9])), mtu: None };
    switch.ensure_all(&[Item::Bridge(apart), Item::Up(APART.into())]).expect("a second switch");
    let plug = |port: &str, bridge: &str| {
        let port = Port { link: port.to_owned(), bridge: bridge.to_owned(), hairpin: false };
        switch.ensure_all(&[Item::Port(port)]).expect("a cable");
    };
    let (said, stop) = (Arc::<Mutex<Said>>::default(), Arc::new(AtomicBool::new(false)));
    let watcher = {
        let (switch, said, stop) = (lab.switch().expect("the switch"), said.clone(), stop.clone());
        std::thread::spawn(move || watch(&switch, address, &said, &stop))
    };
    // Whoever alone has spoken for a second; all nodes are there, so that it stays.
    expect(cluster, "kubectl wait --for=condition=Ready node --all --timeout=60s");
    let begun = Tap::now();
    let owner = || {
        let (said, now) = (said.lock().expect("held briefly"), Tap::now());
        let late: BTreeSet<&String> = said.iter().filter(|(at, _)| *at + SECOND > now).map(|(_, by)| by).collect();
        late.first().filter(|_| late.len() == 1 && now > begun + SECOND * 2).map(|by| (*by).clone())
    };
    until("one owner that stays", || owner().is_some());
    let owner = owner().expect("it was there");
    // It is one of the two that are cut off; the API server is with the others.
    let port = |index: u32| format!("n{index}-{id}");
    let lease =
        || expect(cluster, "kubectl -n kube-system get lease fairlead-layer2 -o jsonpath='{.spec.holderIdentity}'");
    until("somebody holds the Lease", || !lease().trim().is_empty());
    // So is the holder of the Lease, who hears nothing more of it.
    let holder = port(lab.node(lease().trim()).expect("a node").index);
    let partner = std::iter::once(holder).chain((1..=u32::from(NODES)).map(port)).find(|port| *port != owner);
    let partner = partner.expect("another node");
    let cut = [owner, partner];
    cut.iter().for_each(|port| plug(port, APART));
    let parted = Tap::now();
    until("the half with the Lease announces it", || {
        let said = said.lock().expect("held briefly");
        said.iter().any(|(at, by)| *at > parted && !cut.contains(by))
    });
    let left = lab.nodes().iter().filter(|node| !cut.contains(&port(node.index)));
    let heirs: Vec<String> = left.map(|node| node.name.clone()).collect();
    let holder = lease();
    assert!(heirs.iter().any(|name| holder.trim() == name), "{holder} holds the Lease, {heirs:?} reach the API server");
    let healed = Tap::now();
    cut.iter().for_each(|port| plug(port, &home));
    expect(cluster, "kubectl wait --for=condition=Ready node --all --timeout=60s");
    stop.store(true, Ordering::Relaxed);
    watcher.join().expect("it watched all the time");
    let mut said = std::mem::take(&mut *said.lock().expect("held briefly"));
    said.sort();

    // The half that is cut off may keep the address for as long as it holds the Lease; then it is silent before the other speaks.
    let (theirs, ours): (Said, Said) =
        said.into_iter().filter(|(at, _)| *at < healed).partition(|(_, by)| cut.contains(by));
    let ours: Said = ours.into_iter().filter(|(at, _)| *at > parted).collect();
    let (first, heir) = ours.first().expect("the other half spoke");
    assert!(ours.iter().all(|(_, by)| by == heir), "one owner in the half with the Lease: {ours:?}");
    let last = theirs.last().expect("the old owner spoke").0;
    assert!(last < *first, "two owners: the old one spoke {:?} after the new one did", last - *first);
    let gone = *first - parted;
    println!("{address} moved from {} to {heir} {gone:?} after the cut; {} claims", cut[0], theirs.len() + ours.len());
}
