//! Runs tests on another kernel: Debian's, in an emulated machine that boots in seconds and needs no /dev/kvm. For what
//! the kernel of a build machine may lack: IPVS, SCTP sockets, dummy interfaces.
//!
//! `cargo xtask guest` builds the proxy's tests and runs those whose path contains `guest`; `cargo xtask guest FILTER`
//! runs others, and `--binary FILE` takes a test binary that is already built.

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

pub fn run(args: &[String]) -> Result<()> {
    let (binary, filters) = match args {
        [flag, file, filters @ ..] if flag == "--binary" => (PathBuf::from(file), filters),
        filters => (build()?, filters),
    };
    let filters = if filters.is_empty() { FILTER.to_owned() } else { filters.join(" ") };
    let base = root::base().context("cannot build the guest")?;
    let test = base.root.with_file_name("test.cpio");
    image::replace(&test, &cpio::pack(payload(&binary, &filters)?))?;
    qemu::run(&base, &test)
}

/// The test binary, and what starts it.
fn payload(binary: &Path, filters: &str) -> Result<Tree> {
    let stripped = shell::target_dir()?.join("guest/test");
    // The guest has half a gigabyte, and unpacks this into it.
    shell::output(Command::new("strip").arg("-o").arg(&stripped).arg(binary))?;
    let mut tree = Tree::default();
    root::program(&mut tree, "test", &stripped)?;
    let cases = std::env::var("FAIRLEAD_CASES").unwrap_or_default();
    let init = format!(
        "#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root FAIRLEAD_CASES={cases}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
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

fn build() -> Result<PathBuf> {
    let args = ["test", "--package", PACKAGE, "--test", PACKAGE, "--no-run", "--message-format", "json"];
    let messages = shell::output(shell::cargo().args(args))?;
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo did not print JSON")?;
        if let Some(file) = message["executable"].as_str() {
            return Ok(PathBuf::from(file));
        }
    }
    bail!("cargo named no test binary of {PACKAGE}")
}
