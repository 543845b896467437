//! Which nodes have to have a daemon, and which pods come and go for that.

use crate::amount::int_or_percent;
use crate::nodes::{Node, Taint, Toleration, is_selected};
use crate::owners::controller_of;
use crate::plan::{Change, count};
use crate::pods::Pod;
use crate::revisions::REVISION_LABEL;
use crate::template;
use api::ObjectExt;
use api::kinds::{DAEMON_SETS, PODS};
use api::object::Metadata;
use api::selector::LabelSelectorSpec;
use jiff::Timestamp;
use reconcile::Named;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct DaemonSet {
    pub metadata: Metadata,
    pub spec: Spec,
    pub status: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub selector: LabelSelectorSpec,
    pub template: Value,
    pub update_strategy: Value,
    pub min_ready_seconds: i64,
    pub revision_history_limit: Option<i64>,
}

impl Named for DaemonSet {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// Daemons stay where others must not go. Taints, and whether only pods on the host's network tolerate them.
const TOLERATED: [(&str, &str, bool); 7] = [
    ("node.kubernetes.io/not-ready", "NoExecute", false),
    ("node.kubernetes.io/unreachable", "NoExecute", false),
    ("node.kubernetes.io/disk-pressure", "NoSchedule", false),
    ("node.kubernetes.io/memory-pressure", "NoSchedule", false),
    ("node.kubernetes.io/pid-pressure", "NoSchedule", false),
    ("node.kubernetes.io/unschedulable", "NoSchedule", false),
    ("node.kubernetes.io/network-unavailable", "NoSchedule", true),
];

/// What a DaemonSet wants of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    /// A pod that is there may stay, but none is made.
    Stay,
    Leave,
}

pub struct Seen<'a> {
    pub set: &'a DaemonSet,
    pub nodes: &'a [Arc<Node>],
    /// The pods that belong to the set.
    pub pods: &'a [Arc<Pod>],
    /// The hash of the template as it is now.
    pub hash: &'a str,
    pub now: Timestamp,
}

fn tolerations(set: &DaemonSet) -> Vec<Toleration> {
    let own = set.spec.template.pointer("/spec/tolerations").cloned().unwrap_or_default();
    let mut tolerations: Vec<Toleration> = serde_json::from_value(own).unwrap_or_default();
    let is_on_host = set.spec.template.pointer("/spec/hostNetwork") == Some(&Value::Bool(true));
    let given = TOLERATED.iter().filter(|(_, _, needs_host)| is_on_host || !needs_host);
    tolerations.extend(given.map(|(key, effect, _)| Toleration {
        key: (*key).into(),
        operator: "Exists".into(),
        effect: (*effect).into(),
        ..Toleration::default()
    }));
    tolerations
}

fn wish(set: &DaemonSet, tolerations: &[Toleration], node: &Node) -> Wish {
    let is_tolerated = |taint: &Taint| tolerations.iter().any(|t| t.tolerates(taint));
    let mut taints = node.spec.taints.clone();
    if node.spec.unschedulable {
        taints.push(Taint::new("node.kubernetes.io/unschedulable", "NoSchedule"));
    }
    let refuses = |effect: &str| taints.iter().any(|t| t.effect == effect && !is_tolerated(t));
    let spec = set.spec.template.get("spec").unwrap_or(&Value::Null);
    if !is_selected(spec, node) || refuses("NoExecute") {
        Wish::Leave
    } else if refuses("NoSchedule") {
        Wish::Stay
    } else {
        Wish::Run
    }
}

/// A node's daemons, the newest template's apart from others'.
#[derive(Default)]
struct Daemons {
    new: Vec<Arc<Pod>>,
    old: Vec<Arc<Pod>>,
}

