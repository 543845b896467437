//! Keeps the older Endpoints object of each Service with a selector: one list of addresses in its primary family.

use crate::plan::{Change, act_all};
use crate::service::{Backend, EndpointPort, Family, HEADLESS, Service, queue_services_of};
use crate::{Context, Descriptor, Error};
use api::kinds::{ENDPOINTS, PODS, SERVICES};
use api::object::{Key, Metadata};
use reconcile::{Cache, Client, Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "endpoints",
    watches: &[SERVICES, PODS, ENDPOINTS],
    writes: &[ENDPOINTS],
    run: |context| Box::pin(run(context)),
};

const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const CAPACITY: usize = 1000;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Endpoints {
    metadata: Metadata,
    subsets: Option<Value>,
}

impl Named for Endpoints {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// An address with what decides its place: the order is that of addresses, ready ones apart from others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Address {
    ip: IpAddr,
    is_ready: bool,
    uid: String,
    hostname: Option<String>,
    node: String,
    name: String,
}

impl Address {
    fn to_json(&self, namespace: &str) -> Value {
        let mut value = json!({
            "ip": self.ip,
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": self.name, "uid": self.uid},
        });
        if let Some(hostname) = &self.hostname {
            value["hostname"] = json!(hostname);
        }
        if !self.node.is_empty() {
            value["nodeName"] = json!(self.node);
        }
        value
    }
}

fn address(service: &Service, pod: &Backend, family: Family) -> Option<Address> {
    let publishes_all = service.spec.publish_not_ready_addresses;
    if !pod.is_addressable() || (pod.is_terminating() && !publishes_all) {
        return None;
    }
    Some(Address {
        ip: pod.address(family)?,
        is_ready: publishes_all || pod.is_ready(),
        uid: pod.metadata.uid.clone(),
        hostname: pod.hostname_for(service).map(String::from),
        node: pod.spec.node_name.clone(),
        name: pod.metadata.name.clone(),
    })
}

/// Subsets such that each port stands beside exactly the addresses that serve it. Called RepackSubsets upstream.
fn subsets(service: &Service, pods: &[Arc<Backend>]) -> (Vec<Value>, bool) {
    let family = service.families()[0];
    let mut by_port: BTreeMap<Option<EndpointPort>, BTreeSet<Address>> = BTreeMap::new();
    let mut addresses: Vec<(Address, &Backend)> =
        pods.iter().filter_map(|pod| Some((address(service, pod, family)?, pod.as_ref()))).collect();
    let is_over = addresses.len() > CAPACITY;
    // Ready ones are worth more than others when not all fit.
    addresses.sort_by(|(a, _), (b, _)| b.is_ready.cmp(&a.is_ready).then_with(|| a.cmp(b)));
    addresses.truncate(CAPACITY);
    for (address, pod) in addresses {
        if service.spec.ports.is_empty() && service.is_headless() {
            by_port.entry(None).or_default().insert(address);
            continue;
        }
        for port in pod.ports_for(service) {
            by_port.entry(Some(port)).or_default().insert(address.clone());
        }
    }
    let mut by_addresses: BTreeMap<BTreeSet<Address>, Vec<EndpointPort>> = BTreeMap::new();
    for (port, addresses) in by_port {
        by_addresses.entry(addresses).or_default().extend(port);
    }
    let namespace = &service.metadata.namespace;
    let mut subsets: Vec<(Vec<EndpointPort>, Value)> = Vec::new();
    for (addresses, ports) in by_addresses {
        let mut subset = json!({});
        for (field, is_ready) in [("addresses", true), ("notReadyAddresses", false)] {
            let list: Vec<_> =
                addresses.iter().filter(|a| a.is_ready == is_ready).map(|a| a.to_json(namespace)).collect();
            if !list.is_empty() {
                subset[field] = json!(list);
            }
        }
        if !ports.is_empty() {
            subset["ports"] = ports.iter().map(port_json).collect();
        }
        subsets.push((ports, subset));
    }
    subsets.sort_by(|(a, _), (b, _)| a.cmp(b));
    (subsets.into_iter().map(|(_, subset)| subset).collect(), is_over)
}

