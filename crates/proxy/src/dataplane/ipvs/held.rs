//! What the kernel holds, and the steps from there to what is wanted.
//!
//! IPVS knows no transactions, so the order matters: a virtual server is marked as ours, then made whole, then packets are
//! let through to it, then its address becomes ours; it goes the other way round.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use linux::ipvs::{Destination, Key as ServerKey, Op};
use linux::nft::{self, Element, ElementData, Key, Transaction};

use super::claims::Touched;
use super::layout::{FAMILY, Map, TABLE};
use super::plan::{Content, Item, Server};

const TCP: u8 = 6;

#[derive(Default)]
pub struct Held {
    pub servers: HashMap<ServerKey, Server>,
    /// Servers that nothing says are ours: left alone, unless one of ours is to have that address and port.
    pub foreign: HashMap<ServerKey, Server>,
    pub addresses: BTreeSet<IpAddr>,
    pub elements: HashMap<(Map, bool, Key, Option<Key>), ElementData>,
    /// Destinations that nobody wants any more, at weight 0 until their connections have closed.
    pub draining: BTreeSet<(ServerKey, SocketAddr)>,
}

/// Steps, in the order in which they are taken.
#[derive(Default)]
pub struct Steps {
    /// Marks of virtual servers to be made.
    pub marks: Vec<ElementChange>,
    /// Virtual servers and destinations that come or change.
    pub first: Vec<Op>,
    /// Elements that come, change or go, all at once.
    pub elements: Vec<ElementChange>,
    pub bind: Vec<Op>,
    pub unbind: Vec<Op>,
    /// Virtual servers and destinations that go.
    pub last: Vec<Op>,
    /// Marks of servers that have gone, and elements that keep what listens on all addresses from answering at a
    /// Service's.
    pub last_elements: Vec<ElementChange>,
}

/// An element, and what it is to be.
pub type ElementChange = (Item, Option<ElementData>);

impl Held {
    /// The items that are there.
    pub fn items(&self) -> Vec<Item> {
        let servers = self.servers.keys().map(|key| Item::Server(*key));
        let addresses = self.addresses.iter().map(|address| Item::Address(*address));
        let elements = self.elements.keys().cloned();
        let elements = elements.map(|(map, v6, key, end)| Item::Element { map, v6, key, end });
        servers.chain(addresses).chain(elements).collect()
    }

    pub fn steps(&self, touched: &Touched) -> Steps {
        let mut steps = Steps::default();
        for (item, wanted) in touched.wanted() {
            match (item, wanted) {
                (Item::Server(key), Some(Content::Server(wanted))) => self.server(key, wanted, &mut steps),
                (Item::Server(key), _) => {
                    if self.servers.contains_key(key) {
                        steps.last.push(Op::DeleteService(*key));
                    }
                }
                (Item::Address(address), wanted) => match (wanted.is_some(), self.addresses.contains(address)) {
                    (true, false) => steps.bind.push(Op::Bind(*address)),
                    (false, true) => steps.unbind.push(Op::Unbind(*address)),
                    _ => {}
                },
                (Item::Element { map, v6, key, end }, wanted) => {
                    let wanted = match wanted {
                        Some(Content::Element(data)) => Some(data),
                        _ => None,
                    };
                    let held = self.elements.get(&(*map, *v6, key.clone(), end.clone()));
                    if held == wanted {
                        continue;
                    }
                    let steps = match (map, wanted) {
                        (Map::Served, Some(_)) => &mut steps.marks,
                        (Map::Served | Map::Bound, None) => &mut steps.last_elements,
                        _ => &mut steps.elements,
                    };
                    steps.push((item.clone(), wanted.cloned()));
                }
            }
        }
        steps
    }

