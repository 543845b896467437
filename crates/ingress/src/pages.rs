//! Who answers in place of an endpoint: for some statuses, and when there is no endpoint.

use std::sync::Arc;

use crate::policy::StatusSet;
use crate::upstream::Upstream;

/// The `default-backend` of an Ingress.
#[derive(Clone, Debug)]
pub struct Pages {
    pub upstream: Arc<Upstream>,
    /// Answers that are replaced by its (`custom-http-errors`).
    pub statuses: StatusSet,
}

impl PartialEq for Pages {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.upstream, &other.upstream) && self.statuses == other.statuses
    }
}
