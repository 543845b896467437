//! An object of which only the metadata is read.

use api::object::Metadata;
use reconcile::Named;
use serde::Deserialize;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Plain {
    pub metadata: Metadata,
}

impl Named for Plain {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}
