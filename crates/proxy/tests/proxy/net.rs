//! Real packets between network namespaces: a client outside, a node, and two pods on it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use linux::bpf::Pinned;
use linux::iptables::Tools;
use linux::nft::{self, Nft, Socket};
use proxy::dataplane::ebpf::{Ebpf, LAYOUT, OBJECT};
use proxy::dataplane::iptables::Iptables;
use proxy::dataplane::nftables::Nftables;
use proxy::dataplane::{Change, Dataplane};
use proxy::{Hooks, Mode, NodeView};
use serde_json::json;
use services::{Place, ServiceTable};

use crate::cgroup::Attached;
use crate::objects::{service, slice};

pub const NODE: &str = "192.168.49.2";
pub const CLIENT: &str = "203.0.113.9";
pub const PODS: [&str; 2] = ["10.244.0.11", "10.244.0.12"];
const NODE6: &str = "fd00:c0a8:31::2";
const CLIENT6: &str = "2001:db8:203::9";
const PODS6: [&str; 2] = ["fd00:10:244::11", "fd00:10:244::12"];

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace that lives as long as its thread; nothing is left when the test ends, however it ends.
pub struct Namespace {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub thread_id: i32,
    pub path: String,
}

impl Namespace {
    pub fn new() -> Self {
        let (jobs, work) = channel::<Job>();
        let (tell, path) = channel();
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare needs root");
            tell.send(nix::unistd::gettid().as_raw()).expect("test waits");
            for job in work {
                job();
            }
        });
        let thread_id: i32 = path.recv().expect("namespace");
        let path = format!("/proc/{}/task/{thread_id}/ns/net", std::process::id());
        let namespace = Namespace { jobs: Some(jobs), thread: Some(thread), thread_id, path };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs the closure in the namespace.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, answer) = channel();
        let job: Job = Box::new(move || drop(tell.send(std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)))));
        self.jobs.as_ref().expect("alive").send(job).expect("alive");
        match answer.recv().expect("answer") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    pub fn command(&self, program: &str, arguments: &str) -> String {
        let (program, arguments) = (program.to_owned(), arguments.to_owned());
        self.run(move || {
            let output = Command::new(&program).args(arguments.split_whitespace()).output().expect("spawn");
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program} {arguments}: {error}");
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }

    pub fn ip(&self, arguments: &str) {
        // An IPv6 address is nobody's to bind until the kernel has looked for others that have it: even on lo, where it does not
        // look, that is a moment later.
        let looks = arguments.starts_with("addr add ") && arguments.contains(':') && !arguments.contains("nodad");
        self.command("ip", &format!("{arguments}{}", if looks { " nodad" } else { "" }));
    }

    pub fn sysctl(&self, name: &str, value: &str) {
        let (path, value) = (format!("/proc/sys/{name}"), value.to_owned());
        self.run(move || std::fs::write(path, value).expect("sysctl"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The three kinds of machine.
pub struct World {
    pub client: Namespace,
    pub node: Namespace,
    pub pods: Vec<Namespace>,
    ebpf: Option<Attached>,
}

impl World {
    /// A world whose node can have eBPF programs. The calling thread, and threads it starts, see mounts that nobody else
    /// sees.
    pub fn with_ebpf(bridged: bool) -> Self {
        let attached = Attached::new();
        let mut world = World::build(bridged);
        // As podnet does. Connection tracking must not be misled by what is translated before and after it.
        let rules = "add table inet pods; add chain inet pods out { type nat hook postrouting priority 101; }; \
            add rule inet pods out ip saddr 10.244.0.0/24 ip daddr { 10.244.0.0/16, 192.168.49.0/24 } return; \
            add rule inet pods out ip saddr 10.244.0.0/24 masquerade fully-random; \
            add rule inet pods out ip6 saddr fd00:10:244::/64 ip6 daddr { fd00:10:244::/56, fd00:c0a8:31::/64 } return; \
            add rule inet pods out ip6 saddr fd00:10:244::/64 masquerade fully-random";
        world.node.command("nft", rules);
        for namespace in world.pods.iter().chain([&world.node]) {
            attached.add(namespace.thread_id);
        }
        world.ebpf = Some(attached);
        world
    }

    pub fn hooks(&self) -> Option<Hooks> {
        self.ebpf.as_ref().map(Attached::hooks)
    }

    pub fn new() -> Self {
        Self::build(false)
    }

    /// Pods on ports of a bridge, or each on a link of its own.
    fn build(bridged: bool) -> Self {
        let (client, node) = (Namespace::new(), Namespace::new());
        node.sysctl("net/ipv4/ip_forward", "1");
        node.sysctl("net/ipv6/conf/all/forwarding", "1");
        // A redirect would use up the allowance for the refusals that the tests wait for.
        for interface in ["all", "default"] {
            node.sysctl(&format!("net/ipv4/conf/{interface}/send_redirects"), "0");
            // Until its link-local address is known to be nobody else's, a node asks for no neighbour.
            node.sysctl(&format!("net/ipv6/conf/{interface}/accept_dad"), "0");
        }
        let link = |name: &str, other: &Namespace| {
            node.ip(&format!("link add {name} type veth peer name eth0 netns {}", other.path));
            node.ip(&format!("link set {name} up"));
            other.ip("link set eth0 up");
        };
        link("up0", &client);
        node.ip(&format!("addr add {NODE}/24 dev up0"));
        node.ip(&format!("route add {CLIENT} dev up0"));
        node.ip(&format!("route add default via {CLIENT} dev up0"));
        client.ip(&format!("addr add {CLIENT}/32 dev eth0"));
        client.ip(&format!("route add {NODE} dev eth0"));
        client.ip(&format!("route add default via {NODE} dev eth0"));
        node.ip(&format!("addr add {NODE6}/64 dev up0 nodad"));
        node.ip(&format!("route add {CLIENT6} dev up0"));
        node.ip(&format!("route add default via {CLIENT6} dev up0"));
        client.ip(&format!("addr add {CLIENT6}/128 dev eth0 nodad"));
        client.ip(&format!("route add {NODE6} dev eth0"));
        client.ip(&format!("route add default via {NODE6} dev eth0"));
        if bridged {
            node.ip("link add br0 type bridge");
            node.ip("link set br0 up");
        }
        let mut pods = Vec::new();
        for (index, address) in PODS.into_iter().enumerate() {
            let pod = Namespace::new();
            let port = format!("pod{index}");
            link(&port, &pod);
            let device = if bridged { "br0" } else { &port };
            if bridged {
                node.ip(&format!("link set {port} master br0"));
                node.command("bridge", &format!("link set dev {port} hairpin on"));
            }
            node.ip(&format!("addr replace 10.244.0.1/32 dev {device}"));
            node.ip(&format!("route add {address} dev {device}"));
            pod.ip(&format!("addr add {address}/32 dev eth0"));
            pod.ip("route add 10.244.0.1 dev eth0");
            pod.ip("route add default via 10.244.0.1 dev eth0");
            let address = PODS6[index];
            node.ip(&format!("addr replace fd00:10:244::1/128 dev {device} nodad"));
            node.ip(&format!("route add {address} dev {device}"));
            pod.ip(&format!("addr add {address}/128 dev eth0 nodad"));
            pod.ip("route add fd00:10:244::1 dev eth0");
            pod.ip("route add default via fd00:10:244::1 dev eth0");
            serve(&pod, index);
            pods.push(pod);
        }
        World { client, node, pods, ebpf: None }
    }
}

/// Answers on 8080, TCP and UDP, with the pod's number and the client's address as the pod sees it.
fn serve(pod: &Namespace, index: usize) {
    let (tcp, udp) =
        pod.run(|| (TcpListener::bind("[::]:8080").expect("bind"), UdpSocket::bind("[::]:8080").expect("bind")));
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            let from = stream.peer_addr().map(|peer| peer.ip().to_canonical().to_string()).unwrap_or_default();
            drop(stream.write_all(format!("{index} {from}").as_bytes()));
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((size, from)) = udp.recv_from(&mut buffer) {
            if &buffer[..size] == b"end" {
                return;
            }
            drop(udp.send_to(format!("{index} {}", from.ip().to_canonical()).as_bytes(), from));
        }
    });
}

/// What a TCP client reads: which pod answered, and whom it saw.
pub fn tcp(from: &Namespace, to: &str) -> Result<(usize, IpAddr), std::io::ErrorKind> {
    tcp_within(from, to, 500)
}

pub fn tcp_within(from: &Namespace, to: &str, milliseconds: u64) -> Result<(usize, IpAddr), std::io::ErrorKind> {
    let to: SocketAddr = to.parse().expect("address");
    from.run(move || {
        let mut stream =
            TcpStream::connect_timeout(&to, Duration::from_millis(milliseconds)).map_err(|error| error.kind())?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(|error| error.kind())?;
        Ok(parse(&text))
    })
}

/// The same over UDP, from a fresh socket or a given port.
pub fn udp(from: &Namespace, to: &str, port: u16) -> Result<(usize, IpAddr), std::io::ErrorKind> {
    let to: SocketAddr = to.parse().expect("address");
    from.run(move || {
        // A tool that another thread starts just now holds a copy of the last socket until it has begun.
        let any = if to.is_ipv6() { "::" } else { "0.0.0.0" };
        let bind = || UdpSocket::bind((any, port));
        let socket = (0..50).find_map(|_| bind().map_err(|_| std::thread::sleep(Duration::from_millis(10))).ok());
        let socket = socket.expect("bind");
        socket.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout");
        socket.connect(to).map_err(|error| error.kind())?;
        socket.send(b"hello").map_err(|error| error.kind())?;
        let mut buffer = [0; 64];
        let size = socket.recv(&mut buffer).map_err(|error| error.kind())?;
        Ok(parse(std::str::from_utf8(&buffer[..size]).expect("text")))
    })
}

fn parse(text: &str) -> (usize, IpAddr) {
    let (index, address) = text.split_once(' ').expect("an answer");
    (index.parse().expect("a number"), address.parse().expect("an address"))
}

pub fn node_view() -> NodeView {
    NodeView::new(
        Place { node: "node-1".into(), zone: None },
        [NODE, NODE6].map(|address| address.parse().expect("address")).to_vec(),
        ["10.244.0.0/16", "fd00:10:244::/56"].map(|cidr| cidr.parse().expect("cidr")).to_vec(),
        ["10.96.0.0/12", "fd00:10:96::/112"].map(|cidr| cidr.parse().expect("cidr")).to_vec(),
    )
}

/// The objects of most tests: a Service with two endpoints here, one without, one over UDP.
pub fn table() -> ServiceTable {
    let mut table = ServiceTable::new();
    let port = |node_port: u16, protocol: &str| json!([{"port": 80, "nodePort": node_port, "protocol": protocol}]);
    let both: Vec<(&str, &str)> = PODS.iter().map(|pod| (*pod, "node-1")).collect();
    let objects = [
        service("web", json!({"type": "NodePort", "ports": port(30007, "TCP")})),
        service("empty", json!({"clusterIPs": ["10.96.0.11"], "type": "NodePort", "ports": port(30011, "TCP")})),
        service("names", json!({"clusterIPs": ["10.96.0.12"], "type": "NodePort", "ports": port(30012, "UDP")})),
        service("away", json!({"clusterIPs": ["10.96.0.13"], "internalTrafficPolicy": "Local"})),
        service(
            "near",
            json!({"clusterIPs": ["10.96.0.14"], "type": "NodePort", "ports": port(30014, "TCP"),
            "externalTrafficPolicy": "Local"}),
        ),
        service("sticky", json!({"clusterIPs": ["10.96.0.15"], "sessionAffinity": "ClientIP"})),
        service("six", json!({"clusterIPs": ["fd00:10:96::17"], "type": "NodePort", "ports": port(30017, "TCP")})),
        service("sticky6", json!({"clusterIPs": ["fd00:10:96::18"], "sessionAffinity": "ClientIP"})),
        service(
            "mute",
            json!({"clusterIPs": ["10.96.0.20", "fd00:10:96::20"], "type": "NodePort", "ports": port(30020, "UDP")}),
        ),
        service("none6", json!({"clusterIPs": ["fd00:10:96::19"]})),
    ];
    for object in objects {
        table.upsert_service(&object).expect("service");
    }
    for (name, protocol) in [("web", "TCP"), ("names", "UDP"), ("near", "TCP"), ("sticky", "TCP"), ("closed", "TCP")] {
        table.upsert_slice(&slice(name, 8080, protocol, &both)).expect("slice");
    }
    // For outside clients of one network only, and one node's looped packets.
    let mut closed: serde_json::Value = serde_json::from_slice(&service(
        "closed",
        json!({
        "clusterIPs": ["10.96.0.16"], "type": "LoadBalancer", "ports": port(30016, "TCP"),
        "loadBalancerSourceRanges": ["203.0.113.0/24", "203.0.113.0/25", "192.0.2.0/24"]}),
    ))
    .expect("json");
    closed["status"] = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}});
    table.upsert_service(closed.to_string().as_bytes()).expect("service");
    let both: Vec<(&str, &str)> = PODS6.iter().map(|pod| (*pod, "node-1")).collect();
    for name in ["six", "sticky6"] {
        table.upsert_slice(&slice(name, 8080, "TCP", &both)).expect("slice");
    }
    table.upsert_slice(&slice("away", 8080, "TCP", &[("10.244.1.5", "node-2")])).expect("slice");
    table.set_synced();
    table
}

