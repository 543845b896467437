//! Endpoints on another node answer clients past the node that these came to: two nodes with programs, a pod on the second,
//! a client with a link to each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use linux::bpf::Fake;
use linux::nft::{Fate, Packet};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};
use proxy::dataplane::Dataplane;
use proxy::dataplane::ebpf::{Ebpf, LAYOUTS, Way};
use proxy::{Hooks, Mode, NodeView, Taker, Watching};
use std::os::fd::AsRawFd;

use crate::case::Objects;
use crate::cases::fates;
use crate::cgroup::Attached;
use crate::live::Running;
use crate::modes::whole;
use crate::net::Namespace;

const CLIENT: [&str; 2] = ["203.0.113.9", "2001:db8:203::9"];
const A: [&str; 2] = ["192.168.49.2", "fd00:c0a8:31::2"];
const B: [&str; 2] = ["192.168.49.3", "fd00:c0a8:31::3"];
const POD: [&str; 2] = ["10.244.1.5", "fd00:10:244:1::5"];
const BALANCER: [&str; 2] = ["198.51.100.7", "2001:db8:198::7"];
const SERVED: u16 = 8080;
/// Nobody listens there.
const CLOSED: u16 = 9;
const TCP_PORT: u16 = 30_080;
const UDP_PORT: u16 = 30_053;
/// What a client reads in one piece, far more than the headers of all its packets.
const BULK: usize = 2_000_000;
const PATIENCE: Duration = Duration::from_secs(5);

/// The Services, and what a node knows of itself and the other one.
fn objects(own: &str, takers: &[(&str, [&str; 2], bool)], options: &str) -> Objects {
    let mut lines = Vec::new();
    for (name, ip, port, protocol, node_port, served) in [
        ("web", 10, 80, "TCP", TCP_PORT, SERVED),
        ("names", 11, 53, "UDP", UDP_PORT, SERVED),
        ("closed", 12, 81, "TCP", TCP_PORT + 100, CLOSED),
        ("mute", 13, 54, "UDP", UDP_PORT + 100, CLOSED),
    ] {
        let ips = format!("10.96.0.{ip},fd00:10:96::{ip}");
        lines.push(format!(
            "service {name} {ips} {port}/{protocol} nodePort={node_port} balancer={} {options}",
            BALANCER.join(",")
        ));
        lines.push(format!("endpoint {name} {}:{served} node-2", POD[0]));
        lines.push(format!("endpoint {name} [{}]:{served} node-2", POD[1]));
    }
    let mut objects = Objects::parse(&lines);
    let address = |text: &&str| text.parse::<IpAddr>().expect("address");
    let node = &mut objects.node;
    node.place.node = own.into();
    node.addresses = if own == "node-1" { &A } else { &B }.iter().map(address).collect();
    let taker = |(name, addresses, by_default): &(&str, [&str; 2], bool)| {
        let taker = Taker { addresses: addresses.iter().map(address).collect(), by_default: *by_default };
        ((*name).into(), taker)
    };
    node.takers = takers.iter().map(taker).collect();
    objects
}

const NODE_1: (&str, [&str; 2], bool) = ("node-1", A, false);
const NODE_2: (&str, [&str; 2], bool) = ("node-2", B, false);

struct World {
    client: Namespace,
    a: Namespace,
    b: Namespace,
    pod: Namespace,
    attached: [Attached; 2],
}

/// A link between two, each of which has these addresses, its own of both families first.
fn link(one: (&Namespace, &str, u8, &[&str]), other: (&Namespace, &str, u8, &[&str])) {
    one.0.ip(&format!("link add {} type veth peer name {} netns {}", one.1, other.1, other.0.path));
    for ((namespace, name, host, own), (.., far, routes)) in [(one, other), (other, one)] {
        namespace.ip(&format!("link set {name} up"));
        namespace.ip(&format!("addr add 169.254.1.{host} peer 169.254.1.{far}/32 dev {name}"));
        namespace.ip(&format!("addr add fe80::{host}/64 dev {name} nodad"));
        for route in routes {
            let via = if route.contains(':') { format!("fe80::{far}") } else { format!("169.254.1.{far}") };
            let source = own[usize::from(route.contains(':'))];
            namespace.ip(&format!("route replace {route} via {via} dev {name} onlink src {source}"));
        }
    }
}

