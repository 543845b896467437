//! VRRP version 3 (RFC 9568), with keepalived as its model: [`machine`] decides, without a clock and without I/O, [`instance`]
//! speaks for one virtual router, [`holder`] has the addresses on an interface while this host is the active one.

pub mod holder;
pub mod instance;
pub mod machine;
pub mod packet;
