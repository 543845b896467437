//! What relays have carried, per Service port and endpoint, for whoever asks: no kernel counts it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use services::PortName;

/// How many pairs of Service port and endpoint are counted before those without a connection are forgotten.
const LIMIT: usize = 1 << 16;

/// Of one endpoint of one Service port. Numbers that belong together may be a moment apart.
#[derive(Debug, Default)]
pub struct Count {
    /// Connections that were sent to it, or UDP sessions; and those that are open.
    begun: AtomicU64,
    open: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    answered: AtomicU64,
    refused: AtomicU64,
    retried: AtomicU64,
    resets: AtomicU64,
    waited_ns: AtomicU64,
}

/// The same as numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub begun: u64,
    pub open: u64,
    /// Bytes from and to clients.
    pub sent: u64,
    pub received: u64,
    pub answered: u64,
    pub refused: u64,
    /// Clients that were sent to another endpoint after this one.
    pub retried: u64,
    /// Connections that ended without both sides having closed.
    pub resets: u64,
    /// All together, from the attempt to connect to the answer.
    pub waited: Duration,
}

/// One more.
fn add(number: &AtomicU64, more: u64) {
    number.fetch_add(more, Ordering::Relaxed);
}

impl Count {
    pub fn begin(&self) {
        add(&self.begun, 1);
    }

    pub fn refuse(&self) {
        add(&self.refused, 1);
    }

    pub fn retry(&self) {
        add(&self.retried, 1);
    }

    /// It has answered after so long; it is open until the value is dropped.
    pub fn open(self: &Arc<Self>, waited: Duration) -> OpenCount {
        add(&self.answered, 1);
        add(&self.waited_ns, u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX));
        add(&self.open, 1);
        OpenCount(self.clone())
    }

    fn read(&self) -> Counted {
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Counted {
            begun: of(&self.begun),
            open: of(&self.open),
            sent: of(&self.sent),
            received: of(&self.received),
            answered: of(&self.answered),
            refused: of(&self.refused),
            retried: of(&self.retried),
            resets: of(&self.resets),
            waited: Duration::from_nanos(of(&self.waited_ns)),
        }
    }
}

/// A connection that is open.
#[derive(Debug)]
pub struct OpenCount(Arc<Count>);

impl OpenCount {
    /// Bytes have gone from the client to the endpoint.
    pub fn sent(&self, bytes: usize) {
        add(&self.0.sent, bytes as u64);
    }

    pub fn received(&self, bytes: usize) {
        add(&self.0.received, bytes as u64);
    }

    /// It ended without both sides having closed.
    pub fn reset(&self) {
        add(&self.0.resets, 1);
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The counts of all relays of a process.
#[derive(Debug, Default)]
pub struct Tally {
    counts: Mutex<HashMap<(PortName, SocketAddr), Arc<Count>>>,
    /// Connections and datagrams that found no endpoint.
    rejected: Mutex<HashMap<PortName, u64>>,
}

impl Tally {
    /// Where this endpoint of this Service port is counted.
    pub fn of(&self, name: &PortName, endpoint: SocketAddr) -> Arc<Count> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() >= LIMIT {
            // Who counts holds its count.
            counts.retain(|_, count| Arc::strong_count(count) > 1);
        }
        counts.entry((name.clone(), endpoint)).or_default().clone()
    }

    /// There was no endpoint.
    pub fn reject(&self, name: &PortName) {
        let mut rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        *rejected.entry(name.clone()).or_default() += 1;
    }

    pub fn rejected(&self) -> Vec<(PortName, u64)> {
        let rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        rejected.iter().map(|(name, count)| (name.clone(), *count)).collect()
    }

    pub fn read(&self) -> Vec<((PortName, SocketAddr), Counted)> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(of, count)| (of.clone(), count.read())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use services::Protocol;

    #[test]
    fn what_is_open_is_closed_when_its_connection_ends() {
        let tally = Tally::default();
        let name =
            PortName { namespace: "shop".into(), service: "web".into(), port: "".into(), protocol: Protocol::Tcp };
        let endpoint = SocketAddr::from(([10, 244, 0, 7], 80));
        let count = tally.of(&name, endpoint);
        count.begin();
        let open = count.open(Duration::from_millis(3));
        open.sent(10);
        open.received(2000);
        tally.of(&name, endpoint).begin();
        let wanted = Counted {
            begun: 2,
            open: 1,
            sent: 10,
            received: 2000,
            answered: 1,
            waited: Duration::from_millis(3),
            ..Counted::default()
        };
        assert_eq!(tally.read(), [((name.clone(), endpoint), wanted)]);
        drop(open);
        assert_eq!(tally.read(), [((name, endpoint), Counted { open: 0, ..wanted })]);
    }
}
