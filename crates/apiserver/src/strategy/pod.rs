//! Pods: defaults, admission (service account, tolerations), checks, graceful deletion.

use super::{Deletion, Strategy, compact, set_default};
use crate::auth::Identity;
use crate::registry::Registry;
use api::{Cause, ObjectExt, Quantity, Status, kinds, names};
use serde_json::{Value, json};

pub struct Pod;
pub static POD: Pod = Pod;

impl Strategy for Pod {
    fn answers_deleted(&self) -> bool {
        true
    }

    fn has_generation(&self) -> bool {
        true
    }

    fn default(&self, object: &mut Value) {
        if let Some(spec) = object.get_mut("spec") {
            default_pod_spec(spec);
            set_default(spec, "enableServiceLinks", json!(true));
        }
    }

    fn prepare_for_create(&self, registry: &Registry, _: &Identity, object: &mut Value) -> Result<(), Status> {
        admit_service_account(registry, object)?;
        admit_priority(registry, object)?;
        admit_tolerations(object);
        let qos = qos_class(object);
        if let Some(map) = object.as_object_mut() {
            map.insert("status".into(), json!({"phase": "Pending", "qosClass": qos}));
        }
        Ok(())
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let Some(spec) = object.get("spec") else { return vec![Cause::required("spec.containers", "")] };
        let mut causes = validate_pod_spec("spec", spec);
        if let Some(old) = old.and_then(|o| o.get("spec")) {
            causes.extend(update_causes(spec, old));
        }
        causes
    }

    fn deletion(&self, object: &Value, requested: Option<i64>) -> Deletion {
        let own = object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(30);
        let seconds = requested.unwrap_or(own).max(0);
        let done = matches!(object.text("/status/phase"), "Succeeded" | "Failed");
        // A pod that no kubelet runs needs nobody's goodbye.
        if seconds == 0 || done && requested.is_some_and(|r| r == 0) || object.text("/spec/nodeName").is_empty() {
            return Deletion::Now;
        }
        Deletion::Graceful(seconds)
    }
}

/// The defaults of a pod spec, as in core/v1's defaulting of PodSpec and Container.
pub fn default_pod_spec(spec: &mut Value) {
    set_default(spec, "dnsPolicy", json!("ClusterFirst"));
    set_default(spec, "restartPolicy", json!("Always"));
    set_default(spec, "terminationGracePeriodSeconds", json!(30));
    set_default(spec, "securityContext", json!({}));
    set_default(spec, "schedulerName", json!("default-scheduler"));
    // Both names of the service account are kept alike.
    let account = [spec.text("/serviceAccountName"), spec.text("/serviceAccount")]
        .into_iter()
        .find(|a| !a.is_empty())
        .unwrap_or("")
        .to_string();
    if !account.is_empty() {
        spec["serviceAccountName"] = json!(account);
        spec["serviceAccount"] = json!(account);
    }
    let host_network = spec.get("hostNetwork") == Some(&json!(true));
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            default_container(container, host_network);
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        for (kind, mode) in
            [("configMap", true), ("secret", true), ("projected", true), ("downwardAPI", true), ("hostPath", false)]
        {
            let Some(source) = volume.get_mut(kind).filter(|s| s.is_object()) else { continue };
            if mode {
                set_default(source, "defaultMode", json!(420));
            } else {
                source.as_object_mut().map(|m| m.entry("type").or_insert(json!("")));
            }
            for item in source.get_mut("sources").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(token) = item.get_mut("serviceAccountToken") {
                    set_default(token, "expirationSeconds", json!(3600));
                }
            }
            let own = source.get_mut("items").and_then(Value::as_array_mut);
            for item in own.into_iter().flatten() {
                default_field_ref(item);
            }
            for item in source.get_mut("sources").and_then(Value::as_array_mut).into_iter().flatten() {
                let items = item.pointer_mut("/downwardAPI/items").and_then(Value::as_array_mut);
                for item in items.into_iter().flatten() {
                    default_field_ref(item);
                }
            }
        }
    }
}

