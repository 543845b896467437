//! What leaves a node with the node's address, and ports of nodes that lead to pods: real packets of both families.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use lab::LabNode;
use linux::netns::Netns;
use podnet::{OverlayKind, PeerNode, Running};
use runtime::{PodNetwork, PortMapping};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Ground, connect, connect_to};

/// A node's pod network with all its tasks.
struct Agent {
    running: Running,
    stop: CancellationToken,
    _nodes: watch::Sender<Vec<PeerNode>>,
}

impl Agent {
    async fn start(ground: &Ground, node: &LabNode) -> Self {
        let (nodes, known) = watch::channel(ground.peers());
        let stop = CancellationToken::new();
        let namespace = node.namespace().expect("the node's namespace");
        let services = ground.lab.config().service_cidrs.clone();
        let started = podnet::run_in(ground.config(node), services, namespace, known, stop.clone()).await;
        let mut running = started.expect("a pod network");
        running.podnet.sync(ground.peers()).await.expect("ways to the other node");
        running.rules.wait_for(|status| status.applied > 0).await.expect("the task runs");
        Self { running, stop, _nodes: nodes }
    }

    /// Waits until the kernel has what follows from the change.
    async fn change<T>(&mut self, change: impl Future<Output = T>) -> T {
        let before = self.running.rules.borrow().applied;
        let outcome = change.await;
        self.running.rules.wait_for(|status| status.applied > before).await.expect("the task runs");
        outcome
    }

    async fn end(self) {
        self.stop.cancel();
        self.running.tasks.join_all().await;
    }
}

/// As `connect_to`, with one packet each way.
fn exchange(from: &Netns, target: SocketAddr, server: &Netns, bound: SocketAddr) -> Result<IpAddr, String> {
    let patience = Some(Duration::from_secs(3));
    let listener = server.udp_bind(bound).map_err(|error| error.to_string())?;
    listener.set_nonblocking(false).map_err(|error| error.to_string())?;
    listener.set_read_timeout(patience).map_err(|error| error.to_string())?;
    let seen = from.run(|| {
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).map_err(|e| e.to_string())?;
        socket.set_read_timeout(patience).map_err(|e| e.to_string())?;
        socket.connect(target).map_err(|e| e.to_string())?;
        socket.send(b"there").map_err(|e| e.to_string())?;
        let mut buffer = [0; 16];
        let (_, peer) = listener.recv_from(&mut buffer).map_err(|e| format!("at the server: {e}"))?;
        listener.send_to(b"and back", peer).map_err(|e| e.to_string())?;
        let length = socket.recv(&mut buffer).map_err(|e| format!("at the client: {e}"))?;
        if &buffer[..length] == b"and back" { Ok(peer.ip()) } else { Err("another answer".into()) }
    });
    seen.map_err(|error| error.to_string())?
}

