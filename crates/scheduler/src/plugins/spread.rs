//! Pods that are alike go to different places.

use super::affinity::is_wanted;
use super::{Filter, Judge, Rate, Scale, Score};
use crate::objects::{Pod, SpreadConstraint};
use crate::snapshot::{NodeInfo, Snapshot};
use api::LabelSelector;
use api::selector::{Operator, Requirement};
use std::collections::BTreeMap;

/// A constraint with the number of matching pods in each domain.
struct Counted<'a> {
    constraint: &'a SpreadConstraint,
    domains: BTreeMap<&'a str, i64>,
    matches_itself: bool,
}

/// The constraint's selector, with the pod's own values of `matchLabelKeys`.
fn selector(constraint: &SpreadConstraint, pod: &Pod) -> Option<LabelSelector> {
    let mut selector = constraint.label_selector.clone()?;
    for key in &constraint.match_label_keys {
        if let Some(value) = pod.metadata.labels.get(key) {
            let operator = Operator::In(vec![value.clone()]);
            selector.requirements.push(Requirement { key: key.clone(), operator });
        }
    }
    Some(selector)
}

fn counted<'a>(pod: &'a Pod, snapshot: &'a Snapshot, kind: &str) -> Vec<Counted<'a>> {
    let constraints: Vec<_> =
        pod.spec.topology_spread_constraints.iter().filter(|c| c.when_unsatisfiable == kind).collect();
    let has_all_keys = |node: &NodeInfo| constraints.iter().all(|c| node.label(&c.topology_key).is_some());
    let count = |constraint: &'a SpreadConstraint| {
        let selector = selector(constraint, pod);
        let is_match = |other: &Pod| {
            other.metadata.namespace == pod.metadata.namespace
                && !other.metadata.is_deleting()
                && selector.as_ref().is_some_and(|s| s.matches_map(&other.metadata.labels))
        };
        let mut domains: BTreeMap<&'a str, i64> = BTreeMap::new();
        for node in snapshot.nodes().filter(|n| has_all_keys(n) && counts(constraint, pod, n)) {
            if let Some(domain) = node.label(&constraint.topology_key) {
                let matching = node.pods.values().filter(|p| is_match(p)).count();
                *domains.entry(domain).or_default() += i64::try_from(matching).unwrap_or(i64::MAX);
            }
        }
        let matches_itself = selector.as_ref().is_some_and(|s| s.matches_map(&pod.metadata.labels));
        Counted { constraint, domains, matches_itself }
    };
    constraints.iter().copied().map(count).collect()
}

/// Whether a node is looked at when domains are counted.
fn counts(constraint: &SpreadConstraint, pod: &Pod, node: &NodeInfo) -> bool {
    let honors = |policy: &Option<String>, unsaid: bool| policy.as_ref().map_or(unsaid, |p| p == "Honor");
    let is_forbidden = |effect: &str| matches!(effect, "NoSchedule" | "NoExecute");
    (!honors(&constraint.node_affinity_policy, true) || is_wanted(pod, node.node()))
        && (!honors(&constraint.node_taints_policy, false)
            || node.node().spec.taints.iter().all(|t| !is_forbidden(&t.effect) || pod.tolerates(t)))
}

/// No domain may have more than `maxSkew` pods beyond the emptiest.
pub struct Within;

impl Filter for Within {
    fn judge<'a>(&self, pod: &'a Pod, snapshot: &'a Snapshot) -> Judge<'a> {
        let constraints = counted(pod, snapshot, "DoNotSchedule");
        Box::new(move |node| {
            let reason = "node(s) didn't match pod topology spread constraints";
            for counted in &constraints {
                let Some(domain) = node.label(&counted.constraint.topology_key) else {
                    return Err(vec![format!("{reason} (missing required label)")]);
                };
                let domains = i64::try_from(counted.domains.len()).unwrap_or(i64::MAX);
                let is_short = counted.constraint.min_domains.is_some_and(|least| domains < least);
                let least = if is_short { 0 } else { counted.domains.values().copied().min().unwrap_or(0) };
                let there = counted.domains.get(domain).copied().unwrap_or(0);
                if there + i64::from(counted.matches_itself) - least > counted.constraint.max_skew {
                    return Err(vec![reason.into()]);
                }
            }
            Ok(())
        })
    }
}

/// Fewer pods of the same owner or behind the same Services on the node; fewer in the domains that the pod would
/// rather see balanced.
pub struct Alike;

impl Score for Alike {
    fn weight(&self) -> i64 {
        2
    }

    fn scale(&self) -> Scale {
        Scale::Cost
    }

    fn rate<'a>(&self, pod: &'a Pod, snapshot: &'a Snapshot) -> Rate<'a> {
        let wishes = counted(pod, snapshot, "ScheduleAnyway");
        let services = snapshot.services_of(pod);
        let owner = pod.metadata.controller().map(|c| c.uid.as_str());
        Box::new(move |node| {
            if !wishes.is_empty() {
                let there = |c: &Counted<'_>| {
                    let most = c.domains.values().copied().max().unwrap_or(0);
                    // A node outside all domains is as bad as the fullest.
                    node.label(&c.constraint.topology_key).and_then(|d| c.domains.get(d).copied()).unwrap_or(most + 1)
                };
                return wishes.iter().map(there).sum();
            }
            let is_alike = |other: &Pod| {
                other.metadata.namespace == pod.metadata.namespace
                    && !other.metadata.is_deleting()
                    && ((owner.is_some() && other.metadata.controller().map(|c| c.uid.as_str()) == owner)
                        || services.iter().any(|s| s.matches_map(&other.metadata.labels)))
            };
            let alike = node.pods.values().filter(|p| is_alike(p)).count();
            i64::try_from(alike).unwrap_or(i64::MAX)
        })
    }
}
