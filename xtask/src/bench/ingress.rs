//! The Ingress proxy beside nginx and haproxy: the same back end, certificate and headers, one thread each, in rounds that take
//! turns. Processor time is read from the kernel before and after, so that what client and back end cost is not in it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::dns::{cpu_seconds, pss_mb};
use super::{ROUNDS, Row, median};
use crate::{deps, shell};

const PACKAGES: [&str; 4] = ["nginx-light", "haproxy", "wrk", "nghttp2-client"];
const PATIENCE: Duration = Duration::from_secs(20);
const CLIENTS: &str = "32";
const SECONDS: &str = "2";
/// The 99th percentile is that of this part of what nginx carries in a second, for all the same.
const SHARE: f64 = 0.5;
const MANY_ROUTES: u32 = 10_000;
const MANY_CLIENTS: usize = 1_000;
const CHANGES: u32 = 51;

/// A proxy with its ports; ended when dropped.
struct Running {
    name: &'static str,
    child: Child,
    http: u16,
    https: u16,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its worker processes end with it on SIGTERM.
        Command::new("kill").arg(self.child.id().to_string()).status().ok();
        self.child.wait().ok();
    }
}

impl Running {
    fn url(&self, cell: Cell) -> String {
        let (scheme, port) = if cell.is_tls { ("https", self.https) } else { ("http", self.http) };
        format!("{scheme}://127.0.0.1:{port}{}", cell.path)
    }

    /// Of the process and its workers, those that carry requests.
    fn cpu(&self) -> Result<f64> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let mut sum = cpu_seconds(id)?;
        for pid in children.split_whitespace() {
            sum += cpu_seconds(pid.parse()?)?;
        }
        Ok(sum)
    }
}

/// Who asks, and over which connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    /// 32 connections that stay.
    Kept,
    /// The same, a connection each; over TLS it brings the ticket of the one before.
    Each,
    /// One connection after the other, each with a full handshake.
    Full,
    /// 8 connections with 4 requests at once.
    Http2,
}

/// What is asked, and by which client.
#[derive(Clone, Copy, Debug)]
struct Cell {
    name: &'static str,
    path: &'static str,
    is_tls: bool,
    client: Client,
    /// Against nginx's processor time for a request.
    wanted: f64,
}

const fn cell(name: &'static str, path: &'static str, is_tls: bool, client: Client, wanted: f64) -> Cell {
    Cell { name, path, is_tls, client, wanted }
}

const CELLS: [Cell; 9] = [
    cell("1 KB", "/1k", false, Client::Kept, 1.0),
    cell("1 KB, a connection each", "/1k", false, Client::Each, 1.25),
    cell("100 KB", "/100k", false, Client::Kept, 1.25),
    cell("1 KB over TLS", "/1k", true, Client::Kept, 1.25),
    cell("100 KB over TLS", "/100k", true, Client::Kept, 1.25),
    cell("TLS handshakes, full", "/1k", true, Client::Full, 1.0),
    cell("TLS handshakes, resumed", "/1k", true, Client::Each, 1.0),
    cell("1 KB over TLS and HTTP/2", "/1k", true, Client::Http2, 1.25),
    cell("100 KB over TLS and HTTP/2", "/100k", true, Client::Http2, 1.25),
];

/// What one round of a cell came to.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Microseconds of processor time for a request.
    cpu: f64,
    per_second: f64,
}

pub fn measure() -> Result<Vec<Row>> {
    deps::ensure(&PACKAGES)?;
    let dir = super::bench_dir()?.join("ingress");
    fs::create_dir_all(dir.join("www"))?;
    fs::write(dir.join("www/1k"), "x".repeat(1024))?;
    fs::write(dir.join("www/100k"), "x".repeat(100 * 1024))?;
    certificate(&dir)?;
    let back = free_port()?;
    let _back_end = nginx(&dir, "back", back, None)?;
    let mut rows = Vec::new();
    {
        let proxies =
            [ours(back, 1)?, nginx(&dir, "nginx", free_port()?, Some((back, free_port()?)))?, haproxy(&dir, back)?];
        for cell in CELLS {
            // haproxy and nginx have HTTP/2 as we have.
            rows.extend(compare(&proxies, cell)?);
        }
    }
    rows.extend(routes(back)?);
    fs::remove_dir_all(&dir)?;
    Ok(rows)
}

