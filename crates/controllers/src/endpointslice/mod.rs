//! Keeps the EndpointSlices of each Service with a selector.
//!
//! `slice` is the object, `hints` says which zone or node an endpoint is meant for, `pack` spreads endpoints over
//! slices with few writes; this file decides what a Service's endpoints are, and acts.

pub mod hints;
pub mod pack;
pub mod slice;
#[cfg(test)]
mod tests;
pub mod trigger;

use crate::expectations::{Expectations, PATIENCE, generated_name};
use crate::owners::controller_of;
use crate::plan::{Change, act, is_namespace_terminating};
use crate::service::{Backend, EndpointPort, Family, HEADLESS, Service, queue_services_of};
use crate::{Context, Descriptor, Error};
use api::ObjectExt;
use api::kinds::{ENDPOINT_SLICES, NODES, PODS, SERVICES};
use api::object::{Key, Metadata};
use hints::Topology;
use jiff::Timestamp;
use reconcile::{Cache, Client, Named, Outcome, Queue, Scope, feed, run_queue};
use serde::Deserialize;
use slice::{Conditions, Endpoint, EndpointSlice, Head, MANAGED_BY, SERVICE_NAME, TargetRef, Trigger};
use std::collections::BTreeMap;
use std::sync::Arc;
use trigger::Triggers;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "endpointslice",
    watches: &[SERVICES, PODS, NODES, ENDPOINT_SLICES],
    writes: &[ENDPOINT_SLICES],
    run: |context| Box::pin(run(context)),
};

/// Who manages a slice, as its label says.
const MANAGER: &str = "endpointslice-controller.k8s.io";

/// What endpoints need to know of nodes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    pub metadata: Metadata,
    pub status: NodeStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    pub allocatable: BTreeMap<String, String>,
}

impl Named for Node {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Node {
    pub fn zone(&self) -> Option<&str> {
        self.metadata.labels.get("topology.kubernetes.io/zone").map(String::as_str)
    }

    pub fn milli_cpu(&self) -> i64 {
        let cpu = self.status.allocatable.get("cpu");
        cpu.and_then(|c| c.parse::<api::Quantity>().ok()).map_or(0, |q| q.milli())
    }
}

fn endpoint(service: &Service, pod: &Backend, family: Family, nodes: &BTreeMap<String, Arc<Node>>) -> Option<Endpoint> {
    if !pod.is_addressable() {
        return None;
    }
    let (serving, terminating) = (pod.is_ready(), pod.is_terminating());
    let ready = service.spec.publish_not_ready_addresses || (serving && !terminating);
    let metadata = &pod.metadata;
    Some(Endpoint {
        addresses: vec![pod.address(family)?.to_string()],
        conditions: Conditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) },
        hostname: pod.hostname_for(service).map(String::from),
        target_ref: Some(TargetRef {
            kind: "Pod".into(),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
        }),
        node_name: Some(pod.spec.node_name.clone()).filter(|n| !n.is_empty()),
        zone: nodes.get(&pod.spec.node_name).and_then(|n| n.zone()).map(String::from),
        hints: None,
    })
}

/// What a Service's slices are decided from.
pub struct Seen<'a> {
    pub service: &'a Service,
    /// The pods it selects.
    pub pods: &'a [Arc<Backend>],
    pub nodes: &'a BTreeMap<String, Arc<Node>>,
    /// Its slices that are ours.
    pub slices: &'a [Arc<EndpointSlice>],
    /// When what has changed now began to.
    pub trigger: Option<Timestamp>,
}

