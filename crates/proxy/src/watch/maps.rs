//! The watch over what the ebpf mode's programs count, instead of a table of rules beside them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use linux::bpf::{self, Kernel};
use services::Protocol;

use super::members::Member;
use super::source::{Found, Source};
use super::suspects::UNANSWERED;
use super::table::{Destinations, Holder};
use crate::Error;
use crate::dataplane::ebpf::contacts::{Contact, Pair, Settings, contacts, listener, listeners, set_listeners};

/// A SYN without an answer that is older than this was evidence once. The programs begin anew with the next one
/// (`STALE` in `watch.h`).
const STALE: Duration = Duration::from_secs(1);

/// Listeners per system call.
const CHUNK: usize = 1 << 12;

/// What the programs are to know of it: their settings, and who listens here. Which addresses have alternatives is known
/// on this side alone.
pub(super) struct Maps<K> {
    kernel: K,
    settings: Settings,
    /// What the programs know of each listener.
    listeners: BTreeMap<SocketAddr, u32>,
}

impl<K: Kernel> Maps<K> {
    pub fn new(kernel: K, settings: Settings) -> Self {
        Maps { kernel, settings, listeners: BTreeMap::new() }
    }
}

/// A listener, and what is to be known of it.
fn bit(member: &Member) -> Option<(SocketAddr, u32)> {
    match member {
        Member::Here(address) => Some((*address, listener::HERE)),
        Member::Frozen(address) => Some((*address, listener::FROZEN)),
        Member::Alternative(_) | Member::Out(..) => None,
    }
}

impl<K: Kernel> Holder for Maps<K> {
    fn lay(&mut self) -> Result<HashSet<Member>, Error> {
        self.settings.put(&mut self.kernel)?;
        self.listeners = listeners(&mut self.kernel)?.into_iter().collect();
        let members = |(address, flags): (&SocketAddr, &u32)| {
            let here = (flags & listener::HERE != 0).then_some(Member::Here(*address));
            here.into_iter().chain((flags & listener::FROZEN != 0).then_some(Member::Frozen(*address)))
        };
        Ok(self.listeners.iter().flat_map(members).collect())
    }

    fn change(&mut self, gone: &[Member], new: &[Member]) -> Result<(), Error> {
        let mut changes: BTreeMap<SocketAddr, u32> = BTreeMap::new();
        let known = &self.listeners;
        let held = |address: &SocketAddr| known.get(address).copied().unwrap_or(0);
        for (address, bit) in gone.iter().filter_map(bit) {
            *changes.entry(address).or_insert_with(|| held(&address)) &= !bit;
        }
        for (address, bit) in new.iter().filter_map(bit) {
            *changes.entry(address).or_insert_with(|| held(&address)) |= bit;
        }
        let changes: Vec<(SocketAddr, u32)> = changes.into_iter().collect();
        for chunk in changes.chunks(CHUNK) {
            set_listeners(&mut self.kernel, chunk)?;
        }
        for (address, flags) in changes {
            if flags == 0 {
                self.listeners.remove(&address);
            } else {
                self.listeners.insert(address, flags);
            }
        }
        Ok(())
    }
}

/// What the programs have counted.
pub(super) struct Counts<K> {
    kernel: K,
    destinations: Destinations,
    /// Over all contacts, at the last look.
    retried: u64,
}

fn retried(contacts: &[(Pair, Contact)]) -> u64 {
    contacts.iter().map(|(_, contact)| contact.retried).sum()
}

impl<K: Kernel> Counts<K> {
    pub fn new(mut kernel: K, destinations: Destinations) -> Result<Self, Error> {
        let retried = retried(&contacts(&mut kernel)?);
        Ok(Counts { kernel, destinations, retried })
    }
}

