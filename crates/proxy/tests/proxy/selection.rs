//! How the ebpf mode chooses among endpoints: at random, by tables that are the same on every node, or the less loaded of two.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use linux::bpf::{Entries, Fake, Kernel};
use linux::nft::{Fate, Packet};
use proxy::Mode;
use proxy::dataplane::Dataplane;
use proxy::dataplane::ebpf::{Ebpf, LAYOUTS, LOADS, LoadKind, Way, load_key};
use services::Protocol;

use crate::case::Objects;
use crate::cases::fates;
use crate::modes::whole;
use crate::ring::{Place, Proxy, Ring};

const CLIENT: &str = "203.0.113.9";
const PATIENCE: Duration = Duration::from_secs(5);
const FLOWS: u16 = 300;

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn endpoint(host: u8) -> SocketAddr {
    ([10, 244, 0, 20 + host], 80).into()
}

/// A Service with these endpoints, written in this order.
fn service(name: &str, cluster_ip: &str, port: &str, selection: &str, hosts: &[u8]) -> Vec<String> {
    let service = format!("service {name} {cluster_ip} {port} selection={selection}");
    let endpoints = hosts.iter().map(|host| format!("endpoint {name} {} node-1", endpoint(*host)));
    std::iter::once(service).chain(endpoints).collect()
}

/// The mode over a fake that holds these objects.
fn traced(objects: &Objects) -> Ebpf<Fake> {
    let layouts: Vec<_> = LAYOUTS.into_iter().chain([LOADS]).collect();
    let mut ebpf = Ebpf::new(Fake::new(&layouts));
    let base = Ebpf::<Fake>::base(&objects.node);
    ebpf.commit(Some(&base), &whole::<Ebpf<Fake>>(&objects.table(), &objects.node)).expect("commit");
    ebpf
}

/// Who answers a UDP client from each port.
fn answers(objects: &Objects, to: &'static str) -> BTreeMap<u16, SocketAddr> {
    let mut ring = Ring::new(Mode::Ebpf, false);
    ring.serve(objects);
    let client = ring.place(address(CLIENT));
    let proxy = Proxy::start(&ring.node.path, Mode::Ebpf, objects, ring.hooks());
    let answers = client.run(|| {
        let ask = |port: u16| {
            let socket = UdpSocket::bind(("0.0.0.0", port)).expect("bind");
            socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
            socket.connect(to).and_then(|()| socket.send(b"hello")).expect("sent");
            let mut buffer = [0; 128];
            let size = socket.recv(&mut buffer).expect("an answer");
            let text = String::from_utf8_lossy(&buffer[..size]).into_owned();
            (port, text.split(' ').next().expect("an address").parse().expect("an address"))
        };
        (40_000..40_000 + FLOWS).map(ask).collect()
    });
    proxy.stop();
    answers
}

/// The same endpoints in another order are another node's view: its slots differ.
#[test]
fn maglev_is_the_same_on_every_node_and_moves_few_flows() {
    const TO: &str = "10.96.0.10:80";
    let ten: Vec<u8> = (1..=10).collect();
    let other: Vec<u8> = vec![7, 2, 9, 4, 1, 10, 3, 8, 5, 6];
    let of = |hosts: &[u8]| Objects::parse(&service("names", "10.96.0.10", "80/UDP", "maglev", hosts));
    let here = answers(&of(&ten), TO);
    assert_eq!(here, answers(&of(&other), TO), "another node sends some flows elsewhere");
    // What the programs do is what the tracer says.
    let traced = traced(&of(&ten));
    for (port, by) in &here {
        let packet = Packet { from: (address(CLIENT), *port).into(), to: TO.parse().expect("address"), protocol: 17 };
        let fates = fates(|draw| traced.walk(Way::Arrive, &packet, draw, &mut Vec::new()));
        assert_eq!(fates.into_keys().collect::<Vec<_>>(), [Fate::Sent { to: *by, masqueraded: true }]);
    }
    let mut shares: BTreeMap<SocketAddr, u16> = BTreeMap::new();
    here.values().for_each(|by| *shares.entry(*by).or_default() += 1);
    // 30 each; further than five deviations from it is no accident, and the ports are always the same.
    assert!(shares.len() == 10 && shares.values().all(|share| (8..=56).contains(share)), "{shares:?}");
    let without = answers(&of(&ten[..9]), TO);
    let moved = here.iter().filter(|(port, by)| **by != endpoint(10) && without[*port] != **by).count();
    println!("{moved} of {FLOWS} flows moved although their endpoint stays");
    assert!(moved <= usize::from(FLOWS / 20), "{moved} of {FLOWS} flows moved although their endpoint stays");
}

