//! Cluster IPs: of which families, out of which ServiceCIDR, and the IPAddress object that stands for each.

use super::claims::{Taking, ip_key, ip_object_key};
use super::{family_name, is_headless, strings};
use crate::cache::to_stored;
use crate::registry::{Claim, Registry};
use crate::strategy::service_cidr::{DEFAULT, cidrs, is_ready};
use crate::verbs::random_uid;
use api::kinds::{IP_ADDRESSES, SERVICE_CIDRS};
use api::{Cause, ObjectExt, Status, time};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;
use store::Compare;

/// Where addresses are taken from.
struct Range {
    net: IpNet,
    /// The ServiceCIDR is what it was when it was chosen: nobody has marked it for deletion meanwhile.
    given: Option<Compare>,
}

/// The ranges of all ServiceCIDRs that are not going away, the cluster's own first. Its own are there without the object,
/// too, since the server was started with them.
fn ranges(registry: &Registry) -> Vec<Range> {
    let row = registry.row(&SERVICE_CIDRS);
    let all = registry.cache.list(row, "").1;
    let mut ranges = Vec::new();
    if !all.iter().any(|stored| &*stored.name == DEFAULT) {
        ranges.extend(registry.allocation.service_cidrs.iter().map(|net| Range { net: *net, given: None }));
    }
    let (own, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|stored| &*stored.name == DEFAULT);
    for stored in own.into_iter().chain(others) {
        let object = stored.parse();
        if is_ready(&object) {
            let given = || Some(Compare::Unchanged(row.key("", &stored.name), stored.revision));
            ranges.extend(cidrs(&object).map(|net| Range { net, given: given() }));
        }
    }
    ranges
}

/// A Service holds it, or somebody has made an IPAddress of that name.
fn is_taken(registry: &Registry, ip: IpAddr) -> bool {
    registry.cache.is_claimed(&ip_key(ip)) || registry.read(&IP_ADDRESSES, "", &ip.to_string()).is_some()
}

fn ip_address(ip: IpAddr, service: &Value, registry: &Registry) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
        "metadata": {
            "name": ip, "uid": random_uid(), "creationTimestamp": time::seconds(registry.now()),
            "labels": {
                "ipaddress.kubernetes.io/ip-family": family_name(ip),
                "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
            },
        },
        "spec": {"parentRef": {"resource": "services", "namespace": service.namespace(), "name": service.name()}},
    })
}

