//! Pods with a place in a row: who is made, who is deleted, in which order.

use crate::owners::controller_of;
use crate::plan::{Change, count};
use crate::pods::Pod;
use crate::revisions::REVISION_LABEL;
use crate::template;
use api::ObjectExt;
use api::Resource;
use api::kinds::{PODS, STATEFUL_SETS};
use api::object::Metadata;
use api::selector::LabelSelectorSpec;
use jiff::Timestamp;
use reconcile::Named;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

pub const CLAIMS: Resource = Resource {
    group: "",
    version: "v1",
    plural: "persistentvolumeclaims",
    kind: "PersistentVolumeClaim",
    namespaced: true,
};

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct StatefulSet {
    pub metadata: Metadata,
    pub spec: Spec,
    pub status: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub replicas: Option<i64>,
    pub selector: LabelSelectorSpec,
    pub service_name: String,
    pub template: Value,
    pub volume_claim_templates: Vec<Value>,
    pub pod_management_policy: String,
    pub update_strategy: Value,
    pub min_ready_seconds: i64,
    pub revision_history_limit: Option<i64>,
    pub ordinals: Ordinals,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Ordinals {
    pub start: i64,
}

impl Named for StatefulSet {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// A revision that pods are made of: its name, which is on them as a label, and its template.
pub struct Revision {
    pub name: String,
    pub template: Value,
}

pub struct Seen<'a> {
    pub set: &'a StatefulSet,
    /// The pods that belong to the set.
    pub pods: &'a [Arc<Pod>],
    /// What pods below the partition are made of.
    pub current: &'a Revision,
    /// What the others are made of.
    pub update: &'a Revision,
    pub now: Timestamp,
}

/// `2` of `web-2`, if the set is `web`.
fn ordinal(set: &StatefulSet, pod: &Pod) -> Option<i64> {
    let rest = pod.metadata.name.strip_prefix(&set.metadata.name)?.strip_prefix('-')?;
    let number: i64 = rest.parse().ok()?;
    (number >= 0 && number.to_string() == rest).then_some(number)
}

impl Seen<'_> {
    fn places(&self) -> std::ops::Range<i64> {
        let start = self.set.spec.ordinals.start;
        start..start + self.set.spec.replicas.unwrap_or(1).max(0)
    }

    fn is_healthy(&self, pod: &Pod) -> bool {
        pod.is_active() && pod.is_available(self.set.spec.min_ready_seconds, self.now)
    }

    fn partition(&self) -> i64 {
        let partition = self.set.spec.update_strategy.pointer("/rollingUpdate/partition").and_then(Value::as_i64);
        self.set.spec.ordinals.start + partition.unwrap_or(0)
    }
}

/// The next writes: in order one pod at a time, each waiting for the one before; in parallel all at once.
pub fn plan(seen: &Seen<'_>) -> Vec<Change> {
    let set = seen.set;
    if set.metadata.is_deleting() {
        return Vec::new();
    }
    let is_ordered = set.spec.pod_management_policy != "Parallel";
    let by_ordinal: BTreeMap<i64, &Arc<Pod>> = seen.pods.iter().filter_map(|p| Some((ordinal(set, p)?, p))).collect();
    let mut changes = Vec::new();
    for place in seen.places() {
        match by_ordinal.get(&place) {
            None => {
                changes.extend(claims(set, place).into_iter().map(|claim| Change::Create(CLAIMS, claim)));
                changes.push(Change::Create(PODS, pod(seen, place)));
            }
            // A pod that ended for good makes room for itself first.
            Some(pod) if pod.is_finished() && !pod.metadata.is_deleting() => changes.push(delete(pod)),
            Some(pod) if seen.is_healthy(pod) => continue,
            Some(_) => {}
        }
        if is_ordered {
            return changes;
        }
    }
    let condemned = by_ordinal.iter().rev().filter(|(place, _)| !seen.places().contains(*place));
    for (_, pod) in condemned {
        if !pod.metadata.is_deleting() {
            changes.push(delete(pod));
        }
        if is_ordered {
            return changes;
        }
    }
    if !changes.is_empty() || set.spec.update_strategy.text("/type") == "OnDelete" {
        return changes;
    }
    // The last first, one at a time, each back in service before the next.
    for (place, pod) in by_ordinal.iter().rev() {
        if *place < seen.partition() {
            break;
        }
        let is_updated = revision(pod) == seen.update.name;
        if !is_updated && !pod.metadata.is_deleting() {
            changes.push(delete(pod));
            break;
        }
        if !seen.is_healthy(pod) {
            break;
        }
    }
    changes
}

fn delete(pod: &Pod) -> Change {
    Change::delete(PODS, pod.metadata.key(), &pod.metadata.uid)
}

