//! However the objects came to be what they are, the kernel holds what a fresh start would write, and packets go where
//! they go in every other mode; failures on the way and restarts change nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use linux::nft;
use linux::nft::Packet;
use proxy::NodeView;
use proxy::dataplane::nftables::Nftables;
use proxy::dataplane::{Change, Dataplane};
use services::ServiceTable;

use crate::case::{self, Objects, node};
use crate::cases::fates;
use crate::differences;
use crate::modes::{Subject, on_fakes, whole};

/// Numbers that look random and are the same every time.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        dice.below(2);
        dice
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    pub fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

/// How many random cases to try.
pub fn random_cases(here: u64) -> u64 {
    match std::env::var("FAIRLEAD_CASES") {
        Ok(cases) => cases.parse().expect("FAIRLEAD_CASES is a number"),
        Err(_) => here,
    }
}

/// What happens to one object: its lines are these from now on; none: it is deleted.
#[derive(Clone, Debug)]
enum Event {
    Set {
        object: String,
        lines: Vec<String>,
    },
    /// The proxy starts anew, over what the kernel holds.
    Restart,
}

const SERVICE_OPTIONS: &[&str] = &[
    "",
    "type=ClusterIP",
    "nodePort=30100",
    "nodePort=30101 external=Local",
    "nodePort=30102 external=Local internal=Local",
    "affinity=60",
    "internal=Local",
    "externalIPs=198.51.100.6",
    "balancer=198.51.100.7,2001:db8:198::7 external=Local",
    "balancer=198.51.100.8 sources=203.0.113.0/24,203.0.113.128/25,192.168.49.0/24",
    "balancer=198.51.100.9 sources=203.0.113.0/24 nodePort=30103",
    "nodePort=30104 otherProxy=mine",
];

/// Node ports and external addresses belong to one Service each, as the API server sees to it.
fn service_line(service: usize, dice: &mut Dice) -> String {
    let addresses = match dice.below(4) {
        0 => format!("10.96.0.{}", 10 + service),
        1 => format!("fd00:10:96::{}", 10 + service),
        _ => format!("10.96.0.{0},fd00:10:96::{0}", 10 + service),
    };
    let (protocol, options) = (["TCP", "TCP", "UDP", "SCTP"][service], dice.of(SERVICE_OPTIONS));
    let own = |text: &str| {
        text.replace("=301", &format!("=30{}", 1 + service)).replace("100.", &format!("{}.", 100 + service))
    };
    format!(
        "service s{service} {addresses} 80/{protocol} {}",
        own(options).replace("198::7", &format!("198::{service}7"))
    )
}

const NODES: &[&str] = &[
    "node zone=a",
    "node zone=b",
    "node masqueradeAll",
    "node nodePortAddresses=192.168.49.2",
    "node addresses=192.168.49.2,192.168.50.2,fd00:c0a8:31::2,fd00:c0a8:32::2",
    "node ejected=10.244.0.11:8080/TCP ejected=10.244.1.12:8080/TCP",
    "node ejected=[fd00:10:244::11]:8080/TCP ejected=10.244.1.13:8080/UDP",
];

fn event(dice: &mut Dice) -> Event {
    let service = dice.below(4);
    match dice.below(10) {
        0 => Event::Set { object: format!("service {service}"), lines: Vec::new() },
        1..=3 => Event::Set { object: format!("service {service}"), lines: vec![service_line(service, dice)] },
        4 => Event::Set { object: "node".into(), lines: vec![dice.of(NODES).to_string()] },
        5 => Event::Restart,
        kind => {
            let (slice, v6) = (dice.below(2), kind == 6);
            let protocol = ["TCP", "TCP", "UDP", "SCTP"][service];
            let endpoints = (0..dice.below(4)).map(|_| {
                let (node, host) = (dice.below(3), 10 + dice.below(4));
                let address =
                    if v6 { format!("[fd00:10:244:{node}::{host}]") } else { format!("10.244.{node}.{host}") };
                let state =
                    dice.of(&["", "", "", "", "notReady", "terminating", "dying", "forZone=a", "forNode=node-1"]);
                let node = node + 1;
                format!("endpoint s{service} {address}:8080 node-{node} over={protocol} slice=-{slice} {state}")
            });
            // The controller writes an endpoint once per slice.
            let endpoints: BTreeMap<String, String> =
                endpoints.map(|line| (line.split(' ').nth(2).expect("address").to_owned(), line)).collect();
            let object = format!("slice {service} {slice} {v6}");
            Event::Set { object, lines: endpoints.into_values().collect() }
        }
    }
}

