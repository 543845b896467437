//! The userspace mode: this process accepts a Service's connections and makes its own to an endpoint. The slowest way, and
//! the only one that can try the next endpoint when one does not answer, and that runs without privileges.
//!
//! - `layout`: the kernel's part, constant rules over maps: one map sends addresses of Services to ports of relays
//! - `plan`: what a frontend needs: which addresses lead to which relay, and the endpoints behind it
//! - `picker`: whom a client is sent to; a changed endpoint changes only this
//! - `commit`: relays are opened, then the kernel is told, then pickers change and unused relays close
//! - `relay`: the sockets; `tcp` and `udp`: what happens on them; `tally` counts it
//!
//! Endpoints see the node's address, not the client's. Without CAP_NET_ADMIN no address is captured: only node ports
//! answer, on 127.0.0.1 and ::1.

mod commit;
mod layout;
mod picker;
mod plan;
mod relay;
mod tally;
mod tcp;
mod udp;

pub use commit::{Userspace, open, remove};
pub use layout::{Base, FAMILY, TABLE};
pub use plan::{Entries, Reach};
pub use relay::{Door, FakeRelays, Open, Place, Relays, Sockets};
pub use tally::{Count, Counted, OpenCount, Tally};
