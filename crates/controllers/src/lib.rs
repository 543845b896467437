//! One file per controller, all listed in one slice.
//!
//! A controller reads caches fed by watches, decides in a pure `plan`, and acts through [`plan::act`]. It names no
//! other controller: what one writes, another sees.

pub mod amount;
pub mod conditions;
pub mod cronjob;
pub mod daemonset;
pub mod deployment;
pub mod discovery;
pub mod endpoints;
pub mod endpointslice;
pub mod endpointslicemirroring;
pub mod expectations;
pub mod garbagecollector;
pub mod job;
pub mod namespace;
pub mod nodelifecycle;
pub mod nodes;
pub mod nodeservices;
pub mod owners;
pub mod plain;
pub mod plan;
pub mod podgc;
pub mod pods;
pub mod replicaset;
pub mod revisions;
pub mod rootca;
pub mod service;
pub mod serviceaccount;
pub mod servicecidr;
pub mod statefulset;
pub mod template;

use api::Resource;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

/// A controller: who it is, what it sees, what it writes, and its loop.
pub struct Descriptor {
    /// Its identity is `system:serviceaccount:kube-system:NAME-controller`.
    pub name: &'static str,
    pub watches: &'static [Resource],
    pub writes: &'static [Resource],
    pub run: fn(Context) -> BoxFuture<'static, ()>,
}

/// What a controller is started with.
#[derive(Clone)]
pub struct Context {
    /// Speaks with the controller's own identity.
    pub client: reconcile::Client,
    /// The controller ends when this is cancelled.
    pub token: CancellationToken,
    /// The cluster's certificate authority, for `kube-root-ca.crt`.
    pub ca_pem: String,
}

/// Every controller there is.
pub const ALL: &[Descriptor] = &[
    nodeservices::DESCRIPTOR,
    namespace::DESCRIPTOR,
    serviceaccount::DESCRIPTOR,
    rootca::DESCRIPTOR,
    deployment::DESCRIPTOR,
    replicaset::DESCRIPTOR,
    statefulset::DESCRIPTOR,
    daemonset::DESCRIPTOR,
    job::DESCRIPTOR,
    cronjob::DESCRIPTOR,
    endpoints::DESCRIPTOR,
    endpointslice::DESCRIPTOR,
    endpointslicemirroring::DESCRIPTOR,
    servicecidr::DESCRIPTOR,
    nodelifecycle::DESCRIPTOR,
    podgc::DESCRIPTOR,
    garbagecollector::DESCRIPTOR,
];

/// Why a key could not be worked on; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    // Boxed: an answer of the API is large, and rare.
    #[error("{0}")]
    Api(Box<reconcile::ApiError>),
    #[error("{0}: correct the object's selector")]
    Selector(#[from] api::selector::SelectorError),
    #[error("{0}: correct the object")]
    Object(String),
}

impl From<reconcile::ApiError> for Error {
    fn from(error: reconcile::ApiError) -> Error {
        Error::Api(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_controller_watches_something() {
        let mut names: Vec<_> = ALL.iter().map(|d| d.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(ALL.iter().all(|d| !d.watches.is_empty() && !d.writes.is_empty()));
    }
}