fn packets(node: &NodeView) -> Vec<Packet> {
    let mut packets = Vec::new();
    for v6 in [false, true] {
        let (sources, mut to): (&[&str], Vec<String>) = match v6 {
            false => (&["10.244.0.7", "10.244.0.11", "192.168.49.2", "203.0.113.9", "192.0.2.1"], Vec::new()),
            true => (&["fd00:10:244::7", "fd00:10:244::11", "fd00:c0a8:31::2", "2001:db8:203::9"], Vec::new()),
        };
        for service in 0..4 {
            let own = node.addresses.iter().filter(|address| address.is_ipv6() == v6);
            let own: Vec<SocketAddr> =
                own.flat_map(|own| (0..5).map(move |port| (*own, 30_100 + 100 * service + port).into())).collect();
            to.extend(own.iter().map(SocketAddr::to_string));
            match v6 {
                false => {
                    to.extend([80, 81].map(|port| format!("10.96.0.{}:{port}", 10 + service)));
                    to.extend((6..10).map(|host| format!("198.51.{}.{host}:80", 100 + service)));
                }
                true => {
                    to.extend([80, 81].map(|port| format!("[fd00:10:96::{}]:{port}", 10 + service)));
                    to.push(format!("[2001:db8:198::{service}7]:80"));
                }
            }
        }
        for to in &to {
            for source in sources {
                for protocol in [6, 17, 132] {
                    packets.push(Packet {
                        from: (source.parse::<std::net::IpAddr>().expect("source"), 40_000).into(),
                        to: to.parse().expect("destination"),
                        protocol,
                    });
                }
            }
        }
    }
    packets
}

/// As a relay would send it: nobody sees the source.
fn relayed(fates: BTreeMap<nft::Fate, u64>) -> BTreeMap<nft::Fate, u64> {
    let mut all = BTreeMap::new();
    for (fate, weight) in fates {
        let fate = match fate {
            nft::Fate::Sent { to, .. } => nft::Fate::Sent { to, masqueraded: true },
            fate => fate,
        };
        *all.entry(fate).or_default() += weight;
    }
    all
}

/// The kernel may fail now and then.
fn insist<E: std::fmt::Display>(what: &str, mut attempt: impl FnMut() -> Result<(), E>) -> Result<(), String> {
    let mut result = attempt();
    for _ in 0..8 {
        if result.is_ok() {
            break;
        }
        result = attempt();
    }
    result.map_err(|error| format!("{what}: {error}"))
}

struct History {
    objects: BTreeMap<String, Vec<String>>,
    node: NodeView,
    /// What may be sent, given the node.
    packets: Vec<Packet>,
    table: ServiceTable,
    subjects: Vec<Box<dyn Subject>>,
}

impl History {
    fn new() -> Result<Self, String> {
        let mut table = ServiceTable::new();
        table.set_synced();
        let node = node();
        let mut subjects = on_fakes(Some(3));
        for subject in &mut subjects {
            insist("start", || subject.start(&table, &node))?;
        }
        Ok(History { objects: BTreeMap::new(), packets: packets(&node), node, table, subjects })
    }