fn default_field_ref(item: &mut Value) {
    if let Some(field) = item.get_mut("fieldRef") {
        set_default(field, "apiVersion", json!("v1"));
    }
}

fn default_container(container: &mut Value, host_network: bool) {
    let image = container.text("/image").to_string();
    let latest = image.rsplit('/').next().is_some_and(|last| !last.contains(':') && !last.contains('@'));
    let policy = if latest || image.ends_with(":latest") { "Always" } else { "IfNotPresent" };
    set_default(container, "imagePullPolicy", json!(policy));
    set_default(container, "terminationMessagePath", json!("/dev/termination-log"));
    set_default(container, "terminationMessagePolicy", json!("File"));
    set_default(container, "resources", json!({}));
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        set_default(port, "protocol", json!("TCP"));
        if host_network && let Some(number) = port.get("containerPort").cloned() {
            set_default(port, "hostPort", number);
        }
    }
    for env in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(source) = env.get_mut("valueFrom") {
            default_field_ref(source);
        }
    }
    // Limits without requests are requests too.
    if let Some(limits) = container.pointer("/resources/limits").and_then(Value::as_object).cloned() {
        set_default(&mut container["resources"], "requests", json!({}));
        for (name, amount) in limits {
            set_default(&mut container["resources"]["requests"], &name, amount);
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).filter(|p| p.is_object()) else { continue };
        for (field, value) in
            [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
        {
            set_default(probe, field, json!(value));
        }
        default_http(probe);
    }
    for hook in ["postStart", "preStop"] {
        if let Some(hook) = container.pointer_mut(&format!("/lifecycle/{hook}")) {
            default_http(hook);
        }
    }
}

fn default_http(handler: &mut Value) {
    if let Some(http) = handler.get_mut("httpGet").filter(|h| h.is_object()) {
        set_default(http, "path", json!("/"));
        set_default(http, "scheme", json!("HTTP"));
    }
}

fn admit_service_account(registry: &Registry, object: &mut Value) -> Result<(), Status> {
    let namespace = object.namespace().to_string();
    let Some(spec) = object.get_mut("spec") else { return Ok(()) };
    if spec.text("/serviceAccountName").is_empty() {
        spec["serviceAccountName"] = json!("default");
        spec["serviceAccount"] = json!("default");
    }
    let name = spec.text("/serviceAccountName").to_string();
    let Some(account) = registry.read(&kinds::SERVICE_ACCOUNTS, &namespace, &name) else {
        return Err(Status::forbidden(format!(
            "error looking up service account {namespace}/{name}: serviceaccount \"{name}\" not found"
        )));
    };
    let account = account.parse();
    if let Some(secrets) = account.get("imagePullSecrets").filter(|_| spec.get("imagePullSecrets").is_none()) {
        spec["imagePullSecrets"] = secrets.clone();
    }
    let wanted = |v: &Value| v.get("automountServiceAccountToken").and_then(Value::as_bool);
    if !wanted(spec).or(wanted(&account)).unwrap_or(true) {
        return Ok(());
    }
    mount_token(spec);
    Ok(())
}

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The projected volume every pod gets: token, CA and namespace.
fn mount_token(spec: &mut Value) {
    let suffix = crate::verbs::random_suffix();
    let volume = format!("kube-api-access-{suffix}");
    let mut used = false;
    for list in ["initContainers", "containers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            set_default(container, "volumeMounts", json!([]));
            let Some(mounts) = container["volumeMounts"].as_array_mut() else { continue };
            if mounts.iter().any(|m| m.text("/mountPath") == TOKEN_PATH) {
                continue;
            }
            mounts.push(json!({"name": volume, "readOnly": true, "mountPath": TOKEN_PATH}));
            used = true;
        }
    }
    if !used {
        return;
    }
    set_default(spec, "volumes", json!([]));
    if let Some(volumes) = spec["volumes"].as_array_mut() {
        volumes.push(json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}}));
    }
}