impl World {
    fn new(bridge_netfilter: bool) -> Self {
        let attached = [Attached::new(), Attached::new()];
        let (client, a, b, pod) = (Namespace::new(), Namespace::new(), Namespace::new(), Namespace::new());
        for (node, attached) in [&a, &b].into_iter().zip(&attached) {
            attached.add(node.thread_id);
            node.sysctl("net/ipv4/ip_forward", "1");
            node.sysctl("net/ipv6/conf/all/forwarding", "1");
            for table in ["iptables", "ip6tables"] {
                let value = if bridge_netfilter { "1" } else { "0" };
                node.sysctl(&format!("net/bridge/bridge-nf-call-{table}"), value);
            }
            // Connection tracking, as podnet and a node's firewall have it: neither may be misled.
            let rules = "add table inet pods; add chain inet pods out { type nat hook postrouting priority 101; }; \
                add rule inet pods out ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade fully-random; \
                add rule inet pods out ip6 saddr fd00:10:244::/56 ip6 daddr != fd00:10:244::/56 masquerade fully-random; \
                add chain inet pods through { type filter hook forward priority 0; }; \
                add rule inet pods through ct state invalid drop";
            node.command("nft", rules);
        }
        attached[1].add(pod.thread_id);
        for namespace in [&client, &a, &b] {
            for interface in ["all", "default"] {
                namespace.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "2");
                namespace.sysctl(&format!("net/ipv4/conf/{interface}/send_redirects"), "0");
                namespace.sysctl(&format!("net/ipv6/conf/{interface}/accept_dad"), "0");
            }
        }
        for (namespace, addresses) in [(&client, CLIENT), (&a, A), (&b, B)] {
            namespace.ip(&format!("addr add {}/32 dev lo", addresses[0]));
            namespace.ip(&format!("addr add {}/128 dev lo nodad", addresses[1]));
        }
        let to_a = [A[0], A[1], BALANCER[0], BALANCER[1]];
        link((&client, "ca", 1, &CLIENT), (&a, "ac", 2, &to_a));
        link((&client, "cb", 3, &CLIENT), (&b, "bc", 4, &B));
        link((&a, "ab", 5, &A), (&b, "ba", 6, &[B[0], B[1], "10.244.1.0/24", "fd00:10:244:1::/64"]));
        b.ip("link add pods address 02:00:00:00:00:01 type bridge");
        b.ip("link set pods up");
        b.ip("addr add 10.244.1.1/24 dev pods");
        b.ip("addr add fd00:10:244:1::1/64 dev pods nodad");
        b.ip(&format!("link add pod0 type veth peer name eth0 netns {}", pod.path));
        b.ip("link set pod0 master pods");
        b.ip("link set pod0 type bridge_slave hairpin on");
        b.ip("link set pod0 up");
        pod.ip("link set eth0 up");
        pod.ip(&format!("addr add {}/24 dev eth0", POD[0]));
        pod.ip(&format!("addr add {}/64 dev eth0 nodad", POD[1]));
        pod.ip("route add default via 10.244.1.1");
        pod.ip("route add default via fd00:10:244:1::1");
        serve(&pod);
        World { client, a, b, pod, attached }
    }

    fn hooks(&self, node: usize) -> Option<Hooks> {
        Some(self.attached[node].hooks())
    }

    /// Both nodes at work.
    fn start(&self, objects: [Objects; 2]) -> [Running; 2] {
        let [first, second] = objects;
        // Who is to take packets is there first.
        let second = start(&self.b, Mode::Ebpf, second, self.hooks(1));
        [start(&self.a, Mode::Ebpf, first, self.hooks(0)), second]
    }

    /// What the first node has got from the second, in bytes.
    fn passed(&self) -> usize {
        let text = self.a.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").expect("devices"));
        let line = text.lines().find_map(|line| line.trim().strip_prefix("ab:")).expect("the link");
        line.split_whitespace().next().expect("bytes").parse().expect("a number")
    }
}

