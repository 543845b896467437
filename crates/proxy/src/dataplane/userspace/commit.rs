//! Turns changed frontends into relays, one kernel transaction and new pickers, in this order: a packet is never sent to a
//! relay that does not listen.
//!
//! Frontends may claim the same address although they should not: the oldest has it, the next follows when it goes.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use linux::nft::{self, Datum, Element, ElementData, Fate, Key, Nft, Op, Packet, Transaction};
use services::{Frontend, FrontendId, Protocol, Seed};

use super::layout::{Base, FAMILY, Map, TABLE};
use super::picker::Picker;
use super::plan::{Entries, Reach, Slot, entries};
use super::relay::{Door, Inside, Open, Relays};
use crate::dataplane::frame::at;
use crate::dataplane::{Answerers, Change, Dataplane, Kept, OwnTable};
use crate::{Error, NodeView};

/// Names a relay. The port of `bind` is 0 where any will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RelayKey {
    id: FrontendId,
    v6: bool,
    reach: Reach,
    bind: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Claim {
    Member,
    /// The address leads to this relay.
    Relay(RelayKey),
}

/// Who wants an element, the oldest first.
type Claims = BTreeMap<Slot, BTreeMap<FrontendId, Claim>>;

/// Services through relays of this process.
pub struct Userspace<N, R> {
    /// `None` without privileges: then node ports answer on the loopback addresses, and nothing else does.
    kernel: Option<N>,
    relays: R,
    /// The comment of the table that the kernel has.
    layout: Option<String>,
    /// Somebody has changed rules: the layout is not what its comment says.
    is_distrusted: bool,
    /// What the kernel holds.
    held: BTreeMap<Slot, ElementData>,
    claims: Claims,
    pickers: HashMap<FrontendId, Arc<Picker>>,
    open: BTreeMap<RelayKey, Open>,
    inside: Arc<Inside>,
}

impl<N: Nft, R: Relays> Userspace<N, R> {
    pub fn new(kernel: Option<N>, relays: R) -> Self {
        Userspace {
            kernel,
            relays,
            layout: None,
            is_distrusted: false,
            held: BTreeMap::new(),
            claims: Claims::new(),
            pickers: HashMap::new(),
            open: BTreeMap::new(),
            inside: Arc::default(),
        }
    }

    /// The kernel behind it; `None` without privileges.
    pub fn kernel(&mut self) -> Option<&mut N> {
        self.kernel.as_mut()
    }

    /// What the kernel and the relays hold, with relays named by what they are for instead of by their port: equal
    /// texts do the same.
    pub fn dump(&self) -> String {
        let names: BTreeMap<SocketAddr, &RelayKey> = self.open.iter().map(|(key, open)| (open.address, key)).collect();
        let relay = |key: &RelayKey| format!("relay {} {} on {}", key.id.0, key.reach, key.bind);
        let mut text = String::new();
        for (slot, data) in self.held.iter().filter(|(slot, _)| slot.map != Map::Relays) {
            let named = match data {
                ElementData::Value(value) => {
                    socket(value).and_then(|address| names.get(&address)).map(|key| relay(key))
                }
                _ => None,
            };
            let element = Element { key: slot.key.clone(), end: slot.end.clone(), data: ElementData::None };
            text += &format!("{} {{ {element} }} {}\n", slot.map.name(slot.v6), named.unwrap_or_default());
        }
        for key in self.open.keys() {
            text += &format!("{}: {:?}\n", relay(key), self.pickers.get(&key.id).map(|picker| picker.targets()));
        }
        text
    }

    /// What the kernel holds of a table with this layout.
    fn elements(&mut self) -> Result<BTreeMap<Slot, ElementData>, Error> {
        let mut held = BTreeMap::new();
        let Some(kernel) = &mut self.kernel else { return Ok(held) };
        for v6 in [false, true] {
            for map in Map::ALL {
                for Element { key, end, data } in kernel.elements(FAMILY, TABLE, &map.set(v6))? {
                    held.insert(Slot { map, v6, key, end }, data);
                }
            }
        }
        Ok(held)
    }

    /// The relays that a frontend needs.
    fn keys(&self, id: FrontendId, entries: &Entries) -> BTreeMap<SocketAddr, RelayKey> {
        let captures = self.kernel.is_some();
        let key = |(address, reach): (&SocketAddr, &Reach)| {
            let v6 = address.is_ipv6();
            let bind = match entries.relay_addresses[usize::from(v6)] {
                Some(relay) if captures => SocketAddr::new(relay, 0),
                _ if !captures && address.ip().is_loopback() => *address,
                _ => return None,
            };
            Some((*address, RelayKey { id, v6, reach: *reach, bind }))
        };
        entries.captured.iter().filter_map(key).collect()
    }

