//! Images on this node: what is here, where its layers lie, and how it comes here.
//!
//! `blobs/` holds configurations by digest, `layers/` every layer unpacked once, `index.json` what refers to them.
//! Several processes may share one store: a lock file orders them, and the index is read anew under it.

mod archive;
mod config;
mod reference;
mod registry;
mod store;
mod unpack;

pub use config::ImageConfig;
pub use reference::{Reference, is_digest};
pub use registry::{Dialer, PullConfig, tcp_dialer};
pub use store::{Image, ImageStore};
pub(crate) use unpack::hex;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("couldn't parse image name {name:?}: {why}")]
    InvalidName { name: String, why: String },
    #[error("image {0} not found: import it, or check name, tag and registry")]
    NotFound(String),
    #[error("{reference}: the registry says {status}: {message}")]
    Registry { reference: String, status: u16, message: String },
    #[error("cannot reach the registry {registry}: {message}")]
    Unreachable { registry: String, message: String },
    #[error("{0}")]
    Broken(String),
    #[error("image {0} is in use: remove its containers first")]
    InUse(String),
    #[error("image store: {what}: {source}")]
    Io { what: String, source: std::io::Error },
}

trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, ImageError>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io { what: what(), source })
    }
}
