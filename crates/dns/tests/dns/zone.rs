//! Runs the case files as packets: objects of the first case stand for all cases of a file that bring none of their own.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::{Arc, RwLock};

use dns::{Forward, Hosts, Objects, Parts, PodMode, Resolver, ReverseZones, SearchPath, Step, Zone};
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, Record, RecordType};
use services::ServiceTable;
use tokio::time::Instant;

use crate::cases::{Case, parse};

pub const ZONE: &str = include_str!("cases/zone.txt");
pub const SEARCH: &str = include_str!("cases/search.txt");
const POD: &str = "10.244.1.77";
pub const RANGES: [&str; 4] = ["10.96.0.0/12", "10.244.0.0/16", "fd00:10:96::/112", "fd00:10:244::/56"];

/// The objects of a section, one JSON text a line.
pub fn table(objects: &str) -> ServiceTable {
    let mut table = ServiceTable::new();
    for line in objects.lines().filter(|line| !line.trim().is_empty()) {
        let changes = if line.contains("\"EndpointSlice\"") {
            table.upsert_slice(line.as_bytes())
        } else if line.contains("\"Service\"") {
            table.upsert_service(line.as_bytes())
        } else {
            continue;
        };
        changes.unwrap_or_else(|error| panic!("{error} in {line}"));
    }
    table
}

/// What a case says besides its questions.
pub struct World {
    pub table: ServiceTable,
    pub objects: Arc<Objects>,
    pub pods: PodMode,
    pub hosts: Hosts,
    pub search: SearchPath,
}

impl World {
    pub fn of(case: &Case, common: &str) -> World {
        let section = |name: &str| case.sections.iter().find(|section| section.name == name);
        let mut table = table(section("objects").map_or(common, |section| &section.text));
        if section("not synced").is_none() {
            table.set_synced();
        }
        let objects = Arc::new(Objects::default());
        if let Some(namespaces) = section("namespaces") {
            objects.set_namespaces(namespaces.text.split_whitespace().map(str::to_owned).collect());
        }
        for pod in section("pods verified").iter().flat_map(|section| section.text.lines()) {
            let words: Vec<&str> = pod.split_whitespace().collect();
            let [namespace, name, address] = words[..] else { panic!("{}: a pod is three words", case.title) };
            objects.set_pod(namespace, name, &[address.parse().expect("an address")]);
        }
        let pods = match () {
            () if section("pods insecure").is_some() => PodMode::Insecure,
            () if section("pods verified").is_some() => PodMode::Verified,
            () => PodMode::Disabled,
        };
        let domains = section("search path").map(|section| section.text.split_whitespace().map(name).collect());
        World {
            table,
            objects,
            pods,
            hosts: section("hosts").map(|section| Hosts::parse(&section.text).expect("hosts")).unwrap_or_default(),
            search: SearchPath {
                clients: domains.iter().flat_map(|_| ranges()).collect(),
                domains: domains.clone().unwrap_or_default(),
            },
        }
    }

    fn resolver(self) -> Arc<Resolver> {
        let zone = Zone::new("cluster.local", 5, self.pods).expect("a zone");
        let reverse = ReverseZones::new(zone.origin().clone(), 5, ranges());
        let (table, forward) = (Arc::new(RwLock::new(self.table)), Forward::nowhere());
        let (objects, hosts, search) = (self.objects, self.hosts, self.search);
        Resolver::new(Parts { zone, reverse, table, objects, hosts, search, forward }).0
    }
}

pub fn ranges() -> Vec<ipnet::IpNet> {
    RANGES.iter().map(|range| range.parse().expect("a range")).collect()
}

fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).expect("a name");
    name.set_fqdn(true);
    name
}

fn print_record(record: &Record) -> String {
    let (name, ttl, kind, data) = (record.name.to_ascii(), record.ttl, record.record_type(), &record.data);
    format!("{name} {ttl} {kind} {data}")
}

pub fn print_message(message: &Message) -> String {
    let mut text = message.metadata.response_code.to_string();
    if message.metadata.authoritative {
        text.push_str(" (authoritative)");
    }
    let mut section = |prefix: &str, records: &[Record]| {
        for record in records {
            let _ = write!(text, "\n{prefix}{}", print_record(record));
        }
    };
    section("", &message.answers);
    section("authority ", &message.authorities);
    section("additional ", &message.additionals);
    text
}

