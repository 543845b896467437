//! What goes through each Service of this node, read from the kernel when somebody asks. Nothing is kept here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use linux::bpf::{self, Hooks};
use linux::conntrack::{self, Fill};
use linux::iptables::Tools;
use linux::ipvs::{self, Ipvs as _, Key};
use linux::nft::{Family, Socket};
use services::{PortName, Protocol, ServiceTable};

use crate::dataplane::ebpf::contacts::{self, Pair, contacts, flows};
use crate::dataplane::userspace::Tally;
use crate::dataplane::{frame, iptables, ipvs as ipvs_mode, nftables, userspace};
use crate::metrics::Text;
use crate::run::pinned;
use crate::{Error, Metrics, Mode, NodeView, stale, watch};

/// A UDP flow without a packet for so long is over (`UDP_IDLE` in `packet.h`).
const UDP_IDLE: Duration = Duration::from_secs(120);

/// All Service ports, and how full the connection table is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// In the order of their names; one without traffic is there, too.
    pub services: Vec<ServiceTraffic>,
    pub conntrack: Fill,
}

/// One port of one Service, over all its addresses.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceTraffic {
    pub name: PortName,
    /// In the order of their addresses: those it has, and those that still have traffic.
    pub endpoints: Vec<EndpointTraffic>,
    /// First packets that were refused or dropped for want of an endpoint: of any, or of one that the client may use. A
    /// client that repeats itself counts again. Starts again like connections do; in the iptables mode with each commit, which writes their rules anew.
    pub rejected: u64,
}

/// What one endpoint of a Service port got from this node.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointTraffic {
    pub address: SocketAddr,
    /// Connections that were sent to it, answered or not (for UDP: flows). Counted in the kernel from the first; starts
    /// again after an hour without any, in the ebpf mode when 65,536 other pairs of address and endpoint were used since.
    pub connections: u64,
    /// Flows that the kernel knows now.
    pub open: u64,
    /// Bytes that open flows have carried from and to their clients; `None` unless the kernel counts them
    /// (`net.netfilter.nf_conntrack_acct=1`). The ebpf mode counts them always: of sockets of this node what the
    /// connections that have ended carried, without headers; of packets that it translates what the flows that it
    /// remembers carried. So do IPVS and relays: of all connections that they have counted.
    pub bytes: Option<(u64, u64)>,
    /// `None` where the mode does not tell.
    pub answers: Option<Answers>,
    /// It is out of the pick, because it does not answer.
    pub is_ejected: bool,
}

/// What became of the TCP connections that were sent to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    pub answered: u64,
    pub refused: u64,
    /// Clients that were sent to another endpoint, after this one did not answer.
    pub retried: u64,
    /// Of sockets of this node: those that ended without both sides having closed.
    pub resets: u64,
    /// From first SYN to answer, all together.
    pub waited: Duration,
}

impl EndpointTraffic {
    fn none(address: SocketAddr, is_ejected: bool) -> Self {
        EndpointTraffic { address, connections: 0, open: 0, bytes: None, answers: None, is_ejected }
    }
}

impl ServiceTraffic {
    /// Over all endpoints.
    pub fn connections(&self) -> u64 {
        self.endpoints.iter().map(|endpoint| endpoint.connections).sum()
    }

    pub fn open(&self) -> u64 {
        self.endpoints.iter().map(|endpoint| endpoint.open).sum()
    }
}