pub fn commit_all<D: Dataplane>(dataplane: &mut D, table: &ServiceTable) {
    let node = node_view();
    let changes: Vec<_> = table
        .frontends()
        .map(|frontend| Change { id: frontend.id, before: None, after: Some(D::entries(frontend, &node)) })
        .collect();
    dataplane.commit(Some(&D::base(&node)), &changes).expect("commit");
}

/// What every mode must do with real packets.
pub fn packets(world: &World, mode: Mode) {
    let pods: Vec<IpAddr> = PODS.iter().map(|pod| pod.parse().expect("address")).collect();
    let client: IpAddr = CLIENT.parse().expect("address");
    // Both endpoints answer, from everywhere.
    for (from, to) in [
        (&world.client, "192.168.49.2:30007"),
        (&world.client, "10.96.0.10:80"),
        (&world.node, "10.96.0.10:80"),
        (&world.node, "192.168.49.2:30007"),
        (&world.pods[0], "10.96.0.10:80"),
        (&world.pods[1], "192.168.49.2:30007"),
        (&world.client, "[fd00:c0a8:31::2]:30017"),
        (&world.client, "[fd00:10:96::17]:80"),
        (&world.node, "[fd00:10:96::17]:80"),
        (&world.pods[0], "[fd00:10:96::17]:80"),
    ] {
        let mut answers = [0; 2];
        for _ in 0..40 {
            let (pod, _) = tcp(from, to).unwrap_or_else(|error| panic!("{to}: {error}"));
            answers[pod] += 1;
        }
        assert!(answers.iter().all(|count| *count >= 5), "{to} was not balanced: {answers:?}");
    }
    // A pod that reaches itself is masqueraded, one that reaches the other is not.
    for _ in 0..20 {
        let (pod, seen) = tcp(&world.pods[0], "10.96.0.10:80").expect("answer");
        // A socket that is sent to its own pod needs no translation at all.
        assert_eq!(seen == pods[0], pod != 0 || mode == Mode::Ebpf, "pod {pod} saw {seen}");
    }
    // Outside traffic is masqueraded under policy Cluster and keeps its source under Local.
    assert_ne!(tcp(&world.client, "192.168.49.2:30007").expect("answer").1, client);
    assert_eq!(tcp(&world.client, "192.168.49.2:30014").expect("answer").1, client);
    assert_ne!(tcp(&world.client, "10.96.0.10:80").expect("answer").1, client);
    assert_ne!(tcp(&world.node, "10.96.0.10:80").expect("answer").1, "127.0.0.1".parse::<IpAddr>().expect("address"));
    // Nobody there: refused at once. Somebody, but not here: silence.
    let refused = Err(std::io::ErrorKind::ConnectionRefused);
    for from in [&world.client, &world.node, &world.pods[0]] {
        for to in ["10.96.0.11:80", "192.168.49.2:30011"] {
            assert_eq!(tcp_within(from, to, 3_000), refused, "{to} from {}", from.path);
        }
        assert_eq!(tcp(from, "10.96.0.13:80"), Err(std::io::ErrorKind::TimedOut));
    }
    // A refusal that arrives while `connect` still holds the socket counts only when the SYN is repeated.
    assert_eq!(tcp_within(&world.pods[0], "[fd00:10:96::19]:80", 3_000), refused);
    // Only some may use the load balancer's address; the node port is for all.
    assert!(tcp(&world.client, "198.51.100.7:80").is_ok());
    assert_eq!(tcp(&world.pods[0], "198.51.100.7:80"), Err(std::io::ErrorKind::TimedOut));
    assert!(tcp(&world.pods[0], "192.168.49.2:30016").is_ok());
    // UDP.
    assert_eq!(udp(&world.client, "192.168.49.2:30012", 0).map(|_| ()), Ok(()));
    assert_eq!(udp(&world.pods[0], "10.96.0.12:80", 0).map(|_| ()), Ok(()));
    // A client stays where it was.
    for to in ["10.96.0.15:80", "[fd00:10:96::18]:80"] {
        let (first, _) = tcp(&world.pods[0], to).expect("answer");
        for _ in 0..20 {
            assert_eq!(tcp(&world.pods[0], to).expect("answer").0, first);
        }
    }
}