/// Name and type of a line like `web.default.svc.cluster.local. A`.
pub fn asked(line: &str) -> (Name, RecordType) {
    let (name, record_type) = line.trim().split_once(' ').expect("a name and a type");
    let record_type = match record_type {
        // The one type that the library writes but does not read.
        "IXFR" => RecordType::IXFR,
        other => other.parse().expect("a type"),
    };
    (Name::from_ascii(name).expect("a name"), record_type)
}

pub fn packet(name: Name, record_type: RecordType) -> Vec<u8> {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, record_type));
    message.to_vec().expect("a message")
}

fn ask(resolver: &Arc<Resolver>, line: &str, client: IpAddr) -> String {
    let (name, record_type) = asked(line);
    let mut out = Vec::new();
    let limit = Some(usize::from(u16::MAX));
    match resolver.receive(&packet(name, record_type), client, limit, Instant::now(), &mut out) {
        Step::Silence => panic!("{line} is a question"),
        Step::Replied { code, .. } => {
            let message = Message::from_vec(&out).expect("a reply can be read");
            assert_eq!(u16::from(message.metadata.response_code), code, "{line}: what is counted");
            print_message(&message)
        }
        Step::Wait(waiting) if !waiting.walk.is_empty() => {
            let walk = waiting.walk.iter().map(|name| format!("walk {name} {}", waiting.question.record_type));
            walk.collect::<Vec<_>>().join("\n")
        }
        Step::Wait(waiting) => {
            let mut text = String::new();
            for record in waiting.so_far.iter().flat_map(|answer| &answer.answers) {
                let _ = writeln!(text, "{}", print_record(record));
            }
            format!("{text}upstream {} {}", waiting.question.name, waiting.question.record_type)
        }
    }
}

fn check(case: &Case, common: &str) -> Vec<String> {
    let resolver = World::of(case, common).resolver();
    let mut problems = Vec::new();
    let mut found = String::new();
    let mut client: IpAddr = POD.parse().expect("an address");
    for section in &case.sections {
        match section.name.as_str() {
            "ask" => found = ask(&resolver, &section.text, client),
            "answer" if found.trim() != section.text.trim() => {
                problems.push(format!("{}\n  found\n{found}\n  wanted\n{}", case.title, section.text));
            }
            "from" => client = section.text.trim().parse().expect("an address"),
            "answer" | "objects" | "not synced" | "pods insecure" | "pods verified" | "namespaces" | "hosts"
            | "search path" => {}
            other => panic!("{}: no section is called {other}", case.title),
        }
    }
    problems
}

#[test]
fn records_follow_the_specification() {
    for (file, least) in [(ZONE, 75), (SEARCH, 12)] {
        let cases = parse(file);
        let common = cases[0].sections[0].text.clone();
        let problems: Vec<String> = cases.iter().flat_map(|case| check(case, &common)).collect();
        assert!(problems.is_empty(), "{} wrong answers\n\n{}", problems.len(), problems.join("\n"));
        assert!(cases.len() > least, "the file was not read as meant: {}", cases.len());
    }
}

/// Whether search paths are walked changes no answer of the specification.
#[test]
fn the_specification_holds_in_both_positions_of_the_switch() {
    let cases = parse(ZONE);
    let common = cases[0].sections[0].text.clone();
    let questions = |case: &Case| {
        let asks = case.sections.iter().filter(|section| section.name == "ask");
        asks.map(|section| section.text.clone()).collect::<Vec<_>>()
    };
    let client: IpAddr = POD.parse().expect("an address");
    let mut walked = Vec::new();
    for case in &cases {
        let off = World::of(case, &common).resolver();
        let mut on = World::of(case, &common);
        on.search.clients = ranges();
        let on = on.resolver();
        for question in questions(case) {
            let (off, on) = (ask(&off, &question, client), ask(&on, &question, client));
            if off != on {
                assert!(on.starts_with("walk ") && off.starts_with("Non-Existent Domain"), "{question}\n{off}\n{on}");
                walked.push(question.trim().to_owned());
            }
        }
    }
    // Without an upstream answer these end in the same NXDOMAIN; the others never leave the table.
    assert_eq!(walked, ["example.com.default.svc.cluster.local. A"]);
}

#[test]
fn a_zone_must_be_a_name() {
    for wrong in ["", ".", "a b", "a..b"] {
        assert!(Zone::new(wrong, 5, PodMode::Disabled).is_err(), "{wrong:?}");
    }
}
