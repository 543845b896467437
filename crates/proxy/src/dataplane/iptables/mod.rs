//! The iptables mode: kube-proxy's chains to the letter, so that whoever can read those can read these.
//!
//! - `names`: chains and their hashes
//! - `base`: the chains that are always there, and the jumps into them
//! - `plan`: a frontend's rules
//! - `rejections`: what the rules for Services without endpoints have counted
//! - `remove`: nothing of it left, for another mode
//! - `commit`: one `iptables-restore` per family; service chains are only written when their frontend changed

mod base;
mod commit;
mod names;
mod plan;
mod rejections;
mod remove;

pub use base::Base;
pub use commit::Iptables;
pub use plan::{Entries, FamilyEntries};
pub use rejections::rejections;
pub use remove::remove;
