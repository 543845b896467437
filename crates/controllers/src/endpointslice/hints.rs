//! Which zone or node an endpoint is meant for.
//!
//! A hint is only given when all ready endpoints get one: a proxy ignores hints as soon as one is missing.

use super::Node;
use super::slice::{Endpoint, HintName, Hints};
use crate::service::Service;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How a Service wants its traffic spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    Anywhere,
    /// `PreferSameZone`, also called `PreferClose`.
    SameZone,
    SameNode,
    /// Zones get endpoints in proportion to their CPUs (`service.kubernetes.io/topology-mode: Auto`).
    Proportional,
}

impl Topology {
    pub fn of(service: &Service) -> Topology {
        let annotation = |key: &str| service.metadata.annotations.get(key).map(String::as_str);
        let mode = annotation("service.kubernetes.io/topology-mode")
            .or_else(|| annotation("service.kubernetes.io/topology-aware-hints"));
        if matches!(mode, Some("Auto" | "auto")) {
            return Topology::Proportional;
        }
        match service.spec.traffic_distribution.as_str() {
            "PreferClose" | "PreferSameZone" => Topology::SameZone,
            "PreferSameNode" => Topology::SameNode,
            _ => Topology::Anywhere,
        }
    }
}

fn named(name: &str) -> Vec<HintName> {
    vec![HintName { name: name.into() }]
}

/// Gives the ready endpoints their hints, or none of them.
pub fn give<'a>(
    topology: Topology,
    endpoints: impl Iterator<Item = &'a mut Endpoint>,
    nodes: &BTreeMap<String, Arc<Node>>,
) {
    let mut ready: Vec<&mut Endpoint> = endpoints.filter(|e| e.is_ready()).collect();
    match topology {
        Topology::Anywhere => {}
        Topology::SameZone => {
            if ready.iter().all(|e| e.zone.is_some()) {
                for endpoint in ready {
                    let for_zones = endpoint.zone.as_deref().map(named).unwrap_or_default();
                    endpoint.hints = Some(Hints { for_zones, for_nodes: Vec::new() });
                }
            }
        }
        Topology::SameNode => {
            if ready.iter().all(|e| e.node_name.is_some()) {
                let is_zoned = ready.iter().all(|e| e.zone.is_some());
                for endpoint in ready {
                    let for_nodes = endpoint.node_name.as_deref().map(named).unwrap_or_default();
                    let zone = endpoint.zone.as_deref().filter(|_| is_zoned);
                    endpoint.hints = Some(Hints { for_zones: zone.map(named).unwrap_or_default(), for_nodes });
                }
            }
        }
        Topology::Proportional => {
            if ready.iter().any(|e| e.zone.is_none()) {
                return;
            }
            let Some(mut shares) = shares(ready.len(), nodes) else { return };
            ready.sort_by(|a, b| a.addresses.cmp(&b.addresses));
            let mut surplus = Vec::new();
            for endpoint in ready {
                let zone = endpoint.zone.clone().unwrap_or_default();
                match shares.get_mut(&zone) {
                    Some(left) if *left > 0 => {
                        *left -= 1;
                        endpoint.hints = Some(Hints { for_zones: named(&zone), for_nodes: Vec::new() });
                    }
                    _ => surplus.push(endpoint),
                }
            }
            let mut needy = shares.into_iter().flat_map(|(zone, left)| std::iter::repeat_n(zone, left));
            for endpoint in surplus {
                let Some(zone) = needy.next() else { return };
                endpoint.hints = Some(Hints { for_zones: named(&zone), for_nodes: Vec::new() });
            }
        }
    }
}

/// A zone may carry at most this much more than its fair load; beyond it there are no hints.
const OVERLOAD: f64 = 0.2;

/// How many of so many endpoints each zone gets, by the CPUs of its nodes; `None` where that would not be fair.
fn shares(endpoints: usize, nodes: &BTreeMap<String, Arc<Node>>) -> Option<BTreeMap<String, usize>> {
    let mut cpus: BTreeMap<&str, i64> = BTreeMap::new();
    for node in nodes.values() {
        // A node without a zone has no share, and its clients no hint that fits.
        *cpus.entry(node.zone()?).or_default() += node.milli_cpu();
    }
    let total: i64 = cpus.values().sum();
    if cpus.len() < 2 || endpoints < cpus.len() || cpus.values().any(|c| *c <= 0) {
        return None;
    }
    let exact = |cpu: i64| endpoints as f64 * cpu as f64 / total as f64;
    let mut shares = BTreeMap::new();
    let mut rests = Vec::new();
    let mut given = 0;
    for (zone, cpu) in &cpus {
        let (whole, rest) = divide(endpoints, *cpu, total)?;
        shares.insert((*zone).to_string(), whole);
        given += whole;
        rests.push((std::cmp::Reverse(rest), *zone));
    }
    rests.sort_unstable();
    for (_, zone) in rests.into_iter().take(endpoints - given) {
        *shares.entry(zone.to_string()).or_default() += 1;
    }
    let is_fair = cpus.iter().all(|(zone, cpu)| {
        let share = shares.get(*zone).copied().unwrap_or(0);
        share > 0 && exact(*cpu) / share as f64 - 1.0 <= OVERLOAD
    });
    is_fair.then_some(shares)
}

/// `count * part / total`, and what is left of it.
fn divide(count: usize, part: i64, total: i64) -> Option<(usize, i64)> {
    let product = i64::try_from(count).ok()?.checked_mul(part)?;
    Some((usize::try_from(product / total).ok()?, product % total))
}
