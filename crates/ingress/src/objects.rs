//! The fields of the objects that routes are made of, parsed once from the event's bytes.

use api::object::{Key, Metadata};
use serde::Deserialize;

/// networking.k8s.io/v1 Ingress.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Ingress {
    pub metadata: Metadata,
    pub spec: IngressSpec,
    pub status: IngressStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct IngressSpec {
    pub ingress_class_name: Option<String>,
    pub default_backend: Option<Backend>,
    pub tls: Vec<Tls>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Tls {
    pub hosts: Vec<String>,
    pub secret_name: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Rule {
    /// Empty: every host.
    pub host: String,
    pub http: Option<HttpRule>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct HttpRule {
    pub paths: Vec<Path>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Path {
    pub path: String,
    pub path_type: String,
    pub backend: Backend,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Backend {
    pub service: Option<ServiceBackend>,
    pub resource: Option<ResourceBackend>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceBackend {
    pub name: String,
    pub port: BackendPort,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct BackendPort {
    pub name: String,
    pub number: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ResourceBackend {
    pub api_group: Option<String>,
    pub kind: String,
    pub name: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct IngressStatus {
    pub load_balancer: LoadBalancer,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LoadBalancer {
    pub ingress: Vec<LoadBalancerIngress>,
}

/// Where a load balancer is reached: an address or a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(default)]
pub struct LoadBalancerIngress {
    pub ip: String,
    pub hostname: String,
}

/// networking.k8s.io/v1 IngressClass.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct IngressClass {
    pub metadata: Metadata,
    pub spec: IngressClassSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct IngressClassSpec {
    pub controller: String,
}

impl Ingress {
    pub fn key(&self) -> Key {
        self.metadata.key()
    }

    /// The older of two that want the same wins; those of the same second by name.
    pub fn age(&self) -> (&str, &str, &str) {
        let created = self.metadata.creation_timestamp.as_deref().unwrap_or_default();
        (created, &self.metadata.namespace, &self.metadata.name)
    }

    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata.annotations.get(key).map(String::as_str)
    }
}
