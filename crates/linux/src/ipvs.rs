//! IP virtual servers, the kernel's own load balancer: virtual services and their destinations as values, committed over
//! generic netlink (linux/ip_vs.h). No `ipvsadm` is run; values print as the lines it would take.
//!
//! A virtual service only sees packets that are addressed to this host, so its address has to be on an interface: what
//! [`DEVICE`] holds belongs here too.
//!
//! - `value`: services, destinations, schedulers, and the operations that change them
//! - `message`: values to generic netlink attributes and back
//! - `socket`: the kernel
//! - `fake`: the same in memory, which also picks

mod fake;
mod message;
mod socket;
mod value;

use std::collections::BTreeSet;
use std::net::IpAddr;

use nix::errno::Errno;

use crate::link::LinkError;
use crate::netns::NetnsError;

pub use fake::Fake;
pub use socket::Socket;
pub use value::{
    Connections, Counters, Destination, Forwarding, Info, Key, ONE_PACKET, Op, Persistence, SCHEDULER_1, SCHEDULER_2,
    Scheduler, Service, Timeouts,
};

/// The interface that holds the addresses of virtual services; the name is kube-proxy's. It stays down: its addresses are
/// local all the same, and nobody takes it for a way to anywhere.
pub const DEVICE: &str = "kube-ipvs0";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open a generic netlink socket: {0}; IPVS needs CAP_NET_ADMIN in this network namespace")]
    Open(Errno),
    #[error("this kernel has no {0}; load the modules, or choose --proxy-mode=nftables")]
    Missing(String),
    #[error("the kernel refused `ipvsadm {op}`: {errno}{hint}; compare with `ipvsadm -Ln` in that namespace")]
    Refused { op: String, errno: Errno, hint: &'static str },
    #[error("the kernel refused to {doing}: {errno}; is the module ip_vs loaded?")]
    Query { doing: &'static str, errno: Errno },
    #[error("the scheduler {0:?} is none of rr, lc, dh, sh, sed, nq, wrr, wlc, mh; choose one of these")]
    Scheduler(String),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    #[error("the fake kernel fails this operation on purpose; retry it")]
    Injected,
}

/// What a data path needs of IPVS. The kernel implements it, and so does [`Fake`].
pub trait Ipvs: Send {
    /// Applies one operation. The kernel knows no transactions here: what was applied before a failure stays.
    fn apply(&mut self, op: &Op) -> Result<(), Error>;
    /// All virtual services of an address, port and protocol; those of a firewall mark are left out.
    fn services(&mut self) -> Result<Vec<Service>, Error>;
    /// The destinations of a service, and how many connections each has now.
    fn destinations(&mut self, of: &Key) -> Result<Vec<(Destination, Connections)>, Error>;
    /// The addresses of [`DEVICE`]; `None` if there is no such interface.
    fn addresses(&mut self) -> Result<Option<BTreeSet<IpAddr>>, Error>;
    /// Makes [`DEVICE`] and sets the sysctls (name with slashes, value).
    fn prepare(&mut self, sysctls: &[(&str, &str)]) -> Result<(), Error>;
    /// Removes [`DEVICE`] with its addresses.
    fn remove_device(&mut self) -> Result<(), Error>;
}
