//! Writes what becomes of Gateways, where this proxy holds the Lease: the Service in front of each, the slices that lead from it to
//! all proxies, and statuses. What to write is decided first, from what there is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::kinds::{ENDPOINT_SLICES, GATEWAYS, SERVICES};
use api::object::Key;
use ingress::gateway::{StatusOf, Transport, WantedGateway};
use reconcile::{Api, DeleteOptions, Patch};
use serde_json::{Map, Value, json};
use services::{Protocol, ServiceTable, SliceEndpoint};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::gateways::{FrontService, GATEWAY_NAME, api_of};

const MANAGER: &str = "fairlead-ingress";
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Says which controller made a Service: only what is its own does it take away.
const CONTROLLER: &str = "fairlead.io/gateway-controller";
/// Where proxies listen for ports of Gateways: below node ports and what the kernel gives to clients.
const TARGETS: std::ops::Range<u16> = 19_000..20_000;
/// When something that was not written is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What there is to write.
#[derive(Clone, Default)]
pub struct Report {
    pub leads: bool,
    /// `spec.controllerName` of the classes that are served.
    pub controller: String,
    pub statuses: Vec<StatusOf>,
    pub gateways: Vec<WantedGateway>,
    pub services: BTreeMap<Key, FrontService>,
    /// `None`: it is not known where the proxies are.
    pub published: Option<Published>,
}

/// Where the proxies are, and where the Services in front of Gateways lead at the moment.
#[derive(Clone, Default)]
pub struct Published {
    proxies: Vec<SliceEndpoint>,
    /// By Service and family (IPv6 or not): the slice as it is, as [`Slice::seen`] says it.
    slices: BTreeMap<(Key, bool), String>,
}

impl Published {
    /// As the table has it, for these Services.
    pub fn of<'a>(table: &ServiceTable, publish: &Key, services: impl Iterator<Item = &'a Key>) -> Self {
        let mut proxies: Vec<SliceEndpoint> = Vec::new();
        for slice in table.slices(&publish.namespace, &publish.name) {
            for endpoint in &slice.endpoints {
                if !proxies.iter().any(|held| held.address == endpoint.address) {
                    proxies.push(endpoint.clone());
                }
            }
        }
        proxies.sort_by_key(|endpoint| endpoint.address);
        let mut slices = BTreeMap::new();
        for key in services {
            for slice in table.slices(&key.namespace, &key.name) {
                let is_v6 = slice.endpoints.first().is_some_and(|endpoint| endpoint.address.is_ipv6());
                let ports = slice
                    .ports
                    .iter()
                    .map(|port| (port.name.to_string(), port.protocol, port.port.unwrap_or_default()));
                slices.insert((key.clone(), is_v6), seen(ports.collect(), &slice.endpoints));
            }
        }
        Published { proxies, slices }
    }
}

/// Two slices that lead to the same are the same text.
fn seen(mut ports: Vec<(String, Protocol, u16)>, endpoints: &[SliceEndpoint]) -> String {
    ports.sort();
    let mut endpoints: Vec<String> = endpoints
        .iter()
        .map(|one| format!("{} {:?} {} {} {}", one.address, one.node, one.ready, one.serving, one.terminating))
        .collect();
    endpoints.sort();
    format!("{ports:?} {endpoints:?}")
}

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Create(Value),
    Patch(Key, Value),
    Delete(Key),
    Slice(Value),
}

/// The name of the Service in front of a Gateway.
pub fn service_name(gateway: &str) -> String {
    let name = format!("{gateway}-fairlead");
    if name.len() <= 63 && !gateway.contains('.') {
        return name;
    }
    // A Service's name is one label: what does not fit is told apart by a number made of all of it.
    let number = gateway
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let short: String = gateway.replace('.', "-").chars().take(36).collect();
    format!("{short}-{number:016x}-fairlead")
}

/// What must be done so that every Gateway has its Service, and the Services lead to the proxies.
pub fn plan(report: &Report) -> Vec<Step> {
    let mut steps = Vec::new();
    let Some(published) = &report.published else { return steps };
    let mut used: BTreeSet<u16> =
        report.services.values().flat_map(|one| &one.spec.ports).filter_map(|port| port.target()).collect();
    let mut wanted = BTreeSet::new();
    for one in &report.gateways {
        let key = Key::new(one.gateway.metadata.namespace.clone(), service_name(&one.gateway.metadata.name));
        wanted.insert(key.clone());
        let held = report.services.get(&key);
        let service = service(one, &key, held, &report.controller, &mut used);
        match held {
            None => steps.push(Step::Create(service)),
            Some(held) => {
                if let Some(patch) = patch(held, &service) {
                    steps.push(Step::Patch(key.clone(), patch));
                }
                steps.extend(slices(&key, held, &service, published));
            }
        }
    }
    let ours = |one: &FrontService| one.metadata.annotations.get(CONTROLLER) == Some(&report.controller);
    for (key, _) in report.services.iter().filter(|(key, one)| ours(one) && !wanted.contains(*key)) {
        steps.push(Step::Delete(key.clone()));
    }
    steps
}

