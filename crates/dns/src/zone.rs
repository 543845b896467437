//! The cluster's own zone: which name has which records, by the Kubernetes DNS specification 1.1.0.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{CNAME, NS, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use services::{Service, ServiceKind, ServiceTable, Slice, SliceEndpoint};

use crate::answer::{Answer, Question};
use crate::config::PodMode;
use crate::error::DnsError;
use crate::records::{address, endpoint_name, name_below, service_name, soa};

/// The version of the specification that the records follow.
const SCHEMA_VERSION: &str = "1.1.0";
/// The Service behind which cluster DNS itself is found.
const DNS_SERVICE: (&str, &str) = ("kube-system", "kube-dns");

/// A zone whose content is a [`ServiceTable`].
#[derive(Debug, Clone)]
pub struct Zone {
    origin: Name,
    ttl: u32,
    pods: PodMode,
}

/// Everything that stands at one name, of all types. A node without data still exists: no records, but no NXDOMAIN.
#[derive(Default)]
struct Node {
    data: Vec<RData>,
    additionals: Vec<Record>,
}

impl Node {
    fn of(data: Vec<RData>) -> Self {
        Node { data, additionals: Vec::new() }
    }
}

impl Zone {
    pub fn new(origin: &str, ttl: u32, pods: PodMode) -> Result<Self, DnsError> {
        let wrong = |reason: String| DnsError::Zone { zone: origin.to_owned(), reason };
        let mut name = Name::from_ascii(origin).map_err(|error| wrong(error.to_string()))?;
        if name.iter().next().is_none() {
            return Err(wrong("the root is not ours".to_owned()));
        }
        name.set_fqdn(true);
        Ok(Zone { origin: name, ttl, pods })
    }

    pub fn origin(&self) -> &Name {
        &self.origin
    }

    /// The answer to a question about a name of this zone; `None` for other names.
    pub fn answer(&self, table: &ServiceTable, question: &Question) -> Option<Answer> {
        if !self.origin.zone_of(&question.name) {
            return None;
        }
        if question.is_transfer() {
            return Some(Answer::code(ResponseCode::Refused));
        }
        if !table.is_synced() {
            return Some(Answer::code(ResponseCode::ServFail));
        }
        let origin_labels = self.origin.iter().count();
        // Names in answers keep the case in which the client wrote the zone.
        let zone = question.name.trim_to(origin_labels);
        let below = question.name.iter().count() - origin_labels;
        let labels: Vec<String> =
            question.name.iter().take(below).map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
        let path: Vec<&str> = labels.iter().map(String::as_str).collect();
        Some(match self.node(table, &path, &zone) {
            Some(node) => self.select(node, question, &zone),
            None => self.negative(ResponseCode::NXDomain, &zone),
        })
    }

    fn node(&self, table: &ServiceTable, path: &[&str], zone: &Name) -> Option<Node> {
        match path {
            [] => self.apex(table, zone),
            ["dns-version"] => Some(Node::of(vec![RData::TXT(TXT::new(vec![SCHEMA_VERSION.to_owned()]))])),
            ["dns"] | ["svc"] => Some(Node::default()),
            ["ns", "dns"] => Some(Node::of(own_addresses(table))),
            [namespace, "svc"] => table.has_namespace(namespace).then(Node::default),
            [service, namespace, "svc"] => self.service(table, namespace, service),
            [below, service, namespace, "svc"] => self.below_service(table, namespace, service, below),
            [port, protocol, service, namespace, "svc"] => {
                let port = port.strip_prefix('_').filter(|port| !port.is_empty())?;
                let protocol = protocol.strip_prefix('_')?;
                self.port(table, table.service(namespace, service)?, port, protocol, zone)
            }
            ["pod"] => (self.pods == PodMode::Insecure).then(Node::default),
            [namespace, "pod"] => self.has_pods(table, namespace).then(Node::default),
            [pod, namespace, "pod"] if self.has_pods(table, namespace) => {
                Some(Node::of(vec![address(parse_dashed(pod)?)]))
            }
            _ => None,
        }
    }

    fn apex(&self, table: &ServiceTable, zone: &Name) -> Option<Node> {
        let server = name_below(&["ns", "dns"], zone)?;
        let start = soa(zone, zone, self.ttl)?;
        let additionals = own_addresses(table).into_iter().map(|data| self.record(&server, data)).collect();
        Some(Node { data: vec![start.data, RData::NS(NS(server))], additionals })
    }

    fn service(&self, table: &ServiceTable, namespace: &str, name: &str) -> Option<Node> {
        let data = match &table.service(namespace, name)?.kind {
            ServiceKind::ClusterIp(addresses) => addresses.iter().copied().map(address).collect(),
            ServiceKind::Headless => {
                let ready = ready_endpoints(table, namespace, name);
                let addresses: BTreeSet<IpAddr> = ready.map(|(_, endpoint)| endpoint.address).collect();
                if addresses.is_empty() {
                    return None;
                }
                addresses.into_iter().map(address).collect()
            }
            ServiceKind::ExternalName(target) => vec![RData::CNAME(CNAME(external_name(target)?))],
            ServiceKind::Pending => Vec::new(),
        };
        Some(Node::of(data))
    }

