//! Turns changed frontends into one transaction.
//!
//! Frontends can share elements (a cluster IP has several ports, a pod several Services), and may claim the same address
//! although they should not. So each element has claims: that of the oldest frontend is in the kernel, the next follows
//! when it goes.

use std::collections::{BTreeMap, HashMap};

use linux::nft::{Chain, Datum, Element, ElementData, Key, Nft, Op, Transaction, Verdict};
use services::{Frontend, FrontendId, Protocol, Seed};

use super::class::Class;
use super::layout::{Base, FAMILY, Map, TABLE};
use super::plan::{Entries, Slot, entries};
use crate::dataplane::{Change, Dataplane};
use crate::{Error, NodeView, Pods};

/// Who wants an element, and how. No owner: it was found in the kernel.
type Claim = (Option<FrontendId>, ElementData);
type Claims = Vec<Claim>;

/// Services in nftables, through the kernel or the fake of it.
pub struct Nftables<N> {
    nft: N,
    base: Option<Base>,
    /// The layout mark found in the kernel by `read`.
    found_mark: Option<String>,
    claims: HashMap<Slot, Claims>,
    /// The chains that pick, and how many elements and chains send packets there.
    classes: BTreeMap<Class, usize>,
    /// Classes by number, those in use at least.
    numbers: HashMap<u32, Class>,
}

impl<N: Nft> Nftables<N> {
    pub fn new(nft: N) -> Self {
        Nftables {
            nft,
            base: None,
            found_mark: None,
            claims: HashMap::new(),
            classes: BTreeMap::new(),
            numbers: HashMap::new(),
        }
    }

    /// The kernel behind it.
    pub fn nft(&mut self) -> &mut N {
        &mut self.nft
    }
}

/// The class that an element of `frontends` names.
fn class_of(slot: &Slot, data: &ElementData, numbers: &HashMap<u32, Class>) -> Option<Class> {
    match (slot.map, data) {
        (Map::Frontends, ElementData::Value(value)) => match value.0[..] {
            [Datum::Mark(number)] => numbers.get(&number).copied(),
            _ => None,
        },
        _ => None,
    }
}

/// The element that leads to a class's chain.
fn class_element(class: &Class) -> Element {
    let verdict = Verdict::Goto(class.name().into());
    let key = Key::new([Datum::Mark(0), Datum::Mark(class.number())]);
    Element { key, end: None, data: ElementData::Verdict(verdict) }
}

/// Counts a use of a class, and of those it needs the first time.
fn take(classes: &mut BTreeMap<Class, usize>, class: Class) {
    let count = classes.entry(class).or_default();
    *count += 1;
    if *count == 1 {
        for needed in class.needs() {
            take(classes, needed);
        }
    }
}

fn release(classes: &mut BTreeMap<Class, usize>, class: Class) {
    let Some(count) = classes.get_mut(&class) else { return };
    *count -= 1;
    if *count == 0 {
        classes.remove(&class);
        for needed in class.needs() {
            release(classes, needed);
        }
    }
}

/// The claims of the elements that a commit touches, as they will be.
struct Touched<'a> {
    held: &'a HashMap<Slot, Claims>,
    after: BTreeMap<Slot, Claims>,
}

impl Touched<'_> {
    fn claims(&mut self, slot: &Slot) -> &mut Claims {
        let held = self.held;
        self.after.entry(slot.clone()).or_insert_with(|| held.get(slot).cloned().unwrap_or_default())
    }

    fn remove(&mut self, slot: &Slot, owner: FrontendId) {
        self.claims(slot).retain(|(held, _)| *held != Some(owner));
    }

    fn put(&mut self, slot: &Slot, owner: FrontendId, data: &ElementData) {
        let claims = self.claims(slot);
        if let Some(claim) = claims.iter_mut().find(|(held, _)| *held == Some(owner)) {
            claim.1 = data.clone();
            return;
        }
        // What was found in the kernel makes way for whoever wants it.
        claims.retain(|(held, _)| held.is_some());
        let at = claims.partition_point(|(held, _)| *held < Some(owner));
        claims.insert(at, (Some(owner), data.clone()));
    }
}

