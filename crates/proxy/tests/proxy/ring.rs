//! Sends the packets of all case files through a real kernel: a node with pods on a bridge, hosts outside, and whatever
//! lies beyond, each a network namespace; the proxy's own loop follows the objects from case to case.
//!
//! `FAIRLEAD_CASE=hooks` plays one file only.
//!
//! How a mode joins: one test at the end, or in `guest` if it needs another kernel. What it needs besides a namespace goes
//! into [`Proxy::start`]. SCTP is left out where the kernel has no SCTP sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use linux::netns::Netns;
use proxy::{Config, Feed, Hooks, Mode, NodeView, Status};
use services::{Changes, ServiceTable};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::case::{self, Objects, Outcome, Step, Trace, node};
use crate::cgroup::{self, Attached};
use crate::net::Namespace;
use crate::sctp;

/// How long nothing must come back before a packet counts as dropped.
const SILENCE: Duration = Duration::from_millis(250);
/// A refusal that finds its socket busy counts when the SYN is repeated, after a second.
const PATIENCE: Duration = Duration::from_millis(3_500);

/// The proxy's loop in a node's namespace.
pub struct Proxy {
    pub table: Arc<RwLock<ServiceTable>>,
    pub status: watch::Receiver<Status>,
    changes: broadcast::Sender<Arc<Changes>>,
    node: watch::Sender<Arc<NodeView>>,
    token: CancellationToken,
    runtime: tokio::runtime::Runtime,
    task: tokio::task::JoinHandle<Result<(), proxy::Error>>,
}

impl Proxy {
    /// In the namespace at this path, over what an earlier run left there, for a cluster that has these objects.
    pub fn start(namespace: &str, mode: Mode, objects: &Objects, hooks: Option<Hooks>) -> Self {
        let namespace: OwnedFd = std::fs::File::open(namespace).expect("namespace").into();
        let seed = proxy::found(mode, Some(namespace.as_fd()), hooks.as_ref()).expect("read");
        let mut table = ServiceTable::with_seed(seed);
        objects.apply(&mut table);
        let table = Arc::new(RwLock::new(table));
        let (changes, receiver) = broadcast::channel(256);
        let (sender, status) = watch::channel(Status::default());
        let (node, node_receiver) = watch::channel(Arc::new(objects.node.clone()));
        let token = CancellationToken::new();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("tokio");
        // Listeners here are slow, and who leaves the pick for that is not what the cases are about.
        let watching = proxy::Watching { ejection: false, ..proxy::Watching::default() };
        let config = Config {
            mode,
            node: node_receiver,
            namespace: Some(namespace),
            hooks,
            metrics: Default::default(),
            watching,
        };
        let feed = Feed { table: table.clone(), changes: receiver };
        let task = runtime.spawn(proxy::run(config, feed, sender, token.clone()));
        let mut proxy = Proxy { table, status, changes, node, token, runtime, task };
        proxy.until_committed(|proxy| proxy.change(|table| vec![table.set_synced()]));
        proxy
    }

    /// Changes the table and tells the loop, all at once; whether there is anything to do for it.
    pub fn change(&self, change: impl FnOnce(&mut ServiceTable) -> Vec<Changes>) -> bool {
        let mut all = Changes::default();
        for changes in change(&mut self.table.write().expect("table")) {
            all.services.extend(changes.services);
            all.frontends.extend(changes.frontends);
            all.synced |= changes.synced;
        }
        let any = all.synced || !all.frontends.is_empty();
        self.changes.send(Arc::new(all)).expect("the loop listens");
        any
    }

    fn until_committed(&mut self, act: impl FnOnce(&Self) -> bool) {
        let commits = self.status.borrow().commits;
        if !act(self) {
            return;
        }
        let status = &mut self.status;
        self.runtime.block_on(async {
            let done = status.wait_for(|status| status.commits > commits && status.pending == 0);
            let done = tokio::time::timeout(Duration::from_secs(20), done).await.map(|done| done.is_ok());
            assert_eq!(done, Ok(true), "no commit: {:?}", status.borrow().error);
        });
    }