/// Takes any number of connections, and says once to each who it is.
fn greet(ring: &mut Ring, at: SocketAddr) {
    let listener = ring.host(at.ip()).run(move || TcpListener::bind(at).expect("bind"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                drop(stream.write_all(format!("{at}\n").as_bytes()));
                drop(stream.read(&mut [0]));
            });
        }
    });
}

/// A connection, and who took it.
fn open(from: &Place, to: &'static str) -> (TcpStream, SocketAddr) {
    from.run(|| {
        let stream = TcpStream::connect_timeout(&to.parse().expect("address"), PATIENCE).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut text = String::new();
        BufReader::new(&stream).read_line(&mut text).expect("a greeting");
        (stream, text.trim().parse().expect("an address"))
    })
}

/// Three endpoints, the first of them busy through another Service.
fn avoids_the_busy_one(from: &str) {
    let busy = endpoint(1);
    let mut lines = service("one", "10.96.0.10", "80/TCP", "least-load", &[1]);
    lines.extend(service("all", "10.96.0.11", "80/TCP", "least-load", &[1, 2, 3]));
    let objects = Objects::parse(&lines);
    let mut ring = Ring::new(Mode::Ebpf, false);
    (1..=3).for_each(|host| greet(&mut ring, endpoint(host)));
    let client = ring.place(address(from));
    let proxy = Proxy::start(&ring.node.path, Mode::Ebpf, &objects, ring.hooks());
    let held: Vec<_> = (0..20).map(|_| open(&client, "10.96.0.10:80")).collect();
    assert!(held.iter().all(|(_, by)| *by == busy));
    let spread: Vec<_> = (0..24).map(|_| open(&client, "10.96.0.11:80")).collect();
    let count = |host: u8| spread.iter().filter(|(_, by)| *by == endpoint(host)).count();
    assert_eq!(count(1), 0, "from {from}: the busy endpoint was chosen");
    // Each time the less loaded of the two is certain if both are drawn, and likely otherwise.
    assert!(count(2) >= 6 && count(3) >= 6, "from {from}: {} and {}", count(2), count(3));
    drop(held);
    // Now it is the idlest, once the kernel has heard of all the ends.
    let begun = Instant::now();
    let mut again = Vec::new();
    while again.iter().filter(|(_, by)| *by == busy).count() < 5 {
        assert!(begun.elapsed() < PATIENCE, "from {from}: the endpoint still counts as busy");
        again.push(open(&client, "10.96.0.11:80"));
    }
    proxy.stop();
}

#[test]
fn least_load_avoids_the_busy_one_when_sockets_connect() {
    avoids_the_busy_one("10.244.0.7");
}

#[test]
fn least_load_avoids_the_busy_one_for_packets_from_outside() {
    avoids_the_busy_one(CLIENT);
}

#[test]
fn sockets_reach_all_endpoints_of_a_table() {
    let hosts: Vec<u8> = (1..=5).collect();
    let objects = Objects::parse(&service("web", "10.96.0.10", "80/TCP", "maglev", &hosts));
    let mut ring = Ring::new(Mode::Ebpf, false);
    hosts.iter().for_each(|host| greet(&mut ring, endpoint(*host)));
    let client = ring.place(address("10.244.0.7"));
    let proxy = Proxy::start(&ring.node.path, Mode::Ebpf, &objects, ring.hooks());
    // One of five is missed by a hundred tries less than once in a thousand million runs.
    let answered: BTreeSet<SocketAddr> = (0..100).map(|_| open(&client, "10.96.0.10:80").1).collect();
    assert_eq!(answered, hosts.iter().map(|host| endpoint(*host)).collect());
    proxy.stop();
}

