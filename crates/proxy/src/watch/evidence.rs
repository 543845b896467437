//! What is held against each endpoint, and when it is tried again. Pure: times are arguments, counted from any start.
//!
//! An endpoint with evidence against it is out. After a while it is tried: back in the pick, judged by the same evidence.
//! Each trial that fails doubles the time to the next. Before a trial the caller connects to the endpoint by itself: if even
//! that fails, the trial is put off, but not for ever, for this node may not be allowed to reach what its pods may.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use services::Protocol;

/// An endpoint's address, whatever Services it belongs to.
pub type Target = (SocketAddr, Protocol);

/// Why an endpoint is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Evidence {
    /// A first packet got no answer.
    Unanswered,
    /// A first packet was answered by a reset or an ICMP error.
    Refused,
    /// A pod of this node accepts connections and takes none of them from its queue.
    Frozen,
    /// The endpoint's node has stopped sending its heartbeat.
    NodeLost,
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Evidence::Unanswered => "it did not answer a connection's first packet",
            Evidence::Refused => "it refused a connection",
            Evidence::Frozen => "it takes no connections from its queue",
            Evidence::NodeLost => "its node has lost its heartbeat",
        })
    }
}

impl Evidence {
    /// Whether it holds until it is withdrawn, not just for the moment.
    fn lasts(self) -> bool {
        matches!(self, Evidence::Frozen | Evidence::NodeLost)
    }
}

const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
const LAST_BACK_OFF: Duration = Duration::from_secs(30);
/// A trial is not shorter.
const SHORTEST_TRIAL: Duration = Duration::from_secs(2);
/// For how long a failing connection of our own puts off the trial.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Clone, Debug, PartialEq)]
enum State {
    Out {
        /// When to try it.
        until: Duration,
    },
    /// The caller was asked to connect.
    Asked,
    /// In the pick again; healthy after this.
    Trial { until: Duration },
}

#[derive(Clone, Debug, PartialEq)]
struct Record {
    state: State,
    back_off: Duration,
    /// When it left the pick, or a trial of it failed.
    since: Duration,
    /// Evidence that has not been withdrawn.
    lasting: BTreeSet<Evidence>,
}

impl Record {
    fn is_out(&self) -> bool {
        !matches!(self.state, State::Trial { .. })
    }
}

/// What the caller should do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Connect to it and say what came of that: [`Ledger::probed`].
    Connect(Target),
    /// It has passed its trial.
    Returned(Target),
}

/// All endpoints with evidence against them.
#[derive(Clone, Debug, Default)]
pub struct Ledger(BTreeMap<Target, Record>);

impl Ledger {
    /// Takes in evidence; whether the endpoint leaves the pick because of it.
    pub fn accuse(&mut self, endpoint: Target, evidence: Evidence, now: Duration) -> bool {
        let lasting: BTreeSet<Evidence> = [evidence].into_iter().filter(|evidence| evidence.lasts()).collect();
        let Some(record) = self.0.get_mut(&endpoint) else {
            let state = State::Out { until: now + FIRST_BACK_OFF };
            self.0.insert(endpoint, Record { state, back_off: FIRST_BACK_OFF, since: now, lasting });
            return true;
        };
        record.lasting.extend(lasting);
        match &mut record.state {
            State::Trial { .. } => {
                record.back_off = (record.back_off * 2).min(LAST_BACK_OFF);
                record.state = State::Out { until: now + record.back_off };
                record.since = now;
                true
            }
            // More of what is known: from connections on their way, or because half of the others are out already. It is
            // not tried while this goes on.
            State::Out { until } => {
                *until = (*until).max(now + FIRST_BACK_OFF);
                false
            }
            State::Asked => {
                record.state = State::Out { until: now + record.back_off };
                false
            }
        }
    }

    /// Evidence that lasts does not hold any more: the endpoint is tried soon.
    pub fn withdraw(&mut self, endpoint: Target, evidence: Evidence, now: Duration) {
        if let Some(record) = self.0.get_mut(&endpoint)
            && record.lasting.remove(&evidence)
            && record.lasting.is_empty()
            && let State::Out { until } = &mut record.state
        {
            *until = now;
        }
    }

    /// Answers [`Step::Connect`].
    pub fn probed(&mut self, endpoint: Target, connected: bool, now: Duration) {
        let Some(record) = self.0.get_mut(&endpoint) else { return };
        if record.state != State::Asked {
            return;
        }
        if record.lasting.is_empty() && (connected || now.saturating_sub(record.since) >= PATIENCE) {
            record.state = State::Trial { until: now + record.back_off.max(SHORTEST_TRIAL) };
        } else {
            record.back_off = (record.back_off * 2).min(LAST_BACK_OFF);
            record.state = State::Out { until: now + record.back_off };
        }
    }

    /// What has become due.
    pub fn advance(&mut self, now: Duration) -> Vec<Step> {
        let mut steps = Vec::new();
        self.0.retain(|endpoint, record| match record.state {
            State::Out { until } if until <= now && record.lasting.is_empty() => {
                record.state = State::Asked;
                steps.push(Step::Connect(*endpoint));
                true
            }
            State::Trial { until } if until <= now => {
                steps.push(Step::Returned(*endpoint));
                false
            }
            _ => true,
        });
        steps
    }