impl<N: Nft + 'static> Dataplane for Nftables<N> {
    type Base = Base;
    type Entries = Entries;

    fn base(node: &NodeView) -> Base {
        Base::new(node)
    }

    fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
        entries(frontend, node)
    }

    fn about(&self) -> String {
        format!("nftables, `nft list table {FAMILY} {TABLE}`")
    }

    fn read(&mut self) -> Result<Seed, Error> {
        self.base = None;
        self.found_mark = None;
        self.claims.clear();
        self.classes.clear();
        self.numbers.clear();
        if self.nft.table_comment(FAMILY, TABLE)?.is_none() {
            return Ok(Seed::default());
        }
        let chains = self.nft.chains(FAMILY, TABLE)?;
        self.numbers =
            chains.iter().filter_map(|chain| Class::parse(chain)).map(|class| (class.number(), class)).collect();
        let mark = chains.into_iter().find(|chain| chain.starts_with(Base::MARK));
        // Sets of another layout would be misread.
        let ours = Base::new(&NodeView::default()).mark_of_sets();
        self.found_mark = mark.filter(|mark| mark.starts_with(&ours));
        if self.found_mark.is_none() {
            return Ok(Seed::default());
        }
        for v6 in [false, true] {
            // Affinity belongs to packets, classes follow from frontends.
            for map in Map::ALL.into_iter().filter(|map| ![Map::Affinity, Map::Classes].contains(map)) {
                for Element { key, end, data } in self.nft.elements(FAMILY, TABLE, &map.set(v6))? {
                    let slot = Slot { map, v6, key, end };
                    if let Some(class) = class_of(&slot, &data, &self.numbers) {
                        take(&mut self.classes, class);
                    }
                    self.claims.insert(slot, vec![(None, data)]);
                }
            }
        }
        Ok(seed(&self.claims))
    }

    fn commit(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        for class in changes.iter().flat_map(|change| &change.after).flat_map(|after| &after.classes) {
            let known = *self.numbers.entry(class.number()).or_insert(*class);
            if known != *class {
                return Err(Error::ClassNumbers(known.name(), class.name()));
            }
        }
        let mut transaction = Transaction::new(FAMILY, TABLE);
        let mut claims_forgotten = false;
        if let Some(base) = base {
            let held = self.base.as_ref().map(Base::mark).or(self.found_mark.clone());
            claims_forgotten = self.lay(base, held.as_deref(), &mut transaction);
        }
        let nothing = HashMap::new();
        let held = if claims_forgotten { &nothing } else { &self.claims };
        let mut touched = Touched { held, after: BTreeMap::new() };
        for Change { id, before, after } in changes {
            let empty = Entries::default();
            let after = after.as_ref().unwrap_or(&empty);
            for slot in before
                .iter()
                .flat_map(|before| before.elements.keys())
                .filter(|slot| !after.elements.contains_key(slot))
            {
                touched.remove(slot, *id);
            }
            for (slot, data) in &after.elements {
                touched.put(slot, *id, data);
            }
        }
        if base.is_some() {
            let changed: std::collections::HashSet<FrontendId> = changes.iter().map(|change| change.id).collect();
            let stale = |owner: &Option<FrontendId>| owner.is_none_or(|owner| !changed.contains(&owner));
            for (slot, claims) in held {
                if claims.iter().any(|(owner, _)| stale(owner)) {
                    touched.claims(slot).retain(|(owner, _)| !stale(owner));
                }
            }
        }
        let after = touched.after;
        let mut removed: BTreeMap<Map, [Vec<Element>; 2]> = BTreeMap::new();
        let mut added: BTreeMap<Map, [Vec<Element>; 2]> = BTreeMap::new();
        let mut classes = if claims_forgotten { BTreeMap::new() } else { self.classes.clone() };
        let before_classes = classes.clone();
        let mut released = Vec::new();
        for (slot, claims) in &after {
            let was = held.get(slot).and_then(|claims| claims.first()).map(|(_, data)| data);
            let will_be = claims.first().map(|(_, data)| data);
            if was == will_be {
                continue;
            }
            let element =
                |data: &ElementData| Element { key: slot.key.clone(), end: slot.end.clone(), data: data.clone() };
            if let Some(data) = was {
                released.extend(class_of(slot, data, &self.numbers));
                removed.entry(slot.map).or_default()[usize::from(slot.v6)].push(element(data));
            }
            if let Some(data) = will_be {
                if let Some(class) = class_of(slot, data, &self.numbers) {
                    take(&mut classes, class);
                }
                added.entry(slot.map).or_default()[usize::from(slot.v6)].push(element(data));
            }
        }
        for class in released {
            release(&mut classes, class);
        }
        let nobody = Pods::default();
        let pods = base.or(self.base.as_ref()).map_or(&nobody, |base| &base.pods);
        // `BTreeMap` order puts picks before what needs them.
        let new: Vec<&Class> = classes.keys().filter(|class| !before_classes.contains_key(class)).collect();
        for class in &new {
            transaction.push(Op::AddChain(Chain::regular(&class.name())));
            for rule in class.rules(pods) {
                transaction.push(Op::AddRule { chain: class.name().into(), rule });
            }
            let set = Map::Classes.name(class.v6()).into();
            transaction.push(Op::AddElements { set, elements: vec![class_element(class)] });
        }
        for (map, families) in removed {
            for (v6, elements) in [false, true].into_iter().zip(families) {
                if !elements.is_empty() {
                    transaction.push(Op::DeleteElements { set: map.name(v6).into(), elements });
                }
            }
        }
        for (map, families) in added {
            for (v6, elements) in [false, true].into_iter().zip(families) {
                if !elements.is_empty() {
                    transaction.push(Op::AddElements { set: map.name(v6).into(), elements });
                }
            }
        }
        for class in before_classes.keys().rev().filter(|class| !classes.contains_key(class)) {
            let set = Map::Classes.name(class.v6()).into();
            transaction.push(Op::DeleteElements { set, elements: vec![class_element(class)] });
            transaction.push(Op::FlushChain(class.name().into()));
            transaction.push(Op::DeleteChain(class.name().into()));
        }
        self.nft.commit(&transaction)?;

        // The kernel has it; now we know it.
        if claims_forgotten {
            self.claims.clear();
        }
        for (slot, claims) in after {
            if claims.is_empty() {
                self.claims.remove(&slot);
            } else {
                self.claims.insert(slot, claims);
            }
        }
        self.classes = classes;
        self.numbers.retain(|_, class| self.classes.contains_key(class));
        if let Some(base) = base {
            self.base = Some(base.clone());
        }
        Ok(())
    }
}

