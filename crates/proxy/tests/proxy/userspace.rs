//! The userspace mode with real packets: what it does beyond the other modes, and where it differs.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use linux::nft::{self, ElementData, Nft};
use proxy::Mode;
use proxy::dataplane::userspace::{Base, FAMILY, TABLE};
use serde_json::json;
use services::ServiceTable;

use crate::live::Running;
use crate::net::{Namespace, World, node_view, tcp, tcp_within, udp};
use crate::objects::{service, slice};

const HERE: [(&str, &str); 2] = [("10.244.0.11", "node-1"), ("10.244.0.12", "node-1")];
const HERE6: [(&str, &str); 2] = [("fd00:10:244::11", "node-1"), ("fd00:10:244::12", "node-1")];
const REFUSED: std::io::ErrorKind = std::io::ErrorKind::ConnectionRefused;

fn node_port(port: u16, protocol: &str) -> serde_json::Value {
    json!([{"port": 80, "nodePort": port, "protocol": protocol}])
}

fn started(world: &World, objects: &[Vec<u8>], slices: &[Vec<u8>]) -> Running {
    let mut running = Running::start(world, Mode::Userspace);
    {
        let mut table = running.table.write().expect("table");
        for object in objects {
            table.upsert_service(object).expect("service");
        }
        for slice in slices {
            table.upsert_slice(slice).expect("slice");
        }
    }
    running.change(|table| table.set_synced());
    running
}

