//! `top services`: what goes through each Service, summed over nodes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use lab::Lab;
use serde::{Deserialize, Serialize};

use crate::client::session::{complain, say};
use crate::{cli, local};

#[derive(Args, Debug)]
pub struct TopArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Connections and bytes of each Service port, those with most connections first.
    Services(ServicesArgs),
}

#[derive(Args, Debug)]
struct ServicesArgs {
    #[command(flatten)]
    data: cli::DataDir,
    /// Of one node only.
    #[arg(long)]
    node: Option<String>,
    /// Each endpoint, too.
    #[arg(long)]
    endpoints: bool,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Output {
    Text,
    Json,
}

/// What one agent says; also the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    pub services: Vec<Service>,
    pub conntrack: Conntrack,
}

/// One port of one Service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// `namespace/name:port`
    pub name: String,
    pub protocol: String,
    pub endpoints: Vec<Endpoint>,
    /// First packets for which there was no endpoint.
    #[serde(default)]
    pub rejected: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub connections: u64,
    /// Flows that the kernel still knows, those that ended a moment ago among them.
    pub open: u64,
    /// From and to clients, over these flows; not told where the kernel does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<(u64, u64)>,
    /// Not told where the mode does not count them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers: Option<Answers>,
    pub ejected: bool,
}

/// What became of TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answers {
    pub answered: u64,
    pub refused: u64,
    pub retried: u64,
    pub resets: u64,
    /// From first packet to answer, in the mean; 0 without an answer.
    pub connect_micros: u64,
}

impl Answers {
    fn add(&mut self, more: &Answers) {
        let answered = self.answered + more.answered;
        let waited = self.answered * self.connect_micros + more.answered * more.connect_micros;
        self.connect_micros = waited.checked_div(answered).unwrap_or(0);
        self.answered = answered;
        self.refused += more.refused;
        self.retried += more.retried;
        self.resets += more.resets;
    }
}

impl From<proxy::Answers> for Answers {
    fn from(answers: proxy::Answers) -> Self {
        let proxy::Answers { answered, refused, retried, resets, waited } = answers;
        let connect_micros = (waited.as_micros() as u64).checked_div(answered).unwrap_or(0);
        Answers { answered, refused, retried, resets, connect_micros }
    }
}

/// The kernel's table of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Conntrack {
    pub entries: u64,
    pub limit: u64,
    pub dropped: u64,
}

impl From<proxy::Traffic> for Traffic {
    fn from(traffic: proxy::Traffic) -> Self {
        let endpoint = |endpoint: proxy::EndpointTraffic| Endpoint {
            address: endpoint.address,
            connections: endpoint.connections,
            open: endpoint.open,
            bytes: endpoint.bytes,
            answers: endpoint.answers.map(Answers::from),
            ejected: endpoint.is_ejected,
        };
        let service = |service: proxy::ServiceTraffic| Service {
            name: service.name.to_string(),
            protocol: service.name.protocol.to_string(),
            endpoints: service.endpoints.into_iter().map(endpoint).collect(),
            rejected: service.rejected,
        };
        let fill = traffic.conntrack;
        Traffic {
            services: traffic.services.into_iter().map(service).collect(),
            conntrack: Conntrack { entries: fill.entries.into(), limit: fill.limit.into(), dropped: fill.dropped },
        }
    }
}

