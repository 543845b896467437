//! Runs the case files beside this file: objects and patches in; objects, owners or an error out.
//!
//! A case is a title line that starts with `#` and sections that start with `-- name --`; see the files.

mod apply;
mod cases;
mod plain;

use serde_json::Value;

use crate::cases::Case;

/// Runs every case of a file and reports all that fail, not only the first.
fn run(file: &str, text: &str, at_least: usize, run: impl Fn(&Case) -> Result<(), String>) {
    let cases = cases::parse(text);
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| run(case).err().map(|problem| format!("{file}: {}\n{problem}\n", case.title)))
        .collect();
    assert!(failures.is_empty(), "{} of {} cases failed\n\n{}", failures.len(), cases.len(), failures.join("\n"));
    assert!(cases.len() >= at_least, "{file} has only {} cases: the file was not read as meant", cases.len());
}

fn expect_value(what: &str, found: &Value, wanted: &Value) -> Result<(), String> {
    if found == wanted {
        return Ok(());
    }
    Err(format!("{what}\n  found  {found}\n  wanted {wanted}"))
}

fn expect_text(what: &str, found: &str, wanted: &str) -> Result<(), String> {
    if found.trim() == wanted.trim() {
        return Ok(());
    }
    Err(format!("{what}\n  found\n{found}\n  wanted\n{wanted}"))
}
