//! Chooses a node for a pod.
//!
//! `schedule` is a pure function of a `Snapshot` and a pod: the plugins of `plugins::FILTERS` say where the pod may
//! go, those of `plugins::SCORES` where it should. `run` keeps the snapshot true, and binds.

mod binding;
pub mod objects;
pub mod plugins;
pub mod schedule;
pub mod snapshot;
#[cfg(test)]
mod tests;

pub use binding::run;
pub use objects::Pod;
pub use schedule::{Placement, Unschedulable, schedule};
pub use snapshot::Snapshot;