    /// Whether the status becomes like this in time.
    pub fn wait_for(&mut self, patience: Duration, is_so: impl FnMut(&Status) -> bool) -> bool {
        let status = &mut self.status;
        self.runtime.block_on(async { tokio::time::timeout(patience, status.wait_for(is_so)).await.is_ok() })
    }

    /// Makes the cluster this.
    pub fn apply(&mut self, objects: &Objects) {
        self.until_committed(|proxy| {
            let other = **proxy.node.borrow() != objects.node;
            if other {
                proxy.node.send_replace(Arc::new(objects.node.clone()));
            }
            other
        });
        self.until_committed(|proxy| proxy.change(|table| objects.apply(table)));
    }

    pub fn stop(self) {
        self.token.cancel();
        self.runtime.block_on(self.task).expect("joined").expect("no error");
    }
}

/// A node and everything around it. Hosts and listeners are made when a case names them, and stay.
pub struct Ring {
    pub node: Namespace,
    own: Vec<IpAddr>,
    /// Where every packet ends that nobody else takes.
    beyond: Namespace,
    hosts: BTreeMap<IpAddr, Namespace>,
    listeners: BTreeSet<(u8, SocketAddr)>,
    /// Where the node's own threads and those of its pods are, if there are eBPF programs.
    attached: Option<Attached>,
}

/// Who sends a packet, as far as the kernel can tell.
pub struct Place {
    namespace: Netns,
    cgroup: Option<PathBuf>,
}

impl Place {
    /// Does something there, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            if let Some(cgroup) = &self.cgroup {
                cgroup::add(cgroup, nix::unistd::gettid().as_raw());
            }
            // A thread begins in the cgroup of the one that starts it.
            self.namespace.run(work).expect("a thread there")
        };
        std::thread::scope(|scope| match scope.spawn(inside).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }
}

fn is_pod(address: IpAddr) -> bool {
    let proxy::Pods::Cidrs(cidrs) = node().pods else { panic!("pods are known by their networks here") };
    cidrs.iter().any(|cidr| cidr.contains(&address))
}

