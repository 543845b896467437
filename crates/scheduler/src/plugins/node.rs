//! Nodes that take no new pods.

use super::{Filter, Judge};
use crate::objects::{Pod, Taint};
use crate::snapshot::Snapshot;

/// A cordoned node takes only pods that tolerate being on one, as daemons do.
pub struct Unschedulable;

impl Filter for Unschedulable {
    fn judge<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Judge<'a> {
        let cordon =
            Taint { key: "node.kubernetes.io/unschedulable".into(), value: String::new(), effect: "NoSchedule".into() };
        let is_tolerated = pod.tolerates(&cordon);
        Box::new(move |node| {
            if node.node().spec.unschedulable && !is_tolerated {
                return Err(vec!["node(s) were unschedulable".into()]);
            }
            Ok(())
        })
    }
}
