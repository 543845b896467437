//! From outside to an address of the Service's own; then the node that announces it dies.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::story::{internal_ipv4, text};
use super::traffic;
use crate::cluster::Cluster;
use crate::shell;

const SERVICE: &str = "nginx-balanced";
/// The address must be back by then.
const PATIENCE: Duration = Duration::from_secs(20);

/// Requests to the address from outside; the address.
pub fn ask(cluster: &Cluster, pods: &BTreeSet<String>) -> Result<String> {
    let file = shell::root().join("examples/more/load-balancer.yaml");
    shell::step(&mut cluster.kubectl(&["apply", "-f", &file.to_string_lossy()]))?;
    let mut address = None;
    shell::until("the Service has an address", || {
        let service = cluster.get(&["service", SERVICE])?;
        address = service.pointer("/status/loadBalancer/ingress/0/ip").and_then(|ip| ip.as_str()).map(str::to_owned);
        Ok(address.is_some())
    })?;
    let address = address.context("the Service has no address")?;
    shell::until("the address answers", || request(cluster, &address))?;
    shell::step(&mut cluster.kubectl(&["get", "service", SERVICE]))?;
    let url = format!("http://{address}");
    traffic::count(&format!("outside -> {address}"), pods, cluster.on("outside", &traffic::curl(&url)))?;
    Ok(address)
}

/// Kills the node that announces the address, as a power cut would, and tells how long the address was gone.
pub fn kill(cluster: &Cluster, address: &str) -> Result<()> {
    let owner = owner(cluster)?;
    let node = cluster.get(&["node", &owner])?;
    let ip = internal_ipv4(&node).with_context(|| format!("{owner} has no IPv4"))?;
    // The kernel of a node that is a namespace lives on when its processes die: the cable is pulled, too.
    let script = format!("ip link set \"$(ip -o -4 address show to {ip} | awk '{{print $2}}')\" down");
    shell::output(&mut cluster.on(&owner, &["sh", "-c", &script]))?;
    let dead = Instant::now();
    // Clients go on asking meanwhile.
    let mut killing = cluster.fairlead(&["node", "kill", &owner]).spawn().context("cannot run fairlead")?;
    let mut failed = 0;
    while !request(cluster, address)? {
        failed += 1;
        if dead.elapsed() > PATIENCE {
            bail!("{address} is gone for {} s since {owner} died", PATIENCE.as_secs());
        }
    }
    let gone = dead.elapsed().as_millis();
    if !killing.wait().context("cannot wait for fairlead")?.success() {
        bail!("{owner} was not killed");
    }
    println!(
        "  {owner}, which announced {address}, is dead: gone for {gone} ms, {failed} requests of 100 ms each failed"
    );
    Ok(())
}

/// One request, which waits a tenth of a second.
fn request(cluster: &Cluster, address: &str) -> Result<bool> {
    let url = format!("http://{address}/");
    let words = ["curl", "-sS", "--fail", "--max-time", "0.1", "-o", "/dev/null", &url];
    let mut curl = cluster.on("outside", &words);
    let status = curl.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    Ok(status.context("cannot run curl")?.success())
}

/// The node that the last event names.
fn owner(cluster: &Cluster) -> Result<String> {
    let selector = format!("reason=nodeAssigned,involvedObject.name={SERVICE}");
    let events = cluster.get(&["events", "--field-selector", &selector])?;
    let items = events["items"].as_array().context("the event list has no items")?;
    let last = items.iter().max_by_key(|event| event["lastTimestamp"].as_str().unwrap_or_default().to_owned());
    let message = text(last.context("no event names the node that announces the address")?, "/message")?;
    let name = message.split('"').nth(1).with_context(|| format!("no node in {message:?}"))?;
    Ok(name.to_owned())
}
