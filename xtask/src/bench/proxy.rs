//! The Service data path beside its floors and beside kube-proxy's shape, which our iptables mode is to the letter.
//!
//! `crates/proxy/examples/path/` measures; this runs it in rounds and makes ratios.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::plot::{Plot, Series};
use super::{ROUNDS, Row, median};
use crate::shell;

/// Modes whose figures count, and beside them what kube-proxy makes: its iptables mode is ours to the letter, here by the
/// legacy variant of the tools, which is the faster one.
const MODES: &[&str] = &["nftables", "ebpf"];
const PEERS: &[&str] = &["iptables", "kube-proxy-nftables"];
/// Of the peers, the one with a proxy that can watch, or not.
const PEER: &str = PEERS[0];
/// Modes whose connections are drawn beside these.
const DRAWN: &[&str] = &["userspace"];
const SIZES: &[usize] = &[1_000, 10_000, 30_000];
const DIE_ROUNDS: usize = 3;
/// Loading more takes kube-proxy's shape half a minute for each world.
const PEER_LIMIT: usize = 10_000;

pub fn measure() -> Result<Vec<Row>> {
    let path = build()?;
    let mut rows = program(&path)?;
    rows.extend(connect(&path)?);
    rows.extend(die(&path)?);
    Ok(rows)
}

fn build() -> Result<PathBuf> {
    shell::output(shell::cargo().args(["build", "--release", "-p", "proxy", "--example", "path"]))?;
    Ok(shell::target_dir()?.join("release/examples/path"))
}

/// What is programmed: a mode, Services, endpoints of each, single changes afterwards.
struct Load {
    mode: &'static str,
    services: usize,
    endpoints: usize,
    changes: usize,
    rounds: usize,
    wanted: &'static str,
}

fn program(path: &PathBuf) -> Result<Vec<Row>> {
    let peer = |mode| Load { mode, services: 10_000, endpoints: 5, changes: 6, rounds: 1, wanted: "" };
    let mut loads: Vec<Load> = PEERS.iter().copied().map(peer).collect();
    for mode in MODES {
        let load =
            |services, endpoints, wanted| Load { mode, services, endpoints, changes: 400, rounds: ROUNDS, wanted };
        loads.extend([
            load(100, 5, ""),
            load(10_000, 5, "under 300 ms"),
            load(100_000, 3, "under 4000 ms"),
            Load { rounds: 1, ..load(50_000, 5, "under 10000 ms") },
        ]);
    }
    let mut runs: Vec<Vec<Value>> = loads.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for (load, runs) in loads.iter().zip(&mut runs).filter(|(load, _)| round < load.rounds) {
            let mut command = Command::new(path);
            command.args(["program", "--mode", load.mode, "--services", &load.services.to_string()]);
            command.args(["--endpoints", &load.endpoints.to_string(), "--changes", &load.changes.to_string()]);
            runs.push(serde_json::from_str(&shell::output(&mut command)?).context("path did not print JSON")?);
        }
    }
    let middle = |index: usize, name: &str| -> Result<f64> {
        let figures: Option<Vec<f64>> = runs[index].iter().map(|run| run[name].as_f64()).collect();
        Ok(median(figures.with_context(|| format!("path printed no {name}"))?))
    };
    let mut rows = Vec::new();
    for (index, load) in loads.iter().enumerate() {
        let what = format!("{} {} x {}", load.mode, load.services, load.endpoints);
        let row = |part: &str, measured: String, wanted: &str| Row {
            what: format!("{what}: {part}"),
            measured,
            wanted: wanted.into(),
        };
        let cold = format!("{:.0} ms, CPU {:.0} ms", middle(index, "cold_ms")?, middle(index, "cold_cpu_ms")?);
        rows.push(row("cold start", cold, load.wanted));
        let times = format!("{:.2} / {:.2} ms", middle(index, "change_p50_ms")?, middle(index, "change_p99_ms")?);
        rows.push(row(
            "one endpoint, p50 / p99",
            times,
            if PEERS.contains(&load.mode) { "" } else { "p99 under 5 ms" },
        ));
        if load.mode == "kube-proxy-nftables" {
            // It is the bench itself that makes these rules.
            continue;
        }
        let is_limited = MODES.contains(&load.mode) && (load.services, load.endpoints) == (10_000, 5);
        let memory_wanted = if is_limited { "under 60 MB" } else { "" };
        rows.push(row("memory (PSS)", format!("{:.0} MB", middle(index, "pss_mb")?), memory_wanted));
    }
    for mode in MODES {
        let find = |services| loads.iter().position(|load| load.mode == *mode && load.services == services);
        let (Some(small), Some(large)) = (find(100), find(100_000)) else { continue };
        let growth = |figure| Ok::<f64, anyhow::Error>((middle(large, figure)? / middle(small, figure)?).log10() / 3.0);
        rows.push(Row {
            what: format!("{mode}: growth exponent of one endpoint's p50 / p99, 100 to 100,000"),
            measured: format!("{:.3} / {:.3}", growth("change_p50_ms")?, growth("change_p99_ms")?),
            wanted: "under 0.1".into(),
        });
    }
    Ok(rows)
}