impl Ring {
    pub fn new(mode: Mode, bridge_netfilter: bool) -> Self {
        let attached = (mode == Mode::Ebpf).then(Attached::new);
        let (node, beyond) = (Namespace::new(), Namespace::new());
        if let Some(attached) = &attached {
            attached.add(node.thread_id);
            // Connection tracking, as podnet and a node's firewall have it: it must not be misled by what is translated
            // before and after it.
            let rules = "add table inet pods; add chain inet pods out { type nat hook postrouting priority 101; }; \
                add chain inet pods through { type filter hook forward priority 0; }; \
                add rule inet pods through ct state invalid drop";
            node.command("nft", rules);
        }
        for (name, value) in [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            // Refusals are counted here, not rationed.
            ("net/ipv4/icmp_ratelimit", "0"),
            ("net/ipv6/icmp/ratelimit", "0"),
        ] {
            node.sysctl(name, value);
        }
        for table in ["iptables", "ip6tables"] {
            node.sysctl(&format!("net/bridge/bridge-nf-call-{table}"), if bridge_netfilter { "1" } else { "0" });
        }
        // Otherwise each new port may change the bridge's address, which pods remember.
        node.ip("link add pods address 02:00:00:00:00:01 type bridge");
        node.ip("link set pods up");
        node.ip("addr add 10.244.255.254/16 dev pods noprefixroute");
        node.ip("addr add fd00:10:244:ff::fe/56 dev pods nodad noprefixroute");
        node.ip("addr add fe80::1/64 dev pods nodad");
        let mut ring =
            Ring { node, own: Vec::new(), beyond, hosts: BTreeMap::new(), listeners: BTreeSet::new(), attached };
        for address in ["192.168.49.2", "fd00:c0a8:31::2", "192.168.50.2", "fd00:c0a8:32::2"] {
            let address: IpAddr = address.parse().expect("address");
            let nodad = if address.is_ipv6() { "nodad" } else { "" };
            ring.node.ip(&format!("addr add {address} dev lo {nodad}"));
            ring.own.push(address);
        }
        // Sockets that are sent to pods straight have the address that the cases call the node's; what is masqueraded or
        // relayed has another, and can be told from it.
        let of_node = ring.attached.is_some();
        let sources =
            if of_node { ["192.168.49.2", "fd00:c0a8:31::2"] } else { ["10.244.255.254", "fd00:10:244:ff::fe"] };
        ring.node.ip(&format!("route add 10.244.0.0/16 dev pods src {}", sources[0]));
        ring.node.ip(&format!("route add fd00:10:244::/56 dev pods src {}", sources[1]));
        ring.link("far", &ring.beyond);
        ring.beyond.ip("addr add 169.254.2.2/32 dev eth0");
        ring.beyond.ip("addr add fe80::2/64 dev eth0 nodad");
        for unclaimed in ["10.96.0.0/12", "198.51.100.0/24", "192.168.49.3/32", "fd00:10:96::/112", "2001:db8:198::/48"]
        {
            ring.beyond.ip(&format!("route add local {unclaimed} dev lo"));
        }
        ring.beyond.sysctl("net/ipv6/ip_nonlocal_bind", "1");
        ring.node.ip("route add default via 169.254.2.2 dev far onlink src 192.168.49.2");
        ring.node.ip("route add default via fe80::2 dev far src fd00:c0a8:31::2");
        ring
    }

    /// A link of its own to the node, which is the way to everywhere.
    fn link(&self, name: &str, other: &Namespace) {
        self.node.ip(&format!("link add {name} type veth peer name eth0 netns {}", other.path));
        self.node.ip(&format!("link set {name} up"));
        self.node.ip(&format!("addr add 169.254.1.1/32 dev {name}"));
        self.node.ip(&format!("addr add fe80::1/64 dev {name} nodad"));
        other.ip("link set eth0 up");
        other.ip("route add default via 169.254.1.1 dev eth0 onlink");
        other.ip("route add default via fe80::1 dev eth0");
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.own.contains(&address) || address.is_loopback()
    }

    pub fn hooks(&self) -> Option<Hooks> {
        self.attached.as_ref().map(Attached::hooks)
    }

    /// Where whoever has this address sends from.
    pub fn place(&mut self, address: IpAddr) -> Place {
        let namespace = Netns::open(self.host(address).path.as_ref()).expect("namespace");
        let is_here = self.is_own(address) || is_pod(address);
        Place { namespace, cgroup: self.hooks().filter(|_| is_here).map(|hooks| hooks.cgroup) }
    }

    /// The namespace that has this address.
    pub fn host(&mut self, address: IpAddr) -> &Namespace {
        if self.is_own(address) {
            return &self.node;
        }
        if !self.hosts.contains_key(&address) {
            let (host, name) = (Namespace::new(), format!("h{}", self.hosts.len()));
            if let Some(attached) = self.attached.as_ref().filter(|_| is_pod(address)) {
                attached.add(host.thread_id);
            }
            // As podnet sets it: a redirect would lead answers past the node.
            for family in ["ipv4", "ipv6"] {
                for interface in ["all", "default"] {
                    host.sysctl(&format!("net/{family}/conf/{interface}/accept_redirects"), "0");
                }
            }
            if is_pod(address) {
                self.node.ip(&format!("link add {name} type veth peer name eth0 netns {}", host.path));
                self.node.ip(&format!("link set {name} master pods"));
                // A pod that a Service leads back to itself.
                self.node.ip(&format!("link set {name} type bridge_slave hairpin on"));
                self.node.ip(&format!("link set {name} up"));
                host.ip("link set eth0 up");
                host.ip("route add default via 10.244.255.254 dev eth0 onlink");
                host.ip("route add default via fe80::1 dev eth0");
            } else {
                self.link(&name, &host);
                self.node.ip(&format!("route add {address} dev {name}"));
            }
            let nodad = if address.is_ipv6() { "nodad" } else { "" };
            host.ip(&format!("addr add {address} dev eth0 {nodad}"));
            self.hosts.insert(address, host);
        }
        &self.hosts[&address]
    }

