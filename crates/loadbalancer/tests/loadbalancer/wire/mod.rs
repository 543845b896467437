//! Everything that nodes say on the wire, watched from the switch: who has an address, at every instant one, while nodes come,
//! go, die and are parted.

mod bgp;
mod layer2;
mod monitor;
mod node;
mod probe;
mod stream;
mod vrrp;

use std::net::IpAddr;

use crate::net::address;
use crate::random::cases;

/// The addresses that are announced, of either family.
fn vips() -> [IpAddr; 2] {
    [address(100, true), address(100, false)]
}

/// How many owners die: a few, and in a long run all that are asked for.
fn kills() -> u64 {
    if cases(1) >= 1000 { 50 } else { cases(1).clamp(1, 2) }
}
