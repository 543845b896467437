//! The rules that carried the packets, cut out of what the kernel itself says it holds.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Result, bail};

use crate::cluster::Cluster;
use crate::shell;

pub fn show(cluster: &Cluster, proxy_mode: &str, words: &[String]) -> Result<()> {
    let (table, cut) = match proxy_mode {
        "nftables" => (shell::output(&mut nft(cluster))?, nftables(words)),
        "iptables" => (iptables(cluster)?, iptables_lines(words)),
        // Bytes in maps, relays, virtual servers: fairlead itself says what they do.
        _ => return explain(cluster, words),
    };
    let lines = cut(&table);
    if lines.is_empty() {
        bail!("no rule on node-1 names any of {}", words.join(", "));
    }
    for line in lines {
        println!("  {line}");
    }
    Ok(())
}

/// What the node's kernel holds, beside what it should: a packet from node-1 to the first address.
fn explain(cluster: &Cluster, words: &[String]) -> Result<()> {
    let Some(address) = words.first() else { bail!("the story has no cluster IP") };
    let destination = format!("{address}:80");
    let told = shell::output(&mut cluster.fairlead(&["explain", "node-1", &destination, "--live"]))?;
    told.lines().for_each(|line| println!("  {line}"));
    Ok(())
}

type Cut = Box<dyn Fn(&str) -> Vec<String>>;

fn nft(cluster: &Cluster) -> Command {
    cluster.on("node-1", &["nft", "--numeric", "list", "ruleset"])
}

/// Either variant may be in use: the one that holds kube-proxy's chains is.
fn iptables(cluster: &Cluster) -> Result<String> {
    for program in ["iptables-nft-save", "iptables-legacy-save"] {
        let table = shell::output(&mut cluster.on("node-1", &[program, "-t", "nat"]))?;
        if table.contains(":KUBE-SERVICES ") {
            return Ok(table);
        }
    }
    bail!("neither iptables variant holds KUBE-SERVICES on node-1")
}

/// Elements and rules that name a word, each under the map, set or chain it lies in.
fn nftables(words: &[String]) -> Cut {
    let words = words.to_vec();
    Box::new(move |table| {
        let mut lines: Vec<String> = Vec::new();
        let mut home = String::new();
        let mut shown = String::new();
        for line in table.lines() {
            let trimmed = line.trim();
            if trimmed.ends_with('{') && !trimmed.starts_with("elements") {
                home = trimmed.trim_end_matches('{').trim().to_owned();
                continue;
            }
            let is_chain = home.starts_with("chain ");
            let pieces = if is_chain { vec![trimmed] } else { trimmed.split(',').collect() };
            for piece in pieces.iter().map(|piece| element(piece)).filter(|piece| names(piece, &words)) {
                if shown != home {
                    lines.push(home.clone());
                    shown = home.clone();
                }
                lines.push(format!("  {piece}"));
            }
        }
        lines
    })
}

fn element(piece: &str) -> &str {
    piece.trim().trim_start_matches("elements = {").trim_end_matches('}').trim()
}

/// The jumps to the Service, and all of the chains they lead to, in the table's own order.
fn iptables_lines(words: &[String]) -> Cut {
    let words = words.to_vec();
    Box::new(move |table| {
        let rules: Vec<&str> = table.lines().filter(|line| line.starts_with("-A ")).collect();
        let mut chains: BTreeSet<&str> = BTreeSet::new();
        loop {
            let held = |rule: &&&str| names(rule, &words) || chains.contains(chain(rule));
            let reached: BTreeSet<&str> = rules.iter().filter(held).filter_map(|rule| target(rule)).collect();
            if reached.is_subset(&chains) {
                return rules.iter().filter(held).map(|rule| rule.to_string()).collect();
            }
            chains.extend(reached);
        }
    })
}

fn chain(rule: &str) -> &str {
    rule.split(' ').nth(1).unwrap_or_default()
}

fn target(rule: &str) -> Option<&str> {
    rule.split(' ').skip_while(|word| *word != "-j").nth(1).filter(|to| is_of_a_service(to))
}

fn is_of_a_service(chain: &str) -> bool {
    ["KUBE-SVC-", "KUBE-SEP-", "KUBE-EXT-"].iter().any(|prefix| chain.starts_with(prefix))
}

/// Whole words only: 10.244.1.2 is not 10.244.1.25.
fn names(line: &str, words: &[String]) -> bool {
    line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.')).any(|word| words.iter().any(|wanted| wanted == word))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NFT: &str = "
table ip fairlead {
	map frontends {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.1 . tcp . 443 : goto pick-1, 10.96.7.7 . tcp . 80 : goto pick-2,
			     192.168.49.2 . tcp . 30007 : goto pick-2 }
	}
	chain pick-2 {
		meta l4proto tcp dnat to numgen random mod 2 map @slots
		ip daddr 10.244.1.25 drop
	}
}";

    #[test]
    fn elements_are_cut_out_under_their_map() {
        let words = ["10.96.7.7", "30007", "10.244.1.2"].map(str::to_owned);
        let lines = nftables(&words)(NFT);
        assert_eq!(
            lines,
            ["map frontends", "  10.96.7.7 . tcp . 80 : goto pick-2", "  192.168.49.2 . tcp . 30007 : goto pick-2"]
        );
    }

    #[test]
    fn an_iptables_service_is_followed_to_its_endpoints() {
        let table = "\
:KUBE-SERVICES - [0:0]
-A KUBE-SERVICES -d 10.96.7.7/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-B
-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -j DNAT --to-destination 10.244.1.9:80
-A KUBE-EXT-A -j KUBE-SVC-A
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30007 -j KUBE-EXT-A
-A KUBE-SVC-B -j KUBE-SEP-B";
        let lines = iptables_lines(&["10.96.7.7", "30007"].map(str::to_owned))(table);
        assert_eq!(lines.len(), 5, "{lines:?}");
    }
}