/// One of three endpoints dies under 200 requests per second; and the same without our watch, as kube-proxy has it.
fn die(path: &PathBuf) -> Result<Vec<Row>> {
    const WAYS: [(&str, &str); 3] =
        [("cut", "its link is cut"), ("crash", "its process crashes"), ("stop", "its process is stopped")];
    let watched = MODES.iter().copied().chain([PEER]).map(|mode| (mode, "on", DIE_ROUNDS));
    let mut rows = Vec::new();
    for (mode, watch, rounds) in watched.chain([(PEER, "off", 1)]) {
        for (how, what) in WAYS {
            let mut worst = (0.0, String::new());
            for _ in 0..rounds {
                let mut command = Command::new(path);
                command.args(["die", "--mode", mode, "--how", how, "--watch", watch]);
                let run: Value =
                    serde_json::from_str(&shell::output(&mut command)?).context("path did not print JSON")?;
                let figure = |name: &str| run[name].as_f64().with_context(|| format!("path printed no {name}"));
                let (failed, late, all) = (figure("failed")?, figure("over_1200_ms")?, figure("requests")?);
                let share = 100.0 * (failed + late) / all;
                if share >= worst.0 {
                    worst = (share, format!("{failed} failed, {late} late of {all}: {share:.1} %"));
                }
            }
            let wanted = match (watch, how) {
                ("off", _) => "",
                (_, "stop") => "1 % and what its queue took",
                _ => "at most 1 %",
            };
            let beside = if watch == "off" { ", without the watch" } else { "" };
            rows.push(Row {
                what: format!("{mode}{beside}: one endpoint of three, {what}"),
                measured: worst.1,
                wanted: wanted.into(),
            });
        }
    }
    Ok(rows)
}

fn connect(path: &PathBuf) -> Result<Vec<Row>> {
    let join = |sizes: &[usize]| sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let modes: Vec<&str> = MODES.iter().chain(PEERS).chain(DRAWN).copied().collect();
    let mut command = Command::new(path);
    command.args(["connect", "--rounds", &ROUNDS.to_string(), "--services", &join(SIZES)]);
    command.args(["--modes", &modes.join(","), "--peer-limit", &PEER_LIMIT.to_string()]);
    let printed: Vec<Value> = serde_json::from_str(&shell::output(&mut command)?).context("path did not print JSON")?;
    draw(&printed, &modes)?;
    let floor = find(&printed, "one constant dnat rule")?;
    let direct = find(&printed, "direct")?;
    let with_nat = find(&printed, "direct, an empty nat chain and one ct rule")?;
    printed
        .iter()
        .map(|row| {
            let name = row["name"].as_str().context("path printed no name")?;
            // Ratios of each round by itself: a slow minute of the machine falls on all variants.
            let to = |other: &Value, figure: &str| ratio(row, other, figure);
            let (beside, base, wanted) = if name.starts_with("direct through") {
                (with_nat, "direct traffic beside an empty nat chain", "p50 at most 1.05")
            } else if name.starts_with("nftables") {
                (floor, "the constant rule", "p50 at most 1.15, rate at least 0.90")
            } else if name.starts_with("ebpf") {
                (direct, "direct", "p50 at most 1.05, rate at least 0.97")
            } else if PEERS.iter().any(|peer| name.starts_with(peer)) {
                (floor, "the constant rule", "")
            } else {
                (direct, "direct", "")
            };
            let p50 = median(figures(row, "p50_us")?);
            if figures(row, "per_second")?.is_empty() {
                return Ok(Row {
                    what: format!("{name}: connect p50 {p50:.1} us, to its relay; to direct"),
                    measured: format!("{:.2}", to(direct, "p50_us")?),
                    wanted: String::new(),
                });
            }
            Ok(Row {
                what: format!("{name}: connect p50 {p50:.1} us; to {base}"),
                measured: format!(
                    "{:.2}, rate {:.2}, CPU per connection {:.2}",
                    to(beside, "p50_us")?,
                    to(beside, "per_second")?,
                    to(beside, "cpu_us")?
                ),
                wanted: wanted.into(),
            })
        })
        .collect()
}

/// Puts the drawing of README into the target directory: who measures on the machine that README names copies it.
fn draw(printed: &[Value], modes: &[&str]) -> Result<()> {
    let mut series = Vec::new();
    for mode in modes {
        let mut points = Vec::new();
        for size in SIZES {
            let Ok(row) = find(printed, &format!("{mode} {size}")) else { continue };
            points.push((*size as f64, median(figures(row, "p50_us")?)));
        }
        let name = if *mode == PEER { format!("{mode} (kube-proxy's, too)") } else { (*mode).to_owned() };
        series.push(Series { name, points });
    }
    for floor in ["direct", "one constant dnat rule"] {
        let p50 = median(figures(find(printed, floor)?, "p50_us")?);
        series.push(Series { name: floor.into(), points: SIZES.iter().map(|size| (*size as f64, p50)).collect() });
    }
    let plot = Plot { title: "Connect through a Service, median", across: "Services", up: "microseconds", series };
    let path = shell::target_dir()?.join("connect-latency.svg");
    std::fs::write(&path, plot.svg()).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("bench: drawn in {}", path.display());
    Ok(())
}

fn find<'a>(printed: &'a [Value], name: &str) -> Result<&'a Value> {
    printed.iter().find(|row| row["name"] == name).with_context(|| format!("path printed no {name:?}"))
}

fn figures(row: &Value, name: &str) -> Result<Vec<f64>> {
    let all = row[name].as_array().with_context(|| format!("path printed no {name}"))?;
    all.iter().map(|figure| figure.as_f64().context("a figure is a number")).collect()
}

fn ratio(row: &Value, other: &Value, name: &str) -> Result<f64> {
    let (mine, theirs) = (figures(row, name)?, figures(other, name)?);
    Ok(median(mine.iter().zip(&theirs).map(|(mine, theirs)| mine / theirs).collect()))
}
