//! Unpacks one layer into a directory that overlayfs can take as a lower one.
//!
//! Every path is resolved with the layer's directory as its root, so neither `..` nor a symbolic link in the archive
//! reaches a file outside. Whiteouts become what overlayfs understands: a character device 0/0 for a removed name,
//! the attribute `trusted.overlay.opaque` for a directory that hides those below it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use linux::mount::{RootDirectory, path_in, set_xattr};
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use sha2::{Digest, Sha256};

use super::ImageError;

/// What a layer turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// The digest of the uncompressed archive, which names the layer in the image's configuration.
    pub diff_id: String,
    /// Bytes of all files.
    pub size: u64,
}

/// Guesses the compression from the first bytes, as archives lie in their names.
pub fn decompress<'a, R: Read + 'a>(mut input: R) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = [0u8; 4];
    let mut n = 0;
    while n < head.len() {
        match input.read(&mut head[n..])? {
            0 => break,
            more => n += more,
        }
    }
    let input = io::Cursor::new(head[..n].to_vec()).chain(input);
    Ok(match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::new(input)?),
        _ => Box::new(input),
    })
}

/// Reads to the end, so that the digest covers everything, and counts.
pub struct Hashing<R> {
    pub inner: R,
    pub hash: Sha256,
    pub bytes: u64,
}

impl<R> Hashing<R> {
    pub fn new(inner: R) -> Hashing<R> {
        Hashing { inner, hash: Sha256::new(), bytes: 0 }
    }

    pub fn digest(self) -> String {
        format!("sha256:{}", hex(&self.hash.finalize()))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// Unpacks `archive`, which may be compressed, into the empty directory `into`.
pub fn unpack_layer(archive: impl Read, into: &Path) -> Result<Unpacked, ImageError> {
    let broken = |e: io::Error| ImageError::Broken(format!("layer does not unpack: {e}"));
    let root = RootDirectory::open(into).map_err(broken)?;
    let mut hashing = Hashing::new(decompress(archive).map_err(broken)?);
    let mut size = 0;
    // Directory times are set last: filling a directory changes them.
    let mut directory_times = Vec::new();
    let mut tar = tar::Archive::new(&mut hashing);
    for entry in tar.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = inside(&entry.path().map_err(broken)?)?;
        size += entry.size();
        unpack_entry(&root, &mut entry, &path, &mut directory_times)
            .map_err(|e| ImageError::Broken(format!("layer entry {} does not unpack: {e}", path.display())))?;
    }
    for (path, seconds) in directory_times.into_iter().rev() {
        if let Ok(directory) = root.create_directories(&path) {
            set_time(&path_in(&directory, OsStr::new(".")), seconds).map_err(broken)?;
        }
    }
    io::copy(&mut hashing, &mut io::sink()).map_err(broken)?;
    Ok(Unpacked { diff_id: hashing.digest(), size })
}

/// The entry's path relative to the layer's root; what points above it is refused.
fn inside(path: &Path) -> Result<PathBuf, ImageError> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(ImageError::Broken(format!(
                    "layer entry {} points out of the layer: the archive is not to be trusted",
                    path.display()
                )));
            }
        }
    }
    Ok(clean)
}

fn unpack_entry<R: Read>(
    root: &RootDirectory,
    entry: &mut tar::Entry<'_, R>,
    path: &Path,
    directory_times: &mut Vec<(PathBuf, i64)>,
) -> io::Result<()> {
    let kind = entry.header().entry_type();
    let mode = entry.header().mode()? & 0o7777;
    // Some writers leave these fields blank.
    let (uid, gid) = (entry.header().uid().unwrap_or(0) as u32, entry.header().gid().unwrap_or(0) as u32);
    let mtime = entry.header().mtime().unwrap_or(0) as i64;
    let Some(name) = path.file_name() else {
        // The root itself.
        let directory = root.create_directories(Path::new(""))?;
        let itself = path_in(&directory, OsStr::new("."));
        lchown(&itself, Some(uid), Some(gid))?;
        return fs::set_permissions(&itself, fs::Permissions::from_mode(mode));
    };
    let parent = root.create_directories(path.parent().unwrap_or(Path::new("")))?;
    if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
        if hidden == b".wh..opq" {
            return set_xattr(&path_in(&parent, OsStr::new(".")), "trusted.overlay.opaque", b"y");
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a whiteout without a name"));
        }
        let target = path_in(&parent, OsStr::from_bytes(hidden));
        remove_existing(&target)?;
        mknod(&target, SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))?;
        return Ok(());
    }
    let target = path_in(&parent, name);
    let xattrs = extended_attributes(entry)?;
    match kind {
        tar::EntryType::Directory => {
            match fs::symlink_metadata(&target) {
                Ok(existing) if existing.is_dir() => {}
                _ => {
                    remove_existing(&target)?;
                    fs::create_dir(&target)?;
                }
            }
            directory_times.push((path.to_owned(), mtime));
        }
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            remove_existing(&target)?;
            let flags = nix::libc::O_NOFOLLOW;
            let mut file =
                fs::File::options().write(true).create_new(true).custom_flags(flags).mode(0o600).open(&target)?;
            io::copy(entry, &mut file)?;
        }
        tar::EntryType::Symlink => {
            let link = entry.link_name()?.ok_or_else(|| io::Error::other("a symbolic link without a target"))?;
            remove_existing(&target)?;
            symlink(link, &target)?;
        }
        tar::EntryType::Link => {
            let link = entry.link_name()?.ok_or_else(|| io::Error::other("a hard link without a target"))?;
            let source = inside(&link).map_err(|e| io::Error::other(e.to_string()))?;
            let source_name = source.file_name().ok_or_else(|| io::Error::other("a hard link to the root"))?;
            let source_parent =
                root.open_inside(source.parent().unwrap_or(Path::new("")), OFlag::O_DIRECTORY | OFlag::O_PATH)?;
            remove_existing(&target)?;
            // Owner, mode and attributes belong to the file that is there already.
            return fs::hard_link(path_in(&source_parent, source_name), &target);
        }
        tar::EntryType::Char | tar::EntryType::Block | tar::EntryType::Fifo => {
            let major = entry.header().device_major()?.unwrap_or(0);
            let minor = entry.header().device_minor()?.unwrap_or(0);
            let kind = match kind {
                tar::EntryType::Char => SFlag::S_IFCHR,
                tar::EntryType::Block => SFlag::S_IFBLK,
                _ => SFlag::S_IFIFO,
            };
            remove_existing(&target)?;
            mknod(&target, kind, Mode::empty(), makedev(major.into(), minor.into()))?;
        }
        // Extension headers are consumed by the reader; anything else carries no file.
        _ => return Ok(()),
    }
    lchown(&target, Some(uid), Some(gid))?;
    if kind != tar::EntryType::Symlink {
        // After the change of owner, which clears the set-user-id bits.
        fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
    }
    for (name, value) in xattrs {
        match set_xattr(&target, &name, &value) {
            Ok(()) => {}
            // Kept where the file system can.
            Err(e) if matches!(e.raw_os_error(), Some(nix::libc::ENOTSUP | nix::libc::EPERM)) => {
                tracing::debug!(%name, path = %path.display(), "extended attribute is not supported here");
            }
            Err(e) => return Err(e),
        }
    }
    set_time(&target, mtime)
}

