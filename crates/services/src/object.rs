//! The fields of a Service and of an EndpointSlice that anybody here reads, parsed once from the event's bytes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;

use crate::{Affinity, DSR_ANNOTATION, EndPolicy, Error, Hints, Protocol, Selection, TrafficPolicy};

/// A Service, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub kind: ServiceKind,
    pub ports: Vec<ServicePort>,
    pub external_ips: Vec<IpAddr>,
    /// Those with `ipMode: VIP`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Kept only beside addresses of a load balancer: whoever announces these selects by labels.
    pub labels: Option<Arc<BTreeMap<String, String>>>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    pub affinity: Option<Affinity>,
    pub source_ranges: Vec<IpNet>,
    pub health_check_node_port: Option<NonZeroU16>,
    /// The proxy that is to serve it, if not every node's own: label `service.kubernetes.io/service-proxy-name`.
    pub proxy_name: Option<Arc<str>>,
    pub end_policy: EndPolicy,
    pub selection: Option<Selection>,
    pub direct_return: Option<bool>,
    /// What is wrong with it and does not keep it out of the table: it is as if that had not been said.
    pub warnings: Option<Box<Warnings>>,
}

/// What people should hear of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct Warnings {
    /// The Service's.
    pub uid: Arc<str>,
    pub texts: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum ServiceKind {
    /// With one or two cluster IPs; also NodePort and LoadBalancer.
    ClusterIp(Vec<IpAddr>),
    Headless,
    ExternalName(Arc<str>),
    /// The cluster IP is not allocated yet.
    Pending,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    /// Empty if the port has no name.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<NonZeroU16>,
    pub app_protocol: Option<Arc<str>>,
}

/// An EndpointSlice, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// Kept only while an endpoint of it terminates: the removal barrier asks for it then.
    pub terminating: Option<Box<SliceVersion>>,
    /// The Service it belongs to, by label `kubernetes.io/service-name`.
    pub service: Option<Arc<str>>,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<SliceEndpoint>,
    /// When the change happened that this version tells of (RFC 3339), as the controller says: annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`.
    pub triggered: Option<Arc<str>>,
}

