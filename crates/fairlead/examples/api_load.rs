//! Creates objects as fast as it is let, in an API server or in a plain etcd, and says how many: what `cargo xtask bench
//! writes` runs, in turn against both. Or creates Services and says how soon every node knows their names: what `cargo xtask
//! bench dns` runs.
//!
//! Both get the same bytes under names that are new. Every writer has a connection of its own and begins its next write
//! when the last one is acknowledged.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use http::Request;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;
use store::{EtcdOptions, EtcdStore, Store, Txn};
use tokio::task::JoinSet;

/// Prints one line of JSON: writes, seconds, per_second, p50_ms, p99_ms; of names the times from the answer to a create until
/// the last server has the name.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    target: Target,
}

#[derive(Subcommand)]
enum Target {
    /// ConfigMaps in the namespace `default`, over TLS.
    Api {
        #[arg(long, value_name = "FILE")]
        kubeconfig: PathBuf,
        #[command(flatten)]
        load: Load,
    },
    /// Services in the namespace `default`, one after the other.
    Names {
        #[arg(long, value_name = "FILE")]
        kubeconfig: PathBuf,
        /// In place of the kubeconfig's.
        #[arg(long, value_name = "URL")]
        server: http::Uri,
        /// Cluster DNS of each node.
        #[arg(long, value_name = "ADDRESS:PORT", required = true)]
        dns: Vec<SocketAddr>,
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        count: u16,
    },
    /// Transactions of one put.
    Etcd {
        #[arg(long, value_name = "URL")]
        endpoint: String,
        #[command(flatten)]
        load: Load,
    },
}

#[derive(Args, Clone, Copy)]
struct Load {
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    writers: u16,
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    seconds: u16,
    /// Bytes of one object as it is sent.
    #[arg(long, default_value_t = 4200)]
    size: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let (load, writers) = match Cli::parse().target {
        Target::Names { kubeconfig, server, dns, count } => return names(&kubeconfig, server, &dns, count).await,
        Target::Api { kubeconfig, load } => (load, api_writers(&kubeconfig, load.writers).await?),
        Target::Etcd { endpoint, load } => (load, etcd_writers(&endpoint, load.writers).await?),
    };
    let objects = Objects::of(load.size)?;
    let seconds = Duration::from_secs(load.seconds.into());
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for (number, writer) in writers.into_iter().enumerate() {
        running.spawn(write_until(begun + seconds, writer, number, objects.clone()));
    }
    let mut times = Vec::new();
    while let Some(ended) = running.join_next().await {
        times.extend(ended.context("a writer broke off")??);
    }
    let took = begun.elapsed().as_secs_f64();
    ensure!(!times.is_empty(), "not one write was begun in {seconds:?}: give it longer with --seconds");
    times.sort();
    let figures = json!({
        "writes": times.len(),
        "seconds": took,
        "per_second": times.len() as f64 / took,
        "p50_ms": percentile(&times, 50),
        "p99_ms": percentile(&times, 99),
    });
    println!("{figures}");
    Ok(())
}

/// One connection.
enum Writer {
    Api(kube::Client),
    Etcd(EtcdStore),
}

impl Writer {
    async fn write(&self, name: &str, object: Vec<u8>) -> Result<()> {
        match self {
            Self::Api(client) => {
                let request = Request::post("/api/v1/namespaces/default/configmaps");
                let request = request.header("content-type", "application/json").body(object)?;
                client.request_text(request).await.with_context(|| format!("create the ConfigMap {name}"))?;
            }
            Self::Etcd(etcd) => {
                let put = Txn::new().put(format!("configmaps/default/{name}"), object);
                etcd.commit(put).await.with_context(|| format!("put {name}"))?;
            }
        }
        Ok(())
    }
}

async fn config(kubeconfig: &Path) -> Result<kube::Config> {
    let file =
        Kubeconfig::read_from(kubeconfig).with_context(|| format!("no kubeconfig in {}", kubeconfig.display()))?;
    Ok(kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)
}

