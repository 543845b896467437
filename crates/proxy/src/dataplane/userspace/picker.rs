//! Whom a client of one Service port is sent to: round robin, or where it was before. Reads no clock.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use services::TrafficPolicy;

/// How many endpoints one connection may try.
const CANDIDATES: usize = 8;

/// The endpoints of one scope, IPv4 and IPv6.
pub type Families = [Vec<SocketAddr>; 2];

/// The endpoints of one frontend, as its relays use them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Targets {
    pub cluster: Families,
    pub local: Families,
    /// Everybody who still answers, whatever the policy: UDP sessions to them go on.
    pub serving: BTreeSet<SocketAddr>,
    /// Seconds that a client stays with its endpoint without using it.
    pub affinity: Option<u32>,
}

impl Targets {
    pub fn of(&self, policy: TrafficPolicy, v6: bool) -> &[SocketAddr] {
        match policy {
            TrafficPolicy::Cluster => &self.cluster[usize::from(v6)],
            TrafficPolicy::Local => &self.local[usize::from(v6)],
        }
    }
}

/// Shared by the relays of one frontend, so that affinity holds over all its addresses.
#[derive(Default)]
pub struct Picker(Mutex<State>);

#[derive(Default)]
struct State {
    targets: Targets,
    /// Whose turn it is, per scope and family.
    turns: [[usize; 2]; 2],
    clients: HashMap<IpAddr, (SocketAddr, Instant)>,
    /// How many clients are remembered before the idle ones are thrown away.
    clients_limit: usize,
}

impl Picker {
    pub fn new(targets: Targets) -> Self {
        Picker(Mutex::new(State { targets, ..State::default() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Whoever panicked left whole endpoints behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, targets: Targets) {
        let mut state = self.state();
        if targets.affinity.is_none() {
            state.clients.clear();
        }
        state.targets = targets;
    }

    pub fn targets(&self) -> Targets {
        self.state().targets.clone()
    }

    /// Endpoints to try, the best first; empty if there is none. Takes a turn unless the client is remembered.
    pub fn candidates(&self, policy: TrafficPolicy, v6: bool, client: IpAddr, now: Instant) -> Vec<SocketAddr> {
        let mut state = self.state();
        let state = &mut *state;
        let endpoints = state.targets.of(policy, v6);
        if endpoints.is_empty() {
            return Vec::new();
        }
        let turn = &mut state.turns[usize::from(policy == TrafficPolicy::Local)][usize::from(v6)];
        let first = *turn % endpoints.len();
        let in_turn = endpoints[first..].iter().chain(&endpoints[..first]).copied();
        let remembered = state.targets.affinity.and_then(|seconds| {
            let (endpoint, used) = state.clients.get(&client)?;
            let fresh = now.saturating_duration_since(*used) < Duration::from_secs(seconds.into());
            (fresh && endpoints.contains(endpoint)).then_some(*endpoint)
        });
        match remembered {
            Some(endpoint) => {
                let others = in_turn.filter(|other| *other != endpoint);
                std::iter::once(endpoint).chain(others).take(CANDIDATES).collect()
            }
            None => {
                *turn = (first + 1) % endpoints.len();
                in_turn.take(CANDIDATES).collect()
            }
        }
    }

    /// The client has an endpoint now; with affinity the next connection goes there, too.
    pub fn remember(&self, client: IpAddr, endpoint: SocketAddr, now: Instant) {
        let mut state = self.state();
        let Some(seconds) = state.targets.affinity else { return };
        if state.clients.len() >= state.clients_limit {
            let patience = Duration::from_secs(seconds.into());
            state.clients.retain(|_, (_, used)| now.saturating_duration_since(*used) < patience);
            state.clients_limit = (state.clients.len() * 2).max(1024);
        }
        state.clients.insert(client, (endpoint, now));
    }

    /// Whether what was begun with this endpoint may go on.
    pub fn is_serving(&self, endpoint: SocketAddr) -> bool {
        self.state().targets.serving.contains(&endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TrafficPolicy::{Cluster, Local};

    fn endpoints(hosts: &[u8]) -> Vec<SocketAddr> {
        hosts.iter().map(|host| SocketAddr::from(([10, 244, 0, *host], 80))).collect()
    }

    fn targets(cluster: &[u8], local: &[u8], affinity: Option<u32>) -> Targets {
        let families = |hosts| [endpoints(hosts), Vec::new()];
        let serving = endpoints(cluster).into_iter().collect();
        Targets { cluster: families(cluster), local: families(local), serving, affinity }
    }

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 9));

    #[test]
    fn everybody_has_a_turn_and_the_next_stand_behind() {
        let picker = Picker::new(targets(&[1, 2, 3], &[3], None));
        let now = Instant::now();
        let pick = |policy| picker.candidates(policy, false, CLIENT, now);
        assert_eq!(pick(Cluster), endpoints(&[1, 2, 3]));
        assert_eq!(pick(Cluster), endpoints(&[2, 3, 1]));
        assert_eq!(pick(Local), endpoints(&[3]));
        assert_eq!(pick(Cluster), endpoints(&[3, 1, 2]));
        assert_eq!(pick(Cluster), endpoints(&[1, 2, 3]));
        picker.set(targets(&[2], &[], None));
        let pick = |policy| picker.candidates(policy, false, CLIENT, now);
        assert_eq!((pick(Cluster), pick(Local)), (endpoints(&[2]), Vec::new()));
        assert!(picker.candidates(Cluster, true, CLIENT, now).is_empty(), "no endpoint is of the other family");
    }

    #[test]
    fn a_client_stays_until_it_was_idle_or_its_endpoint_went() {
        let picker = Picker::new(targets(&[1, 2, 3], &[], Some(60)));
        let start = Instant::now();
        let pick = |seconds| {
            let now = start + Duration::from_secs(seconds);
            let first = picker.candidates(Cluster, false, CLIENT, now)[0];
            picker.remember(CLIENT, first, now);
            first
        };
        let [one, two, three] = endpoints(&[1, 2, 3])[..] else { panic!("three") };
        // Each use begins the time anew.
        assert_eq!([pick(0), pick(50), pick(100)], [one; 3]);
        assert_eq!(pick(160), two);
        picker.set(targets(&[1, 3], &[], Some(60)));
        let next = pick(161);
        assert!(next == one || next == three);
        assert_eq!(pick(162), next);
        // The one that did not answer is tried first only as long as it is remembered.
        picker.remember(CLIENT, three, start + Duration::from_secs(163));
        assert_eq!(pick(164), three);
        assert!(picker.is_serving(one) && !picker.is_serving(two));
    }
}
