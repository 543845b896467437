//! Taints keep pods away that do not tolerate them.

use super::{Filter, Judge, Rate, Scale, Score};
use crate::objects::Pod;
use crate::snapshot::Snapshot;

/// Every taint that forbids scheduling is tolerated.
pub struct Tolerated;

impl Filter for Tolerated {
    fn judge<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Judge<'a> {
        Box::new(move |node| {
            let mut taints = node.node().spec.taints.iter();
            let forbids = |effect: &str| matches!(effect, "NoSchedule" | "NoExecute");
            match taints.find(|t| forbids(&t.effect) && !pod.tolerates(t)) {
                Some(taint) => Err(vec![format!("node(s) had untolerated taint {{{}: {}}}", taint.key, taint.value)]),
                None => Ok(()),
            }
        })
    }
}

/// Taints that only advise against a node.
pub struct Unwelcome;

impl Score for Unwelcome {
    fn weight(&self) -> i64 {
        3
    }

    fn scale(&self) -> Scale {
        Scale::Cost
    }

    fn rate<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Rate<'a> {
        Box::new(move |node| {
            let taints = node.node().spec.taints.iter();
            let count = taints.filter(|t| t.effect == "PreferNoSchedule" && !pod.tolerates(t)).count();
            i64::try_from(count).unwrap_or(i64::MAX)
        })
    }
}