fn service(
    wanted: &WantedGateway,
    key: &Key,
    held: Option<&FrontService>,
    controller: &str,
    used: &mut BTreeSet<u16>,
) -> Value {
    let gateway = &wanted.gateway;
    let mut ports = Vec::new();
    for (port, transport) in &wanted.ports {
        let before =
            held.and_then(|held| held.spec.ports.iter().find(|one| one.port == *port && one.transport() == *transport));
        let target =
            before.and_then(|one| one.target()).or_else(|| TARGETS.clone().find(|target| !used.contains(target)));
        let Some(target) = target else {
            warn!(gateway = %key.name, port, "all {} ports of proxies are in use", TARGETS.len());
            continue;
        };
        used.insert(target);
        let (protocol, suffix) = if *transport == Transport::Udp { ("UDP", "udp") } else { ("TCP", "tcp") };
        let mut made =
            json!({"name": format!("p{port}-{suffix}"), "port": port, "protocol": protocol, "targetPort": target});
        if let Some(node_port) = before.map(|one| one.node_port).filter(|port| *port != 0) {
            made["nodePort"] = json!(node_port);
        }
        ports.push(made);
    }
    let infrastructure = &gateway.spec.infrastructure;
    let mut labels: Map<String, Value> = infrastructure.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    labels.insert(GATEWAY_NAME.to_owned(), json!(gateway.metadata.name));
    labels.insert(MANAGED_BY.to_owned(), json!(MANAGER));
    let mut annotations: Map<String, Value> =
        infrastructure.annotations.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    annotations.insert(CONTROLLER.to_owned(), json!(controller));
    if !wanted.addresses.is_empty() {
        annotations.insert("metallb.io/loadBalancerIPs".to_owned(), json!(wanted.addresses.join(",")));
    }
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": key.name, "namespace": key.namespace, "labels": labels, "annotations": annotations,
            "ownerReferences": [{"apiVersion": GATEWAYS.api_version(), "kind": GATEWAYS.kind, "name": gateway.metadata.name,
                "uid": gateway.metadata.uid, "controller": true}]},
        // Local: the client's own address arrives, and load balancers ask only nodes that serve.
        "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ipFamilyPolicy": "PreferDualStack", "ports": ports},
    })
}

/// What differs, as a merge patch.
fn patch(held: &FrontService, wanted: &Value) -> Option<Value> {
    let mut out = json!({});
    let ports: Vec<(u64, &str, u64)> = wanted["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            (
                port["port"].as_u64().unwrap_or_default(),
                port["protocol"].as_str().unwrap_or_default(),
                port["targetPort"].as_u64().unwrap_or_default(),
            )
        })
        .collect();
    let before =
        held.spec.ports.iter().map(|port| {
            (u64::from(port.port), port.protocol.as_str(), port.target().map(u64::from).unwrap_or_default())
        });
    // A Gateway without a port that works keeps the Service it has: one without ports there cannot be.
    if !ports.is_empty() && !before.eq(ports.iter().copied()) {
        out["spec"] = json!({"ports": wanted["spec"]["ports"]});
    }
    for (field, have) in [("labels", &held.metadata.labels), ("annotations", &held.metadata.annotations)] {
        for (key, value) in wanted["metadata"][field].as_object().into_iter().flatten() {
            if have.get(key).map(String::as_str) != value.as_str() {
                out["metadata"][field][key] = value.clone();
            }
        }
    }
    (out != json!({})).then_some(out)
}

