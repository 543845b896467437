//! The namespaces, the objects and the proxy that are measured.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use linux::link::{Address, Item, Links, Route, Veth};
use linux::netns::Netns;
use nix::sys::socket::{Backlog, listen};
use proxy::{Config, Feed, Mode, NodeView, Status};
use serde_json::json;
use services::{Changes, Place, ServiceTable};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::cgroup::Attached;
use crate::{CLIENT, Failure, Lab, NODE, PORTS, SERVER};

/// A client pod and a server pod on one node.
pub struct World {
    /// Of the ebpf mode: for the threads of clients alone.
    pub attached: Option<Attached>,
    pub client: Netns,
    pub node: Netns,
    pub server: Netns,
}

impl World {
    pub fn new(lab: &Lab, name: &str) -> Result<World, Failure> {
        let namespace = |part: &str| lab.namespace(&format!("{name}-{part}"));
        let (client, node, server) = (namespace("client")?, namespace("node")?, namespace("server")?);
        node.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/send_redirects", "0")])?;
        attach(&node, &client, CLIENT, "client")?;
        attach(&node, &server, SERVER, "server")?;
        Ok(World { attached: None, client, node, server })
    }

    pub fn for_mode(lab: &Lab, name: &str, mode: Mode) -> Result<World, Failure> {
        let attached = (mode == Mode::Ebpf).then(Attached::new);
        let world = World { attached, ..World::new(lab, name)? };
        prepare(&world.node, mode)?;
        Ok(world)
    }

    pub fn hooks(&self) -> Option<proxy::Hooks> {
        self.attached.as_ref().map(Attached::hooks)
    }

    /// Runs on a thread of the client pod, in its cgroup.
    pub fn as_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
        Ok(self.client.run(|| {
            if let Some(attached) = &self.attached {
                attached.add(nix::unistd::gettid().as_raw());
            }
            work()
        })?)
    }

    /// Accepts on all ports until told to stop.
    pub fn serve(&self, stop: &Arc<AtomicBool>) -> Result<(), Failure> {
        for port in PORTS {
            let listener = Arc::new(self.server.run(|| TcpListener::bind((SERVER, port)))??);
            // A full queue loses a SYN now and then, and who waits a second for the next one counts nothing meanwhile.
            listen(&*listener, Backlog::MAXCONN)?;
            for _ in 0..4 {
                let (stop, listener) = (stop.clone(), listener.clone());
                // The client resets what is closed here, so that nothing stays in TIME-WAIT.
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // One that was reset before it was accepted is an error, and the next one is not.
                        drop(listener.accept());
                    }
                });
            }
        }
        Ok(())
    }
}

