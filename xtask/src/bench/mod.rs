//! The figures that README quotes, on the release build: medians of rounds whose variants take turns, so that a slow
//! minute of the machine falls on all of them.

mod dns;
mod ingress;
mod list;
mod loadbalancer;
mod memory;
mod plot;
mod pods;
mod proxy;
mod up;
mod writes;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::Cluster;
use crate::interrupt::Held;
use crate::{image, shell};

pub const ROUNDS: usize = 5;

struct Bench {
    name: &'static str,
    run: fn() -> Result<Vec<Row>>,
}

const BENCHES: &[Bench] = &[
    Bench { name: "up", run: up::measure },
    Bench { name: "pods", run: pods::measure },
    Bench { name: "memory", run: memory::measure },
    Bench { name: "list", run: list::measure },
    Bench { name: "writes", run: writes::measure },
    Bench { name: "proxy", run: proxy::measure },
    Bench { name: "dns", run: dns::measure },
    Bench { name: "ingress", run: ingress::measure },
    Bench { name: "loadbalancer", run: loadbalancer::measure },
];

/// One line of the table.
pub struct Row {
    pub what: String,
    pub measured: String,
    pub wanted: String,
}

pub fn run(args: &[String]) -> Result<()> {
    if let Some(unknown) = args.iter().find(|arg| BENCHES.iter().all(|bench| bench.name != arg.as_str())) {
        let names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        bail!("no bench {unknown:?}; there are: {}", names.join(" "));
    }
    let mut rows = Vec::new();
    for bench in BENCHES.iter().filter(|bench| args.is_empty() || args.iter().any(|arg| arg == bench.name)) {
        eprintln!("bench: {}", bench.name);
        rows.extend((bench.run)().with_context(|| format!("bench {}", bench.name))?);
    }
    println!("machine: {}", machine()?);
    println!("{:<44} {:>16}   wanted", "figure", "median");
    for row in rows {
        println!("{:<44} {:>16}   {}", row.what, row.measured, row.wanted);
    }
    Ok(())
}

/// Runs `work` on a new cluster in a directory of its own and ends it, whatever came of the work.
pub fn with_cluster<T>(nodes: usize, work: impl FnOnce(&Cluster) -> Result<T>) -> Result<T> {
    let dir = bench_dir()?;
    let cluster = Cluster::new(&dir)?;
    // A Ctrl-C between `up` and `down` would leave a cluster behind.
    let _held = Held::new()?;
    clear(&cluster)?;
    let result = shell::output(&mut cluster.up(nodes, &[])).and_then(|_| work(&cluster));
    clear(&cluster)?;
    result
}

pub fn bench_dir() -> Result<PathBuf> {
    Ok(shell::target_dir()?.join("bench"))
}

/// Ends what lives in the directory and empties it: a figure starts from nothing.
pub fn clear(cluster: &Cluster) -> Result<()> {
    if cluster.data_dir().exists() {
        shell::output(&mut cluster.fairlead(&["down"]))?;
        fs::remove_dir_all(cluster.data_dir()).context("cannot empty the directory of the bench")?;
    }
    Ok(())
}

pub fn import(cluster: &Cluster, name: &str) -> Result<()> {
    image::run(&[])?;
    shell::output(cluster.fairlead(&["image"]).arg("import").arg(image::archive_path(name)?)).map(drop)
}

pub fn median<T: PartialOrd + Copy>(mut figures: Vec<T>) -> T {
    figures.sort_by(|a, b| a.partial_cmp(b).expect("a figure is a number"));
    figures[figures.len() / 2]
}

pub fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1000.0)
}

fn machine() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(format!("{count} x {}, kernel {}", model.trim_start_matches(['\t', ' ', ':']), kernel.trim()))
}
