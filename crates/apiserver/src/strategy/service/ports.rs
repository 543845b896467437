//! Node ports: those a Service asks for, and those it leaves to us.

use super::addresses::random;
use super::claims::{Taking, port_key};
use super::{ports, wants_health_port, wants_node_ports};
use crate::registry::{Allocation, Registry};
use api::{Cause, ObjectExt, Status};
use serde_json::{Value, json};

fn free_node_port(registry: &Registry, allocation: &Allocation, protocol: &str, chosen: &[String]) -> Option<u16> {
    let (low, high) = (*allocation.node_ports.start(), *allocation.node_ports.end());
    let size = u32::from(high - low) + 1;
    // Called the static band in KEP-3668.
    let band = (size / 32).clamp(16, 128).min(size);
    let free = |port: u16| {
        let key = port_key(protocol, port.into());
        (!registry.cache.is_claimed(&key) && !chosen.contains(&key)).then_some(port)
    };
    let upper = size - band;
    if upper > 0 {
        let start = (random() % u128::from(upper)) as u32;
        for i in 0..upper {
            let port = low + u16::try_from(band + (start + i) % upper).unwrap_or(0);
            if let Some(port) = free(port) {
                return Some(port);
            }
        }
    }
    (low..low + band as u16).find_map(free)
}

/// Node ports, and the health check node port.
pub fn fill(taking: &mut Taking<'_>, object: &mut Value) -> Result<(), Status> {
    let registry = taking.registry;
    let wants = wants_node_ports(object);
    let range = &registry.allocation.node_ports;
    let mut chosen: Vec<String> = Vec::new();
    let count = ports(object).len();
    for i in 0..count {
        let port = ports(object)[i].clone();
        let protocol = port.text("/protocol").to_string();
        let explicit = port.get("nodePort").and_then(Value::as_u64).filter(|p| *p != 0);
        let number = match explicit {
            Some(number) => {
                let key = port_key(&protocol, number);
                if !taking.held.contains(&key) && !chosen.contains(&key) {
                    let field = format!("spec.ports[{i}].nodePort");
                    if !u16::try_from(number).is_ok_and(|p| range.contains(&p)) {
                        return Err(taking.invalid(Cause::invalid(
                            field,
                            number,
                            format!(
                                "provided port is not in the valid range. The range of valid ports is {}-{}",
                                range.start(),
                                range.end()
                            ),
                        )));
                    }
                    if registry.cache.is_claimed(&key) {
                        return Err(taking.invalid(Cause::invalid(
                            field,
                            number,
                            "provided port is already allocated",
                        )));
                    }
                    taking.take(key.clone());
                }
                chosen.push(key);
                number
            }
            None if wants => {
                // The same port number over TCP and UDP shares one node port where it can.
                let twin = ports(object)[..i]
                    .iter()
                    .filter(|p| p.get("port") == port.get("port") && p.text("/protocol") != protocol)
                    .find_map(|p| p.get("nodePort").and_then(Value::as_u64))
                    .filter(|n| !registry.cache.is_claimed(&port_key(&protocol, *n)));
                let number = match twin {
                    Some(number) => number,
                    None => free_node_port(registry, &registry.allocation, &protocol, &chosen)
                        .map(u64::from)
                        .ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))?,
                };
                let key = port_key(&protocol, number);
                chosen.push(key.clone());
                taking.take(key);
                number
            }
            None => continue,
        };
        if let Some(port) = object.pointer_mut(&format!("/spec/ports/{i}")).and_then(Value::as_object_mut) {
            port.insert("nodePort".into(), json!(number));
        }
    }
    let health = object.pointer("/spec/healthCheckNodePort").and_then(Value::as_u64);
    if wants_health_port(object) {
        match health {
            Some(number) => {
                let key = port_key("TCP", number);
                if !taking.held.contains(&key) {
                    if registry.cache.is_claimed(&key) {
                        return Err(taking.invalid(Cause::invalid(
                            "spec.healthCheckNodePort",
                            number,
                            "provided port is already allocated",
                        )));
                    }
                    taking.take(key);
                }
            }
            None => {
                let number = free_node_port(registry, &registry.allocation, "TCP", &chosen)
                    .ok_or_else(|| Status::internal("failed to allocate a HealthCheck NodePort: range is full"))?;
                taking.take(port_key("TCP", number.into()));
                if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
                    spec.insert("healthCheckNodePort".into(), json!(number));
                }
            }
        }
    } else if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove("healthCheckNodePort");
    }
    Ok(())
}
