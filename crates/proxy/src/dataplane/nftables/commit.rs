//! Turns changed frontends into one transaction.
//!
//! Frontends can share elements (a cluster IP has several ports, a pod several Services), and may claim the same address
//! although they should not. So each such element has claims: that of the oldest frontend is in the kernel, the next
//! follows when it goes. Elements under a frontend's own list number are nobody else's: there is nothing to remember of
//! them but what the frontend was rendered to, and they are the many.
//!
//! A chain that no element leads to any more stays until the next whole plan: to take a chain away makes the kernel wait
//! for all its processors (5 ms measured), and the next change may well need it again.

use std::collections::{BTreeMap, HashMap, HashSet};

use linux::nft::{Chain, Datum, Element, ElementData, Key, Nft, Op, Transaction, Verdict};
use services::{Frontend, FrontendId, Protocol, Seed};

use super::class::Class;
use super::layout::{Base, FAMILY, Map, TABLE};
use super::plan::{Entries, Slot, entries};
use crate::dataplane::{Change, Dataplane, OwnTable};
use crate::{Error, NodeView, Pods};

/// So many chains may wait for a use.
const IDLE_CLASSES: usize = 64;

/// Who wants an element, and how. No owner: it was found in the kernel.
type Claim = (Option<FrontendId>, ElementData);

/// In the order of frontends. Nearly always there is one, which needs no memory of its own.
#[derive(Clone, Debug, Default)]
struct Claims {
    first: Option<Claim>,
    rest: Vec<Claim>,
}

impl Claims {
    fn found(data: ElementData) -> Self {
        Claims { first: Some((None, data)), rest: Vec::new() }
    }

    fn iter(&self) -> impl Iterator<Item = &Claim> {
        self.first.iter().chain(&self.rest)
    }

    /// What is in the kernel.
    fn held(&self) -> Option<&ElementData> {
        self.first.as_ref().map(|(_, data)| data)
    }

    fn retain(&mut self, keep: impl Fn(&Claim) -> bool) {
        self.rest.retain(&keep);
        if self.first.as_ref().is_some_and(|first| !keep(first)) {
            self.first = (!self.rest.is_empty()).then(|| self.rest.remove(0));
        }
    }

    fn put(&mut self, owner: FrontendId, data: &ElementData) {
        if let Some(claim) = self.first.iter_mut().chain(&mut self.rest).find(|(held, _)| *held == Some(owner)) {
            claim.1 = data.clone();
            return;
        }
        // What was found in the kernel makes way for whoever wants it.
        self.retain(|(held, _)| held.is_some());
        let claim = (Some(owner), data.clone());
        match &mut self.first {
            None => self.first = Some(claim),
            Some(first) if first.0 > Some(owner) => self.rest.insert(0, std::mem::replace(first, claim)),
            Some(_) => {
                let at = self.rest.partition_point(|(held, _)| *held < Some(owner));
                self.rest.insert(at, claim);
            }
        }
    }
}

/// Services in nftables, through the kernel or the fake of it.
pub struct Nftables<N> {
    nft: N,
    base: Option<Base>,
    /// The layout mark found in the kernel by `read`.
    found_mark: Option<String>,
    /// Of elements that several may want.
    claims: HashMap<Slot, Claims>,
    /// All other elements that `read` found, until the next whole plan.
    found: HashMap<Slot, ElementData>,
    /// Nothing was committed since `read`.
    is_read: bool,
    /// Somebody has changed rules: the layout is not what its mark says.
    is_distrusted: bool,
    /// The chains that pick, and how many elements and chains send packets there: none, for those that are idle.
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
            found: HashMap::new(),
            is_read: false,
            is_distrusted: false,
            classes: BTreeMap::new(),
            numbers: HashMap::new(),
        }
    }

    /// Takes the chains away that nothing leads to, which otherwise wait for the next whole plan.
    pub fn prune(&mut self) -> Result<(), Error> {
        let mut transaction = Transaction::new(FAMILY, TABLE);
        for class in self.classes.iter().filter(|(_, uses)| **uses == 0).map(|(class, _)| class).rev() {
            remove_class(class, &mut transaction);
        }
        if !transaction.ops.is_empty() {
            self.nft.commit(&transaction)?;
        }
        self.classes.retain(|_, uses| *uses > 0);
        self.numbers.retain(|_, class| self.classes.contains_key(class));
        Ok(())
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

fn remove_class(class: &Class, transaction: &mut Transaction) {
    let set = Map::Classes.name(class.v6()).into();
    transaction.push(Op::DeleteElements { set, elements: vec![class_element(class)] });
    transaction.push(Op::FlushChain(class.name().into()));
    transaction.push(Op::DeleteChain(class.name().into()));
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
        self.claims(slot).put(owner, data);
    }
}