fn admit_priority(registry: &Registry, object: &mut Value) -> Result<(), Status> {
    let Some(spec) = object.get_mut("spec") else { return Ok(()) };
    let class = spec.text("/priorityClassName").to_string();
    let priority = match class.as_str() {
        "" => 0,
        "system-node-critical" => 2_000_001_000,
        "system-cluster-critical" => 2_000_000_000,
        name => {
            let row = registry.catalog.find("scheduling.k8s.io", "v1", "priorityclasses");
            let found = row.and_then(|r| registry.cache.get(r, "", name));
            let Some(found) = found else {
                return Err(Status::forbidden(format!("no PriorityClass with name {name} was found")));
            };
            found.parse().get("value").and_then(Value::as_i64).unwrap_or(0)
        }
    };
    spec["priority"] = json!(priority);
    set_default(spec, "preemptionPolicy", json!("PreemptLowerPriority"));
    Ok(())
}

/// Pods outlive a lost node for five minutes unless they say otherwise.
fn admit_tolerations(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    set_default(spec, "tolerations", json!([]));
    let Some(tolerations) = spec["tolerations"].as_array_mut() else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = tolerations.iter().any(|t| {
            (t.text("/key") == key || t.text("/key").is_empty()) && matches!(t.text("/effect"), "" | "NoExecute")
        });
        if !tolerated {
            tolerations
                .push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
}

/// Guaranteed, Burstable or BestEffort.
fn qos_class(object: &Value) -> &'static str {
    let (mut any, mut guaranteed) = (false, true);
    for list in ["containers", "initContainers"] {
        for container in object.pointer(&format!("/spec/{list}")).and_then(Value::as_array).into_iter().flatten() {
            for resource in ["cpu", "memory"] {
                let amount = |kind: &str| {
                    let text = container.pointer(&format!("/resources/{kind}/{resource}")).and_then(Value::as_str);
                    text.and_then(|t| t.parse::<Quantity>().ok()).map(|q| q.milli()).filter(|m| *m > 0)
                };
                let (request, limit) = (amount("requests"), amount("limits"));
                any |= request.is_some() || limit.is_some();
                guaranteed &= limit.is_some() && request == limit;
            }
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Problems of a pod spec at `path`.
pub fn validate_pod_spec(path: &str, spec: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let containers = spec.get("containers").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if containers.is_empty() {
        causes.push(Cause::required(format!("{path}.containers"), ""));
    }
    let mut volumes: Vec<&str> = Vec::new();
    for (i, volume) in spec.get("volumes").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let name = volume.text("/name");
        let at = format!("{path}.volumes[{i}]");
        if name.is_empty() {
            causes.push(Cause::required(format!("{at}.name"), ""));
        }
        for problem in names::dns_label(name).into_iter().filter(|_| !name.is_empty()) {
            causes.push(Cause::invalid(format!("{at}.name"), format!("{name:?}"), problem));
        }
        if volumes.contains(&name) {
            causes.push(Cause::duplicate(format!("{at}.name"), format!("{name:?}")));
        }
        let sources = volume.as_object().map_or(0, |m| m.keys().filter(|k| *k != "name").count());
        if sources == 0 {
            causes.push(Cause::required(at.clone(), "must specify a volume type"));
        } else if sources > 1 {
            causes.push(Cause::forbidden(at, "may not specify more than 1 volume type"));
        }
        volumes.push(name);
    }
    let mut seen: Vec<&str> = Vec::new();
    for list in ["initContainers", "containers"] {
        for (i, container) in spec.get(list).and_then(Value::as_array).into_iter().flatten().enumerate() {
            let at = format!("{path}.{list}[{i}]");
            let name = container.text("/name");
            if !name.is_empty() && seen.contains(&name) {
                causes.push(Cause::duplicate(format!("{at}.name"), format!("{name:?}")));
            }
            seen.push(name);
            container_causes(&at, container, &volumes, &mut causes);
        }
    }
    for (field, allowed) in [
        ("restartPolicy", &["Always", "Never", "OnFailure"][..]),
        ("dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"][..]),
    ] {
        let value = spec.text(&format!("/{field}"));
        if value.is_empty() {
            causes.push(Cause::required(format!("{path}.{field}"), ""));
        } else if !allowed.contains(&value) {
            let mut cause = Cause::unsupported(format!("{path}.{field}"), value, allowed);
            if field == "restartPolicy" {
                // Listed in their own order, not sorted, in Kubernetes too.
                cause.message =
                    format!("Unsupported value: {value:?}: supported values: \"Always\", \"OnFailure\", \"Never\"");
            }
            causes.push(cause);
        }
    }
    if let Some(seconds) = spec.get("terminationGracePeriodSeconds").and_then(Value::as_i64).filter(|s| *s < 0) {
        causes.push(Cause::invalid(
            format!("{path}.terminationGracePeriodSeconds"),
            seconds,
            "must be greater than or equal to 0",
        ));
    }
    causes.extend(super::meta::labels(&format!("{path}.nodeSelector"), spec.get("nodeSelector")));
    let hostname = spec.text("/hostname");
    for problem in names::dns_label(hostname).into_iter().filter(|_| !hostname.is_empty()) {
        causes.push(Cause::invalid(format!("{path}.hostname"), format!("{hostname:?}"), problem));
    }
    for (i, toleration) in spec.get("tolerations").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let operator = toleration.text("/operator");
        if !matches!(operator, "" | "Exists" | "Equal") {
            causes.push(Cause::unsupported(
                format!("{path}.tolerations[{i}].operator"),
                operator,
                &["Equal", "Exists"],
            ));
        }
    }
    causes
}

