//! End policies with real connections: what a client sees when its endpoint goes away.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use proxy::Mode;
use serde_json::{Value, json};
use services::{Changes, ServiceTable};

use crate::live::Running;
use crate::net::{Namespace, World, udp};

/// The addresses of one family.
pub struct Plan {
    family: &'static str,
    pods: [&'static str; 2],
    cluster_ip: &'static str,
    service: &'static str,
    node_port: &'static str,
}

pub const V4: Plan = Plan {
    family: "IPv4",
    pods: ["10.244.0.11", "10.244.0.12"],
    cluster_ip: "10.96.0.10",
    service: "10.96.0.10:80",
    node_port: "192.168.49.2:30080",
};
pub const V6: Plan = Plan {
    family: "IPv6",
    pods: ["fd00:10:244::11", "fd00:10:244::12"],
    cluster_ip: "fd00:10:96::10",
    service: "[fd00:10:96::10]:80",
    node_port: "[fd00:c0a8:31::2]:30080",
};
const ECHO: u16 = 8081;
/// What the world's pods answer over UDP.
const NAMES: u16 = 8080;

/// Answers every byte with itself.
fn echo(pod: &Namespace) {
    let listener = pod.run(|| TcpListener::bind(("::", ECHO)).expect("bind"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut byte = [0; 1];
                while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
            });
        }
    });
}

/// A connection that was answered once, and a thread that waits for what comes next.
struct Client {
    stream: TcpStream,
    next: Receiver<Result<(), ErrorKind>>,
}

impl Client {
    fn connect(place: &Namespace, address: &str) -> Client {
        let address: SocketAddr = address.parse().expect("address");
        let mut stream =
            place.run(move || TcpStream::connect_timeout(&address, Duration::from_secs(2)).expect("connect"));
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        stream.write_all(b"x").expect("write");
        stream.read_exact(&mut [0; 1]).expect("an echo");
        let mut reader = stream.try_clone().expect("clone");
        let (tell, next) = channel();
        std::thread::spawn(move || tell.send(reader.read_exact(&mut [0; 1]).map_err(|error| error.kind())));
        Client { stream, next }
    }

    fn speak(&mut self) -> Result<(), ErrorKind> {
        self.stream.write_all(b"x").map_err(|error| error.kind())?;
        self.hear()
    }

    fn hear(&self) -> Result<(), ErrorKind> {
        self.next.recv().expect("the reader tells")
    }
}

/// A socket that is aborted where it is hears another word for it.
fn has_ended(client: &Client) -> bool {
    matches!(client.hear(), Err(ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted))
}

fn service(plan: &Plan, policy: &str, protocol: &str) -> Vec<u8> {
    json!({
        "metadata": {"name": "web", "namespace": "default", "annotations": {"fairlead.io/end-policy": policy}},
        "spec": {"clusterIP": plan.cluster_ip, "clusterIPs": [plan.cluster_ip], "type": "NodePort",
            "ports": [{"port": 80, "nodePort": 30080, "protocol": protocol}]},
    })
    .to_string()
    .into_bytes()
}

/// Endpoints by the number of their pod, and whether they terminate.
fn slice(plan: &Plan, protocol: &str, endpoints: &[(usize, bool)]) -> Vec<u8> {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|(pod, terminating)| {
            json!({"addresses": [plan.pods[*pod]], "nodeName": "node-1",
                "conditions": {"ready": !terminating, "serving": true, "terminating": terminating}})
        })
        .collect();
    let port = if protocol == "TCP" { ECHO } else { NAMES };
    json!({
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": plan.family, "ports": [{"port": port, "protocol": protocol}], "endpoints": endpoints,
    })
    .to_string()
    .into_bytes()
}

fn start(table: &mut ServiceTable, plan: &Plan, policy: &str, protocol: &str) -> Changes {
    let mut changes = table.upsert_service(&service(plan, policy, protocol)).expect("service");
    let endpoints = table.upsert_slice(&slice(plan, protocol, &[(1, false)])).expect("slice");
    changes.frontends.extend(endpoints.frontends);
    changes.synced = table.set_synced().synced;
    changes
}

/// A process in a namespace, without which nobody looks for sockets there.
struct Inhabitant(std::process::Child);

impl Inhabitant {
    fn of(place: &Namespace) -> Self {
        Inhabitant(place.run(|| std::process::Command::new("sleep").arg("600").spawn().expect("sleep")))
    }
}

