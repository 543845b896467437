//! iptables in memory, and the packet tracer over it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use super::rule::{Part, Restore, Rule, Table, TableRestore, Target};
use super::{Error, Iptables};
use crate::nft::{Fate, Hook, Packet};

type Chains = BTreeMap<String, Vec<Rule>>;

/// Filter and nat tables of one node, for both families.
#[derive(Clone, Default)]
pub struct Fake {
    tables: BTreeMap<(bool, Table), Chains>,
    /// Lists of `-m recent`: client and list.
    recent: HashMap<(IpAddr, String), ()>,
    /// Where packets from these networks come in.
    interfaces: Vec<(ipnet::IpNet, Box<str>)>,
    restores: u64,
    fail_every: Option<u64>,
}

impl Fake {
    /// Fails each `n`th restore.
    pub fn failing(n: u64) -> Self {
        Fake { fail_every: Some(n), ..Fake::default() }
    }

    /// From now on packets from `net` come in through the interface of this name.
    pub fn comes_through(&mut self, net: ipnet::IpNet, interface: &str) {
        self.interfaces.push((net, interface.into()));
    }

    /// What `iptables-save` would print of our chains.
    pub fn dump(&self, v6: bool, table: Table) -> String {
        let mut text = format!("*{table}\n");
        let chains = self.tables.get(&(v6, table));
        for name in chains.into_iter().flat_map(|chains| chains.keys()) {
            text += &format!(":{name} - [0:0]\n");
        }
        for (name, rules) in chains.into_iter().flatten() {
            for rule in rules {
                text += &format!("-A {name} {rule}\n");
            }
        }
        text + "COMMIT\n"
    }

    fn apply(chains: &mut Chains, input: &TableRestore) -> Result<(), Error> {
        for chain in &input.chains {
            chains.insert(chain.clone(), Vec::new());
        }
        // Built-in chains are always there.
        for built_in in ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"] {
            chains.entry(built_in.to_owned()).or_default();
        }
        let refused = |what: String| Error::Fake(what);
        let check = |chains: &Chains, chain: &str, rule: &Rule| match &rule.target {
            Target::Jump(to) if !chains.contains_key(to) => Err(refused(format!("-A {chain} {rule}"))),
            _ => Ok(()),
        };
        for (chain, rule) in &input.removes {
            let rules = chains.get_mut(chain).ok_or_else(|| refused(format!("-D {chain}")))?;
            let at = rules.iter().position(|held| held == rule);
            rules.remove(at.ok_or_else(|| refused(format!("-D {chain} {rule}")))?);
        }
        for (chain, rule) in &input.inserts {
            check(chains, chain, rule)?;
            chains.get_mut(chain).ok_or_else(|| refused(format!("-I {chain}")))?.insert(0, rule.clone());
        }
        for (chain, rule) in &input.rules {
            check(chains, chain, rule)?;
            chains.get_mut(chain).ok_or_else(|| refused(format!("-A {chain}")))?.push(rule.clone());
        }
        for chain in &input.deletes {
            let used = chains.values().flatten().any(|rule| rule.target == Target::Jump(chain.clone()));
            let removed = chains.remove(chain);
            if used || removed.is_none_or(|rules| !rules.is_empty()) {
                return Err(refused(format!("-X {chain}")));
            }
        }
        Ok(())
    }

    /// Walks a packet through the node, like [`crate::nft::Fake::trace`]. `random` answers draws below its argument; a
    /// probability of one in N holds when it answers 0.
    pub fn trace(&mut self, packet: Packet, locals: &[IpAddr], random: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.explain(packet, locals, random, &mut Vec::new())
    }

    /// The same, and notes each rule that matched.
    pub fn explain(
        &mut self,
        packet: Packet,
        locals: &[IpAddr],
        random: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
    ) -> Fate {
        let v6 = packet.to.is_ipv6();
        let mut walk =
            Walk { fake: self, v6, packet, mark: 0, translated: false, masqueraded: false, locals, random, log };
        let from_here = locals.contains(&walk.packet.from.ip());
        let mut hook = Some(if from_here { Hook::Output } else { Hook::Prerouting });
        while let Some(now) = hook {
            // Nat before filter at every hook they share.
            let name = now.to_string().to_uppercase();
            for table in [Table::Nat, Table::Filter] {
                if let Some(fate) = walk.chain(table, &name, 0).and_then(|end| end) {
                    return fate;
                }
            }
            hook = match now {
                Hook::Prerouting if locals.contains(&walk.packet.to.ip()) => Some(Hook::Input),
                Hook::Prerouting => Some(Hook::Forward),
                Hook::Output | Hook::Forward => Some(Hook::Postrouting),
                // Over the loopback, where nat is settled already.
                Hook::Postrouting if from_here && locals.contains(&walk.packet.to.ip()) => Some(Hook::Input),
                Hook::Input | Hook::Postrouting | Hook::Egress => None,
            };
        }
        Fate::Sent { to: walk.packet.to, masqueraded: walk.masqueraded }
    }
}

