//! What the guest boots: Debian's kernel with the network modules that tests may want, busybox, and the tools that tests
//! run, taken from this machine with the libraries they need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio;
use crate::image::debian::Packages;
use crate::image::tree::Tree;
use crate::{image, shell};

/// A package without files that depends on the kernel of the day.
const KERNEL: &str = "linux-image-cloud-amd64";

const TOOLS: &[&str] = &["ip", "bridge", "nft", "conntrack", "xtables-nft-multi", "xtables-legacy-multi"];

const MODULES: &[&str] = &[
    "net/netfilter/",
    "net/ipv4/",
    "net/ipv6/",
    "net/bridge/",
    "net/802/",
    "net/llc/",
    "net/sctp/",
    "net/sched/",
    "drivers/net/dummy.ko",
    "drivers/net/veth.ko",
    "drivers/net/vxlan/",
    "lib/",
    "crypto/",
    "arch/x86/crypto/",
];

/// A kernel, and the archive of everything but the test.
pub struct Base {
    pub kernel: PathBuf,
    pub root: PathBuf,
}

/// Built once and kept under `target/guest`.
pub fn base() -> Result<Base> {
    let dir = shell::target_dir()?.join("guest");
    let base = Base { kernel: dir.join("vmlinuz"), root: dir.join("root.cpio") };
    let stamp = dir.join("stamp");
    let key = image::hex([include_str!("root.rs"), include_str!("cpio.rs")].concat().as_bytes());
    if fs::read_to_string(&stamp).is_ok_and(|held| held == key) {
        return Ok(base);
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut packages = Packages::new(dir.join("packages"))?;
    if packages.architecture != "amd64" {
        bail!("the guest's kernel is for amd64, this machine is {}; run this on amd64", packages.architecture);
    }
    let package = packages
        .depends(KERNEL)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{KERNEL} names no kernel"))?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    let whole = packages.tree(&package)?;
    image::replace(&base.kernel, whole.bytes(&format!("boot/vmlinuz-{version}"))?)?;
    let modules = format!("usr/lib/modules/{version}");
    let wanted = |path: &str| {
        let Some(file) = path.strip_prefix(&modules) else { return false };
        match file.strip_prefix("/kernel/") {
            Some(module) => MODULES.iter().any(|prefix| module.starts_with(prefix)),
            None => true,
        }
    };
    let mut tree = whole.only(wanted);
    index(&mut tree, &dir.join("modules"), &version)?;
    tree.file("usr/bin/busybox", 0o755, fs::read("/bin/busybox").context("cannot read busybox; run `make deps`")?);
    for applet in ["sh", "mount", "modprobe", "poweroff", "cat", "sysctl", "sleep"] {
        tree.link(&format!("usr/sbin/{applet}"), "../bin/busybox");
    }
    for tool in TOOLS {
        let file = shell::which(tool).with_context(|| format!("no {tool} on PATH; run `make deps`"))?;
        program(&mut tree, &format!("usr/sbin/{tool}"), &file)?;
    }
    for (variant, program) in [("nft", "xtables-nft-multi"), ("legacy", "xtables-legacy-multi")] {
        for (family, action) in ["iptables", "ip6tables"].iter().flat_map(|f| ["", "-save", "-restore"].map(|a| (f, a)))
        {
            tree.link(&format!("usr/sbin/{family}-{variant}{action}"), program);
        }
    }
    let extensions = Path::new("/usr/lib/x86_64-linux-gnu/xtables");
    for entry in fs::read_dir(extensions).with_context(|| format!("cannot read {}", extensions.display()))? {
        let path = entry?.path();
        tree.file(path.to_string_lossy().trim_start_matches('/'), 0o755, fs::read(&path)?);
    }
    for dir in ["proc", "sys", "dev", "run", "tmp", "root", "etc"] {
        tree.dir(dir, 0o755);
    }
    image::replace(&base.root, &cpio::pack(tree))?;
    image::replace(&stamp, key.as_bytes())?;
    Ok(base)
}

/// A program and the libraries it is linked with.
pub fn program(tree: &mut Tree, name: &str, file: &Path) -> Result<()> {
    tree.file(name, 0o755, fs::read(file).with_context(|| format!("cannot read {}", file.display()))?);
    let listed = shell::output(Command::new("ldd").arg(file))?;
    let libraries: BTreeSet<&str> =
        listed.lines().flat_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))).collect();
    for library in libraries {
        let bytes = fs::read(library).with_context(|| format!("cannot read {library}"))?;
        let path = library.trim_start_matches('/');
        let path = if path.starts_with("lib") { format!("usr/{path}") } else { path.to_owned() };
        tree.file(&path, 0o755, bytes);
    }
    Ok(())
}

/// Lists which module needs which, so that the kernel's own wishes for modules come true.
fn index(tree: &mut Tree, scratch: &Path, version: &str) -> Result<()> {
    if scratch.exists() {
        fs::remove_dir_all(scratch)?;
    }
    let files: Vec<(String, Vec<u8>)> = tree.files().map(|(path, bytes)| (path.to_owned(), bytes.to_vec())).collect();
    for (path, bytes) in files {
        let file = scratch.join(path.trim_start_matches("usr/"));
        fs::create_dir_all(file.parent().expect("a module lies in a directory"))?;
        fs::write(&file, bytes)?;
    }
    shell::output(Command::new("busybox").args(["depmod", "-b"]).arg(scratch).arg(version))?;
    let folder = format!("lib/modules/{version}");
    for name in ["modules.dep", "modules.alias", "modules.symbols"] {
        let made = scratch.join(&folder).join(name);
        let bytes = fs::read(&made).with_context(|| format!("depmod left no {name}"))?;
        tree.file(&format!("usr/{folder}/{name}"), 0o644, bytes);
    }
    Ok(fs::remove_dir_all(scratch)?)
}