impl<K: Kernel> Source for Counts<K> {
    fn look(&mut self, _: Duration) -> Result<Found, Error> {
        let contacts = contacts(&mut self.kernel)?;
        let found = judge(&contacts, bpf::now(), |pair| self.destinations.has_alternative(pair.asked, pair.given));
        // What makes room in a full map takes its numbers along.
        let before = std::mem::replace(&mut self.retried, retried(&contacts));
        Ok(Found { retried: self.retried.saturating_sub(before), ..found })
    }
}

/// Who is silent `now`, on the programs' clock: no connection to it was answered since the one in question began.
fn judge(contacts: &[(Pair, Contact)], now: Duration, has_alternative: impl Fn(&Pair) -> bool) -> Found {
    let mut answered: HashMap<SocketAddr, Duration> = HashMap::new();
    let tcp = || contacts.iter().filter(|(pair, _)| pair.protocol == Protocol::Tcp);
    for (pair, contact) in tcp() {
        let last = answered.entry(pair.given).or_default();
        *last = contact.answered_at.max(*last);
    }
    let mut found = Found { silent: BTreeSet::new(), ..Found::default() };
    for (pair, contact) in tcp() {
        let Some(asked_at) = contact.asked_at.filter(|at| answered.get(&pair.given).is_none_or(|last| last < at))
        else {
            continue;
        };
        let age = now.saturating_sub(asked_at);
        if age > STALE || !has_alternative(pair) {
            continue;
        }
        if age >= UNANSWERED {
            found.silent.insert(pair.given);
        } else {
            found.goes_on = true;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use linux::bpf::Fake;

    use super::*;
    use crate::dataplane::ebpf::contacts::{LISTENERS, SETTINGS};

    fn at(host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 244, 0, host], port))
    }

    #[test]
    fn an_endpoint_is_silent_if_it_answers_nobody() {
        let ms = Duration::from_millis;
        let service = |last: u8| SocketAddr::from(([10, 96, 0, last], 80));
        let contact = |asked: u8, given: u8, asked_at: u64, answered_at: u64| {
            let pair = Pair { protocol: Protocol::Tcp, asked: service(asked), given: at(given, 8080) };
            let asked_at = (asked_at > 0).then(|| ms(asked_at));
            (pair, Contact { asked_at, answered_at: ms(answered_at), ..Contact::default() })
        };
        let contacts = [
            // Not asked since it answered.
            contact(1, 1, 0, 9_000),
            // Asked for long.
            contact(1, 2, 9_800, 9_000),
            // Through another Service it has answered since.
            contact(1, 3, 9_800, 0),
            contact(2, 3, 0, 9_900),
            // Just asked.
            contact(1, 4, 9_900, 0),
            // Nobody asks any more.
            contact(1, 5, 8_000, 0),
            // Nobody else could be asked.
            contact(9, 6, 9_800, 0),
        ];
        let found = judge(&contacts, ms(10_000), |pair| pair.asked != service(9));
        assert_eq!(found, Found { silent: BTreeSet::from([at(2, 8080)]), retried: 0, goes_on: true });
        assert!(!judge(&contacts[..3], ms(10_000), |_| true).goes_on);
    }

    #[test]
    fn listeners_are_frozen_and_thawed() {
        let kernel = Fake::new(&[SETTINGS, LISTENERS]);
        let settings = Settings { counts: true, ..Settings::default() };
        let mut maps = Maps::new(kernel, settings);
        assert_eq!(maps.lay().expect("laid"), HashSet::new());
        let two: SocketAddr = "[fd00::2]:81".parse().expect("address");
        let (here, frozen) = (Member::Here(at(1, 80)), Member::Frozen(at(1, 80)));
        maps.change(&[], &[here, frozen, Member::Here(two), Member::Alternative(at(3, 80))]).expect("frozen");
        assert_eq!(maps.lay().expect("laid"), HashSet::from([here, frozen, Member::Here(two)]));
        maps.change(&[frozen, Member::Here(two)], &[]).expect("thawed");
        assert_eq!(maps.lay().expect("laid"), HashSet::from([here]));
    }
}