/// `SCHILY.xattr.` records of the PAX header, without those that would speak to overlayfs itself.
fn extended_attributes<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            let Some(name) = extension.key().ok().and_then(|k| k.strip_prefix("SCHILY.xattr.")) else { continue };
            if !name.starts_with("trusted.overlay.") {
                found.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    Ok(found)
}

fn remove_existing(target: &Path) -> io::Result<()> {
    match fs::symlink_metadata(target) {
        Ok(existing) if existing.is_dir() => fs::remove_dir_all(target),
        Ok(_) => fs::remove_file(target),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn set_time(target: &Path, seconds: i64) -> io::Result<()> {
    let time = TimeSpec::new(seconds, 0);
    utimensat(None, target, &time, &time, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileTypeExt;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("fairlead-unpack-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("made");
        path
    }

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            // Written raw: the builder itself would refuse `..`.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            let is_link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
            if is_link {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            let data = if is_link { &b""[..] } else { content.as_bytes() };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).expect("appended");
        }
        builder.into_inner().expect("finished")
    }

    #[test]
    fn whiteouts_become_what_overlayfs_understands() {
        let root = scratch("whiteout");
        let layer = archive(&[
            ("a/.wh.gone", tar::EntryType::Regular, ""),
            ("b/.wh..wh..opq", tar::EntryType::Regular, ""),
            ("b/kept", tar::EntryType::Regular, "x"),
        ]);
        unpack_layer(&layer[..], &root).expect("unpacked");
        let gone = fs::symlink_metadata(root.join("a/gone")).expect("there");
        assert!(gone.file_type().is_char_device());
        assert_eq!(fs::read_to_string(root.join("b/kept")).expect("read"), "x");
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn a_path_out_of_the_layer_is_refused() {
        let root = scratch("dotdot");
        for path in ["../evil", "a/../../evil"] {
            let layer = archive(&[(path, tar::EntryType::Regular, "x")]);
            assert!(unpack_layer(&layer[..], &root).is_err(), "{path}");
        }
        let layer = archive(&[("x", tar::EntryType::Link, "../../etc/passwd")]);
        assert!(unpack_layer(&layer[..], &root).is_err());
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn a_file_below_a_link_to_the_outside_stays_inside() {
        let root = scratch("link");
        let outside = scratch("outside");
        let layer = archive(&[
            ("out", tar::EntryType::Symlink, outside.to_str().expect("utf-8")),
            ("out/file", tar::EntryType::Regular, "x"),
        ]);
        let _ = unpack_layer(&layer[..], &root);
        assert!(!outside.join("file").exists());
        fs::remove_dir_all(root).expect("removed");
        fs::remove_dir_all(outside).expect("removed");
    }

    #[test]
    fn compressed_layers_have_the_digest_of_their_content() {
        let plain = archive(&[("f", tar::EntryType::Regular, "content")]);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gz, &plain).expect("written");
        let gz = gz.finish().expect("finished");
        let zst = zstd::stream::encode_all(&plain[..], 1).expect("encoded");
        let mut ids = Vec::new();
        for data in [plain, gz, zst] {
            let root = scratch("digest");
            ids.push(unpack_layer(&data[..], &root).expect("unpacked").diff_id);
            fs::remove_dir_all(root).expect("removed");
        }
        assert!(ids[0] == ids[1] && ids[1] == ids[2]);
    }
}