fn start(node: &Namespace, mode: Mode, objects: Objects, hooks: Option<Hooks>) -> Running {
    let namespace = std::fs::File::open(&node.path).expect("namespace").into();
    let mut running = Running::start_at(Some(namespace), mode, Watching::default(), objects.node.clone(), hooks);
    objects.apply(&mut running.table.write().expect("table"));
    running.change(|table| table.set_synced());
    running
}

/// Waits until the node's proxy has taken this in.
fn tell(running: &Running, node: NodeView) {
    let mut status = running.status.clone();
    let commits = status.borrow().commits;
    running.node.send_replace(node.into());
    running.runtime.block_on(async {
        let told = status.wait_for(|status| status.commits > commits);
        let told = tokio::time::timeout(PATIENCE, told).await.map(|told| told.is_ok());
        assert_eq!(told, Ok(true));
    });
}

/// Tells each client who it is. TCP: and sends and takes as much as is asked for; UDP: answers with as many bytes as it got.
fn serve(pod: &Namespace) {
    let (tcp, udp) =
        pod.run(|| (TcpListener::bind(("::", SERVED)).expect("bind"), UdpSocket::bind(("::", SERVED)).expect("bind")));
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            std::thread::spawn(move || -> std::io::Result<()> {
                writeln!(stream, "{}", stream.peer_addr()?.ip().to_canonical())?;
                let (mut asked, mut bulk) = ([0], vec![7; BULK]);
                loop {
                    stream.read_exact(&mut asked)?;
                    match &asked {
                        b"<" => stream.write_all(&bulk)?,
                        _ => {
                            stream.read_exact(&mut bulk)?;
                            stream.write_all(b".")?;
                        }
                    }
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 4_096];
        while let Ok((size, from)) = udp.recv_from(&mut buffer) {
            let mut text = format!("{} ", from.ip().to_canonical()).into_bytes();
            text.resize(size.max(text.len()), b'.');
            drop(udp.send_to(&text, from));
        }
    });
}

fn at(address: &str, port: u16) -> SocketAddr {
    (address.parse::<IpAddr>().expect("address"), port).into()
}

/// A connection, and whom its endpoint sees.
fn open(from: &Namespace, to: SocketAddr) -> std::io::Result<(TcpStream, String)> {
    from.run(move || {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut text = String::new();
        BufReader::with_capacity(64, &stream).read_line(&mut text)?;
        Ok((stream, text.trim().to_owned()))
    })
}

/// Much in one direction, then in the other.
fn carry(mut stream: &TcpStream) {
    stream.write_all(b"<").expect("sent");
    stream.read_exact(&mut vec![0; BULK]).expect("all of it");
    stream.write_all(b">").expect("sent");
    stream.write_all(&vec![7; BULK]).expect("sent");
    stream.read_exact(&mut [0]).expect("all of it has come");
}

/// Whom the endpoint sees; it answers with as many bytes.
fn ask(socket: &UdpSocket, size: usize) -> std::io::Result<String> {
    socket.send(&vec![b'.'; size])?;
    let mut buffer = [0; 4_096];
    let got = socket.recv(&mut buffer)?;
    assert_eq!(got, size);
    Ok(String::from_utf8_lossy(&buffer[..got]).split(' ').next().unwrap_or_default().to_owned())
}

fn udp_to(from: &Namespace, to: SocketAddr) -> UdpSocket {
    from.run(move || {
        let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }).expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
        socket.connect(to).expect("connected");
        socket
    })
}

/// What a client may ask for, node port first.
fn roads(family: usize, node_port: u16, port: u16) -> [SocketAddr; 2] {
    [at(A[family], node_port), at(BALANCER[family], port)]
}

