//! Installs what building, testing and the demo need from Debian, and starts none of it.
//!
//! Every make target calls this first, so it must cost nothing when all is there: one question to dpkg.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::interrupt::Held;
use crate::shell;

/// Package, and what needs it.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "build: ring's assembly and the linker"),
    ("libc6-dev", "build: the linker"),
    ("clang-16", "build: the programs of the ebpf proxy mode"),
    ("linux-libc-dev", "build: the kernel's headers for them"),
    ("iptables", "the iptables proxy mode"),
    ("nftables", "tests and demo: `nft list` reads back what our encoder wrote"),
    ("conntrack", "tests: read the flows of a namespace"),
    ("iproute2", "tests: read links and routes with other eyes than ours"),
    ("curl", "tests and demo: the client"),
    ("busybox-static", "tests: the smallest image"),
    ("nginx-light", "tests and bench: a server, and a peer"),
    ("etcd-server", "tests and bench: a real etcd"),
    ("qemu-system-x86", "tests: a machine with another kernel (IPVS, SCTP)"),
    ("binutils", "tests: strip, so that a test fits into that machine"),
    ("docker-registry", "tests: a real registry"),
    ("ca-certificates", "tests: pull over TLS"),
    ("bind9-dnsutils", "tests: dig asks cluster DNS"),
    ("knot-dnsutils", "tests: kdig does, too"),
    ("bird2", "tests: a BGP router"),
    ("frr", "tests: another one, with BFD"),
    ("keepalived", "tests and bench: a VRRP router"),
];

const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_BEFORE: &str = "/usr/sbin/policy-rc.d.before-fairlead";
/// invoke-rc.d reads 101 as "this action is forbidden": the package is installed and its daemon stays down.
const POLICY_TEXT: &str = "#!/bin/sh\n# fairlead: start no daemon while its test packages are installed\nexit 101\n";

pub fn run(_args: &[String]) -> Result<()> {
    let names: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).collect();
    ensure(&names)
}

/// Installs what is missing of these packages. For peers that only one bench needs.
pub fn ensure(names: &[&'static str]) -> Result<()> {
    restore_policy().context("cannot put the old policy-rc.d back")?;
    let missing = missing(names)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::Uid::effective().is_root() {
        bail!("missing packages: {}. Run `make deps` as root", missing.join(" "));
    }
    println!("deps: installing {}", missing.join(" "));
    // A dpkg that is interrupted leaves a machine to repair, and a left policy would keep all daemons down.
    let _held = Held::new()?;
    forbid_daemons().context("cannot write a policy-rc.d")?;
    let installed = install(&missing);
    restore_policy().context("cannot put the old policy-rc.d back")?;
    installed
}

fn missing(names: &[&'static str]) -> Result<Vec<&'static str>> {
    // dpkg-query complains of a package it never heard of and goes on: what it prints is the answer.
    let answer = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(names)
        .stderr(Stdio::null())
        .output()
        .context("cannot run dpkg-query: this needs Debian 12 or a relative of it")?;
    let installed = String::from_utf8_lossy(&answer.stdout).into_owned();
    let is_installed = |name: &str| installed.lines().any(|line| line == format!("{name} installed"));
    Ok(names.iter().copied().filter(|name| !is_installed(name)).collect())
}

fn install(missing: &[&str]) -> Result<()> {
    shell::step(Command::new("apt-get").arg("update"))?;
    let mut command = Command::new("apt-get");
    command.args(["install", "--yes", "--no-install-recommends"]).args(missing);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    shell::step(&mut command)
}

fn forbid_daemons() -> Result<()> {
    if Path::new(POLICY).exists() {
        fs::rename(POLICY, POLICY_BEFORE)?;
    }
    fs::write(POLICY, POLICY_TEXT)?;
    fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Also repairs what an earlier run that was killed has left: our text is told from anybody else's.
fn restore_policy() -> Result<()> {
    let ours = fs::read_to_string(POLICY).is_ok_and(|text| text == POLICY_TEXT);
    if ours {
        fs::remove_file(POLICY)?;
    }
    if Path::new(POLICY_BEFORE).exists() {
        fs::rename(POLICY_BEFORE, POLICY)?;
    }
    Ok(())
}
