//! A rolling update under load in ipvs mode, as far as the proxy has a part in it: endpoints go from ready through
//! terminating to gone, and their servers end at once as soon as the removal barrier lets them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux::connections::Connections;
use proxy::{Mode, Watching};
use serde_json::{Value, json};

use crate::live::Running;
use crate::net::Namespace;
use crate::objects::service;

const SERVICE: &str = "10.96.0.10:80";
const NODE_PORT: &str = "192.168.49.2:30080";
const PORT: u16 = 8080;
const REPLICAS: usize = 4;
const UPDATES: usize = 2;
const PATIENCE: Duration = Duration::from_secs(10);
/// Four clients in each of two places.
const PAUSE: Duration = Duration::from_millis(50);

/// A pod whose server ends at once, in the middle of whatever it does.
struct Pod {
    namespace: Namespace,
    address: String,
    link: String,
    ended: Arc<AtomicBool>,
    server: JoinHandle<()>,
}

struct Stage {
    node: Namespace,
    outside: Namespace,
    made: usize,
}

impl Stage {
    fn new() -> Self {
        let (node, outside) = (Namespace::new(), Namespace::new());
        node.sysctl("net/ipv4/ip_forward", "1");
        node.ip(&format!("link add up0 type veth peer name eth0 netns {}", outside.path));
        for (place, link, address) in [(&node, "up0", "192.168.49.2/24"), (&outside, "eth0", "192.168.49.9/24")] {
            place.ip(&format!("link set {link} up"));
            place.ip(&format!("addr add {address} dev {link}"));
        }
        Stage { node, outside, made: 0 }
    }

    fn pod(&mut self) -> Pod {
        self.made += 1;
        let (link, address) = (format!("pod{}", self.made), format!("10.244.0.{}", 10 + self.made));
        let namespace = Namespace::new();
        self.node.ip(&format!("link add {link} type veth peer name eth0 netns {}", namespace.path));
        self.node.ip(&format!("link set {link} up"));
        self.node.ip(&format!("addr add 10.244.0.1/32 dev {link}"));
        self.node.ip(&format!("route add {address} dev {link}"));
        namespace.ip("link set eth0 up");
        namespace.ip(&format!("addr add {address}/32 dev eth0"));
        namespace.ip("route add 10.244.0.1 dev eth0");
        namespace.ip("route add default via 10.244.0.1 dev eth0");
        let ended = Arc::new(AtomicBool::new(false));
        let listener = namespace.run(|| TcpListener::bind(("0.0.0.0", PORT)).expect("bind"));
        let stop = ended.clone();
        let server = std::thread::spawn(move || serve(&listener, &stop));
        Pod { namespace, address, link, ended, server }
    }
}

/// One answer per byte; when it ends, whoever is connected is cut off.
fn serve(listener: &TcpListener, ended: &Arc<AtomicBool>) {
    let mut open: Vec<(TcpStream, JoinHandle<()>)> = Vec::new();
    for stream in listener.incoming().flatten() {
        if ended.load(Ordering::SeqCst) {
            break;
        }
        let mut client = stream.try_clone().expect("clone");
        open.retain(|(_, thread)| !thread.is_finished());
        open.push((
            stream,
            std::thread::spawn(move || {
                let mut byte = [0];
                while client.read_exact(&mut byte).and_then(|()| client.write_all(&byte)).is_ok() {}
            }),
        ));
    }
    for (stream, thread) in open {
        drop(stream.shutdown(std::net::Shutdown::Both));
        drop(thread.join());
    }
}

impl Pod {
    /// As a kubelet with the removal barrier: new connections have ended to come, and those there are get a second to close.
    fn end(self, node: &Namespace) {
        let file = std::fs::File::open(&node.path).expect("namespace");
        let mut connections = Connections::open(Some(file.as_fd())).expect("connections");
        let patience = Instant::now() + Duration::from_secs(1);
        let address = self.address.parse().expect("address");
        while !connections.open_to(address).expect("connections").is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.ended.store(true, Ordering::SeqCst);
        // Whoever accepts looks at the flag.
        let own = SocketAddr::new(address, PORT);
        self.namespace.run(move || drop(TcpStream::connect(own)));
        self.server.join().expect("the server ends");
        node.ip(&format!("link del {}", self.link));
    }
}

