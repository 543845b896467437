//! Server-side apply, and the bookkeeping of field owners on every other write.

use api::schema::Message;
use serde_json::{Map, Value, json};

use crate::compare::compare;
use crate::error::{ApplyError, Conflict};
use crate::managers::{ManagedFields, Manager, Owned, without_managed_fields};
use crate::sets::FieldSet;
use crate::shape::Shape;
use crate::typed;

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The owner that fields get which were there before the first apply, when nobody kept book.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// The manager under which kubectl applies on the server; it may take over what its client-side apply set.
const KUBECTL: &str = "kubectl";

/// Applies the configuration `config` of `manager` to `live`, or creates the object from it.
///
/// The result has its `metadata.managedFields` brought up to date. When nothing changes, values and owners are those
/// of `live`. `time` is RFC 3339. Entries of other versions are compared by path, as if their fields had the same
/// names; `config` is what the endpoint accepts (no `status` on the main resource).
pub fn apply(
    live: Option<&Value>,
    config: &Value,
    schema: Option<&'static Message>,
    manager: &str,
    api_version: &str,
    time: &str,
    force: bool,
) -> Result<Value, ApplyError> {
    check_request(config, api_version)?;
    let config = &without_server_fields(config);
    let shape = Shape::root(schema);
    let untyped = |reason| ApplyError::Untyped { object: describe(config), reason };
    let claimed = typed::fields_of(config, shape).map_err(untyped)?;
    let empty = empty_like(config);
    let before = live.map(without_managed_fields);
    let mut managers = live.map(ManagedFields::of).unwrap_or_default();
    if let (Some(before), true) = (&before, managers.is_empty()) {
        managers = first_owners(before, shape, api_version);
    }
    let before = before.unwrap_or(empty);
    let applier = Manager::new(manager, true, api_version, "");
    let write = Write { before: &before, config, shape, claimed: &claimed, applier: &applier, api_version };

    let (mut object, mut managers) = match write.run(managers.clone(), force) {
        Err(taken) => {
            let refused = forbidden_conflicts(&before, shape, &applier, taken);
            if !refused.is_empty() {
                return Err(ApplyError::Conflicts(refused));
            }
            write
                .run(managers, true)
                .map_err(|taken| ApplyError::Conflicts(taken.into_iter().flat_map(print).collect()))?
        }
        Ok(done) => done,
    };
    if applier.name == KUBECTL {
        renew_last_applied(&mut object, config);
    }
    managers.strip_identity();
    let unchanged = object == before;
    let previous = live.map(ManagedFields::of).unwrap_or_default();
    if let Some(owned) = managers.0.get_mut(&applier) {
        let old = previous.0.get(&applier);
        // An apply that changes nothing must not look like a write.
        owned.time = match old.filter(|old| unchanged && old.fields == owned.fields) {
            Some(old) => old.time.clone(),
            None => Some(time.to_owned()),
        };
    }
    managers.write_into(&mut object);
    Ok(object)
}

/// The fields of one other manager that an apply would change.
type Taken = (Manager, Owned, FieldSet);

/// One apply, ready to be tried with and without force.
struct Write<'a> {
    before: &'a Value,
    config: &'a Value,
    shape: Shape,
    claimed: &'a FieldSet,
    applier: &'a Manager,
    api_version: &'a str,
}

impl Write<'_> {
    fn run(&self, mut managers: ManagedFields, force: bool) -> Result<(Value, ManagedFields), Vec<Taken>> {
        let merged = typed::merge(self.before, self.config, self.shape);
        let owned = Owned { fields: self.claimed.clone(), api_version: self.api_version.to_owned(), time: None };
        let released = managers.0.insert(self.applier.clone(), owned).map(|last| last.fields);
        let after = match released {
            // What only this manager owned and no longer applies goes away, with all that was set below it.
            Some(last) => {
                let unowned = last.with_named_parents().difference(&managers.union().with_named_parents());
                typed::remove(&merged, self.shape, &unowned).unwrap_or_else(|| empty_like(self.config))
            }
            None => merged,
        };
        let comparison = compare(self.before, &after, self.shape);
        let written = comparison.written();
        let taken: Vec<Taken> = managers
            .0
            .iter()
            .filter(|(manager, _)| *manager != self.applier)
            .map(|(manager, owned)| (manager.clone(), owned.clone(), owned.fields.intersection(&written)))
            .filter(|(_, _, fields)| !fields.is_empty())
            .collect();
        if !force && !taken.is_empty() {
            return Err(taken);
        }
        for (manager, _, fields) in &taken {
            if let Some(owned) = managers.0.get_mut(manager) {
                owned.fields = owned.fields.difference(fields);
            }
        }
        managers.disown(&comparison.removed);
        Ok((after, managers))
    }
}

fn print((manager, owned, fields): Taken) -> Vec<Conflict> {
    let name = manager.print(owned.time.as_deref());
    fields.paths().into_iter().map(|field| Conflict { manager: name.clone(), field }).collect()
}

