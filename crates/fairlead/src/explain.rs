//! `explain`: where a packet to a Service goes and why, from the API's objects alone or from a node and its kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use api::ObjectExt;
use clap::{Args, ValueEnum};
use ipnet::IpNet;
use lab::Lab;
use proxy::explain::Report;
use proxy::{Mode, NodeView, Packet, Taker};
use reconcile::ApiError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use services::{Place, Protocol, ServiceTable};

use crate::client::session::{Connection, JSON, Session, complain, complaint, encode, fail, say};
use crate::{dsr, local};

#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Who sends: NAMESPACE/POD, a node's name, an address, or `outside`.
    source: String,
    /// To where: a Service's address, or its name as in DNS (web, web.shop, web.shop.svc.cluster.local), or a node's name; then
    /// the port, or a Service port's name: 10.96.0.10:80, [fd00:10:96::a]:80, web:http, node-1:30080
    #[arg(value_name = "DESTINATION:PORT")]
    destination: String,
    #[arg(long, value_enum, default_value = "tcp")]
    proto: Proto,
    /// The node that the packet is on: by default that of the source, or the one that has the destination's address.
    #[arg(long)]
    node: Option<String>,
    /// Ask the node, and compare its plan with what the kernel really holds.
    #[arg(long)]
    live: bool,
    /// Without --live: the mode of the node's proxy.
    #[arg(long, default_value = "nftables", conflicts_with = "live")]
    proxy_mode: Mode,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    #[command(flatten)]
    connection: Connection,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Proto {
    Tcp,
    Udp,
    Sctp,
}

