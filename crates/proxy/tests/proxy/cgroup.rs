//! What a node of a test needs for eBPF programs. They belong to a cgroup, and the namespaces of a test are threads of one
//! process: so each node has a cgroup for threads, and a directory for its pins.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use linux::cgroup_v1v2::Hierarchies;
use proxy::Hooks;

const NAME: &str = "fairlead-proxy-test-";

/// Where this process came from, and how many tests have it in its own cgroup now.
static MOVED: Mutex<(Option<PathBuf>, u32)> = Mutex::new((None, 0));
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A cgroup for some threads of this process; the rest of it stays beside.
struct ThreadCgroup {
    path: PathBuf,
}

/// A node's cgroup and pins. Nothing is left of them when this goes.
pub struct Attached {
    // Programs go before the cgroup does.
    pins: Pins,
    cgroup: ThreadCgroup,
}

struct Pins(PathBuf);

impl Attached {
    /// From here on the calling thread, and threads and processes it starts, see mounts that nobody else sees.
    pub fn new() -> Self {
        linux::mount::unshare_mounts().expect("mount namespace");
        let cgroup = ThreadCgroup::new();
        let name = cgroup.path.file_name().and_then(|name| name.to_str()).expect("a number");
        let pins = std::env::temp_dir().join(format!("fairlead-bpf-{}-{name}", std::process::id()));
        Attached { pins: Pins(pins), cgroup }
    }

    pub fn hooks(&self) -> Hooks {
        Hooks { cgroup: self.cgroup.path.clone(), pins: self.pins.0.clone() }
    }

    /// Puts a thread of this process in, and all that it starts from now on.
    pub fn add(&self, thread: i32) {
        add(&self.cgroup.path, thread);
    }
}

/// Puts a thread of this process into a cgroup for threads.
pub fn add(cgroup: &Path, thread: i32) {
    fs::write(cgroup.join("cgroup.threads"), thread.to_string()).expect("moved");
}

impl Drop for Pins {
    fn drop(&mut self) {
        drop(linux::bpf::remove(&self.0));
        drop(fs::remove_dir(&self.0));
    }
}

fn root() -> PathBuf {
    Hierarchies::mounted().expect("mounts").v2.expect("a cgroup2 mount, as the ebpf mode needs")
}

fn own(root: &Path) -> PathBuf {
    root.join(format!("{NAME}{}", std::process::id()))
}

/// Processes that were killed left theirs.
fn clean(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(pid) = name.strip_prefix(NAME) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            remove(&path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

impl ThreadCgroup {
    fn new() -> Self {
        let root = root();
        let domain = own(&root);
        let mut moved = MOVED.lock().expect("no panic");
        if moved.1 == 0 {
            clean(&root).expect("cgroups of dead processes can be removed");
            let text = fs::read_to_string("/proc/self/cgroup").expect("cgroups");
            let before = text.lines().find_map(|line| line.strip_prefix("0::/")).expect("a cgroup2 path");
            moved.0 = Some(root.join(before));
            fs::create_dir_all(&domain).expect("cgroup");
            fs::write(domain.join("cgroup.procs"), std::process::id().to_string()).expect("moved");
        }
        moved.1 += 1;
        let path = domain.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir(&path).expect("cgroup");
        fs::write(path.join("cgroup.type"), "threaded").expect("threaded");
        ThreadCgroup { path }
    }
}

impl Drop for ThreadCgroup {
    fn drop(&mut self) {
        let mut moved = MOVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let domain = own(&root());
        for thread in fs::read_to_string(self.path.join("cgroup.threads")).unwrap_or_default().lines() {
            drop(fs::write(domain.join("cgroup.threads"), thread));
        }
        drop(fs::remove_dir(&self.path));
        moved.1 -= 1;
        if moved.1 == 0
            && let Some(before) = &moved.0
        {
            drop(fs::write(before.join("cgroup.procs"), std::process::id().to_string()));
            drop(fs::remove_dir(&domain));
        }
    }
}
