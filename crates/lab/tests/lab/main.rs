//! Real namespaces, real packets: a lab carries traffic on every path, survives being made twice, and leaves nothing.
//!
//! Needs root. Each test has a data directory of its own, hence names of its own, and cleans up also when it fails.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lab::{Lab, LabConfig, LabError, id_of};
use linux::cgroup_v1v2::{CgroupTree, Hierarchies};
use linux::link::{Address, Item, Links, Veth};
use linux::mntns::mountinfo;
use linux::netns::Netns;

/// A data directory and its cluster, both gone at the end of the test.
struct Ground {
    dir: PathBuf,
    id: String,
}

impl Ground {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("fairlead-lab-{}-{test}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary directory");
        let id = id_of(&dir).expect("an id");
        Self { dir, id }
    }

    fn config(&self, nodes: u32) -> LabConfig {
        LabConfig::new(&self.dir, nodes)
    }

    /// What is left of the cluster anywhere on the machine.
    fn traces(&self) -> Vec<String> {
        let mounts = mountinfo().expect("mountinfo");
        let mut found: Vec<String> = mounts
            .iter()
            .map(|mount| mount.point.display().to_string())
            .filter(|point| point.contains(&self.id))
            .collect();
        let hierarchies = Hierarchies::mounted().expect("hierarchies");
        for root in hierarchies.v1.iter().chain(&hierarchies.named).chain(&hierarchies.v2) {
            let directory = root.join(format!("fairlead-{}", self.id));
            found.extend(directory.exists().then(|| directory.display().to_string()));
        }
        let run_dir = Path::new("/run/fairlead").join(&self.id);
        found.extend(run_dir.exists().then(|| run_dir.display().to_string()));
        found
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let ended = Lab::destroy(&self.id);
        let removed = fs::remove_dir_all(&self.dir);
        if !std::thread::panicking() {
            ended.expect("the lab ends");
            removed.expect("the data directory goes");
        }
    }
}

/// Connects from one namespace to a listener in another and returns the client's address as the server sees it.
fn talk_tcp(from: &Netns, to: &Netns, address: IpAddr) -> IpAddr {
    let listener = to.tcp_listen(SocketAddr::new(address, 0)).expect("a listener");
    listener.set_nonblocking(false).expect("a blocking listener");
    let target = listener.local_addr().expect("its address");
    std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            let (mut stream, peer) = listener.accept().expect("a client");
            stream.write_all(b"welcome").expect("a greeting");
            peer.ip()
        });
        let greeting = from.run(|| {
            let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5)).expect("a connection");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("the greeting");
            text
        });
        assert_eq!(greeting.expect("a thread in the namespace"), "welcome");
        server.join().expect("the server")
    })
}

fn talk_udp(from: &Netns, to: &Netns, address: IpAddr) {
    let server = to.udp_bind(SocketAddr::new(address, 0)).expect("a server socket");
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = from.udp_bind(any.parse().expect("an address")).expect("a client socket");
    for socket in [&server, &client] {
        socket.set_nonblocking(false).expect("a blocking socket");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a limit");
    }
    let receive = |socket: &UdpSocket| {
        let mut buffer = [0; 16];
        let (length, peer) = socket.recv_from(&mut buffer).expect("a datagram");
        (buffer[..length].to_vec(), peer)
    };
    client.send_to(b"ping", server.local_addr().expect("its address")).expect("sent");
    let (question, peer) = receive(&server);
    server.send_to(b"pong", peer).expect("answered");
    assert_eq!((question, receive(&client).0), (b"ping".to_vec(), b"pong".to_vec()));
}

/// A bystander that lives until it is killed.
fn sleeper(tree: &CgroupTree) -> Child {
    let child = Command::new("sleep").arg("1000").spawn().expect("sleep starts");
    tree.enter(child.id()).expect("into the cgroup");
    child
}

