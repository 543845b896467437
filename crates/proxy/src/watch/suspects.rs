//! Which flows nobody has answered for too long: those that were seen unanswered before, long enough ago.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use linux::conntrack::Flow;

/// A first packet without an answer for so long is evidence. Within a cluster an answer takes microseconds, and clients
/// repeat it after a second.
pub const UNANSWERED: Duration = Duration::from_millis(150);

/// Client, destination and endpoint.
type Key = (SocketAddr, SocketAddr, SocketAddr);

/// The flows that were unanswered at the last look, and since when.
#[derive(Debug, Default)]
pub struct Suspects(HashMap<Key, Duration>);

impl Suspects {
    /// Takes what a look at `now` found; hands back the flows that have been unanswered for [`UNANSWERED`], and forgets
    /// those that are not among the found any more.
    pub fn look(&mut self, flows: Vec<Flow>, now: Duration) -> Vec<Flow> {
        let before = std::mem::take(&mut self.0);
        let mut old = Vec::new();
        for flow in flows {
            let key = (flow.original.0, flow.original.1, flow.reply.0);
            let since = before.get(&key).copied().unwrap_or(now);
            self.0.insert(key, since);
            if now.saturating_sub(since) >= UNANSWERED {
                old.push(flow);
            }
        }
        old
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use linux::conntrack::{Conntrack, Fake, Translator};

    use super::*;

    #[test]
    fn only_a_flow_that_stays_unanswered_is_evidence() {
        let at = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        let service = SocketAddr::from(([10, 96, 0, 10], 80));
        let flows = |ports: &[u16]| {
            let mut fake = Fake::default();
            for port in ports {
                fake.add(6, (at(*port), service), (at(8080), at(*port)));
            }
            fake.unanswered(6, Translator::Nat).expect("flows")
        };
        let mut suspects = Suspects::default();
        // when, who is unanswered, against whom that is evidence
        let looks: &[(u64, &[u16], &[u16])] = &[
            (0, &[1, 2], &[]),
            (100, &[2, 3], &[]),
            (160, &[2, 3], &[2]),
            // Answered and then, with the same port, unanswered again: another flow.
            (240, &[1], &[]),
            (310, &[1, 3], &[]),
            (400, &[1, 3], &[1]),
        ];
        for (now, found, expected) in looks {
            let old = suspects.look(flows(found), Duration::from_millis(*now));
            let ports: Vec<u16> = old.iter().map(|flow| flow.original.0.port()).collect();
            assert_eq!(ports, *expected, "at {now} ms");
        }
        suspects.look(Vec::new(), Duration::from_secs(1));
        assert!(suspects.is_empty());
    }
}
