//! Who owns whom: every object's metadata, and the decisions that follow from it.

use api::object::{Key, OwnerReference};
use api::{ObjectExt, Resource};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub const FOREGROUND: &str = "foregroundDeletion";
pub const ORPHAN: &str = "orphan";

/// What is kept of an object.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Item {
    pub metadata: ItemMetadata,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ItemMetadata {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub deletion_timestamp: Option<String>,
    pub finalizers: Vec<String>,
    pub owner_references: Vec<OwnerReference>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub resource: Resource,
    pub key: Key,
    pub owners: Vec<OwnerReference>,
    pub is_deleting: bool,
    pub finalizers: Vec<String>,
}

impl Node {
    pub fn new(resource: Resource, metadata: ItemMetadata) -> Node {
        Node {
            resource,
            key: Key::new(metadata.namespace, metadata.name),
            owners: metadata.owner_references,
            is_deleting: metadata.deletion_timestamp.is_some(),
            finalizers: metadata.finalizers,
        }
    }

    pub fn live(resource: Resource, object: &Value) -> Node {
        let metadata: Option<ItemMetadata> =
            object.get("metadata").and_then(|m| serde_json::from_value(m.clone()).ok());
        // What cannot be read has no owner here, and is left alone.
        let unread = ItemMetadata { name: object.name().into(), uid: object.uid().into(), ..ItemMetadata::default() };
        Node::new(resource, metadata.unwrap_or(unread))
    }

    fn has(&self, finalizer: &str) -> bool {
        self.finalizers.iter().any(|f| f == finalizer)
    }

    pub fn waits_for_dependents(&self) -> bool {
        self.is_deleting && self.has(FOREGROUND)
    }

    pub fn orphans_dependents(&self) -> bool {
        self.is_deleting && self.has(ORPHAN)
    }
}

/// Every object that owns or is owned, by uid.
#[derive(Debug, Default)]
pub struct Graph {
    nodes: BTreeMap<String, Node>,
    dependents: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    pub fn get(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(uid)
    }

    pub fn dependents(&self, uid: &str) -> impl Iterator<Item = (&str, &Node)> {
        let uids = self.dependents.get(uid).into_iter().flatten();
        uids.filter_map(move |uid| Some((uid.as_str(), self.nodes.get(uid)?)))
    }

    /// Notes an object; returns the uids that have to be looked at.
    pub fn set(&mut self, uid: &str, node: Node) -> BTreeSet<String> {
        let mut affected = self.unlink(uid);
        for owner in &node.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(uid.into());
        }
        // An owner that is going may wait for what this object no longer is.
        affected.retain(|owner| self.nodes.get(owner).is_some_and(Node::waits_for_dependents));
        if !node.owners.is_empty() || node.waits_for_dependents() || node.orphans_dependents() {
            affected.insert(uid.into());
        }
        self.nodes.insert(uid.into(), node);
        affected
    }

    /// Forgets an object; returns the uids that have to be looked at: what it owned, and owners that waited for it.
    pub fn remove(&mut self, uid: &str) -> BTreeSet<String> {
        let mut affected = self.unlink(uid);
        self.nodes.remove(uid);
        affected.retain(|owner| self.nodes.get(owner).is_some_and(Node::waits_for_dependents));
        affected.extend(self.dependents.get(uid).into_iter().flatten().cloned());
        affected
    }

    /// Takes an object out of its owners' dependents; returns those owners.
    fn unlink(&mut self, uid: &str) -> BTreeSet<String> {
        let owners: BTreeSet<String> =
            self.nodes.get(uid).into_iter().flat_map(|n| &n.owners).map(|o| o.uid.clone()).collect();
        for owner in &owners {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(uid);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
        owners
    }

    /// The uids of one kind.
    pub fn of_kind(&self, resource: &Resource) -> BTreeSet<String> {
        self.nodes.iter().filter(|(_, n)| n.resource == *resource).map(|(uid, _)| uid.clone()).collect()
    }
}

/// How an owner stands to its dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is there, and keeps them.
    Solid,
    /// It is gone.
    Absent,
    /// It is going, and waits for those that block it.
    Waiting,
}

