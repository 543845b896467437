//! Debian's bird and FRR as peers, over IPv4 and IPv6: what they have in their tables.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::chown;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loadbalancer::Metrics;
use loadbalancer::bgp::bfd::Timing;
use loadbalancer::bgp::capability::Family;
use loadbalancer::bgp::session::{PeerAs, Settings};
use loadbalancer::bgp::speaker::{Neighbour, Orders, Speaker};
use loadbalancer::bgp::update::{Path, Routes};

use crate::net::{Daemon, LINK, Net, address, until};

/// Long enough for a machine with other work; and much shorter than a hold time.
pub const BFD: Timing = Timing {
    transmit: Duration::from_millis(200),
    receive: Duration::from_millis(200),
    multiplier: 5,
    is_passive: false,
    least_hops: 254,
    is_multihop: false,
};
pub const OURS: u32 = 4_200_000_000;
pub const ROUTER: u32 = 65001;

/// How the host at the first place speaks with the one at this place.
fn neighbour(place: usize, v4: bool) -> Neighbour {
    neighbour_of(1, place, v4)
}

/// How the host at one place speaks with the one at another.
pub fn neighbour_of(own: usize, place: usize, v4: bool) -> Neighbour {
    Neighbour {
        address: address(place, v4),
        port: 179,
        source: None,
        hops: Some(1),
        password: None,
        settings: Settings {
            local_as: OURS,
            peer_as: PeerAs::Number(ROUTER),
            router_id: [10, 77, 0, own as u8].into(),
            hold_time: Duration::from_secs(90),
            keepalive: None,
            connect_retry: Duration::from_secs(1),
            families: BTreeSet::from([Family::Ipv4, Family::Ipv6]),
            next_hops: BTreeMap::from([(Family::Ipv4, address(own, true)), (Family::Ipv6, address(own, false))]),
            is_passive: false,
            restart_time: None,
        },
        bfd: None,
    }
}

fn routes(nets: &[&str], path: &Path) -> Routes {
    nets.iter().map(|net| (net.parse().expect("a range"), path.clone())).collect()
}

/// A speaker on the node.
fn speak(net: &Net) -> (Speaker, Arc<Metrics>) {
    let metrics: Arc<Metrics> = Arc::default();
    let own = metrics.clone();
    let start = || Speaker::start(own, |notice| println!("{notice:?}")).expect("a speaker");
    (net.host("node").run(start).expect("the node can be entered"), metrics)
}

fn orders(all: &[(&str, &Neighbour, Routes)]) -> Orders {
    all.iter().map(|(name, one, routes)| ((*name).to_owned(), ((*one).clone(), routes.clone()))).collect()
}

pub struct Bird<'a> {
    net: &'a Net,
    _daemon: Daemon,
    socket: String,
}

