//! One cgroup path in every hierarchy of the machine, v1 and v2 alike: made, entered, emptied and removed as a whole.
//!
//! Membership is how everything that a cluster started is found again after any crash: a process cannot leave by itself,
//! and nobody else's process gets in.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::mntns::mountinfo;

#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("cgroup {path}: {source}; look at /proc/self/mountinfo and at who else uses that directory")]
    Io { path: String, source: io::Error },
    #[error(
        "processes {pids:?} in cgroup {path} do not end after SIGKILL; look for what they wait for in /proc/PID/stack"
    )]
    Stuck { path: String, pids: Vec<i32> },
}

/// The cgroup hierarchies mounted on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// Those of v1 that have controllers.
    pub v1: Vec<PathBuf>,
    /// Those of v1 that only have a name, such as systemd's.
    pub named: Vec<PathBuf>,
    pub v2: Option<PathBuf>,
}

impl Hierarchies {
    pub fn mounted() -> io::Result<Self> {
        let mut found = Self::default();
        for mount in mountinfo()? {
            match mount.kind.as_str() {
                "cgroup" if mount.options.split(',').any(|option| option.starts_with("name=")) => {
                    found.named.push(mount.point);
                }
                "cgroup" => found.v1.push(mount.point),
                "cgroup2" => found.v2 = found.v2.or(Some(mount.point)),
                _ => {}
            }
        }
        Ok(found)
    }

    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.v2.iter().chain(&self.v1).chain(&self.named)
    }
}

/// A path such as `fairlead-1a2b3c4d/node-1`, the same in every hierarchy.
#[derive(Debug, Clone)]
pub struct CgroupTree {
    path: String,
    hierarchies: Hierarchies,
}

impl CgroupTree {
    pub fn new(path: impl Into<String>) -> Result<Self, TreeError> {
        let path = path.into();
        match Hierarchies::mounted() {
            Ok(hierarchies) => Ok(Self { path, hierarchies }),
            Err(source) => Err(TreeError::Io { path, source }),
        }
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn child(&self, name: &str) -> Self {
        Self { path: format!("{}/{name}", self.path), hierarchies: self.hierarchies.clone() }
    }

    /// The directory in the v2 hierarchy, where eBPF programs are attached.
    pub fn v2_dir(&self) -> Option<PathBuf> {
        self.hierarchies.v2.as_ref().map(|root| root.join(&self.path))
    }

    /// Makes the directories; those that exist are kept.
    pub fn create(&self) -> Result<(), TreeError> {
        for root in &self.hierarchies.v1 {
            self.io(fs::create_dir_all(root.join(&self.path)))?;
            self.io(inherit_cpuset(root, &self.path))?;
        }
        if let Some(root) = &self.hierarchies.v2 {
            self.io(fs::create_dir_all(root.join(&self.path)))?;
            self.io(delegate(root, &self.path))?;
        }
        Ok(())
    }

    /// Moves a process into the tree, in every hierarchy. Zero is the calling process.
    pub fn enter(&self, pid: u32) -> Result<(), TreeError> {
        for root in self.hierarchies.v2.iter().chain(&self.hierarchies.v1) {
            self.io(fs::write(root.join(&self.path).join("cgroup.procs"), pid.to_string()))?;
        }
        Ok(())
    }

    /// Every process in the tree or below.
    pub fn pids(&self) -> Result<Vec<i32>, TreeError> {
        let mut pids = BTreeSet::new();
        for root in self.hierarchies.all() {
            self.io(collect_pids(&root.join(&self.path), &mut pids))?;
        }
        Ok(pids.into_iter().collect())
    }

    /// Kills every process in the tree with SIGKILL and waits until they are gone. The calling process, if it is a member,
    /// is moved to the root first.
    pub fn kill(&self) -> Result<(), TreeError> {
        let me = std::process::id();
        // Each round may find children that were forked while the last one killed.
        for _ in 0..20 {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            if pids.iter().any(|pid| pid.cast_unsigned() == me) {
                self.leave(me)?;
                continue;
            }
            let doomed =
                self.io(pids.iter().filter_map(|pid| open_process(*pid).transpose()).collect::<io::Result<Vec<_>>>())?;
            // Only now is it sure that an open process is the one that was listed: a number may have been reused in between.
            let still: BTreeSet<_> = self.pids()?.into_iter().collect();
            for process in doomed.iter().filter(|process| still.contains(&process.pid)) {
                self.io(process.kill())?;
            }
            for process in doomed.iter().filter(|process| still.contains(&process.pid)) {
                self.io(process.wait(1_000))?;
            }
        }
        Err(TreeError::Stuck { path: self.path.clone(), pids: self.pids()? })
    }

    /// Removes the empty tree from every hierarchy, with all below. Absent is fine.
    pub fn remove(&self) -> Result<(), TreeError> {
        for root in self.hierarchies.all() {
            self.io(remove_tree(&root.join(&self.path)))?;
        }
        Ok(())
    }

    fn leave(&self, pid: u32) -> Result<(), TreeError> {
        for root in self.hierarchies.all() {
            let mut inside = BTreeSet::new();
            self.io(collect_pids(&root.join(&self.path), &mut inside))?;
            if inside.contains(&pid.cast_signed()) {
                self.io(fs::write(root.join("cgroup.procs"), pid.to_string()))?;
            }
        }
        Ok(())
    }

    fn io<T>(&self, result: io::Result<T>) -> Result<T, TreeError> {
        result.map_err(|source| TreeError::Io { path: self.path.clone(), source })
    }
}

/// A v1 cpuset takes no process before it has processors and memory nodes; new ones start empty.
fn inherit_cpuset(root: &Path, path: &str) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let mut directory = root.to_owned();
        let Some(mut value) = absent_is_none(fs::read_to_string(directory.join(file)))? else { return Ok(()) };
        for part in Path::new(path) {
            directory.push(part);
            let held = fs::read_to_string(directory.join(file))?;
            if held.trim().is_empty() {
                fs::write(directory.join(file), value.trim())?;
            } else {
                value = held;
            }
        }
    }
    Ok(())
}

