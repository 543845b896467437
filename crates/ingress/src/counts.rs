//! What went through a route, in numbers that many threads raise at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::budget::Budget;

/// Upper bounds in seconds, those of ingress-nginx.
pub const SECONDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

#[derive(Debug, Default)]
pub struct RouteCounts {
    /// Answers by the first digit of their status, 1 to 5.
    pub statuses: [AtomicU64; 5],
    buckets: [AtomicU64; SECONDS.len()],
    microseconds: AtomicU64,
    pub retries: AtomicU64,
    /// What is left for requests that are sent a second time.
    pub budget: Budget,
    pub received: AtomicU64,
    pub sent: AtomicU64,
}

impl RouteCounts {
    /// An answer with this status began after so long.
    pub fn answered(&self, status: u16, took: Duration) {
        let class = usize::from(status / 100).clamp(1, 5) - 1;
        self.statuses[class].fetch_add(1, Ordering::Relaxed);
        let seconds = took.as_secs_f64();
        if let Some(at) = SECONDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[at].fetch_add(1, Ordering::Relaxed);
        }
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.microseconds.fetch_add(microseconds, Ordering::Relaxed);
    }

    pub fn total(&self) -> u64 {
        self.statuses.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub fn seconds(&self) -> f64 {
        self.microseconds.load(Ordering::Relaxed) as f64 / 1e6
    }

    /// Each bound, and how many answers were not later.
    pub fn cumulated(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let mut so_far = 0;
        SECONDS.iter().zip(&self.buckets).map(move |(bound, bucket)| {
            so_far += bucket.load(Ordering::Relaxed);
            (*bound, so_far)
        })
    }
}