/// The pods to create and delete. `name` gives each new pod its name.
pub fn plan(seen: &Seen<'_>, mut name: impl FnMut() -> String) -> Vec<Change> {
    let set = seen.set;
    if set.metadata.is_deleting() {
        return Vec::new();
    }
    let (tolerations, nothing) = (tolerations(set), Daemons::default());
    let mut by_node: BTreeMap<&str, Daemons> = BTreeMap::new();
    let mut deletions: Vec<&Arc<Pod>> = Vec::new();
    for pod in seen.pods.iter().filter(|p| !p.metadata.is_deleting()) {
        if pod.is_finished() {
            deletions.push(pod);
            continue;
        }
        let daemons = by_node.entry(pod.node()).or_default();
        if is_new(pod, seen.hash) { daemons.new.push(pod.clone()) } else { daemons.old.push(pod.clone()) }
    }
    // A pod that is going still holds its node: the next one waits for its end.
    let going: Vec<&str> = seen.pods.iter().filter(|p| p.metadata.is_deleting()).map(|p| p.node()).collect();
    let wishes: BTreeMap<&str, Wish> =
        seen.nodes.iter().map(|n| (n.metadata.name.as_str(), wish(set, &tolerations, n))).collect();
    let mut creations: Vec<&str> = Vec::new();
    let desired = wishes.values().filter(|w| **w == Wish::Run).count();
    let mut budget = Budget::new(seen, desired, &wishes);
    for (node, wish) in &wishes {
        let daemons = by_node.get(node).unwrap_or(&nothing);
        match wish {
            Wish::Leave => {}
            Wish::Stay => deletions.extend(surplus(daemons)),
            Wish::Run if daemons.new.is_empty() && daemons.old.is_empty() => {
                if !going.contains(node) {
                    creations.push(node);
                }
            }
            Wish::Run => {
                deletions.extend(surplus(daemons));
                if let (Some(old), true) = (daemons.old.first(), budget.is_rolling) {
                    match daemons.new.first() {
                        // The new one has surged beside it; the old one goes when the new one serves.
                        Some(new) if new.is_available(set.spec.min_ready_seconds, seen.now) => deletions.push(old),
                        Some(_) => {}
                        None if !old.is_available(set.spec.min_ready_seconds, seen.now) => deletions.push(old),
                        None if budget.surge > 0 => {
                            budget.surge -= 1;
                            creations.push(node);
                        }
                        None if budget.unavailable > 0 => {
                            budget.unavailable -= 1;
                            deletions.push(old);
                        }
                        None => {}
                    }
                }
            }
        }
    }
    for (node, daemons) in &by_node {
        if wishes.get(node).is_none_or(|w| *w == Wish::Leave) {
            deletions.extend(daemons.new.iter().chain(&daemons.old));
        }
    }
    let mut changes: Vec<Change> =
        deletions.iter().map(|p| Change::delete(PODS, p.metadata.key(), &p.metadata.uid)).collect();
    changes.extend(creations.into_iter().map(|node| Change::Create(PODS, daemon(seen, node, &tolerations, &name()))));
    changes
}

fn is_new(pod: &Pod, hash: &str) -> bool {
    pod.metadata.labels.get(REVISION_LABEL).is_some_and(|label| label == hash)
}

/// More than one of a kind on a node: the ones after the first.
fn surplus(daemons: &Daemons) -> impl Iterator<Item = &Arc<Pod>> {
    daemons.new.iter().skip(1).chain(daemons.old.iter().skip(1))
}

/// How many daemons may be taken down, or doubled, in this step.
struct Budget {
    is_rolling: bool,
    unavailable: i64,
    surge: i64,
}

impl Budget {
    fn new(seen: &Seen<'_>, desired: usize, wishes: &BTreeMap<&str, Wish>) -> Budget {
        let strategy = &seen.set.spec.update_strategy;
        let total = i64::try_from(desired).unwrap_or(i64::MAX);
        let part = |name: &str, default: i64| {
            let value = strategy.pointer(&format!("/rollingUpdate/{name}")).cloned().unwrap_or_else(|| json!(default));
            int_or_percent(&value, total, true)
        };
        let surge = part("maxSurge", 0);
        let unavailable = if surge > 0 { 0 } else { part("maxUnavailable", 1).max(1) };
        let mut down = 0;
        let mut doubled = 0;
        for node in wishes.iter().filter(|(_, w)| **w == Wish::Run).map(|(node, _)| *node) {
            let here: Vec<_> = seen.pods.iter().filter(|p| p.node() == node && p.is_active()).collect();
            let serves = here.iter().any(|p| p.is_available(seen.set.spec.min_ready_seconds, seen.now));
            down += i64::from(!serves);
            doubled += i64::from(here.len() > 1);
        }
        let is_rolling = strategy.text("/type") != "OnDelete";
        Budget { is_rolling, unavailable: (unavailable - down).max(0), surge: (surge - doubled).max(0) }
    }
}

/// The pod for a node: the template, told to be there and nowhere else.
fn daemon(seen: &Seen<'_>, node: &str, tolerations: &[Toleration], name: &str) -> Value {
    let set = seen.set;
    let owner = controller_of(&DAEMON_SETS, &set.metadata);
    let mut pod = template::pod(&set.spec.template, &set.metadata.namespace, name, &owner);
    pod["metadata"]["generateName"] = json!(format!("{}-", set.metadata.name));
    pod["metadata"]["labels"][REVISION_LABEL] = json!(seen.hash);
    pod["spec"]["tolerations"] = json!(tolerations);
    // The scheduler binds it; the affinity leaves it one choice.
    pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = json!({
        "nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}],
    });
    pod
}