    /// Answers there, with the address that was asked and the client's as it is seen.
    fn listen(&mut self, protocol: u8, at: SocketAddr, beyond: bool) {
        if !self.listeners.insert((protocol, at)) {
            return;
        }
        let host = if beyond { &self.beyond } else { self.host(at.ip()) };
        match protocol {
            6 => {
                let listener = host.run(move || TcpListener::bind(at).expect("bind"));
                std::thread::spawn(move || {
                    for mut stream in listener.incoming().flatten() {
                        let from = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
                        drop(stream.write_all(format!("{at} {from}\n").as_bytes()));
                        // Whoever closes first remembers the connection for a minute, and masqueraded ports come again.
                        drop(stream.set_read_timeout(Some(PATIENCE)));
                        drop(stream.read(&mut [0]));
                    }
                });
            }
            17 => {
                let socket = host.run(move || UdpSocket::bind(at).expect("bind"));
                std::thread::spawn(move || {
                    let mut buffer = [0; 64];
                    while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                        drop(socket.send_to(format!("{at} {}", from.ip()).as_bytes(), from));
                    }
                });
            }
            _ if !sctp::is_known() => {}
            _ => host.run(move || sctp::serve(at, move |peer| format!("{at} {peer}\n"))),
        }
    }

    /// Makes whoever a step talks of.
    fn prepare(&mut self, step: &Step, objects: &Objects, mode: Mode) {
        self.serve(objects);
        for trace in step.traces.iter().filter(|trace| is_possible(trace, mode)) {
            self.host(trace.packet.from.ip());
            let to = trace.packet.to;
            if trace.outcome(mode) == Outcome::Pass {
                self.listen(trace.packet.protocol, to, !self.is_own(to.ip()) && !is_pod(to.ip()));
            }
        }
    }

    /// Makes the hosts that steps talk of. What listens comes later, and may not be there before.
    fn settle<'a>(&mut self, steps: impl Iterator<Item = &'a Step>, mode: Mode) {
        for step in steps {
            for trace in step.traces.iter().filter(|trace| is_possible(trace, mode)) {
                self.host(trace.packet.from.ip());
            }
            for (_, endpoint) in endpoints(&Objects::parse(&step.objects)) {
                self.host(endpoint.ip());
            }
        }
    }

    /// Makes all endpoints.
    pub fn serve(&mut self, objects: &Objects) {
        for (protocol, endpoint) in endpoints(objects) {
            self.listen(protocol, endpoint, false);
        }
    }
}

/// Protocol and address of each.
fn endpoints(objects: &Objects) -> Vec<(u8, SocketAddr)> {
    let mut all = Vec::new();
    for slice in &objects.slices {
        let ports = slice["ports"].as_array().expect("ports");
        let endpoints = slice["endpoints"].as_array().into_iter().flatten();
        for (endpoint, port) in endpoints.flat_map(|one| ports.iter().map(move |port| (one, port))) {
            let addresses = endpoint["addresses"].as_array().expect("addresses");
            let protocol = services::Protocol::parse(port["protocol"].as_str().expect("protocol")).expect("protocol");
            let port = port["port"].as_u64().expect("port") as u16;
            let addresses = addresses.iter().filter_map(|address| address.as_str()?.parse::<IpAddr>().ok());
            all.extend(addresses.map(|address| (protocol.number(), SocketAddr::new(address, port))));
        }
    }
    all
}

