//! Routes that Debian's bird and FRR are told: which nodes lead to an address, as the wire has it and as the routers hold it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use linux::packet::Tap;
use loadbalancer::bgp::bfd::Timing;
use loadbalancer::bgp::speaker::Speaker;
use loadbalancer::bgp::update::Path;

use super::kills;
use super::monitor::Monitor;
use super::node::{Node, ORDER};
use super::stream::{Table, Tables};
use crate::bgp::routers::{BFD, Bird, Frr, OURS, ROUTER, neighbour_of};
use crate::net::{Net, address, until};

/// One speaks over IPv4, the other over IPv6; each leads to networks of both families.
const NODES: [(&str, bool); 2] = [("a", true), ("b", false)];
/// Places of the routers among the hosts.
const BIRD: usize = 3;
const FRR: usize = 4;
/// So many packets of BFD in a row are lost only where somebody is cut off: a machine with other work stalls for less than 3 s.
const CALM: u8 = 15;
const NETS: [&str; 2] = ["198.51.100.1/32", "2001:db8:1::1/128"];

/// The address that a node speaks from.
fn own(node: usize) -> IpAddr {
    address(node + 1, NODES[node].1)
}

/// What a router has to which these nodes, and no others, lead.
fn table(nodes: &[usize]) -> Table {
    let by: BTreeSet<IpAddr> = nodes.iter().map(|node| own(*node)).collect();
    let nets = NETS.iter().filter(|_| !by.is_empty());
    nets.map(|net| (net.parse().expect("a range"), by.clone())).collect()
}

struct Scene<'a> {
    monitor: &'a Monitor,
    bird: Bird<'a>,
    frr: Frr<'a>,
}

impl Scene<'_> {
    /// The table of each router, as it was told until now.
    fn told(&self) -> [Table; 2] {
        let mut tables = Tables::default();
        self.monitor.segments().iter().for_each(|segment| tables.take(segment));
        [BIRD, FRR].map(|place| tables.of(&[address(place, true), address(place, false)]))
    }

    /// The same as the router itself says.
    fn held(&self) -> [Table; 2] {
        let mut held = [Table::new(), Table::new()];
        for (node, (name, _)) in NODES.iter().enumerate() {
            let bird = self.bird.ask(&format!("show route protocol {name}"));
            let frr = ["ipv4", "ipv6"]
                .map(|family| self.frr.ask(&format!("show bgp {family} unicast neighbors {} routes", own(node))));
            for net in NETS {
                let parsed: IpNet = net.parse().expect("a range");
                for (table, is_there) in held.iter_mut().zip([bird.contains(net), frr.concat().contains(net)]) {
                    if is_there {
                        table.entry(parsed).or_default().insert(own(node));
                    }
                }
            }
        }
        held
    }

    /// Waits until both routers were told, and hold, that these nodes lead to the networks.
    fn lead(&self, nodes: &[usize]) {
        let wanted = table(nodes);
        until("both routers were told so", || self.told().iter().all(|table| *table == wanted));
        self.hold(nodes);
    }

    /// Waits until both routers hold it. Of a session's end nothing need be on the wire where somebody is cut off.
    fn hold(&self, nodes: &[usize]) {
        let wanted = table(nodes);
        until("both routers hold it", || self.held().iter().all(|table| *table == wanted));
    }

    /// Waits until the routers watch both nodes; they would notice no cut before.
    fn watched(&self) {
        let all = NODES.len();
        until("bird watches", || self.bird.ask("show bfd sessions").matches(" Up ").count() == all);
        until("FRR watches", || self.frr.ask("show bfd peers").matches("Status: up").count() == all);
    }

    /// How often a network had no node for a router from one time to another.
    fn holes(&self, from: Duration, to: Duration) -> usize {
        let (mut tables, mut holes) = (Tables::default(), 0);
        for segment in &self.monitor.segments() {
            tables.take(segment);
            if segment.at > from && segment.at < to {
                let told = [BIRD, FRR].map(|place| tables.of(&[address(place, true), address(place, false)]));
                holes += told.iter().filter(|table| table.len() < NETS.len()).count();
            }
        }
        holes
    }
}

