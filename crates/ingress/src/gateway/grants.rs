//! Who may refer across namespaces.

use std::sync::Arc;

use api::object::Key;

use super::objects::ReferenceGrant;

/// One end of a reference.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    pub group: &'a str,
    pub kind: &'a str,
}

/// Whether an object of `namespace` may refer to `key`: its own namespace always, another one when a ReferenceGrant there
/// says so.
pub fn allows<'a>(
    mut grants: impl Iterator<Item = &'a Arc<ReferenceGrant>>,
    from: End<'_>,
    namespace: &str,
    to: End<'_>,
    key: &Key,
) -> bool {
    if namespace == key.namespace {
        return true;
    }
    grants.any(|grant| {
        grant.metadata.namespace == key.namespace
            && grant
                .spec
                .from
                .iter()
                .any(|one| one.group == from.group && one.kind == from.kind && one.namespace == namespace)
            && grant.spec.to.iter().any(|one| {
                one.group == to.group
                    && one.kind == to.kind
                    && one.name.as_ref().is_none_or(|name| name.is_empty() || *name == key.name)
            })
    })
}
