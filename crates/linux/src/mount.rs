//! Mounts, extended attributes, and paths that cannot leave their root.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};

/// Gives the caller a mount table of its own: what it mounts dies with it, what the machine mounts still arrives.
pub fn unshare_mounts() -> io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    Ok(())
}

/// Layers as overlayfs takes them: `lower` from the topmost down.
pub struct Overlay<'a> {
    pub lower: &'a [PathBuf],
    pub upper: &'a Path,
    pub work: &'a Path,
}

/// Mounts an overlay on `target`.
///
/// All lower directories are named relative to `base`, because the kernel takes at most one page of options.
/// Changes the working directory meanwhile: only for single-threaded processes.
pub fn mount_overlay(overlay: &Overlay<'_>, base: &Path, target: &Path) -> io::Result<()> {
    let mut lower = Vec::new();
    for path in overlay.lower {
        if !lower.is_empty() {
            lower.push(b':');
        }
        for byte in path.strip_prefix(base).unwrap_or(path).as_os_str().as_bytes() {
            if matches!(byte, b':' | b'\\' | b',') {
                lower.push(b'\\');
            }
            lower.push(*byte);
        }
    }
    let mut options = b"lowerdir=".to_vec();
    options.extend(lower);
    options.extend(b",upperdir=");
    options.extend(overlay.upper.as_os_str().as_bytes());
    options.extend(b",workdir=");
    options.extend(overlay.work.as_os_str().as_bytes());
    let back = std::env::current_dir()?;
    std::env::set_current_dir(base)?;
    let result =
        mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(std::ffi::OsStr::from_bytes(&options)));
    std::env::set_current_dir(back)?;
    result.map_err(io::Error::from)
}

pub fn mount_tmpfs(target: &Path, options: &str) -> io::Result<()> {
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options))?;
    Ok(())
}

pub fn mount_mqueue(target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("mqueue"), target, Some("mqueue"), flags, None::<&str>)?;
    Ok(())
}

/// Lazily: a target still in use goes away when its last user does. No mount there is no error.
pub fn unmount(target: &Path) -> io::Result<()> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Unmounts everything at or below `root` in the caller's mount namespace.
pub fn unmount_below(root: &Path) -> io::Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let targets: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| Some(PathBuf::from(unescape_octal(line.split(' ').nth(4)?))))
        .filter(|target| target.starts_with(root))
        .collect();
    // Later mounts lie on earlier ones.
    targets.iter().rev().try_for_each(|target| unmount(target))
}

/// The kernel writes blanks in mount tables as \040 and the like.
fn unescape_octal(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte as char);
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// Sets an extended attribute of the file itself, not of what a symbolic link points to.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let name = CString::new(name)?;
    // SAFETY: both strings end in a zero byte and the value's length is its own.
    let result = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A directory under which foreign paths are resolved as if it were `/`: neither `..` nor a link leads out of it.
pub struct RootDirectory(OwnedFd);

impl RootDirectory {
    pub fn open(path: &Path) -> io::Result<RootDirectory> {
        Ok(RootDirectory(fs::File::open(path)?.into()))
    }

    /// Opens what lies at `path` inside.
    pub fn open_inside(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let fd = openat2(self.0.as_raw_fd(), path, how)?;
        // SAFETY: openat2 just returned this descriptor; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub fn read_to_string(&self, path: &Path) -> io::Result<String> {
        let mut file = fs::File::from(self.open_inside(path, OFlag::O_RDONLY)?);
        let mut text = String::new();
        io::Read::read_to_string(&mut file, &mut text)?;
        Ok(text)
    }

    /// Opens a directory inside, creating what is missing (mode 0755).
    pub fn create_directories(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut walked = PathBuf::new();
        let mut directory = self.open_inside(Path::new("."), OFlag::O_DIRECTORY | OFlag::O_PATH)?;
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            walked.push(name);
            let flags = OFlag::O_DIRECTORY | OFlag::O_PATH;
            directory = match self.open_inside(&walked, flags) {
                Ok(next) => next,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    mkdirat(Some(directory.as_raw_fd()), name, Mode::from_bits_truncate(0o755))?;
                    self.open_inside(&walked, flags)?
                }
                Err(e) => return Err(e),
            };
        }
        Ok(directory)
    }
}

/// A path that reaches `name` in an open directory, for functions that take paths.
pub fn path_in(directory: &OwnedFd, name: &std::ffi::OsStr) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_tables_escape_blanks() {
        assert_eq!(unescape_octal("/a\\040b\\134c"), "/a b\\c");
    }

    #[test]
    fn links_out_of_a_root_lead_back_into_it() {
        let root = std::env::temp_dir().join(format!("fairlead-root-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).expect("made");
        fs::write(root.join("etc/passwd"), "mine").expect("written");
        let _ = std::os::unix::fs::symlink("/etc", root.join("out"));
        let directory = RootDirectory::open(&root).expect("opened");
        let read = directory.read_to_string(Path::new("../../out/passwd"));
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!(read.expect("readable"), "mine");
    }
}
