//! `docs/service-rows.md` says which case shows which row of the Service's semantics; here it is kept true.

use std::collections::BTreeSet;
use std::path::Path;

use crate::case;

/// All rows there have to be, besides those that the document adds.
const ROWS: &[&str] = &[
    "type",
    "ports",
    "protocol",
    "targetPort",
    "appProtocol",
    "nodePort",
    "clusterIP allocation",
    "clusterIP chosen",
    "clusterIP immutable",
    "ServiceCIDR and IPAddress",
    "ipFamilies",
    "ipFamilyPolicy",
    "selector absent",
    "headless",
    "publishNotReadyAddresses",
    "sessionAffinity",
    "internalTrafficPolicy",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "healthCheckNodePort served",
    "trafficDistribution",
    "topology-mode",
    "allocateLoadBalancerNodePorts",
    "loadBalancerClass",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "ipMode",
    "externalIPs",
    "service-proxy-name",
    "StrictIPCIDRValidation",
    "relaxed Service names",
    "EndpointSlice grouping",
    "EndpointSlice limits",
    "conditions",
    "ProxyTerminatingEndpoints",
    "Endpoints mirrored",
    "Endpoints over capacity",
    "default/kubernetes",
    "hook placement",
    "no endpoints",
    "no endpoints in scope",
    "undefined port",
    "masquerade",
    "detectLocalMode",
    "nodePortAddresses",
    "localhost node ports",
    "pick",
    "UDP conntrack",
    "healthz and livez",
    "sync timing",
    "metrics",
    "conntrack sysctls",
    "roadmap of modes",
    "mode switching",
    "DNS and hostPort",
];

/// Rows that nothing shows yet. Whoever adds the case takes the name away from here.
const WITHOUT_A_CASE: &[&str] = &[];

#[test]
fn every_row_names_its_case_and_every_case_its_row() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = include_str!("../../../../docs/service-rows.md");
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| row |") && !line.starts_with("| ---"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let mut names = BTreeSet::new();
    let mut files = BTreeSet::new();
    let mut empty = Vec::new();
    for row in &rows {
        let [name, kind, cases] = row[..] else { panic!("three cells: {row:?}") };
        assert!(names.insert(name), "{name} stands there twice");
        assert!(["packet", "api", "process", "note"].contains(&kind), "{name}: what is a {kind} row?");
        if kind == "note" {
            continue;
        }
        if cases.is_empty() {
            empty.push(name);
        }
        let words: Vec<&str> = cases.split('`').skip(1).collect();
        for case in words.chunks(2) {
            let [path, title] = case[..] else { panic!("{name}: each case is a `path` and a title") };
            let title = title.trim().trim_end_matches(';');
            let held =
                std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{name}: {path}: {error}"));
            assert!(held.contains(title), "{name}: {path} has no {title}");
            assert_eq!(kind == "packet", path.starts_with("crates/proxy/tests/cases/"), "{name} is a {kind} row");
            files.extend(path.strip_prefix("crates/proxy/tests/cases/"));
        }
    }
    let missing: Vec<&&str> = ROWS.iter().filter(|row| !names.contains(**row)).collect();
    assert!(missing.is_empty(), "docs/service-rows.md has no row for {missing:?}");
    assert_eq!(empty, WITHOUT_A_CASE, "rows without a case");
    let cases: BTreeSet<String> = case::all().into_iter().map(|case| format!("{}.txt", case.file)).collect();
    let cases: BTreeSet<&str> = cases.iter().map(String::as_str).collect();
    assert_eq!(files, cases, "files in the table (left), files there are (right)");
}