/// In v2 a controller works in a directory only when every directory above hands it down. A hybrid machine has none to hand
/// down. The last directory hands nothing down: it could then hold no process itself.
fn delegate(root: &Path, path: &str) -> io::Result<()> {
    let mut directory = root.to_owned();
    for part in Path::new(path) {
        let available = fs::read_to_string(directory.join("cgroup.controllers"))?;
        for controller in available.split_whitespace().filter(|name| ["cpu", "memory", "pids", "cpuset"].contains(name))
        {
            fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"))?;
        }
        directory.push(part);
    }
    Ok(())
}

fn collect_pids(directory: &Path, into: &mut BTreeSet<i32>) -> io::Result<()> {
    let Some(procs) = absent_is_none(fs::read_to_string(directory.join("cgroup.procs")))? else { return Ok(()) };
    // Zero stands for a process of another pid namespace, which nobody here can name.
    into.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for child in subdirectories(directory)? {
        collect_pids(&child, into)?;
    }
    Ok(())
}

fn subdirectories(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(entries) = absent_is_none(fs::read_dir(directory))? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for child in subdirectories(directory)? {
        remove_tree(&child)?;
    }
    // A process is reported dead before the kernel lets go of its cgroup, and v1 tells nobody when it does: ask again shortly.
    for _ in 0..400 {
        match fs::remove_dir(directory) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(Duration::from_millis(5)),
            result => return absent_is_none(result).map(|_| ()),
        }
    }
    absent_is_none(fs::remove_dir(directory)).map(|_| ())
}

/// A cgroup may be removed, and a process may end, between two looks; the kernel then says ENOENT or ENODEV.
fn absent_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A process held by descriptor, so that a signal cannot hit another one that got its number.
struct Process {
    pid: i32,
    fd: OwnedFd,
}

/// `None` when it is gone already.
#[allow(unsafe_code)]
fn open_process(pid: i32) -> io::Result<Option<Process>> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1; no memory is shared.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return absent_is_none(Err(io::Error::last_os_error()));
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor to us and nobody else knows it.
    Ok(Some(Process { pid, fd: unsafe { OwnedFd::from_raw_fd(fd) } }))
}

impl Process {
    #[allow(unsafe_code)]
    fn kill(&self) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: pidfd_send_signal reads no memory when the signal information is null.
        let done =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), libc::SIGKILL, no_info, 0) };
        if done < 0 { absent_is_none(Err(io::Error::last_os_error())).map(|_: Option<()>| ()) } else { Ok(()) }
    }

    /// Until it has ended, at most so many milliseconds; a caller that asks again finds out whether it has.
    fn wait(&self, milliseconds: u16) -> io::Result<()> {
        match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(milliseconds)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