    /// An endpoint's name, or the `_tcp` between a Service and its ports.
    fn below_service(&self, table: &ServiceTable, namespace: &str, name: &str, below: &str) -> Option<Node> {
        let service = table.service(namespace, name)?;
        if matches!(service.kind, ServiceKind::ExternalName(_)) {
            return None;
        }
        if let Some(protocol) = below.strip_prefix('_') {
            let has_port = service.ports.iter().any(|port| !port.name.is_empty() && port.protocol.name() == protocol);
            let reachable = !matches!(service.kind, ServiceKind::Headless)
                || ready_endpoints(table, namespace, name).next().is_some();
            return (has_port && reachable).then(Node::default);
        }
        let named = table.endpoints_named(namespace, name, below);
        let addresses: BTreeSet<IpAddr> = named.into_iter().map(|(_, endpoint)| endpoint.address).collect();
        (!addresses.is_empty()).then(|| Node::of(addresses.into_iter().map(address).collect()))
    }

    /// The SRV records of one named port.
    fn port(&self, table: &ServiceTable, service: &Service, port: &str, protocol: &str, zone: &Name) -> Option<Node> {
        let mut targets: Vec<(u16, Name)> = Vec::new();
        let mut additionals = Vec::new();
        match &service.kind {
            ServiceKind::ClusterIp(addresses) => {
                let target = service_name(&service.namespace, &service.name, zone)?;
                let named = service.ports.iter();
                let named = named.filter(|one| *one.name == *port && one.protocol.name() == protocol);
                targets.extend(named.map(|one| (one.port, target.clone())));
                additionals.extend(addresses.iter().map(|ip| self.record(&target, address(*ip))));
            }
            ServiceKind::Headless => {
                for (slice, endpoint) in ready_endpoints(table, &service.namespace, &service.name) {
                    let target = endpoint_name(&endpoint.host(), &service.namespace, &service.name, zone);
                    let Some(target) = target else { continue };
                    let named = slice.ports.iter();
                    let named = named.filter(|one| *one.name == *port && one.protocol.name() == protocol);
                    let before = targets.len();
                    // The slices of both families name one endpoint: one record, two addresses.
                    for number in named.filter_map(|one| one.port) {
                        targets.push((number, target.clone()));
                    }
                    if targets.len() > before {
                        additionals.push(self.record(&target, address(endpoint.address)));
                    }
                }
                targets.sort();
                targets.dedup();
            }
            ServiceKind::ExternalName(_) | ServiceKind::Pending => {}
        }
        if targets.is_empty() {
            return None;
        }
        let weight = u16::try_from(100 / targets.len()).unwrap_or(0).max(1);
        let srv = |(number, target)| RData::SRV(SRV::new(0, weight, number, target));
        Some(Node { data: targets.into_iter().map(srv).collect(), additionals })
    }

    fn has_pods(&self, table: &ServiceTable, namespace: &str) -> bool {
        self.pods == PodMode::Insecure && table.has_namespace(namespace)
    }

    /// Picks the records of the wanted type; an alias stands for addresses too.
    fn select(&self, node: Node, question: &Question, zone: &Name) -> Answer {
        let wanted = question.record_type;
        let follow = node.data.iter().find_map(|data| match data {
            RData::CNAME(target) if question.wants_address() => Some(target.0.clone()),
            _ => None,
        });
        let answers: Vec<Record> = node
            .data
            .into_iter()
            .filter(|data| wanted == RecordType::ANY || data.record_type() == wanted || follow.is_some())
            .map(|data| self.record(&question.name, data))
            .collect();
        if answers.is_empty() {
            return self.negative(ResponseCode::NoError, zone);
        }
        Answer {
            authoritative: true,
            answers,
            additionals: if wanted == RecordType::SOA { Vec::new() } else { node.additionals },
            follow,
            ..Answer::code(ResponseCode::NoError)
        }
    }

    fn negative(&self, code: ResponseCode, zone: &Name) -> Answer {
        Answer {
            authoritative: true,
            authorities: soa(zone, zone, self.ttl).into_iter().collect(),
            ..Answer::code(code)
        }
    }

    fn record(&self, owner: &Name, data: RData) -> Record {
        Record::from_rdata(owner.clone(), self.ttl, data)
    }
}

fn own_addresses(table: &ServiceTable) -> Vec<RData> {
    let (namespace, name) = DNS_SERVICE;
    match table.service(namespace, name).map(|service| &service.kind) {
        Some(ServiceKind::ClusterIp(addresses)) => addresses.iter().copied().map(address).collect(),
        _ => Vec::new(),
    }
}

fn ready_endpoints<'a>(
    table: &'a ServiceTable,
    namespace: &str,
    name: &str,
) -> impl Iterator<Item = (&'a Slice, &'a SliceEndpoint)> + use<'a> {
    let slices: Vec<&'a Slice> = table.slices(namespace, name).collect();
    let all = slices.into_iter().flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice, endpoint)));
    all.filter(|(_, endpoint)| endpoint.ready)
}

/// The target of an ExternalName Service. An address is not a name: it has no record.
fn external_name(target: &str) -> Option<Name> {
    if target.is_empty() || target.trim_end_matches('.').parse::<IpAddr>().is_ok() {
        return None;
    }
    let mut name = Name::from_ascii(target).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// `10-244-1-5` or `fd00-10-244--5`.
fn parse_dashed(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}
