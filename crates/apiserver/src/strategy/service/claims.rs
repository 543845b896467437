//! What a Service holds that there is one of: cluster IPs, each with its IPAddress object, and node ports.

use super::{addresses, kind, ports, strings};
use crate::registry::{Claim, Claims, Registry};
use api::{Cause, ObjectExt, Status};
use serde_json::Value;
use std::net::IpAddr;

/// The claims of one write, while they are gathered.
pub struct Taking<'a> {
    pub registry: &'a Registry,
    pub name: String,
    /// `namespace/name`
    pub holder: String,
    /// Keys that the Service holds already.
    pub held: Vec<String>,
    pub claims: Claims,
}

impl Taking<'_> {
    pub fn take(&mut self, key: String) {
        self.claims.take.push(Claim::held_by(key, &self.holder));
    }

    pub fn invalid(&self, cause: Cause) -> Status {
        Status::invalid("", "Service", &self.name, vec![cause])
    }
}

pub fn ip_key(ip: IpAddr) -> String {
    format!("claims/clusterip/{ip}")
}

pub fn port_key(protocol: &str, port: u64) -> String {
    format!("claims/nodeport/{protocol}/{port}")
}

/// Where the IPAddress object of a cluster IP is stored.
pub fn ip_object_key(ip: IpAddr) -> String {
    format!("registry/networking.k8s.io/ipaddresses/{ip}")
}

/// Fills what the Service leaves to us, and says what has to be taken and given back for it.
pub fn of(registry: &Registry, object: &mut Value, old: Option<&Value>) -> Result<Claims, Status> {
    let mut taking = Taking {
        registry,
        name: object.name().to_string(),
        holder: format!("{}/{}", object.namespace(), object.name()),
        held: old.map(held).unwrap_or_default(),
        claims: Claims::default(),
    };
    if kind(object) != "ExternalName" {
        addresses::fill(&mut taking, object)?;
    }
    ports::fill(&mut taking, object)?;
    let Taking { mut claims, held: before, .. } = taking;
    let keep = held(object);
    claims.release = before.into_iter().filter(|key| !keep.contains(key)).collect();
    Ok(claims)
}

/// The claims an object in this state holds.
pub fn held(object: &Value) -> Vec<String> {
    let mut keys = Vec::new();
    for text in strings(object, "/spec/clusterIPs") {
        if let Ok(ip) = text.parse() {
            keys.extend([ip_key(ip), ip_object_key(ip)]);
        }
    }
    for port in super::ports(object) {
        if let Some(number) = port.get("nodePort").and_then(Value::as_u64) {
            let key = port_key(port.text("/protocol"), number);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    }
    if let Some(number) = object.pointer("/spec/healthCheckNodePort").and_then(Value::as_u64) {
        keys.push(port_key("TCP", number));
    }
    keys
}
