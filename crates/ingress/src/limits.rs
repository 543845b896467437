//! How much one client may ask: requests a second and a minute, and requests at once.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

/// Clients that are remembered; above that those that have been silent are forgotten.
const REMEMBERED: usize = 65_536;
const SILENCE: u64 = 60_000;

/// Limits of one Ingress, for each client address. 0: none.
#[derive(Debug, Default)]
pub struct RateLimits {
    pub per_second: u32,
    pub per_minute: u32,
    pub at_once: u32,
    /// So many times the rate may come in a burst.
    pub burst: u32,
    /// Who is not counted.
    pub exempt: Vec<IpNet>,
    clients: Mutex<HashMap<IpAddr, Client>>,
}

impl PartialEq for RateLimits {
    /// What was counted is no part of what is wanted.
    fn eq(&self, other: &Self) -> bool {
        let wanted = |one: &Self| (one.per_second, one.per_minute, one.at_once, one.burst, one.exempt.clone());
        wanted(self) == wanted(other)
    }
}

#[derive(Debug)]
struct Client {
    /// Milliseconds.
    at: u64,
    /// Requests that may come now.
    second: f64,
    minute: f64,
    active: u32,
}

/// One request more than its client may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// A request that counts as being under way until dropped.
pub struct UnderWay {
    limits: Arc<RateLimits>,
    client: IpAddr,
}

impl RateLimits {
    fn clients(&self) -> MutexGuard<'_, HashMap<IpAddr, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a request in at `now`, in milliseconds, or says that it is one too many.
    pub fn enter(self: &Arc<Self>, client: IpAddr, now: u64) -> Result<Option<UnderWay>, TooMany> {
        if self.exempt.iter().any(|range| range.contains(&client)) {
            return Ok(None);
        }
        let burst = f64::from(self.burst.max(1));
        let (most_second, most_minute) = (f64::from(self.per_second) * burst, f64::from(self.per_minute) * burst);
        let mut clients = self.clients();
        if clients.len() >= REMEMBERED {
            clients.retain(|_, held| held.active > 0 || now.saturating_sub(held.at) < SILENCE);
        }
        let new = || Client { at: now, second: most_second, minute: most_minute, active: 0 };
        let held = clients.entry(client).or_insert_with(new);
        let passed = now.saturating_sub(held.at) as f64 / 1000.0;
        held.at = now;
        held.second = (held.second + passed * f64::from(self.per_second)).min(most_second);
        held.minute = (held.minute + passed * f64::from(self.per_minute) / 60.0).min(most_minute);
        let is_over = (self.per_second > 0 && held.second < 1.0)
            || (self.per_minute > 0 && held.minute < 1.0)
            || (self.at_once > 0 && held.active >= self.at_once);
        if is_over {
            return Err(TooMany);
        }
        held.second -= 1.0;
        held.minute -= 1.0;
        held.active += 1;
        Ok(Some(UnderWay { limits: self.clone(), client }))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(held) = self.limits.clients().get_mut(&self.client) {
            held.active = held.active.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(per_second: u32, per_minute: u32, at_once: u32) -> Arc<RateLimits> {
        Arc::new(RateLimits { per_second, per_minute, at_once, burst: 2, ..RateLimits::default() })
    }

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    #[test]
    fn a_burst_is_let_in_and_then_the_rate() {
        let limits = limits(5, 0, 0);
        let let_in = |client, now| (0..20).filter(|_| limits.enter(client, now).is_ok()).count();
        assert_eq!(let_in(CLIENT, 0), 10);
        assert_eq!(let_in(OTHER, 0), 10, "each client by itself");
        assert_eq!(let_in(CLIENT, 1000), 5);
        assert_eq!(let_in(CLIENT, 60_000), 10);
    }

    #[test]
    fn minutes_and_requests_at_once_count_too() {
        let by_minute = limits(0, 3, 0);
        assert_eq!((0..20).filter(|_| by_minute.enter(CLIENT, 0).is_ok()).count(), 6);
        assert_eq!((0..20).filter(|_| by_minute.enter(CLIENT, 20_000).is_ok()).count(), 1);
        let at_once = limits(0, 0, 2);
        let first = at_once.enter(CLIENT, 0);
        let _second = at_once.enter(CLIENT, 0);
        assert!(at_once.enter(CLIENT, 0).is_err() && at_once.enter(OTHER, 0).is_ok());
        drop(first);
        assert!(at_once.enter(CLIENT, 0).is_ok());
    }

    #[test]
    fn who_is_exempt_is_not_counted() {
        let limits = RateLimits {
            per_second: 1,
            exempt: vec!["192.0.2.0/31".parse().expect("a range")],
            ..RateLimits::default()
        };
        let limits = Arc::new(limits);
        assert!((0..20).all(|_| limits.enter(CLIENT, 0).is_ok()));
    }
}
