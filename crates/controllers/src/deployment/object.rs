//! What is read of Deployments and of their ReplicaSets, and the numbers that follow from a strategy.

use crate::amount::int_or_percent;
use api::object::Metadata;
use reconcile::{Named, ObjectRef};
use serde::Deserialize;
use serde_json::Value;

pub const REVISION: &str = "deployment.kubernetes.io/revision";
pub const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Deployment {
    pub metadata: Metadata,
    pub spec: DeploymentSpec,
    pub status: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeploymentSpec {
    pub replicas: Option<i64>,
    pub selector: Value,
    pub template: Value,
    pub strategy: Value,
    pub min_ready_seconds: i64,
    pub revision_history_limit: Option<i64>,
    pub paused: bool,
    pub progress_deadline_seconds: Option<i64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ReplicaSet {
    pub metadata: Metadata,
    pub spec: ReplicaSetSpec,
    pub status: ReplicaSetStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplicaSetSpec {
    pub replicas: Option<i64>,
    pub min_ready_seconds: i64,
    pub template: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplicaSetStatus {
    pub replicas: i64,
    pub ready_replicas: i64,
    pub available_replicas: i64,
    pub observed_generation: i64,
    pub conditions: Vec<crate::conditions::Condition>,
}

impl Named for Deployment {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Named for ReplicaSet {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// How pods are replaced, in numbers of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    Recreate,
    RollingUpdate { max_surge: i64, max_unavailable: i64 },
}

impl DeploymentSpec {
    pub fn replicas(&self) -> i64 {
        self.replicas.unwrap_or(1)
    }

    /// Surge is rounded up, unavailability down; if both come to nothing, one pod may be unavailable.
    pub fn strategy(&self) -> Strategy {
        if self.strategy.get("type").and_then(Value::as_str) == Some("Recreate") {
            return Strategy::Recreate;
        }
        let quarter = Value::from("25%");
        let part = |name: &str, round_up: bool| {
            let value = self.strategy.pointer(&format!("/rollingUpdate/{name}")).unwrap_or(&quarter);
            int_or_percent(value, self.replicas(), round_up)
        };
        let (max_surge, max_unavailable) = (part("maxSurge", true), part("maxUnavailable", false));
        if max_surge == 0 && max_unavailable == 0 {
            return Strategy::RollingUpdate { max_surge, max_unavailable: 1 };
        }
        Strategy::RollingUpdate { max_surge, max_unavailable }
    }

    pub fn max_surge(&self) -> i64 {
        match self.strategy() {
            Strategy::Recreate => 0,
            Strategy::RollingUpdate { max_surge, .. } => max_surge,
        }
    }

    pub fn max_unavailable(&self) -> i64 {
        match self.strategy() {
            Strategy::Recreate => 0,
            Strategy::RollingUpdate { max_unavailable, .. } => max_unavailable.min(self.replicas()),
        }
    }

    /// The progress deadline; the largest 32-bit number means none.
    pub fn deadline(&self) -> Option<i64> {
        self.progress_deadline_seconds.filter(|d| *d != i64::from(i32::MAX))
    }
}

impl Deployment {
    pub fn collisions(&self) -> i64 {
        self.count("collisionCount")
    }

    /// A number of the status; absent is zero.
    pub fn count(&self, field: &str) -> i64 {
        self.status.get(field).and_then(Value::as_i64).unwrap_or(0)
    }

    pub fn about(&self) -> ObjectRef {
        let m = &self.metadata;
        ObjectRef::new("apps/v1", "Deployment", &m.namespace, &m.name, &m.uid)
    }
}

impl ReplicaSet {
    pub fn replicas(&self) -> i64 {
        self.spec.replicas.unwrap_or(1)
    }

    pub fn number(&self, annotation: &str) -> Option<i64> {
        self.metadata.annotations.get(annotation).and_then(|text| text.parse().ok())
    }

    pub fn revision(&self) -> i64 {
        self.number(REVISION).unwrap_or(0)
    }
}
