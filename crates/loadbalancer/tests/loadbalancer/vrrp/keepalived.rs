//! Debian's keepalived and ours share an address: each follows the other, in both roles, over IPv4 and IPv6, by multicast and one
//! by one. Whoever says that it has the address is seen on the wire.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux::link::{Links, Mac};
use linux::packet::{PacketSocket, Protocol};
use loadbalancer::vrrp::holder::{Holder, Notice};
use loadbalancer::vrrp::instance::RouterConfig;
use loadbalancer::vrrp::machine::Settings;
use loadbalancer::vrrp::packet::Checksum;

use crate::net::{Daemon, LINK, Net, address, until};

const ID: u8 = 51;
/// A stall of three of them would be taken for a death.
const INTERVAL: Duration = Duration::from_secs(1);

fn vip(v4: bool) -> IpAddr {
    address(100, v4)
}

fn config(v4: bool, priority: u8, peers: Vec<IpAddr>) -> RouterConfig {
    RouterConfig {
        name: "vip".into(),
        interface: LINK.into(),
        id: ID,
        settings: Settings { priority, interval: INTERVAL, preempts: true, preempt_delay: Duration::ZERO },
        addresses: vec![vip(v4)],
        peers,
        source: None,
        checksum: Checksum::default(),
        waits: false,
    }
}

/// Ours on a host.
fn hold(net: &Net, host: &str, config: RouterConfig) -> Holder {
    let said = host.to_owned();
    let start = move || {
        Holder::start([config], move |notice| match notice {
            Notice::Took(_) => println!("{said} holds it"),
            Notice::GaveUp(_) => println!("{said} has given it up"),
        })
    };
    net.host(host).run(start).expect("the host can be entered").expect("it holds")
}

fn keepalived(net: &Net, host: &str, v4: bool, priority: u8, peer: Option<(IpAddr, IpAddr)>) -> Daemon {
    let unicast =
        peer.map_or(String::new(), |(own, other)| format!("unicast_src_ip {own}\n unicast_peer {{ {other} }}\n"));
    let length = if v4 { 32 } else { 128 };
    let text = format!(
        "global_defs {{ vrrp_version 3\n router_id {host}\n vrrp_garp_master_delay 1\n }}\n\
         vrrp_instance vip {{\n state BACKUP\n interface {LINK}\n virtual_router_id {ID}\n priority {priority}\n \
         advert_int 1\n {unicast} virtual_ipaddress {{ {}/{length} dev {LINK} }}\n }}\n",
        vip(v4)
    );
    let config = net.write("keepalived.conf", &text);
    let pid = |name: &str| net.dir().join(format!("{name}.pid")).display().to_string();
    let (main, vrrp, check) = (pid("main"), pid("vrrp"), pid("checkers"));
    // In a pid file each, as several of them run at a time.
    let words = ["keepalived", "-n", "-l", "-P", "-f", &config, "-p", &main, "-r", &vrrp, "-c", &check];
    net.start(host, &words)
}

fn has(net: &Net, host: &str, address: IpAddr) -> bool {
    let links = Links::open(&net.host(host)).expect("its links");
    links.addresses().expect("listed").iter().any(|held| held.address.addr() == address)
}

/// Only this one of both has the address.
fn is_at(net: &Net, host: &str, other: &str, v4: bool) -> bool {
    has(net, host, vip(v4)) && !has(net, other, vip(v4))
}

fn mac(net: &Net, host: &str) -> Mac {
    let links = Links::open(&net.host(host)).expect("its links");
    links.link(LINK).expect("looked up").expect("a link").mac.expect("a hardware address")
}

/// Who says on the client's link that it has the IPv4 address, until stopped.
struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(Instant, Mac)>>,
}

impl Capture {
    fn start(net: &Net, host: &str) -> Capture {
        let stop = Arc::new(AtomicBool::new(false));
        let (namespace, ended) = (net.host(host), stop.clone());
        let listen = move || {
            let link = Links::current().expect("links").link(LINK).expect("looked up").expect("a link");
            let socket = PacketSocket::open(link.index, Protocol::Arp, 0).expect("a packet socket");
            let (mut said, mut buffer) = (Vec::new(), [0; 128]);
            while !ended.load(Ordering::Relaxed) {
                match socket.receive(&mut buffer).expect("received") {
                    // The sender's protocol address of ARP (RFC 826).
                    Some((28.., from))
                        if IpAddr::from([buffer[14], buffer[15], buffer[16], buffer[17]]) == vip(true) =>
                    {
                        said.push((Instant::now(), from));
                    }
                    Some(_) => {}
                    None => std::thread::park_timeout(Duration::from_millis(1)),
                }
            }
            said
        };
        Capture { stop, thread: std::thread::spawn(move || namespace.run(listen).expect("the host can be entered")) }
    }