impl Traffic {
    /// For Prometheus: endpoints that have had traffic, and the connection table.
    pub fn metrics(&self) -> String {
        let mut out = Text(String::new());
        let all =
            || self.services.iter().flat_map(|service| service.endpoints.iter().map(move |one| (&service.name, one)));
        let labels = |name: &PortName, endpoint: &EndpointTraffic| {
            format!(
                "namespace=\"{}\",service=\"{}\",port=\"{}\",protocol=\"{}\",endpoint=\"{}\"",
                name.namespace, name.service, name.port, name.protocol, endpoint.address
            )
        };
        let connections = "fairlead_service_connections_total";
        out.head(
            "counter",
            connections,
            "Connections that this node sent to an endpoint of a Service, answered or not.",
        );
        for (name, endpoint) in all().filter(|(_, endpoint)| endpoint.connections > 0) {
            out.line(&format!("{connections}{{{}}}", labels(name, endpoint)), endpoint.connections);
        }
        let open = "fairlead_service_open_connections";
        out.head("gauge", open, "Flows to an endpoint of a Service that the kernel knows now.");
        for (name, endpoint) in all().filter(|(_, endpoint)| endpoint.open > 0) {
            out.line(&format!("{open}{{{}}}", labels(name, endpoint)), endpoint.open);
        }
        let rejected = "fairlead_service_rejected_total";
        out.head("counter", rejected, "First packets to a Service port for which there was no endpoint.");
        for ServiceTraffic { name, rejected: count, .. } in self.services.iter().filter(|one| one.rejected > 0) {
            let PortName { namespace, service, port, protocol } = name;
            let of = format!("namespace=\"{namespace}\",service=\"{service}\",port=\"{port}\",protocol=\"{protocol}\"");
            out.line(&format!("{rejected}{{{of}}}"), count);
        }
        let bytes = "fairlead_service_open_bytes";
        out.head("gauge", bytes, "Bytes that these flows have carried, where the kernel counts them.");
        for (name, endpoint) in all() {
            for (direction, count) in
                ["sent", "received"].into_iter().zip(endpoint.bytes.map(<[u64; 2]>::from).into_iter().flatten())
            {
                out.line(&format!("{bytes}{{{},direction=\"{direction}\"}}", labels(name, endpoint)), count);
            }
        }
        // What became of connections, where the mode knows it.
        let answers = || all().filter_map(|(name, one)| Some((labels(name, one), one.answers?)));
        type Count = fn(&Answers) -> u64;
        let kinds: [(&str, &str, Count); 3] = [
            ("refused", "Connections that an endpoint refused.", |answers| answers.refused),
            ("retried", "Clients that were sent to another endpoint, after this one did not answer.", |answers| {
                answers.retried
            }),
            ("reset", "Connections that ended without both sides having closed.", |answers| answers.resets),
        ];
        for (kind, help, count) in kinds {
            let metric = format!("fairlead_service_connections_{kind}_total");
            out.head("counter", &metric, help);
            for (labels, answers) in answers().filter(|(_, answers)| count(answers) > 0) {
                out.line(&format!("{metric}{{{labels}}}"), count(&answers));
            }
        }
        let latency = "fairlead_service_connect_duration_seconds";
        out.head("summary", latency, "Time from a first SYN to its answer.");
        for (labels, answers) in answers().filter(|(_, answers)| answers.answered > 0) {
            out.line(&format!("{latency}_sum{{{labels}}}"), answers.waited.as_secs_f64());
            out.line(&format!("{latency}_count{{{labels}}}"), answers.answered);
        }
        let ejected = "fairlead_service_endpoint_ejected";
        out.head(
            "gauge",
            ejected,
            "Endpoints of a Service that are out of the pick of this node, because they do not answer.",
        );
        for (name, endpoint) in all().filter(|(_, endpoint)| endpoint.is_ejected) {
            out.line(&format!("{ejected}{{{}}}", labels(name, endpoint)), 1);
        }
        let Fill { entries, limit, dropped } = self.conntrack;
        out.one("gauge", "fairlead_conntrack_entries", "Connections in the kernel's table.", entries);
        out.one("gauge", "fairlead_conntrack_limit", "The most connections that the kernel's table holds.", limit);
        let text = "First packets that the kernel dropped, since its table of connections was full.";
        out.one("counter", "fairlead_conntrack_drops_total", text, dropped);
        out.0
    }
}