fn compare(proxies: &[Running], cell: Cell) -> Result<Vec<Row>> {
    let mut samples: Vec<Vec<Sample>> = proxies.iter().map(|_| Vec::new()).collect();
    for round in 0..=ROUNDS {
        for (proxy, samples) in proxies.iter().zip(&mut samples) {
            let sample = load(proxy, cell).with_context(|| format!("{}: {}", proxy.name, cell.name))?;
            // The first round is for caches and idle connections.
            if round > 0 {
                samples.push(sample);
            }
        }
    }
    let of = |samples: &[Sample], what: fn(&Sample) -> f64| median(samples.iter().map(what).collect());
    let middle: Vec<(f64, f64)> =
        samples.iter().map(|samples| (of(samples, |one| one.cpu), of(samples, |one| one.per_second))).collect();
    let (nginx, nginx_rate) = middle[1];
    let late = late(proxies, cell, nginx_rate * SHARE)?;
    let row = |(at, proxy): (usize, &Running)| {
        let (cpu, rate) = middle[at];
        let p99 = late.as_ref().map(|late| late[at]);
        let said = |p99: Option<f64>| p99.map(|p99| format!(", p99 {p99:.2} ms")).unwrap_or_default();
        let wanted = match proxy.name {
            "fairlead" => {
                let most = nginx * cell.wanted;
                let theirs = said(late.as_ref().map(|late| late[1]));
                format!("at most {most:.1} µs ({:.2} of nginx's; {:.2}){theirs}", cell.wanted, cpu / nginx)
            }
            _ => String::new(),
        };
        Row {
            what: format!("ingress, {}: {}", proxy.name, cell.name),
            measured: format!("{cpu:.1} µs, {rate:.0}/s{}", said(p99)),
            wanted,
        }
    };
    Ok(proxies.iter().enumerate().map(row).collect())
}

/// Milliseconds after which 99 % of the requests were answered, of each proxy, with so many requests in a second; for clients
/// that can keep to a rate.
fn late(proxies: &[Running], cell: Cell, per_second: f64) -> Result<Option<Vec<f64>>> {
    let (clients, manner): (usize, &[&str]) = match cell.client {
        Client::Kept => (32, &["--h1"]),
        Client::Http2 => (8, &["-m4"]),
        Client::Each | Client::Full => return Ok(None),
    };
    let log = super::bench_dir()?.join("ingress/requests");
    let mut times: Vec<Vec<f64>> = proxies.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for (proxy, times) in proxies.iter().zip(&mut times) {
            fs::remove_file(&log).ok();
            let mut command = Command::new("h2load");
            command.args(manner).args(["-t1", "-D", SECONDS, "-c", &clients.to_string()]);
            command.args(["--rps", &format!("{:.0}", per_second / clients as f64)]).arg("--log-file").arg(&log);
            shell::output(command.arg(proxy.url(cell)))?;
            times.push(
                p99(&fs::read_to_string(&log)?, per_second)
                    .with_context(|| format!("{}: {}", proxy.name, cell.name))?,
            );
        }
    }
    Ok(Some(times.into_iter().map(median).collect()))
}

/// Of h2load's log: a line has the time, the status and the microseconds of a request.
fn p99(log: &str, per_second: f64) -> Result<f64> {
    let mut times = Vec::new();
    for line in log.lines() {
        let mut fields = line.split('\t').skip(1);
        let (status, time) = (fields.next().context("a status")?, fields.next().context("a time")?);
        ensure!(status == "200", "{line}");
        times.push(time.parse::<u32>()?);
    }
    // What is asked less often than wanted says nothing of this load.
    ensure!(times.len() as f64 > per_second, "only {} of {per_second:.0} requests in a second", times.len());
    times.sort_unstable();
    Ok(f64::from(times[times.len() * 99 / 100]) / 1e3)
}

fn load(proxy: &Running, cell: Cell) -> Result<Sample> {
    let url = proxy.url(cell);
    let before = proxy.cpu()?;
    let begun = Instant::now();
    let done = match cell.client {
        Client::Kept => wrk(&url, true)?,
        Client::Each => wrk(&url, false)?,
        Client::Full => handshakes(proxy.https, cell.path)?,
        Client::Http2 => h2load(&url)?,
    };
    let took = begun.elapsed().as_secs_f64();
    ensure!(done > 100.0, "{done} requests were answered");
    Ok(Sample { cpu: (proxy.cpu()? - before) / done * 1e6, per_second: done / took })
}

