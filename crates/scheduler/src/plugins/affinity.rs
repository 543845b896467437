//! Which nodes a pod asks for by label or name.

use super::{Filter, Judge, Rate, Scale, Score};
use crate::objects::{Node, Pod};
use crate::snapshot::Snapshot;

/// Whether the pod's node selector and required node affinity mean this node.
pub fn is_wanted(pod: &Pod, node: &Node) -> bool {
    pod.spec.node_selector.iter().all(|(key, value)| node.metadata.labels.get(key) == Some(value))
        && pod.spec.affinity.node_affinity.required.as_ref().is_none_or(|r| r.matches(node))
}

pub struct Required;

impl Filter for Required {
    fn judge<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Judge<'a> {
        Box::new(move |node| {
            if is_wanted(pod, node.node()) {
                return Ok(());
            }
            Err(vec!["node(s) didn't match Pod's node affinity/selector".into()])
        })
    }
}

pub struct Preferred;

impl Score for Preferred {
    fn weight(&self) -> i64 {
        2
    }

    fn scale(&self) -> Scale {
        Scale::Merit
    }

    fn rate<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Rate<'a> {
        Box::new(move |node| {
            let preferred = pod.spec.affinity.node_affinity.preferred.iter();
            preferred.filter(|p| p.preference.matches(node.node())).map(|p| p.weight).sum()
        })
    }
}
