//! nftables in memory: applies the same transactions under the kernel's rules, can fail one commit in N, and walks a
//! packet through what it holds.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::netlink::errno;
use super::rule::{ADDRESS_LOCAL, Rule, Statement, Value, ct_state, ct_status};
use super::value::{
    Base, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Op, Set, SetData, Transaction, Verdict,
};
use super::{Error, Nft};

#[derive(Clone, Default)]
struct Table {
    comment: Option<String>,
    chains: BTreeMap<Box<str>, (Option<Base>, Vec<Rule>)>,
    sets: BTreeMap<Box<str>, (Set, BTreeMap<Key, Element>)>,
}

/// A kernel that is only a map.
#[derive(Clone, Default)]
pub struct Fake {
    tables: BTreeMap<(Family, Box<str>), Table>,
    commits: u64,
    fail_every: Option<u64>,
    /// Where packets from these networks come in.
    interfaces: Vec<(ipnet::IpNet, Box<str>)>,
    /// Elements and rules changed so far: what a test counts to see that a change stayed small.
    pub changed: u64,
}

impl Fake {
    /// Fails each `n`th commit, so that the caller's retry is exercised.
    pub fn failing(n: u64) -> Self {
        Fake { fail_every: Some(n), ..Fake::default() }
    }

    /// From now on packets from `net` come in through the interface of this name.
    pub fn comes_through(&mut self, net: ipnet::IpNet, interface: &str) {
        self.interfaces.push((net, interface.into()));
    }

    /// Everything held but what packets have filled, in nft-like text: equal texts are equal rulesets.
    pub fn dump(&self) -> String {
        let mut text = String::new();
        for ((family, name), table) in &self.tables {
            text += &format!("table {family} {name}\n");
            for (set, elements) in table.sets.values() {
                text += &format!("  {set}\n");
                for element in elements.values().filter(|_| !set.dynamic) {
                    text += &format!("    {element}\n");
                }
            }
            for (chain, (base, rules)) in &table.chains {
                text += &format!("  {}\n", super::Chain { name: chain.clone(), base: *base, device: None });
                for rule in rules {
                    text += &format!("    {rule}\n");
                }
            }
        }
        text
    }
}

fn refused(transaction: &Transaction, op: &Op, number: i32) -> Error {
    Error::Refused {
        item: op.line(transaction.family, &transaction.table),
        cause: errno(number),
        hint: " (fake)".into(),
    }
}

fn fits(key: &Key, types: &[DataType]) -> bool {
    key.0.len() == types.len() && key.0.iter().zip(types).all(|(datum, expected)| datum.data_type() == *expected)
}

impl Table {
    fn chain_in_use(&self, name: &str) -> bool {
        let rules = self.chains.values().flat_map(|(_, rules)| rules).flat_map(|rule| &rule.statements);
        let by_rule = rules.filter_map(|statement| match statement {
            Statement::Verdict(verdict) => verdict.chain(),
            _ => None,
        });
        let elements = self.sets.values().flat_map(|(_, elements)| elements.values());
        let by_element = elements.filter_map(|element| match &element.data {
            ElementData::Verdict(verdict) => verdict.chain(),
            _ => None,
        });
        by_rule.chain(by_element).any(|used| used == name)
    }

    /// What the kernel would say to one operation.
    fn apply(&mut self, op: &Op) -> Result<(), i32> {
        match op {
            Op::AddTable { .. } | Op::DeleteTable => {}
            Op::AddChain(chain) => {
                let held = self.chains.entry(chain.name.clone()).or_insert((chain.base, Vec::new()));
                if held.0 != chain.base {
                    return Err(libc::EEXIST);
                }
            }
            Op::FlushChain(chain) => self.chains.get_mut(chain).ok_or(libc::ENOENT)?.1.clear(),
            Op::DeleteChain(chain) => {
                if self.chain_in_use(chain) {
                    return Err(libc::EBUSY);
                }
                self.chains.remove(chain).ok_or(libc::ENOENT)?;
            }
            Op::AddSet(set) => {
                let held = self.sets.entry(set.name.clone()).or_insert((set.clone(), BTreeMap::new()));
                if held.0 != *set {
                    return Err(libc::EEXIST);
                }
            }
            Op::DeleteSet(set) => drop(self.sets.remove(set).ok_or(libc::ENOENT)?),
            Op::FlushSet(set) => self.sets.get_mut(set).ok_or(libc::ENOENT)?.1.clear(),
            Op::AddRule { chain, rule } => {
                for statement in &rule.statements {
                    if let Statement::Verdict(verdict) = statement
                        && let Some(target) = verdict.chain()
                        && !self.chains.contains_key(target)
                    {
                        return Err(libc::ENOENT);
                    }
                }
                self.chains.get_mut(chain).ok_or(libc::ENOENT)?.1.push(rule.clone());
            }
            Op::AddElements { set, elements } => {
                for element in elements {
                    self.add_element(set, element)?;
                }
            }
            // Packets meet the fake within any timeout.
            Op::AddFor { set, elements, .. } => {
                for element in elements {
                    self.add_element(set, element)?;
                }
            }
            Op::DeleteElements { set, elements } => {
                let (_, held) = self.sets.get_mut(set).ok_or(libc::ENOENT)?;
                for element in elements {
                    held.remove(&element.key).ok_or(libc::ENOENT)?;
                }
            }
        }
        Ok(())
    }

