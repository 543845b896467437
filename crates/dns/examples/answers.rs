//! Cluster DNS over a table of many Services, for measurements: prints where it answers, and ends with its standard input.
//!
//! `answers SERVICES` serves `svc-1.default.svc.cluster.local` and so on, each with an address and an endpoint, and one
//! named port.

use std::error::Error;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use dns::{DnsConfig, Feed, Listen, Server, Upstreams};
use services::{Changes, ServiceTable};
use tokio::net::UdpSocket;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

fn service(number: u32) -> String {
    let ip = Ipv4Addr::from(0x0a60_0000 + number);
    format!(
        r#"{{"metadata":{{"name":"svc-{number}","namespace":"default"}},"spec":{{"type":"ClusterIP","clusterIP":"{ip}","clusterIPs":["{ip}"],"ports":[{{"name":"http","protocol":"TCP","port":80}}]}}}}"#
    )
}

fn slice(number: u32) -> String {
    let ip = Ipv4Addr::from(0x0af4_0000 + number);
    format!(
        r#"{{"metadata":{{"name":"svc-{number}-1","namespace":"default","labels":{{"kubernetes.io/service-name":"svc-{number}"}}}},"addressType":"IPv4","ports":[{{"name":"http","protocol":"TCP","port":8080}}],"endpoints":[{{"addresses":["{ip}"],"conditions":{{"ready":true}}}}]}}"#
    )
}

/// Milliseconds from a change of the table to the first answer that shows it.
async fn reaction(
    table: &RwLock<ServiceTable>,
    sender: &broadcast::Sender<Arc<Changes>>,
    server: SocketAddr,
    number: u32,
) -> Result<f64, Box<dyn Error>> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    socket.connect(server).await?;
    let mut question = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in [&format!("svc-{number}"), "default", "svc", "cluster", "local"] {
        question.push(u8::try_from(label.len())?);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, 1, 0, 1]);
    let begun = Instant::now();
    let changes = table.write().map_err(|_| "poisoned")?.upsert_service(service(number).as_bytes())?;
    sender.send(Arc::new(changes))?;
    let mut buffer = [0; 512];
    for _ in 0..100_000 {
        socket.send(&question).await?;
        socket.recv(&mut buffer).await?;
        if buffer[7] > 0 {
            return Ok(begun.elapsed().as_secs_f64() * 1000.0);
        }
    }
    Err("the new name was never answered".into())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let count: u32 = std::env::args().nth(1).ok_or("how many Services?")?.parse()?;
    let mut table = ServiceTable::new().without_frontends();
    for number in 1..=count {
        table.upsert_service(service(number).as_bytes())?;
        table.upsert_slice(slice(number).as_bytes())?;
    }
    table.set_synced();
    let table = Arc::new(RwLock::new(table));
    let (sender, changes) = broadcast::channel(64);
    let mut config = DnsConfig::new(vec![Listen::Address((Ipv4Addr::LOCALHOST, 0).into())]);
    config.upstreams = Upstreams::Servers(Vec::new());
    let server = Server::bind(config, Feed { table: table.clone(), changes }).await?;
    let address = server.addresses()[0];
    let token = CancellationToken::new();
    let task = tokio::spawn(server.run(token.clone()));
    let mut reactions = Vec::new();
    for number in 1..=200 {
        reactions.push(reaction(&table, &sender, address, count + number).await?);
    }
    reactions.sort_by(f64::total_cmp);
    println!("{} {:.3} {:.3}", address.port(), reactions[100], reactions[198]);
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    token.cancel();
    task.await?;
    Ok(())
}
