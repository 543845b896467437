//! Real pods on real nodes: two labs' worth of packets over both overlays, with and without netfilter on bridged frames.
//!
//! `rules` adds what leaves the nodes and host ports.
//!
//! Needs root and `nft`. Every namespace is made here and goes with its guard, also when a test fails.

mod rules;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use lab::{Lab, LabConfig, LabNode};
use linux::link::{Links, Route, RouteKind};
use linux::netns::Netns;
use podnet::{BRIDGE, OverlayKind, PeerNode, PodNet, PodNetConfig};
use runtime::{PodNetwork, PortMapping, SandboxNetwork};

/// A lab, its data directory and its pods' namespaces.
struct Ground {
    dir: PathBuf,
    lab: Lab,
    overlay: OverlayKind,
}

impl Ground {
    fn new(test: &str, overlay: OverlayKind) -> Self {
        let dir = std::env::temp_dir().join(format!("fairlead-podnet-{}-{test}", std::process::id()));
        let lab = Lab::create(LabConfig::new(&dir, 2)).expect("a lab");
        Self { dir, lab, overlay }
    }

    fn start(&self, node: &LabNode) -> PodNet {
        PodNet::start_in(self.config(node), &node.namespace().expect("the node's namespace")).expect("a pod network")
    }

    fn config(&self, node: &LabNode) -> PodNetConfig {
        PodNetConfig {
            dir: node.dir.clone(),
            node: node.name.clone(),
            node_addresses: node.addresses(),
            pod_cidrs: node.pod_cidrs.clone(),
            cluster_cidrs: self.lab.config().pod_cidrs.clone(),
            overlay: self.overlay,
            mtu: None,
        }
    }

    fn peers(&self) -> Vec<PeerNode> {
        let peer = |node: &LabNode| PeerNode {
            name: node.name.clone(),
            addresses: node.addresses(),
            pod_cidrs: node.pod_cidrs.clone(),
        };
        self.lab.nodes().iter().map(peer).collect()
    }

    async fn pod(&self, podnet: &PodNet, name: &str) -> Pod {
        self.pod_with_ports(podnet, name, Vec::new()).await
    }

    async fn pod_with_ports(&self, podnet: &PodNet, name: &str, port_mappings: Vec<PortMapping>) -> Pod {
        let path = self.dir.join(name);
        let netns = Netns::create(&path).expect("a pod's namespace");
        let sandbox = SandboxNetwork {
            id: format!("sandbox-of-{name}"),
            namespace: "default".into(),
            name: name.into(),
            netns: path,
            port_mappings,
        };
        let addresses = podnet.add(&sandbox).await.expect("addresses");
        Pod { sandbox, netns, addresses }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let ended = Lab::destroy(self.lab.id());
        let removed = fs::remove_dir_all(&self.dir);
        if !std::thread::panicking() {
            ended.expect("the lab ends");
            removed.expect("the data directory goes");
        }
    }
}

struct Pod {
    sandbox: SandboxNetwork,
    netns: Netns,
    addresses: Vec<IpAddr>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        let removed = Netns::remove(&self.sandbox.netns);
        if !std::thread::panicking() {
            removed.expect("the pod's namespace goes");
        }
    }
}

/// Connects to port 8080 of `target` from one namespace; the server listens in another on `bound`. The client's address as
/// the server sees it.
fn connect(from: &Netns, target: IpAddr, server: &Netns, bound: IpAddr) -> Result<IpAddr, String> {
    connect_to(from, SocketAddr::new(target, 8080), server, SocketAddr::new(bound, 8080))
}

fn connect_to(from: &Netns, target: SocketAddr, server: &Netns, bound: SocketAddr) -> Result<IpAddr, String> {
    let listener = server.tcp_listen(bound).map_err(|error| error.to_string())?;
    listener.set_nonblocking(false).map_err(|error| error.to_string())?;
    let seen = from.run(|| {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(3)).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(3))).map_err(|e| e.to_string())?;
        // The handshake is complete on this side, so the connection is in the queue or about to be.
        let (mut accepted, peer) = listener.accept().map_err(|e| e.to_string())?;
        // More than one segment each way, so that a wrong MTU shows.
        let bulk = vec![b'x'; 20_000];
        accepted.write_all(&bulk).map_err(|e| e.to_string())?;
        drop(accepted);
        let mut got = Vec::new();
        stream.read_to_end(&mut got).map_err(|e| e.to_string())?;
        if got == bulk { Ok(peer.ip()) } else { Err(format!("{} bytes of {}", got.len(), bulk.len())) }
    });
    seen.map_err(|error| error.to_string())?
}

