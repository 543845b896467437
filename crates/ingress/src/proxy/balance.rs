//! Which endpoint gets a request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::policy::Balance;
use crate::sticky::{Wish, mix};
use crate::upstream::Endpoint;

/// The first pause of an endpoint that failed; each failure in a row makes it longer.
const PAUSE: u64 = 500;
const LONGEST_PAUSE: u64 = 10_000;

/// Chooses among the endpoints that are not in `tried`. `now` is in milliseconds, `draw` any number.
pub fn pick(
    turn: &AtomicU32,
    endpoints: &[Arc<Endpoint>],
    balance: Balance,
    tried: &[SocketAddr],
    wish: Wish,
    now: u64,
    draw: u64,
) -> Option<Arc<Endpoint>> {
    let count = endpoints.len();
    let is_good = |endpoint: &&Arc<Endpoint>| !tried.contains(&endpoint.address) && !endpoint.is_ejected(now);
    let wished = match wish {
        Wish::None => None,
        Wish::Endpoint(number) => endpoints.iter().find(|endpoint| endpoint.number == number),
        Wish::Key(key) => endpoints.iter().filter(is_good).max_by_key(|endpoint| mix(endpoint.number ^ key)),
    };
    if let Some(wished) = wished.filter(is_good) {
        return Some(wished.clone());
    }
    let first = match (count, balance) {
        (0, _) => return None,
        (_, Balance::RoundRobin) => turn.fetch_add(1, Ordering::Relaxed) as usize % count,
        (_, Balance::LeastLoad) => {
            let (a, b) = (draw as u32 as usize % count, (draw >> 32) as usize % count);
            let better = |a: usize, b: usize| {
                let active = |at: usize| endpoints[at].active.load(Ordering::Relaxed);
                if active(b) < active(a) { b } else { a }
            };
            match (is_good(&&endpoints[a]), is_good(&&endpoints[b])) {
                (true, true) => better(a, b),
                (false, true) => b,
                _ => a,
            }
        }
    };
    let from_first = || endpoints[first..].iter().chain(&endpoints[..first]);
    // When all are out of order, one of them is tried all the same.
    let untried = |endpoint: &&Arc<Endpoint>| !tried.contains(&endpoint.address);
    from_first().find(is_good).or_else(|| from_first().find(untried)).cloned()
}

/// The least of its share that a new endpoint gets, as it would otherwise never grow.
const LEAST: f64 = 0.1;

/// Spares `chosen` while it is new: with a likelihood that shrinks over the `window` an older one takes its request. `now` and
/// `window` are in milliseconds, `draw` is any number.
pub fn spare(
    chosen: Arc<Endpoint>,
    endpoints: &[Arc<Endpoint>],
    tried: &[SocketAddr],
    window: u64,
    now: u64,
    draw: u64,
) -> Arc<Endpoint> {
    let warmth = |endpoint: &Endpoint| match endpoint.chosen.load(Ordering::Relaxed) {
        0 => LEAST,
        since => (now.saturating_sub(since) as f64 / window.max(1) as f64).clamp(LEAST, 1.0),
    };
    let own = warmth(&chosen);
    // Spared or not, its time begins, as it must come to an end.
    chosen.chosen.compare_exchange(0, now.max(1), Ordering::Relaxed, Ordering::Relaxed).ok();
    // 53 bits of the draw, as a share of one.
    let share = (mix(draw) >> 11) as f64 / (1_u64 << 53) as f64;
    if own >= 1.0 || share < own {
        return chosen;
    }
    let is_warmer = |one: &&Arc<Endpoint>| !tried.contains(&one.address) && !one.is_ejected(now) && warmth(one) > own;
    let count = endpoints.iter().filter(is_warmer).count();
    let at = usize::try_from(draw % count.max(1) as u64).unwrap_or(0);
    endpoints.iter().filter(is_warmer).nth(at).cloned().unwrap_or(chosen)
}

impl Endpoint {
    /// It did not do what was asked; others are asked for a while.
    pub fn failed(&self, now: u64) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(16);
        let pause = (PAUSE << failures).min(LONGEST_PAUSE);
        self.ejected_until.store(now + pause, Ordering::Relaxed);
    }

    pub fn succeeded(&self) {
        // Read first: written to, the line would go from processor to processor with each request.
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
            self.ejected_until.store(0, Ordering::Relaxed);
        }
    }
}