/// Unlike a slice's, an empty name is not written.
fn port_json(port: &EndpointPort) -> Value {
    let mut value = json!({"port": port.port, "protocol": port.protocol});
    if let Some(name) = port.name.as_ref().filter(|n| !n.is_empty()) {
        value["name"] = json!(name);
    }
    if let Some(protocol) = &port.app_protocol {
        value["appProtocol"] = json!(protocol);
    }
    value
}

/// What has to change so that the Endpoints show the pods behind the Service.
fn plan(key: &Key, service: Option<&Service>, pods: &[Arc<Backend>], current: Option<&Endpoints>) -> Vec<Change> {
    let Some(service) = service else {
        let delete = |e: &Endpoints| Change::delete(ENDPOINTS, key.clone(), &e.metadata.uid);
        return current.map(delete).into_iter().collect();
    };
    if !service.has_selector() || service.is_external_name() || service.metadata.is_deleting() {
        return Vec::new();
    }
    let (subsets, is_over) = subsets(service, pods);
    let mut labels = service.metadata.labels.clone();
    labels.insert(MANAGED_BY.into(), "endpoint-controller".into());
    if service.is_headless() {
        labels.insert(HEADLESS.into(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    let mut annotations = current.map(|c| c.metadata.annotations.clone()).unwrap_or_default();
    if is_over {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    let subsets = if subsets.is_empty() { None } else { Some(Value::Array(subsets)) };
    if let Some(current) = current {
        let metadata = &current.metadata;
        let held = current.subsets.clone().filter(|s| s.as_array().is_some_and(|a| !a.is_empty()));
        if held == subsets && metadata.labels == labels && metadata.annotations == annotations {
            return Vec::new();
        }
    }
    let mut object = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": key.name, "namespace": key.namespace, "labels": labels},
    });
    if !annotations.is_empty() {
        object["metadata"]["annotations"] = json!(annotations);
    }
    if let Some(subsets) = subsets {
        object["subsets"] = subsets;
    }
    match current {
        Some(current) => {
            object["metadata"]["resourceVersion"] = json!(current.metadata.resource_version);
            vec![Change::Replace(ENDPOINTS, object)]
        }
        None => vec![Change::Create(ENDPOINTS, object)],
    }
}

struct Controller {
    client: Client,
    services: Cache<Service>,
    pods: Cache<Backend>,
    endpoints: Cache<Endpoints>,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let adds = queue.clone();
    let services = feed::<Service, _>(&client, &SERVICES, Scope::all(), &token, move |before, after| {
        if let Some(service) = after.or(before) {
            adds.add(service.metadata.key());
        }
    });
    let (adds, known) = (queue.clone(), services.clone());
    let pods = feed::<Backend, _>(&client, &PODS, Scope::all(), &token, move |before, after| {
        queue_services_of(&known, &adds, before, after);
    });
    let adds = queue.clone();
    let endpoints = feed::<Endpoints, _>(&client, &ENDPOINTS, Scope::all(), &token, move |before, after| {
        // Only ours: of all others a Service that never existed says nothing.
        if let Some(endpoints) = after.or(before).filter(|e| e.metadata.labels.contains_key(MANAGED_BY)) {
            adds.add(endpoints.metadata.key());
        }
    });
    services.synced().await;
    pods.synced().await;
    endpoints.synced().await;
    let controller = Arc::new(Controller { client, services, pods, endpoints });
    run_queue("endpoints", queue, 4, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        let service = self.services.get(key);
        let pods = match service.as_ref().filter(|s| s.has_selector()) {
            Some(service) => {
                let (selector, mut pods) = (service.selector(), self.pods.list_namespace(&key.namespace));
                pods.retain(|p| selector.matches_map(&p.metadata.labels));
                pods
            }
            None => Vec::new(),
        };
        let current = self.endpoints.get(key);
        act_all(&self.client, &plan(key, service.as_deref(), &pods, current.as_deref())).await?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(spec: Value) -> Service {
        let mut value = json!({
            "metadata": {"name": "web", "namespace": "default", "labels": {"team": "a"}},
            "spec": {"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"], "selector": {"app": "web"},
                "ports": [{"port": 80, "targetPort": "http", "protocol": "TCP"}]},
        });
        if let (Some(target), Some(fields)) = (value["spec"].as_object_mut(), spec.as_object()) {
            target.extend(fields.clone());
        }
        serde_json::from_value(value).expect("the case is a Service")
    }

    fn pod(name: &str, ip: &str, port: i64, ready: &str) -> Arc<Backend> {
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("u-{name}")},
            "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}, {"ip": "fd00::9"}],
                "conditions": [{"type": "Ready", "status": ready}]},
        });
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    fn shape(service: &Service, pods: &[Arc<Backend>]) -> Vec<String> {
        let ips = |subset: &Value, field: &str| {
            let list = subset[field].as_array().cloned().unwrap_or_default();
            list.iter().filter_map(|a| a["ip"].as_str().map(String::from)).collect::<Vec<_>>().join(",")
        };
        let line = |s: &Value| {
            let ports = s["ports"].as_array().cloned().unwrap_or_default();
            let ports: Vec<_> = ports.iter().map(|p| p["port"].to_string()).collect();
            format!("{}|{}|{}", ips(s, "addresses"), ips(s, "notReadyAddresses"), ports.join(","))
        };
        subsets(service, pods).0.iter().map(line).collect()
    }

    #[test]
    fn addresses_stand_beside_the_ports_they_serve() {
        let two = [pod("b", "10.0.0.10", 8080, "True"), pod("a", "10.0.0.9", 8080, "False")];
        assert_eq!(shape(&service(json!({})), &two), ["10.0.0.10|10.0.0.9|8080"]);
        let mixed = [pod("a", "10.0.0.9", 8080, "True"), pod("b", "10.0.0.10", 9090, "True")];
        assert_eq!(shape(&service(json!({})), &mixed), ["10.0.0.9||8080", "10.0.0.10||9090"]);
        let all = json!({"publishNotReadyAddresses": true});
        assert_eq!(shape(&service(all), &two), ["10.0.0.9,10.0.0.10||8080"]);
        assert_eq!(shape(&service(json!({"ipFamilies": ["IPv6"]})), &two[..1]), ["fd00::9||8080"]);
        let headless = json!({"clusterIP": "None", "ports": []});
        assert_eq!(shape(&service(headless), &two[..1]), ["10.0.0.10||"]);
    }

    #[test]
    fn a_thousand_addresses_are_shown_and_that_there_are_more() {
        let pods: Vec<_> = (0..=CAPACITY)
            .map(|n| pod(&format!("p{n}"), &format!("10.0.{}.{}", n / 250, n % 250), 80, "True"))
            .collect();
        let key = Key::new("default", "web");
        for (count, expected) in [(CAPACITY, None), (CAPACITY + 1, Some("truncated"))] {
            let created = plan(&key, Some(&service(json!({}))), &pods[..count], None);
            let [Change::Create(_, object)] = created.as_slice() else { panic!("Endpoints are created: {created:?}") };
            assert_eq!(object["subsets"][0]["addresses"].as_array().map(Vec::len), Some(CAPACITY));
            assert_eq!(object["metadata"]["annotations"][OVER_CAPACITY].as_str(), expected);
        }
    }

    #[test]
    fn nothing_is_written_when_nothing_changed() {
        let (service, pods, key) =
            (service(json!({})), [pod("a", "10.0.0.9", 8080, "True")], Key::new("default", "web"));
        let created = plan(&key, Some(&service), &pods, None);
        let [Change::Create(_, object)] = created.as_slice() else { panic!("Endpoints are created: {created:?}") };
        assert_eq!(object["metadata"]["labels"], json!({"team": "a", MANAGED_BY: "endpoint-controller"}));
        let current: Endpoints = serde_json::from_value(object.clone()).expect("what was made can be read");
        assert!(plan(&key, Some(&service), &pods, Some(&current)).is_empty());
        assert!(matches!(plan(&key, Some(&service), &[], Some(&current)).as_slice(), [Change::Replace(..)]));
        assert!(matches!(plan(&key, None, &[], Some(&current)).as_slice(), [Change::Delete(..)]));
        assert!(plan(&key, None, &[], None).is_empty());
    }
}
