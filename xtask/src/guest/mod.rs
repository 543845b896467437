//! Runs tests on another kernel: Debian's, in an emulated machine that boots in seconds and needs no /dev/kvm. For what
//! the kernel of a build machine may lack: IPVS, SCTP sockets, dummy interfaces.
//!
//! `cargo xtask guest` builds the proxy's tests and runs those whose path contains `guest`; `cargo xtask guest FILTER…`
//! runs others, `--release` builds them as they ship, and `--binary FILE` takes a test binary that is already built.

mod cpio;
mod qemu;
mod root;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::image::tree::Tree;
use crate::{image, shell};

/// The crate whose tests need the guest, and the part of a test's path that says so.
const PACKAGE: &str = "proxy";
const FILTER: &str = "guest::";

/// How many cases a property test tries, and which case file alone is played.
const CASES: &str = "FAIRLEAD_CASES";
const ONE_CASE: &str = "FAIRLEAD_CASE";

pub fn run(args: &[String]) -> Result<()> {
    run_with(args, std::env::var(CASES).ok())
}

/// With so many random cases in each property test.
pub fn run_with(args: &[String], cases: Option<String>) -> Result<()> {
    let (binary, filters) = match args {
        [flag, file, filters @ ..] if flag == "--binary" => (PathBuf::from(file), filters),
        [flag, filters @ ..] if flag == "--release" => (build(&["--release"])?, filters),
        filters => (build(&[])?, filters),
    };
    let filters = if filters.is_empty() { FILTER.to_owned() } else { filters.join(" ") };
    let base = root::base().context("cannot build the guest")?;
    let test = base.root.with_file_name("test.cpio");
    image::replace(&test, &cpio::pack(payload(&binary, &filters, cases.as_deref())?))?;
    let cases = cases.map(|cases| cases.parse().with_context(|| format!("{CASES} is no number")));
    qemu::run(&base, &test, cases.transpose()?.unwrap_or(0))
}

/// The test binary, and what starts it.
fn payload(binary: &Path, filters: &str, cases: Option<&str>) -> Result<Tree> {
    let stripped = shell::target_dir()?.join("guest/test");
    // The guest unpacks this into its memory.
    shell::output(Command::new("strip").arg("-o").arg(&stripped).arg(binary))?;
    let mut tree = Tree::default();
    root::program(&mut tree, "test", &stripped)?;
    // Tests look for them where they were built.
    let files = shell::root().join("crates").join(PACKAGE).join("tests/cases");
    for entry in std::fs::read_dir(&files).with_context(|| format!("cannot read {}", files.display()))? {
        let path = entry?.path();
        tree.file(path.to_string_lossy().trim_start_matches('/'), 0o644, std::fs::read(&path)?);
    }
    let one_case = std::env::var(ONE_CASE).ok();
    let set: String = [(CASES, cases), (ONE_CASE, one_case.as_deref())]
        .into_iter()
        .filter_map(|(name, value)| Some(format!(" {name}={}", value?)))
        .collect();
    let init = format!(
        "#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root{set}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
modprobe br_netfilter
ip link set lo up
/test {filters} --include-ignored --test-threads 1
echo {}$?
poweroff -f
",
        qemu::ENDED
    );
    tree.file("init", 0o755, init);
    Ok(tree)
}

fn build(profile: &[&str]) -> Result<PathBuf> {
    let args = ["test", "--package", PACKAGE, "--test", PACKAGE, "--no-run", "--message-format", "json"];
    let messages = shell::output(shell::cargo().args(args).args(profile))?;
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo did not print JSON")?;
        if let Some(file) = message["executable"].as_str() {
            return Ok(PathBuf::from(file));
        }
    }
    bail!("cargo named no test binary of {PACKAGE}")
}
