//! What a cluster may leave on a machine, listed before and after.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

/// One line per thing, which begins with its kind. Two inventories are compared as sets.
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Things of the host's network count whoever made them: nothing of ours may touch it. Processes, mounts and cgroups
    /// count when they are Fairlead's, since a machine has others come and go.
    pub fn take(data_dir: &Path) -> Result<Inventory> {
        let others = others(data_dir);
        let mut things = BTreeSet::new();
        things.extend(entries(Path::new("/sys/class/net")).map(|name| format!("link {name}")));
        for table in ["/proc/net/route", "/proc/net/ipv6_route"] {
            let text = fs::read_to_string(table).unwrap_or_default();
            things.extend(text.lines().skip(1).map(|line| format!("route {}", without_counters(line))));
        }
        things.extend(entries(Path::new("/run/netns")).map(|name| format!("namespace {name}")));
        things.extend(entries(Path::new("/run/fairlead")).map(|name| format!("state /run/fairlead/{name}")));
        things.extend(mounts(data_dir)?);
        things.extend(processes(data_dir, &others));
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut things);
        things.retain(|thing| !others.iter().any(|id| thing.contains(id)));
        Ok(Inventory(things))
    }

    pub fn beyond(&self, before: &Inventory) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    names.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// The columns that name a route, and not how often it was used.
fn without_counters(line: &str) -> String {
    let columns: Vec<&str> = line.split_whitespace().collect();
    match columns.len() {
        // IPv6: destination, length, source, length, next hop, metric, use counts, flags, device.
        10 => [&columns[..6], &columns[9..]].concat().join(" "),
        // IPv4: device, destination, gateway, flags, counts, metric, mask.
        _ => columns.iter().take(4).chain(columns.iter().skip(6).take(2)).copied().collect::<Vec<_>>().join(" "),
    }
}

fn mounts(data_dir: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.filter(|point| is_ours(point, data_dir)).map(|point| format!("mount {point}")).collect())
}

/// The ids of other clusters that run on this machine: they come and go as they like.
fn others(data_dir: &Path) -> Vec<String> {
    let ours = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    entries(Path::new("/run/fairlead"))
        .filter(|id| {
            let file = Path::new("/run/fairlead").join(id).join("cluster.json");
            let text = fs::read_to_string(file).unwrap_or_default();
            let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let dir = config.pointer("/config/data_dir").and_then(serde_json::Value::as_str).map(Path::new);
            dir.is_some_and(|dir| dir != ours && dir != data_dir)
        })
        .collect()
}

/// Ours by what it runs, where it is rooted or which cgroup holds it.
fn processes(data_dir: &Path, others: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for pid in entries(Path::new("/proc")).filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        let dir = Path::new("/proc").join(&pid);
        // A process that has ended waits for the machine's init to take note; it holds nothing.
        let stat = fs::read_to_string(dir.join("stat")).unwrap_or_default();
        if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')) {
            continue;
        }
        let exe = fs::read_link(dir.join("exe")).unwrap_or_default();
        let root = fs::read_link(dir.join("root")).unwrap_or_default();
        let cgroup = fs::read_to_string(dir.join("cgroup")).unwrap_or_default();
        let command = fs::read(dir.join("cmdline")).unwrap_or_default();
        let is_another = |id: &String| cgroup.contains(id) || String::from_utf8_lossy(&command).contains(id.as_str());
        if others.iter().any(is_another) {
            continue;
        }
        let runs_us = exe.file_name().is_some_and(|name| name.as_bytes().starts_with(b"fairlead"));
        if runs_us || is_ours(&root.to_string_lossy(), data_dir) || cgroup.contains("fairlead") {
            let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            found.push(format!("process {pid} {}", comm.trim()));
        }
    }
    found
}

fn cgroups(dir: &Path, depth: usize, things: &mut BTreeSet<String>) {
    // Deep enough for a controller, a subtree, a node and its pods; links among the controllers lead to the same.
    if depth > 5 {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        if path.to_string_lossy().contains("fairlead") {
            things.insert(format!("cgroup {}", path.display()));
        }
        cgroups(&path, depth + 1, things);
    }
}

fn is_ours(path: &str, data_dir: &Path) -> bool {
    path.contains("/fairlead") || Path::new(path).starts_with(data_dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_the_same_route_after_it_was_used() {
        let unused = "eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0";
        let used = "eth0\t00000000\t0100A8C0\t0003\t7\t9\t100\t00000000\t0\t0\t0";
        assert_eq!(without_counters(unused), without_counters(used));
    }

    #[test]
    fn what_was_there_before_is_not_left_behind() {
        let before = Inventory(BTreeSet::from(["link eth0".to_owned()]));
        let after = Inventory(BTreeSet::from(["link eth0".to_owned(), "link fl-1".to_owned()]));
        assert_eq!(after.beyond(&before), ["link fl-1"]);
        assert!(before.beyond(&after).is_empty());
    }
}
