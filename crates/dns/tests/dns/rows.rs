//! `docs/dns-rows.md` says which case shows which row of the specification; here it is kept true.

use std::collections::BTreeSet;
use std::path::Path;

use crate::cases::parse;
use crate::zone::{SEARCH, ZONE};

/// All rows there have to be, besides those that the document adds.
const ROWS: &[&str] = &[
    "Version",
    "ClusterIP A and AAAA",
    "ClusterIP SRV",
    "ClusterIP PTR",
    "Headless A and AAAA",
    "Headless endpoint",
    "Headless SRV",
    "Headless PTR",
    "ExternalName",
    "Pod A",
    "Matching",
    "Negative",
    "Not synced",
    "Transfer",
    "TTL",
    "Zonal names",
    "Multicluster zones",
    "Search path",
];

#[test]
fn every_row_names_its_cases_and_every_case_its_row() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dns");
    let text = include_str!("../../../../docs/dns-rows.md");
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| row |"));
    let rows = rows.filter(|line| !line.starts_with("| ---"));
    let (mut names, mut shown) = (BTreeSet::new(), BTreeSet::new());
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, cases] = cells[..] else { panic!("three cells: {row}") };
        assert!(names.insert(name), "{name} stands there twice");
        assert!(["record", "process", "note"].contains(&kind), "{name}: what is a {kind} row?");
        assert!(!cases.is_empty(), "{name} has no case");
        if kind == "note" {
            continue;
        }
        for case in cases.split('`').skip(1).collect::<Vec<_>>().chunks(2) {
            let [file, title] = case[..] else { panic!("{name}: each case is a `file` and a title") };
            let title = title.trim().trim_end_matches(';');
            let path = if kind == "record" { tests.join("cases").join(file) } else { tests.join(file) };
            let held = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
            let wanted = if kind == "record" { format!("# {title}") } else { format!("fn {title}(") };
            assert!(held.contains(&wanted), "{name}: {file} has no {title}");
            shown.insert((file.to_owned(), title.to_owned()));
        }
    }
    let missing: Vec<&&str> = ROWS.iter().filter(|row| !names.contains(**row)).collect();
    assert!(missing.is_empty(), "docs/dns-rows.md has no row for {missing:?}");
    for (file, text) in [("zone.txt", ZONE), ("search.txt", SEARCH)] {
        for case in parse(text).iter().skip(1) {
            let has_row = shown.iter().any(|(of, title)| of == file && case.title.starts_with(title));
            assert!(has_row, "no row shows {file}: {}", case.title);
        }
    }
}
