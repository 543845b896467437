//! Compares what the kernel holds with the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use linux::bpf;
use linux::iptables::{self, Iptables as _, Table, Tools};
use linux::ipvs;
use linux::nft::{self, ElementData, Family, Nft, Set};
use services::Frontend;

use super::plan;
use crate::dataplane::Dataplane;
use crate::dataplane::ebpf::{Ebpf, LAYOUT, LAYOUTS, OBJECT};
use crate::dataplane::iptables::Iptables;
use crate::dataplane::ipvs::{self as ipvs_mode, Ipvs};
use crate::dataplane::nftables::{self, Nftables};
use crate::dataplane::userspace::{self, FakeRelays, Userspace};
use crate::{Error, Mode, NodeView};

const UNEXPECTED: &str = "unexpected: ";

/// `frontends` is the whole table. Each line says what is missing from the kernel in this namespace, or what is there and should not be. What clients
/// have left there (affinity) and the ports that relays were given are not compared. A commit that is under way shows,
/// too.
pub fn drift(
    mode: Mode,
    frontends: &[Arc<Frontend>],
    node: &NodeView,
    namespace: Option<BorrowedFd<'_>>,
    hooks: Option<&bpf::Hooks>,
) -> Result<Vec<String>, Error> {
    match mode {
        Mode::Nftables => {
            let mut wanted = Nftables::new(nft::Fake::default());
            plan(&mut wanted, frontends, node)?;
            let base = Nftables::<nft::Fake>::base(node);
            let held = &mut nft::Socket::open(namespace)?;
            let mut lines = compare(wanted.nft(), held, nftables::FAMILY, nftables::TABLE, &base.frame.sets, &[])?;
            // A chain that nothing leads to stays for whoever needs it next.
            let is_idle = |line: &String| {
                let kinds = ["chain pick", "chain external_", "classes4 ", "classes6 "];
                line.strip_prefix(UNEXPECTED).is_some_and(|what| kinds.iter().any(|kind| what.starts_with(kind)))
            };
            lines.retain(|line| !is_idle(line));
            Ok(lines)
        }
        Mode::Ebpf => {
            let mut wanted = Ebpf::new(bpf::Fake::new(&LAYOUTS));
            plan(&mut wanted, frontends, node)?;
            let hooks = hooks.ok_or(Error::NoHooks)?.clone();
            let mut held = Ebpf::new(bpf::Pinned::open(OBJECT, LAYOUT, hooks, namespace)?);
            Ok(differences("", &wanted.lines()?, &held.lines()?))
        }
        Mode::Userspace => {
            let Some(mut held) = userspace::open(namespace)? else { return Ok(Vec::new()) };
            let mut wanted = Userspace::new(Some(nft::Fake::default()), FakeRelays::default());
            plan(&mut wanted, frontends, node)?;
            let sets = userspace::Base::new(node).frame.sets;
            let Some(wanted) = wanted.kernel() else { return Ok(Vec::new()) };
            let relays = |set: &Set| set.name.starts_with("relays");
            let sets: Vec<Set> = sets.into_iter().filter(|set| !relays(set)).collect();
            compare(wanted, &mut held, userspace::FAMILY, userspace::TABLE, &sets, &["redirect4", "redirect6"])
        }
        Mode::Ipvs => {
            let mut wanted = Ipvs::new(ipvs::Fake::default(), nft::Fake::default());
            plan(&mut wanted, frontends, node)?;
            let held = &mut nft::Socket::open(namespace)?;
            let servers = ipvs_mode::lines(&mut ipvs::Socket::open(namespace)?, held)?;
            let (fake, nft) = wanted.kernel();
            let mut lines = differences("", &ipvs_mode::lines(fake, nft)?, &servers);
            let sets = ipvs_mode::Base::new(node).sets;
            lines.extend(compare(wanted.kernel().1, held, ipvs_mode::FAMILY, ipvs_mode::TABLE, &sets, &[])?);
            Ok(lines)
        }
        Mode::Iptables => {
            let mut wanted = Iptables::new(iptables::Fake::default());
            plan(&mut wanted, frontends, node)?;
            let namespace = namespace.map(|namespace| namespace.try_clone_to_owned()).transpose();
            let namespace: Option<OwnedFd> = namespace.map_err(Error::Namespace)?;
            compare_chains(wanted.kernel(), &mut Tools::open(namespace)?)
        }
    }
}

