//! A node changes its mode under load: no connection is lost, whatever mode made it, and no new one fails.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux::nft;
use proxy::Mode;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::live::Running;
use crate::net::{Namespace, World, tcp};
use crate::objects::{service, slice};

const MODES: [Mode; 4] = [Mode::Nftables, Mode::Iptables, Mode::Userspace, Mode::Ebpf];
const PODS: [(&str, &str); 2] = [("10.244.0.11", "node-1"), ("10.244.0.12", "node-1")];
const PODS6: [(&str, &str); 2] = [("fd00:10:244::11", "node-1"), ("fd00:10:244::12", "node-1")];
const ECHO: u16 = 9090;
/// Longer than a client waits before it repeats a first packet: that alone is no loss, but it is told.
const SLOW: Duration = Duration::from_millis(900);
const LOST: Duration = Duration::from_secs(8);

/// Every ordered pair of modes once, from the first and back to it.
fn circuit(modes: &[Mode]) -> Vec<Mode> {
    let mut walk = vec![modes[0]];
    for (count, new) in modes.iter().enumerate().skip(1) {
        walk.push(*new);
        for old in modes[1..count].iter().chain(&modes[..1]) {
            walk.push(*old);
            if *old != modes[0] {
                walk.push(*new);
            }
        }
    }
    walk
}

#[test]
fn a_circuit_has_every_pair_once() {
    let walk = circuit(&MODES);
    let mut pairs: Vec<_> = walk.windows(2).map(|pair| (pair[0], pair[1])).collect();
    pairs.sort();
    let all = MODES.iter().flat_map(|from| MODES.iter().map(move |to| (*from, *to)));
    let mut all: Vec<_> = all.filter(|(from, to)| from != to).collect();
    all.sort();
    assert_eq!(pairs, all);
}

/// Sends back whatever comes, to any number of clients.
fn echo(pod: &Namespace) {
    let listener = pod.run(|| TcpListener::bind(("::", ECHO)).expect("bind"));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut reader, mut writer) = (&stream, &stream);
                drop(std::io::copy(&mut reader, &mut writer));
            });
        }
    });
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, LOST)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOST))?;
    Ok(stream)
}

fn ping(mut stream: &TcpStream) -> std::io::Result<()> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

/// What clients saw.
#[derive(Default)]
struct Seen {
    requests: usize,
    slow: usize,
    lost: Vec<String>,
}

impl Seen {
    fn note(&mut self, what: &str, begun: Instant, result: std::io::Result<()>) -> bool {
        self.requests += 1;
        self.slow += usize::from(begun.elapsed() > SLOW);
        match &result {
            Ok(()) => {}
            Err(error) => self.lost.push(format!("{what}: {error}, after {:?}", begun.elapsed())),
        }
        result.is_ok()
    }

    fn add(&mut self, other: Seen) {
        self.requests += other.requests;
        self.slow += other.slow;
        self.lost.extend(other.lost);
    }
}

/// Clients, until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Seen>>,
    /// What each connection that stays is, and how often it has been answered.
    staying: Vec<(String, Arc<AtomicUsize>)>,
}

impl Load {
    fn new() -> Self {
        Load { stop: Arc::default(), clients: Vec::new(), staying: Vec::new() }
    }

    /// A byte each 10 ms on a connection that stays.
    fn stays(&mut self, from: &Namespace, to: &str, opened_in: Mode) {
        let address: SocketAddr = to.parse().expect("address");
        let stream = from.run(move || connect(address)).unwrap_or_else(|error| panic!("{opened_in}, {to}: {error}"));
        let what = format!("connection to {to} from {} mode", opened_in);
        let (stop, answers) = (self.stop.clone(), Arc::new(AtomicUsize::new(0)));
        self.staying.push((what.clone(), answers.clone()));
        self.clients.push(std::thread::spawn(move || {
            let mut seen = Seen::default();
            while !stop.load(Ordering::Relaxed) {
                if !seen.note(&what, Instant::now(), ping(&stream)) {
                    break;
                }
                answers.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
            seen
        }));
    }

    /// A connection per request, about a hundred a second.
    fn comes_and_goes(&mut self, from: &Namespace, to: &str) {
        let address: SocketAddr = to.parse().expect("address");
        let (what, stop) = (format!("request to {to}"), self.stop.clone());
        let requests = move || {
            let mut seen = Seen::default();
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                seen.note(&what, begun, connect(address).and_then(|stream| ping(&stream)));
                std::thread::sleep(Duration::from_millis(10));
            }
            seen
        };
        // A thread is where the thread is that starts it: network namespace and cgroup.
        self.clients.push(from.run(|| std::thread::spawn(requests)));
    }