    fn server(&self, key: &ServerKey, wanted: &Server, steps: &mut Steps) {
        let nobody = BTreeMap::new();
        let there = match self.servers.get(key) {
            None => {
                steps.first.push(Op::AddService(wanted.service.clone()));
                &nobody
            }
            Some(held) => {
                if held.service != wanted.service {
                    steps.first.push(Op::SetService(wanted.service.clone()));
                }
                &held.destinations
            }
        };
        for (address, destination) in &wanted.destinations {
            match there.get(address) {
                None => steps.first.push(Op::AddDestination(*key, destination.clone())),
                Some(held) if held != destination => {
                    steps.first.push(Op::SetDestination(*key, destination.clone()));
                }
                Some(_) => {}
            }
        }
        for (address, destination) in there.iter().filter(|(address, _)| !wanted.destinations.contains_key(address)) {
            if self.draining.contains(&(*key, *address)) {
                continue;
            }
            if key.protocol == TCP {
                // Also if a start finds it at weight 0: whoever takes this step drains it.
                steps.last.push(Op::SetDestination(*key, Destination { weight: 0, ..destination.clone() }));
            } else {
                // Its flows are scheduled anew (expire_nodest_conn).
                steps.last.push(Op::DeleteDestination(*key, *address));
            }
        }
    }

    /// Counts a server that is wanted as ours.
    pub fn adopt(&mut self, touched: &Touched) {
        for (item, wanted) in touched.wanted() {
            if let (Item::Server(key), Some(_)) = (item, wanted)
                && let Some(server) = self.foreign.remove(key)
            {
                self.servers.insert(*key, server);
            }
        }
    }

    /// Notes that the kernel has done it.
    pub fn done(&mut self, op: &Op) {
        match op {
            Op::AddService(service) => {
                let server = Server { service: service.clone(), destinations: BTreeMap::new() };
                self.servers.insert(service.key, server);
            }
            Op::SetService(service) => {
                if let Some(held) = self.servers.get_mut(&service.key) {
                    held.service = service.clone();
                }
            }
            Op::DeleteService(key) => {
                self.servers.remove(key);
                self.draining.retain(|(of, _)| of != key);
            }
            Op::AddDestination(key, destination) | Op::SetDestination(key, destination) => {
                if let Some(held) = self.servers.get_mut(key) {
                    held.destinations.insert(destination.address, destination.clone());
                }
                self.draining.remove(&(*key, destination.address));
            }
            Op::DeleteDestination(key, address) => {
                if let Some(held) = self.servers.get_mut(key) {
                    held.destinations.remove(address);
                }
                self.draining.remove(&(*key, *address));
            }
            Op::Bind(address) => drop(self.addresses.insert(*address)),
            Op::Unbind(address) => drop(self.addresses.remove(address)),
            Op::SetTimeouts(_) => {}
        }
    }

    /// Adds the changes of elements to a transaction.
    pub fn write(&self, changes: &[ElementChange], transaction: &mut Transaction) {
        let mut removed: BTreeMap<(Map, bool), Vec<Element>> = BTreeMap::new();
        let mut added: BTreeMap<(Map, bool), Vec<Element>> = BTreeMap::new();
        for (item, wanted) in changes {
            let Item::Element { map, v6, key, end } = item else { continue };
            let element = |data: &ElementData| Element { key: key.clone(), end: end.clone(), data: data.clone() };
            if let Some(held) = self.elements.get(&(*map, *v6, key.clone(), end.clone())) {
                removed.entry((*map, *v6)).or_default().push(element(held));
            }
            if let Some(wanted) = wanted {
                added.entry((*map, *v6)).or_default().push(element(wanted));
            }
        }
        for ((map, v6), elements) in removed {
            transaction.push(nft::Op::DeleteElements { set: map.name(v6).into(), elements });
        }
        for ((map, v6), elements) in added {
            transaction.push(nft::Op::AddElements { set: map.name(v6).into(), elements });
        }
    }

    pub fn written(&mut self, changes: Vec<ElementChange>) {
        for (item, wanted) in changes {
            let Item::Element { map, v6, key, end } = item else { continue };
            match wanted {
                Some(data) => drop(self.elements.insert((map, v6, key, end), data)),
                None => drop(self.elements.remove(&(map, v6, key, end))),
            }
        }
    }

    pub fn transaction() -> Transaction {
        Transaction::new(FAMILY, TABLE)
    }
}
