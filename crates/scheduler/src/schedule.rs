//! The decision: filter, score, choose.

use crate::objects::Pod;
use crate::plugins::{FILTERS, SCORES, Scale};
use crate::snapshot::{NodeInfo, Snapshot};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub node: String,
}

/// Why a pod fits nowhere: how many nodes gave each reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unschedulable {
    pub nodes: usize,
    pub reasons: BTreeMap<String, usize>,
}

impl fmt::Display for Unschedulable {
    /// As Kubernetes words it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        // Sorted as text, count first.
        let mut reasons: Vec<String> = self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        reasons.sort();
        write!(f, "0/{} nodes are available: {}.", self.nodes, reasons.join(", "))
    }
}

/// Chooses the node for a pod, or says why there is none.
///
/// # Errors
/// `Unschedulable` when no node passes every filter.
pub fn schedule(snapshot: &Snapshot, pod: &Pod) -> Result<Placement, Unschedulable> {
    let filters: Vec<_> = FILTERS.iter().map(|(_, filter)| filter.judge(pod, snapshot)).collect();
    let mut refusal = Unschedulable::default();
    let mut candidates: Vec<&NodeInfo> = Vec::new();
    for node in snapshot.nodes() {
        refusal.nodes += 1;
        // The first filter that refuses a node speaks for it.
        match filters.iter().find_map(|filter| filter(node).err()) {
            None => candidates.push(node),
            Some(reasons) => {
                for reason in reasons {
                    *refusal.reasons.entry(reason).or_default() += 1;
                }
            }
        }
    }
    if candidates.len() < 2 {
        let node = candidates.first().map(|n| Placement { node: n.name().into() });
        return node.ok_or(refusal);
    }
    let mut totals = vec![0; candidates.len()];
    for (_, score) in SCORES {
        let rate = score.rate(pod, snapshot);
        let rates: Vec<i64> = candidates.iter().map(|node| rate(node)).collect();
        for (total, points) in totals.iter_mut().zip(normalized(score.scale(), &rates)) {
            *total += score.weight() * points;
        }
    }
    // Of nodes that score alike, the one with the fewest pods, then the first by name.
    let ranked = candidates.iter().zip(totals);
    let best = ranked.max_by_key(|(node, total)| (*total, Reverse(node.pods.len()), Reverse(node.name().to_string())));
    let (node, _) = best.expect("there are candidates");
    Ok(Placement { node: node.name().into() })
}

/// Brings what a plugin says to points from 0 to 100.
fn normalized(scale: Scale, rates: &[i64]) -> Vec<i64> {
    let most = rates.iter().copied().max().unwrap_or(0);
    let least = rates.iter().copied().min().unwrap_or(0).min(0);
    let span = most - least;
    let points = |rate: i64| if span == 0 { 0 } else { (rate - least) * 100 / span };
    match scale {
        Scale::Points => rates.to_vec(),
        Scale::Merit => rates.iter().map(|r| points(*r)).collect(),
        Scale::Cost => rates.iter().map(|r| 100 - points(*r)).collect(),
    }
}
