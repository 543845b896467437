//! BGP: tells routers that LoadBalancer addresses are reached through this node.
//!
//! [`plan`] decides which routes a peer is told. [`session`] and [`bfd`] are the protocols, without a clock and without I/O:
//! [`speaker`] gives them time and sockets, on a thread of its own.

pub mod attribute;
pub mod bfd;
pub mod capability;
mod link;
pub mod message;
pub mod peer;
pub mod plan;
mod prefix;
pub mod session;
mod sockets;
pub mod speaker;
pub mod update;
