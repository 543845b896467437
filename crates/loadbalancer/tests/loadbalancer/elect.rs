//! Nodes that exchange heartbeats over links that lose, delay and part, in a time of our own. At every instant nobody but one
//! node may speak for an address: until the end that it was told last, whether or not it hears anything new.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use loadbalancer::{Elector, Heartbeat, LEASE, Plan, Speech};

const STEP: Duration = Duration::from_millis(5);

struct World {
    now: Duration,
    names: Vec<String>,
    electors: Vec<Option<Elector>>,
    /// What each may say, as its kernel knows it.
    rights: Vec<Speech>,
    flying: Vec<(Duration, usize, usize, Heartbeat)>,
    /// Pairs (from, to) that do not hear each other.
    cut: BTreeSet<(usize, usize)>,
    /// Nodes that do not get to run.
    stopped: BTreeSet<usize>,
    plan: Plan,
    random: u64,
}

impl World {
    fn new(nodes: usize, addresses: u8) -> World {
        let names: Vec<String> = (0..nodes).map(|n| format!("node-{n}")).collect();
        let plan = Plan {
            members: names.iter().cloned().collect(),
            addresses: (0..addresses).map(|n| (IpAddr::from([192, 0, 2, n]), None)).collect(),
        };
        let mut world = World {
            now: Duration::ZERO,
            electors: (0..nodes).map(|_| None).collect(),
            rights: vec![Speech::default(); nodes],
            flying: Vec::new(),
            cut: BTreeSet::new(),
            stopped: BTreeSet::new(),
            names,
            plan,
            random: 7,
        };
        (0..nodes).for_each(|node| world.start(node));
        world
    }