struct Walk<'a, 'p> {
    fake: &'a mut Fake,
    v6: bool,
    packet: Packet,
    mark: u32,
    translated: bool,
    masqueraded: bool,
    locals: &'p [IpAddr],
    random: &'p mut dyn FnMut(u32) -> u32,
    log: &'p mut Vec<String>,
}

impl Walk<'_, '_> {
    /// `None`: the chain ended without a verdict. `Some(None)`: accepted.
    fn chain(&mut self, table: Table, name: &str, depth: usize) -> Option<Option<Fate>> {
        let rules = self.fake.tables.get(&(self.v6, table)).and_then(|chains| chains.get(name)).cloned();
        if depth > 16 {
            return Some(Some(Fate::Dropped));
        }
        for rule in rules.into_iter().flatten() {
            if !rule.parts.iter().all(|part| self.holds(part)) {
                continue;
            }
            self.log.push(format!("{table} -A {name} {rule}"));
            match rule.target {
                Target::None => {}
                Target::Jump(chain) => {
                    if let Some(end) = self.chain(table, &chain, depth + 1) {
                        return Some(end);
                    }
                }
                Target::Accept => return Some(None),
                Target::Drop => return Some(Some(Fate::Dropped)),
                Target::Reject => return Some(Some(Fate::Rejected)),
                Target::Return => return None,
                Target::MarkOr(bits) => self.mark |= bits,
                Target::MarkXor(bits) => self.mark ^= bits,
                Target::Masquerade { .. } => {
                    self.masqueraded = true;
                    return Some(None);
                }
                Target::Dnat(to) => {
                    self.packet.to = to;
                    self.translated = true;
                    return Some(None);
                }
            }
        }
        None
    }

    fn is_local(&self, address: SocketAddr) -> bool {
        self.locals.contains(&address.ip()) || address.ip().is_loopback()
    }

    fn holds(&mut self, part: &Part) -> bool {
        let (from, to) = (self.packet.from, self.packet.to);
        match part {
            Part::Comment(_) => true,
            Part::Source { net, not } => net.contains(&from.ip()) != *not,
            Part::Destination { net, not } => net.contains(&to.ip()) != *not,
            Part::InInterface { name, is_prefix, not } => {
                let behind = self.fake.interfaces.iter().find(|(net, _)| net.contains(&from.ip()));
                let interface = behind.map(|(_, name)| name).filter(|_| !self.locals.contains(&from.ip()));
                let holds = |held: &str| if *is_prefix { held.starts_with(&**name) } else { *held == **name };
                interface.is_some_and(|held| holds(held)) != *not
            }
            Part::Port { protocol: _, number, destination, port } => {
                self.packet.protocol == *number
                    && to.port() == *port
                    && destination.is_none_or(|net| net.contains(&to.ip()))
            }
            Part::Protocol { protocol: _, number } => self.packet.protocol == *number,
            Part::SourceTypeLocal => self.is_local(from),
            Part::DestinationTypeLocal => self.is_local(to),
            Part::Mark { bits, not } => (self.mark & bits == *bits) != *not,
            Part::CtState { states, not } => {
                let mut states = states.split(',');
                states.any(|state| state == "NEW" || (state == "DNAT" && self.translated)) != *not
            }
            Part::Random { one_in } => (self.random)(*one_in as u32) == 0,
            Part::RecentSet { list } => {
                self.fake.recent.insert((from.ip(), list.clone()), ());
                true
            }
            Part::RecentCheck { list, .. } => self.fake.recent.contains_key(&(from.ip(), list.clone())),
        }
    }
}

impl Iptables for Fake {
    fn save(&mut self, v6: bool, table: Table) -> Result<String, Error> {
        Ok(self.dump(v6, table))
    }

    fn restore(&mut self, v6: bool, input: &Restore) -> Result<(), Error> {
        self.restores += 1;
        if self.fail_every.is_some_and(|every| self.restores.is_multiple_of(every)) {
            return Err(Error::Fake("this restore, on purpose".to_owned()));
        }
        // Each table is whole, but the first stays if the second fails: as with the tools.
        for (table, input) in [(Table::Filter, &input.filter), (Table::Nat, &input.nat)] {
            let chains = self.tables.entry((v6, table)).or_default();
            let mut after = chains.clone();
            Self::apply(&mut after, input)?;
            *chains = after;
        }
        Ok(())
    }

    fn route_localhost(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn about(&self) -> String {
        "a fake holds the rules".to_owned()
    }
}