    fn claims_of(&self, id: FrontendId, entries: &Entries) -> Vec<(Slot, Claim)> {
        // Claims are about the kernel's elements.
        if self.kernel.is_none() {
            return Vec::new();
        }
        let members = entries.members.iter().map(|slot| (slot.clone(), Claim::Member));
        let protocol = entries.name.protocol;
        let captured = self
            .keys(id, entries)
            .into_iter()
            .map(|(address, key)| (Slot::destination(Map::Redirect, address, protocol), Claim::Relay(key)));
        members.chain(captured).collect()
    }

    /// Opens one relay, at the port that the kernel sends clients to already, if an earlier run left one.
    fn open_relay(&mut self, key: RelayKey, entries: &Entries, picker: &Arc<Picker>) -> std::io::Result<Open> {
        let door = |bind| Door {
            name: entries.name.clone(),
            bind,
            reach: key.reach,
            picker: picker.clone(),
            inside: self.inside.clone(),
        };
        let addresses =
            entries.captured.iter().filter(|(address, reach)| address.is_ipv6() == key.v6 && **reach == key.reach);
        let slots = addresses.map(|(address, _)| Slot::destination(Map::Redirect, *address, entries.name.protocol));
        let found = slots.filter_map(|slot| self.held.get(&slot)).find_map(|data| match data {
            ElementData::Value(value) => socket(value).filter(|relay| relay.ip() == key.bind.ip()),
            _ => None,
        });
        if let (0, Some(found)) = (key.bind.port(), found)
            && let Ok(open) = self.relays.open(door(found))
        {
            return Ok(open);
        }
        // Nobody else has the address: or the port was taken meanwhile, and another is as good.
        self.relays.open(door(key.bind))
    }
}

fn socket(value: &Key) -> Option<SocketAddr> {
    match &value.0[..] {
        [address, Datum::Port(port)] => at(address, *port),
        _ => None,
    }
}

/// What becomes of relays in one commit.
#[derive(Default)]
struct Doors {
    opened: BTreeMap<RelayKey, Open>,
    closing: Vec<RelayKey>,
    /// Pickers of frontends that had none.
    pickers: HashMap<FrontendId, Arc<Picker>>,
}

impl<N: Nft + 'static, R: Relays> Userspace<N, R> {
    fn doors(&mut self, whole: bool, changes: &[Change<Entries>]) -> Result<Doors, Error> {
        let mut doors = Doors::default();
        let mut wanted = BTreeMap::new();
        for change in changes {
            let Some(after) = &change.after else { continue };
            let keys = self.keys(change.id, after);
            let is_relayed = !keys.is_empty();
            wanted.extend(keys.into_values().map(|key| (key, after)));
            if is_relayed && !self.pickers.contains_key(&change.id) {
                doors.pickers.insert(change.id, Arc::new(Picker::new(after.targets.clone())));
            }
        }
        let changed: std::collections::BTreeSet<FrontendId> = changes.iter().map(|change| change.id).collect();
        let touched = self.open.keys().filter(|key| whole || changed.contains(&key.id));
        doors.closing = touched.filter(|key| !wanted.contains_key(key)).copied().collect();
        for (key, after) in wanted {
            if self.open.contains_key(&key) {
                continue;
            }
            let picker = doors.pickers.get(&key.id).or(self.pickers.get(&key.id)).cloned();
            let picker = picker.expect("made above");
            match self.open_relay(key, after, &picker) {
                Ok(open) => drop(doors.opened.insert(key, open)),
                // Somebody else's port must not hold up the other Services.
                Err(error) if self.kernel.is_none() => {
                    tracing::warn!(
                        "proxy: no relay for {} on {}: {error}; see who listens there",
                        after.name,
                        key.bind
                    );
                }
                Err(cause) => return Err(Error::Relay { name: after.name.to_string(), address: key.bind, cause }),
            }
        }
        Ok(doors)
    }
}

