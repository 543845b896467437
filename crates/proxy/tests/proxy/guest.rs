//! What needs a kernel that build machines may lack (IPVS, dummy interfaces, SCTP sockets): `cargo xtask guest` runs these in
//! an emulated machine.
//!
//! - `handed_over`: from and to the ipvs mode while clients talk
//! - `rolling`: pods come and go while clients talk
//! - `schedulers`: each chooses as its name says
//! - `watched`: endpoints that do not answer, end policies and counts, in ipvs mode

mod handed_over;
mod rolling;
mod schedulers;
mod watched;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use linux::ipvs::{self, Ipvs as _, Key, Op, Persistence, Scheduler, Service, Timeouts};
use linux::nft::Socket;
use proxy::Mode;
use proxy::dataplane::ipvs::Ipvs;
use proxy::dataplane::{Change, Dataplane};
use serde_json::json;
use services::ServiceTable;

use crate::live::{Running, endpoints_change_while_clients_talk};
use crate::net::{CLIENT, NODE, Namespace, PODS, World, commit_all, packets, table, tcp};
use crate::objects::{service, slice};
use crate::{kill, ring, sctp};

type Real = Ipvs<ipvs::Socket, Socket>;

fn file(namespace: &Namespace) -> std::fs::File {
    std::fs::File::open(&namespace.path).expect("namespace")
}

fn open(namespace: &Namespace) -> Real {
    let file = file(namespace);
    Ipvs::new(
        ipvs::Socket::open(Some(file.as_fd())).expect("this kernel has IPVS"),
        Socket::open(Some(file.as_fd())).expect("socket"),
    )
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_carries_real_packets() {
    let world = World::new();
    let table = table();
    let mut dataplane = open(&world.node);
    dataplane.read().expect("read");
    commit_all(&mut dataplane, &table);
    packets(&world, Mode::Ipvs);
    // An address nobody has, and a port nobody has, although the host itself listens there.
    world.node.run(|| {
        let listener = TcpListener::bind("0.0.0.0:81").expect("bind");
        std::thread::spawn(move || listener.incoming().for_each(drop));
    });
    assert_eq!(tcp(&world.pods[0], "10.96.7.7:80"), Err(std::io::ErrorKind::TimedOut));
    assert_eq!(tcp(&world.pods[0], "10.96.0.10:81"), Err(std::io::ErrorKind::ConnectionRefused));
    // A cluster's own client is not held to `externalTrafficPolicy: Local` of an outside address.
    let mut away = table;
    let pods = [("10.244.0.11", "node-2"), ("10.244.0.12", "node-2")];
    away.upsert_slice(&slice("near", 8080, "TCP", &pods)).expect("slice");
    commit_all(&mut dataplane, &away);
    assert!(tcp(&world.pods[0], "192.168.49.2:30014").is_ok());
    assert!(tcp(&world.node, "192.168.49.2:30014").is_ok());
    assert_eq!(tcp(&world.client, "192.168.49.2:30014"), Err(std::io::ErrorKind::TimedOut));
    // A restart finds everything and changes nothing.
    let held = |dataplane: &mut Real| {
        let ipvs = dataplane.kernel().0;
        let services = ipvs.services().expect("services");
        let destinations: Vec<_> =
            services.iter().map(|service| ipvs.destinations(&service.key).expect("destinations")).collect();
        let weights = |all: &Vec<(ipvs::Destination, _)>| all.iter().map(|(held, _)| held.clone()).collect::<Vec<_>>();
        (services, destinations.iter().map(weights).collect::<Vec<_>>(), ipvs.addresses().expect("addresses"))
    };
    // Without what packets have counted, which grows old.
    let list = |world: &World| world.node.command("nft", "-s list table inet fairlead-ipvs");
    let before = (held(&mut dataplane), list(&world));
    let mut again = open(&world.node);
    again.read().expect("read");
    commit_all(&mut again, &away);
    assert_eq!(before, (held(&mut again), list(&world)));
    // Without Services nothing of them is left.
    again.commit(Some(&Real::base(&crate::net::node_view())), &[]).expect("commit");
    let (services, _, addresses) = held(&mut again);
    assert_eq!((services, addresses), (vec![], Some(Default::default())));
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_follows_endpoints() {
    endpoints_change_while_clients_talk(Mode::Ipvs);
}

/// What a start, one more Service and a restart cost is told; a restart finds all of it.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_takes_hundreds_of_services() {
    let namespace = Namespace::new();
    let node = crate::net::node_view();
    let mut table = ServiceTable::new();
    let mut add = |number: usize| {
        let name = format!("s{number}");
        let ip = format!("10.96.{}.{}", number / 250, 1 + number % 250);
        let pods: Vec<String> = (1..=3).map(|pod| format!("10.244.{}.{}", pod, number % 250)).collect();
        let pods: Vec<(&str, &str)> = pods.iter().map(|pod| (pod.as_str(), "node-2")).collect();
        table.upsert_service(&service(&name, json!({"clusterIPs": [ip]}))).expect("service");
        table.upsert_slice(&slice(&name, 8080, "TCP", &pods)).expect("slice").frontends
    };
    for number in 1..=400 {
        add(number);
    }
    let one_more = add(401);
    let mut dataplane = open(&namespace);
    dataplane.read().expect("read");
    let mut changes = crate::modes::whole::<Real>(&table, &node);
    changes.retain(|change| change.id != one_more[0].id);
    let start = std::time::Instant::now();
    dataplane.commit(Some(&Real::base(&node)), &changes).expect("commit");
    println!("400 Services in {:?}", start.elapsed());
    let after = one_more[0].after.as_ref().map(|after| Real::entries(after, &node));
    let start = std::time::Instant::now();
    dataplane.commit(None, &[Change { id: one_more[0].id, before: None, after }]).expect("commit");
    println!("one more in {:?}", start.elapsed());
    let mut again = open(&namespace);
    let start = std::time::Instant::now();
    again.read().expect("read");
    println!("read back in {:?}", start.elapsed());
    let start = std::time::Instant::now();
    commit_all(&mut again, &table);
    println!("nothing to do in {:?}", start.elapsed());
    assert_eq!(again.kernel().0.services().expect("services").len(), 401);
}

/// Two lines of an echo that stays open.
fn echo(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"hello\n")?;
    let mut buffer = [0; 64];
    let size = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..size]).into_owned())
}

