//! Cluster DNS beside knot and bind9: the same 10,000 names, asked by dnsperf over loopback, in rounds that take turns.
//!
//! Each server has one thread for its answers. Processor time is read from the kernel before and after, so that what the
//! client costs is not in it.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::memory::kilobytes;
use super::{ROUNDS, Row, median, with_cluster, writes};
use crate::{deps, shell};

const SERVICES: u32 = 10_000;
const PEERS: [&str; 3] = ["knot", "bind9", "dnsperf"];
const NODES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(20);
/// Questions a second at which latency is measured: well below what any of them can do.
const CALM: u32 = 5_000;

/// A server that answers; ended when dropped.
struct Running {
    name: &'static str,
    child: Child,
    port: u16,
    figures: Vec<f64>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Whatever happened to it, it is not to outlive the bench.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[derive(Default)]
struct Samples {
    rate: Vec<f64>,
    cpu: Vec<f64>,
    p99: Vec<f64>,
    memory: Vec<f64>,
}

pub fn measure() -> Result<Vec<Row>> {
    deps::ensure(&PEERS)?;
    let dir = super::bench_dir()?.join("dns");
    fs::create_dir_all(&dir)?;
    let (zone, questions) = write_inputs(&dir)?;
    let mut servers = vec![ours()?, knot(&dir, &zone)?, bind(&dir, &zone)?];
    let mut samples: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
    for server in &servers {
        // Pages and caches warm, and every name answered once.
        dnsperf(server.port, &questions, &["-n", "1"])?;
    }
    for _ in 0..ROUNDS {
        for (server, samples) in servers.iter().zip(&mut samples) {
            let before = cpu_seconds(server.child.id())?;
            let (answered, rate) = dnsperf(server.port, &questions, &["-l", "4", "-q", "200"])?;
            samples.rate.push(rate);
            samples.cpu.push((cpu_seconds(server.child.id())? - before) / answered * 1e6);
            samples.p99.push(latency(server.port, &questions)?);
            samples.memory.push(pss_mb(server.child.id())?);
        }
    }
    let reactions = std::mem::take(&mut servers[0].figures);
    drop(servers);
    fs::remove_dir_all(&dir)?;
    let mut rows = rows(samples, &reactions)?;
    rows.push(created()?);
    Ok(rows)
}

/// From the answer to the create of a Service until the DNS of every node has its name.
fn created() -> Result<Row> {
    let program = writes::build()?;
    let text = with_cluster(NODES, |cluster| {
        let mut words = vec![program.display().to_string(), "names".to_owned()];
        words.extend(["--kubeconfig".to_owned(), cluster.kubeconfig().display().to_string()]);
        words.extend(["--server", "https://192.168.49.1:6443", "--count", "500"].map(str::to_owned));
        words.extend((0..NODES).flat_map(|node| ["--dns".to_owned(), format!("192.168.49.{}:10053", node + 2)]));
        shell::output(&mut cluster.on("node-1", &words))
    })?;
    let printed: serde_json::Value = serde_json::from_str(&text).context("api_load did not print JSON")?;
    let figure = |name: &str| printed[name].as_f64().with_context(|| format!("api_load printed no {name}: {text}"));
    Ok(Row {
        what: format!("dns: a Service that was created is answered by {NODES} nodes, p50 / p99"),
        measured: format!("{:.2} / {:.2} ms", figure("p50_ms")?, figure("p99_ms")?),
        wanted: "under 10 ms".into(),
    })
}

fn rows(samples: Vec<Samples>, reactions: &[f64]) -> Result<Vec<Row>> {
    let names = ["fairlead", "knot", "bind9"];
    let middle: Vec<[f64; 4]> = samples
        .into_iter()
        .map(|one| [median(one.rate), median(one.cpu), median(one.p99), median(one.memory)])
        .collect();
    let mut rows = Vec::new();
    for (name, [rate, cpu, p99, memory]) in names.iter().zip(&middle) {
        let ours = *name == "fairlead";
        let wanted = |text: String| if ours { text } else { String::new() };
        let mut row = |what: &str, measured: String, wanted: String| {
            rows.push(Row { what: format!("dns, {name}: {what}"), measured, wanted });
        };
        row("answers a second", format!("{rate:.0}"), wanted(format!("at least {:.0}, knot's", middle[1][0])));
        row("CPU of an answer", format!("{cpu:.2} µs"), wanted(format!("at most {:.2}, knot's", middle[1][1])));
        row(
            &format!("p99 at {CALM}/s"),
            format!("{:.0} µs", p99 * 1e6),
            wanted(format!("at most {:.0}, bind9's", middle[2][2] * 1e6)),
        );
        row("memory (PSS)", format!("{memory:.0} MB"), wanted("under 40 MB".to_owned()));
    }
    let [p50, p99] = reactions else { bail!("the example printed no reactions") };
    rows.push(Row {
        what: "dns: a change of the table is answered, p50 / p99".into(),
        measured: format!("{p50:.2} / {p99:.2} ms"),
        wanted: "under 10 ms".into(),
    });
    Ok(rows)
}

/// The zone as a peer reads it, and the questions.
fn write_inputs(dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let mut zone =
        "$ORIGIN cluster.local.\n@ 5 SOA ns.dns hostmaster 1 7200 1800 86400 5\n@ 5 NS ns.dns\nns.dns 5 A 10.96.0.10\n"
            .to_owned();
    let mut questions = String::new();
    for number in 1..=SERVICES {
        writeln!(zone, "svc-{number}.default.svc 5 A {}", Ipv4Addr::from(0x0a60_0000 + number))?;
        // Names in an order that no cache of the processor likes.
        let mixed = u64::from(number) * 7919 % u64::from(SERVICES) + 1;
        writeln!(questions, "svc-{mixed}.default.svc.cluster.local A")?;
    }
    let (zone_path, questions_path) = (dir.join("zone"), dir.join("questions"));
    fs::write(&zone_path, zone)?;
    fs::write(&questions_path, questions)?;
    Ok((zone_path, questions_path))
}

fn ours() -> Result<Running> {
    shell::output(shell::cargo().args(["build", "--release", "-p", "dns", "--example", "answers"]))?;
    let mut command = Command::new(shell::target_dir()?.join("release/examples/answers"));
    command.arg(SERVICES.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("run the example answers")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("standard output is a pipe")?).read_line(&mut line)?;
    let figures: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [port, p50, p99] = figures[..] else { bail!("the example answers printed {line:?}") };
    Ok(Running { name: "fairlead", child, port: port as u16, figures: vec![p50, p99] })
}

fn knot(dir: &Path, zone: &Path) -> Result<Running> {
    let (port, home) = (free_port()?, dir.display());
    let config = format!(
        "server:\n  rundir: {home}\n  listen: 127.0.0.1@{port}\n  udp-workers: 1\n  tcp-workers: 1\n  background-workers: 1\n\
         database:\n  storage: {home}\n\
         zone:\n  - domain: cluster.local\n    file: {}\n    zonefile-load: whole\n    journal-content: none\n",
        zone.display()
    );
    fs::write(dir.join("knot.conf"), config)?;
    let mut command = Command::new("knotd");
    start("knot", command.arg("-c").arg(dir.join("knot.conf")), port)
}

fn bind(dir: &Path, zone: &Path) -> Result<Running> {
    let (port, home) = (free_port()?, dir.display());
    let config = format!(
        "options {{ directory \"{home}\"; pid-file none; session-keyfile none; listen-on port {port} {{ 127.0.0.1; }}; \
         listen-on-v6 {{ none; }}; recursion no; dnssec-validation no; minimal-responses yes; }};\n\
         controls {{ }};\nzone \"cluster.local\" {{ type primary; file \"{}\"; }};\n",
        zone.display()
    );
    fs::write(dir.join("named.conf"), config)?;
    let mut command = Command::new("named");
    command.args(["-f", "-n", "1", "-U", "1", "-c"]).arg(dir.join("named.conf"));
    start("bind9", &mut command, port)
}

fn start(name: &'static str, command: &mut Command, port: u16) -> Result<Running> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().with_context(|| format!("run {name}"))?;
    let running = Running { name, child, port, figures: Vec::new() };
    let until = Instant::now() + PATIENCE;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut question = vec![0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["svc-1", "default", "svc", "cluster", "local"] {
        question.push(u8::try_from(label.len())?);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, 1, 0, 1]);
    let mut buffer = [0; 512];
    while Instant::now() < until {
        // A port that nobody listens on yet refuses, or is silent: both are asked again.
        let asked = Instant::now();
        if socket.send(&question).and_then(|_| socket.recv(&mut buffer)).is_ok() && buffer[7] > 0 {
            return Ok(running);
        }
        std::thread::park_timeout(Duration::from_millis(50).saturating_sub(asked.elapsed()));
    }
    bail!("{} does not answer on port {port}", running.name)
}

fn free_port() -> Result<u16> {
    Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Questions answered, and how many a second.
fn dnsperf(port: u16, questions: &Path, flags: &[&str]) -> Result<(f64, f64)> {
    let text = run_dnsperf(port, questions, flags)?;
    let figure = |name: &str| -> Result<f64> {
        let line =
            text.lines().find(|line| line.trim().starts_with(name)).with_context(|| format!("no {name}: {text}"))?;
        let word = line.split(':').nth(1).and_then(|rest| rest.split_whitespace().next());
        word.context("a figure")?.parse().context("a figure")
    };
    let (sent, completed) = (figure("Queries sent")?, figure("Queries completed")?);
    ensure!(completed >= sent * 0.99, "{completed} of {sent} questions were answered");
    Ok((completed, figure("Queries per second")?))
}

fn run_dnsperf(port: u16, questions: &Path, flags: &[&str]) -> Result<String> {
    let mut command = Command::new("dnsperf");
    command.args(["-s", "127.0.0.1", "-p", &port.to_string(), "-d"]).arg(questions).args(["-c", "8", "-T", "1"]);
    shell::output(command.args(flags))
}

/// Seconds below which 99 of 100 answers came, at a calm rate.
fn latency(port: u16, questions: &Path) -> Result<f64> {
    let text = run_dnsperf(port, questions, &["-v", "-l", "2", "-Q", &CALM.to_string()])?;
    // > NOERROR svc-1.default.svc.cluster.local A 0.000123
    let mut seconds: Vec<f64> = text
        .lines()
        .filter(|line| line.starts_with("> "))
        .filter_map(|line| line.split_whitespace().last()?.parse().ok())
        .collect();
    ensure!(seconds.len() > 1000, "dnsperf told of {} answers", seconds.len());
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() * 99 / 100])
}

/// User and system time of a process, all threads.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may hold blanks: field 14 and 15 of all.
    let (_, rest) = text.rsplit_once(')').context("a process has a name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}

pub fn pss_mb(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(kilobytes(&text, &["Pss:"]) as f64 / 1024.0)
}
