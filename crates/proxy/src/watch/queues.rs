//! Which accept queues have stopped to move. Pure: times are arguments.
//!
//! The kernel completes the handshake for a process that is stopped, so its clients are connected and never answered. A queue
//! has not moved if everybody who waited in it still does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

/// A queue that stands still for so long is frozen if its process is stopped.
const STOPPED: Duration = Duration::from_millis(200);
/// For any other process: one that takes a connection only when it is done with the last is slow, not dead.
const BUSY: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Queue {
    /// Who waited first.
    waiting: BTreeSet<u64>,
    since: Duration,
    is_stuck: bool,
}

/// Queues that were not empty at the last look.
#[derive(Debug, Default)]
pub struct Queues(BTreeMap<SocketAddr, Queue>);

impl Queues {
    /// Takes what a look found: who waits for each listener. `is_stopped` is asked of a listener that has stood still for a
    /// while. Hands back the listeners that take nobody.
    pub fn look(
        &mut self,
        found: BTreeMap<SocketAddr, BTreeSet<u64>>,
        now: Duration,
        mut is_stopped: impl FnMut(SocketAddr) -> bool,
    ) -> BTreeSet<SocketAddr> {
        let mut before = std::mem::take(&mut self.0);
        for (address, waiting) in found {
            let mut queue = match before.remove(&address) {
                Some(queue) if queue.waiting.is_subset(&waiting) => queue,
                _ => Queue { waiting, since: now, is_stuck: false },
            };
            let still = now.saturating_sub(queue.since);
            queue.is_stuck = queue.is_stuck || still >= BUSY || (still >= STOPPED && is_stopped(address));
            self.0.insert(address, queue);
        }
        self.0.iter().filter(|(_, queue)| queue.is_stuck).map(|(address, _)| *address).collect()
    }

    /// Somebody waits in a queue of which it is not known yet whether it moves.
    pub fn is_undecided(&self) -> bool {
        self.0.values().any(|queue| !queue.is_stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_stuck_if_everybody_still_waits() {
        let pod = SocketAddr::from(([10, 244, 0, 11], 8080));
        // when in ms, who waits, whether the process is stopped, whether the listener is stuck
        let looks: &[(u64, &[u64], bool, bool)] = &[
            (0, &[1], true, false),
            (100, &[1, 2], true, false),
            // The first was taken: it moves, though it is never empty.
            (250, &[2], true, false),
            (400, &[2, 3], true, false),
            (450, &[2, 3], true, true),
            // It goes on, and is thawed.
            (900, &[2, 3, 4], false, true),
            (1000, &[4], false, false),
            (1150, &[], false, false),
            // A process that is only slow has longer.
            (2000, &[5], false, false),
            (2900, &[5, 6], false, false),
            (3000, &[5, 6], false, true),
        ];
        let mut queues = Queues::default();
        for (now, waiting, stopped, expected) in looks {
            let found = match waiting {
                [] => BTreeMap::new(),
                waiting => BTreeMap::from([(pod, waiting.iter().copied().collect())]),
            };
            let stuck = queues.look(found, Duration::from_millis(*now), |_| *stopped);
            assert_eq!(stuck.contains(&pod), *expected, "at {now} ms");
            assert_eq!(queues.is_undecided(), !waiting.is_empty() && !expected, "at {now} ms");
        }
    }
}
