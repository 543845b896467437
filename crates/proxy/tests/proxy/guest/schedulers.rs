//! Each scheduler chooses as its name says, among two endpoints of one weight.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use linux::ipvs::{self, Ipvs as _, Scheduler};
use proxy::Mode;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use super::{echo, file, serve_lines};
use crate::live::Running;
use crate::net::{CLIENT, Namespace, World, node_view};
use crate::objects::{service, slice};

const NAMES: [&str; 2] = ["first", "second"];
const SERVICE: &str = "10.96.0.10:80";

/// A node whose Services are scheduled so.
struct Stage {
    world: World,
    running: Running,
}

impl Stage {
    fn new(scheduler: Scheduler) -> Self {
        let world = World::new();
        world.pods.iter().zip(NAMES).for_each(|(pod, name)| serve_lines(pod, name));
        let mut view = node_view();
        view.ipvs.scheduler = scheduler.clone();
        let mut running = Running::start_with(&world, Mode::Ipvs, view);
        let pods = slice("web", 8081, "TCP", &[("10.244.0.11", "node-1"), ("10.244.0.12", "node-1")]);
        running.table.write().expect("table").upsert_service(&service("web", json!({}))).expect("service");
        running.table.write().expect("table").upsert_slice(&pods).expect("slice");
        running.change(|table| table.set_synced());
        let file = file(&world.node);
        let held = ipvs::Socket::open(Some(file.as_fd())).expect("ipvs").services().expect("services");
        assert_eq!(held.into_iter().map(|service| service.scheduler).collect::<Vec<_>>(), [scheduler]);
        Stage { world, running }
    }

    /// A connection, and the number of the endpoint that has it.
    fn open(&self) -> (TcpStream, usize) {
        self.open_from(CLIENT, 0)
    }

    /// From an address of the client, and a port if it is not 0.
    fn open_from(&self, address: &str, port: u16) -> (TcpStream, usize) {
        let from = SocketAddr::new(address.parse().expect("address"), port);
        let to: SocketAddr = SERVICE.parse().expect("address");
        let socket = self.world.client.run(move || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
            socket.set_reuse_address(true).expect("reuse");
            // A reset ends it: the port is free at once, and IPVS has no connection to go back to.
            socket.set_linger(Some(Duration::ZERO)).expect("linger");
            socket.bind(&from.into()).expect("bind");
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).expect("connect");
            socket
        });
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let name = echo(&mut stream).expect("an answer");
        (stream, NAMES.iter().position(|known| *known == name).expect("one of them"))
    }

    fn stop(self) {
        self.running.stop();
    }
}

/// One after the other.
fn takes_turns(scheduler: Scheduler) {
    let stage = Stage::new(scheduler);
    let chosen: Vec<usize> = (0..12).map(|_| stage.open().1).collect();
    assert!(chosen.windows(2).all(|pair| pair[0] != pair[1]), "{chosen:?}");
    stage.stop();
}

/// Whoever has fewer connections is next.
fn fills_up(scheduler: Scheduler) {
    let stage = Stage::new(scheduler);
    let mut open: Vec<(TcpStream, usize)> = (0..8).map(|_| stage.open()).collect();
    let count = |open: &[(TcpStream, usize)], which| open.iter().filter(|(_, chosen)| *chosen == which).count();
    assert_eq!((count(&open, 0), count(&open, 1)), (4, 4));
    // The second one loses its connections, and gets the next ones until both have as many again.
    open.retain(|(_, chosen)| *chosen == 0);
    for _ in 0..4 {
        open.push(stage.open());
    }
    assert_eq!((count(&open, 0), count(&open, 1)), (4, 4));
    drop(open);
    stage.stop();
}

fn sources(client: &Namespace) -> Vec<String> {
    let addresses: Vec<String> = (20..40).map(|host| format!("203.0.113.{host}")).collect();
    for address in &addresses {
        client.ip(&format!("addr add {address}/32 dev eth0"));
    }
    addresses
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn rr_takes_turns() {
    takes_turns(Scheduler::RoundRobin);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn wrr_takes_turns() {
    takes_turns(Scheduler::WeightedRoundRobin);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn lc_fills_up() {
    fills_up(Scheduler::LeastConnection);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn wlc_fills_up() {
    fills_up(Scheduler::WeightedLeastConnection);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn sed_fills_up() {
    fills_up(Scheduler::ShortestExpectedDelay);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn nq_fills_up() {
    fills_up(Scheduler::NeverQueue);
}

/// Whoever asks: an address is one endpoint's.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn dh_looks_at_the_destination() {
    let stage = Stage::new(Scheduler::DestinationHash);
    let chosen: Vec<usize> = sources(&stage.world.client).iter().map(|from| stage.open_from(from, 0).1).collect();
    assert!(chosen.iter().all(|one| *one == chosen[0]), "{chosen:?}");
    stage.stop();
}

/// A client is one endpoint's, and clients are spread.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn sh_looks_at_the_source() {
    let stage = Stage::new(Scheduler::SourceHash);
    let sources = sources(&stage.world.client);
    let choose = || sources.iter().map(|from| stage.open_from(from, 0).1).collect::<Vec<_>>();
    let chosen = choose();
    assert!(chosen.contains(&0) && chosen.contains(&1), "{chosen:?}");
    assert_eq!(choose(), chosen);
    stage.stop();
}

/// A client's port counts, too: many behind one address are spread, and each keeps its endpoint.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn mh_looks_at_address_and_port() {
    let stage = Stage::new(Scheduler::Maglev);
    let choose = || (40_000..40_020).map(|port| stage.open_from(CLIENT, port).1).collect::<Vec<_>>();
    let chosen = choose();
    assert!(chosen.contains(&0) && chosen.contains(&1), "{chosen:?}");
    assert_eq!(choose(), chosen);
    stage.stop();
}

/// A module that is not there for a while.
struct Hidden(PathBuf);

impl Hidden {
    fn new(module: &str) -> Self {
        assert!(!PathBuf::from(format!("/sys/module/{module}")).exists(), "{module} is loaded already");
        let version = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a version");
        let folder = format!("/usr/lib/modules/{}/kernel/net/netfilter/ipvs", version.trim());
        let path = PathBuf::from(format!("{folder}/{module}.ko"));
        std::fs::rename(&path, path.with_extension("hidden")).expect("the guest has the module");
        Hidden(path)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        drop(std::fs::rename(self.0.with_extension("hidden"), &self.0));
    }
}

/// A node that was told to use what its kernel lacks hears of it at once, and stays in its mode.
#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn a_missing_module_is_named_at_start() {
    let hidden = Hidden::new("ip_vs_dh");
    let world = World::new();
    let mut view = node_view();
    view.ipvs.scheduler = Scheduler::DestinationHash;
    let mut running = Running::start_with(&world, Mode::Nftables, view);
    running.change(|table| table.set_synced());
    let error = running.runtime.block_on(running.switch.to(Mode::Ipvs)).expect_err("no such scheduler").to_string();
    assert!(error.contains("no scheduler dh of IPVS (module ip_vs_dh); load the modules"), "{error}");
    assert_eq!(running.status.borrow().mode, Some(Mode::Nftables));
    drop(hidden);
    running.runtime.block_on(running.switch.to(Mode::Ipvs)).expect("now it is there");
    running.stop();
}
