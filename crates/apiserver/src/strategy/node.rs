//! Nodes and their leases: addresses of pods are given here, so that two nodes never share a pod CIDR.

use super::Strategy;
use crate::auth::Identity;
use crate::registry::{Claim, Claims, Registry};
use api::{Cause, ObjectExt, Status};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

pub struct Node;
pub struct Lease;
pub static NODE: Node = Node;
pub static LEASE: Lease = Lease;

/// A node's share of a cluster's pod range.
const MASK_V4: u8 = 24;
const MASK_V6: u8 = 64;

fn key(cidr: &IpNet) -> String {
    format!("claims/podcidr/{}", cidr.trunc())
}

fn cidrs(object: &Value) -> Vec<IpNet> {
    let list = object.pointer("/spec/podCIDRs").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).filter_map(|c| c.parse().ok()).collect()
}

fn free(registry: &Registry, range: &IpNet) -> Option<IpNet> {
    let mask = if range.addr().is_ipv4() { MASK_V4 } else { MASK_V6 };
    range.subnets(mask.max(range.prefix_len())).ok()?.find(|c| !registry.cache.is_claimed(&key(c)))
}

/// Labels that a node may not give itself.
fn restricted(object: Option<&Value>) -> BTreeMap<&str, &Value> {
    let labels = object.and_then(|o| o.pointer("/metadata/labels")).and_then(Value::as_object);
    let held = |key: &str| {
        let domain = key.split_once('/').map_or("", |(domain, _)| domain);
        domain == "node-restriction.kubernetes.io" || domain.ends_with(".node-restriction.kubernetes.io")
    };
    labels.into_iter().flatten().filter(|(k, _)| held(k)).map(|(k, v)| (k.as_str(), v)).collect()
}

impl Strategy for Lease {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn updates_unseen(&self) -> bool {
        false
    }

    fn permits(&self, _: &Registry, who: &Identity, object: &Value, _: Option<&Value>) -> Result<(), Status> {
        let refused = |why: &str| Err(Status::refused("coordination.k8s.io", "leases", object.name(), why));
        match who.node() {
            Some(_) if object.namespace() != "kube-node-lease" => {
                refused("can only access leases in the \"kube-node-lease\" system namespace")
            }
            Some(node) if node != object.name() => {
                refused("can only access node lease with the same name as the requesting node")
            }
            _ => Ok(()),
        }
    }
}

impl Strategy for Node {
    fn permits(&self, _: &Registry, who: &Identity, object: &Value, old: Option<&Value>) -> Result<(), Status> {
        let Some(node) = who.node() else { return Ok(()) };
        let refused = |why: String| Err(Status::refused("", "nodes", object.name(), &why));
        if node != object.name() {
            return refused(format!("node {node:?} is not allowed to modify node {:?}", object.name()));
        }
        if old.is_some_and(|old| old.pointer("/spec/taints") != object.pointer("/spec/taints")) {
            return refused(format!("node {node:?} is not allowed to modify taints"));
        }
        // By these labels pods are kept off nodes that may be lost to somebody else.
        let (before, after) = (restricted(old), restricted(Some(object)));
        let changed: BTreeSet<&str> =
            before.keys().chain(after.keys()).filter(|k| before.get(*k) != after.get(*k)).copied().collect();
        if !changed.is_empty() {
            let changed: Vec<&str> = changed.into_iter().collect();
            return refused(format!("node {node:?} is not allowed to modify labels: {}", changed.join(", ")));
        }
        Ok(())
    }

    fn claims(&self, registry: &Registry, object: &mut Value, old: Option<&Value>) -> Result<Claims, Status> {
        let held: Vec<String> = old.map(cidrs).unwrap_or_default().iter().map(key).collect();
        let mut wanted = cidrs(object);
        if wanted.is_empty() {
            for range in &registry.allocation.pod_cidrs {
                wanted.push(free(registry, range).ok_or_else(|| {
                    Status::internal(format!(
                        "pod range {range} has no share left for another node; give a larger --pod-cidr"
                    ))
                })?);
            }
            let texts: Vec<String> = wanted.iter().map(ToString::to_string).collect();
            if let (Some(first), Some(map)) = (texts.first().cloned(), object.as_object_mut()) {
                let spec = map.entry("spec").or_insert_with(|| json!({}));
                spec["podCIDR"] = json!(first);
                spec["podCIDRs"] = json!(texts);
            }
        }
        let holder = object.name().to_string();
        let mut claims = Claims::default();
        for cidr in &wanted {
            let key = key(cidr);
            if held.contains(&key) {
                continue;
            }
            if registry.cache.is_claimed(&key) {
                let cause = Cause::invalid("spec.podCIDRs", cidr, "another node has this range");
                return Err(Status::invalid("", "Node", &holder, vec![cause]));
            }
            claims.take.push(Claim::held_by(key, &holder));
        }
        let keep: Vec<String> = wanted.iter().map(key).collect();
        claims.release = held.into_iter().filter(|k| !keep.contains(k)).collect();
        Ok(claims)
    }

    fn released(&self, object: &Value) -> Vec<String> {
        cidrs(object).iter().map(key).collect()
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        if let Some(old) = old {
            for (field, shown) in [("podCIDRs", "podCIDR"), ("providerID", "providerID")] {
                let pointer = format!("/spec/{field}");
                if let (Some(before), after) = (old.pointer(&pointer), object.pointer(&pointer))
                    && Some(before) != after
                {
                    causes.push(Cause::forbidden(
                        format!("spec.{field}"),
                        format!("node updates may not change {shown} except from \"\" to valid"),
                    ));
                }
            }
        }
        for (i, taint) in object.pointer("/spec/taints").and_then(Value::as_array).into_iter().flatten().enumerate() {
            let effect = taint.text("/effect");
            if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
                causes.push(Cause::unsupported(
                    format!("spec.taints[{i}].effect"),
                    effect,
                    &["NoSchedule", "PreferNoSchedule", "NoExecute"],
                ));
            }
        }
        causes
    }
}