/// What every mode does, but for whom an endpoint sees: the node, always.
#[test]
fn userspace_carries_real_packets() {
    let world = World::new();
    let mut closed: serde_json::Value = serde_json::from_slice(&service(
        "closed",
        json!({"clusterIPs": ["10.96.0.16"], "type": "LoadBalancer", "ports": node_port(30016, "TCP"),
            "loadBalancerSourceRanges": ["203.0.113.0/24", "203.0.113.0/25", "192.0.2.0/24"]}),
    ))
    .expect("json");
    closed["status"] = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}});
    let objects = [
        service("web", json!({"type": "NodePort", "ports": node_port(30007, "TCP")})),
        service("empty", json!({"clusterIPs": ["10.96.0.11"], "type": "NodePort", "ports": node_port(30011, "TCP")})),
        service("names", json!({"clusterIPs": ["10.96.0.12"], "type": "NodePort", "ports": node_port(30012, "UDP")})),
        service("away", json!({"clusterIPs": ["10.96.0.13"], "internalTrafficPolicy": "Local"})),
        service(
            "far",
            json!({"clusterIPs": ["10.96.0.14"], "type": "NodePort", "ports": node_port(30014, "TCP"),
                "externalTrafficPolicy": "Local"}),
        ),
        service("sticky", json!({"clusterIPs": ["10.96.0.15"], "sessionAffinity": "ClientIP"})),
        service("six", json!({"clusterIPs": ["fd00:10:96::17"], "type": "NodePort", "ports": node_port(30017, "TCP")})),
        service("none6", json!({"clusterIPs": ["fd00:10:96::19"]})),
        service("names6", json!({"clusterIPs": ["fd00:10:96::20"], "ports": [{"port": 80, "protocol": "UDP"}]})),
        service("s", json!({"clusterIPs": ["10.96.0.21"], "ports": [{"port": 80, "protocol": "SCTP"}]})),
        closed.to_string().into_bytes(),
    ];
    let elsewhere = [("10.244.0.11", "node-2")];
    let slices = [
        slice("web", 8080, "TCP", &HERE),
        slice("names", 8080, "UDP", &HERE),
        slice("sticky", 8080, "TCP", &HERE),
        slice("closed", 8080, "TCP", &HERE),
        slice("away", 8080, "TCP", &elsewhere),
        slice("far", 8080, "TCP", &elsewhere),
        slice("six", 8080, "TCP", &HERE6),
        slice("names6", 8080, "UDP", &HERE6),
        slice("s", 8080, "SCTP", &HERE),
    ];
    let running = started(&world, &objects, &slices);
    let text = world.node.command("nft", "list table inet fairlead-userspace");
    assert!(!text.contains("BUG") && text.contains("map redirect4"), "nft cannot print the table:\n{text}");
    let node: [IpAddr; 2] = ["192.168.49.2", "fd00:c0a8:31::2"].map(|text| text.parse().expect("address"));
    for (from, to) in [
        (&world.client, "192.168.49.2:30007"),
        (&world.client, "10.96.0.10:80"),
        (&world.node, "10.96.0.10:80"),
        (&world.node, "192.168.49.2:30007"),
        (&world.node, "127.0.0.1:30007"),
        (&world.pods[0], "10.96.0.10:80"),
        (&world.pods[1], "192.168.49.2:30007"),
        (&world.client, "[fd00:c0a8:31::2]:30017"),
        (&world.client, "[fd00:10:96::17]:80"),
        (&world.node, "[fd00:10:96::17]:80"),
        (&world.node, "[::1]:30017"),
        (&world.pods[0], "[fd00:10:96::17]:80"),
        (&world.client, "198.51.100.7:80"),
    ] {
        let mut answers = [0; 2];
        for _ in 0..10 {
            let (pod, seen) = tcp(from, to).unwrap_or_else(|error| panic!("{to}: {error}"));
            answers[pod] += 1;
            let pods_gateway = seen.to_string().starts_with("10.244.0.1") || seen.to_string() == "fd00:10:244::1";
            assert!(node.contains(&seen) || pods_gateway, "{to}: a pod saw {seen}");
        }
        assert_eq!(answers, [5, 5], "{to} was not balanced in turn");
    }
    // UDP: a client is a session, so each new one has the next turn.
    for (from, to) in [
        (&world.client, "192.168.49.2:30012"),
        (&world.pods[0], "10.96.0.12:80"),
        (&world.pods[0], "[fd00:10:96::20]:80"),
    ] {
        let answers = [0, 0].map(|port| udp(from, to, port).unwrap_or_else(|error| panic!("{to}: {error}")).0);
        assert_eq!(answers[0] + answers[1], 1, "{to}");
    }
    // Nobody there: refused at once. Somebody, but not here: silence for outside clients, an answer for the cluster's own.
    for from in [&world.client, &world.node, &world.pods[0]] {
        for to in ["10.96.0.11:80", "192.168.49.2:30011"] {
            assert_eq!(tcp_within(from, to, 3_000), Err(REFUSED), "{to} from {}", from.path);
        }
        assert_eq!(tcp(from, "10.96.0.13:80"), Err(std::io::ErrorKind::TimedOut));
    }
    assert_eq!(tcp_within(&world.pods[0], "[fd00:10:96::19]:80", 3_000), Err(REFUSED));
    assert_eq!(tcp(&world.client, "192.168.49.2:30014"), Err(std::io::ErrorKind::TimedOut));
    assert!(tcp(&world.node, "192.168.49.2:30014").is_ok() && tcp(&world.pods[1], "192.168.49.2:30014").is_ok());
    assert_eq!(tcp_within(&world.pods[0], "10.96.0.10:81", 3_000), Err(REFUSED));
    assert_eq!(tcp(&world.pods[0], "10.96.7.7:80"), Err(std::io::ErrorKind::TimedOut));
    // Only some may use the load balancer's address; the node port is for all.
    assert_eq!(tcp(&world.pods[0], "198.51.100.7:80"), Err(std::io::ErrorKind::TimedOut));
    assert!(tcp(&world.pods[0], "192.168.49.2:30016").is_ok());
    // A relay's own port is no way around that.
    let relays = relays(&world);
    assert!(relays.len() >= 8, "{relays:?}");
    for relay in relays {
        assert_eq!(tcp_within(&world.client, &relay.to_string(), 3_000), Err(REFUSED), "{relay}");
    }
    // A client stays where it was.
    let (first, _) = tcp(&world.pods[0], "10.96.0.15:80").expect("answer");
    for _ in 0..6 {
        assert_eq!(tcp(&world.pods[0], "10.96.0.15:80").expect("answer").0, first);
    }
    running.stop();
}

/// Where the kernel sends clients.
fn relays(world: &World) -> std::collections::BTreeSet<SocketAddr> {
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let mut socket = nft::Socket::open(Some(namespace.as_fd())).expect("socket");
    let mut found = std::collections::BTreeSet::new();
    for set in Base::new(&node_view()).frame.sets.iter().filter(|set| set.name.starts_with("redirect")) {
        for element in socket.elements(FAMILY, TABLE, set).expect("elements") {
            let ElementData::Value(value) = element.data else { panic!("no relay") };
            let [address, nft::Datum::Port(port)] = value.0[..] else { panic!("no relay: {value}") };
            found.insert(format!("{address} {port}").replace(' ', "/"));
        }
    }
    found
        .into_iter()
        .map(|text: String| {
            let (address, port) = text.rsplit_once('/').expect("address/port");
            SocketAddr::new(address.parse().expect("address"), port.parse().expect("port"))
        })
        .collect()
}

