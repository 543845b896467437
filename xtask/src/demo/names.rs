//! What cluster DNS says to a pod of a headless Service and of one that is a name for something outside.

use std::collections::BTreeSet;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::story::text;
use crate::cluster::Cluster;
use crate::shell;

/// Of `examples/more`: the Service `crew` with its pods `one` and `two`, and `archive`, which is `archive.example.com`.
const FILES: [&str; 2] = ["headless.yaml", "external-name.yaml"];

pub fn ask(cluster: &Cluster) -> Result<()> {
    for file in FILES {
        let file = shell::root().join("examples/more").join(file);
        shell::step(&mut cluster.kubectl(&["apply", "-f", &file.to_string_lossy()]))?;
    }
    let pods = ["crew-one", "crew-two"];
    for pod in pods {
        shell::step(&mut cluster.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{pod}"), "--timeout=60s"]))?;
    }
    let addresses: BTreeSet<String> = pods
        .into_iter()
        .map(|pod| Ok(text(&cluster.get(&["pod", pod])?, "/status/podIP")?.to_owned()))
        .collect::<Result<_>>()?;
    resolves(cluster, "crew", "A", &addresses)?;
    let first = text(&cluster.get(&["pod", "crew-one"])?, "/status/podIP")?.to_owned();
    resolves(cluster, "one.crew", "A", &BTreeSet::from([first]))?;
    resolves(cluster, "archive", "CNAME", &BTreeSet::from(["archive.example.com".to_owned()]))
}

/// The slice of a pod that has just become ready is written a moment later.
fn resolves(cluster: &Cluster, name: &str, kind: &str, expected: &BTreeSet<String>) -> Result<()> {
    let name = format!("{name}.default.svc.cluster.local");
    let mut seen = BTreeSet::new();
    let asked = shell::until(&format!("{name} says {expected:?}"), || {
        let question = format!("-type={}", kind.to_lowercase());
        let mut ask = cluster.kubectl(&["exec", "crew-one", "--", "nslookup", &question, &name]);
        let done = ask.stdin(Stdio::null()).output().context("cannot run kubectl")?;
        seen = answers(&String::from_utf8_lossy(&done.stdout), &name);
        Ok(done.status.success() && seen == *expected)
    });
    let told: Vec<&str> = seen.iter().map(String::as_str).collect();
    println!("  {name:<40}{kind:<7}{}", told.join("   "));
    if asked.is_err() {
        bail!("{name} says {told:?} instead of {expected:?}");
    }
    Ok(())
}

/// What nslookup prints of the name: addresses, or the name that it stands for.
fn answers(text: &str, name: &str) -> BTreeSet<String> {
    // The server's own name and address come first.
    let about_name = text.lines().skip_while(|line| !line.contains(name));
    let values = about_name.filter_map(|line| {
        line.strip_prefix("Address:")
            .or_else(|| line.split_once("canonical name =").map(|(_, name)| name))
            .map(|value| value.trim().trim_end_matches('.').to_owned())
    });
    values.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_from_who_gave_it() {
        let text = "Server:\t\t10.96.0.10\nAddress:\t10.96.0.10:53\n\nName:\tcrew.default\nAddress: 10.244.0.3\n\
            Name:\tcrew.default\nAddress: 10.244.1.4\n";
        assert_eq!(answers(text, "crew.default"), ["10.244.0.3", "10.244.1.4"].map(str::to_owned).into());
        let text = "Address:\t10.96.0.10:53\n\narchive.default\tcanonical name = archive.example.com\n";
        assert_eq!(answers(text, "archive.default"), ["archive.example.com".to_owned()].into());
        assert!(answers("** server can't find crew.default: NXDOMAIN\n", "crew.default").is_empty());
    }
}
