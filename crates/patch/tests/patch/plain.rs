//! JSON, merge and strategic merge patch: `object`, `patch`, then `result` or `error`.

use patch::{PatchError, json_patch, merge_patch, strategic_merge_patch};
use serde_json::{Value, json};

use crate::cases::Case;
use crate::{expect_text, expect_value, run};

fn check(case: &Case, found: Result<Value, PatchError>) -> Result<(), String> {
    match (found, case.section("error")) {
        (Ok(found), None) => expect_value("object", &found, &case.json("result")),
        (Err(error), Some(wanted)) => expect_text("error", &error.to_string(), &wanted.text),
        (Ok(found), Some(_)) => Err(format!("no error, but\n  {found}")),
        (Err(error), None) => Err(format!("error: {error}")),
    }
}

#[test]
fn strategic_merge() {
    run("strategic.txt", include_str!("strategic.txt"), 40, |case| {
        let kind = case.section("kind").map_or("core.v1.Pod", |section| section.text.trim());
        let schema = api::schema::message(kind).expect("the kind is in the schema");
        check(case, strategic_merge_patch(&case.json("object"), &case.json("patch"), schema))
    });
}

#[test]
fn json_operations() {
    run("json.txt", include_str!("json.txt"), 10, |case| {
        check(case, json_patch(&case.json("object"), &case.json("patch")))
    });
}

#[test]
fn merge() {
    run("merge.txt", include_str!("merge.txt"), 5, |case| {
        check(case, merge_patch(&case.json("object"), &case.json("patch")))
    });
}

#[test]
fn json_patches_are_bounded() {
    let operation = json!({"op": "add", "path": "/a", "value": 1});
    let many = Value::Array(vec![operation; 10_001]);
    let error = json_patch(&json!({}), &many).expect_err("too many operations");
    assert_eq!(error.to_string(), "The allowed maximum operations in a JSON patch is 10000, got 10001");

    let doubling: Vec<Value> = (0..64).map(|i| json!({"op": "copy", "from": "", "path": format!("/c{i}")})).collect();
    let error = json_patch(&json!({"a": "0123456789"}), &Value::Array(doubling)).expect_err("too much copied");
    assert!(matches!(error, PatchError::TooLarge(_)), "{error}");

    let mut path = String::new();
    let deeper: Vec<Value> = (0..2000)
        .map(|_| {
            path += "/a";
            json!({"op": "add", "path": path, "value": {}})
        })
        .collect();
    let error = json_patch(&json!({}), &Value::Array(deeper)).expect_err("too deep");
    assert!(matches!(error, PatchError::TooLarge(_)), "{error}");
}