    fn add_element(&mut self, set: &str, element: &Element) -> Result<(), i32> {
        if let ElementData::Verdict(verdict) = &element.data
            && let Some(chain) = verdict.chain()
            && !self.chains.contains_key(chain)
        {
            return Err(libc::ENOENT);
        }
        let (declared, held) = self.sets.get_mut(set).ok_or(libc::ENOENT)?;
        let data_fits = match (&declared.data, &element.data) {
            (SetData::None, ElementData::None) | (SetData::Verdict, ElementData::Verdict(_)) => true,
            (SetData::Value(types), ElementData::Value(value)) => fits(value, types),
            _ => false,
        };
        if !data_fits || !fits(&element.key, &declared.key) || element.end.is_some() != declared.interval {
            return Err(libc::EINVAL);
        }
        match held.insert(element.key.clone(), element.clone()) {
            None => Ok(()),
            Some(_) => Err(libc::EEXIST),
        }
    }
}

impl Nft for Fake {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        self.commits += 1;
        if self.fail_every.is_some_and(|every| self.commits.is_multiple_of(every)) {
            return Err(Error::Injected);
        }
        let at = (transaction.family, transaction.table.clone());
        let mut table = self.tables.get(&at).cloned();
        let mut changed = 0;
        for op in &transaction.ops {
            match (op, &mut table) {
                (Op::AddTable { comment }, None) => {
                    table = Some(Table { comment: comment.clone(), ..Table::default() });
                }
                (Op::DeleteTable, Some(_)) => table = None,
                (_, None) => return Err(refused(transaction, op, libc::ENOENT)),
                (op, Some(table)) => {
                    table.apply(op).map_err(|number| refused(transaction, op, number))?;
                    changed += match op {
                        Op::AddElements { elements, .. } | Op::DeleteElements { elements, .. } => elements.len() as u64,
                        Op::AddRule { .. } => 1,
                        _ => 0,
                    };
                }
            }
        }
        self.changed += changed;
        match table {
            Some(table) => drop(self.tables.insert(at, table)),
            None => drop(self.tables.remove(&at)),
        }
        Ok(())
    }

    fn table_comment(&mut self, family: Family, table: &str) -> Result<Option<String>, Error> {
        let table = self.tables.get(&(family, table.into()));
        Ok(table.map(|table| table.comment.clone().unwrap_or_default()))
    }

    fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        let table = self.tables.get(&(family, table.into()));
        Ok(table.into_iter().flat_map(|table| table.chains.keys().map(|name| name.to_string())).collect())
    }

    fn sets(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        let table = self.tables.get(&(family, table.into()));
        Ok(table.into_iter().flat_map(|table| table.sets.keys().map(|name| name.to_string())).collect())
    }

    fn elements(&mut self, family: Family, table: &str, set: &Set) -> Result<Vec<Element>, Error> {
        let held = self.tables.get(&(family, table.into())).and_then(|table| table.sets.get(&set.name));
        match held {
            Some((_, elements)) => Ok(elements.values().cloned().collect()),
            None => Err(Error::Refused {
                item: format!("list set {}", set.name),
                cause: errno(libc::ENOENT),
                hint: " (fake)".into(),
            }),
        }
    }
}