impl Proto {
    fn protocol(self) -> Protocol {
        match self {
            Proto::Tcp => Protocol::Tcp,
            Proto::Udp => Protocol::Udp,
            Proto::Sctp => Protocol::Sctp,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Output {
    Text,
    Json,
}

/// What a node's agent is asked.
#[derive(Serialize, Deserialize, Debug)]
pub struct Question {
    from: IpAddr,
    to: SocketAddr,
    /// An IP protocol number.
    protocol: u8,
}

impl Question {
    pub fn packet(&self) -> Packet {
        // Any port that a client may have.
        Packet { from: SocketAddr::new(self.from, 40_000), to: self.to, protocol: self.protocol }
    }
}

/// Addresses for documentation (RFC 5737, RFC 3849), which nobody inside a cluster has.
const OUTSIDE: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

impl ExplainArgs {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let facts = Facts::load(&self.connection.open().await?, &self.source).await?;
        let (question, node) =
            facts.question(&self.source, &self.destination, self.proto.protocol(), self.node.as_deref())?;
        let report = if self.live {
            let socket = agent_socket(&self.connection.dir(), &node.name)?;
            let answer = local::ask(&socket, "POST", "/explain", serde_json::to_vec(&question)?).await?;
            serde_json::from_str::<Report>(&answer).context("read the agent's answer")?
        } else {
            proxy::explain::report(self.proxy_mode, &facts.table, &facts.view(node), &question.packet())?
        };
        match self.output {
            Output::Text => say(&report.to_string())?,
            Output::Json => say(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
        }
        // A kernel that differs is what a script wants to know.
        let drifted = report.drift.is_some_and(|lines| !lines.is_empty());
        Ok(if drifted { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// Where a node's agent of this machine listens.
fn agent_socket(dir: &Path, node: &str) -> anyhow::Result<PathBuf> {
    let own = dir.join("agent.sock");
    if own.exists() {
        return Ok(own);
    }
    let lab = lab::id_of(dir).ok().and_then(|id| Lab::open(&id).ok());
    let lab = lab.with_context(|| {
        let dir = dir.display();
        format!(
            "no agent of {dir} runs on this machine; --live asks a node's own agent: run it there, with its --data-dir"
        )
    })?;
    Ok(lab.node(node)?.dir.join("agent.sock"))
}

/// What the API knows.
#[derive(Default)]
struct Facts {
    /// Where Services are that do not say.
    namespace: String,
    table: ServiceTable,
    nodes: Vec<Node>,
    /// The source, if it is one.
    pod: Option<Pod>,
    pod_cidrs: Vec<IpNet>,
    service_cidrs: Vec<IpNet>,
}

struct Node {
    name: String,
    zone: Option<Arc<str>>,
    addresses: Vec<IpAddr>,
    pod_cidrs: Vec<IpNet>,
    /// What it says of clients that came to other nodes.
    taker: Option<Taker>,
}

struct Pod {
    node: String,
    addresses: Vec<IpAddr>,
}

/// `NAMESPACE/POD`
fn pod_name(source: &str) -> Option<(&str, &str)> {
    source.split_once('/')
}

fn parsed<T: std::str::FromStr>(texts: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<T> {
    texts.into_iter().filter_map(|text| text.as_ref().parse().ok()).collect()
}

fn texts<'a>(object: &'a Value, list: &str, field: &str) -> Vec<&'a str> {
    let items = object.pointer(list).and_then(Value::as_array).into_iter().flatten();
    items.filter_map(|item| if field.is_empty() { item.as_str() } else { item[field].as_str() }).collect()
}

impl Node {
    fn of(object: &Value) -> Node {
        let addresses = object.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten();
        let internal = addresses.filter(|address| address["type"] == "InternalIP");
        let addresses: Vec<IpAddr> = parsed(internal.filter_map(|address| address["address"].as_str()));
        let said = object["metadata"]["annotations"][services::DSR_ANNOTATION].as_str();
        Node {
            taker: dsr::taker_with(said, addresses.clone()),
            name: object.name().to_string(),
            zone: object["metadata"]["labels"]["topology.kubernetes.io/zone"].as_str().map(Into::into),
            addresses,
            pod_cidrs: parsed(texts(object, "/spec/podCIDRs", "")),
        }
    }
}

impl Facts {
    async fn load(session: &Session, source: &str) -> anyhow::Result<Facts> {
        let list = async |path: &str| -> Result<Vec<Value>, ApiError> {
            let mut answer = session.get(path, JSON).await?;
            match answer["items"].take() {
                Value::Array(items) => Ok(items),
                _ => Ok(Vec::new()),
            }
        };
        let mut facts = Facts { namespace: session.namespace.clone(), ..Facts::default() };
        for service in list("/api/v1/services").await.map_err(fail)? {
            facts.table.upsert_service(service.to_string().as_bytes())?;
        }
        for slice in list("/apis/discovery.k8s.io/v1/endpointslices").await.map_err(fail)? {
            facts.table.upsert_slice(slice.to_string().as_bytes())?;
        }
        facts.table.set_synced();
        facts.nodes = list("/api/v1/nodes").await.map_err(fail)?.iter().map(Node::of).collect();
        match session.get("/api/v1/namespaces/kube-system/configmaps/fairlead", JSON).await {
            Ok(settings) => {
                facts.pod_cidrs = parsed(settings.text("/data/podCIDRs").split(','));
                facts.service_cidrs = parsed(settings.text("/data/serviceCIDRs").split(','));
            }
            // A cluster of another make: nodes and ServiceCIDRs tell.
            Err(_) => {
                facts.pod_cidrs = facts.nodes.iter().flat_map(|node| node.pod_cidrs.clone()).collect();
                match list("/apis/networking.k8s.io/v1/servicecidrs").await {
                    Ok(items) => {
                        facts.service_cidrs =
                            items.iter().flat_map(|item| parsed(texts(item, "/spec/cidrs", ""))).collect();
                    }
                    Err(error) => complain(&format!("the ranges of cluster IPs are unknown: {}", complaint(&error))),
                }
            }
        }
        if let Some((namespace, name)) = pod_name(source) {
            let path = format!("/api/v1/namespaces/{}/pods/{}", encode(namespace), encode(name));
            let pod = session.get(&path, JSON).await.map_err(fail)?;
            let addresses = parsed(texts(&pod, "/status/podIPs", "ip"));
            facts.pod = Some(Pod { node: pod.text("/spec/nodeName").to_string(), addresses });
        }
        Ok(facts)
    }

    fn view(&self, node: &Node) -> NodeView {
        let others = self.nodes.iter().filter(|other| other.name != node.name);
        let view = NodeView::new(
            Place { node: node.name.as_str().into(), zone: node.zone.clone() },
            node.addresses.clone(),
            self.pod_cidrs.clone(),
            self.service_cidrs.clone(),
        );
        NodeView {
            direct_return: node.taker.as_ref().is_some_and(|taker| taker.by_default),
            takers: others.filter_map(|other| Some((other.name.as_str().into(), other.taker.clone()?))).collect(),
            ..view
        }
    }

    fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The packet that is meant, and the node it is on.
    fn question(
        &self,
        source: &str,
        destination: &str,
        protocol: Protocol,
        node: Option<&str>,
    ) -> anyhow::Result<(Question, &Node)> {
        let sources = self.sources(source)?;
        // Who has one family only can ask for that one only.
        let family = sources.first().map(IpAddr::is_ipv6).filter(|v6| sources.iter().all(|ip| ip.is_ipv6() == *v6));
        let to = self.destination(destination, protocol, family)?;
        let from = sources.iter().find(|ip| ip.is_ipv6() == to.is_ipv6()).copied();
        let from = from.with_context(|| {
            format!("{source} has no {} address, as {to} is one", if to.is_ipv6() { "IPv6" } else { "IPv4" })
        })?;
        let node = match node {
            Some(name) => {
                self.node(name).with_context(|| format!("there is no node {name}; {}", self.which_nodes()))?
            }
            None => self.node_of(source, from, to.ip())?,
        };
        Ok((Question { from, to, protocol: protocol.number() }, node))
    }

    fn sources(&self, source: &str) -> anyhow::Result<Vec<IpAddr>> {
        if let Some(pod) = &self.pod {
            if pod.addresses.is_empty() {
                bail!("{source} has no address yet; `fairlead get pods -o wide` tells how it is");
            }
            return Ok(pod.addresses.clone());
        }
        if source == "outside" {
            return Ok(vec![OUTSIDE.0.into(), OUTSIDE.1.into()]);
        }
        if let Some(node) = self.node(source) {
            return Ok(node.addresses.clone());
        }
        let address = source.parse().with_context(|| {
            format!("{source} is no NAMESPACE/POD, no node, no address and not `outside`; {}", self.which_nodes())
        })?;
        Ok(vec![address])
    }

    fn which_nodes(&self) -> String {
        let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        format!("nodes are {}", names.join(", "))
    }

    fn destination(&self, text: &str, protocol: Protocol, family: Option<bool>) -> anyhow::Result<SocketAddr> {
        let (host, port) = text
            .rsplit_once(':')
            .filter(|(host, _)| !host.contains(':') || host.starts_with('['))
            .with_context(|| format!("{text} has no port: write web:80, 10.96.0.10:80 or [fd00::a]:80"))?;
        let number = || port.parse::<u16>().with_context(|| format!("{port:?} is no port"));
        if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(SocketAddr::new(address, number()?));
        }
        let labels: Vec<&str> = host.trim_end_matches('.').split('.').collect();
        let (name, namespace) = match labels[..] {
            [name] => (name, self.namespace.as_str()),
            [name, namespace] | [name, namespace, "svc", ..] => (name, namespace),
            _ => bail!("{host} is no name of a Service: those are NAME, NAME.NAMESPACE or NAME.NAMESPACE.svc.DOMAIN"),
        };
        if let Some(service) = self.table.service(namespace, name) {
            let of_protocol = || service.ports.iter().filter(|held| held.protocol == protocol);
            let by_name = of_protocol().find(|held| &*held.name == port && !port.is_empty()).map(|held| held.port);
            // A number that is no port of the Service is a question, too: there is an answer to it.
            let port = by_name.or_else(|| port.parse().ok()).with_context(|| {
                let ports = of_protocol().map(|held| match &*held.name {
                    "" => held.port.to_string(),
                    name => format!("{name} ({})", held.port),
                });
                let ports: Vec<String> = ports.collect();
                format!("{namespace}/{name} has no {protocol} port {port:?}, only {}", ports.join(", "))
            })?;
            return Ok(SocketAddr::new(proxy::explain::cluster_ip(&self.table, namespace, name, family)?, port));
        }
        if let Some(node) = self.node(host) {
            let addresses = &node.addresses;
            let fitting = addresses.iter().find(|address| family.is_none_or(|v6| address.is_ipv6() == v6));
            let address = fitting.with_context(|| format!("{host} has no such address"))?;
            return Ok(SocketAddr::new(*address, number()?));
        }
        bail!("there is no Service {namespace}/{name}, and no node {host}; {}", self.which_nodes())
    }

    /// Where a packet from there is seen first.
    fn node_of(&self, source: &str, from: IpAddr, to: IpAddr) -> anyhow::Result<&Node> {
        let by_name = |name: &str| self.node(name);
        let has = |address: IpAddr| self.nodes.iter().find(|node| node.addresses.contains(&address));
        let pods_of = || self.nodes.iter().find(|node| node.pod_cidrs.iter().any(|cidr| cidr.contains(&from)));
        let only = || if self.nodes.len() == 1 { self.nodes.first() } else { None };
        let pod = self.pod.as_ref().and_then(|pod| by_name(&pod.node));
        pod.or_else(|| by_name(source))
            .or_else(|| has(from))
            .or_else(pods_of)
            .or_else(|| has(to))
            .or_else(only)
            .with_context(|| format!("say with --node where the packet arrives; {}", self.which_nodes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn facts() -> Facts {
        let mut facts = Facts { namespace: "default".into(), ..Facts::default() };
        let services = [
            json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {"clusterIP": "10.96.0.10",
                "clusterIPs": ["10.96.0.10", "fd00:10:96::a"], "ports": [{"name": "http", "port": 80}]}}),
            json!({"metadata": {"name": "db", "namespace": "shop"}, "spec": {"clusterIP": "None", "ports": [{"port": 5432}]}}),
        ];
        for service in services {
            facts.table.upsert_service(service.to_string().as_bytes()).expect("a valid Service");
        }
        let node = |number: u8| {
            Node::of(
                &json!({"metadata": {"name": format!("node-{number}"), "labels": {"topology.kubernetes.io/zone": "a"}},
                "spec": {"podCIDRs": [format!("10.244.{number}.0/24")]},
                "status": {"addresses": [{"type": "Hostname", "address": "x"}, {"type": "InternalIP", "address": format!("192.168.49.{number}")},
                    {"type": "InternalIP", "address": format!("fd00:c0a8:31::{number}")}]}}),
            )
        };
        facts.nodes = vec![node(1), node(2)];
        facts
    }

    #[test]
    fn names_become_addresses() {
        let mut facts = facts();
        let ask = |facts: &Facts, from: &str, to: &str, node: Option<&str>| match facts.question(
            from,
            to,
            Protocol::Tcp,
            node,
        ) {
            Ok((question, node)) => format!("{} -> {} on {}", question.from, question.to, node.name),
            Err(error) => format!("{error:#}"),
        };
        for (from, to, node, expected) in [
            ("node-2", "web:http", None, "192.168.49.2 -> 10.96.0.10:80 on node-2"),
            ("10.244.1.7", "web.default.svc.cluster.local.:80", None, "10.244.1.7 -> 10.96.0.10:80 on node-1"),
            ("2001:db8::9", "web.default:80", Some("node-1"), "2001:db8::9 -> [fd00:10:96::a]:80 on node-1"),
            ("outside", "node-1:30080", None, "192.0.2.1 -> 192.168.49.1:30080 on node-1"),
            ("outside", "[fd00:c0a8:31::2]:30080", None, "2001:db8::1 -> [fd00:c0a8:31::2]:30080 on node-2"),
            ("outside", "web:80", None, "say with --node where the packet arrives; nodes are node-1, node-2"),
            ("outside", "web:80", Some("node-9"), "there is no node node-9; nodes are node-1, node-2"),
            ("outside", "web", None, "web has no port: write web:80, 10.96.0.10:80 or [fd00::a]:80"),
            ("outside", "fd00::a:80", None, "fd00::a:80 has no port: write web:80, 10.96.0.10:80 or [fd00::a]:80"),
            ("outside", "web:dns", None, "default/web has no tcp port \"dns\", only http (80)"),
            (
                "outside",
                "gone:80",
                None,
                "there is no Service default/gone, and no node gone; nodes are node-1, node-2",
            ),
            (
                "outside",
                "db.shop:5432",
                None,
                "shop/db has no address to ask about: it is headless: DNS gives its pods' addresses, ask about one of them",
            ),
            (
                "nobody",
                "web:80",
                None,
                "nobody is no NAMESPACE/POD, no node, no address and not `outside`; nodes are node-1, node-2: invalid IP address syntax",
            ),
            ("10.244.1.7", "[fd00:10:96::a]:80", None, "10.244.1.7 has no IPv6 address, as [fd00:10:96::a]:80 is one"),
        ] {
            assert_eq!(ask(&facts, from, to, node), expected, "{from} -> {to}");
        }
        facts.pod = Some(Pod { node: "node-2".into(), addresses: parsed(["10.244.2.9"]) });
        assert_eq!(ask(&facts, "default/client", "web:80", None), "10.244.2.9 -> 10.96.0.10:80 on node-2");
        facts.pod = Some(Pod { node: String::new(), addresses: Vec::new() });
        assert!(ask(&facts, "default/client", "web:80", None).starts_with("default/client has no address yet"));
    }
}