impl<'a> Bird<'a> {
    /// `bgp` goes into the protocol's block.
    fn start(net: &'a Net, v4: bool, bgp: &str) -> Bird<'a> {
        let block = format!("protocol bgp node {{ {} {bgp} }}\n", Bird::session(2, 1, v4));
        Bird::start_with(net, BFD.multiplier, &block)
    }

    /// What a session of the host at one place with the one at another says first.
    pub fn session(own: usize, node: usize, v4: bool) -> String {
        format!(
            "local {} as {ROUTER}; neighbor {} as {OURS}; direct; connect retry time 1;\n\
             connect delay time 1; error wait time 1, 2;\n\
             ipv4 {{ import all; export none; }}; ipv6 {{ import all; export none; }};\n",
            address(own, v4),
            address(node, v4)
        )
    }

    /// On the host `bird`, with these protocols and this multiplier of BFD.
    pub fn start_with(net: &'a Net, multiplier: u8, protocols: &str) -> Bird<'a> {
        let text = format!(
            "router id 10.77.0.2;\nprotocol device {{ }}\n\
             protocol bfd {{ interface \"*\" {{ min rx interval 200 ms; min tx interval 200 ms; multiplier {multiplier}; }}; }}\n{protocols}"
        );
        let config = net.write("bird.conf", &text);
        let socket = net.dir().join("bird.ctl").display().to_string();
        let daemon = net.start("bird", &["bird", "-f", "-c", &config, "-s", &socket]);
        Bird { net, _daemon: daemon, socket }
    }

    pub fn ask(&self, words: &str) -> String {
        self.net.ask(&["birdc", "-r", "-s", &self.socket, words])
    }

    fn has(&self, nets: &[&str], not: &[&str]) -> bool {
        let seen = self.ask("show route");
        let has = |net: &&str| seen.lines().any(|line| line.starts_with(&format!("{net} ")));
        nets.iter().all(has) && !not.iter().any(has)
    }
}

#[test]
fn bird_learns_routes_and_their_changes_with_a_password() {
    let net = Net::new(&["node", "bird"]);
    let bird = Bird::start(&net, true, "password \"a secret\"; bfd on;");
    let (speaker, metrics) = speak(&net);
    let told = Path {
        communities: BTreeSet::from([65000 << 16 | 7]),
        large_communities: BTreeSet::from([[OURS, 1, 2]]),
        ..Path::default()
    };
    let wrong = Neighbour { password: Some("another".into()), ..neighbour(2, true) };
    let right = Neighbour { password: Some("a secret".into()), bfd: Some(BFD), ..neighbour(2, true) };
    let (four, six) = ("198.51.100.1/32", "2001:db8:1::1/128");
    speaker.set_orders(orders(&[("bird", &wrong, routes(&[four, six], &told))]));
    // Nothing goes through with another key; bird itself is ready by then.
    until("bird runs", || bird.ask("show protocols").contains("node"));
    speaker.set_orders(orders(&[("bird", &right, routes(&[four, six], &told))]));
    until("bird has both", || bird.has(&[four, six], &[]));
    for part in [
        &format!("BGP.as_path: {OURS}"),
        "BGP.next_hop: 10.77.0.1",
        "BGP.next_hop: fd77::1",
        "BGP.community: (65000,7)",
        &format!("BGP.large_community: ({OURS}, 1, 2)"),
    ] {
        until(part, || bird.ask("show route all").contains(part));
    }
    until("BFD is up on both sides", || {
        metrics.write().bfd.values().all(|is_up| *is_up) && bird.ask("show bfd sessions").contains(" Up ")
    });
    until("it is counted", || {
        let counted = metrics.text("node");
        counted.contains("metallb_bgp_session_up{peer=\"10.77.0.2:179\"} 1")
            && counted.contains("metallb_bgp_announced_prefixes_total{peer=\"10.77.0.2:179\"} 2")
    });

    // One goes, one comes; the session stays.
    let third = "198.51.100.3/32";
    speaker.set_orders(orders(&[("bird", &right, routes(&[six, third], &told))]));
    until("bird has followed", || bird.has(&[six, third], &[four]));
    // At the end all go at once.
    drop(speaker);
    until("bird has none", || bird.has(&[], &[four, six, third]));
}

#[test]
fn bird_connects_to_a_passive_node_over_ipv6() {
    let net = Net::new(&["node", "bird"]);
    let (speaker, _) = speak(&net);
    let mut passive = Neighbour { password: Some("a secret".into()), ..neighbour(2, false) };
    passive.settings.is_passive = true;
    let nets = ["198.51.100.1/32", "2001:db8:1::1/128"];
    speaker.set_orders(orders(&[("bird", &passive, routes(&nets, &Path::default()))]));
    let bird = Bird::start(&net, false, "password \"a secret\";");
    until("bird has both", || bird.has(&nets, &[]));
    // It begins anew, and so does the session.
    drop(bird);
    let bird = Bird::start(&net, false, "password \"a secret\";");
    until("bird has both again", || bird.has(&nets, &[]));
}

#[test]
fn bird_keeps_routes_while_a_node_starts_again() {
    let net = Net::new(&["node", "bird"]);
    let bird = Bird::start(&net, true, "graceful restart on;");
    let mut graceful = neighbour(2, true);
    graceful.settings.restart_time = Some(Duration::from_secs(120));
    let (kept, dropped) = ("198.51.100.1/32", "198.51.100.2/32");
    let (speaker, _) = speak(&net);
    speaker.set_orders(orders(&[("bird", &graceful, routes(&[kept, dropped], &Path::default()))]));
    until("bird has both", || bird.has(&[kept, dropped], &[]));
    drop(speaker);
    until("bird has noticed", || !bird.ask("show protocols node").contains("Established"));
    assert!(bird.has(&[kept, dropped], &[]), "they are kept");
    let (speaker, _) = speak(&net);
    speaker.set_orders(orders(&[("bird", &graceful, routes(&[kept], &Path::default()))]));
    // What is not told again is forgotten, and the other was there all the time.
    until("bird has forgotten one", || {
        let seen = bird.ask("show route");
        assert!(seen.is_empty() || seen.contains(kept), "{seen}");
        !seen.is_empty() && !seen.contains(dropped)
    });
}

/// FRR's daemons, each with a file; they drop to a user of their own.
pub struct Frr<'a> {
    net: &'a Net,
    _daemons: Vec<Daemon>,
}

impl<'a> Frr<'a> {
    pub fn start(net: &'a Net, bgp: &str) -> Frr<'a> {
        let dir = net.dir().join("frr");
        std::fs::create_dir_all(&dir).expect("a directory");
        let id = |flag| {
            let seen = Command::new("id").args([flag, "frr"]).output().expect("id runs").stdout;
            String::from_utf8_lossy(&seen).trim().parse().expect("the user frr is there: `cargo xtask deps`")
        };
        chown(&dir, Some(id("-u")), Some(id("-g"))).expect("given to frr");
        let dir = dir.display().to_string();
        let mut daemons = Vec::new();
        for (name, text) in [("zebra", "hostname router\n"), ("bfdd", "hostname router\n"), ("bgpd", bgp)] {
            let config = net.write(&format!("{name}.conf"), text);
            let program = format!("/usr/lib/frr/{name}");
            let (pid, zebra) = (format!("{dir}/{name}.pid"), format!("{dir}/zserv.api"));
            let control = format!("{dir}/bfdd.sock");
            let mut words = vec![&*program, "-f", &config, "-i", &pid, "-z", &zebra, "--vty_socket", &dir];
            words.extend(["--log", "stdout"]);
            if name == "bfdd" {
                words.extend(["--bfdctl", &control]);
            }
            daemons.push(net.start("frr", &words));
            // Each asks the one before it.
            let socket = format!("{dir}/{name}.vty");
            until(name, || std::path::Path::new(&socket).exists());
        }
        Frr { net, _daemons: daemons }
    }

    pub fn ask(&self, words: &str) -> String {
        let dir = self.net.dir().join("frr").display().to_string();
        self.net.ask(&["vtysh", "--vty_socket", &dir, "-c", words])
    }

    fn has(&self, net: &str) -> bool {
        let family = if net.contains(':') { "ipv6" } else { "ipv4" };
        self.ask(&format!("show bgp {family} unicast {net}")).contains("best")
    }
}

#[test]
fn frr_follows_and_notices_a_cut_by_bfd() {
    let net = Net::new(&["node", "frr"]);
    let frr = Frr::start(
        &net,
        &format!(
            "router bgp {ROUTER}\n bgp router-id 10.77.0.2\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n \
             timers bgp 30 90\n neighbor 10.77.0.1 remote-as {OURS}\n neighbor 10.77.0.1 timers connect 1\n \
             neighbor 10.77.0.1 bfd 5 200 200\n neighbor 10.77.0.1 password secret\n \
             address-family ipv4 unicast\n  neighbor 10.77.0.1 activate\n exit-address-family\n \
             address-family ipv6 unicast\n  neighbor 10.77.0.1 activate\n exit-address-family\n"
        ),
    );
    let (speaker, metrics) = speak(&net);
    let node = Neighbour { bfd: Some(BFD), password: Some("secret".into()), ..neighbour(2, true) };
    let nets = ["198.51.100.1/32", "2001:db8:1::1/128"];
    let told = Path { communities: BTreeSet::from([65000 << 16 | 9]), ..Path::default() };
    speaker.set_orders(orders(&[("frr", &node, routes(&nets, &told))]));
    until("FRR has both", || nets.iter().all(|net| frr.has(net)));
    until("FRR has the community", || frr.ask("show bgp ipv4 unicast 198.51.100.1/32").contains("Community: 65000:9"));
    until("BFD is up on both sides", || {
        metrics.write().bfd.values().all(|is_up| *is_up) && frr.ask("show bfd peers").contains("Status: up")
    });
    speaker.set_orders(orders(&[("frr", &node, routes(&nets[..1], &told))]));
    until("FRR has followed", || frr.has(nets[0]) && !frr.has(nets[1]));

    // The cable is pulled: without BFD both would wait for their hold times.
    let cut = Instant::now();
    net.set_cable("node", false);
    until("the route is gone", || !frr.has(nets[0]));
    until("the node has noticed, too", || metrics.write().bgp.values().all(|peer| !peer.is_up));
    println!("both have noticed {:?} after the cut of {LINK}", cut.elapsed());
    assert!(cut.elapsed() < Duration::from_secs(60), "{:?}: that was the hold time", cut.elapsed());
    net.set_cable("node", true);
    until("the route is back", || frr.has(nets[0]));
}

#[test]
fn frr_of_the_same_as_is_told_preferences() {
    let net = Net::new(&["node", "frr"]);
    let frr = Frr::start(
        &net,
        &format!(
            "router bgp {OURS}\n bgp router-id 10.77.0.2\n neighbor fd77::1 remote-as internal\n \
             neighbor fd77::1 timers connect 1\n address-family ipv6 unicast\n  neighbor fd77::1 activate\n exit-address-family\n"
        ),
    );
    let (speaker, _) = speak(&net);
    let mut node = neighbour(2, false);
    node.settings.peer_as = PeerAs::Internal;
    node.hops = None;
    let path = Path { local_pref: Some(321), ..Path::default() };
    speaker.set_orders(orders(&[("frr", &node, routes(&["198.51.100.1/32", "2001:db8:1::1/128"], &path))]));
    for net in ["198.51.100.1/32", "2001:db8:1::1/128"] {
        until("FRR has it", || frr.has(net));
        let family = if net.contains(':') { "ipv6" } else { "ipv4" };
        let seen = frr.ask(&format!("show bgp {family} unicast {net}"));
        assert!(seen.contains("localpref 321") && seen.contains("internal"), "{seen}");
    }
}
