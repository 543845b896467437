//! Runs every case file in every mode as a plan: packets are traced through what the mode commits to a fake kernel.

use std::collections::BTreeMap;

use linux::nft::{Fate, Packet};

use crate::case::{self, Case, Objects, Outcome, Trace, node};
use crate::modes::{Subject, on_fakes};

/// How likely each fate of a packet is, in millionths: it is walked with every sequence of random draws.
pub fn fates(mut trace: impl FnMut(&mut dyn FnMut(u32) -> u32) -> Fate) -> BTreeMap<Fate, u64> {
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

/// What a tracer finds if the outcome is met.
pub fn expected(outcome: &Outcome, packet: &Packet) -> Vec<Fate> {
    match outcome {
        Outcome::Drop => vec![Fate::Dropped],
        Outcome::Reject => vec![Fate::Rejected],
        Outcome::Pass => vec![Fate::Sent { to: packet.to, masqueraded: false }],
        Outcome::To { places, masqueraded } => {
            places.iter().map(|to| Fate::Sent { to: *to, masqueraded: *masqueraded }).collect()
        }
    }
}

/// What is wrong with a trace.
fn check(trace: &Trace, subject: &mut dyn Subject, node: &proxy::NodeView) -> Option<String> {
    let mode = subject.mode();
    let found = fates(|draw| subject.trace(trace.packet.clone(), node, draw));
    let expected = expected(&trace.outcome_on(mode, node), &trace.packet);
    let share = 1_000_000 / expected.len() as u64;
    let even = found.values().all(|weight| weight.abs_diff(share) <= 2);
    let same = found.len() == expected.len() && expected.iter().all(|fate| found.contains_key(fate));
    (!same || !even).then(|| format!("{mode}: {}\n   found {found:?}", trace.line))
}

fn play(case: &Case) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut table = services::ServiceTable::new();
    table.set_synced();
    let mut node = node();
    let mut subjects = on_fakes(None);
    for subject in &mut subjects {
        subject.start(&table, &node).expect("the empty plan");
    }
    for step in &case.steps {
        let objects = Objects::parse(&step.objects);
        let changes: Vec<_> = objects.apply(&mut table).into_iter().flat_map(|changes| changes.frontends).collect();
        let same_node = node == objects.node;
        node = objects.node;
        for subject in &mut subjects {
            let done = if same_node { subject.change(&changes, &node) } else { subject.start(&table, &node) };
            done.unwrap_or_else(|error| panic!("{}: {}: {error}", case.title, subject.mode()));
            let found = step.traces.iter().filter_map(|trace| check(trace, &mut **subject, &node));
            wrong.extend(found.map(|what| format!("{}.txt: {}\n  {what}", case.file, case.title)));
        }
    }
    wrong
}

#[test]
fn packets_go_where_the_cases_say() {
    let wrong: Vec<String> = case::all().iter().flat_map(play).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_packet_is_explained_by_the_rules_it_meets() {
    let table =
        Objects::parse(&["service web 10.96.0.10 80/TCP nodePort=30007", "endpoint web 10.244.1.5:80 node-2"]).table();
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
    let text = explain(proxy::Mode::Ebpf);
    for part in [
        "arriving",
        "frontends { 192.168.49.2 . tcp . 30007 : 1 of 0/ipv4/all, masquerade }",
        "endpoints { 0/ipv4/all . 0 : 10.244.1.5:80 }",
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