/// What the mode must find on a node before it starts: the kubelet's hint that iptables is the legacy variant, which takes
/// seconds for 10,000 Services where the nft variant takes minutes.
pub fn prepare(node: &Netns, mode: Mode) -> Result<(), Failure> {
    if mode == Mode::Iptables {
        let hint = ["-t", "mangle", "-N", "KUBE-IPTABLES-HINT"];
        let output = node.run(|| Command::new("iptables-legacy").args(hint).output())??;
        if !output.status.success() {
            return Err(format!("iptables-legacy: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
        }
    }
    Ok(())
}

/// A cable from the node to a pod.
pub fn attach(node: &Netns, pod: &Netns, address: Ipv4Addr, link: &str) -> Result<(), Failure> {
    let net = |address: Ipv4Addr| ipnet::IpNet::new_assert(address.into(), 32);
    let veth = Veth { name: link.into(), peer: "eth0".into(), peer_netns: pod.clone(), peer_mac: None, mtu: None };
    Links::open(node)?.ensure_all(&[
        Item::Veth(veth),
        Item::Up(link.into()),
        Item::Address(Address { link: link.into(), address: net(NODE) }),
        Item::Route(Route::host(address.into()).link(link)),
    ])?;
    Links::open(pod)?.ensure_all(&[
        Item::Up("eth0".into()),
        Item::Address(Address { link: "eth0".into(), address: net(address) }),
        Item::Route(Route::default_via(NODE.into()).link("eth0").onlink()),
    ])?;
    Ok(())
}

pub fn view() -> NodeView {
    NodeView::new(
        Place { node: "node-1".into(), zone: None },
        vec![NODE.into()],
        vec!["10.244.0.0/14".parse().expect("a literal")],
        vec!["10.96.0.0/12".parse().expect("a literal")],
    )
}

pub fn cluster_ip(number: usize) -> IpAddr {
    let base = u32::from(Ipv4Addr::new(10, 96, 1, 0));
    IpAddr::V4(Ipv4Addr::from(base + number as u32))
}

pub fn service(number: usize) -> Vec<u8> {
    let ip = cluster_ip(number);
    json!({
        "metadata": {"name": format!("s{number}"), "namespace": "default"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]},
    })
    .to_string()
    .into_bytes()
}

pub fn slice(number: usize, port: u16, endpoints: impl IntoIterator<Item = Ipv4Addr>) -> Vec<u8> {
    let endpoints: Vec<_> =
        endpoints.into_iter().map(|address| json!({"addresses": [address], "nodeName": "node-2"})).collect();
    json!({
        "metadata": {"name": format!("s{number}-1"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{number}")}},
        "addressType": "IPv4", "ports": [{"port": port, "protocol": "TCP"}], "endpoints": endpoints,
    })
    .to_string()
    .into_bytes()
}

/// Endpoints that exist nowhere.
pub fn nowhere(number: usize, count: usize) -> impl Iterator<Item = Ipv4Addr> {
    let base = u32::from(Ipv4Addr::new(10, 244, 16, 0));
    (0..count).map(move |endpoint| Ipv4Addr::from(base + (number * count + endpoint) as u32 % 200_000))
}

/// The proxy's loop on a namespace.
pub struct Running {
    table: Arc<RwLock<ServiceTable>>,
    changes: broadcast::Sender<Arc<Changes>>,
    pub status: watch::Receiver<Status>,
    token: CancellationToken,
    runtime: tokio::runtime::Runtime,
    _node: watch::Sender<Arc<NodeView>>,
}

impl Running {
    pub fn start(
        mode: Mode,
        namespace: &Netns,
        table: ServiceTable,
        hooks: Option<proxy::Hooks>,
    ) -> Result<Running, Failure> {
        Self::start_with(mode, namespace, table, proxy::Watching::default(), hooks)
    }

    pub fn start_with(
        mode: Mode,
        namespace: &Netns,
        table: ServiceTable,
        watching: proxy::Watching,
        hooks: Option<proxy::Hooks>,
    ) -> Result<Running, Failure> {
        let held: OwnedFd = std::fs::File::open(namespace.path().ok_or("an unnamed namespace")?)?.into();
        let table = Arc::new(RwLock::new(table));
        let (changes, receiver) = broadcast::channel(1024);
        let (sender, status) = watch::channel(Status::default());
        let (node, receiver_of_node) = watch::channel(Arc::new(view()));
        let token = CancellationToken::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let config =
            Config { mode, node: receiver_of_node, namespace: Some(held), hooks, metrics: Arc::default(), watching };
        runtime.spawn(proxy::run(config, Feed { table: table.clone(), changes: receiver }, sender, token.clone()));
        Ok(Running { table, changes, status, token, runtime, _node: node })
    }

    pub fn change(&mut self, change: impl FnOnce(&mut ServiceTable) -> Changes) -> Result<Duration, Failure> {
        let before = self.status.borrow().commits;
        let started = Instant::now();
        let changes = {
            let mut table = self.table.write().map_err(|_| "the table's writer panicked")?;
            change(&mut table)
        };
        self.changes.send(Arc::new(changes)).map_err(|_| "the proxy has ended")?;
        let status = &mut self.status;
        self.runtime.block_on(async {
            let done = status.wait_for(|status| status.commits > before && status.pending == 0);
            tokio::time::timeout(Duration::from_secs(600), done).await.map(drop)
        })?;
        Ok(started.elapsed())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.token.cancel();
    }
}
