//! What goes through each Service of this node, read from the kernel when somebody asks. Nothing is kept here.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use linux::conntrack::{self, Fill};
use linux::nft::Socket;
use services::{PortName, Protocol, ServiceTable};

use crate::{Error, Mode, NodeView, stale, watch};

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
}

/// What one endpoint of a Service port got from this node.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointTraffic {
    pub address: SocketAddr,
    /// Connections that were sent to it, answered or not (for UDP: flows). Counted in the kernel from the first; starts
    /// again after an hour without any.
    pub connections: u64,
    /// Flows that the kernel knows now.
    pub open: u64,
    /// Bytes that open flows have carried from and to their clients; `None` unless the kernel counts them
    /// (`net.netfilter.nf_conntrack_acct=1`).
    pub bytes: Option<(u64, u64)>,
    /// It is out of the pick, because it does not answer.
    pub is_ejected: bool,
}

impl EndpointTraffic {
    fn none(address: SocketAddr, is_ejected: bool) -> Self {
        EndpointTraffic { address, connections: 0, open: 0, bytes: None, is_ejected }
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

/// Reads the traffic of a node that is in this mode. It blocks for milliseconds.
pub fn traffic(
    mode: Mode,
    namespace: Option<BorrowedFd<'_>>,
    table: &ServiceTable,
    node: &NodeView,
) -> Result<Traffic, Error> {
    match mode {
        Mode::Nftables | Mode::Iptables => translated(namespace, table, node),
        Mode::Ipvs | Mode::Ebpf | Mode::Userspace => Err(Error::NotCounted(mode)),
    }
}

/// Of the modes in which netfilter translates addresses: the watch's table counts, and conntrack knows what is open.
fn translated(namespace: Option<BorrowedFd<'_>>, table: &ServiceTable, node: &NodeView) -> Result<Traffic, Error> {
    let connections = watch::connections(&mut Socket::open(namespace)?)?;
    let mut conntrack = conntrack::Socket::open(namespace)?;
    let flows = conntrack.translated()?;
    let fill = conntrack.fill()?;

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
    let mut of = |protocol: Protocol, address: SocketAddr, endpoint: SocketAddr, add: &dyn Fn(&mut EndpointTraffic)| {
        // Others translate addresses too.
        let owner = owners.get(&(protocol, address)).and_then(|name| services.get_mut(name));
        if let Some(endpoints) = owner {
            add(endpoints.entry(endpoint).or_insert_with(|| EndpointTraffic::none(endpoint, false)));
        }
    };
    for (protocol, address, endpoint, count) in connections {
        of(protocol, address, endpoint, &|traffic| traffic.connections += count);
    }
    for flow in flows {
        let Some(protocol) = Protocol::from_number(flow.protocol) else { continue };
        of(protocol, flow.original.1, flow.reply.0, &|traffic| {
            traffic.open += 1;
            if let Some((sent, received)) = flow.bytes {
                let (all_sent, all_received) = traffic.bytes.unwrap_or_default();
                traffic.bytes = Some((all_sent + sent, all_received + received));
            }
        });
    }
    let services = services
        .into_iter()
        .map(|(name, endpoints)| ServiceTraffic { name, endpoints: endpoints.into_values().collect() });
    Ok(Traffic { services: services.collect(), conntrack: fill })
}