    /// Waits until every connection that stays has been asked and answered since now.
    fn goes_on(&self) {
        let count = || self.staying.iter().map(|(_, answers)| answers.load(Ordering::Relaxed));
        let (before, begun): (Vec<usize>, _) = (count().collect(), Instant::now());
        // The first answer may be to what was asked before.
        while count().zip(&before).any(|(now, before)| now < before + 2) {
            let waits = self
                .staying
                .iter()
                .zip(&before)
                .filter(|((_, now), before)| now.load(Ordering::Relaxed) < **before + 2);
            let waits: Vec<&String> = waits.map(|((what, _), _)| what).collect();
            assert!(begun.elapsed() < LOST, "{waits:#?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Seen::default();
        for client in self.clients {
            all.add(client.join().expect("client"));
        }
        all
    }
}

fn serving(world: &World, mode: Mode) -> Running {
    let mut running = Running::start(world, mode);
    {
        let mut table = running.table.write().expect("table");
        let port = |port: u16| json!([{"port": 80, "nodePort": port, "protocol": "TCP"}]);
        table.upsert_service(&service("web", json!({"type": "NodePort", "ports": port(30007)}))).expect("service");
        let six = json!({"clusterIPs": ["fd00:10:96::17"], "type": "NodePort", "ports": port(30017)});
        table.upsert_service(&service("six", six)).expect("service");
        let near = json!({"clusterIPs": ["10.96.0.14"], "type": "NodePort", "ports": port(30014),
            "externalTrafficPolicy": "Local"});
        table.upsert_service(&service("near", near)).expect("service");
        table.upsert_slice(&slice("web", ECHO, "TCP", &PODS)).expect("slice");
        table.upsert_slice(&slice("near", ECHO, "TCP", &PODS)).expect("slice");
        table.upsert_slice(&slice("six", ECHO, "TCP", &PODS6)).expect("slice");
    }
    running.change(|table| table.set_synced());
    running
}

/// Who asks, and where.
pub type Road<'a> = (&'a Namespace, &'static str);

pub fn roads(world: &World) -> [Road<'_>; 8] {
    [
        (&world.client, "192.168.49.2:30007"),
        (&world.client, "192.168.49.2:30014"),
        (&world.client, "10.96.0.10:80"),
        (&world.client, "[fd00:c0a8:31::2]:30017"),
        (&world.node, "10.96.0.10:80"),
        // One of two goes back to itself.
        (&world.pods[0], "10.96.0.10:80"),
        (&world.pods[1], "192.168.49.2:30007"),
        (&world.pods[0], "[fd00:10:96::17]:80"),
    ]
}

#[test]
fn no_connection_is_lost_between_any_two_modes() {
    let world = World::with_ebpf(true);
    walk_under_load(&world, &roads(&world), &circuit(&MODES));
}

/// From mode to mode while clients talk.
pub fn walk_under_load(world: &World, roads: &[Road<'_>], walk: &[Mode]) {
    world.pods.iter().for_each(echo);
    let running = serving(world, walk[0]);
    let mut load = Load::new();
    for (from, to) in roads {
        load.comes_and_goes(from, to);
        load.stays(from, to, walk[0]);
    }
    let mut seen_modes = vec![walk[0]];
    for mode in &walk[1..] {
        std::thread::sleep(Duration::from_millis(100));
        load.goes_on();
        let begun = Instant::now();
        running.runtime.block_on(running.switch.to(*mode)).expect("handed over");
        println!("to {mode} in {:?}", begun.elapsed());
        assert_eq!(running.status.borrow().mode, Some(*mode));
        if !seen_modes.contains(mode) {
            seen_modes.push(*mode);
            roads.iter().for_each(|(from, to)| load.stays(from, to, *mode));
        }
    }
    load.goes_on();
    let seen = load.end();
    println!("{} requests, {} of them slow", seen.requests, seen.slow);
    assert!(seen.lost.is_empty(), "{:#?}", seen.lost);
    running.stop();
}

/// A client takes the port of its last connection again at once, when the endpoint of that one has gone: the new connection is a
/// new one, in the mode that has flows of its own, and in the one that comes after it.
#[test]
fn a_port_that_is_used_again_leads_to_an_endpoint_that_is_there() {
    for then in [Mode::Ebpf, Mode::Nftables] {
        let world = World::with_ebpf(true);
        let gone = world.pods[0].run(|| TcpListener::bind(("::", ECHO)).expect("bind"));
        let once = std::thread::spawn(move || {
            let (stream, _) = gone.accept().expect("a client");
            let (mut reader, mut writer) = (&stream, &stream);
            drop(std::io::copy(&mut reader, &mut writer));
        });
        echo(&world.pods[1]);
        let mut running = Running::start(&world, Mode::Ebpf);
        let ports = json!([{"port": 80, "nodePort": 30007, "protocol": "TCP"}]);
        running.change(|table| {
            table.upsert_service(&service("web", json!({"type": "NodePort", "ports": ports}))).expect("service");
            table.upsert_slice(&slice("web", ECHO, "TCP", &PODS[..1])).expect("slice");
            table.set_synced()
        });
        let ask = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
            // Its end is a reset: no side waits before the port is used again.
            socket.set_linger(Some(Duration::ZERO)).expect("linger");
            socket.set_reuse_address(true).expect("reuse");
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], 40_001)).into()).expect("bind");
            let to: SocketAddr = "192.168.49.2:30007".parse().expect("address");
            socket.connect_timeout(&to.into(), LOST)?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(LOST))?;
            ping(&stream)
        };
        world.client.run(ask).expect("the first endpoint");
        once.join().expect("the first endpoint has ended");
        running.change(|table| table.upsert_slice(&slice("web", ECHO, "TCP", &PODS[1..])).expect("slice"));
        if then != Mode::Ebpf {
            running.runtime.block_on(running.switch.to(then)).expect("handed over");
        }
        world.client.run(ask).unwrap_or_else(|error| panic!("{then}: the second endpoint: {error}"));
        running.stop();
    }
}

