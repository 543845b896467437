//! Cluster DNS: the service table answers names, everything else is asked upstream.
//!
//! [`CHAIN`] lists where an answer may come from, in order. [`Zone`] and [`ReverseZones`] decide over a table without
//! sockets; [`Server`] owns the sockets and the clock. Names and records follow the Kubernetes DNS specification
//! 1.1.0.

mod answer;
mod cache;
mod chain;
mod config;
mod error;
mod forward;
mod message;
mod metrics;
mod records;
mod resolv_conf;
mod reverse;
mod server;
mod tcp;
mod udp;
mod zone;

pub use answer::{Answer, Question};
pub use chain::{CHAIN, Progress, Resolver, Source};
pub use config::{DnsConfig, HostSockets, Listen, PodMode, SocketMaker, Upstreams};
pub use error::DnsError;
pub use resolv_conf::parse_resolv_conf;
pub use reverse::ReverseZones;
pub use server::{Server, run};
pub use zone::Zone;
