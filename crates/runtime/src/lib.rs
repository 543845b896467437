//! Sandboxes, containers and images, in CRI's words.

pub mod builtin;
mod files;
pub mod helper;
pub mod image;
pub mod network;
pub mod service;
pub mod types;

pub use builtin::{Builtin, BuiltinConfig};
pub use network::{Isolated, NetworkError, PodNetwork, PortMapping, SandboxNetwork};
pub use service::{ExecRequest, ImageService, Reader, RuntimeService, Session, Terminal, Writer};
pub use types::*;
