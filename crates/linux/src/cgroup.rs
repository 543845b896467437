//! A cgroup as a path that exists in every hierarchy of this machine, whether v1, hybrid or unified.
//!
//! A node, a pod and a container each are one such path. Creating, filling, killing and removing it touches all
//! hierarchies alike, so nothing above this file needs to know which kind of machine it runs on.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::PidFd;

/// One mounted cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    pub mount: PathBuf,
    pub kind: HierarchyKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HierarchyKind {
    /// Controllers of a v1 mount ("cpu", "memory", "name=systemd" …).
    V1(Vec<String>),
    V2,
}

/// The same path in every hierarchy, relative to its mount.
#[derive(Debug, Clone)]
pub struct Cgroup {
    hierarchies: Vec<Hierarchy>,
    path: PathBuf,
}

/// The hierarchies in a mount table (`/proc/self/mountinfo`).
pub fn parse_hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(mount) = left.split(' ').nth(4) else { continue };
        let mut right = right.split(' ');
        let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
        let kind = match kind {
            "cgroup2" => HierarchyKind::V2,
            "cgroup" => HierarchyKind::V1(
                options.split(',').filter(|o| !matches!(*o, "rw" | "ro" | "xattr")).map(str::to_owned).collect(),
            ),
            _ => continue,
        };
        // The same hierarchy may be mounted twice, for example inside a container's view: the first one counts.
        if !found.iter().any(|h| h.kind == kind) {
            found.push(Hierarchy { mount: PathBuf::from(mount), kind });
        }
    }
    found
}

impl Cgroup {
    /// `path` is relative to the root of every hierarchy; a leading slash is accepted.
    pub fn new(path: impl AsRef<Path>) -> io::Result<Cgroup> {
        let hierarchies = parse_hierarchies(&fs::read_to_string("/proc/self/mountinfo")?);
        let path = path.as_ref();
        Ok(Cgroup { hierarchies, path: path.strip_prefix("/").unwrap_or(path).to_owned() })
    }

    pub fn child(&self, name: impl AsRef<Path>) -> Cgroup {
        Cgroup { hierarchies: self.hierarchies.clone(), path: self.path.join(name) }
    }

    /// With the leading slash that an OCI spec wants.
    pub fn path(&self) -> PathBuf {
        Path::new("/").join(&self.path)
    }

    /// This cgroup's directory in every hierarchy.
    pub fn directories(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.hierarchies.iter().map(|h| h.mount.join(&self.path))
    }

    /// The directory that holds a v1 controller's files, or the unified one.
    pub fn controller(&self, name: &str) -> Option<PathBuf> {
        let v1 = self.hierarchies.iter().find(|h| match &h.kind {
            HierarchyKind::V1(controllers) => controllers.iter().any(|c| c == name),
            HierarchyKind::V2 => false,
        });
        v1.map(|h| h.mount.join(&self.path)).or_else(|| self.unified())
    }

    /// The directory in the cgroup2 hierarchy, where cgroup BPF programs attach.
    pub fn unified(&self) -> Option<PathBuf> {
        self.hierarchies.iter().find(|h| h.kind == HierarchyKind::V2).map(|h| h.mount.join(&self.path))
    }

    pub fn create(&self) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let directory = hierarchy.mount.join(&self.path);
            fs::create_dir_all(&directory)?;
            if matches!(&hierarchy.kind, HierarchyKind::V1(c) if c.iter().any(|c| c == "cpuset")) {
                self.fill_cpuset(&hierarchy.mount)?;
            }
        }
        Ok(())
    }

    /// A new v1 cpuset is empty and refuses every process until it names processors and memory nodes.
    fn fill_cpuset(&self, mount: &Path) -> io::Result<()> {
        let mut directory = mount.to_owned();
        for component in self.path.components() {
            let parent = directory.clone();
            directory.push(component);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if fs::read_to_string(directory.join(file))?.trim().is_empty() {
                    fs::write(directory.join(file), fs::read_to_string(parent.join(file))?.trim())?;
                }
            }
        }
        Ok(())
    }

    /// Moves a process, with all its threads, into this cgroup of every hierarchy.
    pub fn add(&self, pid: i32) -> io::Result<()> {
        self.create()?;
        for directory in self.directories() {
            fs::write(directory.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    /// Every process in this cgroup or below it, in any hierarchy.
    pub fn processes(&self) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        for directory in self.directories() {
            collect_processes(&directory, &mut pids);
        }
        pids
    }

    /// Kills everything in the subtree and waits until it is gone, at most `patience`.
    pub fn kill(&self, patience: Duration) -> io::Result<()> {
        let end = Instant::now() + patience;
        loop {
            if let Some(unified) = self.unified() {
                // Kernels before 5.14 lack this file; the walk below does the same with more races.
                let _ = fs::write(unified.join("cgroup.kill"), "1");
            }
            let pids = self.processes();
            if pids.is_empty() {
                return Ok(());
            }
            for pid in &pids {
                let Ok(process) = PidFd::open(*pid) else { continue };
                process.signal(nix::libc::SIGKILL)?;
                if !process.wait(end.saturating_duration_since(Instant::now()))? {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("process {pid} in cgroup {} does not die", self.path.display()),
                    ));
                }
            }
            if Instant::now() >= end {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("cgroup {} does not empty: look at its cgroup.procs", self.path.display()),
                ));
            }
        }
    }

    /// Removes the subtree's directories. Fails while a process is left in one.
    pub fn remove(&self) -> io::Result<()> {
        for directory in self.directories() {
            remove_tree(&directory)?;
        }
        Ok(())
    }

    /// Names of the cgroups directly below, in any hierarchy.
    pub fn children(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for directory in self.directories() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    names.insert(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        names
    }

    /// How many processes the kernel killed here for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let Some(directory) = self.controller("memory") else { return 0 };
        let text = fs::read_to_string(directory.join("memory.oom_control"))
            .or_else(|_| fs::read_to_string(directory.join("memory.events")))
            .unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Bytes of memory charged, and nanoseconds of processor time used; none where the controller is absent.
    pub fn usage(&self) -> (Option<u64>, Option<u64>) {
        let read = |controller: &str, file: &str| -> Option<u64> {
            fs::read_to_string(self.controller(controller)?.join(file)).ok()?.trim().parse().ok()
        };
        let memory = read("memory", "memory.usage_in_bytes").or_else(|| read("memory", "memory.current"));
        let cpu = read("cpuacct", "cpuacct.usage").or_else(|| {
            let text = fs::read_to_string(self.unified()?.join("cpu.stat")).ok()?;
            text.lines().find_map(|l| l.strip_prefix("usage_usec ")?.parse::<u64>().ok()).map(|us| us * 1000)
        });
        (memory, cpu)
    }
}

fn collect_processes(directory: &Path, into: &mut BTreeSet<i32>) {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    // Processes of a foreign pid namespace read as 0.
    into.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_processes(&entry.path(), into);
        }
    }
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_mount_table_is_read_once_per_hierarchy() {
        let table = "30 23 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                     31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                     32 23 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                     33 23 0:26 / /other rw - cgroup cgroup rw,memory\n\
                     34 23 0:3 / /proc rw - proc proc rw\n";
        let found = parse_hierarchies(table);
        assert_eq!(
            found.iter().map(|h| h.mount.to_str().unwrap_or("")).collect::<Vec<_>>(),
            ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/unified"]
        );
        assert_eq!(found[1].kind, HierarchyKind::V1(vec!["cpu".into(), "cpuacct".into()]));
    }
}
