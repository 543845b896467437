//! Which Secrets and ConfigMaps the proxies and announcers of nodes may read: those that an Ingress, a Gateway or a BGPPeer names,
//! each by its name. Every such node has their identities, so that RBAC alone would open all of them to any of them.

use super::Identity;
use super::rbac::Attributes;
use crate::registry::Registry;
use api::Resource;
use api::kinds;
use serde_json::Value;

const INGRESS: &str = "system:serviceaccount:kube-system:fairlead-ingress";
const ANNOUNCER: &str = "system:serviceaccount:kube-system:fairlead-layer2";

/// Why a node's component may not do what RBAC would let it, if so.
pub fn refuses(registry: &Registry, who: &Identity, asked: &Attributes) -> Option<String> {
    if !matches!(who.user.as_str(), INGRESS | ANNOUNCER) || !asked.group.is_empty() {
        return None;
    }
    let any = |kind: &Resource, namespace: &str, names: &dyn Fn(&Value) -> bool| {
        let row = registry.row(kind).clone();
        registry.cache.list(&row, namespace).1.iter().any(|one| names(&one.parse()))
    };
    let (namespace, name) = (asked.namespace.as_str(), asked.name.as_str());
    let is_named = match asked.plural.as_str() {
        "secrets" if who.user == ANNOUNCER => any(&kinds::BGP_PEERS, "", &|one| password(one, namespace, name)),
        "secrets" => {
            any(&kinds::INGRESSES, namespace, &|one| ingress_names(one, name))
                || any(&kinds::GATEWAYS, "", &|one| refers(one, "/spec/listeners", namespace, name))
                || any(&kinds::GATEWAYS, "", &|one| client_certificate(one, namespace, name))
                || any(&kinds::LISTENER_SETS, "", &|one| refers(one, "/spec/listeners", namespace, name))
        }
        "configmaps" => {
            any(&kinds::INGRESSES, namespace, &|one| annotated(one, &HEADERS, name))
                || any(&kinds::GATEWAYS, "", &|one| authorities(one, namespace, name))
                || any(&kinds::BACKEND_TLS_POLICIES, namespace, &|one| {
                    list(one, "/spec/validation/caCertificateRefs").any(|one| is(one, name))
                })
        }
        _ => return None,
    };
    let known = !namespace.is_empty() && !name.is_empty() && is_named;
    (!known).then(|| "no Ingress, Gateway or BGPPeer names this object".to_owned())
}

/// What annotations of Ingresses begin with.
const PREFIXES: [&str; 2] = ["nginx.ingress.kubernetes.io/", "ingress.fairlead.io/"];
/// Those whose value is a Secret's name.
const SECRETS: [&str; 2] = ["auth-secret", "auth-tls-secret"];
/// Those whose value is a ConfigMap's.
const HEADERS: [&str; 2] = ["auth-proxy-set-headers", "custom-headers"];

/// One of these annotations names an object of the Ingress's namespace, which may stand in front.
fn annotated(ingress: &Value, keys: &[&str], name: &str) -> bool {
    let Some(annotations) = ingress.pointer("/metadata/annotations").and_then(Value::as_object) else { return false };
    let own = ingress.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default();
    let is_named = |text: &str| match text.trim().split_once('/') {
        Some((namespace, held)) => namespace == own && held == name,
        None => text.trim() == name,
    };
    let is_asked =
        |key: &str| PREFIXES.iter().any(|prefix| key.strip_prefix(prefix).is_some_and(|key| keys.contains(&key)));
    !name.is_empty() && annotations.iter().any(|(key, value)| is_asked(key) && value.as_str().is_some_and(is_named))
}

fn ingress_names(ingress: &Value, secret: &str) -> bool {
    annotated(ingress, &SECRETS, secret)
        || list(ingress, "/spec/tls").any(|one| one.get("secretName").and_then(Value::as_str) == Some(secret))
}

fn list<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn is(reference: &Value, name: &str) -> bool {
    reference.get("name").and_then(Value::as_str) == Some(name)
}

/// A reference of `object` that means this namespace and name; its own namespace if it says none.
fn leads(object: &Value, reference: &Value, namespace: &str, name: &str) -> bool {
    let own = object.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default();
    let of = reference.get("namespace").and_then(Value::as_str).unwrap_or(own);
    of == namespace && is(reference, name)
}