#[test]
fn the_tracer_knows_loads() {
    let objects = Objects::parse(&service("web", "10.96.0.10", "80/TCP", "least-load", &[1, 2, 3]));
    let mut ebpf = traced(&objects);
    let from: SocketAddr = (address(CLIENT), 40_000).into();
    let packet = Packet { from, to: "10.96.0.10:80".parse().expect("address"), protocol: 6 };
    let found = |ebpf: &Ebpf<Fake>, way| {
        let fates = fates(|draw| ebpf.walk(way, &packet, draw, &mut Vec::new()));
        let share = |host| {
            let to_host = |fate: &&Fate| matches!(fate, Fate::Sent { to, .. } if *to == endpoint(host));
            fates.iter().filter(|(fate, _)| to_host(fate)).map(|(_, weight)| *weight).sum::<u64>()
        };
        [share(1), share(2), share(3)]
    };
    for way in [Way::Arrive, Way::Connect { node: false }] {
        assert!(found(&ebpf, way).iter().all(|share| share.abs_diff(333_333) <= 2));
    }
    let loads = [(1, LoadKind::Sockets, 5_i64), (1, LoadKind::Flows, 3), (2, LoadKind::Flows, 7)];
    for (host, kind, load) in loads {
        let entry =
            Entries { keys: load_key(endpoint(host), Protocol::Tcp, kind), values: load.to_ne_bytes().to_vec() };
        ebpf.kernel().put(LOADS.name, &entry).expect("a fake");
    }
    // The first loses against both, the second against the third, which has none.
    for way in [Way::Arrive, Way::Connect { node: true }] {
        let [first, second, third] = found(&ebpf, way);
        assert!(first == 0 && second.abs_diff(333_333) <= 2 && third.abs_diff(666_667) <= 2);
    }
}

/// An endpoint that goes leaves the places of the others alone, and in their entries with it.
#[test]
fn a_changed_endpoint_rewrites_what_it_had() {
    let ten: Vec<u8> = (1..=10).collect();
    let of = |hosts: &[u8]| {
        let lines = service("web", "10.96.0.10", "80/TCP", "maglev", hosts);
        traced(&Objects::parse(&lines)).lines().expect("a fake can be read")
    };
    let (before, after) = (of(&ten), of(&ten[..9]));
    let places = |lines: &BTreeSet<String>| lines.iter().filter(|line| line.starts_with("maglev ")).count();
    assert_eq!((places(&before), places(&after)), (64, 64), "1,021 places, 16 in an entry");
    let slots = |lines: &BTreeSet<String>| -> Vec<String> {
        let lists = lines.iter().filter_map(|line| line.strip_prefix("maglev ")?.split_once('['));
        lists
            .flat_map(|(_, list)| list.trim_end_matches("] }").split(", ").map(str::to_owned).collect::<Vec<_>>())
            .collect()
    };
    let changed = slots(&before).iter().zip(slots(&after)).filter(|(before, after)| **before != *after).count();
    println!("{changed} of 1,021 places changed");
    assert!((90..=160).contains(&changed), "{changed} of 1,021 places changed");
}

#[test]
fn a_mode_without_a_choice_says_so() {
    let of = |selection: &str| Objects::parse(&service("web", "10.96.0.10", "80/TCP", selection, &[1]));
    let ring = Ring::new(Mode::Nftables, false);
    let mut proxy = Proxy::start(&ring.node.path, Mode::Nftables, &of("random"), None);
    assert!(proxy.status.borrow().unsupported.is_empty());
    proxy.apply(&of("least-load"));
    let told = |status: &proxy::Status| {
        status
            .unsupported
            .values()
            .any(|what| what.to_string().contains("fairlead.io/endpoint-selection has no effect"))
    };
    assert!(proxy.wait_for(PATIENCE, told), "{:?}", proxy.status.borrow().unsupported);
    proxy.apply(&of("random"));
    assert!(proxy.wait_for(PATIENCE, |status| status.unsupported.is_empty()));
    proxy.stop();
}