/// A request under way, counted at its endpoint until dropped.
pub struct Active(pub Arc<Endpoint>);

impl Active {
    pub fn new(endpoint: Arc<Endpoint>) -> Self {
        endpoint.active.fetch_add(1, Ordering::Relaxed);
        endpoint.requests.fetch_add(1, Ordering::Relaxed);
        Active(endpoint)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The time since the process began to carry requests, in milliseconds.
pub fn milliseconds(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn endpoints() -> (AtomicU32, Vec<Arc<Endpoint>>) {
        let all = (1..=3).map(|n| Arc::new(Endpoint::new(SocketAddr::from(([10, 0, 0, n], 80))))).collect();
        (AtomicU32::new(0), all)
    }

    #[test]
    fn turns_reach_everybody_and_load_the_least_loaded() {
        let (turn, all) = endpoints();
        let one = |balance, draw| pick(&turn, &all, balance, &[], Wish::None, 0, draw).expect("somebody").address;
        let seen: BTreeSet<SocketAddr> = (0..3).map(|_| one(Balance::RoundRobin, 0)).collect();
        assert_eq!(seen.len(), 3);
        let _busy = Active::new(all[0].clone());
        assert_eq!(one(Balance::LeastLoad, 1 << 32), all[1].address, "0 is busy, 1 is not");
        assert_eq!(one(Balance::LeastLoad, 1), all[1].address);
    }

    #[test]
    fn a_key_leads_to_one_endpoint_and_few_move_when_another_goes() {
        let (turn, all) = endpoints();
        let to = |all: &[Arc<Endpoint>], key: u64| {
            pick(&turn, all, Balance::LeastLoad, &[], Wish::Key(mix(key)), 0, key).expect("somebody").address
        };
        let before: Vec<SocketAddr> = (0..300).map(|key| to(&all, key)).collect();
        assert!(all.iter().all(|one| before.iter().filter(|to| **to == one.address).count() > 50), "all have some");
        for (key, before) in before.iter().enumerate().filter(|(_, before)| **before != all[2].address) {
            assert_eq!(to(&all[..2], key as u64), *before, "only those of the one that went move");
        }
        let named = pick(&turn, &all, Balance::LeastLoad, &[], Wish::Endpoint(all[1].number), 0, 0);
        assert_eq!(named.expect("the one").address, all[1].address);
    }

    #[test]
    fn who_is_new_gets_less_until_its_time_is_over() {
        let (_, all) = endpoints();
        let shares = |now: u64| {
            let to = |draw: u64| spare(all[0].clone(), &all, &[], 1000, now, draw).address == all[0].address;
            (0..1000).filter(|draw| to(*draw)).count()
        };
        assert_eq!(shares(1), 1000, "all are new: nobody is warmer");
        all[1].chosen.store(1, Ordering::Relaxed);
        all[0].chosen.store(5000, Ordering::Relaxed);
        assert!((50..150).contains(&shares(5000)), "a tenth: {}", shares(5000));
        assert!((450..550).contains(&shares(5500)), "half: {}", shares(5500));
        assert_eq!(shares(6000), 1000);
        all[1].failed(5500);
        assert_eq!(shares(5500), 1000, "nobody else can take it");
    }

    #[test]
    fn who_failed_is_passed_over_for_a_while_unless_all_have() {
        let (turn, all) = endpoints();
        let one = |tried: &[SocketAddr], now| pick(&turn, &all, Balance::LeastLoad, tried, Wish::None, now, 0);
        all[0].failed(1000);
        assert_ne!(one(&[], 1001).expect("another").address, all[0].address);
        assert_eq!(one(&[], 1000 + PAUSE).expect("back").address, all[0].address);
        all.iter().for_each(|endpoint| endpoint.failed(2000));
        assert!(one(&[], 2001).is_some(), "better one that failed than nobody");
        let tried: Vec<SocketAddr> = all.iter().map(|endpoint| endpoint.address).collect();
        assert!(one(&tried, 2001).is_none());
        all[0].succeeded();
        assert_eq!(one(&[], 2001).expect("well again").address, all[0].address);
    }
}