fn revision(pod: &Pod) -> &str {
    pod.metadata.labels.get(REVISION_LABEL).map(String::as_str).unwrap_or_default()
}

fn claim_name(set: &StatefulSet, template: &Value, place: i64) -> String {
    format!("{}-{}-{place}", template.name(), set.metadata.name)
}

/// The claims that a pod's volumes are. They outlive it.
fn claims(set: &StatefulSet, place: i64) -> Vec<Value> {
    let claim = |template: &Value| {
        let mut labels = json!(template.pointer("/metadata/labels").cloned().unwrap_or_else(|| json!({})));
        if let Some(labels) = labels.as_object_mut() {
            for (key, value) in &set.spec.selector.match_labels {
                labels.insert(key.clone(), json!(value));
            }
        }
        json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {
                "name": claim_name(set, template, place), "namespace": set.metadata.namespace, "labels": labels,
                "annotations": template.pointer("/metadata/annotations").cloned().unwrap_or_else(|| json!({})),
            },
            "spec": template["spec"],
        })
    };
    set.spec.volume_claim_templates.iter().map(claim).collect()
}

/// The pod of a place: its name is its place, its host name is its name, its claims are its volumes.
fn pod(seen: &Seen<'_>, place: i64) -> Value {
    let set = seen.set;
    let is_rolling = set.spec.update_strategy.text("/type") != "OnDelete";
    let of = if is_rolling && place < seen.partition() { seen.current } else { seen.update };
    let name = format!("{}-{place}", set.metadata.name);
    let owner = controller_of(&STATEFUL_SETS, &set.metadata);
    let mut pod = template::pod(&of.template, &set.metadata.namespace, &name, &owner);
    pod["metadata"]["generateName"] = json!(format!("{}-", set.metadata.name));
    let labels = &mut pod["metadata"]["labels"];
    labels["statefulset.kubernetes.io/pod-name"] = json!(name);
    labels["apps.kubernetes.io/pod-index"] = json!(place.to_string());
    labels[REVISION_LABEL] = json!(of.name);
    let spec = &mut pod["spec"];
    spec["hostname"] = json!(name);
    if !set.spec.service_name.is_empty() {
        spec["subdomain"] = json!(set.spec.service_name);
    }
    let templates = &set.spec.volume_claim_templates;
    if !templates.is_empty() {
        let own = spec["volumes"].as_array().cloned().unwrap_or_default();
        let is_own =
            |volume: &Value| !templates.iter().any(|t| t.name() == volume["name"].as_str().unwrap_or_default());
        let mut volumes: Vec<Value> = own.into_iter().filter(is_own).collect();
        volumes.extend(templates.iter().map(|template| {
            json!({
                "name": template.name(),
                "persistentVolumeClaim": {"claimName": claim_name(set, template, place)},
            })
        }));
        spec["volumes"] = json!(volumes);
    }
    pod
}

