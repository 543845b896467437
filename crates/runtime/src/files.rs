//! Small records in files, written by one process and read by another.
//!
//! They outlive processes, not the machine: after a loss of power nothing that they describe runs any more. So they are
//! replaced by rename but not synced, and one that is damaged counts as absent.

use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;

/// A reader sees all of the old content or all of the new.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    std::fs::write(&beside, bytes)?;
    std::fs::rename(&beside, path)
}

/// `None` when there is no such file, or no such record in it.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Some(record)),
            Err(e) => {
                tracing::warn!(path = %path.display(), "a damaged record is left out: {e}");
                Ok(None)
            }
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