fn answers_do_not_pass(bridge_netfilter: bool) {
    let world = World::new(bridge_netfilter);
    let [first, second] =
        world.start([objects("node-1", &[NODE_2], "dsr=true"), objects("node-2", &[NODE_1], "dsr=true")]);
    for (family, client) in CLIENT.into_iter().enumerate() {
        for to in roads(family, TCP_PORT, 80) {
            let before = world.passed();
            let (stream, seen) = open(&world.client, to).expect("connected");
            assert_eq!(seen, client, "{to}");
            carry(&stream);
            drop(stream);
            let passed = world.passed() - before;
            assert!(passed < 2_000, "{to}: {passed} bytes of answers passed the first node");
        }
        let (stream, seen) = open(&world.client, at(B[family], TCP_PORT)).expect("connected");
        assert_eq!(seen, client, "by the endpoint's own node");
        carry(&stream);
        for to in roads(family, UDP_PORT, 53) {
            let socket = udp_to(&world.client, to);
            let before = world.passed();
            // The largest that a link takes is too large to be enclosed.
            for size in [50, 1_200, [1_460, 1_440][family], 50] {
                assert_eq!(ask(&socket, size).unwrap_or_else(|error| panic!("{to}, {size}: {error}")), client);
            }
            let passed = world.passed() - before;
            assert!(passed < 1_000, "{to}: {passed} bytes of answers passed the first node");
        }
    }
    first.stop();
    second.stop();
}

#[test]
fn answers_do_not_pass_the_node_that_was_asked() {
    answers_do_not_pass(false);
}

#[test]
fn answers_do_not_pass_it_with_bridge_netfilter() {
    answers_do_not_pass(true);
}

/// Without an agreement of both nodes everything is as without the option.
#[test]
fn a_node_that_does_not_take_is_asked_in_the_ordinary_way() {
    let world = World::new(false);
    let default = [("node-1", A, true), ("node-2", B, true)];
    for (takers, options, is_direct) in [
        (&[][..], "dsr=true", false),
        (&default[1..], "", false),
        (&default[1..], "dsr=false", false),
        (&default[1..], "dsr=true external=Local", false),
        (&default[1..], "dsr=true", true),
    ] {
        let running = world.start([objects("node-1", takers, options), objects("node-2", &default[..1], options)]);
        let to = at(A[0], TCP_PORT);
        if options.contains("Local") {
            assert!(open(&world.client, to).is_err(), "its only endpoint is on another node");
        } else {
            let (stream, seen) = open(&world.client, to).expect("connected");
            assert_eq!(seen == CLIENT[0], is_direct, "{takers:?} {options}: {seen}");
            let before = world.passed();
            carry(&stream);
            assert_eq!(world.passed() - before < BULK, is_direct, "{takers:?} {options}");
        }
        running.into_iter().for_each(Running::stop);
    }
}

/// As long as no Service asks, other nodes are not worth a plan; the first one that does is served with all that is known.
#[test]
fn a_service_may_ask_later() {
    let world = World::new(false);
    let mut nodes = world.start([objects("node-1", &[], ""), objects("node-2", &[], "")]);
    let known = [objects("node-1", &[NODE_2], "dsr=true"), objects("node-2", &[NODE_1], "dsr=true")];
    let to = at(A[0], TCP_PORT);
    for (running, objects) in nodes.iter_mut().zip(&known).rev() {
        tell(running, objects.node.clone());
        assert_ne!(open(&world.client, to).expect("connected").1, CLIENT[0]);
        running.change(|table| {
            let frontends = objects.apply(table).into_iter().flat_map(|changes| changes.frontends).collect();
            services::Changes { frontends, ..services::Changes::default() }
        });
    }
    let (stream, seen) = open(&world.client, to).expect("connected");
    assert_eq!(seen, CLIENT[0]);
    carry(&stream);
    nodes.into_iter().for_each(Running::stop);
}

/// A node that says it takes packets, and does not: the second repetition of a SYN goes the ordinary way.
#[test]
fn a_node_that_takes_nothing_costs_a_while() {
    let world = World::new(false);
    let first = start(&world.a, Mode::Ebpf, objects("node-1", &[NODE_2], "dsr=true"), world.hooks(0));
    let begun = Instant::now();
    let (stream, seen) = open(&world.client, at(A[0], TCP_PORT)).expect("connected");
    let waited = begun.elapsed();
    assert_ne!(seen, CLIENT[0]);
    // Newer clients repeat after one second and another one, older ones after one and then two.
    assert!(waited > Duration::from_millis(1_500) && waited < Duration::from_millis(4_500), "{waited:?}");
    carry(&stream);
    first.stop();
}

