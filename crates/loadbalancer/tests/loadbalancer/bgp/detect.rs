//! BFD without a network: two ends over a wire that can be cut.

use std::time::Duration;

use loadbalancer::bgp::bfd::{Bfd, Out, Timing};

const MS: Duration = Duration::from_millis(1);

fn timing(milliseconds: u32) -> Timing {
    Timing {
        transmit: milliseconds * MS,
        receive: milliseconds * MS,
        multiplier: 3,
        is_passive: false,
        least_hops: 254,
        is_multihop: false,
    }
}

struct Wire {
    ends: [Bfd; 2],
    now: Duration,
    is_cut: bool,
    /// What each end noticed, and when.
    seen: Vec<(usize, Out, Duration)>,
    packets: usize,
}

impl Wire {
    fn new(a: Timing, b: Timing) -> Wire {
        let ends = [Bfd::new(a, 11, Duration::ZERO), Bfd::new(b, 22, Duration::ZERO)];
        Wire { ends, now: Duration::ZERO, is_cut: false, seen: Vec::new(), packets: 0 }
    }

    fn run_until(&mut self, end: Duration) {
        while let Some(at) = self.ends.iter().filter_map(Bfd::next).min().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            for place in [0, 1] {
                let out = self.ends[place].tick(self.now);
                self.carry(place, out);
            }
        }
        self.now = end;
    }

    fn carry(&mut self, from: usize, out: Vec<Out>) {
        for one in out {
            match one {
                Out::Send(packet) => {
                    self.packets += 1;
                    if !self.is_cut {
                        let answer = self.ends[1 - from].receive(&packet, 255, self.now);
                        self.carry(1 - from, answer);
                    }
                }
                change => self.seen.push((from, change, self.now)),
            }
        }
    }
}

#[test]
fn both_come_up_and_notice_a_cut_in_time() {
    let mut wire = Wire::new(timing(50), timing(100));
    wire.run_until(3000 * MS);
    assert!(wire.ends.iter().all(Bfd::is_up), "{:?}", wire.seen);
    // The slower end's wish counts: about ten a second from each, a little more as they are jittered.
    let before = wire.packets;
    wire.run_until(4000 * MS);
    let count = wire.packets - before;
    assert!((20..=28).contains(&count), "{count} packets in a second");
    wire.is_cut = true;
    wire.seen.clear();
    wire.run_until(5000 * MS);
    assert_eq!(wire.seen.len(), 2, "{:?}", wire.seen);
    for (end, out, at) in &wire.seen {
        assert_eq!(*out, Out::Down);
        assert!((4200 * MS..=4300 * MS).contains(at), "end {end} at {at:?}");
    }
    wire.is_cut = false;
    wire.run_until(8000 * MS);
    assert!(wire.ends.iter().all(Bfd::is_up));
}

#[test]
fn an_administrative_end_is_noticed_at_once() {
    let mut wire = Wire::new(timing(300), timing(300));
    wire.run_until(5000 * MS);
    assert!(wire.ends.iter().all(Bfd::is_up));
    let last = wire.ends[0].stop();
    wire.carry(0, vec![last]);
    assert!(!wire.ends[1].is_up());
}

#[test]
fn a_passive_end_waits() {
    let mut wire = Wire::new(Timing { is_passive: true, ..timing(100) }, Timing { is_passive: true, ..timing(100) });
    wire.run_until(5000 * MS);
    assert_eq!(wire.packets, 0);
    let mut wire = Wire::new(Timing { is_passive: true, ..timing(100) }, timing(100));
    wire.run_until(5000 * MS);
    assert!(wire.ends.iter().all(Bfd::is_up));
}

#[test]
fn packets_from_afar_do_not_count() {
    for (is_multihop, hops, counts) in [(false, 254, false), (false, 255, true), (true, 254, true), (true, 253, false)]
    {
        let one = Timing { is_multihop, ..timing(100) };
        let (mut near, mut far) = (Bfd::new(one, 1, Duration::ZERO), Bfd::new(one, 2, Duration::ZERO));
        let Some(Out::Send(packet)) = far.tick(Duration::ZERO).pop() else { panic!("it speaks first") };
        near.receive(&packet, hops, Duration::ZERO);
        let Some(Out::Send(answer)) = near.tick(Duration::ZERO).pop() else { panic!("it speaks, too") };
        // Whoever heard the other names it.
        assert_eq!(answer[8..12] == [0, 0, 0, 2], counts, "{is_multihop} {hops}");
    }
}
