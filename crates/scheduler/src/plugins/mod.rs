//! The rules by which nodes are chosen. A rule is a file and one line in a list here; the lists are in order.

mod affinity;
mod company;
mod fit;
mod node;
mod ports;
mod spread;
mod taints;

use crate::objects::Pod;
use crate::snapshot::{NodeInfo, Snapshot};

/// Says of a node why the pod may not go there.
pub type Judge<'a> = Box<dyn Fn(&NodeInfo) -> Result<(), Vec<String>> + 'a>;

/// A rule that a node must meet.
pub trait Filter: Sync {
    /// Looks at the pod and the whole once, and returns what judges each node.
    fn judge<'a>(&self, pod: &'a Pod, snapshot: &'a Snapshot) -> Judge<'a>;
}

/// Rates a node that passed all filters.
pub type Rate<'a> = Box<dyn Fn(&NodeInfo) -> i64 + 'a>;

/// How rates become points from 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// They are points already.
    Points,
    /// The highest rate gets 100.
    Merit,
    /// The highest rate gets 0.
    Cost,
}

/// A wish that a node may meet more or less.
pub trait Score: Sync {
    fn weight(&self) -> i64;
    fn scale(&self) -> Scale;
    fn rate<'a>(&self, pod: &'a Pod, snapshot: &'a Snapshot) -> Rate<'a>;
}

pub const FILTERS: &[(&str, &dyn Filter)] = &[
    ("NodeUnschedulable", &node::Unschedulable),
    ("TaintToleration", &taints::Tolerated),
    ("NodeAffinity", &affinity::Required),
    ("NodePorts", &ports::Free),
    ("NodeResourcesFit", &fit::Fits),
    ("PodTopologySpread", &spread::Within),
    ("InterPodAffinity", &company::Accepted),
];

pub const SCORES: &[(&str, &dyn Score)] = &[
    ("TaintToleration", &taints::Unwelcome),
    ("NodeAffinity", &affinity::Preferred),
    ("PodTopologySpread", &spread::Alike),
    ("InterPodAffinity", &company::Liked),
    ("LeastAllocated", &fit::Roomy),
];
