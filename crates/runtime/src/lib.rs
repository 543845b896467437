//! Sandboxes, containers and images, in CRI's words.

pub mod network;

pub use network::{Isolated, NetworkError, PodNetwork, PortMapping, SandboxNetwork};