#[test]
fn every_place_reaches_every_other_in_both_families_and_nothing_is_left() {
    let ground = Ground::new("paths");
    assert_eq!(ground.traces(), Vec::<String>::new());
    let lab = Lab::create(ground.config(2)).expect("a lab");
    let [one, two] = lab.nodes() else { panic!("two nodes") };
    let (one_ns, two_ns) = (one.namespace().expect("node-1"), two.namespace().expect("node-2"));
    let (switch, outside) = (lab.switch().expect("switch"), lab.outside().expect("outside"));
    assert_eq!(two.ipv4.map(|ip| ip.to_string()), Some("192.168.49.3".into()));
    assert_eq!(two.ipv6.map(|ip| ip.to_string()), Some("fd00:c0a8:31::3".into()));
    for (mine, its) in one.addresses().into_iter().zip(two.addresses()) {
        assert_eq!(talk_tcp(&one_ns, &two_ns, its), mine);
        talk_udp(&one_ns, &two_ns, its);
    }
    for ((router, client), its) in lab.plan().switch.iter().zip(&lab.plan().outside).zip(one.addresses()) {
        assert_eq!(talk_tcp(&outside, &one_ns, its), client.addr());
        talk_udp(&outside, &one_ns, its);
        talk_udp(&one_ns, &outside, client.addr());
        assert_eq!(talk_tcp(&two_ns, &switch, router.addr()).is_ipv4(), router.addr().is_ipv4());
    }
    assert_eq!(lab.host().expect("the host's namespace"), Netns::current().expect("this one"));
    drop((one_ns, two_ns, switch, outside));
    Lab::destroy(lab.id()).expect("it ends");
    assert_eq!(ground.traces(), Vec::<String>::new());
    Lab::destroy(lab.id()).expect("ending twice is fine");
}

#[test]
fn making_it_again_keeps_what_runs_and_ending_it_kills_that() {
    let ground = Ground::new("again");
    let lab = Lab::create(ground.config(1)).expect("a lab");
    let node = lab.node("node-1").expect("node-1").clone();
    let mut child = sleeper(&CgroupTree::new(node.process_cgroup()).expect("its tree"));
    lab.record("node-1", child.id()).expect("recorded");
    let before = node.namespace().expect("its namespace");

    let again = Lab::create(ground.config(2)).expect("the same lab, and a node more");
    assert_eq!(again.nodes().len(), 2);
    assert_eq!(again.node("node-1").expect("node-1").namespace().expect("its namespace"), before);
    assert!(
        again.processes().expect("processes").iter().any(|process| process.pid == child.id() && process.is_alive())
    );
    assert_eq!(node.tree().expect("tree").pids().expect("pids"), [child.id().cast_signed()]);
    assert!(matches!(Lab::create(ground.config(1)), Err(LabError::Changed { .. })));
    assert!(Lab::list().expect("a list").iter().any(|(id, cluster)| *id == ground.id && cluster.is_some()));
    assert_eq!(Lab::open(&ground.id).expect("open").nodes().len(), 2);

    Lab::destroy(&ground.id).expect("it ends");
    let status = child.wait().expect("it has ended");
    assert!(!status.success());
    assert_eq!(ground.traces(), Vec::<String>::new());
}

#[test]
fn a_half_made_lab_is_ended_and_can_be_completed() {
    let ground = Ground::new("half");
    // As after kill -9 in the middle: a pin that is still a plain file, one namespace, one cgroup, no description.
    let pins = Path::new("/run/fairlead").join(&ground.id).join("ns");
    fs::create_dir_all(&pins).expect("the directory of pins");
    fs::write(pins.join("lab"), "").expect("a file without a namespace");
    Netns::create(&pins.join("node-1")).expect("a namespace");
    let tree = CgroupTree::new(format!("fairlead-{}/node-1/agent", ground.id)).expect("a tree");
    tree.create().expect("cgroups");
    let mut child = sleeper(&tree);
    assert!(Lab::list().expect("a list").iter().any(|(id, cluster)| *id == ground.id && cluster.is_none()));

    Lab::destroy(&ground.id).expect("it ends");
    child.wait().expect("it has ended");
    assert_eq!(ground.traces(), Vec::<String>::new());

    fs::create_dir_all(&pins).expect("the directory of pins");
    fs::write(pins.join("lab"), "").expect("a file without a namespace");
    let lab = Lab::create(ground.config(1)).expect("completed");
    let node = lab.node("node-1").expect("node-1");
    let address = node.addresses()[0];
    talk_udp(&lab.switch().expect("switch"), &node.namespace().expect("node-1"), address);
}

