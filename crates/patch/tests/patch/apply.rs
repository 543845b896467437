//! Server-side apply: a case is a history of writes, then what the object and its owners have become.
//!
//! Writes: `apply MANAGER [force]` with a configuration, `patch MANAGER [SUBRESOURCE]` with a merge patch that an
//! ordinary writer makes. Ends: `object` without its owners, `owners` one line each, `error` of the last write.

use api::schema::{Message, for_kind};
use patch::{FieldSet, apply, merge_patch, update_managers};
use serde_json::{Value, json};

use crate::cases::{Case, Section};
use crate::{expect_text, expect_value, run};

#[test]
fn server_side_apply() {
    run("apply.txt", include_str!("apply.txt"), 25, check);
}

fn check(case: &Case) -> Result<(), String> {
    let mut live: Option<Value> = None;
    let mut refused = None;
    for (step, section) in case.sections.iter().enumerate() {
        let is_write = ["apply", "patch"].contains(&section.words[0].as_str());
        if let (true, Some(error)) = (is_write, &refused) {
            return Err(format!("a write before the last was refused: {error}"));
        }
        let time = format!("2026-01-01T00:00:{step:02}Z");
        match section.words[0].as_str() {
            "apply" => match applied(live.as_ref(), section, &time) {
                Ok(object) => live = Some(object),
                Err(error) => refused = Some(error),
            },
            "patch" => live = Some(patched(live.as_ref(), section, &time)),
            "object" => expect_value("object", &without_owners(live.as_ref()), &section.json())?,
            "owners" => expect_text("owners", &owners(live.as_ref()), &section.text)?,
            "error" => expect_text("error", &refused.take().unwrap_or_default(), &section.text)?,
            other => panic!("{}: no section is called {other}", case.title),
        }
    }
    refused.map_or(Ok(()), |error| Err(format!("error: {error}")))
}

fn applied(live: Option<&Value>, section: &Section, time: &str) -> Result<Value, String> {
    let config = section.json();
    let force = section.words.get(2).is_some_and(|word| word == "force");
    let version = match config["kind"].as_str() {
        Some("Deployment") => "apps/v1",
        Some("Widget") => "example.com/v1",
        _ => "v1",
    };
    apply(live, &config, schema(&config), &section.words[1], version, time, force).map_err(|error| error.to_string())
}

fn patched(live: Option<&Value>, section: &Section, time: &str) -> Value {
    let after = merge_patch(live.unwrap_or(&json!({})), &section.json()).expect("the patch is an object");
    let version = after["apiVersion"].as_str().expect("the object has an apiVersion").to_owned();
    let subresource = section.words.get(2).map_or("", String::as_str);
    update_managers(live, &after, schema(&after), &section.words[1], &version, time, subresource)
}

fn schema(object: &Value) -> Option<&'static Message> {
    let api_version = object["apiVersion"].as_str().unwrap_or_default();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    for_kind(group, version, object["kind"].as_str().unwrap_or_default())
}

fn without_owners(object: Option<&Value>) -> Value {
    let mut object = object.cloned().unwrap_or_default();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    object
}

/// One line an owner: name, operation, when it last wrote, and its fields.
fn owners(object: Option<&Value>) -> String {
    let entries = object.and_then(|object| object.pointer("/metadata/managedFields")).and_then(Value::as_array);
    let lines = entries.into_iter().flatten().map(|entry| {
        let fields = FieldSet::from_fields_v1(&entry["fieldsV1"]).expect("fieldsV1 is readable");
        assert_eq!(fields.to_fields_v1(), entry["fieldsV1"], "reading and writing fields is lossless");
        let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        let subresource = entry["subresource"].as_str().map(|name| format!("/{name}")).unwrap_or_default();
        let seconds = text("time").trim_start_matches("2026-01-01T00:00:").trim_end_matches('Z').to_owned();
        format!("{} {}{subresource} @{seconds}: {}", text("manager"), text("operation"), fields.paths().join(" "))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn configurations_that_are_no_request_are_refused() {
    let refused = |config: Value| apply(None, &config, None, "me", "v1", "", false).expect_err("refused").to_string();
    assert_eq!(
        refused(json!({"apiVersion": "v2", "kind": "A"})),
        "Incorrect version specified in apply patch. Specified patch version: v2, expected: v1"
    );
    assert_eq!(
        refused(json!({"apiVersion": "v1", "kind": "A", "metadata": {"managedFields": [{"manager": "x"}]}})),
        "metadata.managedFields must be nil"
    );
    assert!(refused(json!(["a"])).starts_with("error decoding patch"));
}

#[test]
fn old_writers_are_merged_when_there_are_too_many() {
    let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
    for i in 0..15 {
        let mut after = object.clone();
        after["data"][format!("k{i}")] = json!("v");
        let (writer, time) = (format!("writer-{i:02}"), format!("2026-01-01T00:00:{i:02}Z"));
        object = update_managers(Some(&object), &after, schema(&after), &writer, "v1", &time, "");
    }
    let owners = owners(Some(&object));
    assert_eq!(owners.lines().count(), 10, "{owners}");
    assert!(owners.contains("ancient-changes Update @05: .data .data.k0 .data.k1 .data.k2"), "{owners}");
    assert!(owners.contains("writer-14 Update @14: .data.k14"), "{owners}");
}
