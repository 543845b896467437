//! What verbs and strategies stand on: catalog, store, cache, and the ranges that claims are taken from.

use crate::auth::rbac::Rbac;
use crate::cache::{Stored, WatchCache};
use crate::catalog::{Catalog, Row};
use api::Status;
use bytes::Bytes;
use ipnet::IpNet;
use jiff::Timestamp;
use std::ops::RangeInclusive;
use std::sync::Arc;
use store::{Compare, Outcome, Revision, Store, Txn};
use tokio_util::sync::CancellationToken;

/// Where cluster IPs and node ports are taken from.
#[derive(Debug, Clone)]
pub struct Allocation {
    /// One or two, of different families; the first is the primary family.
    pub service_cidrs: Vec<IpNet>,
    pub node_ports: RangeInclusive<u16>,
    /// The cluster's pod ranges, of which each node gets a share.
    pub pod_cidrs: Vec<IpNet>,
}

pub struct Registry {
    pub catalog: Catalog,
    pub store: Arc<dyn Store>,
    pub cache: Arc<WatchCache>,
    pub allocation: Allocation,
    pub rbac: Rbac,
    /// Cancelled when the server ends; watches end with it.
    pub token: CancellationToken,
}

/// A claim on something there is one of: a key under `claims/`, or that of an object which stands for it; and what is
/// written there, such as who holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub key: String,
    pub value: Bytes,
}

impl Claim {
    pub fn held_by(key: String, holder: &str) -> Claim {
        Claim { key, value: holder.to_owned().into() }
    }
}

/// What a write takes and gives back in its own transaction.
#[derive(Debug, Clone, Default)]
pub struct Claims {
    pub take: Vec<Claim>,
    pub release: Vec<String>,
    /// What must still be so when the write happens.
    pub given: Vec<Compare>,
}

impl Registry {
    pub fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    /// The row of a built-in kind that the engine itself reads.
    pub fn row(&self, resource: &api::Resource) -> &Arc<Row> {
        self.catalog
            .find(resource.group, resource.version, resource.plural)
            .expect("every resource of api::kinds has a row")
    }

    pub fn read(&self, resource: &api::Resource, namespace: &str, name: &str) -> Option<Arc<Stored>> {
        self.cache.get(self.row(resource), namespace, name)
    }

    /// Commits, and waits until the cache holds the result.
    pub async fn commit(&self, txn: Txn) -> Result<Outcome, Status> {
        let outcome = self.store.commit(txn).await.map_err(store_error)?;
        match &outcome {
            Outcome::Committed(revision) => self.cache.reached(*revision).await?,
            Outcome::Failed { current, .. } => {
                // Whoever won must be visible before anyone decides again.
                self.cache.reached(current.as_ref().map_or(0, |kv| kv.mod_revision)).await?;
            }
        }
        Ok(outcome)
    }
}

pub fn store_error(error: store::Error) -> Status {
    match error {
        store::Error::TooLarge { .. } => Status::too_large(error.to_string()),
        store::Error::Compacted { .. } => Status::gone(error.to_string()),
        store::Error::Unavailable(_) => Status::unavailable(error.to_string()),
        other => Status::internal(other),
    }
}

/// A resourceVersion as a number.
pub fn parse_revision(text: &str) -> Result<Revision, Status> {
    text.parse().map_err(|_| {
        Status::bad_request(format!("Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"))
    })
}
