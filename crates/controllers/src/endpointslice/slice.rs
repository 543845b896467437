//! An EndpointSlice as the controllers that keep them read and write it.

use super::pack::Packed;
use crate::plan::Change;
use crate::service::{EndpointPort, Family};
use api::ObjectExt;
use api::kinds::ENDPOINT_SLICES;
use api::object::{Key, Metadata, OwnerReference};
use jiff::Timestamp;
use reconcile::Named;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;

pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    pub metadata: Metadata,
    pub address_type: String,
    // Go writes null for an empty list.
    endpoints: Option<Vec<Endpoint>>,
    ports: Option<Vec<EndpointPort>>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    pub addresses: Vec<String>,
    pub conditions: Conditions,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_ref: Option<TargetRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<Hints>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Conditions {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminating: Option<bool>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hints {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub for_zones: Vec<HintName>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub for_nodes: Vec<HintName>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HintName {
    pub name: String,
}

impl Named for EndpointSlice {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl EndpointSlice {
    pub fn endpoints(&self) -> &[Endpoint] {
        self.endpoints.as_deref().unwrap_or_default()
    }

    pub fn ports(&self) -> &[EndpointPort] {
        self.ports.as_deref().unwrap_or_default()
    }

    pub fn is_managed_by(&self, manager: &str) -> bool {
        self.metadata.labels.get(MANAGED_BY).is_some_and(|m| m == manager)
    }

    /// The Service whose endpoints these are.
    pub fn service(&self) -> Option<Key> {
        let name = self.metadata.labels.get(SERVICE_NAME)?;
        Some(Key::new(&self.metadata.namespace, name))
    }
}

impl Endpoint {
    /// What stays the same while the endpoint's conditions change: its pod, or else its addresses.
    pub fn identity(&self) -> (String, Vec<String>) {
        let uid = self.target_ref.as_ref().map(|t| t.uid.clone()).unwrap_or_default();
        (uid, self.addresses.clone())
    }

    pub fn is_ready(&self) -> bool {
        self.conditions.ready != Some(false)
    }
}

/// What all slices of one owner have in common.
pub struct Head {
    pub namespace: String,
    /// The owner's name, which slices' names begin with.
    pub base: String,
    pub labels: BTreeMap<String, String>,
    /// `None` leaves those that are there.
    pub annotations: Option<BTreeMap<String, String>>,
    pub owner: OwnerReference,
    pub trigger: Trigger,
}

/// What a slice that is written says of when the change of its endpoints began.
#[derive(Debug, Clone, PartialEq)]
pub enum Trigger {
    /// As it was.
    Kept,
    /// `None`: nobody knows.
    At(Option<Timestamp>),
}

const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The write that makes a slice hold what was packed into it; none if it does. `name` gives a new slice its name.
pub fn write(head: &Head, family: Family, packed: Packed, name: impl FnOnce() -> String) -> Option<Change> {
    let Packed { slice, ports, endpoints } = packed;
    let Some(endpoints) = endpoints else {
        let slice = slice?;
        return Some(Change::delete(ENDPOINT_SLICES, slice.metadata.key(), &slice.metadata.uid));
    };
    let held = slice.as_ref().map(|s| s.metadata.annotations.clone()).unwrap_or_default();
    let mut annotations = head.annotations.clone().unwrap_or_else(|| held.clone());
    if let Some(slice) = &slice {
        let is_same = slice.endpoints() == endpoints.as_slice()
            && slice.ports() == ports.as_slice()
            && slice.metadata.labels == head.labels
            && held == annotations;
        if is_same {
            return None;
        }
    }
    // Only with another change: by itself it is no reason to write.
    if let Trigger::At(time) = &head.trigger {
        match time {
            Some(time) => drop(annotations.insert(TRIGGER_TIME.into(), api::time::seconds(*time))),
            None => drop(annotations.remove(TRIGGER_TIME)),
        }
    }
    let mut object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": head.namespace, "generateName": format!("{}-", head.base),
            "labels": head.labels, "ownerReferences": [head.owner],
        },
        "addressType": family.as_str(), "endpoints": endpoints, "ports": ports,
    });
    let metadata = object.metadata_mut();
    if !annotations.is_empty() {
        metadata.insert("annotations".into(), json!(annotations));
    }
    match slice {
        Some(slice) => {
            metadata.insert("name".into(), json!(slice.metadata.name));
            metadata.insert("resourceVersion".into(), json!(slice.metadata.resource_version));
            Some(Change::Replace(ENDPOINT_SLICES, object))
        }
        None => {
            metadata.insert("name".into(), json!(name()));
            Some(Change::Create(ENDPOINT_SLICES, object))
        }
    }
}
