//! How long it takes until the kernel holds what the table says, and one change of it.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use linux::netns::Netns;
use serde_json::json;
use services::{Changes, ServiceTable};

use crate::cgroup::Attached;
use crate::world::{Running, cluster_ip, nowhere, prepare, service, slice};
use crate::{Draw, Failure, Lab, Rules, peer};

const PORT: u16 = 8080;

/// Prints times in milliseconds, CPU time of this process, and its memory.
pub fn program(lab: &Lab, rules: Rules, services: usize, endpoints: usize, changes: usize) -> Result<String, Failure> {
    let node = lab.namespace("node")?;
    let mut held = match rules {
        Rules::Ours(mode) => {
            let mut table = ServiceTable::new();
            for number in 0..services {
                table.upsert_service(&service(number))?;
                table.upsert_slice(&slice(number, PORT, nowhere(number, endpoints)))?;
            }
            let attached = (mode == proxy::Mode::Ebpf).then(Attached::new);
            prepare(&node, mode)?;
            let running = Running::start(mode, &node, table, attached.as_ref().map(Attached::hooks))?;
            Held::Ours { running: Box::new(running), _attached: attached }
        }
        Rules::KubeProxyNftables => Held::Peer(node),
    };
    // Everything known: from here to the kernel holding it.
    let before = cpu_ms()?;
    let cold = held.load(services, endpoints)?;
    let cold_cpu = cpu_ms()? - before;
    let memory = pss()?;
    let mut times = Vec::new();
    let mut draw = Draw::new(services as u64);
    for turn in 0..changes.div_ceil(2) {
        let number = draw.below(services);
        let more = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 247, 0, 0)) + turn as u32);
        let few: Vec<Ipv4Addr> = nowhere(number, endpoints).collect();
        let many: Vec<Ipv4Addr> = few.iter().copied().chain([more]).collect();
        times.push(held.change(number, &few, &many)?);
        times.push(held.change(number, &many, &few)?);
    }
    times.sort();
    let at =
        |part: f64| times.get(((times.len().max(1) - 1) as f64 * part) as usize).map_or(0.0, Duration::as_secs_f64);
    Ok(json!({
        "mode": rules.to_string(), "services": services, "endpoints": endpoints,
        "cold_ms": cold.as_secs_f64() * 1000.0, "cold_cpu_ms": cold_cpu, "changes": times.len(),
        "change_p50_ms": at(0.5) * 1000.0, "change_p99_ms": at(0.99) * 1000.0, "pss_mb": memory,
    })
    .to_string())
}

/// Who puts rules into the kernel.
enum Held {
    Ours { running: Box<Running>, _attached: Option<Attached> },
    Peer(Netns),
}

impl Held {
    fn load(&mut self, services: usize, endpoints: usize) -> Result<Duration, Failure> {
        match self {
            Held::Ours { running, .. } => running.change(ServiceTable::set_synced),
            Held::Peer(node) => {
                let started = Instant::now();
                let all: Vec<_> =
                    (0..services).map(|number| peers(number, nowhere(number, endpoints).collect())).collect();
                peer::load(node, &all)?;
                Ok(started.elapsed())
            }
        }
    }

    fn change(&mut self, number: usize, before: &[Ipv4Addr], after: &[Ipv4Addr]) -> Result<Duration, Failure> {
        match self {
            Held::Ours { running, .. } => {
                let object = slice(number, PORT, after.iter().copied());
                let mut failure = None;
                let took = running.change(|table| {
                    table.upsert_slice(&object).unwrap_or_else(|error| {
                        failure = Some(error);
                        Changes::default()
                    })
                })?;
                failure.map_or(Ok(took), |error| Err(error.into()))
            }
            Held::Peer(node) => {
                let started = Instant::now();
                peer::change(node, &peers(number, before.to_vec()), &peers(number, after.to_vec()))?;
                Ok(started.elapsed())
            }
        }
    }
}

fn peers(number: usize, endpoints: Vec<Ipv4Addr>) -> peer::Service {
    peer::Service { number, address: cluster_ip(number), port: PORT, endpoints }
}

/// What this process and the tools that it ran have used of the processors, in steps of 10 ms, user and system together.
pub fn cpu_ms() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime, stime, cutime, cstime
    let ticks = (11..15).map(|at| fields.get(at).and_then(|field| field.parse::<f64>().ok()));
    Ok(ticks.sum::<Option<f64>>().ok_or("no times in /proc/self/stat")? * 10.0)
}

/// Megabytes of this process, shared pages divided among their users.
fn pss() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no Pss")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes / 1024.0)
}
