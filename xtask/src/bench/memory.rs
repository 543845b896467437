//! Memory of each process of a cluster at rest, and the size of the binary.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Row, import, with_cluster};
use crate::cluster::Cluster;
use crate::shell;

pub fn measure() -> Result<Vec<Row>> {
    with_cluster(1, |cluster| {
        import(cluster, "nginx:test1")?;
        let manifest = shell::root().join("examples/nginx/deployment.yaml");
        shell::output(cluster.kubectl(&["apply", "-f"]).arg(manifest))?;
        shell::output(&mut cluster.kubectl(&["rollout", "status", "deployment/nginx-deployment", "--timeout=60s"]))?;
        let mut rows = processes(cluster)?;
        let bytes = fs::metadata(cluster.binary())?.len();
        rows.push(row("binary, stripped", format!("{:.1} MB", bytes as f64 / 1e6), "under 40 MB"));
        Ok(rows)
    })
}

/// Several processes of one role are one line with the largest of them.
fn processes(cluster: &Cluster) -> Result<Vec<Row>> {
    let mut roles: BTreeMap<String, (u64, u64, usize)> = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
        let dir = entry.path();
        if fs::read_link(dir.join("exe")).is_ok_and(|exe| exe == cluster.binary()) && is_of(cluster, &dir) {
            // The process may end between the two reads: then it is no process at rest.
            if let Ok(rollup) = fs::read_to_string(dir.join("smaps_rollup")) {
                let pss = kilobytes(&rollup, &["Pss:"]);
                let private = kilobytes(&rollup, &["Private_Clean:", "Private_Dirty:"]);
                let held = roles.entry(role(&dir)).or_default();
                *held = (held.0.max(pss), held.1.max(private), held.2 + 1);
            }
        }
    }
    let rows = roles.into_iter().map(|(role, (pss, private, count))| {
        let megabytes = |kilobytes: u64| kilobytes as f64 / 1024.0;
        let measured = format!("{:.1} / {:.1} MB", megabytes(pss), megabytes(private));
        row(&format!("PSS / private of {role} (x{count})"), measured, "server 60, agent 30 PSS; helper 2 private")
    });
    Ok(rows.collect())
}

/// Another cluster on this machine runs the same binary with another directory.
fn is_of(cluster: &Cluster, dir: &Path) -> bool {
    let words = fs::read(dir.join("cmdline")).unwrap_or_default();
    let environment = fs::read(dir.join("environ")).unwrap_or_default();
    let wanted = cluster.data_dir().to_string_lossy().into_owned();
    [words, environment].iter().any(|bytes| String::from_utf8_lossy(bytes).contains(&wanted))
}

/// The subcommand a process was started with.
fn role(dir: &Path) -> String {
    let words = fs::read(dir.join("cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&words).into_owned();
    words.split('\0').nth(1).filter(|word| !word.is_empty()).unwrap_or("fairlead").to_owned()
}

/// The sum of these fields of a process's smaps_rollup.
pub fn kilobytes(rollup: &str, fields: &[&str]) -> u64 {
    let lines = rollup.lines().filter(|line| fields.iter().any(|field| line.starts_with(field)));
    lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

fn row(what: &str, measured: String, wanted: &str) -> Row {
    Row { what: what.to_owned(), measured, wanted: wanted.to_owned() }
}