/// What a client sees of a packet.
#[derive(Debug, PartialEq)]
pub enum Seen {
    Answer { by: SocketAddr, source: IpAddr },
    Refused,
    Silence,
    Other(ErrorKind),
}

impl Seen {
    fn of(error: ErrorKind) -> Self {
        match error {
            ErrorKind::ConnectionRefused => Seen::Refused,
            // A process of the node is told at once that its packet was dropped.
            ErrorKind::TimedOut | ErrorKind::WouldBlock | ErrorKind::PermissionDenied => Seen::Silence,
            other => Seen::Other(other),
        }
    }

    fn parse(text: &str) -> Self {
        match text.trim_end().split_once(' ') {
            Some((by, source)) => {
                Seen::Answer { by: by.parse().expect("address"), source: source.parse().expect("address") }
            }
            None => Seen::Other(ErrorKind::InvalidData),
        }
    }
}

/// Sends one packet, or opens one connection, from the caller's namespace.
pub fn ask(protocol: u8, to: SocketAddr, patience: Duration) -> Seen {
    ask_from(protocol, None, to, patience)
}

/// SCTP needs to know from which address.
fn ask_from(protocol: u8, from: Option<IpAddr>, to: SocketAddr, patience: Duration) -> Seen {
    let answer = || -> std::io::Result<String> {
        let mut text = String::new();
        if protocol == 6 {
            let stream = TcpStream::connect_timeout(&to, patience)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            BufReader::new(stream).read_line(&mut text)?;
        } else if let (sctp::PROTOCOL, Some(from)) = (protocol, from) {
            text = sctp::ask(from, to, patience)?;
        } else {
            let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
            socket.set_read_timeout(Some(patience))?;
            socket.connect(to)?;
            socket.send(b"hello")?;
            let mut buffer = [0; 128];
            let size = socket.recv(&mut buffer)?;
            text.push_str(&String::from_utf8_lossy(&buffer[..size]));
        }
        Ok(text)
    };
    answer().map_or_else(|error| Seen::of(error.kind()), |text| Seen::parse(&text))
}

/// What is wrong with a trace; runs in the namespace of its source.
fn check(trace: &Trace, mode: Mode, sticky: bool) -> Result<(), String> {
    let (from, to, protocol) = (trace.packet.from.ip(), trace.packet.to, trace.packet.protocol);
    let outcome = trace.outcome_on(mode, &node());
    let patience = if outcome == Outcome::Drop { SILENCE } else { PATIENCE };
    let ask = || ask_from(protocol, Some(from), to, patience);
    let only = |expected: &Seen, seen: Seen| match seen == *expected {
        true => Ok(()),
        false => Err(format!("{seen:?}, not {expected:?}")),
    };
    match &outcome {
        Outcome::Drop => only(&Seen::Silence, ask()),
        Outcome::Reject => only(&Seen::Refused, ask()),
        Outcome::Pass => only(&Seen::Answer { by: to, source: from }, ask()),
        Outcome::To { places, masqueraded } => {
            let mut missing: BTreeSet<&SocketAddr> = places.iter().collect();
            let mut answered = BTreeSet::new();
            // One of five is missed by a hundred tries less than once in a thousand million runs.
            for tries in 0..100 {
                let Seen::Answer { by, source } = ask() else { return Err(format!("{:?}", ask())) };
                if !places.contains(&by) {
                    return Err(format!("{by} answered"));
                }
                if (source != from) != *masqueraded {
                    return Err(format!("{by} saw {source}"));
                }
                missing.remove(&by);
                answered.insert(by);
                if sticky && tries == 4 {
                    return if answered.len() == 1 { Ok(()) } else { Err(format!("{answered:?} have answered")) };
                }
                if missing.is_empty() && !sticky {
                    return Ok(());
                }
            }
            Err(format!("{missing:?} never answered"))
        }
    }
}

