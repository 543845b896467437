//! An EndpointSlice as the controllers that keep them read and write it.

use crate::service::EndpointPort;
use api::object::{Key, Metadata};
use reconcile::Named;
use serde::{Deserialize, Serialize};

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
