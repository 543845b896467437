//! The loop itself, with real packets: objects change while clients talk.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use proxy::{Config, Feed, Mode, Status};
use services::{Changes, ServiceTable};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::net::{Namespace, World, node_view, tcp, udp};
use crate::objects::{service, slice};
use serde_json::json;

pub struct Running {
    pub table: Arc<RwLock<ServiceTable>>,
    changes: broadcast::Sender<Arc<Changes>>,
    pub status: watch::Receiver<Status>,
    pub switch: proxy::Switch,
    token: CancellationToken,
    pub runtime: tokio::runtime::Runtime,
    pub metrics: Arc<proxy::Metrics>,
    task: tokio::task::JoinHandle<Result<(), proxy::Error>>,
    /// Kept, or the loop would see it close.
    pub node: watch::Sender<Arc<proxy::NodeView>>,
}

impl Running {
    pub fn start(world: &World, mode: Mode) -> Self {
        Self::start_in(&world.node, mode, proxy::Watching::default(), world.hooks())
    }

    pub fn start_in(node: &Namespace, mode: Mode, watching: proxy::Watching, hooks: Option<proxy::Hooks>) -> Self {
        let namespace = std::fs::File::open(&node.path).expect("namespace").into();
        Self::start_at(Some(namespace), mode, watching, node_view(), hooks)
    }

    /// With another view of the node.
    pub fn start_with(world: &World, mode: Mode, view: proxy::NodeView) -> Self {
        let namespace = std::fs::File::open(&world.node.path).expect("namespace").into();
        Self::start_at(Some(namespace), mode, proxy::Watching::default(), view, world.hooks())
    }

    /// In the namespace of this process.
    pub fn here(mode: Mode) -> Self {
        Self::start_at(None, mode, proxy::Watching::default(), node_view(), None)
    }

    pub fn start_at(
        namespace: Option<OwnedFd>,
        mode: Mode,
        watching: proxy::Watching,
        view: proxy::NodeView,
        hooks: Option<proxy::Hooks>,
    ) -> Self {
        let seed = proxy::found(mode, namespace.as_ref().map(std::os::fd::AsFd::as_fd), hooks.as_ref()).expect("seed");
        let table = Arc::new(RwLock::new(ServiceTable::with_seed(seed)));
        let (changes, receiver) = broadcast::channel(16);
        let (sender, status) = watch::channel(Status::default());
        let (node, node_receiver) = watch::channel(Arc::new(view));
        let token = CancellationToken::new();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("tokio");
        let metrics: Arc<proxy::Metrics> = Arc::default();
        let config = Config { mode, node: node_receiver, namespace, hooks, metrics: metrics.clone(), watching };
        let feed = Feed { table: table.clone(), changes: receiver };
        let (switch, requests) = proxy::switch();
        let task = runtime.spawn(proxy::run_switchable(config, feed, sender, requests, token.clone()));
        Running { table, changes, status, switch, token, runtime, metrics, task, node }
    }

    /// Changes the table and waits until the kernel has it.
    pub fn change(&mut self, change: impl FnOnce(&mut ServiceTable) -> Changes) {
        let commits = self.status.borrow().commits;
        let changes = change(&mut self.table.write().expect("table"));
        self.changes.send(Arc::new(changes)).expect("the loop listens");
        let status = &mut self.status;
        self.runtime.block_on(async {
            let done = status.wait_for(|status| status.commits > commits && status.pending == 0);
            let done = tokio::time::timeout(Duration::from_secs(10), done).await.map(|done| done.is_ok());
            assert_eq!(done, Ok(true), "no commit: {:?}", status.borrow().error);
        });
    }

    pub fn stop(self) {
        self.token.cancel();
        self.runtime.block_on(self.task).expect("joined").expect("no error");
    }
}

