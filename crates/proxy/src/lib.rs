//! Service table to kernel: every packet to a Service finds an endpoint, and no code of ours is on its path.
//!
//! A data path renders each [`services::Frontend`] for this node ([`NodeView`]) into entries, which are values; [`run`]
//! commits what changed. See [`dataplane`] for what a mode must provide, and its modules for the modes.

mod addresses;
mod applied;
mod commit;
pub mod configuration;
pub mod dataplane;
mod end;
mod error;
pub mod explain;
mod features;
mod follow;
mod guard;
mod handover;
mod health;
mod health_check;
pub mod http;
pub mod keeper;
mod leftovers;
mod metrics;
mod mode;
mod node;
mod run;
mod scope;
mod stale;
mod status;
mod traffic;
mod watch;

pub use applied::AppliedSlices;
pub use error::Error;
pub use explain::{dump, explain};
pub use features::{Feature, Features};
pub use handover::{Requests, Switch, run_switchable, switch};
pub use health::{Health, probes};
pub use health_check::{HealthChecks, serve_health_checks};
pub use leftovers::cleanup;
pub use linux::bpf::Hooks;
pub use linux::ipvs::{Scheduler, Timeouts};
pub use linux::nft::Packet;
pub use metrics::Metrics;
pub use mode::Mode;
pub use node::{IpvsSettings, NodeView, Pods, Taker};
pub use run::{Config, Feed, found, prepare, run};
pub use status::{Status, StatusHandle, Unsupported};
pub use traffic::{Answers, EndpointTraffic, ServiceTraffic, Traffic, traffic};
pub use watch::{Evidence, Notice, Target, Watching};