/// Reads the traffic of a node that is in this mode; `hooks` and `metrics` as in the proxy's configuration. It blocks for
/// milliseconds.
pub fn traffic(
    mode: Mode,
    namespace: Option<BorrowedFd<'_>>,
    hooks: Option<&Hooks>,
    metrics: &Metrics,
    table: &ServiceTable,
    node: &NodeView,
) -> Result<Traffic, Error> {
    let mut accounts = Accounts::new(table, node);
    let fill = match mode {
        Mode::Nftables | Mode::Iptables => translated(namespace, &mut accounts)?,
        Mode::Ebpf => counted(namespace, hooks, &mut accounts)?,
        Mode::Ipvs => scheduled(namespace, &mut accounts)?,
        Mode::Userspace => relayed(namespace, &metrics.tally(), &mut accounts)?,
    };
    match mode {
        Mode::Nftables => accounts.reject(rejections(namespace, nftables::FAMILY, nftables::TABLE)?),
        Mode::Ipvs => accounts.reject(rejections(namespace, ipvs_mode::FAMILY, ipvs_mode::TABLE)?),
        Mode::Userspace => accounts.reject(rejections(namespace, userspace::FAMILY, userspace::TABLE)?),
        Mode::Iptables => {
            let held = namespace.map(|namespace| namespace.try_clone_to_owned()).transpose();
            let tools = Tools::open(held.map_err(Error::Namespace)?)?;
            let named: HashMap<(String, Protocol), PortName> =
                accounts.services.keys().map(|name| ((name.to_string(), name.protocol), name.clone())).collect();
            for (name, protocol, count) in iptables::rejections(&tools)? {
                if let Some(name) = named.get(&(name, protocol)) {
                    accounts.reject_named(name, count);
                }
            }
        }
        Mode::Ebpf => accounts.reject(contacts::rejections(&mut pinned(namespace, hooks)?)?),
    }
    Ok(accounts.close(fill))
}

/// What the chains for unserved packets have counted; nothing for who may not look.
fn rejections(
    namespace: Option<BorrowedFd<'_>>,
    family: Family,
    table: &str,
) -> Result<Vec<(Protocol, SocketAddr, u64)>, Error> {
    frame::rejections(&mut Socket::open(namespace)?, family, table)
}

/// Of relays, which count by themselves.
fn relayed(namespace: Option<BorrowedFd<'_>>, tally: &Tally, accounts: &mut Accounts) -> Result<Fill, Error> {
    for ((name, endpoint), counted) in tally.read() {
        accounts.of_named(&name, endpoint, |traffic| {
            traffic.connections += counted.begun;
            traffic.open += counted.open;
            carry(traffic, counted.sent, counted.received);
            if name.protocol == Protocol::Tcp {
                let answers = traffic.answers.get_or_insert_default();
                answers.answered += counted.answered;
                answers.refused += counted.refused;
                answers.retried += counted.retried;
                answers.resets += counted.resets;
                answers.waited += counted.waited;
            }
        });
    }
    for (name, count) in tally.rejected() {
        accounts.reject_named(&name, count);
    }
    match conntrack::Socket::open(namespace) {
        Ok(mut conntrack) => Ok(conntrack.fill()?),
        // Without privileges the mode serves all the same.
        Err(error) if error.is_forbidden() => Ok(Fill::default()),
        Err(error) => Err(error.into()),
    }
}

/// Of the modes in which netfilter translates addresses: the watch's table counts, and conntrack knows what is open.
fn translated(namespace: Option<BorrowedFd<'_>>, accounts: &mut Accounts) -> Result<Fill, Error> {
    let connections = watch::connections(&mut Socket::open(namespace)?)?;
    let mut conntrack = conntrack::Socket::open(namespace)?;
    let flows = conntrack.translated()?;
    for (protocol, address, endpoint, count) in connections {
        accounts.of(protocol, address, endpoint, |traffic| traffic.connections += count);
    }
    for flow in flows {
        let Some(protocol) = Protocol::from_number(flow.protocol) else { continue };
        accounts.of(protocol, flow.original.1, flow.reply.0, |traffic| {
            traffic.open += 1;
            if let Some((sent, received)) = flow.bytes {
                carry(traffic, sent, received);
            }
        });
    }
    Ok(conntrack.fill()?)
}