    /// When [`Ledger::advance`] is to be called next, if nothing else happens.
    pub fn due(&self) -> Option<Duration> {
        let times = self.0.values().filter_map(|record| match record.state {
            State::Out { until } if record.lasting.is_empty() => Some(until),
            State::Trial { until } => Some(until),
            State::Out { .. } | State::Asked => None,
        });
        times.min()
    }

    /// Forgets endpoints that do not exist any more.
    pub fn retain(&mut self, exists: impl Fn(&Target) -> bool) {
        self.0.retain(|endpoint, _| exists(endpoint));
    }

    /// Those that are out.
    pub fn ejected(&self) -> BTreeSet<Target> {
        self.0.iter().filter(|(_, record)| record.is_out()).map(|(endpoint, _)| *endpoint).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn pod(host: u8) -> Target {
        (SocketAddr::from(([10, 244, 0, host], 8080)), Protocol::Tcp)
    }

    #[test]
    fn an_endpoint_leaves_at_once_and_returns_by_a_trial() {
        let mut ledger = Ledger::default();
        assert!(ledger.accuse(pod(1), Evidence::Unanswered, ms(0)));
        assert!(!ledger.accuse(pod(1), Evidence::Refused, ms(10)), "it is out already");
        assert_eq!(ledger.ejected(), BTreeSet::from([pod(1)]));
        assert_eq!(ledger.due(), Some(ms(1010)));
        assert_eq!(ledger.advance(ms(1009)), []);
        assert_eq!(ledger.advance(ms(1010)), [Step::Connect(pod(1))]);
        assert_eq!((ledger.ejected().len(), ledger.due()), (1, None), "a bare connect is no proof");
        ledger.probed(pod(1), true, ms(1020));
        assert_eq!(ledger.ejected(), BTreeSet::new());
        assert_eq!(ledger.advance(ms(3019)), []);
        assert_eq!(ledger.advance(ms(3020)), [Step::Returned(pod(1))]);
        assert_eq!(ledger.due(), None);
    }

    #[test]
    fn each_failed_trial_doubles_the_wait() {
        let mut ledger = Ledger::default();
        let mut now = ms(0);
        let mut waits = Vec::new();
        for _ in 0..7 {
            assert!(ledger.accuse(pod(1), Evidence::Unanswered, now));
            let due = ledger.due().expect("a time");
            waits.push((due - now).as_secs());
            assert_eq!(ledger.advance(due), [Step::Connect(pod(1))]);
            ledger.probed(pod(1), true, due);
            now = due + ms(100);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn a_trial_bound_to_fail_is_put_off_but_not_for_ever() {
        let mut ledger = Ledger::default();
        ledger.accuse(pod(1), Evidence::Unanswered, ms(0));
        let mut asked = 0;
        while ledger.ejected().contains(&pod(1)) {
            let now = ledger.due().expect("a time");
            assert_eq!(ledger.advance(now), [Step::Connect(pod(1))]);
            ledger.probed(pod(1), false, now);
            asked += 1;
            assert!(now <= PATIENCE + LAST_BACK_OFF);
        }
        assert!((10..20).contains(&asked), "{asked}");
    }

    #[test]
    fn evidence_that_lasts_keeps_it_out_until_it_is_withdrawn() {
        let mut ledger = Ledger::default();
        ledger.accuse(pod(1), Evidence::Frozen, ms(0));
        ledger.accuse(pod(1), Evidence::NodeLost, ms(0));
        assert_eq!((ledger.due(), ledger.advance(ms(100_000))), (None, vec![]));
        ledger.withdraw(pod(1), Evidence::Frozen, ms(100_000));
        assert_eq!(ledger.due(), None);
        ledger.withdraw(pod(1), Evidence::NodeLost, ms(100_001));
        assert_eq!(ledger.advance(ms(100_001)), [Step::Connect(pod(1))]);
        // It came back while the connection was tried: no trial.
        ledger.accuse(pod(1), Evidence::Frozen, ms(100_002));
        ledger.probed(pod(1), true, ms(100_003));
        assert_eq!(ledger.ejected(), BTreeSet::from([pod(1)]));
    }

    #[test]
    fn endpoints_are_judged_apart_and_forgotten_when_they_go() {
        let mut ledger = Ledger::default();
        ledger.accuse(pod(2), Evidence::Refused, ms(0));
        ledger.accuse(pod(1), Evidence::Refused, ms(500));
        assert_eq!(ledger.advance(ms(1000)), [Step::Connect(pod(2))]);
        ledger.retain(|endpoint| *endpoint == pod(1));
        ledger.probed(pod(2), true, ms(1000));
        assert_eq!(ledger.ejected(), BTreeSet::from([pod(1)]));
        assert_eq!(ledger.due(), Some(ms(1500)));
    }
}
