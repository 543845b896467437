//! Runs every case file of `tests/cases` in every mode: objects in, packets traced through the plan.
//!
//! ```text
//! # Why this matters.
//! -- objects --
//! service web 10.96.0.10 80/TCP nodePort=30080 external=Local
//! endpoint web 10.244.2.5:8080 node-2
//! -- trace --
//! 203.0.113.9 -> 192.168.49.2:30080   DROP
//! 10.244.0.7 -> 10.96.0.10:80   10.244.2.5:8080
//! ```
//! Outcomes are DROP, REJECT, or all places a packet may go to (each equally likely), with `masq` if its source changes.
//! A line that starts with `nftables:`, `iptables:` or `ipvs:` holds for that mode only. The node is `node-1` in zone `a`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use linux::nft::{Fate, Packet};
use linux::{iptables, ipvs, nft};
use proxy::NodeView;
use proxy::dataplane::iptables::Iptables;
use proxy::dataplane::ipvs::Ipvs;
use proxy::dataplane::nftables::Nftables;
use proxy::dataplane::{Change, Dataplane};
use serde_json::{Value, json};
use services::{Place, Protocol, ServiceTable};

pub fn node() -> NodeView {
    let parse = |text: &str| text.parse::<IpAddr>().expect("address");
    NodeView::new(
        Place { node: "node-1".into(), zone: Some("a".into()) },
        vec![parse("192.168.49.2"), parse("fd00:c0a8:31::2")],
        ["10.244.0.0/16", "fd00:10:244::/56"].map(|cidr| cidr.parse().expect("cidr")).to_vec(),
        ["10.96.0.0/12", "fd00:10:96::/112"].map(|cidr| cidr.parse().expect("cidr")).to_vec(),
    )
}

/// Objects from lines; also gives them as JSON, so that other tests can play with the order.
pub fn objects(lines: &[&str]) -> (Vec<Value>, Vec<Value>) {
    let mut services = Vec::new();
    let mut slices: BTreeMap<String, Value> = BTreeMap::new();
    let mut ports: BTreeMap<String, String> = BTreeMap::new();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["service", name, addresses, port, ref options @ ..] => {
                let (number, protocol) = port.split_once('/').expect("80/TCP");
                ports.insert(name.to_owned(), protocol.to_owned());
                services.push(service(name, addresses, number.parse().expect("port"), protocol, options));
            }
            ["endpoint", name, address, node, ref options @ ..] => {
                let address: SocketAddr = address.parse().expect("an endpoint's address");
                let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
                let slice = slices.entry(format!("{name}-{family}-{}", address.port())).or_insert_with(|| {
                    json!({"metadata": {"namespace": "default", "name": format!("{name}-{family}-{}", address.port()),
                        "labels": {"kubernetes.io/service-name": name}}, "addressType": family,
                        "ports": [{"port": address.port(), "protocol": ports[name]}], "endpoints": []})
                });
                slice["endpoints"].as_array_mut().expect("a list").push(endpoint(address.ip(), node, options));
            }
            _ => panic!("not an object: {line}"),
        }
    }
    (services, slices.into_values().collect())
}

fn service(name: &str, addresses: &str, port: u16, protocol: &str, options: &[&str]) -> Value {
    let addresses: Vec<&str> = addresses.split(',').collect();
    let mut object = json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"type": "NodePort", "clusterIP": addresses[0], "clusterIPs": addresses,
            "ports": [{"port": port, "protocol": protocol}]},
    });
    for option in options {
        let (key, value) = option.split_once('=').expect("key=value");
        let list = || value.split(',').collect::<Vec<_>>();
        match key {
            "nodePort" => object["spec"]["ports"][0]["nodePort"] = json!(value.parse::<u16>().expect("port")),
            "external" => object["spec"]["externalTrafficPolicy"] = json!(value),
            "internal" => object["spec"]["internalTrafficPolicy"] = json!(value),
            "externalIPs" => object["spec"]["externalIPs"] = json!(list()),
            "affinity" => {
                object["spec"]["sessionAffinity"] = json!("ClientIP");
                let seconds = value.parse::<u32>().expect("seconds");
                object["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
            }
            "balancer" | "proxied" => {
                object["spec"]["type"] = json!("LoadBalancer");
                let mode = if key == "proxied" { "Proxy" } else { "VIP" };
                let ingress: Vec<Value> = list().iter().map(|ip| json!({"ip": ip, "ipMode": mode})).collect();
                object["status"]["loadBalancer"]["ingress"] = json!(ingress);
            }
            "sources" => object["spec"]["loadBalancerSourceRanges"] = json!(list()),
            "otherProxy" => object["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": value}),
            other => panic!("no such option: {other}"),
        }
    }
    object
}