fn table(namespace: &Netns) -> String {
    let list = || Command::new("nft").args(["list", "table", "inet", "fairlead-pods"]).output();
    let output = namespace.run(list).expect("inside").expect("nft");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn outside(ground: &Ground) -> (Netns, Vec<IpAddr>) {
    let namespace = ground.lab.outside().expect("the outside");
    (namespace, ground.lab.plan().outside.iter().map(|address| address.addr()).collect())
}

#[tokio::test]
async fn pods_leave_with_the_node_s_address_also_after_the_agent() {
    let ground = Ground::new("leave", OverlayKind::HostGateway);
    let [one, two] = ground.lab.nodes() else { panic!("two nodes") };
    let (agent, other) = (Agent::start(&ground, one).await, Agent::start(&ground, two).await);
    let (a, b) = (ground.pod(&agent.running.podnet, "a").await, ground.pod(&other.running.podnet, "b").await);
    let (namespace, neighbour) = (one.namespace().expect("node-1"), two.namespace().expect("node-2"));
    let (far, far_addresses) = outside(&ground);
    let leaves = || {
        for (((mine, its), node), away) in
            a.addresses.iter().zip(&b.addresses).zip(one.addresses()).zip(far_addresses.iter())
        {
            assert_eq!(connect(&a.netns, *away, &far, *away), Ok(node), "to the outside");
            assert_eq!(connect(&a.netns, *its, &b.netns, *its), Ok(*mine), "to another node's pod");
        }
        for (mine, node) in a.addresses.iter().zip(two.addresses()) {
            assert_eq!(connect(&a.netns, node, &neighbour, node), Ok(*mine), "to another node");
        }
    };
    leaves();
    let text = table(&namespace);
    assert!(text.contains("10.244.0.0/24 . 0.0.0.0/0") && !text.contains("BUG"), "{text}");
    agent.end().await;
    assert_eq!(table(&namespace), text);
    leaves();
    let again = Agent::start(&ground, one).await;
    assert_eq!(table(&namespace), text, "a restart changes nothing");
    again.end().await;
    other.end().await;
}

#[tokio::test]
async fn the_network_below_vxlan_sees_no_pod_addresses() {
    let ground = Ground::new("below", OverlayKind::Vxlan);
    let [one, two] = ground.lab.nodes() else { panic!("two nodes") };
    let (agent, other) = (Agent::start(&ground, one).await, Agent::start(&ground, two).await);
    let a = ground.pod(&agent.running.podnet, "a").await;
    let neighbour = two.namespace().expect("node-2");
    for (mine, its) in one.addresses().into_iter().zip(two.addresses()) {
        assert_eq!(connect(&a.netns, its, &neighbour, its), Ok(mine));
    }
    agent.end().await;
    other.end().await;
}

#[tokio::test]
async fn a_port_of_the_node_leads_to_its_pod_until_the_pod_goes() {
    let ground = Ground::new("ports", OverlayKind::HostGateway);
    let [one, two] = ground.lab.nodes() else { panic!("two nodes") };
    let mut agent = Agent::start(&ground, one).await;
    let other = Agent::start(&ground, two).await;
    let podnet = Arc::clone(&agent.running.podnet);
    let (namespace, neighbour) = (one.namespace().expect("node-1"), two.namespace().expect("node-2"));
    let (far, far_addresses) = outside(&ground);

    let mapping = |host_ip, host_port, protocol: &str| PortMapping {
        host_ip,
        host_port,
        container_port: 80,
        protocol: protocol.into(),
    };
    let only_v6 = one.addresses().into_iter().find(IpAddr::is_ipv6);
    let mappings = vec![mapping(None, 8081, "TCP"), mapping(None, 8081, "UDP"), mapping(only_v6, 8082, "TCP")];
    let a = agent.change(ground.pod_with_ports(&podnet, "a", mappings)).await;
    let b = ground.pod(&other.running.podnet, "b").await;

    for (index, node) in one.addresses().into_iter().enumerate() {
        let (target, bound) = (SocketAddr::new(node, 8081), SocketAddr::new(a.addresses[index], 80));
        for through in [connect_to, exchange] {
            // Sources stay what they are.
            assert_eq!(through(&far, target, &a.netns, bound), Ok(far_addresses[index]), "outside to {target}");
            assert_eq!(through(&neighbour, target, &a.netns, bound), Ok(two.addresses()[index]), "node to {target}");
            assert_eq!(through(&b.netns, target, &a.netns, bound), Ok(b.addresses[index]), "pod to {target}");
            assert_eq!(through(&namespace, target, &a.netns, bound), Ok(node), "the node itself to {target}");
            let seen = through(&a.netns, target, &a.netns, bound).expect("hairpin");
            assert_ne!(seen, a.addresses[index], "the pod itself to {target}");
        }
        let narrow = connect_to(&far, SocketAddr::new(node, 8082), &a.netns, bound);
        assert_eq!(narrow.is_ok(), node.is_ipv6(), "{narrow:?}");
    }
    let text = table(&namespace);
    let line = format!("tcp . 8081 : {} . 80", a.addresses[0]);
    assert!(text.contains(&line) && !text.contains("BUG"), "{text}");

    // Whoever serves the node's port while the agent is away is the pod.
    let node = one.addresses()[0];
    let (target, bound) = (SocketAddr::new(node, 8081), SocketAddr::new(a.addresses[0], 80));
    agent.end().await;
    drop(podnet);
    assert_eq!(connect_to(&far, target, &a.netns, bound), Ok(far_addresses[0]));
    let mut agent = Agent::start(&ground, one).await;
    assert_eq!(table(&namespace), text, "a restart changes nothing");

    let podnet = Arc::clone(&agent.running.podnet);
    agent.change(podnet.remove(&a.sandbox)).await.expect("removed");
    let alone = far.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(3))).expect("inside");
    assert_eq!(
        alone.map_err(|error| error.kind()).err(),
        Some(ErrorKind::ConnectionRefused),
        "the node answers itself"
    );
    assert!(!table(&namespace).contains("8081"));
    agent.end().await;
    other.end().await;
}
