//! ControllerRevisions: the templates that a DaemonSet or StatefulSet had, so that it can go back to one.

use crate::owners::controller_of;
use crate::plan::Change;
use crate::template;
use api::Resource;
use api::object::Metadata;
use reconcile::Named;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

pub const CONTROLLER_REVISIONS: Resource = Resource {
    group: "apps",
    version: "v1",
    plural: "controllerrevisions",
    kind: "ControllerRevision",
    namespaced: true,
};

/// On pods and revisions: which revision they are of.
pub const REVISION_LABEL: &str = "controller-revision-hash";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Revision {
    pub metadata: Metadata,
    pub revision: i64,
    pub data: Value,
}

impl Named for Revision {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Revision {
    /// The pod template of this revision.
    pub fn template(&self) -> Value {
        let mut template = self.data.pointer("/spec/template").cloned().unwrap_or_default();
        if let Some(fields) = template.as_object_mut() {
            fields.remove("$patch");
        }
        template
    }

    pub fn hash(&self) -> &str {
        self.metadata.labels.get(REVISION_LABEL).map(String::as_str).unwrap_or_default()
    }
}

/// The revision of the template as it is now.
#[derive(Debug, PartialEq)]
pub struct Current {
    pub name: String,
    pub hash: String,
    /// What makes it the newest, if it is not.
    pub change: Option<Change>,
}

/// Finds the revision of a template among those an owner has, or plans it.
pub fn current(
    resource: &Resource,
    owner: &Metadata,
    template: &Value,
    owned: &[Arc<Revision>],
    collisions: i64,
) -> Current {
    let newest = owned.iter().map(|r| r.revision).max().unwrap_or(0);
    let wanted = template::canonical(template);
    let mut same: Vec<_> = owned.iter().filter(|r| template::canonical(&r.template()) == wanted).collect();
    same.sort_by_key(|r| r.revision);
    if let Some(found) = same.last() {
        let change = (found.revision < newest)
            .then(|| Change::Patch(CONTROLLER_REVISIONS, found.metadata.key(), json!({"revision": newest + 1})));
        return Current { name: found.metadata.name.clone(), hash: found.hash().into(), change };
    }
    let hash = template::hash(template, collisions);
    let name = format!("{}-{hash}", owner.name);
    let mut labels = template::labels(template);
    labels.insert(REVISION_LABEL.into(), hash.clone());
    let mut data = template.clone();
    // Applied as a strategic merge patch, it replaces the template whole.
    data["$patch"] = json!("replace");
    let revision = json!({
        "apiVersion": "apps/v1", "kind": "ControllerRevision",
        "metadata": {
            "name": name, "namespace": owner.namespace, "labels": labels,
            "ownerReferences": [controller_of(resource, owner)],
        },
        "revision": newest + 1, "data": {"spec": {"template": data}},
    });
    Current { name, hash, change: Some(Change::Create(CONTROLLER_REVISIONS, revision)) }
}

/// Deletes the oldest revisions beyond the limit that no pod is of. `live` are hashes and names in use.
pub fn clean_up(owned: &[Arc<Revision>], live: &[String], limit: i64) -> Vec<Change> {
    let mut unused: Vec<_> =
        owned.iter().filter(|r| !live.iter().any(|l| l == r.hash() || *l == r.metadata.name)).collect();
    unused.sort_by_key(|r| r.revision);
    let surplus = unused.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    let delete = |r: &&Arc<Revision>| Change::delete(CONTROLLER_REVISIONS, r.metadata.key(), &r.metadata.uid);
    unused.iter().take(surplus).map(delete).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(image: &str) -> Value {
        json!({"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [{"name": "db", "image": image}]}})
    }

    fn made(image: &str, number: i64, owned: &[Arc<Revision>]) -> Arc<Revision> {
        let owner = Metadata { name: "db".into(), namespace: "default".into(), ..Metadata::default() };
        let current = current(&api::kinds::STATEFUL_SETS, &owner, &template(image), owned, 0);
        let Some(Change::Create(_, object)) = current.change else { panic!("a revision is created") };
        assert_eq!(object["revision"], number);
        Arc::new(serde_json::from_value(object).expect("what was made can be read"))
    }

    #[test]
    fn templates_are_kept_once_and_brought_back_to_the_front() {
        let first = made("a", 1, &[]);
        let second = made("b", 2, std::slice::from_ref(&first));
        assert_eq!(crate::template::canonical(&first.template()), crate::template::canonical(&template("a")));
        let owned = [first.clone(), second.clone()];
        let owner = Metadata { name: "db".into(), ..Metadata::default() };
        let same = current(&api::kinds::STATEFUL_SETS, &owner, &template("b"), &owned, 0);
        assert_eq!((same.hash.as_str(), same.change), (second.hash(), None));
        let back = current(&api::kinds::STATEFUL_SETS, &owner, &template("a"), &owned, 0);
        assert!(matches!(back.change, Some(Change::Patch(_, _, body)) if body["revision"] == 3));
        assert_eq!(clean_up(&owned, &[second.hash().to_string()], 0).len(), 1);
        assert!(clean_up(&owned, &[], 2).is_empty());
    }
}