impl<N: Nft> Nftables<N> {
    /// Makes the kernel's layout this base's; whether its elements go with the old one.
    fn lay(&self, base: &Base, held: Option<&str>, transaction: &mut Transaction) -> bool {
        let mark = base.mark();
        match held {
            Some(held) if held == mark => false,
            // The same sets: only rules are replaced, in place, so that translated connections live on.
            Some(held) if held.starts_with(&base.mark_of_sets()) => {
                for (chain, _) in &base.chains {
                    transaction.push(Op::FlushChain(chain.name.clone()));
                }
                base.fill(transaction);
                for class in self.classes.keys() {
                    transaction.push(Op::FlushChain(class.name().into()));
                    for rule in class.rules(&base.pods) {
                        transaction.push(Op::AddRule { chain: class.name().into(), rule });
                    }
                }
                transaction.push(Op::DeleteChain(held.into()));
                transaction.push(Op::AddChain(Chain::regular(&mark)));
                false
            }
            _ => {
                let table = || Op::AddTable { comment: Some("Services, by fairlead: changes here are lost".into()) };
                transaction.push(table());
                transaction.push(Op::DeleteTable);
                transaction.push(table());
                base.declare(transaction);
                base.fill(transaction);
                transaction.push(Op::AddChain(Chain::regular(&mark)));
                true
            }
        }
    }
}

/// Takes the table out, when another mode has taken over; whether it was there.
pub fn remove(nft: &mut impl Nft) -> Result<bool, Error> {
    if nft.table_comment(FAMILY, TABLE)?.is_none() {
        return Ok(false);
    }
    nft.commit(&Transaction { family: FAMILY, table: TABLE.into(), ops: vec![Op::DeleteTable] })?;
    Ok(true)
}

/// Ids by address and endpoints by slot.
fn seed(claims: &HashMap<Slot, Claims>) -> Seed {
    let mut seed = Seed::default();
    let mut slots: BTreeMap<(u32, bool, u32), std::net::SocketAddr> = BTreeMap::new();
    for (slot, claims) in claims {
        let Some((_, ElementData::Value(value))) = claims.first() else { continue };
        match (slot.map, &slot.key.0[..], &value.0[..]) {
            (Map::Ids, [address, Datum::Proto(protocol), Datum::Port(port)], [Datum::Mark(list)]) => {
                if let (Some(address), Some(protocol)) = (address_of(address), Protocol::from_number(*protocol)) {
                    seed.ids.insert((address, protocol, *port), FrontendId(list >> 1));
                }
            }
            (Map::Slots, [_, Datum::Mark(list), Datum::Mark(number)], [address, Datum::Port(port)]) => {
                if let Some(address) = address_of(address) {
                    slots.insert((*list, slot.v6, *number), (address, *port).into());
                }
            }
            _ => {}
        }
    }
    // The list of all comes before the local one, which may know more where hints narrowed the first.
    for ((list, _, _), endpoint) in slots {
        let known = seed.slots.entry(FrontendId(list >> 1)).or_default();
        if !known.contains(&endpoint) {
            known.push(endpoint);
        }
    }
    seed
}

fn address_of(datum: &Datum) -> Option<std::net::IpAddr> {
    match datum {
        Datum::V4(address) => Some((*address).into()),
        Datum::V6(address) => Some((*address).into()),
        _ => None,
    }
}
