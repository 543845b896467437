//! What the kernel is to know of alternatives and of frozen listeners, and how it follows frontends: by a table of rules and
//! sets, or as `maps` has it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use linux::conntrack::Translator;
use linux::nft::{Nft, Transaction};

use super::layout::{FAMILY, TABLE, comment, layout};
use super::members::{Alternatives, Kind, Member, elements};
use crate::Error;

/// Elements a transaction may have, so that a cold start of many Services holds up nobody else for long.
const CHUNK: usize = 1 << 14;

/// What the sets hold, for whoever looks at flows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Destinations(Arc<RwLock<HashMap<Member, u32>>>);

impl Destinations {
    /// Whether a connection to this address that this endpoint does not answer could go elsewhere.
    pub fn has_alternative(&self, address: SocketAddr, endpoint: SocketAddr) -> bool {
        let held = self.0.read().unwrap_or_else(PoisonError::into_inner);
        held.contains_key(&Member::Alternative(address)) || held.contains_key(&Member::Out(address, endpoint))
    }
}

/// What the kernel holds of it, and how.
pub(crate) trait Holder: Send {
    /// Puts in place whatever holds members; those that are held already.
    fn lay(&mut self) -> Result<HashSet<Member>, Error>;
    fn change(&mut self, gone: &[Member], new: &[Member]) -> Result<(), Error>;
}

/// What the kernel holds, as the frontends want it.
pub(crate) struct WatchTable<H: ?Sized = dyn Holder> {
    /// How many frontends want each element. What an earlier run left is wanted by none.
    held: Destinations,
    /// Those of `held`, which has too many others to look through at each change.
    frozen: BTreeSet<SocketAddr>,
    /// What the kernel holds is known.
    is_known: bool,
    holder: H,
}

impl<H: Holder> WatchTable<H> {
    pub fn new(holder: H) -> Self {
        WatchTable { held: Destinations::default(), frozen: BTreeSet::new(), is_known: false, holder }
    }
}

impl<H: Holder + ?Sized> WatchTable<H> {
    pub fn destinations(&self) -> Destinations {
        self.held.clone()
    }

    /// Makes the sets follow frontends that changed; with `whole`, `changes` are all frontends there are, and only what they
    /// are counts. An error leaves it open what the kernel holds: the next call has to be whole.
    pub fn commit(
        &mut self,
        whole: bool,
        changes: &[(Alternatives, Alternatives)],
        frozen: &BTreeSet<SocketAddr>,
    ) -> Result<(), Error> {
        let result = self.try_commit(whole, changes, frozen);
        self.is_known = result.is_ok();
        result
    }

    fn try_commit(
        &mut self,
        whole: bool,
        changes: &[(Alternatives, Alternatives)],
        frozen: &BTreeSet<SocketAddr>,
    ) -> Result<(), Error> {
        if !whole && !self.is_known {
            return Err(Error::WatchUnknown);
        }
        let mut before: HashSet<Member> = HashSet::new();
        if !self.is_known {
            before = self.holder.lay()?;
        }
        let mut held = self.held.0.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_known && whole {
            before = held.keys().copied().collect();
        }
        let mut touched: BTreeSet<Member> = BTreeSet::new();
        if whole {
            held.clear();
            for member in changes.iter().flat_map(|(_, after)| after.iter()) {
                *held.entry(*member).or_default() += 1;
            }
        } else {
            for (member, more) in changes.iter().flat_map(|(before, after)| {
                let (gone, new) = (before.without(after), after.without(before));
                gone.map(|member| (member, false)).chain(new.map(|member| (member, true)))
            }) {
                if touched.insert(*member) && held.contains_key(member) {
                    before.insert(*member);
                }
                let count = held.entry(*member).or_default();
                *count = if more { *count + 1 } else { count.saturating_sub(1) };
                if *count == 0 {
                    held.remove(member);
                }
            }
            for member in self.frozen.iter().copied().map(Member::Frozen) {
                touched.insert(member);
                before.insert(member);
                held.remove(&member);
            }
        }
        for address in frozen {
            touched.insert(Member::Frozen(*address));
            held.insert(Member::Frozen(*address), 1);
        }
        if whole {
            touched = held.keys().chain(&before).copied().collect();
        }
        let gone: Vec<Member> =
            touched.iter().filter(|member| before.contains(member) && !held.contains_key(member)).copied().collect();
        let new: Vec<Member> =
            touched.iter().filter(|member| !before.contains(member) && held.contains_key(member)).copied().collect();
        drop(held);
        // If this fails, the next call is whole and does not ask.
        self.frozen.clone_from(frozen);
        self.holder.change(&gone, &new)
    }
}

/// Rules and sets: the table in the kernel, or in the fake of it.
pub(crate) struct Rules<N> {
    nft: N,
    by: Translator,
    /// Whether refusals are held back, and connections counted.
    retry: bool,
    count: bool,
}

impl<N: Nft> Rules<N> {
    pub fn new(nft: N, by: Translator, retry: bool, count: bool) -> Self {
        Rules { nft, by, retry, count }
    }
}

