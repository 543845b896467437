//! From `kubectl apply` to a packet, on three nodes of this machine, and nothing left behind.
//!
//! Two processes of this program: one tells the story and may end at any moment; the other waits for it with
//! Ctrl-C held off, takes the cluster down and compares the machine with what it was before.

mod balancer;
mod ingress;
mod leftovers;
mod names;
mod rules;
mod story;
mod traffic;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::Cluster;
use crate::interrupt::Held;
use crate::shell;
use leftovers::Inventory;

/// Set in the process that tells the story.
const TELLER: &str = "FAIRLEAD_DEMO_TELLER";

/// What a run may choose; all else goes to `fairlead up` as it is.
struct Options {
    data_dir: PathBuf,
    /// The directory is ours to make and to remove: nobody named one.
    ours: bool,
    nodes: usize,
    proxy_mode: String,
    /// `fairlead server` and `fairlead agent` by themselves, without `up`.
    standalone: bool,
    keep: bool,
    up: Vec<String>,
}

pub fn run(args: &[String]) -> Result<()> {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("usage: cargo xtask demo [--data-dir DIR] [--nodes N] [--keep] [--standalone] [FLAGS OF fairlead up]");
        println!("  --standalone  hosts joined by `fairlead server` and `fairlead agent` alone; their flags, then");
        return Ok(());
    }
    let options = parse(args)?;
    let cluster = match options.standalone {
        true => Cluster::standalone(&options.data_dir)?,
        false => Cluster::new(&options.data_dir)?,
    };
    if std::env::var_os(TELLER).is_some() {
        Held::release_inherited()?;
        return story::tell(&cluster, &options);
    }
    if !nix::unistd::Uid::effective().is_root() {
        bail!("the demo makes network namespaces and containers: run it as root");
    }
    guard(&cluster, &options, args)
}

fn guard(cluster: &Cluster, options: &Options, args: &[String]) -> Result<()> {
    let _held = Held::new()?;
    clear(cluster, options).context("cannot clear what an earlier demo left")?;
    let before = Inventory::take(&options.data_dir)?;
    let story = Command::new(std::env::current_exe().context("cannot name this program")?)
        .arg("demo")
        .args(args)
        .env(TELLER, "1")
        .status()
        .context("cannot start the story")?;
    if options.keep && story.success() {
        println!("\nthe cluster is up: export KUBECONFIG={}", cluster.kubeconfig().display());
        if options.standalone {
            println!("its server listens in the namespace of node-1: `ip netns list`");
        }
        return Ok(());
    }
    println!("\n== down");
    cluster.down()?;
    let left = Inventory::take(&options.data_dir)?.beyond(&before);
    if options.ours && options.data_dir.exists() {
        fs::remove_dir_all(&options.data_dir)
            .context("cannot remove the data directory: is something mounted there?")?;
    }
    if !left.is_empty() {
        bail!("left behind:\n  {}", left.join("\n  "));
    }
    println!("nothing is left: no process, mount, namespace, cgroup, link, route or rule");
    if !story.success() {
        bail!("the story ended early: {story}");
    }
    Ok(())
}

/// An earlier demo may have been killed at any point, this guard included.
fn clear(cluster: &Cluster, options: &Options) -> Result<()> {
    if !options.data_dir.exists() {
        return Ok(());
    }
    cluster.down()?;
    if options.ours {
        fs::remove_dir_all(&options.data_dir)?;
    }
    Ok(())
}

fn parse(args: &[String]) -> Result<Options> {
    let mut options = Options {
        data_dir: PathBuf::new(),
        ours: true,
        nodes: 3,
        proxy_mode: "nftables".to_owned(),
        standalone: false,
        keep: false,
        up: Vec::new(),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (flag, joined) = match arg.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (arg.as_str(), None),
        };
        let mut value =
            || joined.clone().or_else(|| args.next().cloned()).with_context(|| format!("{flag} needs a value"));
        match flag {
            "--standalone" => options.standalone = true,
            "--keep" => options.keep = true,
            "--data-dir" => {
                options.data_dir = std::path::absolute(value()?)?;
                options.ours = false;
            }
            "--nodes" => options.nodes = value()?.parse().context("--nodes needs a number")?,
            "--proxy-mode" => options.proxy_mode = value()?,
            flag if flag.starts_with("--") => options.up.extend([flag.to_owned(), value()?]),
            other => bail!("{other:?} is no flag; see --help"),
        }
    }
    if options.ours {
        options.data_dir = shell::target_dir()?.join(if options.standalone { "demo-hosts" } else { "demo" });
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn what_the_demo_does_not_know_goes_to_up() {
        let args =
            ["--nodes", "2", "--store=etcd=http://127.0.0.1:2379", "--overlay", "vxlan", "--keep"].map(str::to_owned);
        let options = parse(&args).expect("good flags");
        assert_eq!(options.nodes, 2);
        assert!(options.keep && options.ours);
        assert_eq!(options.up, ["--store", "etcd=http://127.0.0.1:2379", "--overlay", "vxlan"]);
    }
}