/// An endpoint, and whether it terminates.
fn endpoints(pods: &[Pod], terminating: usize) -> Vec<u8> {
    let endpoints: Vec<Value> = pods
        .iter()
        .enumerate()
        .map(|(index, pod)| {
            let ends = index < terminating;
            json!({"addresses": [pod.address], "nodeName": "node-1",
                "conditions": {"ready": !ends, "serving": true, "terminating": ends}})
        })
        .collect();
    json!({
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"port": PORT, "protocol": "TCP"}], "endpoints": endpoints,
    })
    .to_string()
    .into_bytes()
}

#[derive(Default)]
struct Seen {
    answers: usize,
    repeats: usize,
    failures: Vec<String>,
}

struct Client {
    to: SocketAddr,
    keeps: bool,
    open: Option<TcpStream>,
    seen: Seen,
}

impl Client {
    fn connect(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn exchange(mut stream: &TcpStream) -> std::io::Result<()> {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    }

    /// A connection that was used before and is closed before its first byte of an answer may be repeated, as HTTP/1.1
    /// allows (RFC 9112, section 9.3.1).
    fn request(&mut self) -> std::io::Result<()> {
        if let Some(stream) = self.open.take() {
            if Self::exchange(&stream).is_ok() {
                self.open = Some(stream);
                return Ok(());
            }
            self.seen.repeats += 1;
        }
        let stream = self.connect()?;
        Self::exchange(&stream)?;
        self.open = self.keeps.then_some(stream);
        Ok(())
    }

    fn run(mut self, stop: &AtomicBool) -> Seen {
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            match self.request() {
                Ok(()) => self.seen.answers += 1,
                Err(error) => self.seen.failures.push(format!("{}: {error} after {:?}", self.to, begun.elapsed())),
            }
            std::thread::sleep(PAUSE);
        }
        self.seen
    }
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn a_rolling_update_fails_no_request() {
    let mut stage = Stage::new();
    let mut pods: Vec<Pod> = (0..REPLICAS).map(|_| stage.pod()).collect();
    let mut running = Running::start_in(&stage.node, Mode::Ipvs, Watching::default(), None);
    let ports = json!([{"port": 80, "nodePort": 30080, "protocol": "TCP"}]);
    let web = service("web", json!({"type": "NodePort", "ports": ports}));
    running.table.write().expect("table").upsert_service(&web).expect("service");
    running.table.write().expect("table").upsert_slice(&endpoints(&pods, 0)).expect("slice");
    running.change(|table| table.set_synced());

    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<JoinHandle<Seen>> = [(&stage.node, SERVICE), (&stage.outside, NODE_PORT)]
        .into_iter()
        .flat_map(|(place, to)| [false, true, false, true].map(|keeps| (place, to, keeps)))
        .map(|(place, to, keeps)| {
            let client = Client { to: to.parse().expect("address"), keeps, open: None, seen: Seen::default() };
            let stop = stop.clone();
            // A thread is in the namespace of the thread that starts it.
            place.run(move || std::thread::spawn(move || client.run(&stop)))
        })
        .collect();
    let begun = Instant::now();
    for _ in 0..UPDATES * REPLICAS {
        pods.push(stage.pod());
        running.change(|table| table.upsert_slice(&endpoints(&pods, 0)).expect("slice"));
        running.change(|table| table.upsert_slice(&endpoints(&pods, 1)).expect("slice"));
        pods.remove(0).end(&stage.node);
        running.change(|table| table.upsert_slice(&endpoints(&pods, 0)).expect("slice"));
    }
    let lasted = begun.elapsed();
    stop.store(true, Ordering::Relaxed);
    let mut all = Seen::default();
    for client in clients {
        let seen = client.join().expect("client");
        all.answers += seen.answers;
        all.repeats += seen.repeats;
        all.failures.extend(seen.failures);
    }
    println!("{} answers in {lasted:.1?}, {} repeated on a new connection", all.answers, all.repeats);
    assert!(all.failures.is_empty(), "{} of {}: {:#?}", all.failures.len(), all.answers, all.failures);
    assert!(all.repeats > 0, "clients that keep their connection were never cut off");
    assert_eq!(running.status.borrow().ejections, 0, "nobody was missed");
    running.stop();
}