/// What an endpoint's node refuses, and what says that an answer was too large, belongs to the flow like its packets.
#[test]
fn errors_are_translated_like_what_they_are_about() {
    let world = World::new(false);
    let [first, second] =
        world.start([objects("node-1", &[NODE_2], "dsr=true"), objects("node-2", &[NODE_1], "dsr=true")]);
    for address in A {
        let begun = Instant::now();
        let refused = open(&world.client, at(address, TCP_PORT + 100)).expect_err("nobody listens").kind();
        assert_eq!(refused, std::io::ErrorKind::ConnectionRefused, "{address}");
        let refused = ask(&udp_to(&world.client, at(address, UDP_PORT + 100)), 9).expect_err("nobody listens").kind();
        assert_eq!(refused, std::io::ErrorKind::ConnectionRefused, "{address}");
        assert!(begun.elapsed() < Duration::from_millis(900), "{address}: {:?}", begun.elapsed());
    }
    let client = udp_to(&world.client, at(A[0], UDP_PORT));
    assert_eq!(ask(&client, 50).expect("answered"), CLIENT[0]);
    // From a router on the way back: fragmentation needed, 1,000 bytes at most.
    let own = client.local_addr().expect("bound");
    let answer = ip_header(17, 0, 1_400, at(A[0], UDP_PORT).ip(), own.ip());
    let mut icmp = [vec![3, 4, 0, 0, 0, 0, 0x03, 0xe8], answer].concat();
    icmp.extend([UDP_PORT, own.port(), 1_400, 0].iter().flat_map(|number| number.to_be_bytes()));
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let to: IpAddr = A[0].parse().expect("address");
    let bytes = [ip_header(1, 0, icmp.len(), own.ip(), to), icmp].concat();
    send_raw(&world.client, bytes, to);
    let begun = Instant::now();
    while !world.pod.command("ip", &format!("route get {}", CLIENT[0])).contains("mtu 1000") {
        assert!(begun.elapsed() < PATIENCE, "the endpoint has not heard of it");
    }
    assert_eq!(ask(&client, 50).expect("answered"), CLIENT[0]);
    first.stop();
    second.stop();
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Of bytes that are even in number.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// `label` is the identification, or the end of the flow label; `size` is that of what follows.
fn ip_header(protocol: u8, label: u16, size: usize, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let [high, low] = label.to_be_bytes();
    let mut bytes = if from.is_ipv6() {
        let size = (size as u16).to_be_bytes();
        vec![0x60, 0, high, low, size[0], size[1], protocol, 64]
    } else {
        let size = (size as u16 + 20).to_be_bytes();
        vec![0x45, 0, size[0], size[1], high, low, 0x40, 0, 64, protocol, 0, 0]
    };
    bytes.extend(octets(from));
    bytes.extend(octets(to));
    if from.is_ipv4() {
        let sum = checksum(&bytes);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// Two headers around a UDP packet, from a client to whom it asked.
fn capsule(outer: [&str; 2], inner: [SocketAddr; 2]) -> Vec<u8> {
    let is_v6 = inner[0].is_ipv6();
    let mut udp: Vec<u8> = [inner[0].port(), inner[1].port(), 13, 0].iter().flat_map(|n| n.to_be_bytes()).collect();
    udp.extend(b"hello");
    if is_v6 {
        // IPv6 has no UDP without a checksum.
        let mut pseudo: Vec<u8> = [octets(inner[0].ip()), octets(inner[1].ip())].concat();
        pseudo.extend([0, 0, 0, 13, 0, 0, 0, 17]);
        pseudo.extend(&udp);
        pseudo.push(0);
        let sum = checksum(&pseudo);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
    }
    let within = [ip_header(17, 0, 13, inner[0].ip(), inner[1].ip()), udp].concat();
    let [from, to] = outer.map(|address| address.parse().expect("address"));
    [ip_header(if is_v6 { 41 } else { 4 }, SERVED, within.len(), from, to), within].concat()
}

fn send_raw(from: &Namespace, bytes: Vec<u8>, to: IpAddr) {
    from.run(move || {
        let family = if to.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).expect("a raw socket");
        let sent = match to {
            IpAddr::V4(v4) => sendto(
                raw.as_raw_fd(),
                &bytes,
                &SockaddrIn::from(std::net::SocketAddrV4::new(v4, 0)),
                MsgFlags::empty(),
            ),
            IpAddr::V6(v6) => {
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(v6, 0, 0, 0));
                sendto(raw.as_raw_fd(), &bytes, &to, MsgFlags::empty())
            }
        };
        assert_eq!(sent.expect("sent"), bytes.len());
    });
}

/// Nobody but nodes may say whom a client asked for, and nobody may say what is no Service's.
#[test]
fn packets_that_others_enclose_are_not_taken() {
    let world = World::new(false);
    let [first, second] = world.start([
        objects("node-1", &[NODE_2], "dsr=true sources=203.0.113.0/24,2001:db8:203::/48"),
        objects("node-2", &[NODE_1], "dsr=true sources=203.0.113.0/24,2001:db8:203::/48"),
    ]);
    let networks = ["10.244.1.0/24", "fd00:10:244:1::/64"];
    for (network, via) in networks.into_iter().zip(["169.254.1.4", "fe80::4"]) {
        world.client.ip(&format!("route add {network} via {via} dev cb onlink"));
    }
    for family in 0..2 {
        let client = udp_to(&world.client, at(A[family], UDP_PORT));
        client.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout");
        let own = client.local_addr().expect("bound");
        let pod: IpAddr = POD[family].parse().expect("address");
        let asked = at(A[family], UDP_PORT);
        let answered = |place: &Namespace, outer: [&str; 2], inner: [SocketAddr; 2]| {
            send_raw(place, capsule(outer, inner), pod);
            client.recv(&mut [0; 64]).is_ok()
        };
        // As a node sends it: what is refused below is not refused for its form.
        assert!(answered(&world.a, [A[family], POD[family]], [own, asked]), "{asked}");
        for (what, place, sender, inner) in [
            ("from outside", &world.client, CLIENT[family], [own, asked]),
            ("for a port that no Service has", &world.a, A[family], [own, at(A[family], UDP_PORT + 1)]),
            ("for the Service's other protocol", &world.a, A[family], [own, at(A[family], TCP_PORT)]),
            ("for an address that no node has", &world.a, A[family], [own, at(CLIENT[family], UDP_PORT)]),
        ] {
            assert!(!answered(place, [sender, POD[family]], inner), "{what}, family {family}");
        }
        // The balancer's address has a firewall, on the endpoint's node, too.
        let balancer = udp_to(&world.client, at(BALANCER[family], 53));
        balancer.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout");
        let allowed = balancer.local_addr().expect("bound");
        let other = at(["192.0.2.77", "2001:db8:77::7"][family], allowed.port());
        world.client.ip(&format!("addr add {} dev lo", other.ip()));
        let stranger = world.client.run(move || UdpSocket::bind(other).expect("bind"));
        stranger.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout");
        let via = ["169.254.1.3", "fe80::3"][family];
        world.b.ip(&format!("route add {} via {via} dev bc onlink", other.ip()));
        for (inner, socket, passes) in [(allowed, &balancer, true), (other, &stranger, false)] {
            send_raw(&world.a, capsule([A[family], POD[family]], [inner, at(BALANCER[family], 53)]), pod);
            assert_eq!(socket.recv(&mut [0; 64]).is_ok(), passes, "{inner}");
        }
    }
    first.stop();
    second.stop();
}

/// A flow goes on in the programs of both nodes while other modes take over what is new.
#[test]
fn flows_outlive_their_mode() {
    let world = World::new(false);
    let [first, second] =
        world.start([objects("node-1", &[NODE_2], "dsr=true"), objects("node-2", &[NODE_1], "dsr=true")]);
    let held: Vec<TcpStream> = (0..2)
        .flat_map(|family| roads(family, TCP_PORT, 80))
        .map(|to| {
            let (stream, seen) = open(&world.client, to).expect("connected");
            assert!(CLIENT.contains(&seen.as_str()));
            stream
        })
        .collect();
    let go_on = |what: &str| {
        let before = world.passed();
        held.iter().for_each(carry);
        let passed = world.passed() - before;
        assert!(passed < 2_000, "{what}: {passed} bytes of answers passed the first node");
    };
    go_on("before");
    second.runtime.block_on(second.switch.to(Mode::Nftables)).expect("handed over");
    go_on("after the endpoint's node has changed its mode");
    // As the announcement that is withdrawn tells it.
    let alone = objects("node-1", &[], "").node;
    tell(&first, alone);
    go_on("after the first node has heard of it");
    let (_, seen) = open(&world.client, at(A[0], TCP_PORT)).expect("connected");
    assert_ne!(seen, CLIENT[0], "what is new goes the ordinary way");
    first.runtime.block_on(first.switch.to(Mode::Nftables)).expect("handed over");
    go_on("after the first node has changed its mode");
    first.stop();
    second.stop();
}

/// The mode over a fake that holds these objects.
fn traced(objects: &Objects) -> Ebpf<Fake> {
    let mut ebpf = Ebpf::new(Fake::new(&LAYOUTS));
    let base = Ebpf::<Fake>::base(&objects.node);
    ebpf.commit(Some(&base), &whole::<Ebpf<Fake>>(&objects.table(), &objects.node)).expect("commit");
    ebpf
}

/// What programs are told, and what the tracer says they do.
#[test]
fn only_what_comes_from_outside_is_answered_past_the_node() {
    let default = ("node-2", B, true);
    let on_default = "dsr=true";
    for (takers, options, from, to, masqueraded) in [
        (&[NODE_2][..], on_default, CLIENT[0], at(A[0], TCP_PORT), false),
        (&[NODE_2], on_default, CLIENT[1], at(BALANCER[1], 80), false),
        // A cluster IP is none of it, nor is another node.
        (&[NODE_2], on_default, CLIENT[0], at("10.96.0.10", 80), true),
        (&[NODE_2], on_default, B[0], at(A[0], TCP_PORT), true),
        (&[NODE_2], "", CLIENT[0], at(A[0], TCP_PORT), true),
        (&[default], "", CLIENT[0], at(A[0], TCP_PORT), true),
        (&[default], "dsr=false", CLIENT[0], at(A[0], TCP_PORT), true),
        (&[], on_default, CLIENT[0], at(A[0], TCP_PORT), true),
    ] {
        let ebpf = traced(&objects("node-1", takers, options));
        let packet = Packet { from: at(from, 40_000), to, protocol: 6 };
        let mut log = Vec::new();
        let found = fates(|draw| ebpf.walk(Way::Arrive, &packet, draw, &mut log));
        let pod = at(POD[usize::from(to.is_ipv6())], SERVED);
        let expected = [Fate::Sent { to: pod, masqueraded }];
        assert_eq!(found.into_keys().collect::<Vec<_>>(), expected, "{takers:?} {options} {from} {to}");
        assert_eq!(log.iter().any(|line| line.contains("answers past this node")), !masqueraded, "{log:?}");
    }
    let mut here = objects("node-2", &[NODE_1], "dsr=true");
    let ebpf = traced(&here);
    // The endpoint's own node has no reason to masquerade, either.
    for (from, to, masqueraded) in [(CLIENT[0], B[0], false), (A[1], B[1], false)] {
        let packet = Packet { from: at(from, 40_000), to: at(to, TCP_PORT), protocol: 6 };
        let found = fates(|draw| ebpf.walk(Way::Arrive, &packet, draw, &mut Vec::new()));
        let expected = [Fate::Sent { to: at(POD[usize::from(to.contains(':'))], SERVED), masqueraded }];
        assert_eq!(found.into_keys().collect::<Vec<_>>(), expected, "{from} {to}");
    }
    // The node of the endpoint opens its doors for as long as the Service has it.
    let doors = |objects: &Objects| {
        let mut ebpf = traced(objects);
        ebpf.lines().expect("lines").into_iter().filter(|line| line.contains("taken")).collect::<Vec<_>>()
    };
    let ports = format!("{TCP_PORT}/tcp/taken-here . {}:{SERVED}", POD[0]);
    let found = doors(&here);
    // Each endpoint for its Service's own addresses, and for its node port.
    assert_eq!(found.len(), 16, "{found:#?}");
    assert!(found.iter().any(|line| line.contains(&ports)), "{found:#?}");
    assert!(found.iter().all(|line| line.contains("taken-here")), "{found:#?}");
    here.slices.clear();
    assert_eq!(doors(&here), Vec::<String>::new());
}