/// Of the ipvs mode: IPVS counts by itself, and adds up what its processors have counted every two seconds.
fn scheduled(namespace: Option<BorrowedFd<'_>>, accounts: &mut Accounts) -> Result<Fill, Error> {
    let mut ipvs = ipvs::Socket::open(namespace)?;
    for service in ipvs.services()? {
        let Key { address, protocol } = service.key;
        let Some(protocol) = Protocol::from_number(protocol) else { continue };
        for (endpoint, open, counters) in ipvs.counters(&service.key)? {
            accounts.of(protocol, address, endpoint, |traffic| {
                traffic.connections += counters.connections;
                traffic.open += u64::from(open.active) + u64::from(open.inactive);
                carry(traffic, counters.bytes_in, counters.bytes_out);
            });
        }
    }
    Ok(conntrack::Socket::open(namespace)?.fill()?)
}

/// Of the ebpf mode, whose programs count.
fn counted(namespace: Option<BorrowedFd<'_>>, hooks: Option<&Hooks>, accounts: &mut Accounts) -> Result<Fill, Error> {
    let mut kernel = pinned(namespace, hooks)?;
    for (Pair { protocol, asked, given }, contact) in contacts(&mut kernel)? {
        accounts.of(protocol, asked, given, |traffic| {
            traffic.connections += contact.begun;
            traffic.open += contact.open;
            carry(traffic, contact.sent, contact.received);
            if protocol == Protocol::Tcp {
                let answers = traffic.answers.get_or_insert_default();
                answers.answered += contact.answered;
                answers.refused += contact.refused;
                answers.retried += contact.retried;
                answers.resets += contact.resets;
                answers.waited += contact.waited;
            }
        });
    }
    let flows = flows(&mut kernel)?;
    let now = bpf::now();
    let closed = flows.iter().filter(|flow| flow.is_answer && flow.is_closed);
    let closed: HashSet<(SocketAddr, Pair)> = closed.map(|flow| (flow.client, flow.pair)).collect();
    for flow in flows {
        let Pair { protocol, asked, given } = flow.pair;
        let idle = now.saturating_sub(flow.seen);
        let is_open = match protocol {
            Protocol::Tcp => !flow.is_closed && !closed.contains(&(flow.client, flow.pair)),
            Protocol::Udp | Protocol::Sctp => idle < UDP_IDLE,
        };
        accounts.of(protocol, asked, given, |traffic| {
            if flow.is_answer {
                carry(traffic, 0, flow.bytes);
            } else {
                carry(traffic, flow.bytes, 0);
                traffic.open += u64::from(is_open);
            }
        });
    }
    Ok(conntrack::Socket::open(namespace)?.fill()?)
}

fn carry(traffic: &mut EndpointTraffic, sent: u64, received: u64) {
    let (all_sent, all_received) = traffic.bytes.unwrap_or_default();
    traffic.bytes = Some((all_sent + sent, all_received + received));
}

/// Where traffic is booked.
struct Accounts {
    services: BTreeMap<PortName, BTreeMap<SocketAddr, EndpointTraffic>>,
    rejected: HashMap<PortName, u64>,
    owners: HashMap<(Protocol, SocketAddr), PortName>,
}

impl Accounts {
    fn new(table: &ServiceTable, node: &NodeView) -> Self {
        let mut services: BTreeMap<PortName, BTreeMap<SocketAddr, EndpointTraffic>> = BTreeMap::new();
        let mut owners: HashMap<(Protocol, SocketAddr), PortName> = HashMap::new();
        for frontend in table.frontends() {
            let protocol = frontend.name.protocol;
            let endpoints = frontend.endpoints.iter().map(|endpoint| {
                let is_ejected = node.ejected.contains(&(endpoint.address, protocol));
                (endpoint.address, EndpointTraffic::none(endpoint.address, is_ejected))
            });
            services.insert(frontend.name.clone(), endpoints.collect());
            for address in stale::addresses(frontend, node) {
                // Of two Services that claim an address the older one has it.
                owners.entry((protocol, address)).or_insert_with(|| frontend.name.clone());
            }
        }
        Accounts { services, rejected: HashMap::new(), owners }
    }