impl<N: Nft + 'static, R: Relays> Dataplane for Userspace<N, R> {
    type Base = Base;
    type Entries = Entries;

    fn base(node: &NodeView) -> Base {
        Base::new(node)
    }

    fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
        entries(frontend, node)
    }

    fn about(&self) -> String {
        match self.kernel {
            Some(_) => format!("userspace, relays in this process, `nft list table {FAMILY} {TABLE}`"),
            None => "userspace without CAP_NET_ADMIN: only node ports answer, on 127.0.0.1 and ::1; \
                no address of a Service is captured"
                .into(),
        }
    }

    fn unsupported(entries: &Entries) -> Option<&'static str> {
        entries.unsupported
    }

    fn own_table(&self) -> Option<OwnTable> {
        let port = self.kernel.as_ref()?.port()?;
        Some(OwnTable { family: FAMILY, name: TABLE, port })
    }

    fn distrust(&mut self) {
        self.is_distrusted = true;
    }

    fn read(&mut self) -> Result<Seed, Error> {
        self.claims.clear();
        self.held.clear();
        self.layout = None;
        if let Some(kernel) = &mut self.kernel {
            self.layout = kernel.table_comment(FAMILY, TABLE)?.filter(|_| !self.is_distrusted);
        }
        // Ids and slots mean nothing to relays.
        Ok(Seed::default())
    }

    fn commit(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        let whole = base.is_some();
        let layout = base.map(Base::comment);
        let fits = layout.is_none() || layout == self.layout;
        if whole && fits {
            self.held = self.elements()?;
        }
        let doors = self.doors(whole, changes)?;

        let nothing = Claims::new();
        let claimed = if whole { &nothing } else { &self.claims };
        let mut after = Claims::new();
        for change in changes {
            for (slot, _) in change.before.iter().flat_map(|before| self.claims_of(change.id, before)) {
                owners(&mut after, claimed, slot).remove(&change.id);
            }
            for (slot, claim) in change.after.iter().flat_map(|after| self.claims_of(change.id, after)) {
                owners(&mut after, claimed, slot).insert(change.id, claim);
            }
        }
        let wanted = self.wanted(whole && fits, &after, &doors);
        let mut transaction = Transaction::new(FAMILY, TABLE);
        if let (Some(base), Some(comment), false) = (base, &layout, fits) {
            transaction.replace_table(comment);
            base.frame.declare(&mut transaction);
            base.frame.fill(&mut transaction);
        }
        let held = if fits { &self.held } else { &BTreeMap::new() };
        push_elements(&mut transaction, held, &wanted);
        if let Some(kernel) = &mut self.kernel
            && !transaction.is_empty()
        {
            kernel.commit(&transaction)?;
        }

        // The kernel has it; now we know it.
        if let (Some(base), Some(layout)) = (base, layout) {
            self.inside.set(base.inside.clone());
            if !fits {
                self.held.clear();
            }
            self.layout = Some(layout);
            self.is_distrusted = false;
            self.claims.clear();
            let alive: std::collections::BTreeSet<FrontendId> = changes.iter().map(|change| change.id).collect();
            self.pickers.retain(|id, _| alive.contains(id));
        }
        for (slot, data) in wanted {
            match data {
                Some(data) => drop(self.held.insert(slot, data)),
                None => drop(self.held.remove(&slot)),
            }
        }
        for (slot, owners) in after {
            if owners.is_empty() { drop(self.claims.remove(&slot)) } else { drop(self.claims.insert(slot, owners)) }
        }
        self.pickers.extend(doors.pickers);
        for change in changes {
            match &change.after {
                Some(after) => {
                    if let Some(picker) = self.pickers.get(&change.id) {
                        picker.set(after.targets.clone());
                    }
                }
                None => drop(self.pickers.remove(&change.id)),
            }
        }
        // Connections through a relay that closes go on until they end.
        for key in doors.closing {
            self.open.remove(&key);
        }
        self.open.extend(doors.opened);
        Ok(())
    }

    /// Relays go on listening.
    fn retire(self) -> Kept {
        Some(Box::new(self.open))
    }

    /// A relay answers, not an endpoint.
    fn answerers(&self, endpoints: Answerers) -> Answerers {
        if self.kernel.is_none() {
            return Answerers::new();
        }
        let relay =
            |address: &SocketAddr| match self.held.get(&Slot::destination(Map::Redirect, *address, Protocol::Udp)) {
                Some(ElementData::Value(value)) => socket(value),
                _ => None,
            };
        endpoints.into_keys().map(|address| (address, relay(&address).into_iter().collect())).collect()
    }
}