fn container_causes(at: &str, container: &Value, volumes: &[&str], causes: &mut Vec<Cause>) {
    let name = container.text("/name");
    if name.is_empty() {
        causes.push(Cause::required(format!("{at}.name"), ""));
    } else {
        for problem in names::dns_label(name) {
            causes.push(Cause::invalid(format!("{at}.name"), format!("{name:?}"), problem));
        }
    }
    let image = container.text("/image");
    if image.is_empty() {
        causes.push(Cause::required(format!("{at}.image"), ""));
    } else if image != image.trim() {
        causes.push(Cause::invalid(
            format!("{at}.image"),
            format!("{image:?}"),
            "must not have leading or trailing whitespace",
        ));
    }
    let policy = container.text("/imagePullPolicy");
    if !policy.is_empty() && !matches!(policy, "Always" | "IfNotPresent" | "Never") {
        causes.push(Cause::unsupported(format!("{at}.imagePullPolicy"), policy, &["Always", "IfNotPresent", "Never"]));
    }
    let mut port_names: Vec<&str> = Vec::new();
    for (i, port) in container.get("ports").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let path = |field: &str| format!("{at}.ports[{i}].{field}");
        let name = port.text("/name");
        if !name.is_empty() {
            for problem in names::port_name(name) {
                causes.push(Cause::invalid(path("name"), format!("{name:?}"), problem));
            }
            if port_names.contains(&name) {
                causes.push(Cause::duplicate(path("name"), format!("{name:?}")));
            }
            port_names.push(name);
        }
        match port.get("containerPort").and_then(Value::as_i64) {
            None | Some(0) => causes.push(Cause::required(path("containerPort"), "")),
            Some(n) if !(1..=65535).contains(&n) => {
                causes.push(Cause::invalid(path("containerPort"), n, "must be between 1 and 65535, inclusive"));
            }
            Some(_) => {}
        }
        if let Some(n) = port.get("hostPort").and_then(Value::as_i64).filter(|n| !(1..=65535).contains(n)) {
            causes.push(Cause::invalid(path("hostPort"), n, "must be between 1 and 65535, inclusive"));
        }
        let protocol = port.text("/protocol");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            causes.push(Cause::unsupported(path("protocol"), protocol, &["SCTP", "TCP", "UDP"]));
        }
    }
    for (i, env) in container.get("env").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let name = env.text("/name");
        if name.is_empty() {
            causes.push(Cause::required(format!("{at}.env[{i}].name"), ""));
        } else {
            for problem in names::env_name(name) {
                causes.push(Cause::invalid(format!("{at}.env[{i}].name"), format!("{name:?}"), problem));
            }
        }
        if !env.text("/value").is_empty() && env.get("valueFrom").is_some() {
            causes.push(Cause::invalid(
                format!("{at}.env[{i}].valueFrom"),
                "\"\"",
                "may not be specified when `value` is not empty",
            ));
        }
    }
    let mut paths: Vec<&str> = Vec::new();
    for (i, mount) in container.get("volumeMounts").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let name = mount.text("/name");
        if name.is_empty() {
            causes.push(Cause::required(format!("{at}.volumeMounts[{i}].name"), ""));
        } else if !volumes.contains(&name) {
            causes.push(Cause::not_found(format!("{at}.volumeMounts[{i}].name"), format!("{name:?}")));
        }
        let target = mount.text("/mountPath");
        if target.is_empty() {
            causes.push(Cause::required(format!("{at}.volumeMounts[{i}].mountPath"), ""));
        } else if paths.contains(&target) {
            causes.push(Cause::invalid(
                format!("{at}.volumeMounts[{i}].mountPath"),
                format!("{target:?}"),
                "must be unique",
            ));
        }
        paths.push(target);
    }
    for (resource, request) in container.pointer("/resources/requests").and_then(Value::as_object).into_iter().flatten()
    {
        let quantity = |v: &Value| v.as_str().and_then(|t| t.parse::<Quantity>().ok());
        let limit = container.pointer("/resources/limits").and_then(|l| l.get(resource));
        if let (Some(r), Some(l)) = (quantity(request), limit.and_then(quantity))
            && r.milli() > l.milli()
        {
            causes.push(Cause::invalid(
                format!("{at}.resources.requests"),
                compact(request),
                format!("must be less than or equal to {resource} limit of {l}"),
            ));
        }
        if quantity(request).is_some_and(|q| q.is_negative()) {
            causes.push(Cause::invalid(
                format!("{at}.resources.requests[{resource}]"),
                compact(request),
                "must be greater than or equal to 0",
            ));
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe_value) = container.get(probe) else { continue };
        let handlers =
            ["exec", "httpGet", "tcpSocket", "grpc"].iter().filter(|h| probe_value.get(**h).is_some()).count();
        if handlers == 0 {
            causes.push(Cause::required(format!("{at}.{probe}"), "must specify a handler type"));
        } else if handlers > 1 {
            causes.push(Cause::forbidden(format!("{at}.{probe}"), "may not specify more than 1 handler type"));
        }
        if probe != "readinessProbe" && probe_value.get("successThreshold").and_then(Value::as_i64).unwrap_or(1) != 1 {
            causes.push(Cause::invalid(
                format!("{at}.{probe}.successThreshold"),
                compact(&probe_value["successThreshold"]),
                "must be 1",
            ));
        }
    }
}

/// Of a running pod's spec only images, deadlines, tolerations (added) and gates (removed) may change.
fn update_causes(spec: &Value, old: &Value) -> Vec<Cause> {
    let mut before = old.clone();
    for list in ["containers", "initContainers"] {
        let images: Vec<Value> = spec
            .get(list)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|c| c.get("image").cloned().unwrap_or(Value::Null))
            .collect();
        let count = before.get(list).and_then(Value::as_array).map_or(0, Vec::len);
        if images.len() != count {
            return vec![Cause::forbidden(format!("spec.{list}"), "pod updates may not add or remove containers")];
        }
        for (container, image) in before.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten().zip(images) {
            container["image"] = image;
        }
    }
    for field in [
        "activeDeadlineSeconds",
        "tolerations",
        "terminationGracePeriodSeconds",
        "schedulingGates",
        "ephemeralContainers",
        "nodeSelector",
    ] {
        let Some(map) = before.as_object_mut() else { continue };
        match spec.get(field) {
            Some(value) => map.insert(field.into(), value.clone()),
            None => map.remove(field),
        };
    }
    if &before == spec {
        return Vec::new();
    }
    vec![Cause::forbidden(
        "spec",
        "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
    )]
}
