//! Durable creates over TLS beside etcd's own puts of the same bytes, by 1, 16 and 64 writers.
//!
//! Every round has a cluster and an etcd of its own, on one disk: both keep what they are given, and the last round must
//! not pay for what the first ones left.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{ROUNDS, Row, median, with_cluster};
use crate::shell;

/// How many write at once, and what a create may cost beside a put.
const VARIANTS: &[(usize, &str)] = &[(1, "at least 0.75"), (16, "at least 0.75"), (64, "at least 1")];
const SECONDS: &str = "3";
const SIZE: &str = "4200";
const ETCD: &str = "/usr/bin/etcd";

pub fn measure() -> Result<Vec<Row>> {
    let program = build()?;
    let mut rounds: Vec<Vec<Turn>> = VARIANTS.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        with_cluster(1, |cluster| {
            let etcd = Etcd::start(&shell::target_dir()?.join("bench-etcd"))?;
            let kubeconfig = cluster.kubeconfig();
            for ((writers, _), turns) in VARIANTS.iter().zip(&mut rounds) {
                let creates = load(Command::new(&program).args(["api", "--kubeconfig"]).arg(&kubeconfig), *writers)?;
                let puts = load(Command::new(&program).args(["etcd", "--endpoint", &etcd.url]), *writers)?;
                turns.push(Turn { creates, puts });
            }
            Ok(())
        })?;
    }
    Ok(VARIANTS.iter().zip(&rounds).flat_map(|((writers, wanted), turns)| rows(*writers, wanted, turns)).collect())
}

/// Both sides of one round, one right after the other.
struct Turn {
    creates: Figures,
    puts: Figures,
}

/// What the program printed.
struct Figures {
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
}

fn rows(writers: usize, wanted: &str, turns: &[Turn]) -> [Row; 3] {
    let side = |name: &str, figures: fn(&Turn) -> &Figures| {
        let middle = |figure: fn(&Figures) -> f64| median(turns.iter().map(|turn| figure(figures(turn))).collect());
        let (p50, p99) = (middle(|f| f.p50_ms), middle(|f| f.p99_ms));
        Row {
            what: format!("{writers} writers: {name}, p50 {p50:.1} p99 {p99:.1} ms"),
            measured: format!("{:.0}/s", middle(|f| f.per_second)),
            wanted: String::new(),
        }
    };
    // Of each round by itself: a slow minute of the disk falls on both sides of it.
    let ratio = median(turns.iter().map(|turn| turn.creates.per_second / turn.puts.per_second).collect());
    let ratio = Row {
        what: format!("{writers} writers: creates to etcd's puts"),
        measured: format!("{ratio:.2}"),
        wanted: wanted.to_owned(),
    };
    [side("creates", |turn| &turn.creates), side("etcd's puts", |turn| &turn.puts), ratio]
}

/// The program that writes.
pub fn build() -> Result<PathBuf> {
    shell::output(shell::cargo().args(["build", "--release", "-p", "fairlead", "--example", "api_load"]))?;
    Ok(shell::target_dir()?.join("release/examples/api_load"))
}

fn load(command: &mut Command, writers: usize) -> Result<Figures> {
    command.args(["--writers", &writers.to_string(), "--seconds", SECONDS, "--size", SIZE]);
    let text = shell::output(command)?;
    let printed: Value = serde_json::from_str(&text).context("api_load did not print JSON")?;
    let figure = |name: &str| printed[name].as_f64().with_context(|| format!("api_load printed no {name}: {text}"));
    Ok(Figures { per_second: figure("per_second")?, p50_ms: figure("p50_ms")?, p99_ms: figure("p99_ms")? })
}

/// An etcd of one member in a directory of its own; both go when it is dropped.
struct Etcd {
    process: Child,
    url: String,
    dir: PathBuf,
}

impl Etcd {
    fn start(dir: &Path) -> Result<Etcd> {
        if !Path::new(ETCD).is_file() {
            bail!("{ETCD} is not there: run `make deps`");
        }
        // A free port may be taken by another before etcd gets it; then others are tried.
        for _ in 0..5 {
            if dir.exists() {
                fs::remove_dir_all(dir).context("cannot empty the directory of etcd")?;
            }
            let (client, peer) = free_ports()?;
            let url = format!("http://127.0.0.1:{client}");
            // From here on it ends with us, whatever comes.
            let mut etcd = Etcd { process: spawn(dir, &url, peer)?, url, dir: dir.to_path_buf() };
            if etcd.serves()? {
                return Ok(etcd);
            }
        }
        bail!("etcd did not start in five attempts: run {ETCD} by hand and read what it says")
    }

    /// Waits until etcd says that it serves; false if it ends before.
    fn serves(&mut self) -> Result<bool> {
        let log = self.process.stderr.take().context("etcd's log is not piped")?;
        let (serves, told) = mpsc::channel();
        // Reads to the end, or etcd would stop when the pipe is full.
        thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                if line.contains("ready to serve client requests") {
                    // Nobody listens after the first such line.
                    serves.send(()).ok();
                }
            }
        });
        Ok(told.recv_timeout(Duration::from_secs(30)).is_ok())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended by itself, and the next start empties the directory anyway.
        self.process.kill().ok();
        self.process.wait().ok();
        fs::remove_dir_all(&self.dir).ok();
    }
}

fn spawn(dir: &Path, url: &str, peer: u16) -> Result<Child> {
    let peer = format!("http://127.0.0.1:{peer}");
    // A bench that is killed cannot end its etcd: the kernel does.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", ETCD]);
    command.arg("--data-dir").arg(dir);
    command.args(["--listen-client-urls", url, "--advertise-client-urls", url]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.arg(format!("--initial-cluster=default={peer}"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().with_context(|| format!("cannot run {}", shell::words(&command)))
}

fn free_ports() -> Result<(u16, u16)> {
    // Both are held until both are known, or they might be the same.
    let listen = || TcpListener::bind(("127.0.0.1", 0)).context("the loopback has no free port");
    let (one, other) = (listen()?, listen()?);
    Ok((one.local_addr()?.port(), other.local_addr()?.port()))
}