/// The first packet of a connection, on its way through one node.
#[derive(Clone, Debug)]
pub struct Packet {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// An IP protocol number.
    pub protocol: u8,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fate {
    Dropped,
    Rejected,
    /// It left for this place (or stayed where it was sent, if nothing translated it).
    Sent {
        to: SocketAddr,
        masqueraded: bool,
    },
}

/// Where another translator sends a packet: `None` if it is none of its packets, `Some(None)` if it refuses.
pub type Divert<'a> =
    &'a mut dyn FnMut(&Packet, &mut dyn FnMut(u32) -> u32, &mut Vec<String>) -> Option<Option<SocketAddr>>;

/// Where IPVS stands among the chains of a hook (net/netfilter/ipvs/ip_vs_core.c).
const IPVS_INPUT: i32 = 99;
const IPVS_OUTPUT: i32 = -98;

struct Walk<'a, 'p> {
    table: &'a mut Table,
    packet: &'p mut Packet,
    original: SocketAddr,
    translated: bool,
    masqueraded: bool,
    locals: &'p [IpAddr],
    /// Where the packet came in; `None` if a process of this node sent it.
    interface: Option<Box<str>>,
    random: &'p mut dyn FnMut(u32) -> u32,
    /// Elements that the rule at hand has found.
    notes: Vec<String>,
    log: &'p mut Vec<String>,
}

enum Step {
    Continue,
    Accept,
    Fate(Fate),
}

impl Fake {
    /// Walks the packet through all tables of a node whose own addresses are `locals`; a packet from one of them starts
    /// at the output hook. `random` answers each draw of a number below its argument.
    pub fn trace(&mut self, packet: Packet, locals: &[IpAddr], random: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.explain(packet, locals, random, &mut Vec::new())
    }

    /// The same, and notes each rule that decided something and the elements it found.
    pub fn explain(
        &mut self,
        packet: Packet,
        locals: &[IpAddr],
        random: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
    ) -> Fate {
        self.explain_with(packet, locals, random, log, &mut |_, _, _| None)
    }

    /// The same beside another translator that looks where IPVS does: last at input, and at output after translation.
    pub fn explain_with(
        &mut self,
        mut packet: Packet,
        locals: &[IpAddr],
        random: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
        divert: Divert<'_>,
    ) -> Fate {
        let from_here = locals.contains(&packet.from.ip());
        let first = if from_here { Hook::Output } else { Hook::Prerouting };
        let original = packet.to;
        let behind = self.interfaces.iter().find(|(net, _)| net.contains(&packet.from.ip()));
        let interface = behind.map(|(_, name)| name.clone()).filter(|_| !from_here);
        let (mut translated, mut masqueraded, mut diverted) = (false, false, false);
        let mut hook = Some(first);
        'hooks: while let Some(now) = hook {
            let looks = match now {
                Hook::Input => Some(IPVS_INPUT),
                Hook::Output => Some(IPVS_OUTPUT),
                _ => None,
            };
            let mut looks = looks.filter(|_| !diverted);
            let mut chains = Vec::new();
            for (at, table) in &self.tables {
                for (name, (base, _)) in &table.chains {
                    if let Some(base) = base.filter(|base| base.hook == now) {
                        chains.push((base.priority, at.clone(), name.clone()));
                    }
                }
            }
            chains.sort();
            // The translator's turn comes between two chains, or after the last.
            for turn in chains.into_iter().map(Some).chain([None]) {
                let priority = turn.as_ref().map_or(i32::MAX, |(priority, ..)| *priority);
                if looks.take_if(|looks| *looks <= priority).is_some() {
                    match divert(&packet, random, log) {
                        None => {}
                        Some(None) => return Fate::Rejected,
                        Some(Some(to)) => {
                            packet.to = to;
                            diverted = true;
                            // It leaves as if this host had sent it.
                            hook = Some(Hook::Output);
                            continue 'hooks;
                        }
                    }
                }
                let Some((_, at, chain)) = turn else { break };
                let table = self.tables.get_mut(&at).expect("listed above");
                let kind = table.chains[&chain].0.expect("a base chain").kind;
                // The kernel asks nat chains only until one of them has translated the connection.
                if kind == ChainKind::Nat && (translated || diverted) && now != Hook::Postrouting {
                    continue;
                }
                let packet = &mut packet;
                let notes = Vec::new();
                let interface = interface.clone();
                let mut walk =
                    Walk { table, packet, original, translated, masqueraded, locals, interface, random, notes, log };
                let step = walk.chain(&chain, 0);
                (translated, masqueraded) = (walk.translated, walk.masqueraded);
                if let Step::Fate(fate) = step {
                    return fate;
                }
            }
            hook = match now {
                Hook::Prerouting if locals.contains(&packet.to.ip()) => Some(Hook::Input),
                Hook::Prerouting => Some(Hook::Forward),
                Hook::Output | Hook::Forward => Some(Hook::Postrouting),
                // Over the loopback, where nat is settled already.
                Hook::Postrouting if from_here && locals.contains(&packet.to.ip()) => Some(Hook::Input),
                Hook::Input | Hook::Postrouting | Hook::Egress => None,
            };
        }
        Fate::Sent { to: packet.to, masqueraded }
    }
}