/// Families, their policy, and an address of each.
pub fn fill(taking: &mut Taking<'_>, object: &mut Value) -> Result<(), Status> {
    let registry = taking.registry;
    let available: Vec<&str> = registry.allocation.service_cidrs.iter().map(|c| family_name(c.addr())).collect();
    let headless = is_headless(object);
    let mut asked: Vec<String> = strings(object, "/spec/clusterIPs").into_iter().map(str::to_string).collect();
    let first = object.text("/spec/clusterIP").to_string();
    if asked.is_empty() && !first.is_empty() {
        asked.push(first);
    }
    let mut families: Vec<String> = strings(object, "/spec/ipFamilies").into_iter().map(str::to_string).collect();
    let policy = object.text("/spec/ipFamilyPolicy").to_string();
    let policy = if policy.is_empty() {
        if families.len() > 1 || asked.len() > 1 { "RequireDualStack" } else { "SingleStack" }
    } else {
        policy.as_str()
    };
    let selectorless = object.pointer("/spec/selector").and_then(Value::as_object).is_none_or(|m| m.is_empty());
    if policy == "RequireDualStack" && available.len() < 2 && !(headless && selectorless) {
        return Err(taking.invalid(Cause::invalid(
            "spec.ipFamilyPolicy",
            "\"RequireDualStack\"",
            "this cluster is not configured for dual-stack services",
        )));
    }
    // A literal address names its family.
    for text in &asked {
        if let Ok(ip) = text.parse::<IpAddr>()
            && !families.iter().any(|f| f == family_name(ip))
            && families.len() < asked.len()
        {
            families.push(family_name(ip).into());
        }
    }
    if families.is_empty() {
        families.push(available.first().copied().unwrap_or("IPv4").into());
    }
    for (i, family) in families.iter().enumerate() {
        let any_family = headless && selectorless;
        if !available.contains(&family.as_str()) && !any_family {
            return Err(taking.invalid(Cause::invalid(
                format!("spec.ipFamilies[{i}]"),
                format!("{family:?}"),
                "not configured on this cluster",
            )));
        }
    }
    let wants = if policy == "SingleStack" { 1 } else { available.len().max(1) };
    for family in &available {
        if families.len() < wants && !families.iter().any(|f| f == family) {
            families.push((*family).into());
        }
    }
    if policy == "SingleStack" {
        families.truncate(1);
        asked.truncate(1);
    }
    if !headless {
        for (i, family) in families.iter().enumerate() {
            let ranges: Vec<Range> =
                ranges(registry).into_iter().filter(|r| family_name(r.net.addr()) == family).collect();
            let (ip, range) = match asked.get(i).filter(|a| !a.is_empty()) {
                Some(text) => {
                    let Ok(ip) = text.parse::<IpAddr>() else { continue };
                    if taking.held.contains(&ip_key(ip)) || ranges.is_empty() {
                        continue;
                    }
                    let refused = |why: String| {
                        let shown = json!(asked).to_string().replace(',', ", ");
                        taking.invalid(Cause::invalid(
                            "spec.clusterIPs",
                            shown,
                            format!("failed to allocate IP {ip}: {why}"),
                        ))
                    };
                    let Some(range) = ranges.iter().find(|range| range.net.contains(&ip)) else {
                        let valid: Vec<String> = ranges.iter().map(|range| range.net.to_string()).collect();
                        return Err(refused(format!(
                            "the provided IP ({ip}) is not in the valid range. The range of valid IPs is {}",
                            valid.join(", ")
                        )));
                    };
                    if is_taken(registry, ip) {
                        return Err(refused("provided IP is already allocated".into()));
                    }
                    (ip, range)
                }
                None if ranges.is_empty() => continue,
                None => {
                    let free = ranges.iter().find_map(|range| Some((free_address(registry, &range.net)?, range)));
                    let (ip, range) = free.ok_or_else(|| {
                        let full: Vec<String> = ranges.iter().map(|range| range.net.to_string()).collect();
                        Status::internal(format!("failed to allocate a serviceIP: range {} is full", full.join(", ")))
                    })?;
                    asked.resize(i + 1, String::new());
                    asked[i] = ip.to_string();
                    (ip, range)
                }
            };
            taking.take(ip_key(ip));
            let value = to_stored(&ip_address(ip, object, registry));
            taking.claims.take.push(Claim { key: ip_object_key(ip), value });
            taking.claims.given.extend(range.given.clone());
        }
    } else {
        asked = vec!["None".into()];
    }
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        spec.insert("clusterIP".into(), json!(asked.first().cloned().unwrap_or_default()));
        spec.insert("clusterIPs".into(), json!(asked));
        spec.insert("ipFamilies".into(), json!(families));
        spec.insert("ipFamilyPolicy".into(), json!(policy));
    }
    Ok(())
}

fn nth_address(cidr: &IpNet, n: u128) -> IpAddr {
    match cidr {
        IpNet::V4(net) => IpAddr::from((u32::from(net.network()).wrapping_add(n as u32)).to_be_bytes()),
        IpNet::V6(net) => IpAddr::from((u128::from(net.network()).wrapping_add(n)).to_be_bytes()),
    }
}

/// A free address: from the upper band first, so that the lower one stays free for addresses chosen by people (KEP-3070).
fn free_address(registry: &Registry, cidr: &IpNet) -> Option<IpAddr> {
    let bits = match cidr {
        IpNet::V4(_) => 32,
        IpNet::V6(_) => 128,
    } - u32::from(cidr.prefix_len());
    let size = if bits >= 64 { u128::from(u64::MAX) } else { 1u128 << bits };
    // Network and, in IPv4, broadcast are no service addresses.
    let last = if cidr.addr().is_ipv4() { size.saturating_sub(2) } else { size - 1 };
    let band = (size / 16).clamp(16, 256).min(last);
    let free = |n: u128| {
        let ip = nth_address(cidr, n);
        (!is_taken(registry, ip)).then_some(ip)
    };
    let upper = last.checked_sub(band)?;
    if upper > 0 {
        let start = random() % upper;
        // A few random tries find a place in any but a nearly full range; then every place is tried.
        for i in 0..upper.min(65_536) {
            if let Some(ip) = free(band + 1 + (start + i) % upper) {
                return Some(ip);
            }
        }
    }
    (1..=band).find_map(free)
}

pub fn random() -> u128 {
    let mut bytes = [0u8; 8];
    // Without entropy the first free place is as good.
    match getrandom::fill(&mut bytes) {
        Ok(()) => u128::from(u64::from_le_bytes(bytes)),
        Err(_) => 0,
    }
}