/// The slices that differ from what they should be.
fn slices(key: &Key, held: &FrontService, service: &Value, published: &Published) -> Vec<Step> {
    let ports: Vec<&Value> = service["spec"]["ports"].as_array().into_iter().flatten().collect();
    let mut steps = Vec::new();
    for is_v6 in [false, true] {
        let endpoints: Vec<SliceEndpoint> =
            published.proxies.iter().filter(|one| one.address.is_ipv6() == is_v6).cloned().collect();
        let before = published.slices.get(&(key.clone(), is_v6));
        if endpoints.is_empty() && before.is_none() {
            continue;
        }
        let told = ports.iter().map(|port| {
            let protocol = if port["protocol"] == "UDP" { Protocol::Udp } else { Protocol::Tcp };
            let target = port["targetPort"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or_default();
            (port["name"].as_str().unwrap_or_default().to_owned(), protocol, target)
        });
        if before == Some(&seen(told.collect(), &endpoints)) {
            continue;
        }
        let list: Vec<Value> = endpoints
            .iter()
            .map(|one| {
                let mut made = json!({"addresses": [one.address],
                    "conditions": {"ready": one.ready, "serving": one.serving, "terminating": one.terminating}});
                if let Some(node) = &one.node {
                    made["nodeName"] = json!(node);
                }
                if let Some(zone) = &one.zone {
                    made["zone"] = json!(zone);
                }
                made
            })
            .collect();
        let ports: Vec<Value> = ports
            .iter()
            .map(|port| json!({"name": port["name"], "protocol": port["protocol"], "port": port["targetPort"]}))
            .collect();
        let family = if is_v6 { "IPv6" } else { "IPv4" };
        steps.push(Step::Slice(json!({
            "apiVersion": ENDPOINT_SLICES.api_version(), "kind": ENDPOINT_SLICES.kind,
            "metadata": {"name": format!("{}-{}", key.name, family.to_lowercase()), "namespace": key.namespace,
                "labels": {"kubernetes.io/service-name": key.name, "endpointslice.kubernetes.io/managed-by": MANAGER},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": key.name, "uid": held.metadata.uid}]},
            "addressType": family, "ports": ports, "endpoints": list,
        })));
    }
    steps
}

/// Writes until the token is cancelled. What fails is tried again, with what there is to write by then.
pub async fn run(client: kube::Client, mut reports: watch::Receiver<Report>, token: CancellationToken) {
    loop {
        let report = reports.borrow_and_update().clone();
        let mut all_written = true;
        if report.leads {
            for step in plan(&report) {
                all_written &= done(&take(&client, &step).await, "a Gateway's Service");
            }
            for status in &report.statuses {
                let Some(api) = api_of(&client, status.kind) else { continue };
                let written =
                    api.patch_status(&status.key.namespace, &status.key.name, Patch::Merge, &status.patch).await;
                all_written &= done(&written.map(drop), "a status");
            }
        }
        tokio::select! {
            changed = reports.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if !all_written => {}
            () = token.cancelled() => return,
        }
    }
}

/// What is gone needs nothing; what somebody else changed meanwhile comes again with their change.
fn done(written: &Result<(), reconcile::ApiError>, what: &str) -> bool {
    match written {
        Ok(()) => true,
        Err(error) if error.is_not_found() || error.is_conflict() => true,
        Err(error) => {
            debug!(%error, "{what} is not written");
            false
        }
    }
}

async fn take(client: &kube::Client, step: &Step) -> Result<(), reconcile::ApiError> {
    let (services, slices) = (Api::new(client, &SERVICES), Api::new(client, &ENDPOINT_SLICES));
    match step {
        Step::Create(service) => {
            let namespace = service["metadata"]["namespace"].as_str().unwrap_or_default();
            match services.create(namespace, service).await {
                Err(error) if error.is_already_exists() => Ok(()),
                created => created.map(drop),
            }
        }
        Step::Patch(key, body) => services.patch(&key.namespace, &key.name, Patch::Merge, body).await.map(drop),
        Step::Delete(key) => services.delete(&key.namespace, &key.name, &DeleteOptions::default()).await,
        Step::Slice(slice) => slices.create_or_replace(slice).await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use ingress::gateway::Gateway;

    use super::*;

    fn gateway(name: &str, ports: &[(u16, Transport)]) -> WantedGateway {
        let object = json!({"metadata": {"name": name, "namespace": "edge", "uid": "u"},
            "spec": {"infrastructure": {"labels": {"team": "shop"}}}});
        let gateway: Gateway = serde_json::from_value(object).expect("a Gateway");
        WantedGateway { gateway: Arc::new(gateway), ports: ports.iter().copied().collect(), addresses: Vec::new() }
    }

    fn proxy(address: &str) -> SliceEndpoint {
        let address: IpAddr = address.parse().expect("an address");
        let (node, zone, hints, hostname) = (Some("node-1".into()), None, None, None);
        SliceEndpoint { address, hostname, node, zone, ready: true, serving: true, terminating: false, hints }
    }

    /// The report after the steps, as the API server would have it.
    fn after(report: &mut Report, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Create(service) => {
                    let service: FrontService = serde_json::from_value(service.clone()).expect("a Service");
                    report.services.insert(service.metadata.key(), service);
                }
                Step::Patch(key, patch) => {
                    let held = report.services.get_mut(key).expect("a Service");
                    if let Some(ports) = patch.pointer("/spec/ports") {
                        held.spec.ports = serde_json::from_value(ports.clone()).expect("ports");
                    }
                }
                Step::Delete(key) => drop(report.services.remove(key)),
                Step::Slice(slice) => {
                    let key = Key::new(
                        slice["metadata"]["namespace"].as_str().expect("a namespace"),
                        slice["metadata"]["labels"]["kubernetes.io/service-name"].as_str().expect("a Service"),
                    );
                    let published = report.published.as_mut().expect("proxies");
                    let mut table = ServiceTable::new();
                    table.upsert_slice(slice.to_string().as_bytes()).expect("a slice");
                    let seen = Published::of(&table, &Key::new("", ""), [&key].into_iter());
                    published.slices.extend(seen.slices);
                }
            }
        }
    }

    #[test]
    fn a_gateway_gets_a_service_that_leads_to_all_proxies_and_then_nothing_more() {
        let published = Published { proxies: vec![proxy("10.0.0.1"), proxy("fd00::1")], ..Published::default() };
        let mut report = Report {
            leads: true,
            controller: "x".to_owned(),
            gateways: vec![
                gateway("a", &[(80, Transport::Tcp), (53, Transport::Udp)]),
                gateway("b", &[(80, Transport::Tcp)]),
            ],
            published: Some(published),
            ..Report::default()
        };
        let steps = plan(&report);
        let targets: Vec<u64> = steps
            .iter()
            .flat_map(|step| match step {
                Step::Create(service) => service["spec"]["ports"].as_array().cloned().unwrap_or_default(),
                other => panic!("{other:?}"),
            })
            .filter_map(|port| port["targetPort"].as_u64())
            .collect();
        assert_eq!(targets, [19_000, 19_001, 19_002], "no two share one");
        after(&mut report, &steps);
        let steps = plan(&report);
        assert_eq!(steps.len(), 4, "a slice of each family for each: {steps:?}");
        assert!(steps.iter().all(|step| matches!(step, Step::Slice(_))));
        after(&mut report, &steps);
        assert_eq!(plan(&report), []);

        // A port more keeps the targets of the others; one that goes takes its own along.
        report.gateways[1] = gateway("b", &[(80, Transport::Tcp), (81, Transport::Tcp)]);
        let steps = plan(&report);
        let Some(Step::Patch(_, patch)) = steps.first() else { panic!("{steps:?}") };
        let ports: Vec<&Value> =
            patch["spec"]["ports"].as_array().expect("ports").iter().map(|p| &p["targetPort"]).collect();
        assert_eq!(ports, [&json!(19_002), &json!(19_003)]);
        after(&mut report, &steps);
        let steps = plan(&report);
        after(&mut report, &steps);
        assert_eq!(plan(&report), []);

        // A Gateway that is gone: its Service, and nobody else's.
        report.gateways.truncate(1);
        let mut others = report.services.values().next().expect("a Service").clone();
        others.metadata.name = "others".to_owned();
        others.metadata.annotations.insert(CONTROLLER.to_owned(), "another".to_owned());
        report.services.insert(others.metadata.key(), others);
        assert_eq!(plan(&report), [Step::Delete(Key::new("edge", "b-fairlead"))]);
    }

    #[test]
    fn without_proxies_to_lead_to_nothing_is_made() {
        let report = Report { gateways: vec![gateway("a", &[(80, Transport::Tcp)])], ..Report::default() };
        assert_eq!(plan(&report), []);
    }

    #[test]
    fn every_gateway_has_a_service_of_a_name_that_can_be() {
        let long = "a".repeat(200);
        for name in ["shop", "shop.v2", &long, &format!("{long}b")] {
            let made = service_name(name);
            assert!(api::names::dns_label(&made).is_empty(), "{made}");
        }
        assert_ne!(service_name(&long), service_name(&format!("{long}b")));
        assert_eq!(service_name("shop"), "shop-fairlead");
    }
}