/// The status that follows from nodes and pods.
pub fn status(seen: &Seen<'_>) -> Value {
    let set = seen.set;
    let tolerations = tolerations(set);
    let (mut desired, mut current, mut misplaced, mut ready, mut available, mut updated) = (0, 0, 0, 0, 0, 0);
    for node in seen.nodes {
        let here: Vec<_> = seen.pods.iter().filter(|p| p.node() == node.metadata.name && !p.is_finished()).collect();
        if wish(set, &tolerations, node) == Wish::Run {
            desired += 1;
            current += i64::from(!here.is_empty());
            ready += i64::from(here.iter().any(|p| p.is_ready()));
            available += i64::from(here.iter().any(|p| p.is_available(set.spec.min_ready_seconds, seen.now)));
            updated += i64::from(here.iter().any(|p| is_new(p, seen.hash)));
        } else {
            misplaced += i64::from(!here.is_empty());
        }
    }
    json!({
        "desiredNumberScheduled": desired, "currentNumberScheduled": current, "numberMisscheduled": misplaced,
        "numberReady": ready, "numberAvailable": count(available), "numberUnavailable": count(desired - available),
        "updatedNumberScheduled": count(updated), "observedGeneration": set.metadata.generation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(strategy: Value, spec: Value) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": {"name": "d", "namespace": "default", "uid": "d"},
            "spec": {"template": {"metadata": {"labels": {"app": "d"}}, "spec": spec}, "updateStrategy": strategy},
        }))
        .expect("the case is a DaemonSet")
    }

    fn node(name: &str, spec: Value) -> Arc<Node> {
        let value = json!({"metadata": {"name": name, "labels": {"name": name}}, "spec": spec});
        Arc::new(serde_json::from_value(value).expect("the case is a node"))
    }

    fn pod(name: &str, node: &str, hash: &str, ready: &str) -> Arc<Pod> {
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {REVISION_LABEL: hash}},
            "spec": {"nodeName": node},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
        });
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    fn lines(set: &DaemonSet, nodes: &[Arc<Node>], pods: &[Arc<Pod>]) -> Vec<String> {
        let seen = Seen { set, nodes, pods, hash: "new", now: Timestamp::UNIX_EPOCH };
        let line = |change: &Change| match change {
            Change::Create(_, pod) => {
                let pod: Pod = serde_json::from_value(pod.clone()).expect("what is made can be read");
                format!("+{}", pod.node())
            }
            Change::Delete(_, key, _) => format!("-{}", key.name),
            other => format!("{other:?}"),
        };
        plan(&seen, || "d-x".into()).iter().map(line).collect()
    }

    #[test]
    fn one_on_every_node_that_may_have_it() {
        let tainted = json!({"taints": [{"key": "a", "value": "b", "effect": "NoSchedule"}]});
        let drained = json!({"taints": [{"key": "a", "value": "b", "effect": "NoExecute"}]});
        let cordoned = json!({"unschedulable": true});
        let nodes = [node("n1", json!({})), node("n2", tainted), node("n3", cordoned), node("n4", drained)];
        let plain = set(json!({}), json!({}));
        assert_eq!(lines(&plain, &nodes, &[]), ["+n1", "+n3"]);
        let everywhere: Vec<_> = ["n1", "n2", "n3", "n4", "gone"].map(|n| pod(n, n, "new", "True")).into();
        assert_eq!(lines(&plain, &nodes, &everywhere), ["-gone", "-n4"]);
        let picky = set(json!({}), json!({"nodeSelector": {"name": "n3"}}));
        assert_eq!(lines(&picky, &nodes, &[]), ["+n3"]);
        let twice = [pod("a", "n1", "new", "True"), pod("b", "n1", "new", "True"), pod("c", "n3", "new", "True")];
        assert_eq!(lines(&plain, &nodes, &twice), ["-b"]);
    }

    #[test]
    fn updates_node_by_node() {
        let nodes = ["n1", "n2", "n3"].map(|n| node(n, json!({})));
        let old = |n: &str, ready: &str| pod(n, n, "old", ready);
        let new = |n: &str, ready: &str| pod(&format!("{n}-new"), n, "new", ready);
        let rolling = set(json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}), json!({}));
        let surging =
            set(json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}), json!({}));
        let waiting = set(json!({"type": "OnDelete"}), json!({}));
        let all_old = [old("n1", "True"), old("n2", "True"), old("n3", "True")];
        let one_down = [old("n1", "True"), old("n2", "True"), new("n3", "False")];
        let one_sick = [old("n1", "True"), old("n2", "False"), new("n3", "True")];
        let doubled = [old("n1", "True"), new("n1", "False"), old("n2", "True"), old("n3", "True")];
        let done = [old("n1", "True"), new("n1", "True"), old("n2", "True"), old("n3", "True")];
        for (title, set, pods, expected) in [
            ("the first", &rolling, &all_old[..], vec!["-n1"]),
            ("until the new one serves", &rolling, &one_down[..], vec![]),
            ("what does not serve goes freely", &rolling, &one_sick[..], vec!["-n2"]),
            ("surge", &surging, &all_old[..], vec!["+n1"]),
            ("one surge at a time", &surging, &doubled[..], vec![]),
            ("the old one goes when the new one serves", &surging, &done[..], vec!["-n1"]),
            ("only when deleted", &waiting, &all_old[..], vec![]),
        ] {
            assert_eq!(lines(set, &nodes, pods), expected, "{title}");
        }
    }
}