    fn end(self) -> Vec<(Instant, Mac)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the capture ends")
    }
}

/// Both roles, one after the other, and each end of ours and of theirs.
fn roles(v4: bool, by_multicast: bool) {
    let net = Net::new(&["ours", "theirs", "client"]);
    let (own, other) = (address(1, v4), address(2, v4));
    let peers = if by_multicast { Vec::new() } else { vec![other] };
    let theirs = (!by_multicast).then_some((other, own));
    let capture = Capture::start(&net, "client");

    // Ours is greater, and comes first.
    let holder = hold(&net, "ours", config(v4, 200, peers.clone()));
    until("ours holds it", || has(&net, "ours", vip(v4)));
    let daemon = keepalived(&net, "theirs", v4, 100, theirs);
    // keepalived listens, and leaves it where it is; then ours ends, and says so.
    until("keepalived runs", || net.logs().contains("BACKUP"));
    assert!(!has(&net, "theirs", vip(v4)), "it is a backup");
    drop(holder);
    until("keepalived has it", || is_at(&net, "theirs", "ours", v4));

    // Ours comes back and takes it.
    let holder = hold(&net, "ours", config(v4, 200, peers.clone()));
    until("ours has it again", || is_at(&net, "ours", "theirs", v4));
    drop(holder);
    until("keepalived has it again", || is_at(&net, "theirs", "ours", v4));

    // As a backup of keepalived ours waits for its end.
    let holder = hold(&net, "ours", config(v4, 50, peers));
    let asked = Instant::now();
    until("a while passes", || asked.elapsed() > INTERVAL * 4);
    assert!(is_at(&net, "theirs", "ours", v4), "ours is a backup");
    drop(daemon);
    until("ours has it", || is_at(&net, "ours", "theirs", v4));
    drop(holder);
    until("nobody has it", || !has(&net, "ours", vip(v4)));

    let said = capture.end();
    if v4 {
        let (ours, theirs) = (mac(&net, "ours"), mac(&net, "theirs"));
        let order: Vec<Mac> = said.iter().map(|(_, mac)| *mac).collect();
        let mut turns = order.clone();
        turns.dedup();
        assert!(turns.iter().all(|one| [ours, theirs].contains(one)), "{turns:?}");
        // Ours, theirs, ours, theirs, ours: nobody speaks out of turn.
        assert_eq!(turns, [ours, theirs, ours, theirs, ours], "{order:?}");
    }
}

#[test]
fn both_roles_over_ipv4_by_multicast() {
    roles(true, true);
}

#[test]
fn both_roles_over_ipv4_one_by_one() {
    roles(true, false);
}

#[test]
fn both_roles_over_ipv6_by_multicast() {
    roles(false, true);
}

#[test]
fn both_roles_over_ipv6_one_by_one() {
    roles(false, false);
}

/// Two of ours: the active one is cut off, then its cable is put back; and what a killed process leaves is taken by the kernel.
#[test]
fn ours_follow_each_other() {
    let net = Net::new(&["a", "b"]);
    let quick = |priority| {
        let mut one = config(true, priority, Vec::new());
        one.settings.interval = Duration::from_millis(200);
        one
    };
    let first = hold(&net, "a", quick(200));
    let _second = hold(&net, "b", quick(100));
    until("the greater has it", || is_at(&net, "a", "b", true));
    net.set_cable("a", false);
    let cut = Instant::now();
    until("the other has it", || has(&net, "b", vip(true)));
    println!("followed {:?} after the cut", cut.elapsed());
    net.set_cable("a", true);
    until("only the greater has it", || is_at(&net, "a", "b", true));
    // A router that takes no part holds nothing.
    first.set_priority("vip", None);
    until("the other has it", || is_at(&net, "b", "a", true));
    first.set_priority("vip", Some(200));
    until("the greater has it again", || is_at(&net, "a", "b", true));
    // An address that nobody renews is gone by itself.
    let links = Links::open(&net.host("b")).expect("its links");
    let left = linux::link::Address { link: LINK.into(), address: "10.77.0.200/32".parse().expect("a range") };
    links.lend(&left, 1).expect("lent");
    assert!(has(&net, "b", left.address.addr()));
    until("the kernel has taken it", || !has(&net, "b", left.address.addr()));
}
