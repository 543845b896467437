//! Turns changed frontends into changed map entries.
//!
//! Maps know no transactions, so the order makes each moment a valid one: endpoints are there before a frontend counts
//! them, and go after it has stopped. Every step can be repeated, so that a commit that failed half way is made again.
//! What the programs know of the node comes last: before it is there, they leave all that is new to another mode.
//!
//! Only addresses can be claimed by two frontends: one claim is in the kernel, the next follows when it goes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use linux::bpf::{self, Kernel};
use services::{Frontend, FrontendId, Seed};

use super::layout::{Base, Key, Line, List, Map, NODES, TAKERS, Value, flag};
use super::loads;
use super::plan::{Entries, entries};
use crate::dataplane::{Change, Dataplane};
use crate::{Error, NodeView, Pods};

/// Entries per system call: large enough to be cheap, small enough to stay off the allocator's bad side.
const BATCH: usize = 16_384;

type Claims = BTreeMap<FrontendId, Value>;

/// Services in eBPF maps, the kernel's or those of the fake.
pub struct Ebpf<K> {
    kernel: K,
    base: Option<Base>,
    claims: HashMap<Key, Claims>,
    /// What commits that failed may have left, on behalf of whom.
    uncertain: HashMap<FrontendId, BTreeSet<Key>>,
    /// How many of the claims ask for the endpoint with the fewest connections.
    by_load: usize,
    /// When loads were last counted anew, on the clock of `linux::bpf::now`.
    counted_at: Option<Duration>,
}

/// What is to be written, and what is to go.
#[derive(Default)]
struct Difference {
    put: BTreeMap<Key, Value>,
    remove: BTreeSet<Key>,
}

impl<K: Kernel> Ebpf<K> {
    pub fn new(kernel: K) -> Self {
        Ebpf { kernel, base: None, claims: HashMap::new(), uncertain: HashMap::new(), by_load: 0, counted_at: None }
    }

    /// The maps behind it.
    pub fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    pub(super) fn parts(&self) -> (&K, Option<&Base>) {
        (&self.kernel, self.base.as_ref())
    }

    fn held(&mut self) -> Result<HashMap<Key, Value>, Error> {
        let mut held = HashMap::new();
        for map in Map::ALL {
            let layout = map.layout();
            let bpf::Entries { keys, values } = self.kernel.entries(layout.name)?;
            for (key, value) in keys.chunks(layout.key_size).zip(values.chunks(layout.value_size)) {
                // What we cannot read is not ours, and matches no packet.
                if let Some(key) = Key::read(map, key) {
                    held.insert(key, Value::read(map, value));
                }
            }
        }
        Ok(held)
    }

    fn serve(&mut self, base: &Base) -> Result<(), Error> {
        let wanted = base.taker_keys();
        let held = self.kernel.entries(TAKERS.name)?.keys;
        let gone: Vec<u8> = held
            .chunks(TAKERS.key_size)
            .filter(|key| !wanted.chunks(TAKERS.key_size).any(|wanted| wanted == *key))
            .flatten()
            .copied()
            .collect();
        let values = 1_u32.to_ne_bytes().repeat(wanted.len() / TAKERS.key_size);
        self.kernel.put(TAKERS.name, &bpf::Entries { keys: wanted, values })?;
        self.kernel.remove(TAKERS.name, &gone)?;
        let bytes = base.bytes(self.kernel.namespace_cookie()?, self.kernel.mtu()?);
        if self.kernel.entries(NODES.name)?.values != bytes {
            self.kernel.put(NODES.name, &bpf::Entries { keys: 0_u32.to_ne_bytes().to_vec(), values: bytes })?;
        }
        Ok(())
    }

    fn put(&mut self, map: Map, entries: &BTreeMap<Key, Value>) -> Result<(), Error> {
        let entries: Vec<_> = entries.iter().filter(|(key, _)| key.map() == map).collect();
        for batch in entries.chunks(BATCH) {
            let mut bytes = bpf::Entries::default();
            for (key, value) in batch {
                key.write(&mut bytes.keys);
                value.write(&mut bytes.values);
            }
            self.kernel.put(map.layout().name, &bytes)?;
        }
        Ok(())
    }