impl Walk<'_, '_> {
    fn chain(&mut self, name: &str, depth: usize) -> Step {
        let rules = self.table.chains.get(name).map(|(_, rules)| rules.clone()).unwrap_or_default();
        // The kernel refuses loops when they are loaded; here they only must not hang a test.
        if depth > 16 {
            return Step::Fate(Fate::Dropped);
        }
        for rule in &rules {
            self.notes.clear();
            let verdict = self.rule(rule);
            if verdict.is_some() {
                self.log.push(format!("{name}: {rule}"));
                let notes = self.notes.drain(..).map(|note| format!("    {note}"));
                self.log.extend(notes);
            }
            match verdict {
                None => {}
                Some(Verdict::Accept) => return Step::Accept,
                Some(Verdict::Return) => return Step::Continue,
                Some(Verdict::Drop) => return Step::Fate(Fate::Dropped),
                Some(Verdict::Goto(chain)) if &*chain == REJECTED => return Step::Fate(Fate::Rejected),
                Some(Verdict::Goto(chain)) => return self.chain(&chain, depth + 1),
                Some(Verdict::Jump(chain)) => match self.chain(&chain, depth + 1) {
                    Step::Continue => {}
                    other => return other,
                },
            }
        }
        Step::Continue
    }

    /// `None`: the rule did not match to its end, or said nothing final.
    fn rule(&mut self, rule: &Rule) -> Option<Verdict> {
        let mut chosen: Option<Vec<Datum>> = None;
        for statement in &rule.statements {
            let holds = match statement {
                Statement::Equal(value, datum) => self.value(value, &chosen)? == [*datum],
                Statement::NotEqual(value, datum) => self.value(value, &chosen)? != [*datum],
                Statement::InNet(value, net) => self.inside(value, net)?,
                Statement::NotInNet(value, net) => !self.inside(value, net)?,
                Statement::CameThrough { name, is_prefix } => self.interface.as_ref().is_some_and(|interface| {
                    if *is_prefix { interface.starts_with(&**name) } else { interface == name }
                }),
                Statement::HasBits(value, bits) => match self.value(value, &chosen)?[..] {
                    [Datum::Mark(found)] => found & bits != 0,
                    _ => false,
                },
                Statement::LacksBits(value, bits) => match self.value(value, &chosen)?[..] {
                    [Datum::Mark(found)] => found & bits == 0,
                    _ => false,
                },
                Statement::In { key, set } => self.find(key, set, &chosen)?.is_some(),
                Statement::NotIn { key, set } => self.find(key, set, &chosen)?.is_none(),
                Statement::VerdictMap { key, map } => match self.find(key, map, &chosen)??.data {
                    ElementData::Verdict(verdict) => return Some(verdict),
                    _ => false,
                },
                Statement::Choose(value) => {
                    chosen = Some(self.value(value, &chosen)?);
                    true
                }
                Statement::Update { map, key, data, .. } => {
                    let key = self.key(key, &chosen)?;
                    let data = ElementData::Value(self.key(data, &chosen)?);
                    let (set, held) = self.table.sets.get_mut(map)?;
                    let full = set.size.is_some_and(|size| held.len() >= size as usize) && !held.contains_key(&key);
                    if !full {
                        held.entry(key.clone()).or_insert(Element { key, end: None, data });
                    }
                    !full
                }
                Statement::Count { set, key, .. } => {
                    let key = self.key(key, &chosen)?;
                    let (set, held) = self.table.sets.get_mut(set)?;
                    let full = set.size.is_some_and(|size| held.len() >= size as usize) && !held.contains_key(&key);
                    if !full {
                        held.entry(key.clone()).or_insert(Element { key, end: None, data: ElementData::None });
                    }
                    !full
                }
                Statement::Forget { map, key, .. } => {
                    let key = self.key(key, &chosen)?;
                    self.table.sets.get_mut(map)?.1.remove(&key);
                    true
                }
                Statement::Dnat { .. } => {
                    let [address, Datum::Port(port)] = chosen.as_deref()? else { return None };
                    let address = match address {
                        Datum::V4(address) => IpAddr::V4(*address),
                        Datum::V6(address) => IpAddr::V6(*address),
                        _ => return None,
                    };
                    self.packet.to = SocketAddr::new(address, *port);
                    self.translated = true;
                    return Some(Verdict::Accept);
                }
                Statement::Masquerade { .. } => {
                    self.masqueraded = true;
                    return Some(Verdict::Accept);
                }
                Statement::Reject(_) => return Some(Verdict::Goto(REJECTED.into())),
                Statement::Duplicate { to } => self.value(to, &chosen).is_some(),
                Statement::Counter | Statement::Limit { .. } | Statement::Log { .. } => true,
                Statement::Verdict(verdict) => return Some(verdict.clone()),
            };
            if !holds {
                return None;
            }
        }
        None
    }