/// `only_keys` names maps whose data only the running proxy knows.
fn compare(
    wanted: &mut nft::Fake,
    held: &mut nft::Socket,
    family: Family,
    table: &str,
    sets: &[Set],
    only_keys: &[&str],
) -> Result<Vec<String>, Error> {
    if held.table_comment(family, table)?.is_none() {
        return Ok(vec![format!("missing: the whole table {family} {table}")]);
    }
    let chains =
        |nft: &mut dyn Nft| nft.chains(family, table).map(|chains| chains.into_iter().collect::<BTreeSet<_>>());
    let mut lines = differences("chain ", &chains(wanted)?, &chains(held)?);
    for set in sets.iter().filter(|set| !set.dynamic) {
        let elements = |nft: &mut dyn Nft| -> Result<BTreeSet<String>, Error> {
            let elements = nft.elements(family, table, set)?.into_iter().map(|mut element| {
                if only_keys.contains(&&*set.name) {
                    element.data = ElementData::None;
                }
                element.to_string()
            });
            Ok(elements.collect())
        };
        lines.extend(differences(&format!("{} ", set.name), &elements(wanted)?, &elements(held)?));
    }
    Ok(lines)
}

fn differences(of: &str, wanted: &BTreeSet<String>, held: &BTreeSet<String>) -> Vec<String> {
    let missing = wanted.difference(held).map(|what| format!("missing: {of}{what}"));
    let unexpected = held.difference(wanted).map(|what| format!("{UNEXPECTED}{of}{what}"));
    missing.chain(unexpected).collect()
}

/// Chains by name and number of rules: iptables-save words rules in its own way.
fn compare_chains(wanted: &mut iptables::Fake, held: &mut Tools) -> Result<Vec<String>, Error> {
    let mut lines = Vec::new();
    for v6 in [false, true] {
        for table in [Table::Filter, Table::Nat] {
            let (wanted, held) = (sizes(&wanted.save(v6, table)?), sizes(&held.save(v6, table)?));
            let family = if v6 { "IPv6" } else { "IPv4" };
            for (chain, count) in &wanted {
                match held.get(chain) {
                    None => lines.push(format!("missing: {family} {table} chain {chain}")),
                    Some(held) if held != count => {
                        lines.push(format!("{family} {table} chain {chain} has {held} rules instead of {count}"));
                    }
                    Some(_) => {}
                }
            }
            let is_service = |chain: &&String| {
                ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-"]
                    .iter()
                    .any(|kind| chain.starts_with(kind))
            };
            let unexpected = held.keys().filter(is_service).filter(|chain| !wanted.contains_key(*chain));
            lines.extend(unexpected.map(|chain| format!("{UNEXPECTED}{family} {table} chain {chain}")));
        }
    }
    Ok(lines)
}

/// Our chains in `iptables-save`'s text: how many rules each has.
fn sizes(text: &str) -> BTreeMap<String, usize> {
    let mut sizes = BTreeMap::new();
    for line in text.lines() {
        let name = |rest: &str| rest.split_whitespace().next().unwrap_or_default().to_owned();
        if let Some(rest) = line.strip_prefix(':') {
            sizes.insert(name(rest), 0);
        } else if let Some(count) = line.strip_prefix("-A ").and_then(|rest| sizes.get_mut(&name(rest))) {
            *count += 1;
        }
    }
    // Kubelet has a chain there, and built-in chains have everybody's rules.
    sizes.retain(|chain, _| {
        chain.starts_with("KUBE-") && chain != "KUBE-FIREWALL" && !chain.starts_with("KUBE-KUBELET")
    });
    sizes
}
