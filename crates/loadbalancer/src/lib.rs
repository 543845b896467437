//! Gives LoadBalancer Services addresses and announces them.
//!
//! [`Allocator`] decides who gets which address of the [`Pool`]s, without a clock and without I/O. [`Elector`] decides, from
//! what nodes tell each other, for which addresses this one may speak and until when. [`layer2`] acts on it: heartbeats, ARP
//! and NDP.

mod allocate;
pub mod bgp;
mod elect;
pub mod layer2;
mod message;
mod metrics;
mod packets;
mod pool;
mod service;
pub mod vrrp;

pub use allocate::{Allocator, Given, Refusal};
pub use elect::{Elector, HEARTBEAT, LEASE, Plan, Speech};
pub use message::Heartbeat;
pub use metrics::{BgpCounts, Counts, Metrics};
pub use pool::{Advertisement, AdvertisementObject, Pool, PoolError, PoolObject, VrrpGroup};
pub use service::{CLASS, Request, Service};