#[test]
fn nftables_carries_real_packets() {
    let world = World::new();
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let open = || Nftables::new(Socket::open(Some(namespace.as_fd())).expect("socket"));
    let table = table();
    let mut dataplane = open();
    dataplane.read().expect("read");
    commit_all(&mut dataplane, &table);
    let text = world.node.command("nft", "list table inet fairlead");
    assert!(!text.contains("BUG") && text.contains("map @slots4"), "nft cannot print the table:\n{text}");
    packets(&world, Mode::Nftables);
    // An address nobody has, and a port nobody has.
    assert_eq!(tcp(&world.pods[0], "10.96.7.7:80"), Err(std::io::ErrorKind::TimedOut));
    assert_eq!(tcp(&world.pods[0], "10.96.0.10:81"), Err(std::io::ErrorKind::ConnectionRefused));
    // A restart finds everything and changes nothing.
    let mut again = open();
    let seed = again.read().expect("read");
    assert_eq!(seed.slots.values().map(Vec::len).max(), Some(2));
    let before = world.node.command("nft", "list table inet fairlead");
    commit_all(&mut again, &table);
    let strip = |text: &str| text.lines().filter(|line| !line.contains("expires")).collect::<Vec<_>>().join("\n");
    assert_eq!(strip(&before), strip(&world.node.command("nft", "list table inet fairlead")));
}