    fn objects(&self) -> Objects {
        let services = self.objects.iter().filter(|(name, _)| !name.starts_with("slice"));
        let slices = self.objects.iter().filter(|(name, _)| name.starts_with("slice"));
        let lines: Vec<&String> = services.chain(slices).flat_map(|(_, lines)| lines).collect();
        Objects::parse(&lines)
    }

    fn play(&mut self, event: &Event) -> Result<(), String> {
        let mut again = matches!(event, Event::Restart);
        let mut changes = Vec::new();
        if let Event::Set { object, lines } = event {
            self.objects.insert(object.clone(), lines.clone());
            let objects = self.objects();
            let all = objects.apply(&mut self.table);
            changes.extend(all.into_iter().flat_map(|changes| changes.frontends));
            again = objects.node != self.node;
            if again {
                self.packets = packets(&objects.node);
            }
            self.node = objects.node;
        }
        for subject in &mut self.subjects {
            let mode = subject.mode();
            match again {
                true => insist("start", || subject.start(&self.table, &self.node)),
                false => insist("change", || subject.change(&changes, &self.node)),
            }
            .map_err(|error| format!("{mode}: {error}"))?;
        }
        for (subject, mut fresh) in self.subjects.iter_mut().zip(on_fakes(None)) {
            insist("fresh start", || fresh.start(&self.table, &self.node))?;
            let (held, expected) = (subject.dump(), fresh.dump());
            if held != expected {
                return Err(format!("{} holds\n{held}\nwhere a fresh start writes\n{expected}", subject.mode()));
            }
        }
        Ok(())
    }

    /// Some packets, each in all modes; `others` are the same modes over a table that has other slots.
    fn trace(&mut self, dice: &mut Dice, count: usize, others: &mut [Box<dyn Subject>]) -> Result<(), String> {
        for _ in 0..count {
            let packet = dice.of(&self.packets);
            let mut first = None;
            for subject in self.subjects.iter_mut().chain(others.iter_mut()) {
                let mode = subject.mode();
                let mut found = fates(|draw| subject.trace(packet.clone(), &self.node, draw));
                let (first_mode, expected) = first.get_or_insert_with(|| (mode, found.clone()));
                let mut expected = expected.clone();
                let is_connected = case::CONNECTED.contains(&mode) || case::CONNECTED.contains(first_mode);
                if case::RELAYED.contains(&mode) || (is_connected && case::is_own(packet, &self.node)) {
                    (found, expected) = (relayed(found), relayed(expected));
                }
                let near = |fate: &nft::Fate, weight: &u64| {
                    expected.get(fate).is_some_and(|expected| expected.abs_diff(*weight) <= 2)
                };
                let same = found.len() == expected.len() && found.iter().all(|(fate, weight)| near(fate, weight));
                let is_listed = || differences::explain(packet, &self.node, &self.table, [mode, *first_mode]);
                if !same && !is_listed() {
                    return Err(format!("{packet:?}\n {first_mode}: {expected:?}\n {mode}: {found:?}"));
                }
            }
        }
        Ok(())
    }
}

/// What goes wrong, if anything does.
fn play(events: &[Event], seed: u64) -> Result<(), String> {
    let mut dice = Dice::new(seed);
    let mut history = History::new()?;
    for event in events {
        history.play(event)?;
        history.trace(&mut dice, 6, &mut [])?;
    }
    // The same objects in one go: other ids, other slots.
    let table = history.objects().table();
    let mut fresh = on_fakes(None);
    for subject in &mut fresh {
        insist("fresh start", || subject.start(&table, &history.node))?;
    }
    history.trace(&mut dice, 20, &mut fresh)
}

/// Leaves out what the failure does not need.
fn minimal(mut events: Vec<Event>, seed: u64) -> Vec<Event> {
    let mut at = 0;
    while at < events.len() {
        let mut fewer = events.clone();
        fewer.remove(at);
        // Which packets are drawn depends on how many events there are: a few seeds are tried.
        match (0..8).any(|more| play(&fewer, seed + more).is_err()) {
            true => events = fewer,
            false => at += 1,
        }
    }
    events
}

