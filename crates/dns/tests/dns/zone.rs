//! Runs the case files. Objects of the first case stand for all cases that bring none of their own.

use std::fmt::Write as _;
use std::sync::{Arc, RwLock};

use dns::{Answer, PodMode, Progress, Question, Resolver, ReverseZones, Zone};
use hickory_proto::rr::{Name, Record, RecordType};
use services::ServiceTable;
use tokio::time::Instant;

use crate::cases::{Case, parse};

/// The objects of a section, one JSON text a line.
pub fn table(objects: &str) -> ServiceTable {
    let mut table = ServiceTable::new();
    for line in objects.lines().filter(|line| !line.trim().is_empty()) {
        let changes = if line.contains("\"EndpointSlice\"") {
            table.upsert_slice(line.as_bytes())
        } else {
            table.upsert_service(line.as_bytes())
        };
        changes.unwrap_or_else(|error| panic!("{error} in {line}"));
    }
    table
}

fn resolver(table: ServiceTable, pods: PodMode) -> Resolver {
    let zone = Zone::new("cluster.local", 5, pods).expect("a zone");
    let ranges = ["10.96.0.0/12", "10.244.0.0/16", "fd00:10:96::/112", "fd00:10:244::/56"];
    let ranges = ranges.iter().map(|range| range.parse().expect("a range")).collect();
    let reverse = ReverseZones::new(zone.origin().clone(), 5, ranges);
    Resolver::without_upstreams(zone, reverse, Arc::new(RwLock::new(table)))
}

fn print_record(record: &Record) -> String {
    let (name, ttl, kind, data) = (record.name.to_ascii(), record.ttl, record.record_type(), &record.data);
    format!("{name} {ttl} {kind} {data}")
}

fn print_answer(answer: &Answer) -> String {
    let mut text = answer.code.to_string();
    if answer.authoritative {
        text.push_str(" (authoritative)");
    }
    let mut section = |prefix: &str, records: &[Record]| {
        for record in records {
            let _ = write!(text, "\n{prefix}{}", print_record(record));
        }
    };
    section("", &answer.answers);
    section("authority ", &answer.authorities);
    section("additional ", &answer.additionals);
    text
}

fn ask(resolver: &Resolver, line: &str) -> String {
    let (name, record_type) = line.trim().split_once(' ').expect("a name and a type");
    let name = Name::from_ascii(name).expect("a name");
    let record_type = match record_type {
        // The one type that the library writes but does not read.
        "IXFR" => RecordType::IXFR,
        other => other.parse().expect("a type"),
    };
    let question = Question::new(name, record_type);
    match resolver.begin(&question, Instant::now()) {
        Progress::Done(answer, _) => print_answer(&answer),
        Progress::Waiting { so_far, question } => {
            let so_far = so_far.map(|answer| print_answer(&answer) + "\n").unwrap_or_default();
            format!("{so_far}upstream {} {}", question.name, question.record_type)
        }
    }
}

fn check(case: &Case, world: &str) -> Vec<String> {
    let objects = case.sections.iter().find(|section| section.name == "objects");
    let mut table = table(objects.map_or(world, |section| &section.text));
    let has = |name: &str| case.sections.iter().any(|section| section.name == name);
    if !has("not synced") {
        table.set_synced();
    }
    let resolver = resolver(table, if has("pods insecure") { PodMode::Insecure } else { PodMode::Disabled });
    let mut problems = Vec::new();
    let mut found = String::new();
    for section in &case.sections {
        match section.name.as_str() {
            "ask" => found = ask(&resolver, &section.text),
            "answer" if found.trim() != section.text.trim() => {
                problems.push(format!("{}\n  found\n{found}\n  wanted\n{}", case.title, section.text));
            }
            "answer" | "objects" | "not synced" | "pods insecure" => {}
            other => panic!("{}: no section is called {other}", case.title),
        }
    }
    problems
}

#[test]
fn records_follow_the_specification() {
    let cases = parse(include_str!("zone.txt"));
    let world = cases[0].sections[0].text.clone();
    let problems: Vec<String> = cases.iter().flat_map(|case| check(case, &world)).collect();
    assert!(problems.is_empty(), "{} wrong answers\n\n{}", problems.len(), problems.join("\n"));
    assert!(cases.len() > 40, "the file was not read as meant");
}

#[test]
fn a_zone_must_be_a_name() {
    for wrong in ["", ".", "a b", "a..b"] {
        assert!(Zone::new(wrong, 5, PodMode::Disabled).is_err(), "{wrong:?}");
    }
}