#[test]
fn iptables_carries_real_packets() {
    for variant in ["nft", "legacy"] {
        let world = World::new();
        // kubelet's hint is how a node says which variant it uses.
        world.node.command(&format!("iptables-{variant}"), "-t mangle -N KUBE-IPTABLES-HINT");
        let namespace = || std::fs::File::open(&world.node.path).expect("namespace").into();
        let mut dataplane = Iptables::new(Tools::open(Some(namespace())).expect("tools"));
        assert!(dataplane.about().starts_with(&format!("iptables-{variant}-save")));
        let table = table();
        dataplane.read().expect("read");
        commit_all(&mut dataplane, &table);
        if std::env::var_os("SHOW").is_some() {
            println!("{}", world.node.command(&format!("iptables-{variant}-save"), ""));
        }
        packets(&world, Mode::Iptables);
        assert!(tcp(&world.node, "127.0.0.1:30007").is_ok());
        // Again from the start: nothing is doubled.
        let save = || world.node.command(&format!("iptables-{variant}-save"), "");
        let rules =
            |text: &str| text.lines().filter(|line| line.starts_with('-')).map(str::to_owned).collect::<Vec<_>>();
        let before = rules(&save());
        dataplane.read().expect("read");
        commit_all(&mut dataplane, &table);
        assert_eq!(before, rules(&save()));
        // Without Services no chain of one is left.
        dataplane.commit(Some(&Iptables::<Tools>::base(&node_view())), &[]).expect("commit");
        assert!(!save().contains("KUBE-SVC-") && !save().contains("KUBE-SEP-"));
    }
}