/// The status that follows from the pods.
pub fn status(seen: &Seen<'_>) -> Value {
    let set = seen.set;
    let number = |holds: &dyn Fn(&Pod) -> bool| {
        let there = seen.pods.iter().filter(|p| ordinal(set, p).is_some() && !p.is_finished());
        i64::try_from(there.filter(|p| holds(p)).count()).unwrap_or(i64::MAX)
    };
    let replicas = number(&|_| true);
    let ready = number(&Pod::is_ready);
    let updated = number(&|p| revision(p) == seen.update.name && !p.metadata.is_deleting());
    let wanted = set.spec.replicas.unwrap_or(1);
    // An update is over when all pods are of it and serve; from then on it is what the set is.
    let is_over = updated == wanted && ready == wanted && replicas == wanted;
    let current = if is_over { &seen.update.name } else { &seen.current.name };
    json!({
        "replicas": replicas, "readyReplicas": count(ready),
        "availableReplicas": number(&|p| seen.is_healthy(p)),
        "currentReplicas": count(number(&|p| revision(p) == current && !p.metadata.is_deleting())),
        "updatedReplicas": count(updated),
        "currentRevision": current, "updateRevision": seen.update.name,
        "observedGeneration": set.metadata.generation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(extra: Value) -> StatefulSet {
        let mut value = json!({
            "metadata": {"name": "db", "namespace": "default", "uid": "s"},
            "spec": {"replicas": 3, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}}},
        });
        if let (Some(target), Some(fields)) = (value["spec"].as_object_mut(), extra.as_object()) {
            target.extend(fields.clone());
        }
        serde_json::from_value(value).expect("the case is a StatefulSet")
    }

    /// `0 ready new`: the place, then `ready`, `unready`, `going` or `failed`, then the revision.
    fn pod(text: &str) -> Arc<Pod> {
        let mut words = text.split(' ');
        let (place, state, revision) =
            (words.next().unwrap_or("0"), words.next().unwrap_or("ready"), words.next().unwrap_or("new"));
        let deleted = (state == "going").then_some("2026-01-01T00:00:00Z");
        let value = json!({
            "metadata": {"name": format!("db-{place}"), "namespace": "default", "uid": place, "deletionTimestamp": deleted,
                "labels": {REVISION_LABEL: revision}},
            "status": {
                "phase": if state == "failed" { "Failed" } else { "Running" },
                "conditions": [{"type": "Ready", "status": if state == "ready" { "True" } else { "False" }}],
            },
        });
        Arc::new(serde_json::from_value(value).expect("the case is a pod"))
    }

    fn lines(set: &StatefulSet, pods: &[&str]) -> Vec<String> {
        let pods: Vec<_> = pods.iter().map(|p| super::tests::pod(p)).collect();
        let template = |image: &str| json!({"spec": {"containers": [{"name": "db", "image": image}]}});
        let current = Revision { name: "old".into(), template: template("old") };
        let update = Revision { name: "new".into(), template: template("new") };
        let seen = Seen { set, pods: &pods, current: &current, update: &update, now: Timestamp::UNIX_EPOCH };
        let line = |change: &Change| match change {
            Change::Create(r, o) if r.kind == "Pod" => format!("+{} {}", o.name(), o.text("/spec/containers/0/image")),
            Change::Create(_, o) => format!("+{}", o.name()),
            Change::Delete(_, key, _) => format!("-{}", key.name),
            other => format!("{other:?}"),
        };
        plan(&seen).iter().map(line).collect()
    }

    #[test]
    fn one_after_the_other() {
        let plain = set(json!({}));
        let parallel = set(json!({"podManagementPolicy": "Parallel"}));
        let partition = set(json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}}));
        let manual = set(json!({"updateStrategy": {"type": "OnDelete"}}));
        let from_five = set(json!({"ordinals": {"start": 5}, "replicas": 1}));
        for (title, set, pods, expected) in [
            ("the first", &plain, vec![], vec!["+db-0 new"]),
            ("waits for it", &plain, vec!["0 unready"], vec![]),
            ("then the second", &plain, vec!["0 ready"], vec!["+db-1 new"]),
            ("a hole is filled", &plain, vec!["0 ready", "2 ready"], vec!["+db-1 new"]),
            ("a failed one makes room", &plain, vec!["0 ready", "1 failed", "2 ready"], vec!["-db-1"]),
            ("all at once", &parallel, vec!["1 unready"], vec!["+db-0 new", "+db-2 new"]),
            ("down from the top", &plain, vec!["0 ready", "1 ready", "2 ready", "3 ready", "4 ready"], vec!["-db-4"]),
            ("one at a time", &plain, vec!["0 ready", "1 ready", "2 ready", "3 ready", "4 going"], vec![]),
            ("updates from the top", &plain, vec!["0 ready old", "1 ready old", "2 ready old"], vec!["-db-2"]),
            ("one at a time", &plain, vec!["0 ready old", "1 ready old", "2 unready new"], vec![]),
            ("the next", &plain, vec!["0 ready old", "1 ready old", "2 ready new"], vec!["-db-1"]),
            ("the partition stays", &partition, vec!["0 ready old", "1 ready old", "2 ready new"], vec![]),
            ("and is made of what it was", &partition, vec!["0 ready old"], vec!["+db-1 old"]),
            ("only when deleted", &manual, vec!["0 ready old", "1 ready old", "2 ready old"], vec![]),
            ("places may start later", &from_five, vec![], vec!["+db-5 new"]),
        ] {
            assert_eq!(lines(set, &pods), expected, "{title}");
        }
    }

    #[test]
    fn a_pod_has_its_name_and_its_claims() {
        let claims = json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]});
        let set = set(claims);
        assert_eq!(lines(&set, &[]), ["+data-db-0", "+db-0 new"]);
        let revision =
            Revision { name: "r".into(), template: json!({"spec": {"volumes": [{"name": "data"}, {"name": "tmp"}]}}) };
        let seen = Seen { set: &set, pods: &[], current: &revision, update: &revision, now: Timestamp::UNIX_EPOCH };
        let pod = super::pod(&seen, 0);
        assert_eq!(pod.text("/spec/hostname"), "db-0");
        assert_eq!(pod.text("/spec/subdomain"), "db");
        assert_eq!(
            pod["spec"]["volumes"],
            json!([
                {"name": "tmp"}, {"name": "data", "persistentVolumeClaim": {"claimName": "data-db-0"}},
            ])
        );
    }
}
