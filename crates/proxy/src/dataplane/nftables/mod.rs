//! The nftables mode: constant rules over maps. Services are elements only, so that one more costs the same however many
//! there are. No packet mark is used.
//!
//! - `layout`: the table without any Service
//! - `class`: the chains that pick an endpoint, one per (endpoint count, affinity, ids) in use, never one per Service
//! - `plan`: a frontend's elements
//! - `commit`: elements shared by frontends, what the kernel held before, one transaction

mod class;
mod commit;
mod layout;
mod plan;

pub use commit::{Nftables, remove};
pub use layout::{Base, FAMILY, TABLE};
pub use plan::Entries;