/// One version of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceVersion {
    pub uid: Arc<str>,
    /// To be compared for equality only.
    pub resource_version: Arc<str>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SlicePort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// None: all ports, which no Service uses.
    pub port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SliceEndpoint {
    pub address: IpAddr,
    pub hostname: Option<Arc<str>>,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub hints: Option<Arc<Hints>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawLabels {
    #[serde(rename = "service.kubernetes.io/service-proxy-name")]
    proxy_name: Option<String>,
    #[serde(rename = "kubernetes.io/service-name")]
    service_name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAnnotations {
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    triggered: Option<Arc<str>>,
    #[serde(rename = "fairlead.io/end-policy")]
    end_policy: Option<String>,
    #[serde(rename = "fairlead.io/endpoint-selection")]
    selection: Option<String>,
    #[serde(rename = "fairlead.io/dsr")]
    direct_return: Option<String>,
}

/// All labels of an object, which few Services are asked for.
#[derive(Deserialize)]
struct Labelled {
    metadata: LabelledMeta,
}

#[derive(Deserialize)]
struct LabelledMeta {
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct RawMeta {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
    #[serde(default, rename = "resourceVersion")]
    resource_version: String,
    #[serde(default)]
    labels: Option<RawLabels>,
    #[serde(default)]
    annotations: Option<RawAnnotations>,
}

#[derive(Deserialize)]
struct RawService {
    metadata: RawMeta,
    #[serde(default)]
    spec: RawSpec,
    #[serde(default)]
    status: Option<RawStatus>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    external_name: Option<String>,
    ports: Option<Vec<RawPort>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    internal_traffic_policy: Option<String>,
    external_traffic_policy: Option<String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<RawAffinityConfig>,
    load_balancer_source_ranges: Option<Vec<String>>,
    health_check_node_port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    protocol: Option<String>,
    port: i64,
    #[serde(default)]
    node_port: Option<i64>,
    #[serde(default)]
    app_protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawAffinityConfig {
    #[serde(default, rename = "clientIP")]
    client_ip: Option<RawClientIp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawClientIp {
    #[serde(default)]
    timeout_seconds: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawStatus {
    #[serde(default)]
    load_balancer: Option<RawLoadBalancer>,
}

#[derive(Deserialize)]
struct RawLoadBalancer {
    #[serde(default)]
    ingress: Option<Vec<RawIngress>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawIngress {
    #[serde(default)]
    ip: Option<String>,
    #[serde(default)]
    ip_mode: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSlice {
    metadata: RawMeta,
    #[serde(default)]
    address_type: String,
    #[serde(default)]
    ports: Option<Vec<RawSlicePort>>,
    #[serde(default)]
    endpoints: Option<Vec<RawEndpoint>>,
}

#[derive(Deserialize)]
struct RawSlicePort {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    protocol: Option<String>,
    #[serde(default)]
    port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    #[serde(default)]
    addresses: Option<Vec<String>>,
    #[serde(default)]
    conditions: Option<RawConditions>,
    #[serde(default)]
    hostname: Option<Arc<str>>,
    #[serde(default)]
    node_name: Option<Arc<str>>,
    #[serde(default)]
    zone: Option<Arc<str>>,
    #[serde(default)]
    hints: Option<RawHints>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawHints {
    for_zones: Option<Vec<RawName>>,
    for_nodes: Option<Vec<RawName>>,
}

#[derive(Deserialize)]
struct RawName {
    name: Arc<str>,
}

/// Names the object in errors.
struct Checker<'a> {
    kind: &'static str,
    meta: &'a RawMeta,
}

impl Checker<'_> {
    fn error(&self, field: &'static str, value: impl ToString, expected: &'static str) -> Error {
        Error::Field {
            kind: self.kind,
            namespace: self.meta.namespace.clone(),
            name: self.meta.name.clone(),
            field,
            value: value.to_string(),
            expected,
        }
    }

    fn address(&self, field: &'static str, text: &str) -> Result<IpAddr, Error> {
        text.parse().map_err(|_| self.error(field, text, "an IP address"))
    }

    fn addresses(&self, field: &'static str, texts: Option<&Vec<String>>) -> Result<Vec<IpAddr>, Error> {
        texts.into_iter().flatten().map(|text| self.address(field, text)).collect()
    }

    fn port(&self, field: &'static str, number: i64) -> Result<NonZeroU16, Error> {
        let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
        port.ok_or_else(|| self.error(field, number, "a port from 1 to 65535"))
    }

    /// Zero and absent both mean that none was asked for.
    fn optional_port(&self, field: &'static str, number: Option<i64>) -> Result<Option<NonZeroU16>, Error> {
        number.filter(|number| *number != 0).map(|number| self.port(field, number)).transpose()
    }

    fn protocol(&self, text: Option<&str>) -> Result<Protocol, Error> {
        let text = text.filter(|text| !text.is_empty()).unwrap_or("TCP");
        Protocol::parse(text).ok_or_else(|| self.error("ports.protocol", text, "TCP, UDP or SCTP"))
    }

    fn policy(&self, field: &'static str, text: Option<&str>) -> Result<TrafficPolicy, Error> {
        match text.unwrap_or_default() {
            "" | "Cluster" => Ok(TrafficPolicy::Cluster),
            "Local" => Ok(TrafficPolicy::Local),
            other => Err(self.error(field, other, "Cluster or Local")),
        }
    }
}

impl Service {
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let raw: RawService = serde_json::from_slice(json).map_err(|source| Error::Json { kind: "Service", source })?;
        let check = Checker { kind: "Service", meta: &raw.metadata };
        let spec = &raw.spec;
        let mut ports = Vec::new();
        for port in spec.ports.iter().flatten() {
            ports.push(ServicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol: check.protocol(port.protocol.as_deref())?,
                port: check.port("ports.port", port.port)?.get(),
                node_port: check.optional_port("ports.nodePort", port.node_port)?,
                app_protocol: port.app_protocol.as_deref().map(Arc::from),
            });
        }
        let mut load_balancer_ips = Vec::new();
        let ingress = raw.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        for ingress in ingress.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten() {
            let captured = ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
            if let Some(ip) = ingress.ip.as_deref().filter(|ip| captured && !ip.is_empty()) {
                load_balancer_ips.push(check.address("status.loadBalancer.ingress.ip", ip)?);
            }
        }
        if spec.r#type.as_deref() != Some("LoadBalancer") {
            load_balancer_ips.clear();
        }
        let labels = match load_balancer_ips.is_empty() {
            true => None,
            false => {
                let all = serde_json::from_slice::<Labelled>(json);
                let all = all.map_err(|source| Error::Json { kind: "Service", source })?;
                all.metadata.labels.filter(|labels| !labels.is_empty()).map(Arc::new)
            }
        };
        let source_ranges = spec.load_balancer_source_ranges.iter().flatten().map(|text| {
            let range = text.trim().parse::<IpNet>().map(|net| net.trunc());
            range.map_err(|_| check.error("loadBalancerSourceRanges", text, "a CIDR like 192.0.2.0/24"))
        });
        let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            let client = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let seconds = client.and_then(|client| client.timeout_seconds).unwrap_or(10_800);
            match u32::try_from(seconds) {
                Ok(timeout_seconds @ 1..=86_400) => Ok(Affinity { timeout_seconds }),
                _ => Err(check.error("sessionAffinityConfig.clientIP.timeoutSeconds", seconds, "from 1 to 86400")),
            }
        });
        let mut warnings = Vec::new();
        let annotations = raw.metadata.annotations.as_ref();
        let end_policy = annotations.and_then(|annotations| annotations.end_policy.as_deref()).map_or_else(
            EndPolicy::default,
            |text| {
                EndPolicy::parse(text).unwrap_or_else(|| {
                    let name = EndPolicy::ANNOTATION;
                    warnings.push(format!(
                        "annotation {name} is {text:?}, which is not keep, drain=SECONDS (1 to 86400) or reset; connections are kept"
                    ));
                    EndPolicy::default()
                })
            },
        );
        let selection = annotations.and_then(|annotations| annotations.selection.as_deref()).and_then(|text| {
            let selection = Selection::parse(text);
            if selection.is_none() {
                let name = Selection::ANNOTATION;
                warnings.push(format!(
                    "annotation {name} is {text:?}, which is not random, maglev or least-load; it is as if there were none"
                ));
            }
            selection
        });
        let direct_return = annotations.and_then(|annotations| annotations.direct_return.as_deref()).and_then(|text| {
            let direct_return = text.trim().parse().ok();
            if direct_return.is_none() {
                warnings.push(format!(
                    "annotation {DSR_ANNOTATION} is {text:?}, which is not true or false; it is as if there were none"
                ));
            }
            direct_return
        });
        Ok(Service {
            end_policy,
            selection,
            direct_return,
            warnings: (!warnings.is_empty())
                .then(|| Box::new(Warnings { uid: raw.metadata.uid.as_str().into(), texts: warnings })),
            kind: kind(&check, spec)?,
            ports,
            external_ips: check.addresses("externalIPs", spec.external_ips.as_ref())?,
            load_balancer_ips,
            labels,
            internal_policy: check.policy("internalTrafficPolicy", spec.internal_traffic_policy.as_deref())?,
            external_policy: check.policy("externalTrafficPolicy", spec.external_traffic_policy.as_deref())?,
            affinity: affinity.transpose()?,
            source_ranges: source_ranges.collect::<Result<_, _>>()?,
            health_check_node_port: check.optional_port("healthCheckNodePort", spec.health_check_node_port)?,
            proxy_name: raw.metadata.labels.as_ref().and_then(|labels| labels.proxy_name.as_deref()).map(Arc::from),
            namespace: raw.metadata.namespace.as_str().into(),
            name: raw.metadata.name.as_str().into(),
        })
    }
}

fn kind(check: &Checker<'_>, spec: &RawSpec) -> Result<ServiceKind, Error> {
    if spec.r#type.as_deref() == Some("ExternalName") {
        return Ok(ServiceKind::ExternalName(spec.external_name.as_deref().unwrap_or_default().into()));
    }
    let single = spec.cluster_ip.as_deref().unwrap_or_default();
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let texts: Vec<&str> = if listed.is_empty() { vec![single] } else { listed.iter().map(String::as_str).collect() };
    match texts[..] {
        ["None", ..] => Ok(ServiceKind::Headless),
        [""] => Ok(ServiceKind::Pending),
        _ => {
            let addresses: Result<Vec<IpAddr>, Error> =
                texts.into_iter().map(|text| check.address("clusterIPs", text)).collect();
            Ok(ServiceKind::ClusterIp(addresses?))
        }
    }
}

impl Slice {
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let raw: RawSlice =
            serde_json::from_slice(json).map_err(|source| Error::Json { kind: "EndpointSlice", source })?;
        let check = Checker { kind: "EndpointSlice", meta: &raw.metadata };
        let mut ports = Vec::new();
        for port in raw.ports.iter().flatten() {
            ports.push(SlicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol: check.protocol(port.protocol.as_deref())?,
                port: port.port.map(|port| check.port("ports.port", port)).transpose()?.map(NonZeroU16::get),
            });
        }
        let mut endpoints = Vec::new();
        // An FQDN slice has nothing that a packet could be sent to.
        let is_address = raw.address_type != "FQDN";
        for endpoint in raw.endpoints.iter().flatten().filter(|_| is_address) {
            // All addresses of an endpoint are the same endpoint; only the first is used.
            let Some(first) = endpoint.addresses.iter().flatten().next() else { continue };
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
            let names = |list: &Option<Vec<RawName>>| list.iter().flatten().map(|one| one.name.clone()).collect();
            let hints = endpoint.hints.as_ref();
            let hints = hints.map(|raw| Hints { zones: names(&raw.for_zones), nodes: names(&raw.for_nodes) });
            let address = check.address("endpoints.addresses", first)?;
            let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
            if raw.address_type != family {
                return Err(check.error("endpoints.addresses", first, "an address of the slice's addressType"));
            }
            endpoints.push(SliceEndpoint {
                address,
                hostname: endpoint.hostname.clone().filter(|name| !name.is_empty()),
                node: endpoint.node_name.clone(),
                zone: endpoint.zone.clone(),
                ready,
                serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
                terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
                hints: hints.filter(|hints| *hints != Hints::default()).map(Arc::new),
            });
        }
        endpoints.shrink_to_fit();
        ports.shrink_to_fit();
        let terminating = endpoints.iter().any(|endpoint| endpoint.terminating);
        let service = raw.metadata.labels.as_ref().and_then(|labels| labels.service_name.as_deref());
        let annotations = raw.metadata.annotations.as_ref();
        Ok(Slice {
            triggered: annotations.and_then(|annotations| annotations.triggered.clone()),
            service: service.filter(|name| !name.is_empty()).map(Arc::from),
            ports,
            endpoints,
            namespace: raw.metadata.namespace.as_str().into(),
            name: raw.metadata.name.as_str().into(),
            terminating: terminating.then(|| {
                let uid = raw.metadata.uid.as_str().into();
                Box::new(SliceVersion { uid, resource_version: raw.metadata.resource_version.as_str().into() })
            }),
        })
    }
}