/// Elements by map and family, as a transaction wants them.
#[derive(Default)]
struct Batch(BTreeMap<Map, [Vec<Element>; 2]>);

impl Batch {
    fn push(&mut self, slot: &Slot, data: &ElementData) {
        let element = Element { key: slot.key.clone(), end: slot.end.clone(), data: data.clone() };
        self.0.entry(slot.map).or_default()[usize::from(slot.v6)].push(element);
    }

    fn into_ops(self, op: fn(Box<str>, Vec<Element>) -> Op) -> impl Iterator<Item = Op> {
        self.0.into_iter().flat_map(move |(map, families)| {
            let named = [false, true].into_iter().zip(families).filter(|(_, elements)| !elements.is_empty());
            named.map(move |(v6, elements)| op(map.name(v6).into(), elements))
        })
    }
}

/// What changes of the elements that are nobody else's.
fn own_elements(
    changes: &[Change<Entries>],
    found: &HashMap<Slot, ElementData>,
    whole: bool,
    removed: &mut Batch,
    added: &mut Batch,
) {
    let is_own = |slot: &&Slot| slot.map.is_own();
    let mut kept: HashSet<&Slot> = HashSet::new();
    for Change { before, after, .. } in changes {
        let was = |slot: &Slot| match before {
            Some(before) => before.elements.get(slot),
            None => found.get(slot),
        };
        for (slot, data) in after.iter().flat_map(|after| &after.elements).filter(|(slot, _)| slot.map.is_own()) {
            let was = was(slot);
            if was != Some(data) {
                if let Some(was) = was {
                    removed.push(slot, was);
                }
                added.push(slot, data);
            }
            if whole {
                kept.insert(slot);
            }
        }
        for slot in before.iter().flat_map(|before| before.elements.keys()).filter(is_own) {
            if !after.as_ref().is_some_and(|after| after.elements.contains_key(slot)) {
                removed.push(slot, &before.as_ref().expect("it was just looked through").elements[slot]);
            }
        }
    }
    if whole {
        for (slot, data) in found.iter().filter(|(slot, _)| !kept.contains(slot)) {
            removed.push(slot, data);
        }
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

    fn check(_node: &NodeView) -> Result<(), Error> {
        Ok(())
    }

    fn about(&self) -> String {
        format!("nftables, `nft list table {FAMILY} {TABLE}`")
    }

    fn own_table(&self) -> Option<OwnTable> {
        self.nft.port().map(|port| OwnTable { family: FAMILY, name: TABLE, port })
    }

    fn distrust(&mut self) {
        self.is_distrusted = true;
    }

    fn read(&mut self) -> Result<Seed, Error> {
        self.base = None;
        self.found_mark = None;
        self.claims.clear();
        self.found.clear();
        self.classes.clear();
        self.numbers.clear();
        self.is_read = true;
        if self.nft.table_comment(FAMILY, TABLE)?.is_none() {
            return Ok(Seed::default());
        }
        let chains = self.nft.chains(FAMILY, TABLE)?;
        self.numbers =
            chains.iter().filter_map(|chain| Class::parse(chain)).map(|class| (class.number(), class)).collect();
        self.classes = self.numbers.values().map(|class| (*class, 0)).collect();
        let mark = chains.into_iter().find(|chain| chain.starts_with(Base::MARK));
        // Sets of another layout would be misread.
        let ours = Base::new(&NodeView::default()).mark_of_sets();
        self.found_mark = mark.filter(|mark| mark.starts_with(&ours) && !self.is_distrusted);
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
                    if map.is_own() {
                        self.found.insert(slot, data);
                    } else {
                        self.claims.insert(slot, Claims::found(data));
                    }
                }
            }
        }
        Ok(seed(&self.claims, &self.found))
    }

    fn commit(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        // A whole plan takes away what it does not mention, and of most elements nobody remembers that they are there.
        if base.is_some() && !self.is_read {
            self.read()?;
        }
        for class in changes.iter().flat_map(|change| &change.after).flat_map(|after| &after.classes) {
            let known = *self.numbers.entry(class.number()).or_insert(*class);
            if known != *class {
                return Err(Error::ClassNumbers(known.name(), class.name()));
            }
        }
        let mut transaction = Transaction::new(FAMILY, TABLE);
        let mut claims_forgotten = false;
        if let Some(base) = base {
            claims_forgotten = self.lay(base, self.found_mark.as_deref(), &mut transaction);
        }
        let (no_claims, nothing) = (HashMap::new(), HashMap::new());
        let (held, found) = if claims_forgotten { (&no_claims, &nothing) } else { (&self.claims, &self.found) };
        let (mut removed, mut added) = (Batch::default(), Batch::default());
        own_elements(changes, found, base.is_some(), &mut removed, &mut added);
        let mut touched = Touched { held, after: BTreeMap::new() };
        for Change { id, before, after } in changes {
            let empty = Entries::default();
            let after = after.as_ref().unwrap_or(&empty);
            for slot in before
                .iter()
                .flat_map(|before| before.elements.keys())
                .filter(|slot| !slot.map.is_own() && !after.elements.contains_key(slot))
            {
                touched.remove(slot, *id);
            }
            for (slot, data) in after.elements.iter().filter(|(slot, _)| !slot.map.is_own()) {
                touched.put(slot, *id, data);
            }
        }
        if base.is_some() {
            let changed: HashSet<FrontendId> = changes.iter().map(|change| change.id).collect();
            let stale = |owner: &Option<FrontendId>| owner.is_none_or(|owner| !changed.contains(&owner));
            for (slot, claims) in held {
                if claims.iter().any(|(owner, _)| stale(owner)) {
                    touched.claims(slot).retain(|(owner, _)| !stale(owner));
                }
            }
        }
        let after = touched.after;
        let mut classes = if claims_forgotten { BTreeMap::new() } else { self.classes.clone() };
        let before_classes = classes.clone();
        let mut released = Vec::new();
        for (slot, claims) in &after {
            let was = held.get(slot).and_then(Claims::held);
            let will_be = claims.held();
            if was == will_be {
                continue;
            }
            if let Some(data) = was {
                released.extend(class_of(slot, data, &self.numbers));
                removed.push(slot, data);
            }
            if let Some(data) = will_be {
                if let Some(class) = class_of(slot, data, &self.numbers) {
                    take(&mut classes, class);
                }
                added.push(slot, data);
            }
        }
        for class in released {
            release(&mut classes, class);
        }
        if base.is_some() || classes.values().filter(|uses| **uses == 0).count() > IDLE_CLASSES {
            classes.retain(|_, uses| *uses > 0);
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
        transaction.ops.extend(removed.into_ops(|set, elements| Op::DeleteElements { set, elements }));
        transaction.ops.extend(added.into_ops(|set, elements| Op::AddElements { set, elements }));
        for class in before_classes.keys().rev().filter(|class| !classes.contains_key(class)) {
            remove_class(class, &mut transaction);
        }
        self.is_read = false;
        self.is_distrusted &= base.is_none();
        self.nft.commit(&transaction)?;

        // The kernel has it; now we know it.
        self.found = HashMap::new();
        if claims_forgotten {
            self.claims.clear();
        }
        for (slot, claims) in after {
            if claims.first.is_none() {
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
                base.frame.refill(transaction);
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
                transaction.replace_table("Services, by fairlead: changes here are lost");
                base.frame.declare(transaction);
                base.frame.fill(transaction);
                transaction.push(Op::AddChain(Chain::regular(&mark)));
                true
            }
        }
    }
}

/// Takes the table out, when another mode has taken over; whether it was there.
pub fn remove(nft: &mut impl Nft) -> Result<bool, Error> {
    Ok(nft.remove_table(FAMILY, TABLE)?)
}

/// Ids by address and endpoints by slot.
fn seed(claims: &HashMap<Slot, Claims>, found: &HashMap<Slot, ElementData>) -> Seed {
    let mut seed = Seed::default();
    let mut slots: BTreeMap<(u32, bool, u32), std::net::SocketAddr> = BTreeMap::new();
    let claimed = claims.iter().filter_map(|(slot, claims)| Some((slot, claims.held()?)));
    for (slot, data) in claimed.chain(found) {
        let ElementData::Value(value) = data else { continue };
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