    fn start(&mut self, node: usize) {
        let incarnation = self.random() | 1;
        let mut elector = Elector::new(&self.names[node], 1, incarnation, self.now);
        elector.set_plan(self.plan.clone(), self.now);
        self.electors[node] = Some(elector);
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn part(&mut self, one: &[usize], other: &[usize]) {
        self.cut = one.iter().flat_map(|a| other.iter().flat_map(|b| [(*a, *b), (*b, *a)])).collect();
    }

    fn post(&mut self, from: usize, to: usize, beat: Heartbeat) {
        let beat = Heartbeat::decode(&beat.encode()).expect("what is written can be read");
        let late = Duration::from_millis(self.random() % 30);
        // One in twenty is lost.
        if !self.cut.contains(&(from, to)) && !self.random().is_multiple_of(20) {
            self.flying.push((self.now + late, from, to, beat));
        }
    }

    /// Lets time pass, and looks at every step.
    fn run(&mut self, milliseconds: u64) {
        let end = self.now + Duration::from_millis(milliseconds);
        while self.now < end {
            self.now += STEP;
            let (due, later) = std::mem::take(&mut self.flying).into_iter().partition(|(at, ..)| *at <= self.now);
            self.flying = later;
            for (_, from, to, beat) in due {
                if self.cut.contains(&(from, to)) || self.stopped.contains(&to) {
                    continue;
                }
                if let Some(answer) = self.electors[to].as_mut().and_then(|elector| elector.receive(beat, self.now)) {
                    self.post(to, from, answer);
                }
            }
            for node in 0..self.names.len() {
                if self.stopped.contains(&node) {
                    continue;
                }
                let Some(elector) = &mut self.electors[node] else { continue };
                let beats = elector.tick(self.now);
                let others: Vec<String> = elector.others().cloned().collect();
                self.rights[node] = elector.speech(self.now);
                for (beat, name) in beats.into_iter().zip(others) {
                    let to = self.names.iter().position(|known| *known == name).expect("a node");
                    self.post(node, to, beat);
                }
            }
            self.owners();
        }
    }

    /// Who may speak now for each address.
    fn owners(&self) -> BTreeMap<IpAddr, usize> {
        let mut owners = BTreeMap::new();
        for (node, right) in self.rights.iter().enumerate().filter(|(_, right)| right.until > self.now) {
            for address in &right.addresses {
                if let Some(other) = owners.insert(*address, node) {
                    panic!("{:?}: {other} and {node} both may speak for {address}", self.now);
                }
            }
        }
        owners
    }

    fn kill(&mut self, node: usize) {
        // A process that is gone says nothing, whatever its kernel would still let pass.
        self.electors[node] = None;
        self.rights[node] = Speech::default();
    }

    fn all_owned(&self) -> bool {
        self.owners().len() == self.plan.addresses.len()
    }
}

#[test]
fn every_address_has_one_owner_and_all_share_the_work() {
    let mut world = World::new(3, 60);
    world.run(2000);
    assert!(world.all_owned());
    assert_eq!(world.owners().values().collect::<BTreeSet<_>>().len(), 3);
    let mut alone = World::new(1, 4);
    alone.run(1000);
    assert!(alone.all_owned(), "one node is a majority of one");
}

#[test]
fn the_dead_are_followed_soon_and_a_stopped_owner_has_no_right() {
    let mut world = World::new(3, 60);
    world.run(2000);
    world.kill(0);
    world.run(700);
    assert!(world.all_owned() && !world.owners().values().any(|node| *node == 0));
    world.start(0);
    world.run(2000);
    assert!(world.owners().values().any(|node| *node == 0), "it has its share again");
    // Stopped, it keeps what it believes; the kernel's element ends by itself.
    world.stopped.insert(1);
    world.run(LEASE.as_millis() as u64 + 10);
    assert!(!world.owners().values().any(|node| *node == 1));
    world.run(600);
    assert!(world.all_owned());
    world.stopped.clear();
    world.run(2000);
    assert!(world.all_owned());
}

#[test]
fn a_minority_is_silent_and_a_split_heals() {
    let mut world = World::new(5, 60);
    world.run(2000);
    world.part(&[0, 1], &[2, 3, 4]);
    world.run(1500);
    assert!(world.all_owned() && world.owners().values().all(|node| *node >= 2));
    // Two that do not hear each other, but all others: no second owner, whatever else.
    world.part(&[2], &[3]);
    world.run(2000);
    world.cut = (0..4).map(|node| (node, 4)).collect();
    world.run(2000);
    world.cut.clear();
    world.run(2000);
    assert!(world.all_owned());
}

#[test]
fn an_even_split_is_decided_by_the_lease() {
    let mut world = World::new(4, 40);
    world.run(2000);
    world.part(&[0, 1], &[2, 3]);
    world.run(1500);
    assert!(world.owners().is_empty(), "neither half has a majority");
    world.electors[2].as_mut().expect("alive").set_tie(true);
    world.run(1500);
    assert!(world.all_owned() && world.owners().values().all(|node| *node >= 2));
}

#[test]
fn tables_that_differ_make_silence_and_no_second_owner() {
    let mut world = World::new(3, 20);
    world.run(2000);
    // As endpoints of a Local Service move, nodes hear of it at different times.
    for round in 0..30 {
        let only = BTreeSet::from([world.names[round % 3].clone()]);
        let address = IpAddr::from([192, 0, 2, (round % 4) as u8]);
        world.plan.addresses.insert(address, Some(only));
        for node in [round % 3, (round + 1) % 3, (round + 2) % 3] {
            let (plan, now) = (world.plan.clone(), world.now);
            world.electors[node].as_mut().expect("alive").set_plan(plan, now);
            world.run(40);
        }
        world.run(100);
    }
    world.run(2000);
    assert!(world.all_owned());
    for (address, allowed) in &world.plan.addresses {
        let owner = &world.names[world.owners()[address]];
        assert!(allowed.as_ref().is_none_or(|allowed| allowed.contains(owner)), "{address} is announced by {owner}");
    }
}

#[test]
fn whoever_leaves_gives_up_first() {
    let mut world = World::new(3, 30);
    world.run(2000);
    let now = world.now;
    world.electors[1].as_mut().expect("alive").leave(now);
    world.run(300);
    assert!(world.all_owned() && world.owners().values().all(|node| *node != 1));
}

#[test]
fn links_that_come_and_go_make_no_second_owner() {
    let mut world = World::new(5, 20);
    for _ in 0..300 {
        // Single directions, so that nodes differ in whom they take for alive.
        world.cut.clear();
        for _ in 0..world.random() % 8 {
            let (from, to) = (world.random() % 5, world.random() % 5);
            world.cut.insert((from as usize, to as usize));
        }
        let milliseconds = 20 + world.random() % 400;
        world.run(milliseconds);
    }
    world.cut.clear();
    world.run(2000);
    assert!(world.all_owned());
}

#[test]
fn who_takes_an_address_knows_who_had_it_if_that_one_still_serves() {
    let mut world = World::new(3, 60);
    world.run(2000);
    let before = world.owners();
    let owner_of = |world: &World, node: usize| -> BTreeMap<IpAddr, Option<String>> {
        // What each of those that had another owner says of the one before.
        let moved = world.owners().into_iter().filter(|(address, _)| before[address] == node);
        let told = moved.map(|(address, now)| {
            let elector = world.electors[now].as_ref().expect("alive");
            (address, elector.predecessors(&BTreeSet::from([address]), world.now).remove(&address))
        });
        told.collect()
    };
    let now = world.now;
    world.electors[0].as_mut().expect("alive").leave(now);
    world.run(1000);
    let told = owner_of(&world, 0);
    assert!(!told.is_empty() && told.values().all(|name| name.as_deref() == Some("node-0")), "{told:?}");
    // One that starts again takes them back from those that had them meanwhile.
    let meanwhile = world.owners();
    world.kill(0);
    world.start(0);
    world.run(2000);
    let again: Vec<IpAddr> = world.owners().into_iter().filter(|(_, now)| *now == 0).map(|(ip, _)| ip).collect();
    let elector = world.electors[0].as_ref().expect("alive");
    let told = elector.predecessors(&again.iter().copied().collect(), world.now);
    assert!(!again.is_empty() && again.iter().all(|ip| told[ip] == format!("node-{}", meanwhile[ip])), "{told:?}");
    // The dead serve nobody.
    world.kill(1);
    world.run(1000);
    let told = owner_of(&world, 1);
    assert!(!told.is_empty() && told.values().all(Option::is_none), "{told:?}");
    // Another node may not have it any more: it is there, and goes on.
    let taken: Vec<IpAddr> = world.owners().into_iter().filter(|(_, now)| *now == 0).map(|(ip, _)| ip).collect();
    let only = BTreeSet::from(["node-2".to_owned()]);
    world.plan.addresses.insert(taken[0], Some(only));
    for node in [0, 2] {
        let (plan, now) = (world.plan.clone(), world.now);
        world.electors[node].as_mut().expect("alive").set_plan(plan, now);
    }
    world.run(1000);
    assert_eq!(world.owners()[&taken[0]], 2);
    let elector = world.electors[2].as_ref().expect("alive");
    let told = elector.predecessors(&BTreeSet::from([taken[0]]), world.now);
    assert_eq!(told[&taken[0]], "node-0");
}