/// Answers each line with a name, on a connection that stays open.
fn serve_lines(pod: &Namespace, name: &'static str) {
    let listener = pod.run(|| TcpListener::bind("[::]:8081").expect("bind"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while stream.read(&mut buffer).is_ok_and(|size| size > 0) && stream.write_all(name.as_bytes()).is_ok() {
                }
            });
        }
    });
}

fn connect(from: &Namespace, to: &'static str) -> TcpStream {
    let to: SocketAddr = to.parse().expect("address");
    let stream = from.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(2)).expect("connect"));
    stream.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
    stream
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn an_endpoint_that_goes_away_drains() {
    let world = World::new();
    serve_lines(&world.pods[0], "first");
    serve_lines(&world.pods[1], "second");
    let mut table = ServiceTable::new();
    table.upsert_service(&service("web", json!({}))).expect("service");
    let only = |pod| slice("web", 8081, "TCP", &[(pod, "node-1")]);
    table.upsert_slice(&only("10.244.0.13")).expect("slice");
    table.set_synced();
    let mut dataplane = open(&world.node);
    dataplane.read().expect("read");
    commit_all(&mut dataplane, &table);
    // This one was never used, and goes at once.
    table.upsert_slice(&only("10.244.0.11")).expect("slice");
    commit_all(&mut dataplane, &table);
    assert_eq!(dataplane.tend().expect("tend"), None);
    let mut old = connect(&world.client, "10.96.0.10:80");
    assert_eq!(echo(&mut old).expect("answer"), "first");

    table.upsert_slice(&only("10.244.0.12")).expect("slice");
    commit_all(&mut dataplane, &table);
    assert_eq!(echo(&mut connect(&world.client, "10.96.0.10:80")).expect("answer"), "second");
    assert_eq!(echo(&mut old).expect("the old connection lives on"), "first");
    let web = Key { address: "10.96.0.10:80".parse().expect("address"), protocol: 6 };
    let weights = |dataplane: &mut Real| {
        let all = dataplane.kernel().0.destinations(&web).expect("destinations");
        all.into_iter().map(|(held, _)| (held.address.to_string(), held.weight)).collect::<Vec<_>>()
    };
    let mut both = weights(&mut dataplane);
    both.sort();
    assert_eq!(both, [("10.244.0.11:8081".to_owned(), 0), ("10.244.0.12:8081".to_owned(), 1)]);
    assert!(dataplane.tend().expect("tend").is_some());
    // A new start goes on with it.
    let mut dataplane = open(&world.node);
    dataplane.read().expect("read");
    commit_all(&mut dataplane, &table);
    assert_eq!(echo(&mut old).expect("the old connection lives on"), "first");
    assert!(dataplane.tend().expect("tend").is_some());
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn the_kernel_gives_back_what_it_was_given() {
    let namespace = Namespace::new();
    let mut ipvs = ipvs::Socket::open(Some(file(&namespace).as_fd())).expect("this kernel has IPVS");
    let info = ipvs.info().expect("info");
    assert!(info.connection_table > 0 && info.version.1 > 0, "{info:?}");
    let mut expected = Vec::new();
    for (address, prefix) in [("10.0.0.1:80", 32), ("10.0.0.2:80", 24), ("[fd00::1]:80", 128), ("[fd00::2]:80", 64)] {
        for protocol in [6, 17, 132] {
            let key = Key { address: address.parse().expect("address"), protocol };
            let persistence = (protocol == 6).then_some(Persistence { timeout_seconds: 7, prefix });
            let flags = if protocol == 132 { ipvs::SCHEDULER_2 } else { 0 };
            let service = Service { key, scheduler: Scheduler::Maglev, persistence, flags };
            ipvs.apply(&Op::AddService(service.clone())).unwrap_or_else(|error| panic!("{error}"));
            let there = if key.address.is_ipv4() { "10.1.0.1:8080" } else { "[fd00:1::1]:8080" };
            let mut destination = ipvs::Destination::new(there.parse().expect("address"), 3);
            ipvs.apply(&Op::AddDestination(key, destination.clone())).unwrap_or_else(|error| panic!("{error}"));
            destination.weight = 0;
            destination.upper_threshold = 100;
            destination.lower_threshold = 50;
            ipvs.apply(&Op::SetDestination(key, destination.clone())).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(ipvs.destinations(&key).expect("list"), [(destination, ipvs::Connections::default())]);
            expected.push(service);
        }
    }
    let mut held = ipvs.services().expect("services");
    held.sort_by_key(|service| service.key);
    expected.sort_by_key(|service| service.key);
    assert_eq!(held, expected);
    let timeouts = Timeouts { tcp: 600, tcp_fin: 60, udp: 120 };
    ipvs.apply(&Op::SetTimeouts(timeouts)).expect("set");
    assert_eq!(ipvs.timeouts().expect("timeouts"), timeouts);
    // Refusals name what was asked for.
    let again = ipvs.apply(&Op::AddService(expected[0].clone())).expect_err("it exists").to_string();
    assert!(again.contains("ipvsadm -A -t 10.0.0.1:80 -s mh -p 7") && again.contains("EEXIST"), "{again}");
    for service in expected {
        ipvs.apply(&Op::DeleteService(service.key)).expect("deleted");
    }
    assert_eq!(ipvs.services().expect("services"), []);
}

/// A kernel that nobody touched holds the plan; what is taken out of it by hand is told.
fn drift_is_told(world: &World, running: &Running) {
    let frontends: Vec<_> = running.table.read().expect("table").frontends().cloned().collect();
    let file = file(&world.node);
    let drift = || {
        proxy::explain::drift(Mode::Ipvs, &frontends, &crate::net::node_view(), Some(file.as_fd()), None)
            .expect("compared")
    };
    assert_eq!(drift(), Vec::<String>::new());
    let web = Key { address: "10.96.0.10:80".parse().expect("address"), protocol: 6 };
    let pod = ipvs::Destination::new("10.244.0.11:8080".parse().expect("address"), 1);
    let mut ipvs = ipvs::Socket::open(Some(file.as_fd())).expect("this kernel has IPVS");
    ipvs.apply(&Op::DeleteDestination(web, pod.address)).expect("deleted");
    assert_eq!(drift(), ["missing: ipvsadm -a -t 10.96.0.10:80 -r 10.244.0.11:8080 -m -w 1"]);
    ipvs.apply(&Op::AddDestination(web, pod)).expect("added");
}

/// A node changes its mode, with another process: Services go on, and nothing of the old mode is left that nobody uses.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_takes_over_and_gives_back() {
    let world = World::new();
    let has = |what: &str, program: &str, arguments: &str| world.node.command(program, arguments).contains(what);
    for mode in [Mode::Nftables, Mode::Ipvs, Mode::Iptables, Mode::Ipvs, Mode::Nftables] {
        let mut running = Running::start(&world, mode);
        running.table.write().expect("table").upsert_service(&service("web", json!({}))).expect("service");
        let pods = slice("web", 8080, "TCP", &[("10.244.0.11", "node-1")]);
        running.table.write().expect("table").upsert_slice(&pods).expect("slice");
        running.change(|table| table.set_synced());
        if mode == Mode::Ipvs {
            drift_is_told(&world, &running);
        }
        assert_eq!(has("kube-ipvs0", "ip", "link"), mode == Mode::Ipvs, "{mode}");
        assert_eq!(has("inet fairlead-ipvs", "nft", "list tables"), mode == Mode::Ipvs, "{mode}");
        assert_eq!(has("inet fairlead\n", "nft", "list tables"), mode == Mode::Nftables, "{mode}");
        assert_eq!(has("KUBE-S", "iptables-nft-save", ""), mode == Mode::Iptables, "{mode}");
        let file: OwnedFd = file(&world.node).into();
        let left = ipvs::Socket::open(Some(file.as_fd())).expect("ipvs").services().expect("services").len();
        assert_eq!(left, usize::from(mode == Mode::Ipvs), "{mode}");
        if mode != Mode::Ipvs {
            for from in [&world.client, &world.node, &world.pods[1]] {
                assert!(tcp(from, "10.96.0.10:80").is_ok(), "{mode}");
            }
        }
        running.stop();
    }
}

