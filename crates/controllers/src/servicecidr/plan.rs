//! What becomes of a ServiceCIDR, and which IPAddresses are missing or left over.

use crate::conditions::{self, Condition};
use crate::plan::Change;
use api::kinds::{IP_ADDRESSES, SERVICE_CIDRS};
use api::object::{Key, Metadata};
use ipnet::IpNet;
use jiff::Timestamp;
use reconcile::Named;
use serde::Deserialize;
use serde_json::json;
use std::net::IpAddr;
use std::sync::Arc;

/// Holds a ServiceCIDR back for as long as addresses of it are in use.
pub const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const READY: &str = "Ready";
const FAMILY: &str = "ipaddress.kubernetes.io/ip-family";
pub const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
pub const ALLOCATOR: &str = "ipallocator.k8s.io";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ServiceCidr {
    pub metadata: Metadata,
    pub spec: Ranges,
    pub status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Ranges {
    pub cidrs: Vec<IpNet>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct IpAddress {
    pub metadata: Metadata,
    pub spec: Parent,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Parent {
    pub parent_ref: ParentRef,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ParentRef {
    pub group: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub metadata: Metadata,
    pub spec: ServiceSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ServiceSpec {
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
}

impl Named for ServiceCidr {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for IpAddress {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for Service {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl IpAddress {
    pub fn ip(&self) -> Option<IpAddr> {
        self.metadata.name.parse().ok()
    }

    /// The Service that it stands for.
    pub fn service(&self) -> Option<Key> {
        let parent = &self.spec.parent_ref;
        let is_service = parent.group.is_empty() && parent.resource == "services";
        is_service.then(|| Key::new(&parent.namespace, &parent.name))
    }
}

impl Service {
    /// None of a headless Service.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.spec.cluster_ips.iter().filter_map(|text| text.parse().ok())
    }
}

/// Makes a ServiceCIDR ready, or lets go of one that is to be deleted once nobody needs it.
pub fn range(
    cidr: &ServiceCidr,
    all: &[Arc<ServiceCidr>],
    addresses: &[Arc<IpAddress>],
    now: Timestamp,
) -> Option<Change> {
    let metadata = &cidr.metadata;
    let is_held = metadata.finalizers.iter().any(|finalizer| finalizer == FINALIZER);
    let is_elsewhere = |ip: &IpAddr| {
        let mut others = all.iter().filter(|other| other.metadata.uid != metadata.uid && !other.metadata.is_deleting());
        others.any(|other| other.spec.cidrs.iter().any(|net| net.contains(ip)))
    };
    let condition = if metadata.is_deleting() {
        let mut users = addresses.iter().filter_map(|address| address.ip());
        let is_used = users.any(|ip| cidr.spec.cidrs.iter().any(|net| net.contains(&ip)) && !is_elsewhere(&ip));
        if !is_used {
            let others: Vec<&String> = metadata.finalizers.iter().filter(|name| *name != FINALIZER).collect();
            let body = json!({"metadata": {"finalizers": others, "resourceVersion": metadata.resource_version}});
            return is_held.then(|| Change::Patch(SERVICE_CIDRS, metadata.key(), body));
        }
        let why =
            "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
        Condition::new(READY, "False", "Terminating", why, now)
    } else {
        Condition::new(READY, "True", "", "Kubernetes Service CIDR is ready", now)
    };
    let mut wanted = cidr.status.conditions.clone();
    conditions::set(&mut wanted, condition);
    let differs = wanted != cidr.status.conditions;
    differs.then(|| Change::status(SERVICE_CIDRS, metadata.key(), json!({"conditions": conditions::write(&wanted)})))
}

/// The IPAddress of a Service's cluster IP, which somebody has deleted or an older server has not made.
pub fn restored(service: &Key, ip: IpAddr) -> Change {
    let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
        "metadata": {"name": ip, "labels": {FAMILY: family, MANAGED_BY: ALLOCATOR}},
        "spec": {"parentRef": {"resource": "services", "namespace": service.namespace, "name": service.name}},
    });
    Change::Create(IP_ADDRESSES, object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn cidr(name: &str, net: &str, deleting: bool) -> Arc<ServiceCidr> {
        let mut object = json!({
            "metadata": {"name": name, "uid": name, "finalizers": [FINALIZER, "example.com/other"]},
            "spec": {"cidrs": [net]},
        });
        if deleting {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Arc::new(serde_json::from_value(object).expect("the case is a ServiceCIDR"))
    }

    fn address(ip: &str) -> Arc<IpAddress> {
        Arc::new(serde_json::from_value(json!({"metadata": {"name": ip}})).expect("the case is an IPAddress"))
    }

    #[test]
    fn a_range_goes_when_nobody_needs_it() {
        let (one, other) = ("10.96.0.0/24", "10.96.0.0/16");
        let used = [address("10.96.0.7"), address("10.200.0.1")];
        for (title, deleting, with_other, addresses, expected) in [
            ("it is new", false, false, &used[..0], "True"),
            ("it is to go, an address is in use", true, false, &used[..], "False"),
            ("it is to go, another range has the address", true, true, &used[..], "gone"),
            ("it is to go, other ranges' addresses are in use", true, false, &used[1..], "gone"),
        ] {
            let cidr_ = cidr("a", one, deleting);
            let mut all = vec![cidr_.clone()];
            all.extend(with_other.then(|| cidr("b", other, false)));
            // One that goes, too, keeps nothing.
            all.push(cidr("c", other, true));
            let change = range(&cidr_, &all, addresses, Timestamp::UNIX_EPOCH).expect(title);
            let shown = match &change {
                Change::PatchStatus(_, _, body) => {
                    body.pointer("/status/conditions/0/status").and_then(Value::as_str).unwrap_or("").to_owned()
                }
                Change::Patch(_, _, body) => {
                    assert_eq!(body["metadata"]["finalizers"], json!(["example.com/other"]), "{title}");
                    "gone".into()
                }
                other => panic!("{title}: {other:?}"),
            };
            assert_eq!(shown, expected, "{title}");
        }
    }

    #[test]
    fn what_is_ready_is_left_alone() {
        let mut ready = ServiceCidr::clone(&cidr("a", "10.96.0.0/24", false));
        let Some(Change::PatchStatus(_, _, body)) = range(&ready, &[], &[], Timestamp::UNIX_EPOCH) else {
            panic!("it becomes ready")
        };
        ready.status.conditions = conditions::read(&body["status"]);
        assert_eq!(range(&ready, &[], &[], Timestamp::now()), None);
    }
}