/// Requests that were answered.
fn wrk(url: &str, is_kept: bool) -> Result<f64> {
    let mut command = Command::new("wrk");
    command.args(["-t1", "-c", CLIENTS, "-d", SECONDS]);
    if !is_kept {
        command.args(["-H", "Connection: close"]);
    }
    let text = shell::output(command.arg(url))?;
    ensure!(!text.contains("Non-2xx"), "{text}");
    let line = text.lines().find(|line| line.contains("requests in")).with_context(|| text.clone())?;
    Ok(line.split_whitespace().next().context("a number")?.parse()?)
}

/// Full handshakes of TLS 1.3 with a request each, one after the other.
fn handshakes(port: u16, path: &str) -> Result<f64> {
    let mut command = Command::new("openssl");
    command.args(["s_time", "-new", "-time", SECONDS, "-www", path, "-connect"]).arg(format!("127.0.0.1:{port}"));
    let text = shell::output(&mut command)?;
    // 1222 connections in 3 real seconds, 1238 bytes read per connection
    let line = text.lines().find(|line| line.contains("real seconds")).with_context(|| text.clone())?;
    Ok(line.split_whitespace().next().context("a number")?.parse()?)
}

fn h2load(url: &str) -> Result<f64> {
    let mut command = Command::new("h2load");
    let text = shell::output(command.args(["-t1", "-c", "8", "-m", "4", "-D", SECONDS, url]))?;
    // status codes: 1000 2xx, 0 3xx, 0 4xx, 0 5xx
    let line = text.lines().find_map(|line| line.strip_prefix("status codes: ")).with_context(|| text.clone())?;
    let (good, rest) = line.split_once(" 2xx").context("a count")?;
    ensure!(rest.trim_start_matches(',').split(',').all(|part| part.trim().starts_with("0 ")), "{line}");
    Ok(good.trim().parse()?)
}

/// One route and ten thousand, and what these and a thousand clients take of memory.
fn routes(back: u16) -> Result<Vec<Row>> {
    let (one, mut many) = (ours(back, 1)?, ours(back, MANY_ROUTES)?);
    let mut ratios = Vec::new();
    for round in 0..=ROUNDS {
        let (few, lots) = (load(&one, CELLS[0])?, load(&many, CELLS[0])?);
        if round > 0 {
            ratios.push(few.cpu / lots.cpu);
        }
    }
    let live = live(&mut many)?;
    let clients: Vec<TcpStream> = (0..MANY_CLIENTS)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", many.http))?;
            stream.write_all(b"GET /1k HTTP/1.1\r\nHost: bench\r\n\r\n")?;
            stream.read_exact(&mut [0; 1024])?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    let memory = pss_mb(many.child.id())?;
    drop(clients);
    Ok(vec![
        Row {
            what: format!("ingress: {MANY_ROUTES} routes, rate by CPU against one"),
            measured: format!("{:.2}", median(ratios)),
            wanted: "at least 0.97".to_owned(),
        },
        Row {
            what: format!("ingress: a new route beside {MANY_ROUTES}, live after"),
            measured: format!("{live:.1} ms"),
            wanted: "under 5 ms".to_owned(),
        },
        Row {
            what: format!("ingress: memory, {MANY_ROUTES} routes, {MANY_CLIENTS} clients"),
            measured: format!("{memory:.0} MB"),
            wanted: "under 40 MB".to_owned(),
        },
    ])
}

/// Milliseconds from the order of a route, in the compiler's process, to the first answer for its host; the median of many.
fn live(proxy: &mut Running) -> Result<f64> {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.http))?;
    // The kernel would keep a second small piece back until the first is acknowledged.
    stream.set_nodelay(true)?;
    let mut ask = |host: &str| -> Result<bool> {
        stream.write_all(format!("GET /1k HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())?;
        let mut reader = BufReader::new(&stream);
        let (mut status, mut length) = (String::new(), 0);
        reader.read_line(&mut status)?;
        for line in reader.by_ref().lines() {
            let line = line?.to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            if line.is_empty() {
                break;
            }
        }
        std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
        Ok(status.contains(" 302 "))
    };
    let mut took = Vec::new();
    for number in 0..CHANGES {
        let host = format!("new{number}.example");
        ensure!(!ask(&host)?, "{host} has its route before it was ordered");
        let begun = Instant::now();
        let order = proxy.child.stdin.as_mut().context("standard input is a pipe")?;
        order.write_all(format!("{host}\n").as_bytes())?;
        while !ask(&host)? {
            ensure!(begun.elapsed() < PATIENCE, "{host} has no route");
        }
        took.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(took))
}

fn ours(back: u16, routes: u32) -> Result<Running> {
    shell::output(shell::cargo().args(["build", "--release", "-p", "ingress", "--example", "carry"]))?;
    let mut command = Command::new(shell::target_dir()?.join("release/examples/carry"));
    command.args([format!("127.0.0.1:{back}"), routes.to_string(), "1".to_owned()]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run the example carry")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("standard output is a pipe")?).read_line(&mut line)?;
    let ports: Vec<u16> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [http, https] = ports[..] else { bail!("the example carry printed {line:?}") };
    Ok(Running { name: "fairlead", child, http, https })
}

fn certificate(dir: &Path) -> Result<()> {
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]);
    make.args(["-subj", "/CN=bench"]).arg("-out").arg(dir.join("crt")).arg("-keyout").arg(dir.join("key"));
    shell::output(&mut make)?;
    fs::write(dir.join("pem"), fs::read_to_string(dir.join("crt"))? + &fs::read_to_string(dir.join("key"))?)?;
    Ok(())
}