/// A server that reads to the end before it answers, with what it read.
fn echo(pod: &Namespace, port: u16) {
    let listener = pod.run(move || TcpListener::bind(("::", port)).expect("bind"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                if stream.read_to_end(&mut bytes).is_ok() {
                    drop(stream.write_all(&bytes));
                }
            });
        }
    });
}

fn connect(from: &Namespace, to: &str) -> TcpStream {
    try_connect(from, to).expect("connect")
}

fn try_connect(from: &Namespace, to: &str) -> std::io::Result<TcpStream> {
    let to: SocketAddr = to.parse().expect("address");
    from.run(move || {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    })
}

/// More bytes than any buffer holds go there, the end of the stream follows, all come back.
#[test]
fn a_stream_is_carried_whole_and_ends_one_way_at_a_time() {
    let world = World::new();
    echo(&world.pods[0], 9090);
    let running = started(&world, &[service("web", json!({}))], &[slice("web", 9090, "TCP", &HERE[..1])]);
    let mut stream = connect(&world.pods[1], "10.96.0.10:80");
    let bytes: Vec<u8> = (0..12_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    stream.write_all(&bytes).expect("written");
    stream.shutdown(Shutdown::Write).expect("ended");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("read");
    assert!(back == bytes, "{} of {} bytes came back", back.len(), bytes.len());
    running.stop();
}

/// Who refuses is left at once, who is silent after a short time; where nobody is left, the client is reset.
#[test]
fn the_next_endpoint_is_tried() {
    let world = World::new();
    let web = service("web", json!({}));
    // The first has nobody on its port, the second is a black hole, the third answers.
    world.node.ip("route add blackhole 10.244.9.9/32");
    world.node.ip("neigh add 203.0.113.77 lladdr 02:00:00:00:00:77 dev up0");
    world.node.ip("route add 203.0.113.77 dev up0");
    let table = |port: u16, endpoints: &[(&str, &str)]| slice("web", port, "TCP", endpoints);
    let mut running = started(&world, &[web], &[table(8080, &[("203.0.113.77", "node-2"), HERE[0]])]);
    for _ in 0..4 {
        let start = Instant::now();
        assert_eq!(tcp_within(&world.pods[1], "10.96.0.10:80", 1_000).expect("answer").0, 0);
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
    // The two have different ports: one Service, two slices.
    running.change(|held| {
        let mut other: serde_json::Value = serde_json::from_slice(&table(7, &[HERE[1]])).expect("json");
        other["metadata"]["name"] = json!("web-2");
        let mut changes = held.upsert_slice(&table(8080, &[HERE[0]])).expect("slice");
        let more = held.upsert_slice(other.to_string().as_bytes()).expect("slice");
        changes.frontends.extend(more.frontends);
        changes
    });
    for _ in 0..4 {
        let start = Instant::now();
        assert_eq!(tcp_within(&world.pods[1], "10.96.0.10:80", 1_000).expect("answer").0, 0);
        assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
    }
    running.change(|held| held.delete_slice("default", "web-1"));
    // The reset may be there before `connect` has returned.
    let error =
        try_connect(&world.pods[1], "10.96.0.10:80").and_then(|mut stream| stream.read(&mut [0])).expect_err("reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    running.stop();
}

/// Who did not answer is out for a while, so that the next client does not wait for it; when it answers, it is back.
#[test]
fn a_silent_endpoint_leaves_the_pick() {
    let world = World::new();
    let silent = "10.244.0.99";
    world.node.ip(&format!("neigh add {silent} lladdr 02:00:00:00:00:99 dev pod1"));
    world.node.ip(&format!("route add {silent} dev pod1"));
    let endpoints = [HERE[0], (silent, "node-1")];
    let running = started(&world, &[service("web", json!({}))], &[slice("web", 8080, "TCP", &endpoints)]);
    for _ in 0..2 {
        assert_eq!(tcp_within(&world.pods[1], "10.96.0.10:80", 1_000).expect("answer").0, 0);
    }
    let mut status = running.status.clone();
    let wait = |status: &mut tokio::sync::watch::Receiver<proxy::Status>, out: usize| {
        // The retry is told of beside the ejection.
        let done =
            status.wait_for(|status| status.ejected.len() == out && (status.ejections, status.retries) == (1, 1));
        let waited = async { tokio::time::timeout(Duration::from_secs(20), done).await.is_ok() };
        assert!(tokio::runtime::Builder::new_current_thread().enable_time().build().expect("tokio").block_on(waited));
    };
    wait(&mut status, 1);
    let start = Instant::now();
    for _ in 0..6 {
        assert_eq!(tcp(&world.pods[1], "10.96.0.10:80").expect("answer").0, 0);
    }
    // Each second one would have waited for 250 ms.
    assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
    // It comes to life in the second pod.
    world.pods[1].ip(&format!("addr add {silent}/32 dev eth0"));
    world.node.ip(&format!("neigh del {silent} dev pod1"));
    wait(&mut status, 0);
    let found: std::collections::BTreeSet<usize> =
        (0..4).map(|_| tcp(&world.node, "10.96.0.10:80").expect("answer").0).collect();
    assert_eq!(found.len(), 2);
    running.stop();
}

/// An endpoint goes: its open connection stays, its UDP session does not, and no relay moves. A restart finds the ports.
#[test]
fn connections_outlive_their_endpoints_place_in_the_service() {
    let world = World::new();
    echo(&world.pods[0], 9090);
    let objects = [
        service("web", json!({})),
        service("names", json!({"clusterIPs": ["10.96.0.12"], "ports": [{"port": 80, "protocol": "UDP"}]})),
    ];
    let mut running =
        started(&world, &objects, &[slice("web", 9090, "TCP", &HERE[..1]), slice("names", 8080, "UDP", &HERE[..1])]);
    let ports = relays(&world);
    assert_eq!(ports.len(), 2);
    let mut stream = connect(&world.pods[1], "10.96.0.10:80");
    stream.write_all(b"before").expect("written");
    assert_eq!(udp(&world.client, "10.96.0.12:80", 5353).expect("answer").0, 0);
    running.change(|table| table.upsert_slice(&slice("web", 9090, "TCP", &HERE[1..])).expect("slice"));
    running.change(|table| table.upsert_slice(&slice("names", 8080, "UDP", &HERE[1..])).expect("slice"));
    assert_eq!(relays(&world), ports);
    assert_eq!(udp(&world.client, "10.96.0.12:80", 5353).expect("answer").0, 1);
    // Even when the Service goes.
    running.change(|table| table.delete_service("default", "web"));
    stream.write_all(b" and after").expect("written");
    stream.shutdown(Shutdown::Write).expect("ended");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read");
    assert_eq!(text, "before and after");
    running.change(|table| table.delete_service("default", "names"));
    assert!(udp(&world.client, "10.96.0.12:80", 5353).is_err());
    running.stop();
    let mut again = started(&world, &objects, &[slice("names", 8080, "UDP", &HERE[..1])]);
    let names = relays(&world);
    assert_eq!(udp(&world.client, "10.96.0.12:80", 5353).expect("answer").0, 0);
    // A commit that finds another table there lays its own again, and keeps the relays.
    world.node.command("nft", "delete table inet fairlead-userspace");
    again.change(|table| table.upsert_slice(&slice("web", 8080, "TCP", &HERE)).expect("slice"));
    assert!(relays(&world).is_superset(&names));
    assert!(tcp(&world.pods[1], "10.96.0.10:80").is_ok());
    again.stop();
}

/// A client whose endpoint has closed its UDP port is answered by another, without sending again.
#[test]
fn a_refused_datagram_goes_to_the_next_endpoint() {
    let world = World::new();
    let mut running = started(
        &world,
        &[service("names", json!({"clusterIPs": ["10.96.0.12"], "ports": [{"port": 80, "protocol": "UDP"}]}))],
        &[slice("names", 7, "UDP", &HERE[..1])],
    );
    running.change(|table| {
        let mut other: serde_json::Value =
            serde_json::from_slice(&slice("names", 8080, "UDP", &HERE[1..])).expect("json");
        other["metadata"]["name"] = json!("names-2");
        table.upsert_slice(other.to_string().as_bytes()).expect("slice")
    });
    for _ in 0..4 {
        assert_eq!(udp(&world.client, "10.96.0.12:80", 0).expect("answer").0, 1);
    }
    running.stop();
}

fn loopback_table() -> ServiceTable {
    let mut table = ServiceTable::new();
    let both = json!(["10.96.0.10", "fd00:10:96::10"]);
    table
        .upsert_service(&service(
            "web",
            json!({"clusterIPs": both, "type": "NodePort", "ports": node_port(30107, "TCP")}),
        ))
        .expect("service");
    table.upsert_slice(&slice("web", 30108, "TCP", &[("127.0.0.1", "node-1")])).expect("slice");
    let mut six: serde_json::Value =
        serde_json::from_slice(&slice("web", 30108, "TCP", &[("::1", "node-1")])).expect("json");
    six["metadata"]["name"] = json!("web-6");
    table.upsert_slice(six.to_string().as_bytes()).expect("slice");
    table
}

/// Without CAP_NET_ADMIN node ports answer on the loopback addresses, and the status says that this is all.
#[test]
fn without_privileges_only_the_loopback_answers() {
    const ALONE: &str = "FAIRLEAD_TEST_WITHOUT_PRIVILEGES";
    if std::env::var_os(ALONE).is_none() {
        let own = std::env::current_exe().expect("this test");
        let name = "userspace::without_privileges_only_the_loopback_answers";
        // A namespace of its own, so that its ports are free.
        let status = std::process::Command::new("unshare")
            .args([
                "--net",
                "sh",
                "-c",
                "ip link set lo up && exec setpriv --bounding-set=-net_admin --inh-caps=-net_admin \"$0\" \"$@\"",
            ])
            .arg(own)
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .status()
            .expect("unshare and setpriv");
        assert!(status.success());
        return;
    }
    for address in ["127.0.0.1:30108", "[::1]:30108"] {
        let server = TcpListener::bind(address).expect("bind");
        std::thread::spawn(move || {
            for mut stream in server.incoming().flatten() {
                drop(stream.write_all(b"hello"));
            }
        });
    }
    let mut running = Running::here(Mode::Userspace);
    *running.table.write().expect("table") = loopback_table();
    running.change(|table| table.set_synced());
    let about = running.status.borrow().about.clone();
    assert!(about.contains("without CAP_NET_ADMIN"), "{about}");
    for address in ["127.0.0.1:30107", "[::1]:30107"] {
        let mut text = String::new();
        TcpStream::connect(address).expect("connect").read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello", "{address}");
    }
    running.change(|table| table.delete_service("default", "web"));
    // The listener closes as soon as its task sees it.
    let gone = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        TcpStream::connect("127.0.0.1:30107").is_err()
    });
    assert!(gone, "the relay still listens");
    running.stop();
}

/// Node ports on 127.0.0.1 and ::1 beside the nftables mode, whose rules cannot do it: by a relay, where it is asked for.
#[test]
fn localhost_node_ports_are_relayed_beside_another_mode() {
    let world = World::new();
    for relay_localhost in [false, true] {
        let view = proxy::NodeView { relay_localhost, ..node_view() };
        let mut running = Running::start_with(&world, Mode::Nftables, view);
        {
            let mut table = running.table.write().expect("table");
            let both = json!({"clusterIPs": ["10.96.0.10", "fd00:10:96::10"], "type": "NodePort", "ports": node_port(30007, "TCP")});
            table.upsert_service(&service("web", both)).expect("service");
            table.upsert_slice(&slice("web", 8080, "TCP", &HERE)).expect("slice");
        }
        running.change(|table| table.set_synced());
        running.change(|table| {
            let mut six: serde_json::Value = serde_json::from_slice(&slice("web", 8080, "TCP", &HERE6)).expect("json");
            six["metadata"]["name"] = json!("web-6");
            table.upsert_slice(six.to_string().as_bytes()).expect("slice")
        });
        assert!(tcp(&world.client, "192.168.49.2:30007").is_ok());
        for to in ["127.0.0.1:30007", "[::1]:30007"] {
            // The relays' own loop may come to it a little later.
            let answers = (0..100).any(|_| {
                let answer = tcp(&world.node, to).is_ok();
                if !answer && relay_localhost {
                    std::thread::sleep(Duration::from_millis(20));
                }
                answer
            });
            assert_eq!(answers, relay_localhost, "{to}");
        }
        running.stop();
        assert!(tcp(&world.node, "127.0.0.1:30007").is_err(), "the relay ends with the proxy");
    }
}
