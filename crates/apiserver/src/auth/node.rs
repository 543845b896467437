//! What a node's kubelet may touch beyond RBAC: only what is its own.

use super::Identity;
use super::rbac::Attributes;
use crate::registry::Registry;
use api::{ObjectExt, kinds};
use serde_json::Value;

/// Service accounts of the components that run beside the kubelet; a node may have tokens of these for itself.
pub const NODE_COMPONENTS: [&str; 5] =
    ["fairlead-proxy", "fairlead-dns", "fairlead-podnet", "fairlead-ingress", "fairlead-layer2"];

/// Why a node may not do what RBAC would let it, if so.
pub fn refuses(registry: &Registry, who: &Identity, asked: &Attributes) -> Option<String> {
    let node = who.node()?;
    let own_pod = |namespace: &str, name: &str| {
        registry.read(&kinds::PODS, namespace, name).is_some_and(|p| p.parse().text("/spec/nodeName") == node)
    };
    let reads = matches!(asked.verb.as_str(), "get" | "list" | "watch");
    match asked.plural.as_str() {
        "nodes" if !reads && asked.verb != "create" && asked.name != node => {
            Some(format!("node {node:?} is not allowed to modify node {:?}", asked.name))
        }
        "pods" if !reads && asked.subresource != "binding" && !own_pod(&asked.namespace, &asked.name) => {
            Some(format!("node {node:?} can only change pods that are bound to it"))
        }
        "secrets" | "configmaps" if asked.group.is_empty() => {
            // What every agent reads before it has a pod.
            let cluster = asked.namespace == "kube-system" && asked.name == "fairlead" && asked.plural == "configmaps";
            let used = || pods_of(registry, node, &asked.namespace).any(|p| names(&p, &asked.plural, &asked.name));
            let known = asked.verb == "get" && (cluster || used());
            (!known).then(|| format!("no relationship found between node {node:?} and this object"))
        }
        "serviceaccounts" if asked.subresource == "token" => {
            let component = asked.namespace == "kube-system" && NODE_COMPONENTS.contains(&asked.name.as_str());
            let used =
                pods_of(registry, node, &asked.namespace).any(|p| p.text("/spec/serviceAccountName") == asked.name);
            (!component && !used).then(|| format!("no relationship found between node {node:?} and this object"))
        }
        "leases" if !reads && asked.verb != "create" && asked.name != node => {
            Some(format!("node {node:?} can only write its own lease"))
        }
        _ => None,
    }
}

fn pods_of(registry: &Registry, node: &str, namespace: &str) -> impl Iterator<Item = Value> {
    let row = registry.row(&kinds::PODS).clone();
    let (_, pods) = registry.cache.list(&row, namespace);
    let node = node.to_string();
    pods.into_iter().filter(move |p| p.field(&row, "spec.nodeName") == Some(&node)).map(|p| p.parse())
}

/// Whether a pod's spec names a secret or config map anywhere.
fn names(pod: &Value, plural: &str, name: &str) -> bool {
    fn search(value: &Value, keys: &[&str], name: &str, inside: bool) -> bool {
        match value {
            Value::Object(map) => map.iter().any(|(key, inner)| {
                let here = inside || keys.contains(&key.as_str());
                (here && matches!(key.as_str(), "name" | "secretName") && inner.as_str() == Some(name))
                    || search(inner, keys, name, here)
            }),
            Value::Array(items) => items.iter().any(|i| search(i, keys, name, inside)),
            _ => false,
        }
    }
    let keys: &[&str] = match plural {
        "secrets" => &["secret", "secretRef", "secretKeyRef", "imagePullSecrets"],
        _ => &["configMap", "configMapRef", "configMapKeyRef"],
    };
    pod.get("spec").is_some_and(|spec| search(spec, keys, name, false))
}
