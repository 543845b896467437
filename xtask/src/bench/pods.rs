//! A pod of a cached image, from the moment a watcher sees it created to the moment it sees it Running.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{ROUNDS, Row, import, median, milliseconds, with_cluster};
use crate::cluster::Cluster;
use crate::shell;

/// Runs before the rounds, so that the image is unpacked; and its line in a watcher's first list says that the watch is on.
const FIRST: &str = "bench-first";

pub fn measure() -> Result<Vec<Row>> {
    let times = with_cluster(1, |cluster| {
        import(cluster, "busybox:test1")?;
        shell::output(&mut run_command(cluster, FIRST))?;
        let ready = ["wait", "--for=condition=Ready", "--timeout=60s", "pod", FIRST];
        shell::output(&mut cluster.kubectl(&ready))?;
        (0..ROUNDS).map(|round| once(cluster, &format!("bench-{round}"))).collect()
    })?;
    let what = "pod created -> Running, image cached".to_owned();
    Ok(vec![Row { what, measured: milliseconds(median(times)), wanted: "under 300 ms".to_owned() }])
}

fn once(cluster: &Cluster, name: &str) -> Result<Duration> {
    let line = "jsonpath={.metadata.name} {.status.phase}{\"\\n\"}";
    let mut watch = cluster.kubectl(&["get", "pods", "--watch", "-o", line]);
    let mut watcher = watch.stdout(Stdio::piped()).spawn().context("cannot start the watcher")?;
    let result = created_to_running(cluster, name, &mut watcher);
    // The watcher is ours and would watch forever.
    watcher.kill().context("cannot end the watcher")?;
    watcher.wait()?;
    shell::output(&mut cluster.kubectl(&["delete", "pod", name, "--now"]))?;
    result
}

fn created_to_running(cluster: &Cluster, name: &str, watcher: &mut Child) -> Result<Duration> {
    let output = watcher.stdout.take().context("the watcher has no output")?;
    let mut events = BufReader::new(output).lines();
    next(&mut events, |event| event.starts_with(FIRST))?;
    let mut run = run_command(cluster, name);
    let mut creator = run.stdout(Stdio::null()).spawn().context("cannot create the pod")?;
    let seen = next(&mut events, |event| event.starts_with(name)).and_then(|first| {
        let created = Instant::now();
        let is_running = |event: &str| event.starts_with(name) && event.ends_with(" Running");
        if !is_running(&first) {
            next(&mut events, is_running)?;
        }
        Ok(created.elapsed())
    });
    if !creator.wait()?.success() {
        bail!("{name} was not created");
    }
    seen
}

fn run_command(cluster: &Cluster, name: &str) -> Command {
    cluster.kubectl(&["run", name, "--image=busybox:test1", "--restart=Never", "--", "sleep", "600"])
}

fn next(events: &mut Lines<BufReader<ChildStdout>>, wanted: impl Fn(&str) -> bool) -> Result<String> {
    for event in events {
        let event = event?;
        if wanted(&event) {
            return Ok(event);
        }
    }
    bail!("the watcher ended before it saw what it was to see")
}
