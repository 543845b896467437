//! Mirrors Endpoints that people write, for Services without a selector, into EndpointSlices: proxies read only those.

use crate::endpointslice::pack::pack;
use crate::endpointslice::slice::{
    Conditions, Endpoint, EndpointSlice, Head, MANAGED_BY, SERVICE_NAME, TargetRef, Trigger, write,
};
use crate::expectations::{Expectations, PATIENCE, generated_name};
use crate::owners::controller_of;
use crate::plan::{Change, act, is_namespace_terminating};
use crate::service::{EndpointPort, Family, Service};
use crate::{Context, Descriptor, Error};
use api::ObjectExt;
use api::kinds::{ENDPOINT_SLICES, ENDPOINTS, SERVICES};
use api::object::{Key, Metadata};
use reconcile::{Cache, Client, Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "endpointslicemirroring",
    watches: &[ENDPOINTS, SERVICES, ENDPOINT_SLICES],
    writes: &[ENDPOINT_SLICES],
    run: |context| Box::pin(run(context)),
};

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
/// Endpoints with this label are somebody else's to mirror: the endpoints controller's, or the API server's own.
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const ENDPOINTS_MANAGER: &str = "endpoints.kubernetes.io/managed-by";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Endpoints {
    metadata: Metadata,
    subsets: Option<Vec<Subset>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Subset {
    addresses: Vec<Address>,
    not_ready_addresses: Vec<Address>,
    ports: Vec<EndpointPort>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Address {
    ip: String,
    hostname: Option<String>,
    node_name: Option<String>,
    target_ref: Option<TargetRef>,
}

impl Named for Endpoints {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

fn is_mirrored(endpoints: &Endpoints, service: &Service) -> bool {
    let metadata = &endpoints.metadata;
    !service.has_selector()
        && !service.metadata.is_deleting()
        && !metadata.is_deleting()
        && metadata.labels.get(SKIP).is_none_or(|v| v != "true")
        && !metadata.labels.contains_key(ENDPOINTS_MANAGER)
        && !metadata.annotations.contains_key(LEADER)
}

fn endpoint(address: &Address, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Conditions { ready: Some(ready), serving: None, terminating: None },
        hostname: address.hostname.clone().filter(|h| !h.is_empty()),
        target_ref: address.target_ref.clone(),
        node_name: address.node_name.clone().filter(|n| !n.is_empty()),
        zone: None,
        hints: None,
    }
}

/// Endpoints of one family, by the ports they serve. What is no IP address has no slice.
fn groups(endpoints: &Endpoints, family: Family) -> BTreeMap<Vec<EndpointPort>, Vec<Endpoint>> {
    let mut groups: BTreeMap<Vec<EndpointPort>, Vec<Endpoint>> = BTreeMap::new();
    for subset in endpoints.subsets.iter().flatten() {
        let mut ports = subset.ports.clone();
        for port in &mut ports {
            port.name.get_or_insert_default();
            port.protocol.get_or_insert_with(|| "TCP".into());
        }
        for (addresses, ready) in [(&subset.addresses, true), (&subset.not_ready_addresses, false)] {
            let of_family =
                addresses.iter().filter(|a| a.ip.parse::<IpAddr>().is_ok_and(|ip| Family::of(ip) == family));
            let mut mirrored: Vec<_> = of_family.map(|a| endpoint(a, ready)).collect();
            if !mirrored.is_empty() {
                groups.entry(ports.clone()).or_default().append(&mut mirrored);
            }
        }
    }
    groups
}

/// What has to change so that the slices show what the Endpoints say.
fn plan(
    endpoints: Option<&Endpoints>,
    service: Option<&Service>,
    slices: &[Arc<EndpointSlice>],
    mut name: impl FnMut() -> String,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let mirrored = endpoints.zip(service).filter(|(endpoints, service)| is_mirrored(endpoints, service));
    for family in [Family::V4, Family::V6] {
        let of_family = slices.iter().filter(|s| s.address_type == family.as_str() && !s.metadata.is_deleting());
        let existing: Vec<_> = of_family.cloned().collect();
        let groups = mirrored.map(|(endpoints, _)| groups(endpoints, family)).unwrap_or_default();
        let Some((endpoints, _)) = mirrored.filter(|_| !groups.is_empty()) else {
            let delete = |s: &Arc<EndpointSlice>| Change::delete(ENDPOINT_SLICES, s.metadata.key(), &s.metadata.uid);
            changes.extend(existing.iter().map(delete));
            continue;
        };
        let metadata = &endpoints.metadata;
        let mut labels = metadata.labels.clone();
        labels.insert(SERVICE_NAME.into(), metadata.name.clone());
        labels.insert(MANAGED_BY.into(), MANAGER.into());
        let mut annotations = metadata.annotations.clone();
        annotations.remove(LAST_APPLIED);
        let head = Head {
            namespace: metadata.namespace.clone(),
            base: metadata.name.clone(),
            labels,
            annotations: Some(annotations),
            owner: controller_of(&ENDPOINTS, metadata),
            trigger: Trigger::Kept,
        };
        for packed in pack(groups, &existing) {
            changes.extend(write(&head, family, packed, &mut name));
        }
    }
    changes
}

struct Controller {
    client: Client,
    endpoints: Cache<Endpoints>,
    services: Cache<Service>,
    slices: Cache<EndpointSlice>,
    expectations: Arc<Expectations>,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let expectations = Arc::new(Expectations::default());
    let adds = queue.clone();
    let endpoints = feed::<Endpoints, _>(&client, &ENDPOINTS, Scope::all(), &token, move |before, after| {
        if let Some(endpoints) = after.or(before) {
            adds.add(endpoints.metadata.key());
        }
    });
    let adds = queue.clone();
    let services = feed::<Service, _>(&client, &SERVICES, Scope::all(), &token, move |before, after| {
        if let Some(service) = after.or(before) {
            adds.add(service.metadata.key());
        }
    });
    let (adds, seen) = (queue.clone(), expectations.clone());
    let slices = feed::<EndpointSlice, _>(&client, &ENDPOINT_SLICES, Scope::all(), &token, move |before, after| {
        let Some(slice) = after.or(before).filter(|s| s.is_managed_by(MANAGER)) else { return };
        if let Some(service) = slice.service() {
            seen.saw_created(&service, &slice.metadata.name);
            adds.add(service);
        }
    });
    endpoints.synced().await;
    services.synced().await;
    slices.synced().await;
    let controller = Arc::new(Controller { client, endpoints, services, slices, expectations });
    run_queue("endpointslicemirroring", queue, 2, token, move |key: Key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    })
    .await;
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Outcome, Error> {
        if !self.expectations.are_met(key) {
            return Ok(Outcome::After(PATIENCE));
        }
        let (endpoints, service) = (self.endpoints.get(key), self.services.get(key));
        let mut slices = self.slices.list_namespace(&key.namespace);
        slices.retain(|s| s.is_managed_by(MANAGER) && s.metadata.labels.get(SERVICE_NAME) == Some(&key.name));
        let names = || generated_name(&format!("{}-", key.name));
        for change in plan(endpoints.as_deref(), service.as_deref(), &slices, names) {
            let created = match &change {
                Change::Create(_, slice) => Some(slice.name()),
                _ => None,
            };
            if let Some(name) = created {
                self.expectations.expect_created(key, name);
            }
            if let Err(error) = act(&self.client, &change).await {
                if let Some(name) = created {
                    self.expectations.saw_created(key, name);
                }
                if !is_namespace_terminating(&error) {
                    return Err(error.into());
                }
            }
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn who_is_mirrored_and_how() {
        let service = |spec: Value| -> Service {
            serde_json::from_value(json!({"metadata": {"name": "db", "namespace": "default"}, "spec": spec}))
                .expect("a Service")
        };
        let endpoints = |labels: Value| -> Endpoints {
            serde_json::from_value(json!({
                "metadata": {"name": "db", "namespace": "default", "uid": "e", "labels": labels},
                "subsets": [{
                    "addresses": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}],
                    "notReadyAddresses": [{"ip": "192.0.2.2"}],
                    "ports": [{"port": 5432}],
                }],
            }))
            .expect("Endpoints")
        };
        for (title, labels, spec, expected) in [
            ("both families", json!({}), json!({}), vec!["IPv4 2", "IPv6 1"]),
            ("with a selector", json!({}), json!({"selector": {"a": "b"}}), vec![]),
            ("told to skip", json!({SKIP: "true"}), json!({}), vec![]),
            ("kept by our own", json!({ENDPOINTS_MANAGER: "endpoint-controller"}), json!({}), vec![]),
        ] {
            let changes = plan(Some(&endpoints(labels)), Some(&service(spec)), &[], || "db-x".into());
            let line = |c: &Change| match c {
                Change::Create(_, o) => {
                    assert_eq!(o["ports"], json!([{"name": "", "port": 5432, "protocol": "TCP"}]));
                    format!("{} {}", o.text("/addressType"), o["endpoints"].as_array().map_or(0, Vec::len))
                }
                other => format!("{other:?}"),
            };
            assert_eq!(changes.iter().map(line).collect::<Vec<_>>(), expected, "{title}");
        }
        assert!(plan(None, Some(&service(json!({}))), &[], || "db-x".into()).is_empty());
    }
}
