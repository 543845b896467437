//! A container's environment and arguments, with references resolved. Pure: objects come in as maps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use api::Quantity;
use serde_json::Value;

use crate::pod::{Container, Pod, ResourceFieldRef};

/// Keys and values of the config maps and secrets that a pod names, and what is known of the node.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    pub config_maps: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    pub secrets: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    pub pod_ips: Vec<IpAddr>,
    pub node_ips: Vec<IpAddr>,
    pub node_name: String,
    /// Variables that name the services of the pod's namespace.
    pub services: Vec<(String, String)>,
    /// What a limit means that is not written: the node's.
    pub node_cpu_milli: i64,
    pub node_memory: i64,
}

/// The variables in order. The error is what a CreateContainerConfigError says.
pub fn environment(pod: &Pod, container: &Container, sources: &Sources) -> Result<Vec<(String, String)>, String> {
    let mut all = Variables::default();
    for (name, value) in &sources.services {
        all.set(name, value.clone());
    }
    for from in &container.env_from {
        let (objects, reference, what) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(reference), _) => (&sources.config_maps, reference, "configmap"),
            (None, Some(reference)) => (&sources.secrets, reference, "secret"),
            (None, None) => continue,
        };
        match objects.get(&reference.name) {
            Some(data) => {
                for (key, value) in data {
                    all.set(&format!("{}{key}", from.prefix), text(value));
                }
            }
            None if reference.optional => {}
            None => return Err(format!("{what} {:?} not found", reference.name)),
        }
    }
    for variable in &container.env {
        let value = match &variable.value_from {
            None => Some(expand(&variable.value, &all)),
            Some(from) => {
                if let Some(field) = &from.field_ref {
                    Some(field_value(pod, &field.field_path, sources)?)
                } else if let Some(resource) = &from.resource_field_ref {
                    Some(resource_value(pod, container, resource, sources)?)
                } else if let Some(key) = &from.config_map_key_ref {
                    key_value(&sources.config_maps, "configmap", pod, key)?
                } else if let Some(key) = &from.secret_key_ref {
                    key_value(&sources.secrets, "secret", pod, key)?
                } else {
                    return Err(format!("environment variable {}: an unknown source", variable.name));
                }
            }
        };
        if let Some(value) = value {
            all.set(&variable.name, value);
        }
    }
    Ok(all.0)
}

/// `command` and `args` with `$(NAME)` replaced.
pub fn arguments(words: &[String], environment: &[(String, String)]) -> Vec<String> {
    let variables = Variables(environment.to_vec());
    words.iter().map(|word| expand(word, &variables)).collect()
}

#[derive(Default)]
struct Variables(Vec<(String, String)>);

impl Variables {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn set(&mut self, name: &str, value: String) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }
}

/// `$(NAME)` is replaced, `$$` is a dollar, and a name that is not known stays as it is written.
fn expand(text: &str, variables: &Variables) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

fn key_value(
    objects: &BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    what: &str,
    pod: &Pod,
    reference: &crate::pod::KeyRef,
) -> Result<Option<String>, String> {
    match objects.get(&reference.name).map(|data| data.get(&reference.key)) {
        Some(Some(value)) => Ok(Some(text(value))),
        _ if reference.optional => Ok(None),
        Some(None) => {
            let kind = if what == "secret" { "Secret" } else { "ConfigMap" };
            Err(format!("couldn't find key {} in {kind} {}/{}", reference.key, pod.metadata.namespace, reference.name))
        }
        None => Err(format!("{what} {:?} not found", reference.name)),
    }
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}

