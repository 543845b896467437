//! Mount namespaces with a private /run, pinned to a file: programs that meet in one /run on a machine (iptables' lock, for
//! one) meet only within a node, and what is mounted for a node's pods is gone when the node is.

// Namespaces are made and filled here, on scratch threads.
#![allow(clippy::disallowed_methods)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::netns::is_pinned;

/// Programs expect these below /run.
const EXPECTED: [&str; 2] = ["/run/lock", "/run/netns"];

/// One line of /proc/self/mountinfo, as far as it is used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    pub kind: String,
    /// Options of the file system, not of the mount.
    pub options: String,
}

/// What is mounted in the calling process's mount namespace, in the order of mounting.
pub fn mountinfo() -> io::Result<Vec<Mount>> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse_mount).collect())
}

fn parse_mount(line: &str) -> Option<Mount> {
    // A variable number of optional fields ends with a hyphen.
    let (front, back) = line.split_once(" - ")?;
    let point = front.split(' ').nth(4)?;
    let mut back = back.split(' ');
    let kind = back.next()?.to_owned();
    let options = back.nth(1).unwrap_or_default().to_owned();
    Some(Mount { point: unescape(point).into(), kind, options })
}

/// Blank, tab, newline and backslash are written in octal.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Makes `directory` a private mount of itself, once: a mount namespace can be pinned only where mounts are not shared.
pub fn make_private(directory: &Path) -> io::Result<()> {
    if !mountinfo()?.iter().any(|mount| mount.point == directory) {
        mount(Some(directory), directory, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    mount(None::<&str>, directory, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

/// Unmounts everything at and below `directory`, last mounted first.
pub fn unmount_below(directory: &Path) -> io::Result<()> {
    for mount in mountinfo()?.iter().rev().filter(|mount| mount.point.starts_with(directory)) {
        umount2(&mount.point, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// Pins a mount namespace at `pin`: a copy of the caller's in which /run is a tmpfs, but for the directories of `reachable`
/// that lie below /run. One that is pinned there already is kept. The directory of `pin` has to be private.
pub fn create_with_private_run(pin: &Path, reachable: &[PathBuf]) -> io::Result<()> {
    if is_pinned(pin) {
        return Ok(());
    }
    File::create(pin)?;
    thread::scope(|scope| {
        let (ready, is_ready) = mpsc::channel();
        let (release, is_released) = mpsc::channel::<()>();
        let keeper = thread::Builder::new().name("mount namespace".into()).spawn_scoped(scope, move || {
            // The receiver waits for one answer, and ends this thread by dropping its sender.
            let _ = ready.send(hide_run(reachable).map(|()| nix::unistd::gettid()));
            let _ = is_released.recv();
        })?;
        let made = is_ready.recv().expect("the keeper answers before it ends");
        let pinned = made.and_then(|thread| {
            // From outside: the kernel refuses a namespace that would hold itself.
            let source = format!("/proc/self/task/{thread}/ns/mnt");
            Ok(mount(Some(source.as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
        });
        drop(release);
        keeper.join().expect("the keeper does not panic");
        pinned
    })
}

fn hide_run(reachable: &[PathBuf]) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Slave: nothing mounted here shows outside, and what is unmounted outside is not kept busy here.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    let run = fs::canonicalize("/run")?;
    let mut kept = Vec::new();
    for path in reachable {
        let path = fs::canonicalize(path)?;
        if path.starts_with(&run) {
            kept.push((File::open(&path)?, path));
        }
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), &run, Some("tmpfs"), flags, Some("mode=755"))?;
    for (held, path) in kept {
        fs::create_dir_all(&path)?;
        let source = format!("/proc/thread-self/fd/{}", held.as_raw_fd());
        mount(Some(source.as_str()), &path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    }
    EXPECTED.iter().try_for_each(fs::create_dir_all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read_with_any_number_of_optional_fields() {
        let line = r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:7 - cgroup cgroup rw,name=systemd";
        let mount = Mount { point: "/mnt 2".into(), kind: "cgroup".into(), options: "rw,name=systemd".into() };
        assert_eq!(parse_mount(line), Some(mount));
        assert_eq!(parse_mount("36 35 98:0 / / rw - ext4 /dev/vda rw").map(|mount| mount.kind), Some("ext4".into()));
        assert_eq!(parse_mount("garbage"), None);
    }
}