    fn inside(&mut self, value: &Value, net: &ipnet::IpNet) -> Option<bool> {
        Some(match self.value(value, &None)?[..] {
            [Datum::V4(address)] => net.contains(&IpAddr::V4(address)),
            [Datum::V6(address)] => net.contains(&IpAddr::V6(address)),
            _ => false,
        })
    }

    fn key(&mut self, key: &[Value], chosen: &Option<Vec<Datum>>) -> Option<Key> {
        let mut data = Vec::new();
        for value in key {
            data.extend(self.value(value, chosen)?);
        }
        Some(Key::new(data))
    }

    fn find(&mut self, key: &[Value], set: &str, chosen: &Option<Vec<Datum>>) -> Option<Option<Element>> {
        let key = self.key(key, chosen)?;
        let (declared, held) = self.table.sets.get(set)?;
        if !declared.interval {
            let found = held.get(&key).cloned();
            self.notes.extend(found.iter().map(|element| format!("@{set} {{ {element} }}")));
            return Some(found);
        }
        let within = |element: &&Element| {
            let end = element.end.as_ref().unwrap_or(&element.key);
            let fields = key.0.iter().zip(element.key.0.iter().zip(end.0.iter()));
            fields.into_iter().all(|(datum, (low, high))| low <= datum && datum <= high)
        };
        let found = held.values().find(within).cloned();
        self.notes.extend(found.iter().map(|element| format!("@{set} {{ {element} }}")));
        Some(found)
    }

    fn value(&mut self, value: &Value, chosen: &Option<Vec<Datum>>) -> Option<Vec<Datum>> {
        let family = |address: IpAddr, v6: bool| (address.is_ipv6() == v6).then(|| Datum::from(address));
        let kind = |address: IpAddr, locals: &[IpAddr]| {
            Datum::Mark(if locals.contains(&address) || address.is_loopback() { ADDRESS_LOCAL } else { 1 })
        };
        let one = match value {
            Value::Nfproto => Datum::Proto(if self.packet.to.is_ipv6() { 10 } else { 2 }),
            Value::L4Proto => Datum::Proto(self.packet.protocol),
            // Nobody marks packets here.
            Value::PacketMark => Datum::Mark(0),
            Value::SourceIp { v6 } => family(self.packet.from.ip(), *v6)?,
            Value::DestinationIp { v6 } => family(self.packet.to.ip(), *v6)?,
            Value::SourcePort => Datum::Port(self.packet.from.port()),
            Value::DestinationPort => Datum::Port(self.packet.to.port()),
            Value::OriginalDestinationIp { v6 } => family(self.original.ip(), *v6)?,
            Value::OriginalDestinationPort => Datum::Port(self.original.port()),
            Value::ReplySourceIp { v6 } => family(self.packet.to.ip(), *v6)?,
            Value::ReplySourcePort => Datum::Port(self.packet.to.port()),
            // The packet walked is the first of a connection: a SYN, if it is TCP.
            Value::TcpFlags if self.packet.protocol == 6 => Datum::Mark(2),
            Value::TcpFlags | Value::IcmpType | Value::IcmpCode => return None,
            Value::CtDirection => Datum::Proto(0),
            Value::CtState => Datum::Mark(ct_state::NEW),
            Value::CtStatus => Datum::Mark(if self.translated { ct_status::DNAT } else { 0 }),
            Value::FibSourceType => kind(self.packet.from.ip(), self.locals),
            Value::FibDestinationType => kind(self.packet.to.ip(), self.locals),
            Value::Random { modulus } => Datum::Mark((self.random)(*modulus)),
            Value::Const(datum) => *datum,
            Value::Chosen { .. } => return chosen.clone(),
            Value::Lookup { key, map } => match self.find(key, map, chosen)??.data {
                ElementData::Value(value) => return Some(value.0.to_vec()),
                _ => return None,
            },
        };
        Some(vec![one])
    }
}

/// How a rule that rejects travels through the walk; no chain can have this name.
const REJECTED: &str = " rejected";