fn endpoint(address: IpAddr, node: &str, options: &[&str]) -> Value {
    let mut endpoint = json!({"addresses": [address.to_string()], "nodeName": node, "conditions": {}});
    for option in options {
        match option.split_once('=') {
            None if *option == "notReady" => endpoint["conditions"] = json!({"ready": false, "serving": false}),
            None if *option == "terminating" => {
                endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
            }
            None if *option == "dying" => {
                endpoint["conditions"] = json!({"ready": false, "serving": false, "terminating": true});
            }
            Some(("forZone", zone)) => endpoint["hints"]["forZones"] = json!([{"name": zone}]),
            Some(("forNode", node)) => endpoint["hints"]["forNodes"] = json!([{"name": node}]),
            _ => panic!("no such option: {option}"),
        }
    }
    endpoint
}

pub fn table(lines: &[&str]) -> ServiceTable {
    let (services, slices) = objects(lines);
    let mut table = ServiceTable::new();
    for service in services {
        table.upsert_service(service.to_string().as_bytes()).expect("a valid Service");
    }
    for slice in slices {
        table.upsert_slice(slice.to_string().as_bytes()).expect("a valid EndpointSlice");
    }
    table.set_synced();
    table
}

pub fn whole<D: Dataplane>(table: &ServiceTable, node: &NodeView) -> Vec<Change<D::Entries>> {
    let entries = |frontend: &services::Frontend| D::entries(frontend, node);
    table.frontends().map(|frontend| Change { id: frontend.id, before: None, after: Some(entries(frontend)) }).collect()
}

/// Walks the packet with every sequence of random draws; how likely each fate is, in millionths.
fn fates(mut trace: impl FnMut(&mut dyn FnMut(u32) -> u32) -> Fate) -> BTreeMap<Fate, u64> {
    let mut found: BTreeMap<Fate, f64> = BTreeMap::new();
    // The draws of one walk, and how many values each could have had.
    let mut draws: Vec<(u32, u32)> = Vec::new();
    loop {
        let mut next = 0;
        let fate = trace(&mut |modulus| {
            if next == draws.len() {
                draws.push((0, modulus));
            }
            next += 1;
            draws[next - 1].0
        });
        let weight: f64 = draws.iter().map(|(_, modulus)| 1.0 / f64::from(*modulus)).product();
        *found.entry(fate).or_default() += weight;
        while draws.last().is_some_and(|(value, modulus)| value + 1 == *modulus) {
            draws.pop();
        }
        match draws.last_mut() {
            None => break,
            Some(last) => last.0 += 1,
        }
    }
    found.into_iter().map(|(fate, weight)| (fate, (weight * 1e6).round() as u64)).collect()
}

/// Walks a packet through a plan, asking for random draws.
type Trace<'a> = &'a mut dyn FnMut(Packet, &mut dyn FnMut(u32) -> u32) -> Fate;

/// Checks one line of a trace section; what is wrong with it.
fn check(line: &str, mode: &str, trace: Trace<'_>) -> Option<String> {
    let line = match line.split_once(": ") {
        Some((only, rest)) if ["nftables", "iptables", "ipvs"].contains(&only) => {
            if only != mode {
                return None;
            }
            rest
        }
        _ => line,
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    let [from, "->", to, ref expected @ ..] = words[..] else { panic!("not a trace: {line}") };
    let (to, protocol) = to.split_once('/').unwrap_or((to, "TCP"));
    let packet = Packet {
        from: SocketAddr::new(from.parse().expect("a source"), 40_000),
        to: to.parse().expect("a destination"),
        protocol: Protocol::parse(protocol).expect("a protocol").number(),
    };
    let masqueraded = expected.last() == Some(&"masq");
    let places = if masqueraded { &expected[..expected.len() - 1] } else { expected };
    let expected: Vec<Fate> = match places {
        ["DROP"] => vec![Fate::Dropped],
        ["REJECT"] => vec![Fate::Rejected],
        ["PASS"] => vec![Fate::Sent { to: packet.to, masqueraded }],
        places => places
            .iter()
            .filter(|word| **word != "|")
            .map(|place| Fate::Sent { to: place.parse().expect("a place"), masqueraded })
            .collect(),
    };
    let found = fates(|random| trace(packet.clone(), random));
    let share = 1_000_000 / expected.len() as u64;
    let even = found.values().all(|weight| weight.abs_diff(share) <= 2);
    let same = found.len() == expected.len() && expected.iter().all(|fate| found.contains_key(fate));
    (!same || !even).then(|| format!("{mode}: {line}\n   found {found:?}"))
}

struct Case<'a> {
    title: &'a str,
    objects: Vec<&'a str>,
    traces: Vec<&'a str>,
}