fn refers(object: &Value, listeners: &str, namespace: &str, name: &str) -> bool {
    let references = list(object, listeners).flat_map(|one| list(one, "/tls/certificateRefs"));
    references.into_iter().any(|one| leads(object, one, namespace, name))
}

fn client_certificate(gateway: &Value, namespace: &str, name: &str) -> bool {
    let reference = gateway.pointer("/spec/tls/backend/clientCertificateRef");
    reference.is_some_and(|one| leads(gateway, one, namespace, name))
}

fn password(peer: &Value, namespace: &str, name: &str) -> bool {
    let Some(reference) = peer.pointer("/spec/passwordSecret") else { return false };
    let own = peer.pointer("/metadata/namespace");
    let of = reference.get("namespace").filter(|held| held.as_str() != Some("")).or(own);
    of.and_then(Value::as_str) == Some(namespace) && is(reference, name)
}

fn authorities(gateway: &Value, namespace: &str, name: &str) -> bool {
    let of_all = list(gateway, "/spec/tls/frontend/default/validation/caCertificateRefs");
    let of_ports =
        list(gateway, "/spec/tls/frontend/perPort").flat_map(|one| list(one, "/tls/validation/caCertificateRefs"));
    of_all.chain(of_ports).any(|one| leads(gateway, one, namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_secret_is_named_by_its_whole_name() {
        let ingress = json!({"spec": {"tls": [{"hosts": ["a.example"]}, {"secretName": "shop"}]}});
        assert!(ingress_names(&ingress, "shop"));
        let doors = json!({"metadata": {"annotations": {"nginx.ingress.kubernetes.io/auth-secret": " who", "x/auth-secret": "other"}}});
        assert!(ingress_names(&doors, "who") && !ingress_names(&doors, "other") && !ingress_names(&doors, ""));
        let far = |value: &str| json!({"metadata": {"namespace": "shop", "annotations": {"ingress.fairlead.io/auth-proxy-set-headers": value}}});
        assert!(annotated(&far("shop/more"), &HEADERS, "more") && annotated(&far("more"), &HEADERS, "more"));
        assert!(!annotated(&far("other/more"), &HEADERS, "more") && !annotated(&far("more"), &SECRETS, "more"));
        assert!(!ingress_names(&ingress, "sho") && !ingress_names(&ingress, "") && !ingress_names(&json!({}), "shop"));
    }

    #[test]
    fn a_gateway_names_secrets_and_authorities_of_its_namespace_and_of_others() {
        let gateway = json!({"metadata": {"namespace": "edge"}, "spec": {
            "listeners": [{"tls": {"certificateRefs": [{"name": "own"}, {"name": "far", "namespace": "shop"}]}}],
            "tls": {"backend": {"clientCertificateRef": {"name": "me"}},
                "frontend": {"default": {"validation": {"caCertificateRefs": [{"name": "ca"}]}},
                    "perPort": [{"port": 443, "tls": {"validation": {"caCertificateRefs": [{"name": "ca2", "namespace": "shop"}]}}}]}}}});
        let named = |namespace: &str, name: &str| refers(&gateway, "/spec/listeners", namespace, name);
        assert!(named("edge", "own") && named("shop", "far"));
        assert!(!named("shop", "own") && !named("edge", "far"));
        assert!(client_certificate(&gateway, "edge", "me") && !client_certificate(&gateway, "shop", "me"));
        assert!(authorities(&gateway, "edge", "ca") && authorities(&gateway, "shop", "ca2"));
        assert!(!authorities(&gateway, "edge", "ca2"));
    }
    #[test]
    fn a_peer_names_the_secret_of_its_password() {
        let peer = |reference: Value| json!({"metadata": {"namespace": "lb"}, "spec": {"passwordSecret": reference}});
        assert!(password(&peer(json!({"name": "p"})), "lb", "p"));
        assert!(password(&peer(json!({"name": "p", "namespace": ""})), "lb", "p"));
        assert!(password(&peer(json!({"name": "p", "namespace": "x"})), "x", "p"));
        assert!(!password(&peer(json!({"name": "p", "namespace": "x"})), "lb", "p"));
        assert!(!password(&peer(json!({"name": "p"})), "lb", "q") && !password(&json!({}), "lb", "p"));
    }
}
