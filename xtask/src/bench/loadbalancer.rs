//! How long an address is gone when its host is: layer 2 and VRRP beside keepalived, trials taking turns; how soon bird forgets a
//! node by BFD; and 10,000 Services. The example `failover` of the crate does the work.

use anyhow::{Context, Result};

use super::Row;
use crate::{deps, shell};

const TRIALS: &str = "50";
const PEERS: [&str; 2] = ["keepalived", "bird2"];

/// The name that the example prints, what it means, whether it is a share of trials, and what is wanted.
const FIGURES: [(&str, &str, bool, &str); 6] = [
    ("layer2", "address gone when its host is, layer 2", true, "p99 under 500 ms"),
    ("vrrp", "the same, VRRP at 100 ms", true, "p99 under 500 ms"),
    ("keepalived", "the same, keepalived at 100 ms", true, ""),
    ("bgp-bfd", "route gone, BFD at 3 x 50 ms", true, "under 300 ms"),
    ("many", "10,000 addresses given and announced, layer 2", false, "under 5000 ms"),
    ("bgp-many", "10,000 routes in bird's table", false, "under 5000 ms"),
];

pub fn measure() -> Result<Vec<Row>> {
    deps::ensure(&PEERS)?;
    shell::output(shell::cargo().args(["build", "--release", "-p", "loadbalancer", "--example", "failover"]))?;
    let binary = shell::target_dir()?.join("release/examples/failover");
    let printed = shell::output(std::process::Command::new(binary).arg(TRIALS))?;
    let row = |(name, what, is_share, wanted): &(&str, &str, bool, &str)| {
        let mut lines = printed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let words = lines.find(|words| words.first() == Some(name)).with_context(|| format!("no figure {name}"))?;
        let [_, p50, p99] = words[..] else { anyhow::bail!("the example printed {words:?}") };
        let (p50, p99): (f64, f64) = (p50.parse()?, p99.parse()?);
        let measured = if *is_share { format!("{p50:.0} / {p99:.0} ms") } else { format!("{p50:.0} ms") };
        let what = if *is_share { format!("{what}, p50 / p99") } else { (*what).to_owned() };
        Ok(Row { what, measured, wanted: (*wanted).to_owned() })
    };
    FIGURES.iter().map(row).collect()
}