impl TopArgs {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let What::Services(args) = self.what;
        let mut good = true;
        let mut all = Vec::new();
        for (node, socket) in agents(&args)? {
            let asked = local::ask(&socket, "GET", "/traffic", Vec::new()).await;
            match asked.and_then(|text| Ok(serde_json::from_str::<Traffic>(&text)?)) {
                Ok(traffic) => all.push((node, traffic)),
                Err(error) => {
                    complain(&format!("{node}: {error:#}"));
                    good = false;
                }
            }
        }
        let services = sum(all.iter().map(|(_, traffic)| traffic));
        match args.output {
            Output::Text => {
                say(&table(&services, args.endpoints))?;
                for (node, traffic) in &all {
                    let Conntrack { entries, limit, dropped } = traffic.conntrack;
                    say(&format!(
                        "{node}: {entries} of {limit} connections are in the kernel's table, {dropped} packets were dropped for lack of room\n"
                    ))?;
                }
            }
            Output::Json => {
                let nodes: BTreeMap<&String, &Conntrack> =
                    all.iter().map(|(node, traffic)| (node, &traffic.conntrack)).collect();
                let value = serde_json::json!({"services": services, "conntrack": nodes});
                say(&format!("{}\n", serde_json::to_string_pretty(&value)?))?;
            }
        }
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// The agents of this machine: that of a host, or those of a cluster that `up` has made.
fn agents(args: &ServicesArgs) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let dir = &args.data.data_dir;
    let own = dir.join("agent.sock");
    if own.exists() {
        return Ok(vec![("this node".to_owned(), own)]);
    }
    let lab = lab::id_of(dir).ok().and_then(|id| Lab::open(&id).ok());
    let lab =
        lab.with_context(|| format!("no agent of {} runs on this machine; `fairlead status` tells", dir.display()))?;
    let socket = |node: &lab::LabNode| (node.name.clone(), node.dir.join("agent.sock"));
    match &args.node {
        Some(name) => Ok(vec![socket(lab.node(name)?)]),
        None => Ok(lab.nodes().iter().map(socket).collect()),
    }
}

/// All nodes' traffic by Service port, the busiest first.
fn sum<'a>(all: impl Iterator<Item = &'a Traffic>) -> Vec<Service> {
    type Sum = (BTreeMap<SocketAddr, Endpoint>, u64);
    let mut services: BTreeMap<(&str, &str), Sum> = BTreeMap::new();
    for service in all.flat_map(|traffic| &traffic.services) {
        let (endpoints, rejected) = services.entry((&service.name, &service.protocol)).or_default();
        *rejected += service.rejected;
        for endpoint in &service.endpoints {
            let Some(held) = endpoints.get_mut(&endpoint.address) else {
                endpoints.insert(endpoint.address, endpoint.clone());
                continue;
            };
            held.connections += endpoint.connections;
            held.open += endpoint.open;
            held.bytes = match (held.bytes, endpoint.bytes) {
                (Some(held), Some(more)) => Some((held.0 + more.0, held.1 + more.1)),
                (one, other) => one.or(other),
            };
            if let Some(more) = &endpoint.answers {
                held.answers.get_or_insert_default().add(more);
            }
            held.ejected |= endpoint.ejected;
        }
    }
    let service = |((name, protocol), (endpoints, rejected)): ((&str, &str), Sum)| Service {
        name: name.to_owned(),
        protocol: protocol.to_owned(),
        endpoints: endpoints.into_values().collect(),
        rejected,
    };
    let mut services: Vec<Service> = services.into_iter().map(service).collect();
    // Stable: those with as many come by name.
    services.sort_by_key(|service| std::cmp::Reverse(connections(service)));
    services
}

fn connections(service: &Service) -> u64 {
    service.endpoints.iter().map(|endpoint| endpoint.connections).sum()
}