async fn names(kubeconfig: &Path, server: http::Uri, dns: &[SocketAddr], count: u16) -> Result<()> {
    let mut config = config(kubeconfig).await?;
    config.cluster_url = server;
    let client = kube::Client::try_from(config)?;
    let run = jiff::Timestamp::now().as_microsecond();
    let mut times = Vec::new();
    for number in 0..count {
        let name = format!("name-{run:x}-{number}");
        let object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"port": 80}]},
        });
        let request = Request::post("/api/v1/namespaces/default/services").header("content-type", "application/json");
        client
            .request_text(request.body(object.to_string().into_bytes())?)
            .await
            .with_context(|| format!("create {name}"))?;
        let (created, servers) = (Instant::now(), dns.to_vec());
        let question = question(&format!("{name}.default.svc.cluster.local"));
        let known = move || servers.iter().try_for_each(|server| knows(*server, &question, created));
        tokio::task::spawn_blocking(known).await??;
        times.push(created.elapsed());
    }
    times.sort();
    let figures = json!({
        "writes": times.len(), "p50_ms": percentile(&times, 50), "p99_ms": percentile(&times, 99),
    });
    println!("{figures}");
    Ok(())
}

/// A query for the A record of a name (RFC 1035 4.1).
fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// Asks until there is an address.
fn knows(server: SocketAddr, question: &[u8], since: Instant) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut answer = [0; 512];
    loop {
        socket.send(question)?;
        let length = socket.recv(&mut answer).with_context(|| format!("{server} does not answer"))?;
        let (code, answers) = (answer[3] & 0xf, u16::from_be_bytes([answer[6], answer[7]]));
        if length > 12 && code == 0 && answers > 0 {
            return Ok(());
        }
        ensure!(since.elapsed() < Duration::from_secs(5), "{server} does not know the name, code {code}");
    }
}

/// Clients that are connected: a handshake is no part of a write.
async fn api_writers(kubeconfig: &Path, count: u16) -> Result<Vec<Writer>> {
    let mut config = config(kubeconfig).await?;
    // A write that is refused for now is an answer to report, not one to try again under the same name.
    config.default_retry = false;
    let mut writers = Vec::new();
    for _ in 0..count {
        let client = kube::Client::try_from(config.clone())?;
        client.request_text(Request::get("/version").body(Vec::new())?).await.context("the API does not answer")?;
        writers.push(Writer::Api(client));
    }
    Ok(writers)
}

async fn etcd_writers(endpoint: &str, count: u16) -> Result<Vec<Writer>> {
    let mut writers = Vec::new();
    for _ in 0..count {
        let options = EtcdOptions::new([endpoint.to_owned()]);
        writers.push(Writer::Etcd(EtcdStore::connect(options).await?));
    }
    Ok(writers)
}

/// How long each write took. The last one ends after `end`.
async fn write_until(end: Instant, writer: Writer, number: usize, objects: Objects) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    while Instant::now() < end {
        let name = objects.name(number, times.len());
        let object = objects.render(&name);
        let begun = Instant::now();
        writer.write(&name, object).await?;
        times.push(begun.elapsed());
    }
    Ok(times)
}

/// ConfigMaps of one size, whose names no other run of this program uses.
#[derive(Clone)]
struct Objects {
    run: i64,
    padding: String,
}

impl Objects {
    fn of(size: usize) -> Result<Self> {
        let mut objects = Self { run: jiff::Timestamp::now().as_microsecond(), padding: String::new() };
        let smallest = objects.render(&objects.name(0, 0)).len();
        ensure!(size >= smallest, "no ConfigMap has {size} bytes: give --size {smallest} or more");
        objects.padding = "x".repeat(size - smallest);
        Ok(objects)
    }

    /// All names of a run are of one length, so that its objects are.
    fn name(&self, writer: usize, index: usize) -> String {
        format!("load-{:x}-{writer:05}-{index:08}", self.run)
    }

    fn render(&self, name: &str) -> Vec<u8> {
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": name, "namespace": "default" },
            "data": { "padding": self.padding },
        });
        object.to_string().into_bytes()
    }
}

/// In milliseconds; of times that are sorted and at least one.
fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    sorted[(sorted.len() - 1) * percent / 100].as_secs_f64() * 1000.0
}
