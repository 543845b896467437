//! What Prometheus is told, under the names that MetalLB's dashboards ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts of one process: whoever allocates or announces writes, a scrape reads.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
pub struct Counts {
    /// By pool: addresses given away, and all that it has.
    pub pools: BTreeMap<String, (u64, u64)>,
    /// By address: what was asked and said of it on its networks.
    pub layer2: BTreeMap<IpAddr, Layer2Counts>,
    /// Service (NAMESPACE/NAME), address and protocol of what this node announces.
    pub announced: BTreeSet<(String, IpAddr, &'static str)>,
    /// By the peer's address and port.
    pub bgp: BTreeMap<String, BgpCounts>,
    /// By the peer's address: whether the session is up.
    pub bfd: BTreeMap<String, bool>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Layer2Counts {
    pub requests: u64,
    pub responses: u64,
    pub gratuitous: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct BgpCounts {
    pub is_up: bool,
    /// UPDATE messages that were sent.
    pub updates: u64,
    /// Prefixes that the peer was told of and not told to forget.
    pub prefixes: u64,
}

impl Metrics {
    pub fn write(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The Prometheus text format; `node` is who announces.
    pub fn text(&self, node: &str) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write().tell(&mut out, node);
        out
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

impl Counts {
    fn tell(&self, out: &mut String, node: &str) -> std::fmt::Result {
        head(out, "metallb_allocator_addresses_in_use_total", "gauge", "Addresses of a pool that Services have.")?;
        for (pool, (used, _)) in &self.pools {
            writeln!(out, "metallb_allocator_addresses_in_use_total{{pool=\"{pool}\"}} {used}")?;
        }
        head(out, "metallb_allocator_addresses_total", "gauge", "Addresses of a pool.")?;
        for (pool, (_, all)) in &self.pools {
            writeln!(out, "metallb_allocator_addresses_total{{pool=\"{pool}\"}} {all}")?;
        }
        head(out, "metallb_speaker_announced", "gauge", "Addresses that are announced from this node.")?;
        for (service, ip, protocol) in &self.announced {
            let labels = format!("service=\"{service}\",protocol=\"{protocol}\",node=\"{node}\",ip=\"{ip}\"");
            writeln!(out, "metallb_speaker_announced{{{labels}}} 1")?;
        }
        for (index, (name, help)) in [
            ("metallb_layer2_requests_received", "Requests for an address that this node announces."),
            ("metallb_layer2_responses_sent", "Answers to them."),
            ("metallb_layer2_gratuitous_sent", "Packets that tell everybody where an address is."),
        ]
        .into_iter()
        .enumerate()
        {
            head(out, name, "counter", help)?;
            for (ip, counts) in &self.layer2 {
                let all = [counts.requests, counts.responses, counts.gratuitous];
                writeln!(out, "{name}{{ip=\"{ip}\"}} {}", all[index])?;
            }
        }
        for (index, (name, kind, help)) in [
            ("metallb_bgp_session_up", "gauge", "Whether the session is established."),
            ("metallb_bgp_updates_total", "counter", "UPDATE messages sent."),
            ("metallb_bgp_announced_prefixes_total", "gauge", "Prefixes that the peer has from us."),
        ]
        .into_iter()
        .enumerate()
        {
            head(out, name, kind, help)?;
            for (peer, counts) in &self.bgp {
                let all = [u64::from(counts.is_up), counts.updates, counts.prefixes];
                writeln!(out, "{name}{{peer=\"{peer}\"}} {}", all[index])?;
            }
        }
        head(out, "metallb_bfd_session_up", "gauge", "Whether the BFD session is up.")?;
        for (peer, is_up) in &self.bfd {
            writeln!(out, "metallb_bfd_session_up{{peer=\"{peer}\"}} {}", u8::from(*is_up))?;
        }
        Ok(())
    }
}
