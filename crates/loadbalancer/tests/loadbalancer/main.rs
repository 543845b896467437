//! Addresses as objects ask for them, the vote over who announces them, and the protocols that announce.

mod allocate;
mod bgp;
mod cases;
mod elect;
mod net;
mod random;
mod vrrp;
mod wire;
