//! VRRP: bytes in and out, machines without a network, and Debian's keepalived in both roles.

mod codec;
mod keepalived;
mod machines;
