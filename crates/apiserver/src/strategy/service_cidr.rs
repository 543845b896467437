//! ServiceCIDRs and IPAddresses: the ranges that cluster IPs are taken from, and one object for each that is taken (KEP-1880).

use super::Strategy;
use super::service::{holds, ip_key};
use crate::auth::Identity;
use crate::registry::{Claims, Registry};
use api::kinds::SERVICES;
use api::{Cause, ObjectExt, Status};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;
use store::Compare;

/// The ServiceCIDR with the ranges that the server was started with.
pub const DEFAULT: &str = "kubernetes";
/// Holds a ServiceCIDR back for as long as addresses of it are in use.
const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";

pub struct ServiceCidr;
pub struct IpAddress;
pub static SERVICE_CIDR: ServiceCidr = ServiceCidr;
pub static IP_ADDRESS: IpAddress = IpAddress;

fn texts(object: &Value) -> impl Iterator<Item = &str> {
    object
        .pointer("/spec/cidrs")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|cidr| cidr.as_str().unwrap_or(""))
}

/// The ranges of a ServiceCIDR.
pub fn cidrs(object: &Value) -> impl Iterator<Item = IpNet> {
    texts(object).filter_map(|text| text.parse().ok())
}

/// Whether new addresses may be taken from it. One that nobody has looked at yet is as good as ready.
pub fn is_ready(object: &Value) -> bool {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions.into_iter().flatten().find(|condition| condition.text("/type") == "Ready");
    !object.is_deleting() && ready.is_none_or(|condition| condition.text("/status") == "True")
}

impl Strategy for ServiceCidr {
    fn prepare_for_create(&self, _: &Registry, _: &Identity, object: &mut Value) -> Result<(), Status> {
        // From the first moment on, or it could be deleted with addresses in use.
        let mut finalizers: Vec<String> = object.finalizers().into_iter().map(str::to_owned).collect();
        if !finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
            finalizers.push(FINALIZER.into());
        }
        object.metadata_mut().insert("finalizers".into(), json!(finalizers));
        Ok(())
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let all: Vec<&str> = texts(object).collect();
        if let Some(old) = old {
            let is_same = texts(old).eq(all.iter().copied());
            let shown = json!(all).to_string();
            return if is_same { Vec::new() } else { vec![Cause::invalid("spec.cidrs", shown, "field is immutable")] };
        }
        let mut causes = Vec::new();
        match all.len() {
            0 => causes.push(Cause::required("spec.cidrs", "at least one CIDR required")),
            1 | 2 => {}
            _ => causes.push(Cause::invalid("spec.cidrs", json!(all), "may only hold up to 2 values")),
        }
        let mut families = Vec::new();
        for (i, text) in all.iter().enumerate() {
            let path = format!("spec.cidrs[{i}]");
            match text.parse::<IpNet>() {
                Err(_) => {
                    let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
                    causes.push(Cause::invalid(path, format!("{text:?}"), why));
                }
                Ok(net) if net.trunc().to_string() != *text => {
                    let why = format!("must be in canonical form ({:?})", net.trunc().to_string());
                    causes.push(Cause::invalid(path, format!("{text:?}"), why));
                }
                Ok(net) => families.push(net.addr().is_ipv6()),
            }
        }
        if families.len() == 2 && families[0] == families[1] {
            let why = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
            causes.push(Cause::invalid("spec.cidrs", json!(all), why));
        }
        causes
    }
}

impl Strategy for IpAddress {
    /// The name is the address, written as everybody writes it.
    fn name_problems(&self, name: &str) -> Vec<String> {
        match name.parse::<IpAddr>() {
            Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()],
            Ok(ip) if ip.to_string() != name => vec![format!("must be in canonical form ({:?})", ip.to_string())],
            Ok(_) => Vec::new(),
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let parent = object.pointer("/spec/parentRef");
        if let Some(old) = old {
            let is_same = old.pointer("/spec/parentRef") == parent;
            let shown = super::compact(parent.unwrap_or(&Value::Null));
            return if is_same {
                Vec::new()
            } else {
                vec![Cause::invalid("spec.parentRef", shown, "field is immutable")]
            };
        }
        let Some(parent) = parent else { return vec![Cause::required("spec.parentRef", "")] };
        let missing = ["resource", "name"].into_iter().filter(|field| parent.text(&format!("/{field}")).is_empty());
        missing.map(|field| Cause::required(format!("spec.parentRef.{field}"), "")).collect()
    }

    /// An address that a Service holds gets its object back only for that Service.
    fn claims(&self, registry: &Registry, object: &mut Value, old: Option<&Value>) -> Result<Claims, Status> {
        let mut claims = Claims::default();
        let Some(ip) = object.name().parse::<IpAddr>().ok().filter(|_| old.is_none()) else { return Ok(claims) };
        let parent = |field: &str| object.text(&format!("/spec/parentRef/{field}"));
        let is_service = parent("group").is_empty() && parent("resource") == "services";
        let service = registry.read(&SERVICES, parent("namespace"), parent("name")).filter(|_| is_service);
        if service.is_some_and(|service| holds(&service.parse(), ip)) {
            return Ok(claims);
        }
        if registry.cache.is_claimed(&ip_key(ip)) {
            let cause =
                Cause::invalid("metadata.name", format!("{:?}", object.name()), "another Service has this address");
            return Err(Status::invalid("networking.k8s.io", "IPAddress", object.name(), vec![cause]));
        }
        claims.given.push(Compare::Absent(ip_key(ip)));
        Ok(claims)
    }
}