/// What has to change so that the slices show the pods behind the Service. `name` gives a new slice its name.
pub fn plan(seen: &Seen<'_>, mut name: impl FnMut() -> String) -> Vec<Change> {
    let service = seen.service;
    if service.metadata.is_deleting() || (!service.has_selector() && !service.is_external_name()) {
        return Vec::new();
    }
    let families = if service.is_external_name() { Vec::new() } else { service.families() };
    let head = Head {
        namespace: service.metadata.namespace.clone(),
        base: service.metadata.name.clone(),
        labels: labels(service),
        annotations: None,
        owner: controller_of(&SERVICES, &service.metadata),
        trigger: Trigger::At(seen.trigger),
    };
    let mut changes = Vec::new();
    for family in &families {
        let mut groups: BTreeMap<Vec<EndpointPort>, Vec<Endpoint>> = BTreeMap::new();
        for pod in seen.pods {
            let Some(endpoint) = endpoint(service, pod, *family, seen.nodes) else { continue };
            let ports = pod.ports_for(service);
            // A pod that serves none of the Service's ports is no endpoint of it.
            if !ports.is_empty() || service.spec.ports.is_empty() {
                groups.entry(ports).or_default().push(endpoint);
            }
        }
        hints::give(Topology::of(service), groups.values_mut().flatten(), seen.nodes);
        let of_family = seen.slices.iter().filter(|s| s.address_type == family.as_str() && !s.metadata.is_deleting());
        let existing: Vec<_> = of_family.cloned().collect();
        for packed in pack::pack(groups, &existing) {
            changes.extend(slice::write(&head, *family, packed, &mut name));
        }
    }
    for slice in seen.slices {
        if !families.iter().any(|f| f.as_str() == slice.address_type) {
            changes.push(Change::delete(ENDPOINT_SLICES, slice.metadata.key(), &slice.metadata.uid));
        }
    }
    changes
}

/// Labels of a Service's slices: its own, and who, whose and how.
fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone();
    labels.insert(SERVICE_NAME.into(), service.metadata.name.clone());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if service.is_headless() {
        labels.insert(HEADLESS.into(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    labels
}

struct Controller {
    client: Client,
    services: Cache<Service>,
    pods: Cache<Backend>,
    nodes: Cache<Node>,
    slices: Cache<EndpointSlice>,
    expectations: Arc<Expectations>,
    triggers: Triggers,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let expectations = Arc::new(Expectations::default());
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
    let (adds, known) = (queue.clone(), services.clone());
    let nodes = feed::<Node, _>(&client, &NODES, Scope::all(), &token, move |before, after| {
        let facts = |node: Option<&Arc<Node>>| node.map(|n| (n.zone().map(String::from), n.milli_cpu()));
        if facts(before) != facts(after) {
            known.list().iter().filter(|s| s.has_selector()).for_each(|s| adds.add(s.metadata.key()));
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
    services.synced().await;
    pods.synced().await;
    nodes.synced().await;
    slices.synced().await;
    let triggers = Triggers::default();
    let controller = Arc::new(Controller { client, services, pods, nodes, slices, expectations, triggers });
    run_queue("endpointslice", queue, 4, token, move |key: Key| {
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
        let mut slices = self.slices.list_namespace(&key.namespace);
        slices.retain(|s| s.is_managed_by(MANAGER) && s.metadata.labels.get(SERVICE_NAME) == Some(&key.name));
        let Some(service) = self.services.get(key) else {
            self.expectations.forget(key);
            self.triggers.forget(key);
            for slice in slices {
                act(&self.client, &Change::delete(ENDPOINT_SLICES, slice.metadata.key(), &slice.metadata.uid)).await?;
            }
            return Ok(Outcome::Done);
        };
        let (selector, mut pods) = (service.selector(), Vec::new());
        if service.has_selector() {
            pods = self.pods.list_namespace(&key.namespace);
            pods.retain(|p| selector.matches_map(&p.metadata.labels));
        }
        let nodes: BTreeMap<_, _> = self.nodes.list().into_iter().map(|n| (n.metadata.name.clone(), n)).collect();
        let trigger = self.triggers.look(&service, &pods);
        let seen = Seen { service: &service, pods: &pods, nodes: &nodes, slices: &slices, trigger };
        for change in plan(&seen, || generated_name(&format!("{}-", key.name))) {
            self.write(key, &change).await?;
        }
        Ok(Outcome::Done)
    }

    async fn write(&self, key: &Key, change: &Change) -> Result<(), Error> {
        let Change::Create(_, slice) = change else {
            act(&self.client, change).await?;
            return Ok(());
        };
        self.expectations.expect_created(key, slice.name());
        if let Err(error) = act(&self.client, change).await {
            self.expectations.saw_created(key, slice.name());
            if !is_namespace_terminating(&error) {
                return Err(error.into());
            }
        }
        Ok(())
    }
}
