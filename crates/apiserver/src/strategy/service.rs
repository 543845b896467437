//! Services: defaults and checks. `claims` takes cluster IPs and node ports, `ports` and `addresses` choose them.

mod addresses;
mod claims;
mod ports;

use super::{Strategy, set_default};
use crate::auth::Identity;
use crate::registry::{Claims, Registry};
use api::{Cause, ObjectExt, Status, names};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;

pub use claims::ip_key;

pub struct Service;
pub static SERVICE: Service = Service;

fn kind(object: &Value) -> &str {
    object.text("/spec/type")
}

fn is_headless(object: &Value) -> bool {
    object.text("/spec/clusterIP") == "None"
}

/// Whether this is one of the Service's cluster IPs.
pub fn holds(service: &Value, ip: IpAddr) -> bool {
    strings(service, "/spec/clusterIPs").iter().any(|text| text.parse() == Ok(ip))
}

fn strings<'a>(object: &'a Value, pointer: &str) -> Vec<&'a str> {
    let list = object.pointer(pointer).and_then(Value::as_array);
    list.map(|l| l.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

fn ports(object: &Value) -> &[Value] {
    object.pointer("/spec/ports").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn family_name(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn wants_node_ports(object: &Value) -> bool {
    kind(object) == "NodePort"
        || kind(object) == "LoadBalancer"
            && object.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&json!(false))
}

fn wants_health_port(object: &Value) -> bool {
    kind(object) == "LoadBalancer" && object.text("/spec/externalTrafficPolicy") == "Local"
}

impl Strategy for Service {
    fn answers_deleted(&self) -> bool {
        true
    }

    fn creates_on_update(&self) -> bool {
        true
    }

    fn name_problems(&self, name: &str) -> Vec<String> {
        names::dns_1035_label(name)
    }

    fn default(&self, object: &mut Value) {
        let Some(spec) = object.get_mut("spec") else { return };
        set_default(spec, "type", json!("ClusterIP"));
        set_default(spec, "sessionAffinity", json!("None"));
        if spec.text("/sessionAffinity") == "None" {
            spec.as_object_mut().map(|m| m.remove("sessionAffinityConfig"));
        } else {
            let config = json!({"clientIP": {"timeoutSeconds": 10800}});
            set_default(spec, "sessionAffinityConfig", config);
        }
        let kind = spec.text("/type").to_string();
        if kind == "NodePort" || kind == "LoadBalancer" {
            set_default(spec, "externalTrafficPolicy", json!("Cluster"));
        }
        if kind == "LoadBalancer" {
            set_default(spec, "allocateLoadBalancerNodePorts", json!(true));
        }
        if kind != "ExternalName" {
            set_default(spec, "internalTrafficPolicy", json!("Cluster"));
        }
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            set_default(port, "protocol", json!("TCP"));
            let target = port.get("targetPort");
            if target.is_none_or(|t| t == &json!(0) || t == &json!("") || t.is_null()) {
                let number = port.get("port").cloned().unwrap_or(json!(0));
                port.as_object_mut().map(|m| m.insert("targetPort".into(), number));
            }
        }
    }

    fn prepare_for_create(&self, _: &Registry, _: &Identity, object: &mut Value) -> Result<(), Status> {
        if let Some(map) = object.as_object_mut() {
            map.insert("status".into(), json!({"loadBalancer": {}}));
        }
        Ok(())
    }

    fn prepare_for_update(&self, _: &Registry, object: &mut Value, old: &Value) {
        let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
        let now = spec.get("type").and_then(Value::as_str).unwrap_or("").to_string();
        if now == "ExternalName" {
            if kind(old) != "ExternalName" {
                for field in [
                    "clusterIP",
                    "clusterIPs",
                    "ipFamilies",
                    "ipFamilyPolicy",
                    "healthCheckNodePort",
                    "internalTrafficPolicy",
                ] {
                    spec.remove(field);
                }
            }
            return;
        }
        // Who changes the one address without the list changes the list's first.
        let text = |field: &str| spec.get(field).and_then(Value::as_str).unwrap_or("").to_string();
        let (first, before) = (text("clusterIP"), old.text("/spec/clusterIP"));
        let list = spec.get("clusterIPs").and_then(Value::as_array).cloned().unwrap_or_default();
        let list_before = old.pointer("/spec/clusterIPs").and_then(Value::as_array);
        if !first.is_empty() && first != before && (list.is_empty() || Some(&list) == list_before) {
            let mut changed = list;
            match changed.first_mut() {
                Some(slot) => *slot = json!(first),
                None => changed.push(json!(first)),
            }
            spec.insert("clusterIPs".into(), Value::Array(changed));
        }
        // What the new type has no use for goes, unless the client has just said it.
        let external = |type_: &str, ips: Option<&Value>| {
            matches!(type_, "NodePort" | "LoadBalancer") || ips.and_then(Value::as_array).is_some_and(|l| !l.is_empty())
        };
        let was_external = external(kind(old), old.pointer("/spec/externalIPs"));
        let is_external = external(&now, spec.get("externalIPs"));
        let mut drop_field = |field: &str, had: bool, has: bool| {
            if had && !has && spec.get(field) == old.pointer(&format!("/spec/{field}")) {
                spec.remove(field);
            }
        };
        drop_field("externalTrafficPolicy", was_external, is_external);
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            drop_field(field, kind(old) == "LoadBalancer", now == "LoadBalancer");
        }
        // What the server chose is kept when the client leaves it out.
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            let empty = spec.get(field).is_none_or(|v| v.is_null() || v == "" || v == &json!([]));
            if let Some(before) = old.pointer(&format!("/spec/{field}")).filter(|_| empty) {
                spec.insert(field.into(), before.clone());
            }
        }
        if now == "LoadBalancer"
            && spec.get("healthCheckNodePort").is_none()
            && let Some(before) = old.pointer("/spec/healthCheckNodePort")
        {
            spec.insert("healthCheckNodePort".into(), before.clone());
        }
        let wants = now == "NodePort" || now == "LoadBalancer";
        let old_ports = ports(old);
        let mut taken: Vec<u64> = Vec::new();
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            if !wants {
                let kept = old_ports.iter().any(|p| p.get("nodePort") == port.get("nodePort"));
                if kept {
                    port.as_object_mut().map(|m| m.remove("nodePort"));
                }
                continue;
            }
            if port.get("nodePort").is_some() {
                continue;
            }
            let same = |p: &&Value| p.get("port") == port.get("port") && p.get("protocol") == port.get("protocol");
            if let Some(number) = old_ports.iter().find(same).and_then(|p| p.get("nodePort")).and_then(Value::as_u64)
                && !taken.contains(&number)
            {
                taken.push(number);
                port.as_object_mut().map(|m| m.insert("nodePort".into(), json!(number)));
            }
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        let Some(spec) = object.get("spec") else {
            return vec![Cause::required("spec.ports", "")];
        };
        let kind = kind(object);
        let kinds = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
        if !kinds.contains(&kind) {
            causes.push(Cause::unsupported("spec.type", kind, &kinds));
        }
        if ports(object).is_empty() && !is_headless(object) && kind != "ExternalName" {
            causes.push(Cause::required("spec.ports", ""));
        }
        if kind == "ExternalName" {
            let name = object.text("/spec/externalName").trim_end_matches('.');
            if name.is_empty() {
                causes.push(Cause::required("spec.externalName", ""));
            } else {
                for problem in names::dns_subdomain(name) {
                    causes.push(Cause::invalid("spec.externalName", format!("{name:?}"), problem));
                }
            }
            if !matches!(object.text("/spec/clusterIP"), "" | "None") {
                causes.push(Cause::forbidden("spec.clusterIPs[0]", "may not be set when `type` is 'ExternalName'"));
            }
        }
        if kind == "LoadBalancer" && is_headless(object) {
            causes.push(Cause::invalid(
                "spec.clusterIPs[0]",
                "\"None\"",
                "may not be set to 'None' for LoadBalancer services",
            ));
        }
        if kind == "NodePort" && is_headless(object) {
            causes.push(Cause::invalid(
                "spec.clusterIPs[0]",
                "\"None\"",
                "may not be set to 'None' for NodePort services",
            ));
        }
        port_causes(object, &mut causes);
        causes.extend(super::meta::labels("spec.selector", spec.get("selector")));
        let affinity = spec.text("/sessionAffinity");
        if !matches!(affinity, "None" | "ClientIP") {
            causes.push(Cause::unsupported("spec.sessionAffinity", affinity, &["ClientIP", "None"]));
        }
        if affinity == "ClientIP" {
            let seconds = spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").and_then(Value::as_i64);
            if let Some(seconds) = seconds.filter(|s| !(1..=86400).contains(s)) {
                causes.push(Cause::invalid(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    seconds,
                    "must be greater than 0 and less than 86400",
                ));
            }
        }
        for (field, allowed) in
            [("externalTrafficPolicy", &["Cluster", "Local"]), ("internalTrafficPolicy", &["Cluster", "Local"])]
        {
            let value = spec.text(&format!("/{field}"));
            if !value.is_empty() && !allowed.contains(&value) {
                causes.push(Cause::unsupported(format!("spec.{field}"), value, allowed));
            }
        }
        if !matches!(kind, "NodePort" | "LoadBalancer")
            && !spec.text("/externalTrafficPolicy").is_empty()
            && strings(object, "/spec/externalIPs").is_empty()
        {
            causes.push(Cause::invalid(
                "spec.externalTrafficPolicy",
                format!("{:?}", spec.text("/externalTrafficPolicy")),
                "may only be set for externally-accessible services",
            ));
        }
        for (i, text) in strings(object, "/spec/externalIPs").iter().enumerate() {
            causes.extend(super::slice::address_problem(format!("spec.externalIPs[{i}]"), text));
        }
        for (i, text) in strings(object, "/spec/loadBalancerSourceRanges").iter().enumerate() {
            if text.trim().parse::<IpNet>().is_err() {
                causes.push(Cause::invalid(
                    format!("spec.loadBalancerSourceRanges[{i}]"),
                    format!("{text:?}"),
                    "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                ));
            }
        }
        ip_causes(object, &mut causes);
        if let Some(old) = old {
            update_causes(object, old, &mut causes);
        }
        causes
    }

    fn claims(&self, registry: &Registry, object: &mut Value, old: Option<&Value>) -> Result<Claims, Status> {
        claims::of(registry, object, old)
    }

    fn released(&self, object: &Value) -> Vec<String> {
        claims::held(object)
    }
}

fn port_causes(object: &Value, causes: &mut Vec<Cause>) {
    let all = ports(object);
    let kind = kind(object);
    let (mut names_seen, mut pairs, mut node_ports) = (Vec::new(), Vec::new(), Vec::new());
    for (i, port) in all.iter().enumerate() {
        let path = |field: &str| format!("spec.ports[{i}].{field}");
        let name = port.text("/name");
        if name.is_empty() {
            if all.len() > 1 {
                causes.push(Cause::required(path("name"), ""));
            }
        } else {
            for problem in names::dns_label(name) {
                causes.push(Cause::invalid(path("name"), format!("{name:?}"), problem));
            }
            if names_seen.contains(&name) {
                causes.push(Cause::duplicate(path("name"), format!("{name:?}")));
            }
            names_seen.push(name);
        }
        let number = port.get("port").and_then(Value::as_i64).unwrap_or(0);
        if !(1..=65535).contains(&number) {
            causes.push(Cause::invalid(path("port"), number, "must be between 1 and 65535, inclusive"));
        }
        let protocol = port.text("/protocol");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            causes.push(Cause::unsupported(path("protocol"), protocol, &["SCTP", "TCP", "UDP"]));
        }
        match port.get("targetPort") {
            Some(Value::Number(n)) if !(1..=65535).contains(&n.as_i64().unwrap_or(0)) => {
                causes.push(Cause::invalid(path("targetPort"), n, "must be between 1 and 65535, inclusive"));
            }
            Some(Value::String(text)) => {
                for problem in names::port_name(text) {
                    causes.push(Cause::invalid(path("targetPort"), format!("{text:?}"), problem));
                }
            }
            _ => {}
        }
        if pairs.contains(&(number, protocol)) {
            let shown = format!("{{\"protocol\":{protocol:?},\"port\":{number}}}");
            causes.push(Cause::duplicate(format!("spec.ports[{i}]"), shown));
        }
        pairs.push((number, protocol));
        let node_port = port.get("nodePort").and_then(Value::as_i64).unwrap_or(0);
        if node_port != 0 {
            if !matches!(kind, "NodePort" | "LoadBalancer") {
                causes.push(Cause::forbidden(path("nodePort"), "may not be used when `type` is 'ClusterIP'"));
            }
            if node_ports.contains(&(node_port, protocol)) {
                causes.push(Cause::duplicate(path("nodePort"), node_port));
            }
            node_ports.push((node_port, protocol));
        }
    }
}

