//! Requests on one way in, and who answered them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

pub const REQUESTS: usize = 200;

/// With two fair endpoints a share leaves these bounds about once in 40,000 runs.
const SHARE: std::ops::RangeInclusive<f64> = 0.35..=0.65;

/// One curl, and a connection per request: a kept connection would be translated once and stay with one pod.
pub fn curl(url: &str) -> Vec<String> {
    let numbered = format!("{url}/?[1-{REQUESTS}]");
    let words = ["curl", "-sS", "--max-time", "300", "--connect-timeout", "5", "-H", "Connection: close", &numbered];
    words.map(str::to_owned).into()
}

/// The same in a mount namespace of its own, whose resolv.conf is `file`.
pub fn curl_with_resolv_conf(file: &str, url: &str) -> Vec<String> {
    let bind = format!("mount --bind '{file}' /etc/resolv.conf && exec \"$@\"");
    let mut words: Vec<String> = ["unshare", "--mount", "sh", "-c", &bind, "sh"].map(str::to_owned).into();
    words.extend(curl(url));
    words
}

/// For a pod whose image has a shell and busybox's wget, which opens a connection per request. (Its own `-T` ends Debian's
/// static busybox with a segmentation fault.)
pub fn wget_script(url: &str) -> String {
    format!("for i in $(seq {REQUESTS}); do timeout 10 wget -q -O - {url}/ || exit 1; done")
}

/// Runs `command`, whose output is one page per request, and fails unless every pod gave its share.
pub fn count(way: &str, pods: &BTreeSet<String>, mut command: Command) -> Result<()> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("{way}: cannot run the client"))?;
    let pages = String::from_utf8_lossy(&done.stdout).into_owned();
    let answers = answers(&pages);
    let total: usize = answers.values().sum();
    let shares: Vec<String> = answers.iter().map(|(pod, count)| format!("{pod} {count}")).collect();
    println!("  {way:<28}{}", shares.join("   "));
    if !done.status.success() {
        let complaint = String::from_utf8_lossy(&done.stderr).into_owned();
        bail!("{way}: the client ended with {} after {total} answers: {}", done.status, complaint.trim());
    }
    judge(&answers, pods).with_context(|| way.to_owned())
}

/// Pages say `IMAGE on POD`.
fn answers(pages: &str) -> BTreeMap<String, usize> {
    let mut answers = BTreeMap::new();
    for page in pages.lines() {
        let pod = page.rsplit(" on ").next().unwrap_or(page).trim();
        *answers.entry(pod.to_owned()).or_insert(0) += 1;
    }
    answers
}

fn judge(answers: &BTreeMap<String, usize>, pods: &BTreeSet<String>) -> Result<()> {
    let total: usize = answers.values().sum();
    if total != REQUESTS {
        bail!("{total} answers to {REQUESTS} requests");
    }
    for name in answers.keys().chain(pods) {
        let count = answers.get(name).copied().unwrap_or(0);
        if !pods.contains(name) {
            bail!("an answer from {name:?}, which is no pod of the Service");
        }
        if !SHARE.contains(&(count as f64 / REQUESTS as f64)) {
            bail!("{name} gave {count} of {REQUESTS} answers: the load is not balanced");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(shares: &[(&str, usize)]) -> String {
        let pages: String = shares.iter().map(|(pod, n)| format!("nginx:test1 on {pod}\n").repeat(*n)).collect();
        let pods = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        judge(&answers(&pages), &pods).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn only_a_balanced_and_complete_count_passes() {
        assert_eq!(judged(&[("a", 90), ("b", 110)]), "");
        assert!(judged(&[("a", 200)]).contains("not balanced"));
        assert!(judged(&[("a", 60), ("b", 140)]).contains("not balanced"));
        assert!(judged(&[("a", 90), ("b", 100)]).contains("190 answers"));
        assert!(judged(&[("a", 90), ("b", 109), ("c", 1)]).contains("no pod"));
    }
}