impl<N: Nft + Send> Holder for Rules<N> {
    fn lay(&mut self) -> Result<HashSet<Member>, Error> {
        let layout = layout(self.by, self.retry, self.count);
        let comment = comment(&layout);
        let mut found = HashSet::new();
        if self.nft.table_comment(FAMILY, TABLE)?.as_ref() != Some(&comment) {
            let mut transaction = Transaction::new(FAMILY, TABLE);
            transaction.replace_table(&comment);
            transaction.ops.extend(layout);
            self.nft.commit(&transaction)?;
            return Ok(found);
        }
        for v6 in [false, true] {
            for kind in Kind::ALL {
                let elements = self.nft.elements(FAMILY, TABLE, &kind.set(v6))?;
                found.extend(elements.iter().filter_map(|element| kind.member(&element.key.0)));
            }
        }
        Ok(found)
    }

    fn change(&mut self, gone: &[Member], new: &[Member]) -> Result<(), Error> {
        for (members, add) in [(gone, false), (new, true)] {
            for chunk in members.chunks(CHUNK) {
                self.nft.commit(&elements(chunk, add))?;
            }
        }
        Ok(())
    }
}

/// Takes the table out; whether it was there.
pub(crate) fn remove(nft: &mut impl Nft) -> Result<bool, Error> {
    Ok(nft.remove_table(FAMILY, TABLE)?)
}

#[cfg(test)]
mod tests {
    use linux::nft::{Datum, Fake};

    use super::*;

    fn members(ports: &[u16]) -> Alternatives {
        let address = |port: &u16| Member::Alternative(SocketAddr::from(([10, 96, 0, 10], *port)));
        ports.iter().map(address).collect()
    }

    fn held(table: &mut WatchTable<Rules<Fake>>) -> Vec<u16> {
        let elements = table.holder.nft.elements(FAMILY, TABLE, &Kind::Alternatives.set(false)).expect("a set");
        elements
            .iter()
            .filter_map(|element| {
                element.key.0.iter().find_map(|datum| match datum {
                    Datum::Port(port) => Some(*port),
                    _ => None,
                })
            })
            .collect()
    }

    #[test]
    fn two_frontends_may_want_the_same_element() {
        let mut table = WatchTable::new(Rules::new(Fake::default(), Translator::Nat, true, true));
        let none = BTreeSet::new();
        let nothing = Alternatives::default();
        assert!(table.commit(false, &[], &none).is_err(), "nothing is known yet");
        table
            .commit(true, &[(nothing.clone(), members(&[80, 81])), (nothing.clone(), members(&[80]))], &none)
            .expect("laid");
        assert_eq!(held(&mut table), [80, 81]);
        table.commit(false, &[(members(&[80, 81]), members(&[82]))], &none).expect("changed");
        assert_eq!(held(&mut table), [80, 82]);
        let service = |port: u16| SocketAddr::from(([10, 96, 0, 10], port));
        let destinations = table.destinations();
        assert!(destinations.has_alternative(service(80), service(1)));
        assert!(!destinations.has_alternative(service(81), service(1)));
        table.commit(false, &[(members(&[80]), nothing.clone())], &none).expect("changed");
        assert_eq!(held(&mut table), [82]);
        // One frontend hands an element to another in one commit.
        table
            .commit(false, &[(members(&[82]), nothing.clone()), (nothing.clone(), members(&[82]))], &none)
            .expect("handed over");
        assert_eq!(held(&mut table), [82]);
        // A new start finds what is there, and changes only what differs.
        let mut again = WatchTable::new(Rules::new(table.holder.nft.clone(), Translator::Nat, true, true));
        let before = again.holder.nft.changed;
        again.commit(true, &[(nothing.clone(), members(&[82, 83]))], &none).expect("found");
        assert_eq!((held(&mut again), again.holder.nft.changed - before), (vec![82, 83], 1));
        again.commit(true, &[], &none).expect("emptied");
        assert_eq!(held(&mut again), [0; 0]);
    }

    #[test]
    fn frozen_listeners_come_and_go() {
        let mut table = WatchTable::new(Rules::new(Fake::default(), Translator::Nat, true, true));
        let pod = SocketAddr::from(([10, 244, 0, 11], 8080));
        let count = |table: &mut WatchTable<Rules<Fake>>| {
            table.holder.nft.elements(FAMILY, TABLE, &Kind::Frozen.set(false)).expect("a set").len()
        };
        table.commit(true, &[], &BTreeSet::from([pod])).expect("laid");
        assert_eq!(count(&mut table), 1);
        table.commit(false, &[], &BTreeSet::from([pod])).expect("the same");
        assert_eq!(count(&mut table), 1);
        table.commit(false, &[], &BTreeSet::new()).expect("thawed");
        assert_eq!(count(&mut table), 0);
    }

    #[test]
    fn a_failed_commit_is_followed_by_a_whole_one() {
        let mut table = WatchTable::new(Rules::new(Fake::failing(3), Translator::Nat, true, true));
        let nothing = Alternatives::default();
        table.commit(true, &[(nothing.clone(), members(&[80]))], &BTreeSet::new()).expect("two commits");
        let change = [(members(&[80]), members(&[81]))];
        assert!(table.commit(false, &change, &BTreeSet::new()).is_err());
        assert!(table.commit(false, &change, &BTreeSet::new()).is_err(), "only a whole one will do");
        table.commit(true, &[(nothing, members(&[81]))], &BTreeSet::new()).expect("whole");
        assert_eq!(held(&mut table), [81]);
    }
}