/// Packets that a link received, by /proc/net/dev of its namespace.
fn received(namespace: &Netns, link: &str) -> u64 {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/dev")).expect("inside").expect("a table");
    let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{link}:")).map(str::to_owned));
    let fields = line.expect("the link's line");
    fields.split_whitespace().nth(1).and_then(|count| count.parse().ok()).expect("a count")
}

fn set_bridge_netfilter(namespace: &Netns, value: &str) -> bool {
    let names = ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"];
    if namespace.read_sysctl(names[0]).expect("readable").is_none() {
        // Without the module there is only the state that 0 stands for.
        return value == "0";
    }
    namespace.sysctls(&names.map(|name| (name, value))).expect("set");
    true
}

fn nft(namespace: &Netns, script: &str) {
    let output = namespace.run(|| {
        let mut child =
            Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("nft");
        child.stdin.take().expect("its input").write_all(script.as_bytes()).expect("written");
        child.wait_with_output().expect("an answer")
    });
    let output = output.expect("inside");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn pods_of_two_nodes_reach_each_other(ground: &Ground) {
    let [one, two] = ground.lab.nodes() else { panic!("two nodes") };
    let (net_one, net_two) = (ground.start(one), ground.start(two));
    for net in [&net_one, &net_two] {
        net.sync(ground.peers()).await.expect("ways to the other node");
        net.sync(ground.peers()).await.expect("a second time changes nothing");
    }
    let (a, b) = (ground.pod(&net_one, "a").await, ground.pod(&net_two, "b").await);
    assert_eq!(a.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.244.0.2", "fd00:10:244::2"]);
    for (mine, its) in a.addresses.iter().zip(&b.addresses) {
        assert_eq!(connect(&a.netns, *its, &b.netns, *its), Ok(*mine));
        assert_eq!(connect(&b.netns, *mine, &a.netns, *mine), Ok(*its));
        // And from the other node itself, as a probe or a NodePort would.
        let prober = two.namespace().expect("node-2");
        connect(&prober, *mine, &a.netns, *mine).expect("node to remote pod");
    }
    // A node that left takes its routes along.
    net_one.sync(ground.peers().into_iter().take(1).collect()).await.expect("alone");
    let links = Links::open(&one.namespace().expect("node-1")).expect("links");
    let routes = links.routes().expect("routes");
    assert!(!routes.iter().any(|route| two.pod_cidrs.contains(&route.to)), "{routes:?}");
}

#[tokio::test]
async fn host_gateway_carries_both_families_between_nodes() {
    let ground = Ground::new("hostgw", OverlayKind::HostGateway);
    pods_of_two_nodes_reach_each_other(&ground).await;
}

#[tokio::test]
async fn vxlan_carries_both_families_between_nodes_in_its_device() {
    let ground = Ground::new("vxlan", OverlayKind::Vxlan);
    pods_of_two_nodes_reach_each_other(&ground).await;
    let [one, two] = ground.lab.nodes() else { panic!("two nodes") };
    for node in [one, two] {
        assert!(received(&node.namespace().expect("its namespace"), "fl-vxlan") > 10);
    }
    assert_eq!(ground.start(one).mtu(), 1450);
    // Going over to plain routes takes the device away.
    let plain = Ground {
        dir: ground.dir.clone(),
        lab: Lab::open(ground.lab.id()).expect("open"),
        overlay: OverlayKind::HostGateway,
    };
    plain.start(one).sync(plain.peers()).await.expect("plain routes");
    let links = Links::open(&one.namespace().expect("node-1")).expect("links");
    assert_eq!(links.link("fl-vxlan").expect("a look"), None);
    std::mem::forget(plain);
}

#[tokio::test]
async fn pods_beside_each_other_reach_each_other_with_and_without_bridge_netfilter() {
    let ground = Ground::new("beside", OverlayKind::HostGateway);
    let node = &ground.lab.nodes()[0];
    let podnet = ground.start(node);
    let (a, b) = (ground.pod(&podnet, "a").await, ground.pod(&podnet, "b").await);
    let namespace = node.namespace().expect("its namespace");
    // What a Service does to packets: translate to the other pod, or to oneself with the source masked.
    let [a4, a6] = a.addresses[..] else { panic!("two families") };
    let [b4, b6] = b.addresses[..] else { panic!("two families") };
    nft(
        &namespace,
        &format!(
            "table ip t {{\n chain pre {{\n type nat hook prerouting priority -100;\n\
             ip daddr 10.96.0.2 dnat to {a4};\n ip daddr 10.96.0.3 dnat to {b4};\n }}\n\
             chain post {{\n type nat hook postrouting priority 100;\n ip saddr {a4} ip daddr {a4} masquerade;\n }}\n }}\n\
             table ip6 t {{\n chain pre {{\n type nat hook prerouting priority -100;\n\
             ip6 daddr fd00:10:96::2 dnat to {a6};\n ip6 daddr fd00:10:96::3 dnat to {b6};\n }}\n\
             chain post {{\n type nat hook postrouting priority 100;\n ip6 saddr {a6} ip6 daddr {a6} masquerade;\n }}\n }}\n"
        ),
    );
    let service = |text: &str| text.parse::<IpAddr>().expect("an address");
    for setting in ["0", "1"] {
        if !set_bridge_netfilter(&namespace, setting) {
            continue;
        }
        for (mine, its) in [(a4, b4), (a6, b6)] {
            assert_eq!(connect(&a.netns, its, &b.netns, its), Ok(mine), "direct, bridge netfilter {setting}");
        }
        for (virtual_ip, mine, its) in [(service("10.96.0.3"), a4, b4), (service("fd00:10:96::3"), a6, b6)] {
            assert_eq!(
                connect(&a.netns, virtual_ip, &b.netns, its),
                Ok(mine),
                "translated, bridge netfilter {setting}"
            );
        }
        for (virtual_ip, mine) in [(service("10.96.0.2"), a4), (service("fd00:10:96::2"), a6)] {
            let seen = connect(&a.netns, virtual_ip, &a.netns, mine).expect("hairpin");
            assert_ne!(seen, mine, "hairpin, bridge netfilter {setting}");
        }
    }
}

#[tokio::test]
async fn a_restarted_agent_finds_its_pods_and_a_removed_pod_leaves_nothing() {
    let ground = Ground::new("restart", OverlayKind::HostGateway);
    let node = &ground.lab.nodes()[0];
    let first = ground.start(node);
    let mut pod = ground.pod(&first, "a").await;
    let other = ground.pod(&first, "b").await;
    drop(first);

    let second = ground.start(node);
    let mut ports = second.host_ports();
    assert!(ports.borrow_and_update().is_empty());
    let mapping = PortMapping { host_ip: None, host_port: 8080, container_port: 80, protocol: "TCP".into() };
    pod.sandbox.port_mappings.push(mapping.clone());
    assert_eq!(second.add(&pod.sandbox).await.expect("the same addresses"), pod.addresses);
    assert!(ports.has_changed().expect("the sender lives"));
    assert_eq!(ports.borrow_and_update().iter().map(|port| &port.mapping).collect::<Vec<_>>(), [&mapping]);

    let links = Links::open(&node.namespace().expect("its namespace")).expect("links");
    let on_bridge =
        || links.links().expect("links").iter().filter(|link| link.kind == "veth" && link.bridge.is_some()).count();
    assert_eq!(on_bridge(), 2);
    second.remove(&pod.sandbox).await.expect("removed");
    second.remove(&pod.sandbox).await.expect("a second time is fine");
    second.retain(Vec::new()).await.expect("the other one is gone, too");
    assert_eq!(on_bridge(), 0);
    assert!(second.holdings().is_empty() && ports.borrow_and_update().is_empty());
    assert!(links.neighbours(BRIDGE).expect("neighbours").is_empty());
    let routes = links.routes().expect("routes");
    assert!(routes.iter().all(|route| !pod.addresses.iter().any(|address| route.to.addr() == *address)), "{routes:?}");
    let own = routes.iter().filter(|route| route.kind == RouteKind::Unreachable).map(|route: &Route| route.to);
    assert_eq!(own.collect::<Vec<_>>(), node.pod_cidrs);
    drop(other);
}