fn cases(text: &str) -> Vec<Case<'_>> {
    let mut cases: Vec<Case<'_>> = Vec::new();
    let mut in_traces = false;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(title) = line.strip_prefix("# ") {
            cases.push(Case { title, objects: Vec::new(), traces: Vec::new() });
            continue;
        }
        let case = cases.last_mut().expect("a file starts with a title");
        match line {
            "-- objects --" => in_traces = false,
            "-- trace --" => in_traces = true,
            line if in_traces => case.traces.push(line),
            line => case.objects.push(line),
        }
    }
    cases
}

#[test]
fn packets_go_where_the_cases_say() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
    let mut files: Vec<_> = std::fs::read_dir(folder).expect("cases").map(|file| file.expect("file").path()).collect();
    files.sort();
    let mut wrong = Vec::new();
    let node = node();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("readable");
        for case in cases(&text) {
            let table = table(&case.objects);
            let mut nftables = Nftables::new(nft::Fake::default());
            let base = Nftables::<nft::Fake>::base(&node);
            nftables.commit(Some(&base), &whole::<Nftables<nft::Fake>>(&table, &node)).expect("commit");
            let mut iptables = Iptables::new(iptables::Fake::default());
            let base = Iptables::<iptables::Fake>::base(&node);
            iptables.commit(Some(&base), &whole::<Iptables<iptables::Fake>>(&table, &node)).expect("commit");
            let mut ipvs = Ipvs::new(ipvs::Fake::default(), nft::Fake::default());
            let base = Ipvs::<ipvs::Fake, nft::Fake>::base(&node);
            ipvs.commit(Some(&base), &whole::<Ipvs<ipvs::Fake, nft::Fake>>(&table, &node)).expect("commit");
            for line in &case.traces {
                let found = [
                    check(line, "ipvs", &mut |packet, random| {
                        ipvs.explain(packet, &node.addresses, random, &mut Vec::new())
                    }),
                    check(line, "nftables", &mut |packet, random| {
                        nftables.nft().clone().trace(packet, &node.addresses, random)
                    }),
                    check(line, "iptables", &mut |packet, random| {
                        iptables.kernel().clone().trace(packet, &node.addresses, random)
                    }),
                ];
                wrong.extend(found.into_iter().flatten().map(|what| format!("{}\n  {what}", case.title)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_packet_is_explained_by_the_rules_it_meets() {
    let table = table(&["service web 10.96.0.10 80/TCP nodePort=30007", "endpoint web 10.244.1.5:80 node-2"]);
    let packet = Packet {
        from: "203.0.113.9:40000".parse().expect("source"),
        to: "192.168.49.2:30007".parse().expect("destination"),
        protocol: 6,
    };
    let explain = |mode| proxy::explain(mode, &table, &node(), packet.clone(), &mut |_| 0).expect("a plan");
    let text = explain(proxy::Mode::Nftables);
    for part in [
        "prerouting: meta nfproto ipv4 0x00000000 . ip daddr . meta l4proto . th dport map @frontends4 vmap @classes4",
        "@frontends4 { 192.168.49.2 . tcp . 30007 : 0x",
        ": goto pick4_1 }",
        "@slots4 { 0x00000000 . 0x00000000 . 0x00000000 : 10.244.1.5 . 80 }",
        "@masquerade4 masquerade fully-random",
        "sent to 10.244.1.5:80, masqueraded",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let text = explain(proxy::Mode::Ipvs);
    for part in [
        "ipvs: -t 192.168.49.2:30007 -s rr",
        "-r 10.244.1.5:80 -m -w 1",
        "@masquerade4 masquerade fully-random",
        "sent to 10.244.1.5:80, masqueraded",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let text = explain(proxy::Mode::Iptables);
    for part in [
        "nat -A KUBE-NODEPORTS -m comment --comment \"default/web\" -m tcp -p tcp --dport 30007 -j KUBE-EXT-",
        "-j DNAT --to-destination 10.244.1.5:80",
        "nat -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE",
        "sent to 10.244.1.5:80, masqueraded",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}
