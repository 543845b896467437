//! Virtual routers without a network: several machines on a wire that can be cut.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use loadbalancer::vrrp::machine::{Action, Machine, Settings, State};

const MS: Duration = Duration::from_millis(1);

fn settings(priority: u8) -> Settings {
    Settings { priority, interval: 100 * MS, preempts: true, preempt_delay: Duration::ZERO }
}

fn address(place: usize) -> IpAddr {
    IpAddr::from([192, 0, 2, place as u8 + 1])
}

struct Wire {
    hosts: Vec<Machine>,
    intervals: Vec<Duration>,
    now: Duration,
    /// Hosts that neither hear nor are heard; the dead do not live on either.
    cut: BTreeSet<usize>,
    dead: BTreeSet<usize>,
    /// Who has the addresses.
    owners: BTreeSet<usize>,
    /// Each change of owner.
    history: Vec<(Duration, usize, bool)>,
}

impl Wire {
    fn new(all: &[Settings]) -> Wire {
        let hosts: Vec<Machine> =
            all.iter().enumerate().map(|(place, one)| Machine::new(*one, address(place))).collect();
        Wire {
            hosts,
            intervals: all.iter().map(|one| one.interval).collect(),
            now: Duration::ZERO,
            cut: BTreeSet::new(),
            dead: BTreeSet::new(),
            owners: BTreeSet::new(),
            history: Vec::new(),
        }
    }

    fn start(&mut self) {
        for place in 0..self.hosts.len() {
            let actions = self.hosts[place].start(self.now);
            self.act(place, actions);
        }
    }

    fn act(&mut self, place: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Take => {
                    self.owners.insert(place);
                    self.history.push((self.now, place, true));
                }
                Action::GiveUp => {
                    self.owners.remove(&place);
                    self.history.push((self.now, place, false));
                }
                Action::Advertise(priority) if !self.cut.contains(&place) => {
                    let interval = self.intervals[place];
                    for other in (0..self.hosts.len()).filter(|other| *other != place) {
                        if self.cut.contains(&other) || self.dead.contains(&other) {
                            continue;
                        }
                        let answer = self.hosts[other].receive(priority, interval, address(place), self.now);
                        self.act(other, answer);
                    }
                }
                Action::TellAgain => self.history.push((self.now, place, true)),
                Action::Advertise(_) => {}
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let alive = |wire: &Wire| (0..wire.hosts.len()).filter(|p| !wire.dead.contains(p)).collect::<Vec<_>>();
        while let Some(at) = alive(self).iter().filter_map(|p| self.hosts[*p].next()).min().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            for place in alive(self) {
                let actions = self.hosts[place].tick(self.now);
                self.act(place, actions);
            }
        }
        self.now = end;
    }

    fn owner(&self) -> Vec<usize> {
        self.owners.iter().copied().collect()
    }
}

#[test]
fn the_greatest_priority_holds_and_the_next_follows() {
    let mut wire = Wire::new(&[settings(100), settings(200), settings(150)]);
    wire.start();
    wire.run(2000 * MS);
    assert_eq!(wire.owner(), [1], "{:?}", wire.history);
    // It dies: three intervals and the skew of the next one later, that one holds.
    let died = wire.now;
    wire.dead.insert(1);
    wire.owners.remove(&1);
    wire.run(1000 * MS);
    assert_eq!(wire.owner(), [2]);
    let (at, ..) = wire.history.last().copied().expect("a change");
    assert!(at - died <= 350 * MS, "{:?}", at - died);
    assert_eq!(wire.hosts[0].state(), State::Backup);
}

#[test]
fn a_planned_end_is_followed_at_once_and_never_are_two_owners() {
    let mut wire = Wire::new(&[settings(100), settings(200)]);
    wire.start();
    wire.run(2000 * MS);
    let ended = wire.now;
    let last = wire.hosts[1].stop();
    assert_eq!(last, [Action::GiveUp, Action::Advertise(0)], "silent first, and then it says so");
    wire.act(1, last);
    wire.dead.insert(1);
    wire.run(1000 * MS);
    assert_eq!(wire.owner(), [0]);
    let (at, ..) = wire.history.last().copied().expect("a change");
    assert!(at - ended <= 70 * MS, "{:?}", at - ended);
}

#[test]
fn whoever_comes_back_preempts_or_not_or_later() {
    for (preempts, delay, expected) in
        [(true, Duration::ZERO, [1, 1]), (false, Duration::ZERO, [0, 0]), (true, 5000 * MS, [0, 1])]
    {
        let second = Settings { preempts, preempt_delay: delay, ..settings(200) };
        let mut wire = Wire::new(&[settings(100), second]);
        wire.dead.insert(1);
        let first = wire.hosts[0].start(wire.now);
        wire.act(0, first);
        wire.run(2000 * MS);
        assert_eq!(wire.owner(), [0]);
        wire.dead.clear();
        let actions = wire.hosts[1].start(wire.now);
        wire.act(1, actions);
        wire.run(2000 * MS);
        assert_eq!(wire.owner(), [expected[0]], "{preempts} {delay:?} {:?}", wire.history);
        wire.run(6000 * MS);
        assert_eq!(wire.owner(), [expected[1]], "{preempts} {delay:?} {:?}", wire.history);
    }
}

#[test]
fn a_priority_that_sinks_gives_way() {
    let mut wire = Wire::new(&[settings(100), settings(200)]);
    wire.start();
    wire.run(2000 * MS);
    let now = wire.now;
    let actions = wire.hosts[1].set_priority(50, now);
    wire.act(1, actions);
    wire.run(2000 * MS);
    assert_eq!(wire.owner(), [0]);
}

/// Under partition it is the RFC's: each side has one. It heals to one.
#[test]
fn a_partition_has_two_owners_and_heals_to_one() {
    let mut wire = Wire::new(&[settings(100), settings(100)]);
    wire.start();
    wire.run(2000 * MS);
    // Of equals the greater address wins.
    wire.cut.insert(1);
    wire.run(2000 * MS);
    assert_eq!(wire.owner(), [0, 1]);
    wire.cut.clear();
    wire.history.clear();
    wire.run(500 * MS);
    assert_eq!(wire.owner(), [1]);
    // The network believes the one who spoke last: that has to be who stays.
    assert_eq!(wire.history.last().map(|(_, place, has)| (*place, *has)), Some((1, true)), "{:?}", wire.history);
}

#[test]
fn the_owner_for_good_speaks_at_once() {
    let mut wire = Wire::new(&[settings(254), settings(255)]);
    wire.start();
    assert_eq!(wire.owner(), [1]);
    // The backup learns the interval of whoever speaks.
    let slow = Settings { interval: 1000 * MS, ..settings(255) };
    let mut wire = Wire::new(&[settings(254), slow]);
    wire.start();
    wire.run(900 * MS);
    assert!(wire.hosts[0].down_interval() >= 3000 * MS);
    assert_eq!(wire.owner(), [1]);
}
