//! Addresses of virtual routers, of which Debian's keepalived is a part: one owner at every instant while nobody is cut off.

use std::time::Duration;

use linux::packet::Tap;

use super::monitor::{Monitor, overlaps};
use super::node::{INTERVAL, Node, ROUTER};
use super::probe::Probe;
use super::{kills, vips};
use crate::net::{Daemon, LINK, Net};

const HOSTS: [&str; 2] = ["a", "b"];
const PRIORITIES: [u8; 2] = [200, 150];
const THEIRS: &str = "keepalived";

fn keepalived(net: &Net) -> Daemon {
    let instance = |(place, vip): (usize, std::net::IpAddr)| {
        format!(
            "vrrp_instance vip{place} {{\n state BACKUP\n interface {LINK}\n virtual_router_id {ROUTER}\n priority 100\n \
             advert_int 1\n virtual_ipaddress {{ {vip}/{} dev {LINK} }}\n }}\n",
            if vip.is_ipv4() { 32 } else { 128 }
        )
    };
    let instances: String = vips().into_iter().enumerate().map(instance).collect();
    let text = format!("global_defs {{ vrrp_version 3\n router_id {THEIRS}\n }}\n{instances}");
    let config = net.write("keepalived.conf", &text);
    let pid = |name: &str| net.dir().join(format!("{name}.pid")).display().to_string();
    let (main, vrrp, check) = (pid("main"), pid("vrrp"), pid("checkers"));
    let words = ["keepalived", "-n", "-l", "-P", "-f", &config, "-p", &main, "-r", &vrrp, "-c", &check];
    net.start(THEIRS, &words)
}

#[test]
fn virtual_routers_move_as_routers_leave_and_die() {
    let net = Net::new(&["a", "b", THEIRS, "client"]);
    let monitor = Monitor::start(&net);
    let _probe = Probe::start(&net, "client", 4);
    let start = |place: usize| Node::start(&net, &HOSTS, HOSTS[place], Some(PRIORITIES[place]));
    let owned_by = |name: &str| {
        for vip in vips() {
            crate::net::until("it has both addresses", || monitor.owner(vip).as_deref() == Some(name));
        }
    };
    let _keepalived = keepalived(&net);
    owned_by(THEIRS);
    let (first, mut second) = (start(0), start(1));
    owned_by(HOSTS[0]);
    // One that leaves says so.
    first.leave();
    owned_by(HOSTS[1]);
    let mut first = start(0);
    owned_by(HOSTS[0]);

    let mut gaps = Vec::new();
    for round in 0..kills() {
        let dead = Tap::now();
        drop(first);
        gaps.push(monitor.claimed(vips()[round as usize % 2], dead, |port| port != HOSTS[0]));
        owned_by(HOSTS[1]);
        if round.is_multiple_of(3) {
            drop(second);
            owned_by(THEIRS);
            second = start(1);
        }
        first = start(0);
        owned_by(HOSTS[0]);
    }
    gaps.sort();
    println!("{} owners killed: another has the address after {:?} to {:?}", gaps.len(), gaps[0], gaps[gaps.len() - 1]);
    for vip in vips() {
        let said = monitor.of(vip);
        // Who is greater speaks, and the one before is silent as soon as it has heard that.
        let both = overlaps(&said, INTERVAL * 2);
        let longest = both.iter().map(|(from, to, _)| to.saturating_sub(*from)).max().unwrap_or(Duration::ZERO);
        assert!(longest < INTERVAL, "{vip}: two owners at a time: {both:?}");
        println!(
            "{vip}: {} claims; the longest that a greater one and the one before both spoke was {longest:?}",
            said.len()
        );
    }
    drop((first, second));
}
