//! Which pods a pod wants near, or far.

use super::{Filter, Judge, Rate, Scale, Score};
use crate::objects::{Pod, PodTerm};
use crate::snapshot::{NodeInfo, Snapshot};
use api::LabelSelector;
use api::selector::{Operator, Requirement};
use std::collections::{BTreeMap, BTreeSet};

/// A term of one pod's affinity, ready to be matched against others.
struct Term<'a> {
    term: &'a PodTerm,
    owner: &'a Pod,
    selector: Option<LabelSelector>,
}

impl<'a> Term<'a> {
    fn new(term: &'a PodTerm, owner: &'a Pod) -> Term<'a> {
        let mut selector = term.label_selector.clone();
        let own = |key: &String| owner.metadata.labels.get(key).map(|value| vec![value.clone()]);
        if let Some(selector) = &mut selector {
            for key in &term.match_label_keys {
                let operator = own(key).map(Operator::In);
                selector.requirements.extend(operator.map(|operator| Requirement { key: key.clone(), operator }));
            }
            for key in &term.mismatch_label_keys {
                let operator = own(key).map(Operator::NotIn);
                selector.requirements.extend(operator.map(|operator| Requirement { key: key.clone(), operator }));
            }
        }
        Term { term, owner, selector }
    }

    fn matches(&self, other: &Pod, snapshot: &Snapshot) -> bool {
        let namespace = &other.metadata.namespace;
        let is_near = if self.term.namespaces.is_empty() && self.term.namespace_selector.is_none() {
            *namespace == self.owner.metadata.namespace
        } else {
            let selector = self.term.namespace_selector.as_ref();
            self.term.namespaces.contains(namespace)
                || selector.is_some_and(|s| {
                    s.is_empty() || snapshot.namespace_labels(namespace).is_some_and(|labels| s.matches_map(labels))
                })
        };
        is_near && self.selector.as_ref().is_some_and(|s| s.matches_map(&other.metadata.labels))
    }
}

fn terms<'a>(terms: &'a [PodTerm], owner: &'a Pod) -> Vec<Term<'a>> {
    terms.iter().map(|term| Term::new(term, owner)).collect()
}

/// Topology key and value: a place.
type Place<'a> = (&'a str, &'a str);

/// The pod's required affinity and anti-affinity hold, and those of the pods that are there.
pub struct Accepted;

impl Filter for Accepted {
    fn judge<'a>(&self, pod: &'a Pod, snapshot: &'a Snapshot) -> Judge<'a> {
        let near = terms(&pod.spec.affinity.pod_affinity.required, pod);
        let far = terms(&pod.spec.affinity.pod_anti_affinity.required, pod);
        let (mut wanted, mut unwanted): (BTreeSet<Place<'_>>, BTreeSet<Place<'_>>) = Default::default();
        if !near.is_empty() || !far.is_empty() {
            for node in snapshot.nodes() {
                for other in node.pods.values() {
                    // Affinity means pods that match all terms at once.
                    if !near.is_empty() && near.iter().all(|t| t.matches(other, snapshot)) {
                        wanted.extend(near.iter().filter_map(|t| place(t.term, node)));
                    }
                    unwanted
                        .extend(far.iter().filter(|t| t.matches(other, snapshot)).filter_map(|t| place(t.term, node)));
                }
            }
        }
        let mut refused: BTreeSet<Place<'_>> = BTreeSet::new();
        for (other, node) in snapshot.repelling() {
            let repelled = terms(&other.spec.affinity.pod_anti_affinity.required, other);
            refused.extend(repelled.iter().filter(|t| t.matches(pod, snapshot)).filter_map(|t| place(t.term, node)));
        }
        // The first of a group that wants its own kind near may go anywhere.
        let is_first = wanted.is_empty() && near.iter().all(|t| t.matches(pod, snapshot));
        Box::new(move |node| {
            let is_in = |set: &BTreeSet<Place<'_>>, term: &PodTerm| {
                node.label(&term.topology_key).is_some_and(|value| set.contains(&(term.topology_key.as_str(), value)))
            };
            let has_key = |t: &Term<'_>| node.label(&t.term.topology_key).is_some();
            if !near.iter().all(|t| has_key(t) && (is_first || is_in(&wanted, t.term))) {
                return Err(vec!["node(s) didn't match pod affinity rules".into()]);
            }
            if far.iter().any(|t| is_in(&unwanted, t.term)) {
                return Err(vec!["node(s) didn't match pod anti-affinity rules".into()]);
            }
            if refused.iter().any(|(key, value)| node.label(key) == Some(*value)) {
                return Err(vec!["node(s) didn't satisfy existing pods anti-affinity rules".into()]);
            }
            Ok(())
        })
    }
}

fn place<'a>(term: &'a PodTerm, node: &'a NodeInfo) -> Option<Place<'a>> {
    Some((term.topology_key.as_str(), node.label(&term.topology_key)?))
}

/// Preferred affinity draws, preferred anti-affinity repels.
pub struct Liked;

impl Score for Liked {
    fn weight(&self) -> i64 {
        2
    }

    fn scale(&self) -> Scale {
        Scale::Merit
    }

    fn rate<'a>(&self, pod: &'a Pod, snapshot: &'a Snapshot) -> Rate<'a> {
        let affinity = &pod.spec.affinity;
        let weighted = |list: &'a [crate::objects::PreferredPod], sign: i64| {
            list.iter().map(move |p| (Term::new(&p.pod_affinity_term, pod), sign * p.weight))
        };
        let wishes: Vec<_> = weighted(&affinity.pod_affinity.preferred, 1)
            .chain(weighted(&affinity.pod_anti_affinity.preferred, -1))
            .collect();
        let mut places: BTreeMap<Place<'a>, i64> = BTreeMap::new();
        if !wishes.is_empty() {
            for node in snapshot.nodes() {
                for other in node.pods.values() {
                    for (term, weight) in wishes.iter().filter(|(t, _)| t.matches(other, snapshot)) {
                        if let Some(place) = place(term.term, node) {
                            *places.entry(place).or_default() += weight;
                        }
                    }
                }
            }
        }
        Box::new(move |node| {
            places.iter().filter(|((key, value), _)| node.label(key) == Some(*value)).map(|(_, weight)| weight).sum()
        })
    }
}