/// Another process comes with another mode.
#[test]
fn no_connection_is_lost_when_a_restart_changes_the_mode() {
    let world = World::new();
    world.pods.iter().for_each(echo);
    let mut running = serving(&world, Mode::Nftables);
    let mut load = Load::new();
    for (from, to) in roads(&world) {
        load.comes_and_goes(from, to);
        load.stays(from, to, Mode::Nftables);
    }
    for mode in [Mode::Iptables, Mode::Nftables] {
        load.goes_on();
        running.stop();
        running = serving(&world, mode);
        assert_eq!(running.status.borrow().mode, Some(mode));
    }
    load.goes_on();
    let seen = load.end();
    println!("{} requests, {} of them slow", seen.requests, seen.slow);
    assert!(seen.lost.is_empty(), "{:#?}", seen.lost);
    running.stop();
}

/// A mode that cannot serve this node says so at its first commit. The old one goes on, and follows what changes.
#[test]
fn a_mode_that_cannot_take_over_changes_nothing() {
    let world = World::new();
    world.pods.iter().for_each(echo);
    let mut running = serving(&world, Mode::Nftables);
    running.node.send_modify(|view| {
        let mut next = proxy::NodeView::clone(view);
        let proxy::Pods::Cidrs(cidrs) = &mut next.pods else { panic!("pods are known by their networks here") };
        cidrs.push("10.245.0.0/16".parse().expect("cidr"));
        *view = next.into();
    });
    let mut load = Load::new();
    for (from, to) in roads(&world) {
        load.comes_and_goes(from, to);
        load.stays(from, to, Mode::Nftables);
    }
    let error = running.runtime.block_on(running.switch.to(Mode::Iptables)).expect_err("two networks").to_string();
    assert!(error.starts_with("Services stay in nftables mode") && error.contains("--proxy-mode=nftables"), "{error}");
    running.change(|table| {
        table.upsert_service(&service("more", json!({"clusterIPs": ["10.96.0.20"]}))).expect("service");
        table.upsert_slice(&slice("more", 8080, "TCP", &PODS)).expect("slice")
    });
    assert!(tcp(&world.pods[1], "10.96.0.20:80").is_ok());
    assert_eq!((running.status.borrow().mode, running.status.borrow().error.clone()), (Some(Mode::Nftables), None));
    assert!(!world.node.command("iptables-save", "").contains("KUBE-S"));
    let seen = load.end();
    assert!(seen.lost.is_empty(), "{:#?}", seen.lost);
    running.stop();
}

/// The keeper is what keeps a translated connection when the last rule that made it goes, and nothing else is.
#[test]
fn translated_connections_live_as_long_as_the_keeper() {
    let world = World::new();
    world.pods.iter().for_each(echo);
    serving(&world, Mode::Nftables).stop();
    let stream = world.client.run(|| connect("192.168.49.2:30007".parse().expect("address"))).expect("connected");
    stream.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
    for table in ["fairlead", "fairlead-watch"] {
        world.node.command("nft", &format!("delete table inet {table}"));
    }
    ping(&stream).expect("still translated");
    let text = world.node.command("nft", "list ruleset");
    assert!(text.contains("table inet fairlead-keeper") && text.matches("table").count() == 1, "{text}");
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let mut nft = nft::Socket::open(Some(namespace.as_fd())).expect("socket");
    assert!(proxy::keeper::remove(&mut nft).expect("removed"));
    assert!(!proxy::keeper::remove(&mut nft).expect("nothing to remove"));
    ping(&stream).expect_err("nobody translates");
}