fn ip_causes(object: &Value, causes: &mut Vec<Cause>) {
    let (first, all) = (object.text("/spec/clusterIP"), strings(object, "/spec/clusterIPs"));
    if all.len() > 2 {
        causes.push(Cause::invalid("spec.clusterIPs", json!(all), "may only hold up to 2 values"));
    }
    if !all.is_empty() && !first.is_empty() && all[0] != first {
        causes.push(Cause::invalid("spec.clusterIPs", json!(all), "first value must match `clusterIP`"));
    }
    for (i, text) in all.iter().enumerate() {
        if *text == "None" {
            if all.len() > 1 {
                causes.push(Cause::invalid(
                    format!("spec.clusterIPs[{i}]"),
                    "\"None\"",
                    "'None' must be the first and only value",
                ));
            }
        } else if text.parse::<IpAddr>().is_err() && !text.is_empty() {
            causes.push(Cause::invalid(
                format!("spec.clusterIPs[{i}]"),
                format!("{text:?}"),
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            ));
        }
    }
    if all.is_empty() && !matches!(first, "" | "None") && first.parse::<IpAddr>().is_err() {
        causes.push(Cause::invalid(
            "spec.clusterIPs[0]",
            format!("{first:?}"),
            "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        ));
    }
    let policy = object.text("/spec/ipFamilyPolicy");
    let policies = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    if !policy.is_empty() && !policies.contains(&policy) {
        causes.push(Cause::unsupported("spec.ipFamilyPolicy", policy, &policies));
    }
    for (i, family) in strings(object, "/spec/ipFamilies").iter().enumerate() {
        if !matches!(*family, "IPv4" | "IPv6") {
            causes.push(Cause::unsupported(format!("spec.ipFamilies[{i}]"), family, &["IPv4", "IPv6"]));
        }
    }
}

fn update_causes(object: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let external = |o: &Value| kind(o) == "ExternalName";
    if !external(object) && !external(old) {
        let (before, after) = (strings(old, "/spec/clusterIPs"), strings(object, "/spec/clusterIPs"));
        if let (Some(a), Some(b)) = (before.first(), after.first().or(Some(&object.text("/spec/clusterIP"))))
            && a != b
            && !a.is_empty()
        {
            causes.push(Cause::invalid("spec.clusterIPs[0]", format!("{b:?}"), "may not change once set"));
        }
        let (before, after) = (strings(old, "/spec/ipFamilies"), strings(object, "/spec/ipFamilies"));
        if let (Some(a), Some(b)) = (before.first(), after.first())
            && a != b
        {
            causes.push(Cause::invalid("spec.ipFamilies[0]", format!("{b:?}"), "may not change once set"));
        }
    }
    for field in ["loadBalancerClass", "healthCheckNodePort"] {
        let pointer = format!("/spec/{field}");
        let same_type = kind(object) == "LoadBalancer" && kind(old) == "LoadBalancer";
        if let (true, Some(before), Some(after)) = (same_type, old.pointer(&pointer), object.pointer(&pointer))
            && before != after
        {
            causes.push(Cause::invalid(format!("spec.{field}"), after, "may not change once set"));
        }
    }
}
