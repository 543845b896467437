//! From an empty directory to all nodes Ready and DNS answering.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{ROUNDS, Row, bench_dir, clear, median, milliseconds};
use crate::cluster::Cluster;
use crate::interrupt::Held;
use crate::shell;

const VARIANTS: &[(usize, &str)] = &[(1, "under 1500 ms"), (3, "under 3000 ms")];

pub fn measure() -> Result<Vec<Row>> {
    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..ROUNDS {
        for ((nodes, _), times) in VARIANTS.iter().zip(&mut times) {
            times.push(once(*nodes)?);
        }
    }
    let rows = VARIANTS.iter().zip(times).map(|((nodes, wanted), times)| Row {
        what: format!("up --nodes {nodes} --detach"),
        measured: milliseconds(median(times)),
        wanted: (*wanted).to_owned(),
    });
    Ok(rows.collect())
}

fn once(nodes: usize) -> Result<Duration> {
    let cluster = Cluster::new(&bench_dir()?)?;
    let _held = Held::new()?;
    clear(&cluster)?;
    let begun = Instant::now();
    let up = shell::output(&mut cluster.up(nodes, &[]));
    let took = begun.elapsed();
    clear(&cluster)?;
    up.map(|_| took)
}
