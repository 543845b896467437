//! What the rules for Service ports without an endpoint have counted.

use linux::iptables::{Table, Tools};
use services::Protocol;

use crate::Error;

/// First packets that found no endpoint, by Service port as its rules name it: `namespace/service:port`. A commit writes the
/// rules anew, and their counters with them.
pub fn rejections(tools: &Tools) -> Result<Vec<(String, Protocol, u64)>, Error> {
    let mut found = Vec::new();
    for v6 in [false, true] {
        found.extend(tools.save_counters(v6, Table::Filter)?.lines().filter_map(rejection));
    }
    Ok(found)
}

/// `[12:720] -A KUBE-SERVICES -d 10.96.0.9/32 -p tcp -m comment --comment "shop/web:http has no endpoints" -m tcp …`
fn rejection(line: &str) -> Option<(String, Protocol, u64)> {
    let (count, rule) = line.strip_prefix('[')?.split_once(':')?;
    let count = count.parse().ok().filter(|count| *count > 0)?;
    let (_, comment) = rule.split_once("--comment \"")?;
    let (comment, _) = comment.split_once('"')?;
    let name = comment.strip_suffix(" has no endpoints").or(comment.strip_suffix(" has no local endpoints"))?;
    let (_, protocol) = rule.split_once(" -p ")?;
    let protocol = protocol.split_whitespace().next()?;
    Some((name.to_owned(), Protocol::parse(&protocol.to_uppercase())?, count))
}
