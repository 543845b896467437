//! The data directory: private, locked, and synced when its entries change.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::{Error, Revision};

pub(crate) const SEGMENT: &str = "wal";
pub(crate) const SNAPSHOT: &str = "snap";

/// A directory that this process alone has open, until dropped.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    handle: File,
    /// Holds the lock; the kernel releases it however the process ends.
    _lock: File,
}

impl Directory {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let disk = |action, source| Error::disk(action, path, source);
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| disk("create", e))?;
        // The directory may be older than us.
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(|e| disk("make private", e))?;
        let lock_path = path.join("lock");
        let lock = private().create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(|e| Error::disk("open", &lock_path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { path: lock_path }),
            Err(TryLockError::Error(e)) => return Err(Error::disk("lock", &lock_path, e)),
        }
        let handle = File::open(path).map_err(|e| disk("open", e))?;
        Ok(Self { path: path.to_owned(), handle, _lock: lock })
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// The name of the file of `kind` that begins, or stands, at `revision`. Names sort as revisions do.
    pub fn name(&self, revision: Revision, kind: &str) -> PathBuf {
        self.path.join(format!("{revision:020}.{kind}"))
    }

    /// The revisions for which there is a file of `kind`, in order.
    pub fn revisions(&self, kind: &str) -> Result<Vec<Revision>, Error> {
        let disk = |source| Error::disk("read", &self.path, source);
        let mut revisions = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(disk)? {
            let name = entry.map_err(disk)?.file_name();
            let number: Option<Revision> =
                name.to_str().and_then(|name| name.strip_suffix(kind)?.strip_suffix('.')?.parse().ok());
            revisions.extend(number);
        }
        revisions.sort_unstable();
        Ok(revisions)
    }

    /// Makes `content` appear under `path` whole or not at all, and durable when this returns.
    pub fn publish(
        &self,
        path: &Path,
        temporary: &str,
        content: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<File, Error> {
        let temporary = self.join(temporary);
        let disk = |action, source| Error::disk(action, path, source);
        let mut file = private().create(true).truncate(true).open(&temporary).map_err(|e| disk("create", e))?;
        content(&mut file).and_then(|()| file.sync_all()).map_err(|e| disk("write", e))?;
        fs::rename(&temporary, path).map_err(|e| disk("name", e))?;
        self.handle.sync_all().map_err(|e| disk("sync the directory of", e))?;
        Ok(file)
    }

    /// Removes files of `kind` before `revision`; they are no longer needed, so a crash in between does no harm.
    pub fn remove_before(&self, revision: Revision, kind: &str) -> Result<(), Error> {
        for old in self.revisions(kind)?.into_iter().filter(|old| *old < revision) {
            let path = self.name(old, kind);
            fs::remove_file(&path).map_err(|e| Error::disk("remove", &path, e))?;
        }
        Ok(())
    }
}

/// How every file of ours is opened: for us alone.
pub(crate) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}
