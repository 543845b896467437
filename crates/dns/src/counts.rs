//! What the server has done since it started, in numbers that many tasks raise at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::chain::Source;
use crate::wire::kind;

/// Upper bounds in seconds, CoreDNS's.
pub const SECONDS: [f64; 16] =
    [0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];
/// Upper bounds in bytes, CoreDNS's.
pub const BYTES: [f64; 14] =
    [0.0, 100.0, 200.0, 300.0, 400.0, 511.0, 1023.0, 2047.0, 4095.0, 8291.0, 16_000.0, 32_000.0, 48_000.0, 64_000.0];
/// Few labels whatever clients ask: unusual types share the last one.
pub const KINDS: [(u16, &str); 12] = [
    (kind::A, "A"),
    (kind::AAAA, "AAAA"),
    (kind::ANY, "ANY"),
    (kind::CNAME, "CNAME"),
    (65, "HTTPS"),
    (15, "MX"),
    (kind::NS, "NS"),
    (kind::PTR, "PTR"),
    (kind::SOA, "SOA"),
    (kind::SRV, "SRV"),
    (kind::TXT, "TXT"),
    (0, "other"),
];
pub const CODES: [&str; 8] = ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "BADVERS", "other"];
pub const PLUGINS: [&str; 6] = ["", "kubernetes", "cache", "forward", "hosts", "autopath"];

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    pub is_tcp: bool,
    pub is_ipv6: bool,
}

impl Way {
    pub const ALL: [Way; 4] = [
        Way { is_tcp: false, is_ipv6: false },
        Way { is_tcp: false, is_ipv6: true },
        Way { is_tcp: true, is_ipv6: false },
        Way { is_tcp: true, is_ipv6: true },
    ];

    pub fn index(self) -> usize {
        usize::from(self.is_tcp) * 2 + usize::from(self.is_ipv6)
    }

    pub fn protocol(self) -> &'static str {
        if self.is_tcp { "tcp" } else { "udp" }
    }
}

/// How many values were at most as large as each bound, and their sum.
pub struct Histogram<const N: usize> {
    bounds: &'static [f64; N],
    /// Values up to each bound and above the one before; those above all are in `total` only.
    buckets: [AtomicU64; N],
    pub total: AtomicU64,
    /// In the unit of the bounds, times a million.
    sum: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    pub fn new(bounds: &'static [f64; N]) -> Self {
        Histogram {
            bounds,
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            total: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }

    pub fn add(&self, value: f64) {
        if let Some(bucket) = self.bounds.iter().position(|bound| value <= *bound) {
            self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        self.total.fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add((value * 1e6) as u64, Ordering::Relaxed);
    }

    /// Each bound, and how many values are not above it.
    pub fn cumulated(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut so_far = 0;
        self.bounds.iter().zip(&self.buckets).map(move |(bound, bucket)| {
            so_far += bucket.load(Ordering::Relaxed);
            (*bound, so_far)
        })
    }

    pub fn sum(&self) -> f64 {
        self.sum.load(Ordering::Relaxed) as f64 / 1e6
    }
}

/// All counters.
pub struct Counts {
    pub requests: [[AtomicU64; KINDS.len()]; Way::ALL.len()],
    pub responses: [[AtomicU64; PLUGINS.len()]; CODES.len()],
    pub duration: Histogram<{ SECONDS.len() }>,
    pub request_size: Histogram<{ BYTES.len() }>,
    pub response_size: Histogram<{ BYTES.len() }>,
}

impl Default for Counts {
    fn default() -> Self {
        Counts {
            requests: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))),
            responses: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))),
            duration: Histogram::new(&SECONDS),
            request_size: Histogram::new(&BYTES),
            response_size: Histogram::new(&BYTES),
        }
    }
}

/// A question and what became of it.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub way: Way,
    pub kind: Option<u16>,
    pub code: u16,
    pub source: Option<Source>,
    pub took: Duration,
    pub request_size: usize,
    pub response_size: usize,
}

impl Counts {
    pub fn add(&self, outcome: &Outcome) {
        let kind = KINDS.iter().position(|(number, _)| Some(*number) == outcome.kind).unwrap_or(KINDS.len() - 1);
        self.requests[outcome.way.index()][kind].fetch_add(1, Ordering::Relaxed);
        let plugin = outcome.source.map_or("", Source::plugin);
        let plugin = PLUGINS.iter().position(|name| *name == plugin).unwrap_or_default();
        self.responses[code_index(outcome.code)][plugin].fetch_add(1, Ordering::Relaxed);
        self.duration.add(outcome.took.as_secs_f64());
        self.request_size.add(outcome.request_size as f64);
        self.response_size.add(outcome.response_size as f64);
    }
}

pub fn code_index(code: u16) -> usize {
    match code {
        0..=5 => usize::from(code),
        crate::wire::code::BAD_VERS => 6,
        _ => 7,
    }
}