/// The conflicts that stay after kubectl has taken over what its own client-side apply had set.
fn forbidden_conflicts(before: &Value, shape: Shape, applier: &Manager, taken: Vec<Taken>) -> Vec<Conflict> {
    let allowed = if applier.name == KUBECTL { last_applied_fields(before, shape) } else { FieldSet::default() };
    taken
        .into_iter()
        .flat_map(|(manager, owned, fields)| print((manager, owned, fields.difference(&allowed))))
        .collect()
}

fn last_applied_annotation(object: &Value) -> Option<&Value> {
    object.get("metadata")?.get("annotations")?.get(LAST_APPLIED)
}

fn last_applied_fields(object: &Value, shape: Shape) -> FieldSet {
    last_applied_annotation(object)
        .and_then(Value::as_str)
        .and_then(|text| serde_json::from_str::<Value>(text).ok())
        .and_then(|config| typed::fields_of(&config, shape).ok())
        .unwrap_or_default()
}

/// Keeps the annotation of client-side apply true, so that people can go back to it.
fn renew_last_applied(object: &mut Value, config: &Value) {
    if last_applied_annotation(object).is_none() {
        return;
    }
    let mut applied = without_managed_fields(config);
    if let Some(annotations) = applied.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.remove(LAST_APPLIED);
    }
    if let Some(annotations) = object.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.insert(LAST_APPLIED.to_owned(), Value::String(format!("{applied}\n")));
    }
}

fn check_request(config: &Value, api_version: &str) -> Result<(), ApplyError> {
    if !config.is_object() {
        return Err(ApplyError::Malformed("error decoding patch: the configuration must be a map".to_owned()));
    }
    let given = config.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    if given != api_version {
        return Err(ApplyError::Malformed(format!(
            "Incorrect version specified in apply patch. Specified patch version: {given}, expected: {api_version}"
        )));
    }
    match config.pointer("/metadata/managedFields") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(entries)) if entries.is_empty() => Ok(()),
        Some(_) => Err(ApplyError::Malformed("metadata.managedFields must be nil".to_owned())),
    }
}

/// Generated manifests carry an empty creation time, which must not clear the stored one.
fn without_server_fields(config: &Value) -> Value {
    let mut config = without_managed_fields(config);
    if let Some(metadata) = config.get_mut("metadata").and_then(Value::as_object_mut)
        && metadata.get("creationTimestamp").is_some_and(Value::is_null)
    {
        metadata.remove("creationTimestamp");
    }
    config
}

fn describe(config: &Value) -> String {
    let text = |pointer: &str| config.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!(
        "{}/{}; {}, Kind={}",
        text("/metadata/namespace"),
        text("/metadata/name"),
        text("/apiVersion"),
        text("/kind")
    )
}

/// An object of the same type with nothing in it: what a creation is compared with.
fn empty_like(object: &Value) -> Value {
    let mut empty = Map::new();
    for name in ["apiVersion", "kind"] {
        if let Some(value) = object.get(name) {
            empty.insert(name.to_owned(), value.clone());
        }
    }
    Value::Object(empty)
}

fn first_owners(before: &Value, shape: Shape, api_version: &str) -> ManagedFields {
    let fields = compare(&empty_like(before), before, shape).written();
    let mut managers = ManagedFields::default();
    managers.0.insert(
        Manager::new(BEFORE_FIRST_APPLY, false, api_version, ""),
        Owned { fields, api_version: api_version.to_owned(), time: None },
    );
    managers.strip_identity();
    managers
}

/// `after` with the owners that an ordinary write leaves behind.
///
/// The writer gets what it changed, others lose it, and removed fields have no owner. `after` may bring its own
/// `managedFields`: a list with entries replaces the stored owners, an empty one (or `[{}]`) ends the bookkeeping.
pub fn update_managers(
    before: Option<&Value>,
    after: &Value,
    schema: Option<&'static Message>,
    manager: &str,
    api_version: &str,
    time: &str,
    subresource: &str,
) -> Value {
    let mut object = without_managed_fields(after);
    let given = after.pointer("/metadata/managedFields").and_then(Value::as_array);
    if given.is_some_and(|entries| entries.is_empty() || entries == &[json!({})]) {
        return object;
    }
    let shape = Shape::root(schema);
    let mut managers = ManagedFields::of(after);
    if managers.is_empty() {
        managers = before.map(ManagedFields::of).unwrap_or_default();
    }
    let old = before.map_or_else(|| empty_like(after), without_managed_fields);
    let comparison = compare(&old, &object, shape);
    let mut written = ManagedFields::default();
    let writer = Manager::new(manager, false, api_version, subresource);
    let fields = comparison.written();
    written.0.insert(
        writer.clone(),
        Owned { fields: fields.clone(), api_version: api_version.to_owned(), time: Some(time.to_owned()) },
    );
    written.strip_identity();

    managers.disown(&fields);
    managers.disown(&comparison.removed);
    if let Some(owned) = written.0.remove(&writer) {
        let kept = managers.0.remove(&writer).map(|old| old.fields).unwrap_or_default();
        managers.0.insert(writer, Owned { fields: kept.union(&owned.fields), ..owned });
    }
    managers.strip_identity();
    managers.cap();
    managers.write_into(&mut object);
    object
}