/// Whether this kernel can send it at all, from somewhere that is there, and its sender hears what becomes of it.
fn is_possible(trace: &Trace, mode: Mode) -> bool {
    let balancers: [ipnet::IpNet; 2] = ["198.51.100.0/24", "2001:db8:198::/48"].map(|net| net.parse().expect("net"));
    // A socket of SCTP is deaf to an unreachable port.
    let is_heard = || sctp::is_known() && trace.outcome(mode) != Outcome::Reject;
    (trace.packet.protocol != sctp::PROTOCOL || is_heard())
        && !balancers.iter().any(|net| net.contains(&trace.packet.from.ip()))
}

pub fn play(mode: Mode, bridge_netfilter: bool) {
    let one_file = std::env::var("FAIRLEAD_CASE").ok();
    let sent = play_files(mode, bridge_netfilter, |file| one_file.as_ref().is_none_or(|one| *one == file));
    assert!(sent > 100 || one_file.is_some(), "only {sent} packets were sent");
}

/// How many packets these files have.
pub fn play_files(mode: Mode, bridge_netfilter: bool, is_wanted: impl Fn(&str) -> bool) -> usize {
    let mut ring = Ring::new(mode, bridge_netfilter);
    let mut wrong = Vec::new();
    let mut sent = 0;
    let mut cases = case::all();
    cases.retain(|case| is_wanted(&case.file));
    // A link that comes later gets its programs a moment later.
    ring.settle(cases.iter().flat_map(|case| &case.steps), mode);
    let mut proxy = Proxy::start(&ring.node.path, mode, &Objects::parse::<&str>(&[]), ring.hooks());
    for case in &cases {
        for step in &case.steps {
            let objects = Objects::parse(&step.objects);
            ring.prepare(step, &objects, mode);
            proxy.apply(&objects);
            let sticky = step.objects.iter().any(|line| line.contains("affinity="));
            let traces: Vec<(&Trace, Place)> = step
                .traces
                .iter()
                .filter(|trace| is_possible(trace, mode))
                .map(|trace| (trace, ring.place(trace.packet.from.ip())))
                .collect();
            sent += traces.len();
            let found: Vec<String> = std::thread::scope(|scope| {
                let checks = traces.iter().map(|(trace, place)| {
                    scope.spawn(move || {
                        let found = place.run(|| check(trace, mode, sticky));
                        found.err().map(|what| (trace, what))
                    })
                });
                let checks: Vec<_> = checks.collect();
                let found = checks.into_iter().filter_map(|check| check.join().expect("a check ends"));
                found
                    .map(|(trace, what)| format!("{}.txt: {}\n  {}\n  {what}", case.file, case.title, trace.line))
                    .collect()
            });
            wrong.extend(found);
        }
    }
    proxy.stop();
    assert!(wrong.is_empty(), "{mode}, br_netfilter {bridge_netfilter}:\n{}", wrong.join("\n"));
    sent
}

#[test]
fn nftables_sends_real_packets_where_the_cases_say() {
    play(Mode::Nftables, false);
}

#[test]
fn nftables_does_so_with_bridge_netfilter() {
    play(Mode::Nftables, true);
}

#[test]
fn iptables_sends_real_packets_where_the_cases_say() {
    play(Mode::Iptables, false);
}

#[test]
fn iptables_does_so_with_bridge_netfilter() {
    play(Mode::Iptables, true);
}

#[test]
fn userspace_sends_real_packets_where_the_cases_say() {
    play(Mode::Userspace, false);
}

#[test]
fn userspace_does_so_with_bridge_netfilter() {
    play(Mode::Userspace, true);
}

#[test]
fn ebpf_sends_real_packets_where_the_cases_say() {
    play(Mode::Ebpf, false);
}

#[test]
fn ebpf_does_so_with_bridge_netfilter() {
    play(Mode::Ebpf, true);
}
