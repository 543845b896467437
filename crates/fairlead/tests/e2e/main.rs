//! The built binary and real kubectl, as a user has them: scripts of commands and what they should print.
//!
//! docs/testing.md describes the scripts in `tests/cases`.

mod cluster;
mod play;
mod script;

use cluster::{Cluster, kubectls};
use script::Script;

/// Plays a script on a new cluster for each kubectl, and shows every difference at the end.
fn play_with(title: &str, text: &str, kubectls: &[cluster::Kubectl]) {
    let script = Script::parse(title, text).expect("the script can be read");
    let mut differences = Vec::new();
    for kubectl in kubectls {
        let cluster = Cluster::up(kubectl);
        for difference in play::play(&script, &cluster) {
            differences.push(format!("with {}\n{difference}", kubectl.name));
        }
    }
    assert!(differences.is_empty(), "{} steps differ:\n\n{}", differences.len(), differences.join("\n\n"));
}

#[test]
fn kubectl_finds_what_it_expects() {
    play_with("kubectl.txt", include_str!("../cases/kubectl.txt"), &kubectls());
}

#[test]
fn bad_input_gets_the_error_that_kubernetes_gives() {
    play_with("bad-input.txt", include_str!("../cases/bad-input.txt"), &kubectls()[..1]);
}

#[test]
fn the_examples_do_what_they_say() {
    play_with("examples.txt", include_str!("../cases/examples.txt"), &kubectls()[..1]);
}
