//! The ipvs mode: the kernel's own load balancer chooses, an nftables table of ours refuses, guards and masquerades.
//!
//! Each address and port of a Service is a virtual server; IPVS only sees packets to this host, so Service addresses are on
//! the interface `kube-ipvs0`, as kube-proxy has it. What kube-proxy keeps in ipsets is elements of sets here; the rules are
//! constant, and no packet mark is used.
//!
//! - `layout`: the table without any Service, and the sysctls
//! - `plan`: a frontend's virtual servers, addresses and elements
//! - `claims`: who wants what, where frontends share it
//! - `held`: what the kernel holds, and the steps from there to what is wanted
//! - `commit`: reads and commits; endpoints that go away drain first
//! - `retire`: what stays when another mode takes over, until its last connection has ended

mod claims;
mod commit;
mod held;
mod layout;
mod plan;
mod retire;
#[cfg(test)]
mod tests;

pub(crate) use commit::DRAIN;
pub use commit::{Ipvs, lines, remove};
pub use layout::{Base, FAMILY, TABLE};
pub use plan::{Content, Entries, Item, Server};
pub use retire::{Retired, retire};
