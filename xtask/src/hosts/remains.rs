//! Finds what runs on the hosts, ends it, and takes away what held it.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::shell;

const PATIENCE: Duration = Duration::from_secs(20);

/// A cgroup of the hierarchy without v1 controllers, which takes any process at once.
pub fn make_cgroup(path: &str) -> Result<PathBuf> {
    let mounts = hierarchies()?;
    let plain = mounts.iter().find(|mount| mount.plain).context("no cgroup2 is mounted: a node needs one")?;
    let dir = plain.dir.join(path);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
    Ok(dir)
}

/// Kills what is in the namespaces or below the cgroup, until there is nothing, then removes both.
pub fn end(pins: &[PathBuf], cgroup: &str) -> Result<()> {
    let namespaces: BTreeSet<(u64, u64)> = pins.iter().filter_map(|pin| identity(pin)).collect();
    let begun = Instant::now();
    loop {
        let found = processes(&namespaces, cgroup)?;
        if found.is_empty() {
            break;
        }
        if begun.elapsed() > PATIENCE {
            bail!("processes {found:?} of {cgroup} do not end");
        }
        for pid in found {
            // It may have ended since it was seen.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // The end of somebody else's child is no event to us.
        std::thread::sleep(Duration::from_millis(20));
    }
    for pin in pins {
        let name = pin.file_name().context("a pin has a name")?;
        shell::output(Command::new("ip").args(["netns", "delete"]).arg(name))?;
    }
    for mount in hierarchies()? {
        remove_tree(&mount.dir.join(cgroup))?;
    }
    Ok(())
}

struct Hierarchy {
    dir: PathBuf,
    plain: bool,
}

fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    Ok(text.lines().filter_map(hierarchy).collect())
}

/// A mount is `ID PARENT DEVICE ROOT POINT OPTIONS [FIELDS] - TYPE SOURCE OPTIONS`.
fn hierarchy(line: &str) -> Option<Hierarchy> {
    let (mount, kind) = line.split_once(" - ")?;
    let point = mount.split(' ').nth(4)?;
    let kind = kind.split(' ').next()?;
    (kind == "cgroup" || kind == "cgroup2").then(|| Hierarchy { dir: point.into(), plain: kind == "cgroup2" })
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Zombies are left out: they hold nothing, and wait for whoever started them.
fn processes(namespaces: &BTreeSet<(u64, u64)>, cgroup: &str) -> Result<Vec<i32>> {
    let part = format!("/{cgroup}/");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list processes")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let dir = entry.path();
        let stat = fs::read_to_string(dir.join("stat")).unwrap_or_default();
        if stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')) {
            continue;
        }
        let is_below = fs::read_to_string(dir.join("cgroup")).is_ok_and(|text| text.contains(&part));
        let is_in = identity(&dir.join("ns/net")).is_some_and(|namespace| namespaces.contains(&namespace));
        if is_below || is_in {
            found.push(pid);
        }
    }
    Ok(found)
}

/// A cgroup goes when the ones below it are gone. The kernel may still be emptying one whose processes just ended.
fn remove_tree(dir: &Path) -> Result<()> {
    let below = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        below => below.with_context(|| format!("cannot list {}", dir.display()))?,
    };
    for entry in below.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&entry.path())?;
    }
    let begun = Instant::now();
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error).with_context(|| format!("cannot remove {}", dir.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_found_among_the_mounts() {
        let v2 = hierarchy("41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw").expect("a cgroup2");
        assert!(v2.plain && v2.dir == Path::new("/sys/fs/cgroup/unified"));
        let v1 = hierarchy("34 31 0:31 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset").expect("a v1");
        assert!(!v1.plain && v1.dir == Path::new("/sys/fs/cgroup/cpuset"));
        assert!(hierarchy("31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw").is_none());
    }
}
