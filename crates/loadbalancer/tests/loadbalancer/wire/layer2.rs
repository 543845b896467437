//! Voted addresses: one owner at every instant, in all cases.

use std::time::Duration;

use linux::packet::Tap;
use loadbalancer::LEASE;

use super::monitor::{Claim, Monitor, overlaps};
use super::node::Node;
use super::probe::Probe;
use super::{kills, vips};
use crate::net::Net;

const NODES: [&str; 3] = ["a", "b", "c"];
/// Votes end by the clock. This much later a busy machine may have told its kernel so, and another may have seen it.
const TICKS: Duration = Duration::from_millis(100);

struct Scene {
    nodes: Vec<Node>,
    monitor: Monitor,
    _probes: [Probe; 2],
    net: Net,
}

impl Scene {
    fn new() -> Scene {
        let net = Net::new(&["a", "b", "c", "client", "other"]);
        let monitor = Monitor::start(&net);
        let probes = [Probe::start(&net, "client", 4), Probe::start(&net, "other", 5)];
        let mut scene = Scene { nodes: Vec::new(), monitor, _probes: probes, net };
        NODES.into_iter().for_each(|name| scene.start(name));
        scene
    }

    fn start(&mut self, name: &'static str) {
        self.nodes.push(Node::start(&self.net, &NODES, name, None));
    }

    fn take(&mut self, name: &str) -> Node {
        let place = self.nodes.iter().position(|node| node.name == name).expect("it is there");
        self.nodes.swap_remove(place)
    }

    fn settled(&self) -> [String; 2] {
        vips().map(|vip| self.monitor.settled(vip))
    }

    /// All that some hosts said of the addresses in a stretch of time.
    fn said(&self, names: &[&str], from: Duration, to: Duration) -> Vec<Claim> {
        let all = vips().into_iter().flat_map(|vip| self.monitor.of(vip));
        all.filter(|one| names.contains(&one.port.as_str()) && one.at > from && one.at < to).collect()
    }
}

impl Drop for Scene {
    /// At every instant of all that has happened there was one owner.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for vip in vips() {
            let said = self.monitor.of(vip);
            let both = overlaps(&said, LEASE - TICKS);
            assert!(both.is_empty(), "{vip}: two owners at a time: {both:?}");
            println!("{vip}: {} claims, no two owners at a time", said.len());
        }
    }
}

fn name_of(name: &str) -> &'static str {
    NODES.into_iter().find(|one| *one == name).expect("a node, and no client, has the address")
}

#[test]
fn addresses_move_as_nodes_leave_and_die() {
    let mut scene = Scene::new();
    let owners = scene.settled();
    println!("{owners:?} own {:?}", vips());

    // One that leaves gives up first.
    let leaver = name_of(&owners[0]);
    let node = scene.take(leaver);
    let left = Tap::now();
    node.leave();
    let gone = scene.monitor.claimed(vips()[0], left, |port| port != leaver);
    println!("{leaver} left: another has the address after {gone:?}");
    scene.settled();
    scene.start(leaver);
    scene.settled();

    // One that is stopped is silent when its votes have ended; one that goes on knows its place.
    let stopped = name_of(&scene.settled()[1]);
    let node = scene.take(stopped);
    node.stop();
    let since = Tap::now();
    scene.monitor.claimed(vips()[1], since, |port| port != stopped);
    scene.settled();
    let until = Tap::now();
    let said = scene.said(&[stopped], since + LEASE + TICKS, until);
    assert!(said.is_empty(), "{stopped} was stopped: {said:?}");
    node.go_on();
    scene.nodes.push(node);
    scene.settled();

    let mut gaps = Vec::new();
    for round in 0..kills() {
        let which = round as usize % 2;
        let victim = name_of(&scene.settled()[which]);
        let dead = Tap::now();
        drop(scene.take(victim));
        gaps.push(scene.monitor.claimed(vips()[which], dead, |port| port != victim));
        scene.settled();
        scene.start(victim);
        scene.settled();
    }
    gaps.sort();
    println!("{} owners killed: another has the address after {:?} to {:?}", gaps.len(), gaps[0], gaps[gaps.len() - 1]);
}

#[test]
fn a_minority_is_silent_and_the_majority_keeps_or_gets_the_address() {
    let scene = Scene::new();
    let mut stayed = 0;
    for round in 0..kills() * 2 {
        let owners = scene.settled();
        // In turn the owner of the first address is cut off, and one that is not.
        let is_owner = |name: &&&str| (owners[0] == **name) == round.is_multiple_of(2);
        let alone = NODES.iter().find(is_owner).expect("one of three");
        scene.net.part(&[alone, "other"]);
        let cut = Tap::now();
        // The client is with the majority, and the other one asks the minority in vain.
        let gone = scene.monitor.claimed(vips()[0], cut + LEASE, |port| port != *alone);
        scene.settled();
        let healed = Tap::now();
        scene.net.part(&[]);
        println!("{alone} cut off, {owners:?} owned: an owner in the majority after {:?}", gone + LEASE);
        let said = scene.said(&[alone], cut + LEASE + TICKS, healed);
        assert!(said.is_empty(), "{alone} is a minority: {said:?}");
        let others = scene.monitor.of(vips()[0]);
        let moved = others.iter().find(|one| one.at > cut && one.at < healed && one.port != owners[0]);
        stayed += usize::from(moved.is_none());
    }
    println!("of {} cuts that left the owner in the majority, {stayed} moved nothing", kills());
    scene.settled();
}