impl<N: Nft, R: Relays> Userspace<N, R> {
    /// What the kernel is to hold in each slot that this commit touches; all slots if it is the whole plan.
    fn wanted(&self, whole: bool, after: &Claims, doors: &Doors) -> BTreeMap<Slot, Option<ElementData>> {
        let address = |key: &RelayKey| doors.opened.get(key).or(self.open.get(key)).map(|open| open.address);
        let value = |at: SocketAddr| ElementData::Value(Key::new([at.ip().into(), Datum::Port(at.port())]));
        let mut wanted = BTreeMap::new();
        if whole {
            wanted.extend(self.held.keys().map(|slot| (slot.clone(), None)));
        }
        for (slot, owners) in after {
            let data = owners.values().next().and_then(|claim| match claim {
                Claim::Member => Some(ElementData::None),
                Claim::Relay(key) => address(key).map(value),
            });
            wanted.insert(slot.clone(), data);
        }
        let listening = |open: &Open| Slot::destination(Map::Relays, open.address, open.protocol);
        for key in &doors.closing {
            if let Some(open) = self.open.get(key) {
                wanted.insert(listening(open), None);
            }
        }
        let staying = self.open.iter().filter(|(key, _)| !doors.closing.contains(key));
        for (_, open) in staying.chain(&doors.opened) {
            wanted.insert(listening(open), Some(ElementData::None));
        }
        wanted
    }
}

/// Who wants an element, as it will be.
fn owners<'a>(after: &'a mut Claims, held: &Claims, slot: Slot) -> &'a mut BTreeMap<FrontendId, Claim> {
    after.entry(slot).or_insert_with_key(|slot| held.get(slot).cloned().unwrap_or_default())
}

/// Deletes first: an element that changes is deleted and added.
fn push_elements(
    transaction: &mut Transaction,
    held: &BTreeMap<Slot, ElementData>,
    wanted: &BTreeMap<Slot, Option<ElementData>>,
) {
    let mut removed: BTreeMap<(Map, bool), Vec<Element>> = BTreeMap::new();
    let mut added: BTreeMap<(Map, bool), Vec<Element>> = BTreeMap::new();
    for (slot, data) in wanted {
        let was = held.get(slot);
        if was == data.as_ref() {
            continue;
        }
        let element = |data: &ElementData| Element { key: slot.key.clone(), end: slot.end.clone(), data: data.clone() };
        let at = (slot.map, slot.v6);
        if let Some(was) = was {
            removed.entry(at).or_default().push(element(was));
        }
        if let Some(data) = data {
            added.entry(at).or_default().push(element(data));
        }
    }
    for ((map, v6), elements) in removed {
        transaction.push(Op::DeleteElements { set: map.name(v6).into(), elements });
    }
    for ((map, v6), elements) in added {
        transaction.push(Op::AddElements { set: map.name(v6).into(), elements });
    }
}

impl<R: Relays> Userspace<nft::Fake, R> {
    /// Walks the first packet of a connection through the rules and the relay it meets, and notes both.
    pub fn explain(
        &self,
        packet: Packet,
        locals: &[IpAddr],
        random: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
    ) -> Fate {
        let Some(kernel) = &self.kernel else { return Fate::Sent { to: packet.to, masqueraded: false } };
        let protocol = packet.protocol;
        let client = packet.from.ip();
        let fate = kernel.clone().explain(packet, locals, random, log);
        let Fate::Sent { to, .. } = fate else { return fate };
        let is_relay = |open: &Open| open.address == to && open.protocol.number() == protocol;
        let Some((key, _)) = self.open.iter().find(|(_, open)| is_relay(open)) else { return fate };
        let Some(picker) = self.pickers.get(&key.id) else { return Fate::Rejected };
        let targets = picker.targets();
        let policy = key.reach.policy(self.inside.contains(client));
        let endpoints = targets.of(policy, key.v6);
        log.push(format!("relay {to}: {policy:?} endpoints in turn, the next if one does not answer: {endpoints:?}"));
        let chosen = match endpoints.len() {
            0 => return Fate::Rejected,
            1 => 0,
            several => random(several as u32) as usize,
        };
        // The relay's own address is the source of what the endpoint sees.
        Fate::Sent { to: endpoints[chosen], masqueraded: true }
    }
}

/// The kernel's rules in this namespace; `None` if this process may not touch them.
pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Option<nft::Socket>, Error> {
    let probed = nft::Socket::open(namespace).and_then(|mut socket| {
        socket.table_comment(FAMILY, TABLE)?;
        Ok(socket)
    });
    match probed {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if error.is_forbidden() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Takes the table out, when another mode has taken over; whether it was there.
pub fn remove(nft: &mut impl Nft) -> Result<bool, Error> {
    Ok(nft.remove_table(FAMILY, TABLE)?)
}
