//! metadata.managedFields: who owns which fields, read from an object and written back.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::sets::{Element, FieldSet};

/// Kubernetes' bound on the entries of ordinary writers; the oldest beyond it are merged.
const MAX_UPDATE_MANAGERS: usize = 10;
const MERGED_UPDATES: &str = "ancient-changes";

/// Who writes, and how.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Manager {
    pub name: String,
    /// Server-side apply; otherwise an ordinary write.
    pub applies: bool,
    /// Not part of an applier's identity: it stays the same manager when it moves to another version.
    pub api_version: String,
    pub subresource: String,
}

impl Manager {
    pub fn new(name: &str, applies: bool, api_version: &str, subresource: &str) -> Self {
        let api_version = if applies { String::new() } else { api_version.to_owned() };
        Manager { name: name.to_owned(), applies, api_version, subresource: subresource.to_owned() }
    }

    /// The manager as conflict messages print it.
    pub fn print(&self, time: Option<&str>) -> String {
        let mut text = format!("{:?}", self.name);
        if !self.subresource.is_empty() {
            text += &format!(" with subresource {:?}", self.subresource);
        }
        if !self.applies {
            text += &format!(" using {}", self.api_version);
            if let Some(time) = time {
                text += &format!(" at {time}");
            }
        }
        text
    }
}

/// What one manager owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    pub fields: FieldSet,
    pub api_version: String,
    pub time: Option<String>,
}

/// The owners of one object's fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ManagedFields(pub(crate) BTreeMap<Manager, Owned>);

impl ManagedFields {
    /// Reads `metadata.managedFields`. An entry that cannot be read owns nothing: it is left out.
    pub fn of(object: &Value) -> Self {
        let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array);
        ManagedFields(entries.into_iter().flatten().filter_map(read).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every field that anybody owns.
    pub(crate) fn union(&self) -> FieldSet {
        self.0.values().fold(FieldSet::default(), |all, owned| all.union(&owned.fields))
    }

    /// Takes fields from every manager, and forgets managers that own nothing any more.
    pub(crate) fn disown(&mut self, fields: &FieldSet) {
        for owned in self.0.values_mut() {
            owned.fields = owned.fields.difference(fields);
        }
        self.0.retain(|_, owned| !owned.fields.is_empty());
    }

    /// Leaves out the fields that identify an object or that the server sets: they have no owner.
    pub(crate) fn strip_identity(&mut self) {
        let mut identity = FieldSet::default();
        for name in ["apiVersion", "kind", "metadata"] {
            identity.insert(&[Element::field(name)]);
        }
        for name in [
            "name",
            "namespace",
            "creationTimestamp",
            "selfLink",
            "uid",
            "clusterName",
            "generation",
            "managedFields",
            "resourceVersion",
        ] {
            identity.insert(&[Element::field("metadata"), Element::field(name)]);
        }
        self.disown(&identity);
    }

    /// Merges the oldest ordinary writers of one version until no more than ten are left.
    pub(crate) fn cap(&mut self) {
        let mut updaters: Vec<Manager> = self.0.keys().filter(|manager| !manager.applies).cloned().collect();
        let mut count = updaters.len();
        updaters.sort_by(|a, b| self.0[a].time.cmp(&self.0[b].time).then_with(|| a.cmp(b)));
        let mut first_of_version: BTreeMap<String, Manager> = BTreeMap::new();
        for manager in updaters {
            if count <= MAX_UPDATE_MANAGERS {
                break;
            }
            let Some(first) = first_of_version.get(&manager.api_version) else {
                first_of_version.insert(manager.api_version.clone(), manager);
                continue;
            };
            let bucket = Manager::new(MERGED_UPDATES, false, &manager.api_version, "");
            if manager == bucket {
                continue;
            }
            if *first != bucket
                && let Some(owned) = self.0.remove(first)
            {
                self.absorb(&bucket, owned);
            }
            if let Some(owned) = self.0.remove(&manager) {
                self.absorb(&bucket, owned);
            }
            first_of_version.insert(manager.api_version.clone(), bucket);
            count -= 1;
        }
    }

    fn absorb(&mut self, bucket: &Manager, owned: Owned) {
        match self.0.get_mut(bucket) {
            Some(merged) => {
                merged.fields = merged.fields.union(&owned.fields);
                merged.time = merged.time.take().max(owned.time);
            }
            None => {
                self.0.insert(bucket.clone(), owned);
            }
        }
    }

    /// Writes the entries into `metadata.managedFields`, appliers first, then by time and name.
    pub fn write_into(&self, object: &mut Value) {
        let Some(metadata) =
            object.as_object_mut().map(|object| object.entry("metadata").or_insert_with(|| Value::Object(Map::new())))
        else {
            return;
        };
        let Some(metadata) = metadata.as_object_mut() else { return };
        metadata.remove("managedFields");
        if self.0.is_empty() {
            return;
        }
        let mut entries: Vec<(&Manager, &Owned)> = self.0.iter().collect();
        entries.sort_by(|(a, a_owned), (b, b_owned)| {
            let order = |manager: &Manager| !manager.applies;
            (order(a), &a_owned.time, &a.name, &a_owned.api_version, &a.subresource).cmp(&(
                order(b),
                &b_owned.time,
                &b.name,
                &b_owned.api_version,
                &b.subresource,
            ))
        });
        let entries: Vec<Value> = entries.into_iter().map(|(manager, owned)| write(manager, owned)).collect();
        metadata.insert("managedFields".to_owned(), Value::Array(entries));
    }
}

/// Takes `metadata.managedFields` off an object: nobody owns the list of owners.
pub fn without_managed_fields(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    object
}

fn read(entry: &Value) -> Option<(Manager, Owned)> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default();
    let applies = match text("operation") {
        "Apply" => true,
        "Update" => false,
        _ => return None,
    };
    let owned = Owned {
        fields: FieldSet::from_fields_v1(entry.get("fieldsV1")?)?,
        api_version: text("apiVersion").to_owned(),
        time: entry.get("time").and_then(Value::as_str).map(str::to_owned),
    };
    Some((Manager::new(text("manager"), applies, text("apiVersion"), text("subresource")), owned))
}

fn write(manager: &Manager, owned: &Owned) -> Value {
    let mut entry = json!({
        "manager": manager.name,
        "operation": if manager.applies { "Apply" } else { "Update" },
        "apiVersion": owned.api_version,
        "fieldsType": "FieldsV1",
        "fieldsV1": owned.fields.to_fields_v1(),
    });
    if let Some(time) = &owned.time {
        entry["time"] = Value::from(time.as_str());
    }
    if !manager.subresource.is_empty() {
        entry["subresource"] = Value::from(manager.subresource.as_str());
    }
    entry
}