    fn of(
        &mut self,
        protocol: Protocol,
        address: SocketAddr,
        endpoint: SocketAddr,
        add: impl FnOnce(&mut EndpointTraffic),
    ) {
        // Others translate addresses too.
        if let Some(name) = self.owners.get(&(protocol, address)).cloned() {
            self.of_named(&name, endpoint, add);
        }
    }

    /// Of a Service that has gone there is nothing to tell.
    fn of_named(&mut self, name: &PortName, endpoint: SocketAddr, add: impl FnOnce(&mut EndpointTraffic)) {
        if let Some(endpoints) = self.services.get_mut(name) {
            add(endpoints.entry(endpoint).or_insert_with(|| EndpointTraffic::none(endpoint, false)));
        }
    }

    fn reject(&mut self, counts: Vec<(Protocol, SocketAddr, u64)>) {
        for (protocol, address, count) in counts {
            if let Some(name) = self.owners.get(&(protocol, address)).cloned() {
                self.reject_named(&name, count);
            }
        }
    }

    fn reject_named(&mut self, name: &PortName, count: u64) {
        *self.rejected.entry(name.clone()).or_default() += count;
    }

    fn close(self, conntrack: Fill) -> Traffic {
        let service = |(name, endpoints): (PortName, BTreeMap<SocketAddr, EndpointTraffic>)| ServiceTraffic {
            rejected: self.rejected.get(&name).copied().unwrap_or_default(),
            endpoints: endpoints.into_values().collect(),
            name,
        };
        Traffic { services: self.services.into_iter().map(service).collect(), conntrack }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_is_told_to_prometheus() {
        let address = |port| SocketAddr::from(([10, 244, 0, 7], port));
        let busy = EndpointTraffic {
            connections: 7,
            open: 2,
            bytes: Some((100, 2000)),
            answers: Some(Answers {
                answered: 4,
                refused: 1,
                waited: Duration::from_millis(500),
                ..Answers::default()
            }),
            ..EndpointTraffic::none(address(8080), true)
        };
        let name =
            PortName { namespace: "shop".into(), service: "web".into(), port: "http".into(), protocol: Protocol::Tcp };
        let idle = EndpointTraffic::none(address(8081), false);
        let traffic = Traffic {
            services: vec![ServiceTraffic { name, endpoints: vec![busy, idle], rejected: 5 }],
            conntrack: Fill { entries: 12, limit: 262_144, dropped: 3 },
        };
        let text = traffic.metrics();
        let labels = r#"namespace="shop",service="web",port="http",protocol="tcp",endpoint="10.244.0.7:8080""#;
        for line in [
            format!("fairlead_service_connections_total{{{labels}}} 7"),
            format!("fairlead_service_open_connections{{{labels}}} 2"),
            format!("fairlead_service_open_bytes{{{labels},direction=\"sent\"}} 100"),
            format!("fairlead_service_open_bytes{{{labels},direction=\"received\"}} 2000"),
            format!("fairlead_service_connections_refused_total{{{labels}}} 1"),
            format!("fairlead_service_connect_duration_seconds_sum{{{labels}}} 0.5"),
            format!("fairlead_service_connect_duration_seconds_count{{{labels}}} 4"),
            format!("fairlead_service_endpoint_ejected{{{labels}}} 1"),
            r#"fairlead_service_rejected_total{namespace="shop",service="web",port="http",protocol="tcp"} 5"#.into(),
            "fairlead_conntrack_entries 12".into(),
            "fairlead_conntrack_drops_total 3".into(),
        ] {
            assert!(text.lines().any(|held| held == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("8081"), "an endpoint without traffic costs no line\n{text}");
    }
}
