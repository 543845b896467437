//! Cluster DNS: the service table answers names, everything else is asked upstream.
//!
//! Each Service is compiled into the bytes of its answers when it changes ([`compile`]); a question is then a lookup and a
//! copy ([`reply`]). [`CHAIN`] lists where an answer may come from, in order. [`Resolver::receive`] decides without
//! sockets; [`Server`] owns the sockets and the clock. Names and records follow the Kubernetes DNS specification 1.1.0.

mod answer;
mod cache;
mod chain;
mod compile;
mod config;
mod counts;
mod error;
mod forward;
mod hosts;
mod message;
mod metrics;
mod names;
mod objects;
mod reply;
mod resolv_conf;
mod reverse;
mod search;
mod server;
mod tcp;
mod udp;
mod upstream;
mod wire;
mod zone;

pub use answer::{Answer, Question};
pub use chain::{CHAIN, Parts, Resolver, Source, Step, Waiting};
pub use config::{DnsConfig, HostSockets, Listen, PodMode, SocketMaker, Upstreams};
pub use error::DnsError;
pub use forward::Forward;
pub use hosts::Hosts;
pub use names::{Compiler, Feed};
pub use objects::Objects;
pub use resolv_conf::{ResolvConf, parse_resolv_conf};
pub use reverse::ReverseZones;
pub use search::SearchPath;
pub use server::Server;
pub use upstream::{Transport, UpstreamServer, parse_stub};
pub use zone::Zone;
