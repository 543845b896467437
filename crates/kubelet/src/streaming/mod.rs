//! Streams between a client and a container: exec, attach and port-forward, as kubectl speaks them.
//!
//! `session` copies between a container's streams and channels; `websocket` and `spdy` carry these channels. kubectl
//! uses WebSocket channels for exec, and SPDY for port-forward, inside a WebSocket or, in older versions, bare.

pub mod exec;
pub mod forward;
pub mod session;
pub mod spdy;
pub mod websocket;