    fn remove(&mut self, map: Map, keys: &BTreeSet<Key>) -> Result<(), Error> {
        let keys: Vec<_> = keys.iter().filter(|key| key.map() == map).collect();
        for batch in keys.chunks(BATCH) {
            let mut bytes = Vec::new();
            batch.iter().for_each(|key| key.write(&mut bytes));
            self.kernel.remove(map.layout().name, &bytes)?;
        }
        Ok(())
    }

    fn apply(&mut self, difference: &Difference) -> Result<(), Error> {
        for map in [Map::Endpoints, Map::Members, Map::Sources, Map::Maglev, Map::Frontends] {
            self.put(map, &difference.put)?;
        }
        for map in Map::ALL {
            self.remove(map, &difference.remove)?;
        }
        Ok(())
    }

    /// Everything these changes claim or leave, on top of what others claim.
    fn claim(&self, changes: &[Change<Entries>], afresh: bool) -> HashMap<Key, Claims> {
        let mut touched: HashMap<Key, Claims> = HashMap::new();
        let held = |key: &Key| if afresh { Claims::new() } else { self.claims.get(key).cloned().unwrap_or_default() };
        for Change { id, before, after } in changes {
            let left = before
                .iter()
                .flat_map(|before| before.entries.keys())
                .chain(self.uncertain.get(id).into_iter().flatten());
            for key in left.filter(|key| is_shared(key)) {
                touched.entry(*key).or_insert_with(|| held(key)).remove(id);
            }
            for (key, value) in after.iter().flat_map(|after| &after.entries).filter(|(key, _)| is_shared(key)) {
                touched.entry(*key).or_insert_with(|| held(key)).insert(*id, *value);
            }
        }
        touched
    }

    /// What one change asks for besides addresses: entries that no other frontend can have.
    fn own(&self, change: &Change<Entries>, difference: &mut Difference) {
        let nothing = Entries::default();
        let (before, after) = (change.before.as_ref().unwrap_or(&nothing), change.after.as_ref().unwrap_or(&nothing));
        let uncertain = self.uncertain.get(&change.id);
        let is_held = |key: &Key, value: &Value| {
            before.entries.get(key) == Some(value) && uncertain.is_none_or(|uncertain| !uncertain.contains(key))
        };
        for (key, value) in after.entries.iter().filter(|(key, value)| !is_shared(key) && !is_held(key, value)) {
            difference.put.insert(*key, *value);
        }
        let left = before.entries.keys().chain(uncertain.into_iter().flatten());
        difference.remove.extend(left.filter(|key| !is_shared(key) && !after.entries.contains_key(key)));
    }
}

/// Whether two frontends may want the same entry.
fn is_shared(key: &Key) -> bool {
    matches!(key, Key::Frontend { .. })
}

/// How many of them ask for the endpoint with the fewest connections.
fn by_load(claims: &Claims) -> usize {
    let is_one = |value: &&Value| matches!(value, Value::Target(target) if target.flags & flag::LEAST_LOAD != 0);
    claims.values().filter(is_one).count()
}

/// What the programs see of claims: that of the oldest frontend that has an endpoint, or whoever refuses.
fn winner(claims: &Claims) -> Option<&Value> {
    let rank = |value: &Value| match value {
        Value::Target(target) => (target.inside.1 == 0, target.flags & flag::REFUSED == 0),
        Value::Endpoint(_) | Value::Places(_) | Value::Present => (false, false),
    };
    claims.iter().min_by_key(|(id, value)| (rank(value), **id)).map(|(_, value)| value)
}