#[test]
fn ebpf_carries_real_packets() {
    let world = World::with_ebpf(true);
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let hooks = world.hooks().expect("hooks");
    let open = || Ebpf::new(Pinned::open(OBJECT, LAYOUT, hooks.clone(), Some(namespace.as_fd())).expect("open"));
    let table = table();
    let mut dataplane = open();
    dataplane.read().expect("read");
    commit_all(&mut dataplane, &table);
    packets(&world, Mode::Ebpf);
    assert_eq!(tcp(&world.pods[0], "10.96.7.7:80"), Err(std::io::ErrorKind::TimedOut));
    assert_eq!(tcp(&world.pods[0], "10.96.0.10:81"), Err(std::io::ErrorKind::ConnectionRefused));
    let refused = Err(std::io::ErrorKind::ConnectionRefused);
    for to in ["10.96.0.20:80", "192.168.49.2:30020", "[fd00:10:96::20]:80", "[fd00:c0a8:31::2]:30020"] {
        for from in [&world.client, &world.node, &world.pods[0]] {
            assert_eq!(udp(from, to, 0).map(drop), refused, "{to} over UDP from {}", from.path);
        }
    }
    // A socket believes that its peer is whom it asked for.
    let peer = world.pods[0].run(|| TcpStream::connect("10.96.0.10:80").and_then(|stream| stream.peer_addr()));
    assert_eq!(peer.expect("peer"), "10.96.0.10:80".parse().expect("address"));
    // A restart finds everything.
    drop(dataplane);
    assert!(tcp(&world.pods[1], "10.96.0.10:80").is_ok(), "programs go on while nobody is there");
    let mut again = open();
    let seed = again.read().expect("read");
    assert_eq!(seed.slots.values().map(Vec::len).max(), Some(2));
    commit_all(&mut again, &table);
    packets(&world, Mode::Ebpf);
}

