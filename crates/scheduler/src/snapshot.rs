//! The cluster as the scheduler sees it: nodes, the pods on them, and what those have taken.

use crate::objects::{Amounts, Namespace, Node, Pod, Service};
use api::LabelSelector;
use api::object::Key;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Default)]
pub struct Snapshot {
    nodes: BTreeMap<String, NodeInfo>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    services: BTreeMap<Key, LabelSelector>,
    /// Where each assigned pod is.
    places: BTreeMap<Key, String>,
    /// Pods that keep others away, with their nodes.
    repelling: BTreeMap<Key, Arc<Pod>>,
}

/// A node and what is on it.
#[derive(Debug, Default)]
pub struct NodeInfo {
    // A pod may be seen before its node is.
    node: Option<Arc<Node>>,
    pub pods: BTreeMap<Key, Arc<Pod>>,
    pub used: Amounts,
    /// CPU thousandths and bytes of memory, as scores count them: a pod that asks for nothing still takes something.
    pub weight: (i64, i64),
}

/// What a pod without a request is counted as: a tenth of a CPU and 200 MiB.
const UNASKED: (i64, i64) = (100, 200 * 1024 * 1024);

/// CPU thousandths and bytes of memory of a pod as scores count them.
pub fn weight(pod: &Pod) -> (i64, i64) {
    let requests = pod.requests();
    let amount = |name: &str, unasked: i64| requests.get(name).copied().filter(|a| *a > 0).unwrap_or(unasked);
    (amount("cpu", UNASKED.0), amount("memory", UNASKED.1))
}

impl NodeInfo {
    /// The node; only those with one are given out.
    pub fn node(&self) -> &Node {
        self.node.as_deref().expect("a snapshot gives out nodes that are there")
    }

    pub fn name(&self) -> &str {
        &self.node().metadata.name
    }

    pub fn label(&self, key: &str) -> Option<&str> {
        self.node().metadata.labels.get(key).map(String::as_str)
    }

    pub fn allocatable(&self, resource: &str) -> i64 {
        self.node().status.allocatable.get(resource).copied().unwrap_or(0)
    }

    fn take(&mut self, pod: &Pod, sign: i64) {
        for (name, amount) in pod.requests() {
            *self.used.entry(name).or_default() += sign * amount;
        }
        let (cpu, memory) = weight(pod);
        self.weight.0 += sign * cpu;
        self.weight.1 += sign * memory;
    }
}

impl Snapshot {
    /// In order of name.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.values().filter(|n| n.node.is_some())
    }

    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.nodes.get(name).filter(|n| n.node.is_some())
    }

    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = node.metadata.name.clone();
        self.nodes.entry(name).or_default().node = Some(node);
    }

    pub fn remove_node(&mut self, name: &str) {
        if let Some(info) = self.nodes.get_mut(name) {
            info.node = None;
            if info.pods.is_empty() {
                self.nodes.remove(name);
            }
        }
    }

    /// Puts a pod on a node, in place of what was known of it.
    pub fn place(&mut self, pod: Arc<Pod>, node: &str) {
        let key = pod.metadata.key();
        self.remove_pod(&key);
        let info = self.nodes.entry(node.into()).or_default();
        info.take(&pod, 1);
        if !pod.spec.affinity.pod_anti_affinity.required.is_empty() {
            self.repelling.insert(key.clone(), pod.clone());
        }
        info.pods.insert(key.clone(), pod);
        self.places.insert(key, node.into());
    }

    pub fn remove_pod(&mut self, key: &Key) {
        self.repelling.remove(key);
        let Some(node) = self.places.remove(key) else { return };
        let Some(info) = self.nodes.get_mut(&node) else { return };
        if let Some(pod) = info.pods.remove(key) {
            info.take(&pod, -1);
        }
        if info.pods.is_empty() && info.node.is_none() {
            self.nodes.remove(&node);
        }
    }

    pub fn place_of(&self, key: &Key) -> Option<&str> {
        self.places.get(key).map(String::as_str)
    }

    pub fn set_namespace(&mut self, namespace: &Namespace) {
        self.namespaces.insert(namespace.metadata.name.clone(), namespace.metadata.labels.clone());
    }

    pub fn remove_namespace(&mut self, name: &str) {
        self.namespaces.remove(name);
    }

    pub fn namespace_labels(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        self.namespaces.get(name)
    }

    pub fn set_service(&mut self, service: &Service) {
        let key = service.metadata.key();
        if service.spec.selector.is_empty() {
            self.services.remove(&key);
        } else {
            self.services.insert(key, LabelSelector::from_map(&service.spec.selector));
        }
    }

    pub fn remove_service(&mut self, key: &Key) {
        self.services.remove(key);
    }

    /// Selectors of the Services that a pod is behind.
    pub fn services_of(&self, pod: &Pod) -> Vec<&LabelSelector> {
        let namespace = pod.metadata.namespace.as_str();
        let near = self.services.range(Key::new(namespace, "")..).take_while(|(key, _)| key.namespace == namespace);
        near.map(|(_, selector)| selector).filter(|s| s.matches_map(&pod.metadata.labels)).collect()
    }

    /// Pods with required anti-affinity, each with its node.
    pub fn repelling(&self) -> impl Iterator<Item = (&Pod, &NodeInfo)> {
        self.repelling.iter().filter_map(move |(key, pod)| Some((pod.as_ref(), self.node(self.place_of(key)?)?)))
    }
}
