//! BGP and BFD: bytes in and out, sessions without a network, and Debian's routers as peers.

mod codec;
mod detect;
mod plan;
pub mod routers;
mod sessions;
