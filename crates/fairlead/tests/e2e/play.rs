//! Plays a script on a cluster. A step that differs is noted and the next one is tried: one run shows all there is to see.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::script::{Script, Step};

const SECONDS_PER_COMMAND: u32 = 90;
const PATIENCE: Duration = Duration::from_secs(60);

/// The differences between what was expected and what was seen.
pub fn play(script: &Script, cluster: &Cluster) -> Vec<String> {
    script.steps.iter().filter_map(|step| settle(step, cluster).map(|seen| report(script, step, &seen))).collect()
}

/// What was seen, if it was not what the step expects.
fn settle(step: &Step, cluster: &Cluster) -> Option<Seen> {
    let begun = Instant::now();
    loop {
        let seen = run(step, cluster);
        if seen.success == step.succeeds && step.fits(&seen.output) {
            return None;
        }
        if !step.until || begun.elapsed() > PATIENCE {
            return Some(seen);
        }
        // What a command prints cannot be waited for as an event.
        std::thread::sleep(Duration::from_millis(300));
    }
}

struct Seen {
    success: bool,
    output: String,
}

fn run(step: &Step, cluster: &Cluster) -> Seen {
    // One stream, in the order in which it was written.
    let line = format!("exec 2>&1\n{}", step.command);
    let mut command = cluster.shell(&line, SECONDS_PER_COMMAND);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if step.input.is_empty() { Stdio::null() } else { Stdio::piped() });
    let mut child = command.spawn().expect("a shell can be started");
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input to the end is judged by what it prints.
        let _ = stdin.write_all(step.input.as_bytes());
    }
    let done = child.wait_with_output().expect("a shell can be waited for");
    let output = String::from_utf8_lossy(&done.stdout).replace('\r', "");
    Seen { success: done.status.success(), output }
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
