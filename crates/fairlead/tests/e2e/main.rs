//! The built binary and real kubectl, as a user has them: scripts of commands and what they should print.
//!
//! docs/testing.md describes the scripts in `tests/cases`. Each test has a cluster of its own.

mod alone;
mod bgp;
mod cluster;
mod daemon;
mod death;
mod dns;
mod gateway;
mod handover;
mod ingress;
mod load;
mod loadbalancer;
mod moves;
mod play;
mod registry;
mod rolling;
mod script;
mod split;
mod standalone;
mod uplink;
mod variants;
mod vip;
mod vrrp;

use cluster::{Cluster, Kubectl, kubectls};
use script::Script;

const NODES: u8 = 3;
/// From so many random cases on (`make soak`), every kubectl plays the whole script.
const MANY_CASES: u64 = 1000;

/// Plays a script on one cluster after another, and shows every difference at the end.
fn play_with(title: &str, text: &str, kubectls: &[Kubectl]) {
    let script = Script::parse(title, text).expect("the script can be read");
    let mut differences = Vec::new();
    for kubectl in kubectls {
        let cluster = Cluster::up(kubectl, NODES);
        differences.extend(play::play(&script, &cluster).iter().map(|d| format!("with {}\n{d}", kubectl.name)));
    }
    settle(&differences);
}

/// A kubectl that is known not to get through a script has to fail there: who mends it takes it off the list.
const KNOWN: &[(&str, &str)] = &[];

fn settle(differences: &[String]) {
    assert!(differences.is_empty(), "{} steps differ:\n\n{}", differences.len(), differences.join("\n\n"));
}

fn many_cases() -> bool {
    std::env::var("FAIRLEAD_CASES").is_ok_and(|cases| cases.parse::<u64>().is_ok_and(|cases| cases >= MANY_CASES))
}

#[test]
fn kubectl_finds_what_it_expects() {
    let all = kubectls();
    play_with("kubectl.txt", include_str!("../cases/kubectl.txt"), if many_cases() { &all } else { &all[..1] });
}

#[test]
fn older_kubectls_do_what_is_done_daily() {
    let all = kubectls();
    let script = Script::parse("daily.txt", include_str!("../cases/daily.txt")).expect("the script can be read");
    let cluster = Cluster::up(&all[0], 2);
    let mut differences = Vec::new();
    for kubectl in &all[1..] {
        cluster.play_with(kubectl);
        let found = play::play(&script, &cluster);
        match KNOWN.iter().find(|(name, _)| *name == kubectl.name) {
            None => differences.extend(found.iter().map(|d| format!("with {}\n{d}", kubectl.name))),
            Some((name, why)) if found.is_empty() => {
                differences.push(format!("{name} gets through: take its entry ({why}) away"));
            }
            Some(_) => {}
        }
    }
    settle(&differences);
}

#[test]
fn kubectl_does_more_than_the_road_needs() {
    play_with("more.txt", include_str!("../cases/more.txt"), &kubectls()[..1]);
}

#[test]
fn bad_input_gets_the_error_that_kubernetes_gives() {
    play_with("bad-input.txt", include_str!("../cases/bad-input.txt"), &kubectls()[..1]);
}

#[test]
fn the_examples_do_what_they_say() {
    play_with("examples.txt", include_str!("../cases/examples.txt"), &kubectls()[..1]);
}