/// A field of the pod as the downward API gives it.
pub fn field_value(pod: &Pod, path: &str, sources: &Sources) -> Result<String, String> {
    let join = |ips: &[IpAddr]| ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
    let first = |ips: &[IpAddr]| ips.first().map(IpAddr::to_string).unwrap_or_default();
    let map = |map: &BTreeMap<String, String>| {
        map.iter().map(|(k, v)| format!("{k}={}", serde_json::json!(v))).collect::<Vec<_>>().join("\n")
    };
    if let Some((base, key)) = path.strip_suffix(']').and_then(|p| p.split_once('[')) {
        let key = key.trim_matches(['\'', '"']);
        let map = match base {
            "metadata.labels" => &pod.metadata.labels,
            "metadata.annotations" => &pod.metadata.annotations,
            _ => return Err(format!("unsupported fieldPath: {path}")),
        };
        return Ok(map.get(key).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => pod.metadata.name.clone(),
        "metadata.namespace" => pod.metadata.namespace.clone(),
        "metadata.uid" => pod.metadata.uid.clone(),
        "metadata.labels" => map(&pod.metadata.labels),
        "metadata.annotations" => map(&pod.metadata.annotations),
        "spec.nodeName" => sources.node_name.clone(),
        "spec.serviceAccountName" => pod.spec.service_account_name.clone(),
        "status.hostIP" => first(&sources.node_ips),
        "status.hostIPs" => join(&sources.node_ips),
        "status.podIP" => first(&sources.pod_ips),
        "status.podIPs" => join(&sources.pod_ips),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// A container's request or limit, rounded up to a multiple of the divisor.
pub fn resource_value(
    pod: &Pod,
    container: &Container,
    reference: &ResourceFieldRef,
    sources: &Sources,
) -> Result<String, String> {
    let container = match reference.container_name.as_str() {
        "" => container,
        name => pod.all_containers().find(|c| c.name == name).ok_or_else(|| format!("container {name} not found"))?,
    };
    let (list, resource) =
        reference.resource.split_once('.').ok_or_else(|| format!("unsupported resource {}", reference.resource))?;
    let (limits, requests) = (&container.resources.limits, &container.resources.requests);
    let written = match list {
        "limits" => limits.get(resource),
        "requests" => requests.get(resource).or(limits.get(resource)),
        _ => return Err(format!("unsupported resource {}", reference.resource)),
    };
    let is_cpu = resource == "cpu";
    // In thousandths for processors, in bytes for the rest.
    let value = match written {
        Some(amount) if is_cpu => amount.0.milli(),
        Some(amount) => amount.0.value(),
        None if list == "requests" => 0,
        None if is_cpu => sources.node_cpu_milli,
        None if resource == "memory" => sources.node_memory,
        None => 0,
    };
    let divisor: Quantity = match &reference.divisor {
        Some(Value::String(text)) if text != "0" => text.parse().map_err(|e| format!("divisor: {e}"))?,
        Some(Value::Number(n)) if n.as_i64() != Some(0) => {
            n.to_string().parse().map_err(|e| format!("divisor: {e}"))?
        }
        _ => Quantity::from_milli(1000),
    };
    let divisor = if is_cpu { divisor.milli() } else { divisor.value() }.max(1);
    Ok(value.div_euclid(divisor).saturating_add(i64::from(value.rem_euclid(divisor) > 0)).to_string())
}

/// The variables of one Service, as docker's links named them.
pub fn service_variables(name: &str, cluster_ip: &str, ports: &[crate::services::LinkedPort]) -> Vec<(String, String)> {
    let prefix = name.to_ascii_uppercase().replace(['-', '.'], "_");
    let Some((_, first, first_protocol)) = ports.first() else { return Vec::new() };
    let host = if cluster_ip.contains(':') { format!("[{cluster_ip}]") } else { cluster_ip.to_owned() };
    let mut all = vec![
        (format!("{prefix}_SERVICE_HOST"), cluster_ip.to_owned()),
        (format!("{prefix}_SERVICE_PORT"), first.to_string()),
    ];
    for (port_name, port, _) in ports.iter().filter(|(n, ..)| !n.is_empty()) {
        let port_name = port_name.to_ascii_uppercase().replace('-', "_");
        all.push((format!("{prefix}_SERVICE_PORT_{port_name}"), port.to_string()));
    }
    all.push((format!("{prefix}_PORT"), format!("{}://{host}:{first}", first_protocol.to_ascii_lowercase())));
    for (_, port, protocol) in ports {
        let lower = protocol.to_ascii_lowercase();
        let base = format!("{prefix}_PORT_{port}_{protocol}");
        all.push((base.clone(), format!("{lower}://{host}:{port}")));
        all.push((format!("{base}_PROTO"), lower));
        all.push((format!("{base}_PORT"), port.to_string()));
        all.push((format!("{base}_ADDR"), cluster_ip.to_owned()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand_as_the_api_documents() {
        let variables = Variables(vec![("A".into(), "1".into())]);
        for (text, expanded) in
            [("$(A)", "1"), ("x$(A)y", "x1y"), ("$$(A)", "$(A)"), ("$(B)", "$(B)"), ("$A $", "$A $"), ("$(A", "$(A")]
        {
            assert_eq!(expand(text, &variables), expanded, "{text}");
        }
    }

    #[test]
    fn the_environment_is_resolved_in_order() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c",
                "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}},
                "envFrom": [{"prefix": "P_", "configMapRef": {"name": "m"}}],
                "env": [
                    {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                    {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                    {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                    {"name": "GREETING", "value": "$(P_k) $(ME)"},
                    {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "s", "key": "x", "optional": true}}}
                ]}]}
        }))
        .expect("a pod");
        let mut sources = Sources::default();
        sources.config_maps.insert("m".into(), BTreeMap::from([("k".into(), b"v".to_vec())]));
        let all = environment(&pod, &pod.spec.containers[0], &sources).expect("resolved");
        let all: Vec<String> = all.into_iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(all, ["P_k=v", "ME=p", "APP=web", "CPU=2", "MEM=64", "GREETING=v p"]);
        sources.config_maps.clear();
        let missing = environment(&pod, &pod.spec.containers[0], &sources);
        assert_eq!(missing.expect_err("missing"), "configmap \"m\" not found");
    }
}
