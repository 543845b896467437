//! Several nodes, a switch and an outside on one machine, as namespaces with a cgroup subtree each.
//!
//! ```text
//!              lab namespace
//!   node-1 ──┐ ┌──────────────────────────────┐
//!   node-2 ──┼─┤ switch 192.168.49.1 ── router ├── outside 203.0.113.9
//!   node-3 ──┘ └──────────────────────────────┘
//! ```
//!
//! Everything a lab needs to be found again, even after its data directory is gone, is in `/run/fairlead/ID`; every
//! process it starts is in the cgroups `fairlead-ID`. The machine's own interfaces, routes and firewall are not touched,
//! but for one cable and one rule if an uplink is asked for.

mod lab;
mod node;
mod plan;
mod state;
mod uplink;

pub use lab::{Lab, LabError};
pub use node::LabNode;
pub use plan::{LabConfig, NodePlan, Plan, PlanError};
pub use state::{Cluster, Process, id_of};