impl Drop for Inhabitant {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

pub fn connections_end_as_the_service_says(mode: Mode, plan: &Plan) {
    let world = if mode == Mode::Ebpf { World::with_ebpf(false) } else { World::new() };
    let _inhabitants = [&world.node, &world.pods[0]].map(Inhabitant::of);
    world.pods.iter().for_each(echo);
    // Masqueraded, from the node itself, from a neighbour.
    let places = [(&world.client, plan.node_port), (&world.node, plan.service), (&world.pods[0], plan.service)];
    for policy in ["keep", "reset", "drain=1"] {
        let mut running = Running::start(&world, mode);
        running.change(|table| start(table, plan, policy, "TCP"));
        let mut clients: Vec<Client> = places.iter().map(|(place, to)| Client::connect(place, to)).collect();
        running.change(|table| table.upsert_slice(&slice(plan, "TCP", &[(0, false), (1, true)])).expect("slice"));
        for (client, (_, to)) in clients.iter_mut().zip(places) {
            match policy {
                "keep" => assert_eq!(client.speak(), Ok(()), "{mode} {to}: kept"),
                // It says nothing, and hears of it all the same.
                _ => assert!(has_ended(client), "{mode} {to}: {policy}"),
            }
        }
        let mut other = Client::connect(&world.client, plan.node_port);
        assert_eq!(other.speak(), Ok(()), "{mode} {policy}: a new connection has another endpoint");
        running.change(|table| table.upsert_slice(&slice(plan, "TCP", &[(1, false)])).expect("slice"));
        let mut back = Client::connect(&world.client, plan.node_port);
        assert_eq!(back.speak(), Ok(()), "{mode} {policy}: the endpoint is used again");
        running.stop();
        assert!(!world.node.command("nft", "list tables").contains("fairlead_end"), "{mode} {policy}: nothing is left");
    }
    // A pod that vanished without a word while no proxy was there: there is no way to it any more.
    let mut running = Running::start(&world, mode);
    running.change(|table| start(table, plan, "reset", "TCP"));
    let clients: Vec<Client> = places.iter().map(|(place, to)| Client::connect(place, to)).collect();
    running.stop();
    world.node.ip(&format!("route del {} dev pod1", plan.pods[1]));
    let mut running = Running::start(&world, mode);
    running.change(|table| {
        let mut changes = start(table, plan, "reset", "TCP");
        let endpoints = table.upsert_slice(&slice(plan, "TCP", &[(0, false)])).expect("slice");
        changes.frontends.extend(endpoints.frontends);
        changes
    });
    for (client, (_, to)) in clients.iter().zip(places) {
        assert!(has_ended(client), "{mode} {to}: the endpoint had gone before");
    }
    running.stop();
}

#[test]
fn nftables_ends_connections() {
    connections_end_as_the_service_says(Mode::Nftables, &V4);
    connections_end_as_the_service_says(Mode::Nftables, &V6);
}

#[test]
fn iptables_ends_connections() {
    connections_end_as_the_service_says(Mode::Iptables, &V4);
}

#[test]
fn ebpf_ends_connections() {
    connections_end_as_the_service_says(Mode::Ebpf, &V4);
    connections_end_as_the_service_says(Mode::Ebpf, &V6);
}

/// UDP has no connections, but clients that keep their port keep their endpoint.
#[test]
fn a_udp_client_is_moved() {
    a_udp_client_is_moved_by(&World::new(), Mode::Nftables);
    a_udp_client_is_moved_by(&World::with_ebpf(false), Mode::Ebpf);
}

pub fn a_udp_client_is_moved_by(world: &World, mode: Mode) {
    for (policy, after) in [("keep", 1), ("reset", 0)] {
        let mut running = Running::start(world, mode);
        running.change(|table| start(table, &V4, policy, "UDP"));
        let port = 5400 + after as u16;
        assert_eq!(udp(&world.client, V4.node_port, port).expect("answer").0, 1);
        running.change(|table| table.upsert_slice(&slice(&V4, "UDP", &[(0, false), (1, true)])).expect("slice"));
        let ask = || udp(&world.client, V4.node_port, port).map(|(pod, _)| pod);
        if after == 1 {
            let seen: Vec<_> = (0..20).map(|_| ask()).collect();
            assert!(seen.contains(&Ok(1)) && !seen.contains(&Ok(0)), "{policy}: it stays: {seen:?}");
        } else {
            // The flow is forgotten beside the commit; an answer that comes just then is lost.
            let patience = std::time::Instant::now() + Duration::from_secs(10);
            while ask() != Ok(0) {
                assert!(std::time::Instant::now() < patience, "{policy}: it is moved");
            }
        }
        running.stop();
    }
}
