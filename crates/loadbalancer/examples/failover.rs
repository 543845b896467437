//! How long an address is gone when the host that has it is cut off: layer 2, VRRP, and Debian's keepalived, taking turns; how
//! soon a router forgets a node by BFD; and how long 10,000 Services take. `cargo xtask bench loadbalancer` runs it.
//!
//! Prints one line a figure: its name, p50 and p99 in milliseconds.

// Of the hosts and programs that tests have, only some are used here.
#[allow(dead_code)]
#[path = "../tests/loadbalancer/net.rs"]
mod net;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::object::Key;
use linux::link::{Links, Mac};
use linux::packet::{PacketSocket, Protocol};
use loadbalancer::bgp::bfd::Timing;
use loadbalancer::bgp::capability::Family;
use loadbalancer::bgp::session::{PeerAs, Settings as BgpSettings};
use loadbalancer::bgp::speaker::{Neighbour, Orders as BgpOrders, Speaker};
use loadbalancer::bgp::update::Path;
use loadbalancer::layer2::{Announcer, Config, Notice, Orders};
use loadbalancer::vrrp::holder::Holder;
use loadbalancer::vrrp::instance::RouterConfig;
use loadbalancer::vrrp::machine::Settings;
use loadbalancer::vrrp::packet::Checksum;
use loadbalancer::{Allocator, Metrics, Plan, Pool, PoolObject, Request};
use net::{Daemon, LINK, Net, address, until};
use serde_json::json;

const HOSTS: [&str; 3] = ["a", "b", "c"];
const CLIENT: &str = "client";
/// Between advertisements, ours and keepalived's.
const INTERVAL: Duration = Duration::from_millis(100);
/// Nothing is to move for so long before a host is cut off.
const REST: Duration = Duration::from_millis(1000);
const MANY: u32 = 10_000;

fn vip() -> IpAddr {
    address(100, true)
}