pub fn endpoints_change_while_clients_talk(mode: Mode) {
    let world = if mode == Mode::Ebpf { World::with_ebpf(false) } else { World::new() };
    let mut running = Running::start(&world, mode);
    let dns = |pods: &[(&str, &str)]| slice("names", 8080, "UDP", pods);
    let (first, second) = (("10.244.0.11", "node-1"), ("10.244.0.12", "node-1"));
    // Nothing is committed before the lists are complete.
    running
        .table
        .write()
        .expect("table")
        .upsert_service(&service(
            "names",
            json!({"clusterIPs": ["10.96.0.12"],
        "type": "NodePort", "ports": [{"port": 80, "nodePort": 30012, "protocol": "UDP"}]}),
        ))
        .expect("service");
    running.change(|table| table.set_synced());
    assert!(udp(&world.client, "192.168.49.2:30012", 5353).is_err());
    running.change(|table| table.upsert_slice(&dns(&[first])).expect("slice"));
    // One client that never changes its port: each answer must come from whoever is there now.
    for (endpoints, expected) in [(&[first][..], 0), (&[second][..], 1), (&[first][..], 0)] {
        running.change(|table| {
            table.delete_slice("default", "names-1");
            table.upsert_slice(&dns(endpoints)).expect("slice")
        });
        for _ in 0..3 {
            assert_eq!(udp(&world.client, "192.168.49.2:30012", 5353).expect("answer").0, expected);
            assert_eq!(udp(&world.pods[1], "10.96.0.12:80", 5353).expect("answer").0, expected);
        }
    }
    // A flow to an endpoint that stays is left alone; one to nobody is refused.
    running.change(|table| table.upsert_slice(&dns(&[first, second])).expect("slice"));
    assert_eq!(udp(&world.client, "192.168.49.2:30012", 5353).expect("answer").0, 0);
    running.change(|table| table.upsert_slice(&dns(&[])).expect("slice"));
    assert!(udp(&world.client, "192.168.49.2:30012", 5353).is_err());
    // The proxy stops; Services go on, and a new start finds them.
    running.change(|table| table.upsert_service(&service("web", json!({}))).expect("service"));
    running.change(|table| table.upsert_slice(&slice("web", 8080, "TCP", &[first])).expect("slice"));
    running.stop();
    assert_eq!(tcp(&world.pods[1], "10.96.0.10:80").expect("answer").0, 0);
    let mut running = Running::start(&world, mode);
    running.table.write().expect("table").upsert_service(&service("web", json!({}))).expect("service");
    running.table.write().expect("table").upsert_slice(&slice("web", 8080, "TCP", &[second])).expect("slice");
    running.change(|table| table.set_synced());
    assert_eq!(tcp(&world.pods[0], "10.96.0.10:80").expect("answer").0, 1);
    assert!(
        running.status.borrow().about.contains("table")
            || running.status.borrow().about.contains("maps")
            || running.status.borrow().about.contains("-save")
    );
    running.stop();
}

#[test]
fn nftables_follows_endpoints() {
    endpoints_change_while_clients_talk(Mode::Nftables);
}

#[test]
fn iptables_follows_endpoints() {
    endpoints_change_while_clients_talk(Mode::Iptables);
}

#[test]
fn ebpf_follows_endpoints() {
    endpoints_change_while_clients_talk(Mode::Ebpf);
}

