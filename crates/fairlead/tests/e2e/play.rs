//! Plays a script on a cluster. A step that differs is noted and the next one is tried: one run shows all there is to see.

use std::time::{Duration, Instant};

use crate::cluster::{Cluster, Seen};
use crate::script::{Script, Step};

const SECONDS_PER_COMMAND: u32 = 90;
const PATIENCE: Duration = Duration::from_secs(90);
/// What is known to differ is not waited for as long.
const LESS_PATIENCE: Duration = Duration::from_secs(5);

/// The differences between what was expected and what was seen.
pub fn play(script: &Script, cluster: &Cluster) -> Vec<String> {
    script.steps.iter().filter_map(|step| judge(script, step, cluster)).collect()
}

/// A difference that is known has to be there: who mends it takes its marker away.
fn judge(script: &Script, step: &Step, cluster: &Cluster) -> Option<String> {
    let begun = Instant::now();
    let seen = settle(step, cluster);
    if std::env::var_os("FAIRLEAD_E2E_TIMES").is_some() {
        eprintln!("{:6.2} s  {}:{} {}", begun.elapsed().as_secs_f64(), script.name, step.line, step.command);
    }
    match (&step.known, seen) {
        (None, None) => None,
        (None, Some(seen)) => Some(report(script, step, &seen)),
        (Some(_), Some(_)) => None,
        (Some(known), None) => Some(format!(
            "{}:{}\n  {}\n  does what Kubernetes does: take its marker `known difference: {known}` away",
            script.name, step.line, step.command
        )),
    }
}

/// What was seen, if it was not what the step expects.
fn settle(step: &Step, cluster: &Cluster) -> Option<Seen> {
    let begun = Instant::now();
    let patience = if step.known.is_some() { LESS_PATIENCE } else { PATIENCE };
    loop {
        let seen = cluster.run(&step.command, &step.input, SECONDS_PER_COMMAND);
        if seen.success == step.succeeds && step.fits(&seen.output) {
            return None;
        }
        if !step.until || begun.elapsed() > patience {
            return Some(seen);
        }
        // What a command prints cannot be waited for as an event.
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn report(script: &Script, step: &Step, seen: &Seen) -> String {
    let ended = if seen.success { "succeeded" } else { "failed" };
    let expected = if step.expected.is_empty() { "(anything)".to_owned() } else { step.expected.join("\n  ") };
    let title = if step.title.is_empty() { String::new() } else { format!("  # {}\n", step.title) };
    format!(
        "{}:{}\n{title}  {} {}\n-- expected\n  {expected}\n-- seen ({ended})\n  {}",
        script.name,
        step.line,
        if step.succeeds { '$' } else { '!' },
        step.command,
        seen.output.trim_end().replace('\n', "\n  "),
    )
}