#[test]
fn a_program_in_a_node_sees_its_network_its_cgroup_and_a_run_of_its_own() {
    let ground = Ground::new("enter");
    let lab = Lab::create(ground.config(1)).expect("a lab");
    let script = "cat /proc/self/cgroup; ls /run; ls /run/fairlead; echo made-inside > /run/inside; exit 7";
    let entry = lab.node("node-1").expect("node-1").entry();
    let mut line = entry.arguments();
    line.extend(["--", "sh", "-c", script].map(std::ffi::OsString::from));
    let line: Vec<_> = line.iter().map(|part| part.to_str().expect("our own words")).collect();
    // The test binary plays the part of the program: its test `entered` becomes the command.
    let output = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "entered", "--nocapture"])
        .env("FAIRLEAD_LAB_TEST_ENTER", line.join("\n"))
        .stdin(Stdio::null())
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("/fairlead-{}/node-1/agent", ground.id)), "{text}");
    assert!(text.lines().any(|line| line == "lock") && text.lines().any(|line| line == ground.id), "{text}");
    assert!(!Path::new("/run/inside").exists());
    assert!(matches!(lab.entry("node-9"), Err(LabError::NoSuchNode { .. })));
    assert!(matches!(Lab::open("00000000"), Err(LabError::NoSuchCluster(_))));
}

/// Not a test of its own: see the one above.
#[test]
fn entered() {
    if let Ok(line) = std::env::var("FAIRLEAD_LAB_TEST_ENTER") {
        let Err(error) = linux::enter::main(line.split('\n').map(Into::into));
        panic!("{error}");
    }
}

/// A machine of the test's own, connected to a world: the real one's interfaces are not ours to touch.
struct Machine {
    dir: PathBuf,
    host: Netns,
    world: Netns,
}

impl Machine {
    fn new(ground: &Ground) -> Self {
        let dir = ground.dir.join("machine");
        let host = Netns::create(&dir.join("host")).expect("a namespace for the machine");
        let world = Netns::create(&dir.join("world")).expect("a namespace for the world");
        let veth =
            Veth { name: "eth0".into(), peer: "eth0".into(), peer_netns: world.clone(), peer_mac: None, mtu: None };
        let address =
            |text: &str| Item::Address(Address { link: "eth0".into(), address: text.parse().expect("literal") });
        let up = || Item::Up("eth0".into());
        let world_end = [up(), address("198.51.100.9/24"), address("2001:db8:51::9/64")];
        for namespace in [&host, &world] {
            let settings = [
                ("net/ipv6/conf/all/disable_ipv6", "0"),
                ("net/ipv6/conf/all/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
            ];
            namespace.sysctls(&settings).expect("settings");
        }
        let links = Links::open(&host).expect("links of the machine");
        links
            .ensure_all(&[Item::Veth(veth), up(), address("198.51.100.1/24"), address("2001:db8:51::1/64")])
            .expect("made");
        Links::open(&world).expect("links of the world").ensure_all(&world_end).expect("made");
        Self { dir, host, world }
    }

    /// Links and tables of ours on the machine.
    fn traces(&self) -> Vec<String> {
        let links = Links::open(&self.host).and_then(|links| links.links()).expect("links");
        let tables = self.host.run(|| Command::new("nft").args(["list", "tables"]).output()).expect("a thread");
        let tables = String::from_utf8(tables.expect("nft").stdout).expect("text");
        let links = links.into_iter().map(|link| link.name).filter(|name| name.starts_with("fl-"));
        links.chain(tables.lines().map(str::to_owned)).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for name in ["host", "world"] {
            // A test that failed already says why; whatever else is left goes with the namespace.
            let _ = Netns::remove(&self.dir.join(name));
        }
    }
}

#[test]
fn an_uplink_leads_to_the_world_and_goes_with_the_lab() {
    let ground = Ground::new("uplink");
    let machine = Machine::new(&ground);
    let mut config = ground.config(1);
    config.uplink = true;
    let create = || machine.host.run(|| Lab::create(config.clone())).expect("a thread in the machine");
    assert!(matches!(create(), Err(LabError::NoForwarding)));
    machine.host.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")]).expect("forwards");
    let lab = create().expect("a lab");
    // Made twice is made once.
    create().expect("the same lab");
    assert_eq!(machine.traces().len(), 2, "{:?}", machine.traces());
    let node = lab.nodes()[0].namespace().expect("node-1");
    for (world, seen) in [("198.51.100.9", "198.51.100.1"), ("2001:db8:51::9", "2001:db8:51::1")] {
        let peer = talk_tcp(&node, &machine.world, world.parse().expect("literal"));
        assert_eq!(peer, seen.parse::<IpAddr>().expect("literal"), "the node comes as the machine");
    }
    // Inside, nobody is masqueraded.
    let outside = lab.outside().expect("outside");
    let peer = talk_tcp(&node, &outside, "203.0.113.9".parse().expect("literal"));
    assert_eq!(peer, lab.nodes()[0].addresses()[0]);
    Lab::destroy(lab.id()).expect("it ends");
    assert_eq!(machine.traces(), Vec::<String>::new());
}