#[test]
fn routers_hold_what_living_nodes_announce() {
    let net = Net::new(&["a", "b", "bird", "frr"]);
    let monitor = Monitor::start(&net);
    let blocks = NODES.iter().enumerate().map(|(node, (name, v4))| {
        format!("protocol bgp {name} {{ {} bfd on; }}\n", Bird::session(BIRD, node + 1, *v4))
    });
    let bird = Bird::start_with(&net, CALM, &blocks.collect::<String>());
    let peers = (0..NODES.len()).map(|node| {
        let peer = own(node);
        format!(
            " neighbor {peer} remote-as {OURS}\n neighbor {peer} timers connect 1\n neighbor {peer} bfd {CALM} 200 200\n \
             address-family ipv4 unicast\n  neighbor {peer} activate\n exit-address-family\n \
             address-family ipv6 unicast\n  neighbor {peer} activate\n exit-address-family\n"
        )
    });
    let bgp = format!(
        "router bgp {ROUTER}\n bgp router-id 10.77.0.{FRR}\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n{}",
        peers.collect::<String>()
    );
    let scene = Scene { monitor: &monitor, bird, frr: Frr::start(&net, &bgp) };
    let start = |node: usize, nets: &[&str]| {
        let test = "wire::bgp::speaks_until_it_is_told_to_end";
        let mut started = Node::run(&net, NODES[node].0, test, &node.to_string());
        started.tell(&nets.join(" "));
        started
    };
    let (mut first, mut second) = (start(0, &NETS), start(1, &[]));
    scene.lead(&[0]);

    // A planned move: the new one announces before the old one withdraws, and at no time nobody leads there.
    let before = Tap::now();
    second.tell(&NETS.join(" "));
    scene.lead(&[0, 1]);
    first.tell("");
    scene.lead(&[1]);
    assert_eq!(scene.holes(before, Tap::now()), 0, "somebody leads there all the time");
    second.tell("");
    scene.lead(&[]);
    first.tell(&NETS.join(" "));
    second.tell(&NETS.join(" "));
    scene.lead(&[0, 1]);

    // Who is cut off from the routers leads nowhere, and the other one goes on.
    for (alone, other) in [(0, 1), (1, 0)] {
        scene.watched();
        let before = Tap::now();
        net.part(&[NODES[alone].0]);
        scene.hold(&[other]);
        assert_eq!(scene.holes(before, Tap::now()), 0, "the other one leads there all the time");
        net.part(&[]);
        scene.lead(&[0, 1]);
    }

    let mut gaps = Vec::new();
    for _ in 0..kills() {
        let dead = Tap::now();
        drop(first);
        scene.lead(&[1]);
        assert_eq!(scene.holes(dead, Tap::now()), 0, "the other one leads there all the time");
        gaps.push(Tap::now() - dead);
        first = start(0, &NETS);
        scene.lead(&[0, 1]);
    }
    println!("{} speakers killed: both routers said so after {:?} at most", gaps.len(), gaps.iter().max());
    // Who leaves withdraws.
    first.leave();
    second.leave();
    scene.lead(&[]);
}

#[test]
#[ignore = "a node of the test beside it, which starts it as a process"]
fn speaks_until_it_is_told_to_end() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let node: usize = order.parse().expect("a place");
    let speaker = Speaker::start(Default::default(), |_| ()).expect("a speaker");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("it can be read");
        let nets = line.split_whitespace().map(|net| (net.parse().expect("a range"), Path::default()));
        let routes: BTreeMap<IpNet, Path> = nets.collect();
        let to = |place: usize| {
            let mut neighbour = neighbour_of(node + 1, place, NODES[node].1);
            neighbour.bfd = Some(Timing { multiplier: CALM, ..BFD });
            (place.to_string(), (neighbour, routes.clone()))
        };
        speaker.set_orders([BIRD, FRR].map(to).into());
    }
}
