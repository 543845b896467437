//! Which Secrets the Ingress proxies of a cluster may read: those that an Ingress names, each by its name. Every node that
//! runs a proxy has its identity, so that RBAC alone would open all Secrets to any of them.

use super::Identity;
use super::rbac::Attributes;
use crate::registry::Registry;
use api::kinds;
use serde_json::Value;

const ACCOUNT: &str = "system:serviceaccount:kube-system:fairlead-ingress";

/// Why a proxy may not do what RBAC would let it, if so.
pub fn refuses(registry: &Registry, who: &Identity, asked: &Attributes) -> Option<String> {
    if who.user != ACCOUNT || !asked.group.is_empty() || asked.plural != "secrets" {
        return None;
    }
    let row = registry.row(&kinds::INGRESSES).clone();
    let named = || registry.cache.list(&row, &asked.namespace).1.iter().any(|one| names(&one.parse(), &asked.name));
    let known = !asked.namespace.is_empty() && !asked.name.is_empty() && named();
    (!known).then(|| "no Ingress names this Secret".to_owned())
}

fn names(ingress: &Value, secret: &str) -> bool {
    let tls = ingress.pointer("/spec/tls").and_then(Value::as_array);
    tls.is_some_and(|all| all.iter().any(|one| one.get("secretName").and_then(Value::as_str) == Some(secret)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_secret_is_named_by_its_whole_name() {
        let ingress = json!({"spec": {"tls": [{"hosts": ["a.example"]}, {"secretName": "shop"}]}});
        assert!(names(&ingress, "shop"));
        assert!(!names(&ingress, "sho") && !names(&ingress, "") && !names(&json!({}), "shop"));
    }
}