/// Bytes as a person reads them.
fn size(bytes: Option<u64>) -> String {
    let Some(bytes) = bytes else { return "-".to_owned() };
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// What became of connections, in columns.
fn fates(answers: Option<Answers>) -> [String; 4] {
    let Some(answers) = answers else { return ["-", "-", "-", "-"].map(str::to_owned) };
    let connect = if answers.answered > 0 { format!("{} µs", answers.connect_micros) } else { "-".to_owned() };
    [answers.refused.to_string(), answers.retried.to_string(), answers.resets.to_string(), connect]
}

fn table(services: &[Service], with_endpoints: bool) -> String {
    let has_fates = services.iter().flat_map(|service| &service.endpoints).any(|endpoint| endpoint.answers.is_some());
    let heads = [
        "SERVICE",
        "PROTOCOL",
        "CONNECTIONS",
        "FLOWS",
        "IN",
        "OUT",
        "REFUSED",
        "RETRIED",
        "RESET",
        "CONNECT",
        "ENDPOINTS",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    for service in services {
        let bytes: Option<Vec<(u64, u64)>> = {
            let counted: Vec<(u64, u64)> = service.endpoints.iter().filter_map(|endpoint| endpoint.bytes).collect();
            (!counted.is_empty()).then_some(counted)
        };
        let total = |pick: fn(&(u64, u64)) -> u64| size(bytes.as_ref().map(|all| all.iter().map(pick).sum()));
        let ejected = service.endpoints.iter().filter(|endpoint| endpoint.ejected).count();
        let some = |count: u64, what: &str| if count > 0 { format!(", {count} {what}") } else { String::new() };
        let out = some(ejected as u64, "ejected") + &some(service.rejected, "rejected");
        let mut answers: Option<Answers> = None;
        for more in service.endpoints.iter().filter_map(|endpoint| endpoint.answers.as_ref()) {
            answers.get_or_insert_default().add(more);
        }
        let [refused, retried, resets, connect] = fates(answers);
        rows.push([
            service.name.clone(),
            service.protocol.clone(),
            connections(service).to_string(),
            service.endpoints.iter().map(|endpoint| endpoint.open).sum::<u64>().to_string(),
            total(|(sent, _)| *sent),
            total(|(_, received)| *received),
            refused,
            retried,
            resets,
            connect,
            format!("{}{out}", service.endpoints.len()),
        ]);
        for endpoint in service.endpoints.iter().filter(|_| with_endpoints) {
            let [refused, retried, resets, connect] = fates(endpoint.answers);
            rows.push([
                format!("  {}", endpoint.address),
                String::new(),
                endpoint.connections.to_string(),
                endpoint.open.to_string(),
                size(endpoint.bytes.map(|(sent, _)| sent)),
                size(endpoint.bytes.map(|(_, received)| received)),
                refused,
                retried,
                resets,
                connect,
                if endpoint.ejected { "ejected".to_owned() } else { String::new() },
            ]);
        }
    }
    let is_shown = |column: usize| has_fates || !(6..10).contains(&column);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |row: &[String; 11]| {
        let cells = row.iter().zip(&widths).enumerate().filter(|(column, _)| is_shown(*column));
        let cells: Vec<String> = cells.map(|(_, (cell, width))| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("   ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_summed_and_the_busiest_come_first() {
        let endpoint = |host: u8, connections, bytes, ejected| Endpoint {
            address: SocketAddr::from(([10, 244, 0, host], 80)),
            connections,
            open: 1,
            bytes,
            answers: None,
            ejected,
        };
        let service = |name: &str, endpoints: &[Endpoint]| Service {
            name: name.to_owned(),
            protocol: "tcp".to_owned(),
            endpoints: endpoints.to_vec(),
            rejected: if endpoints.is_empty() { 4 } else { 0 },
        };
        let node = |services: &[Service]| Traffic { services: services.to_vec(), conntrack: Conntrack::default() };
        let one = node(&[
            service("default/a", &[]),
            service("default/web:http", &[endpoint(1, 3, Some((512, 2048)), false), endpoint(2, 4, None, false)]),
        ]);
        let two = node(&[
            service("default/web:http", &[endpoint(1, 5, Some((512, 3 << 20)), true)]),
            service("default/b", &[endpoint(9, 90, None, false)]),
        ]);
        let sum = sum([&one, &two].into_iter());
        assert_eq!(
            table(&sum, true),
            "\
SERVICE            PROTOCOL   CONNECTIONS   FLOWS   IN        OUT       ENDPOINTS
default/b          tcp        90            1       -         -         1
  10.244.0.9:80               90            1       -         -
default/web:http   tcp        12            3       1.0 KiB   3.0 MiB   2, 1 ejected
  10.244.0.1:80               8             2       1.0 KiB   3.0 MiB   ejected
  10.244.0.2:80               4             1       -         -
default/a          tcp        0             0       -         -         0, 4 rejected
"
        );
        assert_eq!(table(&sum, false).lines().count(), 4);
        // One node tells more of it than the other.
        let answers =
            |answered, connect_micros| Answers { answered, refused: 1, retried: 1, resets: 2, connect_micros };
        let told = |answers| node(&[service("default/web", &[Endpoint { answers, ..endpoint(1, 9, None, false) }])]);
        let nodes = [told(Some(answers(3, 40))), told(Some(answers(1, 80))), told(None)];
        assert_eq!(
            table(&super::sum(nodes.iter()), false),
            "\
SERVICE       PROTOCOL   CONNECTIONS   FLOWS   IN   OUT   REFUSED   RETRIED   RESET   CONNECT   ENDPOINTS
default/web   tcp        27            3       -    -     2         2         4       50 µs     1
"
        );
    }
}