/// An outside client whose endpoint refuses is not told, but sent to another one when it repeats its SYN.
#[test]
fn ebpf_tries_another_endpoint() {
    let world = World::with_ebpf(false);
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let hooks = world.hooks().expect("hooks");
    let pinned = Pinned::open(OBJECT, LAYOUT, hooks, Some(namespace.as_fd())).expect("open");
    let mut dataplane = Ebpf::new(pinned);
    let spec = |node_port: u16, ip: &str, affinity: &str| {
        let ports = json!([{"port": 80, "nodePort": node_port, "protocol": "TCP"}]);
        json!({"clusterIPs": [ip], "type": "NodePort", "ports": ports, "sessionAffinity": affinity})
    };
    let mut table = ServiceTable::new();
    table.upsert_service(&service("half", spec(30021, "10.96.0.21", "None"))).expect("service");
    table.upsert_service(&service("none", spec(30022, "10.96.0.22", "ClientIP"))).expect("service");
    // Nobody listens on the node's own 8080 and 8081.
    table.upsert_slice(&slice("half", 8080, "TCP", &[(PODS[0], "node-1"), (NODE, "node-1")])).expect("slice");
    table.upsert_slice(&slice("none", 8081, "TCP", &[(PODS[0], "node-1"), (NODE, "node-1")])).expect("slice");
    table.set_synced();
    commit_all(&mut dataplane, &table);
    // Every other connection meets the endpoint that refuses.
    for _ in 0..5 {
        assert_eq!(tcp_within(&world.client, "192.168.49.2:30021", 5_000).map(|(pod, _)| pod), Ok(0));
    }
    // If nobody answers, the client is told in the end.
    assert_eq!(tcp_within(&world.client, "192.168.49.2:30022", 5_000), Err(std::io::ErrorKind::ConnectionRefused));
}

/// As `nftables_takes_thousands_of_services`.
#[test]
fn ebpf_takes_thousands_of_services() {
    let world = World::with_ebpf(false);
    let namespace = std::fs::File::open(&world.node.path).expect("namespace");
    let hooks = world.hooks().expect("hooks");
    let open = || Ebpf::new(Pinned::open(OBJECT, LAYOUT, hooks.clone(), Some(namespace.as_fd())).expect("open"));
    let mut table = ServiceTable::new();
    let add = |table: &mut ServiceTable, number: usize| {
        let ip = format!("10.{}.{}.{}", 96 + number / 65_536, number / 256 % 256, number % 256);
        let pods: Vec<String> = (0..5).map(|pod| format!("10.244.{}.{pod}", number % 250)).collect();
        let pods: Vec<(&str, &str)> = pods.iter().map(|pod| (pod.as_str(), "node-2")).collect();
        let name = format!("s{number}");
        table.upsert_service(&service(&name, json!({"clusterIPs": [ip]}))).expect("service");
        table.upsert_slice(&slice(&name, 8080, "TCP", &pods)).expect("slice").frontends
    };
    for number in 1..=5_000 {
        add(&mut table, number);
    }
    table.set_synced();
    let mut dataplane = open();
    dataplane.read().expect("read");
    let start = std::time::Instant::now();
    commit_all(&mut dataplane, &table);
    println!("5,000 Services in {:?}", start.elapsed());
    let node = node_view();
    let start = std::time::Instant::now();
    for number in 5_001..=5_020 {
        let frontends = add(&mut table, number);
        let after = frontends[0].after.as_ref().map(|after| Ebpf::<Pinned>::entries(after, &node));
        dataplane.commit(None, &[Change { id: frontends[0].id, before: None, after }]).expect("commit");
    }
    println!("one more in {:?}", start.elapsed() / 20);
    let start = std::time::Instant::now();
    let seed = open().read().expect("read");
    println!("read back in {:?}", start.elapsed());
    assert_eq!((seed.ids.len(), seed.slots.len()), (5_020, 5_020));
    assert!(seed.slots.values().all(|slots| slots.len() == 5));
}