/// The back end, or a proxy to the port `to.0` with TLS at `to.1`.
fn nginx(dir: &Path, name: &'static str, port: u16, to: Option<(u16, u16)>) -> Result<Running> {
    let home = dir.display();
    let server = match to {
        None => format!("server {{ listen 127.0.0.1:{port} reuseport; root {home}/www; }}"),
        Some((back, https)) => format!(
            "upstream u {{ server 127.0.0.1:{back}; keepalive 128; keepalive_requests 100000000; }}\n\
             server {{ listen 127.0.0.1:{port} reuseport; listen 127.0.0.1:{https} reuseport ssl http2;\n\
             ssl_certificate {home}/crt; ssl_certificate_key {home}/key; ssl_session_cache off;\n             ssl_protocols TLSv1.2 TLSv1.3;\n\
             location / {{ proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host;\n\
             proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Real-IP $remote_addr; proxy_set_header X-Forwarded-Host $host;\n\
             proxy_set_header X-Forwarded-Port $server_port; proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Request-ID $request_id; }} }}"
        ),
    };
    let config = format!(
        "worker_processes 1; daemon off; pid {home}/{name}.pid; error_log /dev/null;\nevents {{ worker_connections 8192; }}\n\
         http {{ access_log off; sendfile on; keepalive_requests 100000000; keepalive_timeout 600;\n\
         client_body_temp_path {home}/{name}-body; proxy_temp_path {home}/{name}-proxy; fastcgi_temp_path {home}/{name}-f; \
         uwsgi_temp_path {home}/{name}-u; scgi_temp_path {home}/{name}-s;\n{server} }}\n"
    );
    let file: PathBuf = dir.join(format!("{name}.conf"));
    fs::write(&file, config)?;
    let mut command = Command::new("nginx");
    start(name, command.arg("-c").arg(&file), port, to.map_or(0, |(_, https)| https))
}

fn haproxy(dir: &Path, back: u16) -> Result<Running> {
    let (port, https, home) = (free_port()?, free_port()?, dir.display());
    let config = format!(
        "global\n  nbthread 1\n  maxconn 8192\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n  http-reuse always\n\
         frontend f\n  bind 127.0.0.1:{port}\n  bind 127.0.0.1:{https} ssl crt {home}/pem alpn h2,http/1.1\n\
         \x20 http-request set-header X-Forwarded-For %[src]\n  http-request set-header X-Real-IP %[src]\n\
         \x20 http-request set-header X-Forwarded-Host %[req.hdr(host)]\n  http-request set-header X-Forwarded-Port %[dst_port]\n\
         \x20 http-request set-header X-Forwarded-Proto http\n  http-request set-header X-Request-ID %[rand]\n\
         \x20 default_backend b\nbackend b\n  server s 127.0.0.1:{back} pool-max-conn 128\n"
    );
    let file = dir.join("haproxy.conf");
    fs::write(&file, config)?;
    let mut command = Command::new("haproxy");
    start("haproxy", command.arg("-db").arg("-f").arg(&file), port, https)
}

fn start(name: &'static str, command: &mut Command, http: u16, https: u16) -> Result<Running> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let running = Running { name, child: command.spawn().with_context(|| format!("run {name}"))?, http, https };
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", http)).is_err() {
        ensure!(Instant::now() < until, "{name} does not listen on port {http}");
        // Nothing tells when a foreign program listens.
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(running)
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