/// Hosts that share an address, and who says on the client's link that it has it.
struct Scene {
    net: Net,
    macs: Vec<(&'static str, Mac)>,
    said: Arc<Mutex<Vec<(Instant, Mac)>>>,
    stop: Arc<AtomicBool>,
}

impl Scene {
    fn new(hosts: &[&'static str]) -> Scene {
        let mut names = hosts.to_vec();
        names.push(CLIENT);
        let net = Net::new(&names);
        let mac = |name: &'static str| {
            let links = Links::open(&net.host(name)).expect("its links");
            (name, links.link(LINK).expect("looked up").expect("a link").mac.expect("a hardware address"))
        };
        let macs = hosts.iter().map(|name| mac(name)).collect();
        let (said, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (namespace, heard, ended) = (net.host(CLIENT), said.clone(), stop.clone());
        std::thread::spawn(move || namespace.run(|| capture(&heard, &ended)).expect("the client can be entered"));
        Scene { net, macs, said, stop }
    }

    /// Cuts off whoever has the address, and how long it takes until another says that it has it.
    fn trial(&self) -> Duration {
        let last = || self.said.lock().expect("held briefly").last().copied();
        until("an owner", || last().is_some());
        let owner = last().expect("an owner").1;
        let name = self.macs.iter().find(|(_, mac)| *mac == owner).expect("a host").0;
        self.net.set_cable(name, false);
        let cut = Instant::now();
        let heir = || {
            let said = self.said.lock().expect("held briefly");
            said.iter().rev().take_while(|(at, _)| *at > cut).filter(|(_, mac)| *mac != owner).last().copied()
        };
        until("an heir", || heir().is_some());
        let gone = heir().expect("an heir").0.saturating_duration_since(cut);
        self.net.set_cable(name, true);
        let healed = Instant::now();
        // It may come back to where it was.
        until("all rests", || {
            let said = self.said.lock().expect("held briefly");
            let now = said.last().map(|(_, mac)| *mac);
            let since = said.iter().rev().take_while(|(_, mac)| Some(*mac) == now).last();
            since.map_or(healed, |(at, _)| (*at).max(healed)).elapsed() > REST
        });
        gone
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn capture(said: &Mutex<Vec<(Instant, Mac)>>, stop: &AtomicBool) {
    let link = Links::current().expect("links").link(LINK).expect("looked up").expect("a link");
    let socket = PacketSocket::open(link.index, Protocol::Arp, 0).expect("a packet socket");
    let mut buffer = [0; 128];
    while !stop.load(Ordering::Relaxed) {
        match socket.receive(&mut buffer).expect("received") {
            Some((28.., from)) if IpAddr::from([buffer[14], buffer[15], buffer[16], buffer[17]]) == vip() => {
                said.lock().expect("held briefly").push((Instant::now(), from));
            }
            Some(_) => {}
            None => std::thread::park_timeout(Duration::from_millis(1)),
        }
    }
}

fn announcers(net: &Net, notice: impl Fn(Notice) + Send + Clone + 'static) -> Vec<Announcer> {
    let start = |(place, name): (usize, &&str)| {
        let config = Config {
            node: (*name).to_owned(),
            addresses: vec![address(place + 1, true)],
            cluster: 1,
            incarnation: place as u64 + 1,
        };
        let notice = notice.clone();
        net.host(name).run(|| Announcer::start(config, Arc::default(), notice)).expect("entered").expect("it announces")
    };
    HOSTS.iter().enumerate().map(start).collect()
}

fn orders(addresses: impl IntoIterator<Item = IpAddr>) -> Orders {
    let own = |place: usize| vec![address(place + 1, true)];
    let members: BTreeMap<String, Vec<IpAddr>> =
        HOSTS.iter().enumerate().map(|(place, name)| ((*name).to_owned(), own(place))).collect();
    let plan = Plan {
        members: members.keys().cloned().collect(),
        addresses: addresses.into_iter().map(|address| (address, None)).collect(),
    };
    Orders { plan, members, ..Orders::default() }
}

fn hold(net: &Net, host: &str, priority: u8) -> Holder {
    let config = RouterConfig {
        name: "vip".into(),
        interface: LINK.into(),
        id: 51,
        settings: Settings { priority, interval: INTERVAL, preempts: true, preempt_delay: Duration::ZERO },
        addresses: vec![vip()],
        peers: Vec::new(),
        source: None,
        checksum: Checksum::default(),
        waits: false,
    };
    net.host(host).run(|| Holder::start([config], |_| ())).expect("entered").expect("it holds")
}

fn keepalived(net: &Net, host: &str, priority: u8) -> Daemon {
    let text = format!(
        "global_defs {{ vrrp_version 3\n router_id {host}\n }}\nvrrp_instance vip {{\n state BACKUP\n interface {LINK}\n \
         virtual_router_id 51\n priority {priority}\n advert_int 0.1\n virtual_ipaddress {{ {}/32 }}\n }}\n",
        vip()
    );
    let config = net.write(&format!("{host}.conf"), &text);
    let files =
        ["main", "vrrp", "check"].map(|name| net.dir().join(format!("{host}-{name}.pid")).display().to_string());
    let words = ["keepalived", "-n", "-l", "-P", "-f", &config, "-p", &files[0], "-r", &files[1], "-c", &files[2]];
    net.start(host, &words)
}

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
    println!("{name} {:.1} {:.1}", at(50), at(99));
}

fn failovers(trials: usize) {
    let scenes = [Scene::new(&HOSTS), Scene::new(&HOSTS[..2]), Scene::new(&HOSTS[..2])];
    let layer2 = announcers(&scenes[0].net, |_| ());
    layer2.iter().for_each(|one| one.set_orders(orders([vip()])));
    let _vrrp = [hold(&scenes[1].net, "a", 200), hold(&scenes[1].net, "b", 100)];
    let _peers = [keepalived(&scenes[2].net, "a", 200), keepalived(&scenes[2].net, "b", 100)];
    std::thread::sleep(REST * 2);
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..trials {
        // At the same time, so that a busy moment of the machine falls on all of them.
        std::thread::scope(|scope| {
            for (scene, times) in scenes.iter().zip(&mut times) {
                scope.spawn(|| times.push(scene.trial()));
            }
        });
    }
    for (name, times) in ["layer2", "vrrp", "keepalived"].into_iter().zip(times) {
        print(name, times);
    }
}

fn bgp(trials: usize) {
    let net = Net::new(&["node", "bird"]);
    let text = "router id 10.77.0.2;\nprotocol device { }\n\
         protocol bfd { interface \"*\" { min rx interval 50 ms; min tx interval 50 ms; multiplier 3; }; }\n\
         protocol bgp node { local 10.77.0.2 as 65001; neighbor 10.77.0.1 as 65000; direct; passive; bfd on;\n\
         error wait time 1, 1; ipv4 { import all; export none; }; }\n";
    let config = net.write("bird.conf", text);
    let socket = net.dir().join("bird.ctl").display().to_string();
    let _bird = net.start("bird", &["bird", "-f", "-c", &config, "-s", &socket]);
    let metrics: Arc<Metrics> = Arc::default();
    let (own, node) = (metrics.clone(), net.host("node"));
    let speaker = node.run(|| Speaker::start(own, |_| ())).expect("entered").expect("a speaker");
    let (pace, any) = (Duration::from_millis(50), IpAddr::from([10, 77, 0, 1]));
    let neighbour = Neighbour {
        address: address(2, true),
        port: 179,
        source: None,
        hops: Some(1),
        password: None,
        settings: BgpSettings {
            local_as: 65000,
            peer_as: PeerAs::Number(65001),
            router_id: [10, 77, 0, 1].into(),
            hold_time: Duration::from_secs(90),
            keepalive: None,
            connect_retry: Duration::from_secs(1),
            families: BTreeSet::from([Family::Ipv4]),
            next_hops: BTreeMap::from([(Family::Ipv4, any)]),
            is_passive: false,
            restart_time: None,
        },
        bfd: Some(Timing {
            transmit: pace,
            receive: pace,
            multiplier: 3,
            is_passive: false,
            least_hops: 254,
            is_multihop: false,
        }),
    };
    let tell = |count: u32| {
        let nets = (0..count).map(|n| ipnet::IpNet::from(IpAddr::from((0x0a80_0000 + n).to_be_bytes())));
        let routes = nets.map(|net| (net, Path::default())).collect();
        speaker.set_orders(BgpOrders::from([("bird".to_owned(), (neighbour.clone(), routes))]));
    };
    let has = |count: u32| {
        let line = format!("{count} of {count} routes for {count} networks in table master4");
        net.ask(&["birdc", "-r", "-s", &socket, "show route count"]).lines().any(|seen| seen == line)
    };
    let is_up = || metrics.write().bfd.values().all(|is_up| *is_up);
    tell(1);
    let mut times = Vec::new();
    for _ in 0..trials {
        until("the route is there", || has(1) && is_up());
        std::thread::sleep(REST);
        net.set_cable("node", false);
        let cut = Instant::now();
        // No sleep between questions: each costs some milliseconds already.
        while !has(0) {
            assert!(cut.elapsed() < Duration::from_secs(20), "the route stays");
        }
        times.push(cut.elapsed());
        net.set_cable("node", true);
    }
    print("bgp-bfd", times);
    until("the route is there", || has(1));
    let begun = Instant::now();
    tell(MANY);
    until("all routes are there", || has(MANY));
    print("bgp-many", vec![begun.elapsed()]);
}

/// From pools and requests to addresses that are announced.
fn many() {
    let net = Net::new(&HOSTS);
    let taken: Arc<Mutex<BTreeSet<IpAddr>>> = Arc::default();
    let seen = taken.clone();
    let announcers = announcers(&net, move |notice| {
        if let Notice::Took(addresses) = notice {
            seen.lock().expect("held briefly").extend(addresses);
        }
    });
    announcers.iter().for_each(|one| one.set_orders(orders([vip()])));
    until("one is announced", || !taken.lock().expect("held briefly").is_empty());
    let begun = Instant::now();
    let object = json!({"metadata": {"name": "many"}, "spec": {"addresses": ["10.128.0.0/16"]}});
    let pool = serde_json::from_value::<PoolObject>(object).expect("a pool");
    let mut allocator = Allocator::default();
    allocator.set_pools([Pool::new(&pool).expect("a good pool")]);
    let give = |number: u32| {
        let key = Key::new("default", format!("service-{number}"));
        let request =
            Request { key, families: vec![true], ports: BTreeSet::from([("TCP".into(), 80)]), ..Request::default() };
        allocator.assign(request).expect("room for all").addresses
    };
    let given: Vec<IpAddr> = (0..MANY).flat_map(give).collect();
    announcers.iter().for_each(|one| one.set_orders(orders(given.iter().copied())));
    until("all are announced", || given.iter().all(|address| taken.lock().expect("held briefly").contains(address)));
    print("many", vec![begun.elapsed()]);
}

fn main() {
    let trials = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(50);
    failovers(trials);
    // Each takes longer, as the session has to come back.
    bgp(trials.div_ceil(5));
    many();
}
