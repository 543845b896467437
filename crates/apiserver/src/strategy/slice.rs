//! EndpointSlices: defaults and checks as Kubernetes has them.

use super::{Strategy, set_default};
use api::{Cause, ObjectExt, names};
use serde_json::{Value, json};
use std::net::IpAddr;

pub struct Slice;
pub static SLICE: Slice = Slice;

/// Why an address may not be an endpoint.
pub fn address_problem(path: String, text: &str) -> Option<Cause> {
    let quoted = format!("{text:?}");
    let Ok(ip) = text.parse::<IpAddr>() else {
        return Some(Cause::invalid(path, quoted, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"));
    };
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let problem = if ip.is_unspecified() {
        "may not be unspecified (0.0.0.0 or ::)"
    } else if ip.is_loopback() {
        "may not be in the loopback range (127.0.0.0/8, ::1/128)"
    } else if is_link_local {
        "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
    } else if ip.is_multicast() {
        "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"
    } else {
        return None;
    };
    Some(Cause::invalid(path, quoted, problem))
}

impl Strategy for Slice {
    fn default(&self, object: &mut Value) {
        for port in object.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            set_default(port, "name", json!(""));
            set_default(port, "protocol", json!("TCP"));
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        let family = object.text("/addressType");
        let known = ["FQDN", "IPv4", "IPv6"];
        if family.is_empty() {
            causes.push(Cause::required("addressType", ""));
        } else if !known.contains(&family) {
            causes.push(Cause::unsupported("addressType", family, &known));
        }
        if old.is_some_and(|o| o.text("/addressType") != family) {
            causes.push(Cause::invalid("addressType", format!("{family:?}"), "field is immutable"));
        }
        let endpoints = object.get("endpoints").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if endpoints.len() > 1000 {
            causes.push(Cause {
                reason: "FieldValueTooMany".into(),
                message: format!("Too many: {}: must have at most 1000 items", endpoints.len()),
                field: "endpoints".into(),
            });
        }
        for (i, endpoint) in endpoints.iter().enumerate() {
            let addresses = endpoint.get("addresses").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            if addresses.is_empty() {
                causes.push(Cause::required(format!("endpoints[{i}].addresses"), "must contain at least 1 address"));
            }
            for (j, address) in addresses.iter().enumerate() {
                let text = address.as_str().unwrap_or("");
                let path = format!("endpoints[{i}].addresses[{j}]");
                match family {
                    "FQDN" => {
                        for problem in names::dns_subdomain(text) {
                            causes.push(Cause::invalid(path.clone(), format!("{text:?}"), problem));
                        }
                    }
                    "IPv4" if text.parse::<std::net::Ipv4Addr>().is_err() => {
                        causes.push(Cause::invalid(path, format!("{text:?}"), "must be an IPv4 address"));
                    }
                    "IPv6" if text.parse::<std::net::Ipv6Addr>().is_err() => {
                        causes.push(Cause::invalid(path, format!("{text:?}"), "must be an IPv6 address"));
                    }
                    _ => causes.extend(address_problem(path, text)),
                }
            }
            if let Some(hostname) = endpoint.get("hostname").and_then(Value::as_str) {
                for problem in names::dns_label(hostname) {
                    causes.push(Cause::invalid(format!("endpoints[{i}].hostname"), format!("{hostname:?}"), problem));
                }
            }
        }
        let ports = object.get("ports").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let mut seen = Vec::new();
        for (i, port) in ports.iter().enumerate() {
            let name = port.text("/name");
            if seen.contains(&name) {
                causes.push(Cause::duplicate(format!("ports[{i}].name"), format!("{name:?}")));
            }
            seen.push(name);
            for problem in names::dns_label(name).into_iter().filter(|_| !name.is_empty()) {
                causes.push(Cause::invalid(format!("ports[{i}].name"), format!("{name:?}"), problem));
            }
            // Kubernetes takes any number, which no packet could be sent to.
            if let Some(number) = port.get("port").and_then(Value::as_i64).filter(|port| !(1..=65535).contains(port)) {
                let why = "must be between 1 and 65535, inclusive";
                causes.push(Cause::invalid(format!("ports[{i}].port"), number, why));
            }
            let protocol = port.text("/protocol");
            if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
                causes.push(Cause::unsupported(format!("ports[{i}].protocol"), protocol, &["TCP", "UDP", "SCTP"]));
            }
        }
        causes
    }
}