impl<K: Kernel + 'static> Dataplane for Ebpf<K> {
    type Base = Base;
    type Entries = Entries;

    fn base(node: &NodeView) -> Base {
        Base::new(node)
    }

    fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
        entries(frontend, node)
    }

    fn check(node: &NodeView) -> Result<(), Error> {
        if !matches!(node.pods, Pods::Cidrs(_)) {
            return Err(Error::PodsByInterface);
        }
        if Base::new(node).fits() { Ok(()) } else { Err(Error::Networks) }
    }

    fn about(&self) -> String {
        self.kernel.about()
    }

    fn unsupported(entries: &Entries) -> Option<&'static str> {
        entries.unserved.map(|_| "SCTP is not translated, its addresses are refused; use --proxy-mode=nftables")
    }

    fn read(&mut self) -> Result<Seed, Error> {
        Ok(seed(&self.held()?))
    }

    /// Loads are counted anew, if any frontend asks for them.
    fn tend(&mut self) -> Result<Option<Duration>, Error> {
        if self.by_load == 0 {
            return Ok(None);
        }
        let now = bpf::now();
        let since = self.counted_at.map_or(loads::PAUSE, |then| now.saturating_sub(then));
        if since < loads::PAUSE {
            return Ok(Some(loads::PAUSE - since));
        }
        self.counted_at = Some(now);
        loads::recount(&mut self.kernel, now)?;
        Ok(Some(loads::PAUSE))
    }

    fn commit(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        let touched = self.claim(changes, base.is_some());
        let mut difference = Difference::default();
        if base.is_some() {
            self.kernel.attach()?;
            let mut held = self.held()?;
            let own = changes.iter().flat_map(|change| &change.after).flat_map(|after| &after.entries);
            let own = own.filter(|(key, _)| !is_shared(key));
            let shared = touched.iter().filter_map(|(key, claims)| Some((key, winner(claims)?)));
            for (key, value) in own.chain(shared) {
                if held.remove(key).as_ref() != Some(value) {
                    difference.put.insert(*key, *value);
                }
            }
            difference.remove.extend(held.into_keys());
        } else {
            changes.iter().for_each(|change| self.own(change, &mut difference));
            for (key, claims) in &touched {
                let held = self.claims.get(key).and_then(winner);
                let is_uncertain = changes
                    .iter()
                    .any(|change| self.uncertain.get(&change.id).is_some_and(|uncertain| uncertain.contains(key)));
                match winner(claims) {
                    Some(value) if is_uncertain || held != Some(value) => drop(difference.put.insert(*key, *value)),
                    None => drop(difference.remove.insert(*key)),
                    Some(_) => {}
                }
            }
        }
        // A node port may go from one frontend to another together with its endpoint.
        difference.remove.retain(|key| !difference.put.contains_key(key));
        let done = self.apply(&difference).and_then(|()| base.map_or(Ok(()), |base| self.serve(base)));
        if let Err(error) = done {
            for change in changes {
                let keys =
                    change.before.iter().chain(&change.after).flat_map(|entries| entries.entries.keys().copied());
                self.uncertain.entry(change.id).or_default().extend(keys);
            }
            return Err(error);
        }

        // The kernel has it; now we know it.
        if let Some(base) = base {
            self.claims.clear();
            self.by_load = 0;
            self.uncertain.clear();
            self.base = Some(base.clone());
        }
        for (key, claims) in touched {
            self.by_load += by_load(&claims);
            let before = if claims.is_empty() { self.claims.remove(&key) } else { self.claims.insert(key, claims) };
            self.by_load -= before.as_ref().map_or(0, by_load);
        }
        for change in changes {
            self.uncertain.remove(&change.id);
        }
        Ok(())
    }
}

impl<K: Kernel> Ebpf<K> {
    /// Everything held, a line each.
    pub fn lines(&mut self) -> Result<BTreeSet<String>, Error> {
        Ok(self.held()?.iter().map(|(key, value)| Line(key, value).to_string()).collect())
    }
}

/// Ids by address and endpoints by slot.
fn seed(held: &HashMap<Key, Value>) -> Seed {
    let mut seed = Seed::default();
    // The list of all comes before the local one, which may know more where hints narrowed the first; IPv4 before IPv6.
    let mut slots: BTreeMap<(FrontendId, bool, bool, u32), SocketAddr> = BTreeMap::new();
    for (key, value) in held {
        match (key, value) {
            (Key::Frontend { address, port: Some((protocol, port)) }, Value::Target(target)) => {
                seed.ids.insert((*address, *protocol, *port), target.id);
            }
            (Key::Endpoint { list: List { id, v6, local }, slot }, Value::Endpoint(endpoint)) => {
                slots.insert((*id, *local, *v6, *slot), *endpoint);
            }
            _ => {}
        }
    }
    for ((id, ..), endpoint) in slots {
        let known = seed.slots.entry(id).or_default();
        if !known.contains(&endpoint) {
            known.push(endpoint);
        }
    }
    seed
}
