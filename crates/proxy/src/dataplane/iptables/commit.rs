//! One `iptables-restore` per family: shared chains whole, a Service's own chains only if it changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use linux::iptables::{Iptables as Kernel, Restore, Rule, Table, TableRestore};
use services::{Frontend, FrontendId, Seed};

use super::base::Base;
use super::names::is_of_a_service;
use super::plan::{Entries, entries};
use crate::dataplane::{Change, Dataplane};
use crate::{Error, NodeView};

/// Services in iptables, through the tools or the fake of them.
pub struct Iptables<K> {
    kernel: K,
    base: Option<Base>,
    held: BTreeMap<FrontendId, Arc<Entries>>,
    /// Chains of Services that the nat table has.
    chains: [BTreeSet<String>; 2],
}

impl<K: Kernel> Iptables<K> {
    pub fn new(kernel: K) -> Self {
        Iptables { kernel, base: None, held: BTreeMap::new(), chains: Default::default() }
    }

    /// The kernel behind it.
    pub fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }
}

fn owned(rules: Vec<(&'static str, Rule)>) -> impl Iterator<Item = (String, Rule)> {
    rules.into_iter().map(|(chain, rule)| (chain.to_owned(), rule))
}

/// What one family's restore writes.
struct Family<'a> {
    base: &'a Base,
    v6: bool,
    held: &'a BTreeMap<FrontendId, Arc<Entries>>,
    /// Frontends whose own chains are written.
    changed: &'a BTreeSet<FrontendId>,
    /// Chains of Services that the kernel has.
    chains: &'a BTreeSet<String>,
    /// The saved tables, if jumps are to be looked for in them.
    saved: Option<[String; 2]>,
}

impl Family<'_> {
    fn restore(&self) -> (Restore, BTreeSet<String>) {
        let index = usize::from(self.v6);
        let mut restore = Restore { filter: self.table(Table::Filter), nat: self.table(Table::Nat) };
        let mut active = BTreeSet::new();
        for (id, entries) in self.held {
            for (chain, rules) in &entries.0[index].chains {
                active.insert(chain.clone());
                if self.changed.contains(id) {
                    restore.nat.chains.push(chain.clone());
                    restore.nat.rules.extend(rules.iter().map(|rule| (chain.clone(), rule.clone())));
                }
            }
        }
        for chain in self.chains.difference(&active) {
            // Naming it empties it, so that it can go.
            restore.nat.chains.push(chain.clone());
            restore.nat.deletes.push(chain.clone());
        }
        for (table, input) in [(Table::Filter, &mut restore.filter), (Table::Nat, &mut restore.nat)] {
            input.rules.extend(owned(self.base.last(table, self.v6)));
        }
        (restore, active)
    }

    /// Shared chains, without their last rules.
    fn table(&self, table: Table) -> TableRestore {
        let index = usize::from(self.v6);
        let chains = self.base.chains(table, self.v6).into_iter().map(str::to_owned).collect();
        let mut rules: Vec<(String, Rule)> = owned(self.base.first(table, self.v6)).collect();
        for entries in self.held.values() {
            let of_services = match table {
                Table::Nat => &entries.0[index].nat,
                Table::Filter => &entries.0[index].filter,
            };
            rules.extend(owned(of_services.clone()));
        }
        let mut inserts = Vec::new();
        if let Some(saved) = &self.saved {
            let text = &saved[usize::from(table == Table::Nat)];
            let is_missing = |chain: &str, rule: &Rule| !text.lines().any(|line| line == format!("-A {chain} {rule}"));
            inserts.extend(owned(self.base.jumps(table, self.v6)).filter(|(chain, rule)| is_missing(chain, rule)));
        }
        TableRestore { chains, rules, inserts, ..TableRestore::default() }
    }
}

impl<K: Kernel + 'static> Dataplane for Iptables<K> {
    type Base = Base;
    type Entries = Entries;

    fn base(node: &NodeView) -> Base {
        Base::new(node)
    }

    fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
        entries(frontend, node)
    }

    fn check(node: &NodeView) -> Result<(), Error> {
        for v6 in [false, true] {
            let cidrs: Vec<String> = node.pod_cidrs(v6).map(|cidr| cidr.to_string()).collect();
            if cidrs.len() > 1 {
                return Err(Error::PodCidrs(cidrs.join(", ")));
            }
        }
        Ok(())
    }

    fn about(&self) -> String {
        self.kernel.about()
    }

    /// What is there is looked at by the next commit; ids and slots leave no trace in iptables.
    fn read(&mut self) -> Result<Seed, Error> {
        self.base = None;
        self.held.clear();
        self.chains = Default::default();
        Ok(Seed::default())
    }

    fn commit(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        let mut held = if base.is_some() { BTreeMap::new() } else { self.held.clone() };
        let mut changed = BTreeSet::new();
        for Change { id, before: _, after } in changes {
            match after {
                Some(after) => {
                    held.insert(*id, Arc::new(after.clone()));
                    changed.insert(*id);
                }
                None => drop(held.remove(id)),
            }
        }
        let Some(to) = base.or(self.base.as_ref()).cloned() else { return Ok(()) };
        if base.is_some() && to.has_localhost_node_ports() {
            self.kernel.route_localhost()?;
        }
        let mut chains = self.chains.clone();
        for v6 in [false, true].into_iter().filter(|v6| to.families[usize::from(*v6)]) {
            let known = &mut chains[usize::from(v6)];
            let mut saved = None;
            if base.is_some() {
                let (filter, nat) = (self.kernel.save(v6, Table::Filter)?, self.kernel.save(v6, Table::Nat)?);
                let declared = nat.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
                *known = declared.filter(|chain| is_of_a_service(chain)).map(str::to_owned).collect();
                saved = Some([filter, nat]);
            }
            let family = Family { base: &to, v6, held: &held, changed: &changed, chains: known, saved };
            let (restore, active) = family.restore();
            self.kernel.restore(v6, &restore)?;
            *known = active;
            // Even if the other family fails, this one's chains are known.
            self.chains[usize::from(v6)] = known.clone();
        }
        self.held = held;
        self.base = Some(to);
        Ok(())
    }
}
