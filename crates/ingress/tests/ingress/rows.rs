//! `docs/ingress-rows.md` and `docs/gateway-rows.md` say which case shows which promise; here they are kept true.

use std::collections::BTreeSet;
use std::path::Path;

use crate::routes::titles;
use crate::{gateway, routes};

#[test]
fn every_row_names_its_cases_and_every_case_its_row() {
    check(include_str!("../../../../docs/ingress-rows.md"), routes::FILES);
    check(include_str!("../../../../docs/gateway-rows.md"), gateway::FILES);
}

fn check(text: &str, files: &[(&str, &str)]) {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ingress");
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| row |"));
    let (mut names, mut shown) = (BTreeSet::new(), BTreeSet::new());
    for row in rows.filter(|line| !line.starts_with("| ---")) {
        let row = row.replace("\\|", "\u{0}");
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, cases] = cells[..] else { panic!("three cells: {row}") };
        assert!(names.insert(name.to_owned()), "{name} stands there twice");
        for case in cases.split('`').skip(1).collect::<Vec<_>>().chunks(2) {
            let [file, title] = case[..] else { panic!("{name}: each case is a `file` and a title") };
            let title = title.trim().trim_end_matches(';').replace('\u{0}', "|");
            let held = match kind {
                "route" => std::fs::read_to_string(tests.join("cases").join(file)),
                "process" => std::fs::read_to_string(tests.join(file)),
                kind => panic!("{name}: what is a {kind} row?"),
            };
            let held = held.unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
            let wanted = if kind == "route" { format!("# {title}\n") } else { format!("fn {title}(") };
            assert!(held.contains(&wanted), "{name}: {file} has no {title}");
            shown.insert((file.to_owned(), title));
        }
    }
    for (file, text) in files {
        for title in titles(text) {
            assert!(shown.contains(&((*file).to_owned(), title.clone())), "no row shows {file}: {title}");
        }
    }
}