/// A connected UDP socket cannot be sent elsewhere: it is told when its endpoint has gone, and only then.
#[test]
fn ebpf_hands_back_connected_sockets() {
    let world = World::with_ebpf(false);
    let mut running = Running::start(&world, Mode::Ebpf);
    let udp_service = || service("names", json!({"ports": [{"port": 80, "protocol": "UDP"}]}));
    let (first, second) = (("10.244.0.11", "node-1"), ("10.244.0.12", "node-1"));
    let dns = |pods: &[(&str, &str)]| slice("names", 8080, "UDP", pods);
    running.table.write().expect("table").upsert_service(&udp_service()).expect("service");
    running.table.write().expect("table").upsert_slice(&dns(&[first])).expect("slice");
    running.change(|table| table.set_synced());
    let socket = world.node.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
        socket.connect("10.96.0.10:80").expect("connect");
        socket
    });
    assert_eq!(socket.peer_addr().expect("peer"), "10.96.0.10:80".parse().expect("address"), "what it asked for");
    let ask = || socket.send(b"hello").and_then(|_| socket.recv(&mut [0; 64])).map(drop).map_err(|error| error.kind());
    assert_eq!(ask(), Ok(()));
    running.change(|table| table.upsert_slice(&dns(&[first, second])).expect("slice"));
    assert_eq!(ask(), Ok(()), "its endpoint is still there");
    running.change(|table| table.upsert_slice(&dns(&[second])).expect("slice"));
    assert_eq!(ask(), Err(std::io::ErrorKind::PermissionDenied));
    socket.connect("10.96.0.10:80").expect("connect");
    assert_eq!(ask(), Ok(()));
    running.stop();
}

/// A node changes its mode: Services go on, an open connection too, and nothing of the old mode is left.
#[test]
fn modes_are_swapped_without_cleaning() {
    let world = World::with_ebpf(false);
    let fill = |running: &mut Running| {
        let mut table = running.table.write().expect("table");
        table.upsert_service(&service("web", json!({}))).expect("service");
        table.upsert_slice(&slice("web", 8080, "TCP", &[("10.244.0.11", "node-1")])).expect("slice");
        drop(table);
        running.change(|table| table.set_synced());
        assert_eq!(
            tcp(&world.pods[1], "10.96.0.10:80").map(|(pod, _)| pod),
            Ok(0),
            "{}",
            running.status.borrow().about
        );
    };
    let tables = || {
        let text = world.node.command("nft", "list tables inet");
        // The world's own.
        let is_ours = |line: &&str| *line != "table inet pods" && !line.contains("keeper");
        text.lines().filter(is_ours).map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let pins = world.hooks().expect("hooks").pins;
    // The programs that pick; those that translate what has begun may stay.
    let has_programs = || {
        let folders = std::fs::read_dir(&pins).into_iter().flatten().flatten();
        folders.into_iter().any(|folder| folder.path().join("link-connect4").exists())
    };
    let has_chains = || world.node.command("iptables-nft-save", "").contains("KUBE-S");
    let of = |mode| match mode {
        Mode::Nftables => vec!["table inet fairlead", "table inet fairlead-watch"],
        Mode::Userspace => vec!["table inet fairlead-userspace"],
        Mode::Ipvs => vec!["table inet fairlead-ipvs", "table inet fairlead-watch"],
        Mode::Iptables => vec!["table inet fairlead-watch"],
        Mode::Ebpf => vec![],
    };
    let modes = [Mode::Iptables, Mode::Ebpf, Mode::Nftables, Mode::Userspace];
    for mode in modes.into_iter().chain(modes.into_iter().rev()) {
        let mut running = Running::start(&world, mode);
        fill(&mut running);
        running.stop();
        assert_eq!(
            (tables(), has_chains(), has_programs()),
            (of(mode).into_iter().map(str::to_owned).collect(), mode == Mode::Iptables, mode == Mode::Ebpf),
            "{mode}"
        );
    }
}

/// A kernel without IPVS is told so at once, with the names of the modules to load.
#[test]
fn ipvs_says_what_the_kernel_lacks() {
    let has_ipvs = std::path::Path::new("/proc/net/ip_vs").exists();
    match proxy::found(Mode::Ipvs, None, None) {
        Ok(_) => {}
        Err(error) => {
            let text = error.to_string();
            assert!(
                !has_ipvs && text.contains("IPVS (module ip_vs)") && text.contains("--proxy-mode=nftables"),
                "{text}"
            );
        }
    }
}