/// Which pod answered, and whom it saw.
fn ask_sctp((from, own): (&Namespace, &str), to: &str) -> std::io::Result<(usize, String)> {
    let (own, to) = (own.parse().expect("address"), to.parse().expect("address"));
    let text = from.run(move || sctp::ask(own, to, Duration::from_secs(2)))?;
    let (index, seen) = text.split_once(' ').ok_or(std::io::ErrorKind::UnexpectedEof)?;
    Ok((index.parse().expect("a number"), seen.to_owned()))
}

#[test]
#[ignore = "needs SCTP sockets: cargo xtask guest"]
fn sctp_in_every_mode() {
    let world = World::new();
    for (index, pod) in world.pods.iter().enumerate() {
        let address = SocketAddr::new(PODS[index].parse().expect("address"), 8080);
        pod.run(move || sctp::serve(address, move |peer| format!("{index} {peer}")));
    }
    for mode in [Mode::Nftables, Mode::Iptables, Mode::Ipvs] {
        let mut running = Running::start(&world, mode);
        let mut table = running.table.write().expect("table");
        for (name, ip, node_port) in [("sctp", "10.96.0.20", 30020), ("empty", "10.96.0.21", 30021)] {
            let ports = json!([{"port": 80, "nodePort": node_port, "protocol": "SCTP"}]);
            let spec = json!({"clusterIPs": [ip], "type": "NodePort", "ports": ports});
            table.upsert_service(&service(name, spec)).expect("service");
        }
        let pods = [("10.244.0.11", "node-1"), ("10.244.0.12", "node-1")];
        table.upsert_slice(&slice("sctp", 8080, "SCTP", &pods)).expect("slice");
        drop(table);
        running.change(|table| table.set_synced());
        for (from, to) in [
            ((&world.client, CLIENT), "192.168.49.2:30020"),
            ((&world.node, NODE), "10.96.0.20:80"),
            ((&world.pods[0], PODS[0]), "10.96.0.20:80"),
        ] {
            // Until both have answered.
            let mut answers = [0; 2];
            while answers.contains(&0) {
                let (pod, seen) = ask_sctp(from, to).unwrap_or_else(|error| panic!("{mode}: {to}: {error}"));
                answers[pod] += 1;
                assert_ne!(seen, CLIENT, "{mode}: outside clients are masqueraded");
                assert!(answers.iter().sum::<u32>() < 60, "{mode}: {to} was not balanced: {answers:?}");
            }
        }
        assert!(ask_sctp((&world.pods[1], PODS[1]), "10.96.0.21:80").is_err(), "{mode}");
        running.stop();
    }
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_sends_real_packets_where_the_cases_say() {
    ring::play(Mode::Ipvs, false);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_does_so_with_bridge_netfilter() {
    ring::play(Mode::Ipvs, true);
}

/// Elsewhere these files are played without SCTP.
#[test]
#[ignore = "needs SCTP sockets: cargo xtask guest"]
fn sctp_goes_where_the_cases_say() {
    assert!(sctp::is_known(), "this kernel has SCTP");
    for mode in [Mode::Nftables, Mode::Iptables] {
        assert!(ring::play_files(mode, true, |file| file == "protocol") > 0);
    }
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn ipvs_is_killed_and_starts_again() {
    kill::is_killed_and_starts_again(Mode::Ipvs, Duration::from_millis(400));
}