/// A batch of many thousand elements goes through, reads back whole, and one more Service stays cheap.
#[test]
fn nftables_takes_thousands_of_services() {
    let namespace = Namespace::new();
    let file = std::fs::File::open(&namespace.path).expect("namespace");
    let open = || Nftables::new(Socket::open(Some(file.as_fd())).expect("socket"));
    let mut table = ServiceTable::new();
    let add = |table: &mut ServiceTable, number: usize| {
        let name = format!("s{number}");
        let ip = format!("10.{}.{}.{}", 96 + number / 65_536, number / 256 % 256, number % 256);
        let pods = [format!("10.244.{}.{}", number / 250 % 250, number % 250), format!("10.245.{}.9", number % 250)];
        let pods: Vec<(&str, &str)> = pods.iter().map(|pod| (pod.as_str(), "node-2")).collect();
        table.upsert_service(&service(&name, json!({"clusterIPs": [ip]}))).expect("service");
        table.upsert_slice(&slice(&name, 8080, "TCP", &pods)).expect("slice").frontends
    };
    for number in 1..=5_000 {
        add(&mut table, number);
    }
    table.set_synced();
    let mut dataplane = open();
    dataplane.read().expect("read");
    let start = std::time::Instant::now();
    commit_all(&mut dataplane, &table);
    println!("5,000 Services in {:?}", start.elapsed());
    let node = node_view();
    let start = std::time::Instant::now();
    for number in 5_001..=5_020 {
        let frontends = add(&mut table, number);
        let after = frontends[0].after.as_ref().map(|after| Nftables::<Socket>::entries(after, &node));
        dataplane.commit(None, &[Change { id: frontends[0].id, before: None, after }]).expect("commit");
    }
    println!("one more in {:?}", start.elapsed() / 20);
    let start = std::time::Instant::now();
    let seed = open().read().expect("read");
    println!("read back in {:?}", start.elapsed());
    assert_eq!((seed.ids.len(), seed.slots.len()), (5_020, 5_020));
    assert!(seed.slots.values().all(|slots| slots.len() == 2));
}

/// The kernel refuses a batch because of one element: the error names that one, and nothing was applied.
#[test]
fn a_refusal_names_the_element() {
    let namespace = Namespace::new();
    let file = std::fs::File::open(&namespace.path).expect("namespace");
    let mut nft = Socket::open(Some(file.as_fd())).expect("socket");
    let map = nft::Set::map("m", &[nft::DataType::Mark], &[nft::DataType::Mark]);
    let element = |key: u32, value: u32| nft::Element {
        key: nft::Key::new([nft::Datum::Mark(key)]),
        end: None,
        data: nft::ElementData::Value(nft::Key::new([nft::Datum::Mark(value)])),
    };
    let add = |elements: Vec<nft::Element>| {
        let mut transaction = nft::Transaction::new(nft::Family::Inet, "t");
        transaction.push(nft::Op::AddTable { comment: None });
        transaction.push(nft::Op::AddSet(map.clone()));
        transaction.push(nft::Op::AddElements { set: "m".into(), elements });
        transaction
    };
    nft.commit(&add((0..3_000).map(|key| element(key, key)).collect())).expect("commit");
    let mut more: Vec<nft::Element> = (3_000..6_000).map(|key| element(key, key)).collect();
    more.insert(2_000, element(0x123, 7));
    let error = nft.commit(&add(more)).expect_err("refused").to_string();
    assert!(error.contains("add element inet t m { 0x00000123 : 0x00000007 }"), "{error}");
    let mut held = nft.elements(nft::Family::Inet, "t", &map).expect("list");
    held.sort();
    assert_eq!(held, (0..3_000).map(|key| element(key, key)).collect::<Vec<_>>());
    let absent = nft.elements(nft::Family::Inet, "none", &map).expect_err("no such table");
    assert!(absent.is_absent(), "{absent}");
}
