//! Addresses of names outside the cluster, as this machine resolves them. It says nothing of how long an answer holds: a name
//! is asked for again after a few seconds, and what was last known is used while nobody answers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::upstream::{Endpoint, Targets};

const FRESH: Duration = Duration::from_secs(5);
/// What is older is not believed any more.
const USABLE: Duration = Duration::from_secs(300);
const PATIENCE: Duration = Duration::from_secs(5);
/// Names that are remembered.
const KNOWN: usize = 1024;

type Place = (Box<str>, u16);

struct Known {
    /// When somebody last set out to ask.
    asked: Instant,
    answered: Instant,
    targets: Arc<Targets>,
}

/// Names and their addresses, for all workers.
#[derive(Default)]
pub struct Names(Mutex<HashMap<Place, Known>>);

impl Names {
    fn known(&self) -> MutexGuard<'_, HashMap<Place, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a name leads to now; nowhere if it has no address.
    pub async fn find(&self, name: &str, port: u16) -> Arc<Targets> {
        let place: Place = (name.into(), port);
        let now = Instant::now();
        if let Some(held) = self.known().get_mut(&place)
            && now < held.answered + USABLE
        {
            if now < held.asked + FRESH {
                return held.targets.clone();
            }
            // The others go on with what is known meanwhile.
            held.asked = now;
        }
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        let found = timeout(PATIENCE, tokio::net::lookup_host((bare, port))).await;
        let addresses: Vec<SocketAddr> = match found {
            Ok(Ok(addresses)) => addresses.collect(),
            Ok(Err(error)) => {
                tracing::debug!(%error, name, "a name is not resolved");
                Vec::new()
            }
            Err(_) => Vec::new(),
        };
        let mut known = self.known();
        let held = known.get(&place).filter(|held| now < held.answered + USABLE).map(|held| held.targets.clone());
        if addresses.is_empty() {
            return held.unwrap_or_default();
        }
        let targets = Arc::new(Targets::of(addresses, held.as_deref()));
        if known.len() >= KNOWN && !known.contains_key(&place) {
            known.retain(|_, held| now < held.asked + FRESH);
        }
        if known.len() < KNOWN || known.contains_key(&place) {
            known.insert(place, Known { asked: now, answered: Instant::now(), targets: targets.clone() });
        }
        targets
    }
}

impl Targets {
    /// What is known of an endpoint that stays is kept.
    fn of(mut addresses: Vec<SocketAddr>, before: Option<&Targets>) -> Self {
        addresses.sort_unstable();
        addresses.dedup();
        let held = |address: &SocketAddr| before?.endpoints.iter().find(|held| held.address == *address).cloned();
        let endpoints =
            addresses.into_iter().map(|address| held(&address).unwrap_or_else(|| Arc::new(Endpoint::new(address))));
        Targets { endpoints: endpoints.collect(), ..Targets::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_asked_for_once_and_its_endpoints_stay() {
        let names = Names::default();
        let first = names.find("127.0.0.1", 80).await;
        assert_eq!(first.endpoints[0].address, SocketAddr::from(([127, 0, 0, 1], 80)));
        assert!(Arc::ptr_eq(&first, &names.find("127.0.0.1", 80).await), "it is known");
        assert_eq!(names.find("[::1]", 443).await.endpoints[0].address, "[::1]:443".parse().expect("an address"));
        assert!(names.find("a..b", 80).await.endpoints.is_empty());
        let both = ["127.0.0.2:80", "127.0.0.1:80", "[::1]:80"].map(|text| text.parse().expect("an address"));
        let next = Targets::of(both.to_vec(), Some(&first));
        assert_eq!(next.endpoints.len(), 3);
        assert!(Arc::ptr_eq(&next.endpoints[0], &first.endpoints[0]));
    }
}
