//! The ebpf mode: sockets of the node are balanced when they connect, so that pod and host traffic needs no translation;
//! packets from outside are translated where they arrive and leave. Services are map entries only.
//!
//! - `*.h`, `proxy.c`: the programs and the maps, compiled by `build.rs`
//! - `layout`: the same maps as values
//! - `contacts`: those in which the programs of `watch.h` count
//! - `ended`: what becomes of connections whose time is over
//! - `direct.h`: endpoints on other nodes that answer past this one
//! - `plan`: a frontend's entries
//! - `maglev`: a frontend's table, where endpoints are chosen by one
//! - `loads`: how many flows endpoints have, where the less loaded is chosen
//! - `commit`: entries that frontends share, what the kernel held before, the order of changes
//! - `retire`: what is left when another mode takes over
//! - `trace`: a packet's way through a plan, as the programs go
//!
//! What differs from netfilter: a client's node translates at connect time, so that nothing is masqueraded there, and a
//! pod that reaches itself sees its own address. Affinity of such clients goes by pod (its network namespace) instead of
//! by address. A refusal is the error of `connect`. SCTP, fragments and IPv6 extension headers are not translated.

mod commit;
pub(crate) mod contacts;
pub(crate) mod ended;
mod layout;
mod loads;
mod maglev;
mod plan;
mod retire;
mod trace;

pub use commit::Ebpf;
pub use layout::{Base, LAYOUT, LAYOUTS, LOADS, LoadKind, load_key};
pub use plan::Entries;
pub use retire::{Retired, retire};
pub use trace::Way;

/// The compiled programs.
pub const OBJECT: &[u8] = {
    /// ELF headers are read in place.
    #[repr(C, align(8))]
    struct Aligned<T: ?Sized>(T);
    const ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/proxy.bpf.o")));
    &ALIGNED.0
};