#[test]
fn every_history_ends_where_a_fresh_start_does_in_every_mode() {
    let (next, last) = (AtomicU64::new(0), random_cases(60));
    let histories = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= last {
                break;
            }
            let mut dice = Dice::new(seed);
            let events: Vec<Event> = (0..1 + dice.below(14)).map(|_| event(&mut dice)).collect();
            if let Err(what) = play(&events, seed) {
                // The others need not go on.
                next.store(last, Ordering::Relaxed);
                let minimal = minimal(events, seed);
                let what = (0..8).find_map(|more| play(&minimal, seed + more).err()).unwrap_or(what);
                panic!("history {seed}: {minimal:#?}\n{what}");
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(histories))));
}

/// Many events in one life, with a kernel that fails one commit in three.
#[test]
fn a_long_history_ends_where_a_fresh_start_does() {
    let mut dice = Dice::new(7);
    let mut history = History::new().expect("a start");
    for round in 0..200 {
        let event = event(&mut dice);
        history.play(&event).unwrap_or_else(|what| panic!("round {round}, {event:?}: {what}"));
    }
}

/// One changed endpoint of a Service with many is one element, and a restart is none.
#[test]
fn a_changed_endpoint_costs_one_element() {
    let node = node();
    let line = |host: u32| format!("endpoint web 10.244.{}.{}:8080 node-2", 1 + host / 200, 1 + host % 200);
    let service = "service web 10.96.0.10 80/TCP nodePort=30080".to_owned();
    let slice = |hosts: &[u32]| {
        let lines: Vec<String> = std::iter::once(service.clone()).chain(hosts.iter().map(|host| line(*host))).collect();
        let objects = Objects::parse(&lines);
        (objects.services, objects.slices)
    };
    let all: Vec<u32> = (0..300).collect();
    let (services, slices) = slice(&all);
    let mut table = ServiceTable::new();
    table.upsert_service(services[0].to_string().as_bytes()).expect("service");
    table.upsert_slice(slices[0].to_string().as_bytes()).expect("slice");
    table.set_synced();
    let mut dataplane = Nftables::new(nft::Fake::default());
    let base = Nftables::<nft::Fake>::base(&node);
    dataplane.commit(Some(&base), &whole::<Nftables<nft::Fake>>(&table, &node)).expect("commit");

    // Replaced: one slot is rewritten (an element removed and one added).
    let mut others = all.clone();
    others[100] = 301;
    let changes = table.upsert_slice(slice(&others).1[0].to_string().as_bytes()).expect("slice");
    let entries = |frontend: &services::Frontend| Nftables::<nft::Fake>::entries(frontend, &node);
    let change = &changes.frontends[0];
    let change = Change {
        id: change.id,
        before: change.before.as_ref().map(|before| entries(before)),
        after: change.after.as_ref().map(|after| entries(after)),
    };
    let before = dataplane.nft().changed;
    dataplane.commit(None, &[change]).expect("commit");
    assert!(dataplane.nft().changed - before <= 4, "{} elements changed", dataplane.nft().changed - before);

    // A restart, with a table seeded from the kernel, whose list comes in another order.
    let fake = dataplane.nft().clone();
    let mut again = Nftables::new(fake);
    let mut table = ServiceTable::with_seed(again.read().expect("read"));
    table.upsert_slice(slice(&others).1[0].to_string().as_bytes()).expect("slice");
    table.upsert_service(services[0].to_string().as_bytes()).expect("service");
    table.set_synced();
    let before = again.nft().changed;
    again.commit(Some(&base), &whole::<Nftables<nft::Fake>>(&table, &node)).expect("commit");
    assert_eq!(again.nft().changed, before, "a restart changes nothing");
}
