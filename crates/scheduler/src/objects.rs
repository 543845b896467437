//! What the scheduler reads of pods, nodes, namespaces and Services.

use api::object::Metadata;
use api::selector::{LabelSelectorSpec, Operator, Requirement};
use api::{LabelSelector, Quantity};
use reconcile::Named;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// Amounts by resource: CPU in thousandths, all else in whole units.
pub type Amounts = BTreeMap<String, i64>;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub metadata: Metadata,
    pub spec: PodSpec,
    pub status: PodStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    pub node_name: String,
    pub scheduler_name: String,
    pub node_selector: BTreeMap<String, String>,
    pub affinity: Affinity,
    pub tolerations: Vec<Toleration>,
    pub containers: Vec<Container>,
    pub init_containers: Vec<Container>,
    pub overhead: BTreeMap<String, String>,
    pub topology_spread_constraints: Vec<SpreadConstraint>,
    pub scheduling_gates: Vec<Gate>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    pub phase: String,
    pub conditions: Vec<PodCondition>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodCondition {
    pub r#type: String,
    pub status: String,
    pub reason: String,
    pub message: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Gate {
    pub name: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    pub restart_policy: String,
    pub resources: Resources,
    pub ports: Vec<ContainerPort>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Resources {
    pub requests: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    pub host_port: i64,
    #[serde(rename = "hostIP")]
    pub host_ip: String,
    pub protocol: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Affinity {
    pub node_affinity: NodeAffinity,
    pub pod_affinity: PodAffinity,
    pub pod_anti_affinity: PodAffinity,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeAffinity {
    #[serde(rename = "requiredDuringSchedulingIgnoredDuringExecution")]
    pub required: Option<NodeSelector>,
    #[serde(rename = "preferredDuringSchedulingIgnoredDuringExecution")]
    pub preferred: Vec<PreferredNode>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeSelector {
    pub node_selector_terms: Vec<NodeTerm>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PreferredNode {
    pub weight: i64,
    pub preference: NodeTerm,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeTerm {
    pub match_expressions: Vec<NodeRequirement>,
    pub match_fields: Vec<NodeRequirement>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeRequirement {
    pub key: String,
    pub operator: String,
    pub values: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodAffinity {
    #[serde(rename = "requiredDuringSchedulingIgnoredDuringExecution")]
    pub required: Vec<PodTerm>,
    #[serde(rename = "preferredDuringSchedulingIgnoredDuringExecution")]
    pub preferred: Vec<PreferredPod>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PreferredPod {
    pub weight: i64,
    pub pod_affinity_term: PodTerm,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodTerm {
    #[serde(deserialize_with = "selector")]
    pub label_selector: Option<LabelSelector>,
    #[serde(deserialize_with = "selector")]
    pub namespace_selector: Option<LabelSelector>,
    pub namespaces: Vec<String>,
    pub topology_key: String,
    pub match_label_keys: Vec<String>,
    pub mismatch_label_keys: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Toleration {
    pub key: String,
    pub operator: String,
    pub value: String,
    pub effect: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SpreadConstraint {
    pub max_skew: i64,
    pub topology_key: String,
    pub when_unsatisfiable: String,
    #[serde(deserialize_with = "selector")]
    pub label_selector: Option<LabelSelector>,
    pub min_domains: Option<i64>,
    pub node_affinity_policy: Option<String>,
    pub node_taints_policy: Option<String>,
    pub match_label_keys: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    pub metadata: Metadata,
    pub spec: NodeSpec,
    pub status: NodeStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    pub unschedulable: bool,
    pub taints: Vec<Taint>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Taint {
    pub key: String,
    pub value: String,
    pub effect: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    #[serde(deserialize_with = "amounts")]
    pub allocatable: Amounts,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    pub metadata: Metadata,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub metadata: Metadata,
    pub spec: ServiceSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ServiceSpec {
    pub selector: BTreeMap<String, String>,
}

impl Named for Pod {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for Node {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for Namespace {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for Service {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// An absent selector selects nothing, an empty one everything.
fn selector<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<LabelSelector>, D::Error> {
    let spec = Option::<LabelSelectorSpec>::deserialize(deserializer)?;
    // The API server refuses unknown operators. A selector that got past another server must not stop all scheduling:
    // it selects nothing.
    let nothing =
        || LabelSelector { requirements: vec![Requirement { key: String::new(), operator: Operator::In(Vec::new()) }] };
    Ok(spec.map(|spec| LabelSelector::from_spec(&spec).unwrap_or_else(|_| nothing())))
}

fn amounts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Amounts, D::Error> {
    let texts = BTreeMap::<String, String>::deserialize(deserializer)?;
    Ok(parsed(&texts))
}

fn parsed(texts: &BTreeMap<String, String>) -> Amounts {
    let amount = |(name, text): (&String, &String)| {
        let quantity: Quantity = text.parse().ok()?;
        Some((name.clone(), if name == "cpu" { quantity.milli() } else { quantity.value() }))
    };
    texts.iter().filter_map(amount).collect()
}

fn add(total: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        *total.entry(name.clone()).or_default() += amount;
    }
}

impl Pod {
    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// What the pod needs of a node: its containers and sidecars together, or what its greediest init container
    /// needs, whichever is more, and its overhead.
    pub fn requests(&self) -> Amounts {
        let of = |container: &Container| parsed(&container.resources.requests);
        let mut running = Amounts::new();
        self.spec.containers.iter().for_each(|c| add(&mut running, &of(c)));
        let (mut sidecars, mut greediest) = (Amounts::new(), Amounts::new());
        for container in &self.spec.init_containers {
            let mut during = of(container);
            if container.restart_policy == "Always" {
                add(&mut running, &during);
                add(&mut sidecars, &during);
                during = sidecars.clone();
            } else {
                add(&mut during, &sidecars);
            }
            raise(&mut greediest, &during);
        }
        raise(&mut running, &greediest);
        add(&mut running, &parsed(&self.spec.overhead));
        running
    }

    pub fn host_ports(&self) -> impl Iterator<Item = &ContainerPort> {
        let sidecars = self.spec.init_containers.iter().filter(|c| c.restart_policy == "Always");
        self.spec.containers.iter().chain(sidecars).flat_map(|c| &c.ports).filter(|p| p.host_port > 0)
    }

    pub fn tolerates(&self, taint: &Taint) -> bool {
        self.spec.tolerations.iter().any(|t| t.tolerates(taint))
    }

    /// Whether the pods around it decide where this one may go.
    pub fn wants_company(&self) -> bool {
        let affinity = &self.spec.affinity;
        !affinity.pod_affinity.required.is_empty()
            || !affinity.pod_anti_affinity.required.is_empty()
            || !self.spec.topology_spread_constraints.is_empty()
    }
}

fn raise(most: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let entry = most.entry(name.clone()).or_default();
        *entry = (*entry).max(*amount);
    }
}

impl Toleration {
    fn tolerates(&self, taint: &Taint) -> bool {
        (self.effect.is_empty() || self.effect == taint.effect)
            && (self.key.is_empty() || self.key == taint.key)
            && match self.operator.as_str() {
                "Exists" => true,
                "" | "Equal" => self.value == taint.value,
                _ => false,
            }
    }
}

impl NodeSelector {
    /// Terms are alternatives; without any, no node is meant.
    pub fn matches(&self, node: &Node) -> bool {
        self.node_selector_terms.iter().any(|term| term.matches(node))
    }
}

impl NodeTerm {
    /// An empty term means no node.
    pub fn matches(&self, node: &Node) -> bool {
        let is_empty = self.match_expressions.is_empty() && self.match_fields.is_empty();
        let label = |key: &str| node.metadata.labels.get(key).map(String::as_str);
        let field = |key: &str| (key == "metadata.name").then_some(node.metadata.name.as_str());
        !is_empty
            && self.match_expressions.iter().all(|r| r.matches(label(&r.key)))
            && self.match_fields.iter().all(|r| r.matches(field(&r.key)))
    }
}

impl NodeRequirement {
    fn matches(&self, value: Option<&str>) -> bool {
        let is_listed = value.is_some_and(|v| self.values.iter().any(|w| w == v));
        let compare = |holds: fn(i64, i64) -> bool| {
            let bound = self.values.first().and_then(|v| v.parse().ok());
            value.and_then(|v| v.parse().ok()).zip(bound).is_some_and(|(v, b)| holds(v, b))
        };
        match self.operator.as_str() {
            "In" => is_listed,
            "NotIn" => !is_listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            "Gt" => compare(|v, b| v > b),
            "Lt" => compare(|v, b| v < b),
            _ => false,
        }
    }
}
