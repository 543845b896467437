//! Kernel objects as values, and the one place that commits them; a fake beside each.

pub mod cgroup_v1v2;
pub mod enter;
pub mod link;
pub mod mntns;
pub mod netns;
