//! What can go wrong in a store, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::Revision;

/// Cheap to clone, because one failed sync answers every writer of its group.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("revision {requested} is compacted: list again and watch from the list's revision")]
    Compacted { requested: Revision },

    #[error("revision {requested} is in the future: read the newest, or watch until it has come")]
    Future { requested: Revision },

    #[error("the transaction is invalid: {0}")]
    Invalid(String),

    #[error("the transaction has {bytes} bytes and the store takes {limit}: split it or make its values smaller")]
    TooLarge { bytes: usize, limit: usize },

    /// A read was not answered; a write may have happened or not.
    #[error("the store cannot be reached ({0}): try again, and read before repeating a write")]
    Unavailable(String),

    #[error("etcd refused the request ({0}): check its logs, its version (v3) and this client's certificate and role")]
    Refused(String),

    #[error("etcd holds a key among ours that we did not write ({key}): give Fairlead a prefix of its own")]
    Foreign { key: String },

    #[error("cannot configure the connection to etcd ({0}): check the endpoints and the CA, certificate and key files")]
    Connection(String),

    #[error("cannot {action} {path}: {source}; writes are refused until the disk is in order and the store reopened")]
    Disk {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },

    #[error("{path} is damaged at byte {offset} ({reason}): restore the data directory from a copy")]
    Corrupt { path: PathBuf, offset: u64, reason: String },

    #[error("{path} is locked: another process has this data directory open; stop it or name another directory")]
    Locked { path: PathBuf },

    #[error("the store is closed: open it again")]
    Closed,
}

impl Error {
    pub(crate) fn disk(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Disk { action, path: path.into(), source: Arc::new(source) }
    }
}