/// What becomes of an object that has owners.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    Keep,
    /// It stays for its solid owners, and drops the references to others.
    Drop(Vec<OwnerReference>),
    /// `Background`, `Foreground` or `Orphan`.
    Delete(&'static str),
}

/// Decides by the standing of each owner; `has_dependents` is whether the object owns others.
pub fn judge(node: &Node, standings: &[Standing], has_dependents: bool) -> Verdict {
    if node.is_deleting || node.owners.is_empty() {
        return Verdict::Keep;
    }
    let is_any = |wanted: Standing| standings.contains(&wanted);
    if is_any(Standing::Solid) {
        if standings.iter().all(|s| *s == Standing::Solid) {
            return Verdict::Keep;
        }
        let kept = node.owners.iter().zip(standings).filter(|(_, s)| **s == Standing::Solid).map(|(o, _)| o.clone());
        return Verdict::Drop(kept.collect());
    }
    // Whoever waits for this one waits for those that it owns, too.
    if is_any(Standing::Waiting) && has_dependents {
        return Verdict::Delete("Foreground");
    }
    if node.has(ORPHAN) {
        Verdict::Delete("Orphan")
    } else if node.has(FOREGROUND) {
        Verdict::Delete("Foreground")
    } else {
        Verdict::Delete("Background")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::kinds::{PODS, REPLICA_SETS};
    use serde_json::json;

    fn node(name: &str, owners: &[&str], extra: Value) -> Node {
        let owners: Vec<_> = owners.iter().map(|uid| json!({"uid": uid, "blockOwnerDeletion": true})).collect();
        let mut metadata = json!({"name": name, "namespace": "default", "uid": name, "ownerReferences": owners});
        if let (Some(target), Some(fields)) = (metadata.as_object_mut(), extra.as_object()) {
            target.extend(fields.clone());
        }
        Node::live(PODS, &json!({ "metadata": metadata }))
    }

    #[test]
    fn verdicts() {
        use Standing::{Absent, Solid, Waiting};
        let two = node("p", &["a", "b"], json!({}));
        let going = node("p", &["a"], json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}));
        let orphaning = node("p", &["a"], json!({"finalizers": ["orphan"]}));
        for (node, standings, has_dependents, expected) in [
            (&node("p", &[], json!({})), vec![], false, Verdict::Keep),
            (&two, vec![Solid, Solid], false, Verdict::Keep),
            (&two, vec![Solid, Absent], false, Verdict::Drop(vec![two.owners[0].clone()])),
            (&two, vec![Waiting, Solid], false, Verdict::Drop(vec![two.owners[1].clone()])),
            (&two, vec![Absent, Absent], false, Verdict::Delete("Background")),
            (&two, vec![Absent, Waiting], false, Verdict::Delete("Background")),
            (&two, vec![Absent, Waiting], true, Verdict::Delete("Foreground")),
            (&going, vec![Absent], false, Verdict::Keep),
            (&orphaning, vec![Absent], false, Verdict::Delete("Orphan")),
        ] {
            assert_eq!(judge(node, &standings, has_dependents), expected, "{standings:?}");
        }
    }

    #[test]
    fn an_owners_end_concerns_its_dependents_and_theirs_an_owner_that_waits() {
        let mut graph = Graph::default();
        let set = |extra| Node { resource: REPLICA_SETS, ..node("set", &[], extra) };
        assert!(graph.set("set", set(json!({}))).is_empty());
        assert_eq!(graph.set("p", node("p", &["set"], json!({}))), ["p".to_string()].into());
        assert_eq!(graph.dependents("set").count(), 1);
        let waiting = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [FOREGROUND]});
        assert_eq!(graph.set("set", set(waiting)), ["set".to_string()].into());
        assert_eq!(graph.remove("p"), ["set".to_string()].into());
        graph.set("q", node("q", &["set"], json!({})));
        assert_eq!(graph.remove("set"), ["q".to_string()].into());
        assert_eq!(graph.of_kind(&PODS), ["q".to_string()].into());
    }
}
