//! Who manages an object: owner references, adoption and release.

use crate::Error;
use crate::plan::{Change, act};
use api::object::{Key, Metadata, OwnerReference};
use api::{LabelSelector, Resource};
use reconcile::{Api, Client, Named};
use serde_json::{Value, json};
use std::sync::Arc;

/// The reference by which `owner` manages its objects.
pub fn controller_of(resource: &Resource, owner: &Metadata) -> OwnerReference {
    OwnerReference {
        api_version: resource.api_version(),
        kind: resource.kind.into(),
        name: owner.name.clone(),
        uid: owner.uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The key of the managing owner, if it is of this kind.
pub fn owner_key(resource: &Resource, object: &Metadata) -> Option<Key> {
    let owner = object.controller()?;
    (owner.kind == resource.kind && owner.api_version == resource.api_version())
        .then(|| Key::new(&object.namespace, &owner.name))
}

/// What of a namespace's objects belongs to an owner, and what has to change hands.
pub struct Claim<T> {
    pub owned: Vec<Arc<T>>,
    /// Selected, and managed by nobody.
    pub orphans: Vec<Arc<T>>,
    /// Managed by the owner, though no longer selected.
    pub strays: Vec<Arc<T>>,
}

/// Sorts objects by whether they belong to `owner`.
pub fn claim<T: Named>(owner: &Metadata, selector: &LabelSelector, objects: Vec<Arc<T>>) -> Claim<T> {
    let mut claim = Claim { owned: Vec::new(), orphans: Vec::new(), strays: Vec::new() };
    for object in objects {
        let metadata = object.metadata();
        let selected = selector.matches_map(&metadata.labels);
        match metadata.controller() {
            Some(controller) if controller.uid == owner.uid => {
                if selected || owner.is_deleting() {
                    claim.owned.push(object);
                } else {
                    claim.strays.push(object);
                }
            }
            Some(_) => {}
            None if selected && !metadata.is_deleting() && !owner.is_deleting() => claim.orphans.push(object),
            None => {}
        }
    }
    claim
}

impl<T: Named> Claim<T> {
    /// Adopts orphans and releases strays; returns what is owned afterwards.
    pub async fn settle(
        self,
        client: &Client,
        owner_resource: &Resource,
        owner: &Metadata,
        resource: &Resource,
    ) -> Result<Vec<Arc<T>>, Error> {
        let Claim { mut owned, orphans, strays } = self;
        if !orphans.is_empty() {
            // The cached owner may be gone: a live read keeps its successor's orphans from an heir that is dead.
            let live = Api::new(client, owner_resource).find(&owner.namespace, &owner.name).await?;
            let same = live.is_some_and(|l| api::ObjectExt::uid(&l) == owner.uid && !api::ObjectExt::is_deleting(&l));
            if !same {
                return Err(Error::Object(format!("{} {} has changed", owner_resource.kind, owner.key())));
            }
        }
        for orphan in orphans {
            act(client, &adoption(owner_resource, owner, resource, orphan.metadata())).await?;
            owned.push(orphan);
        }
        for stray in strays {
            match act(client, &release(owner, resource, stray.metadata())).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(owned)
    }
}

fn references(object: &Metadata, list: Vec<OwnerReference>) -> Value {
    json!({"metadata": {
        "uid": object.uid, "resourceVersion": object.resource_version, "ownerReferences": list,
    }})
}

fn adoption(owner_resource: &Resource, owner: &Metadata, resource: &Resource, object: &Metadata) -> Change {
    let mut list: Vec<_> = object.owner_references.iter().filter(|o| o.uid != owner.uid).cloned().collect();
    list.push(controller_of(owner_resource, owner));
    Change::Patch(*resource, object.key(), references(object, list))
}

fn release(owner: &Metadata, resource: &Resource, object: &Metadata) -> Change {
    let list = object.owner_references.iter().filter(|o| o.uid != owner.uid).cloned().collect();
    Change::Patch(*resource, object.key(), references(object, list))
}
