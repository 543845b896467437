//! For which addresses this node may speak, and until when. No clock, no I/O: times are arguments, counted from any one origin.
//!
//! Every announcing node votes: its heartbeats name the set of nodes that it takes for alive, and its ballot for an address
//! goes to the one of them that comes first in the address's order (rendezvous hashing). An owner has the ballots of a majority
//! of all announcing nodes. A ballot is a lease of [`LEASE`], counted from when its receiver sent the heartbeat that it
//! echoes: so it ends at the owner no later than at the voter, however long the packets took. A voter whose mind changes gives
//! its ballot to nobody until the old one must have ended. Two majorities share a voter, so no two nodes speak at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::message::{BUCKETS, Heartbeat};

pub const HEARTBEAT: Duration = Duration::from_millis(100);
/// How long a ballot holds, and how long a node that is silent is taken for alive.
pub const LEASE: Duration = Duration::from_millis(250);
/// Members beyond these have no vote: sets of nodes are 128 bits.
const MOST_MEMBERS: usize = 128;
/// Neither table is compared while it says this.
const VOID: u64 = 0;
/// For so long it is remembered who had an address before.
pub const MEMORY: Duration = Duration::from_secs(60);
/// Sets of living nodes that are remembered; they change when nodes come and go.
const MOST_SEEN: usize = 16;

/// What is announced, and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// All nodes that announce, alive or not.
    pub members: BTreeSet<String>,
    /// Addresses, and which nodes may announce each; `None`: every member.
    pub addresses: BTreeMap<IpAddr, Option<BTreeSet<String>>>,
}

/// What the node may say now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Speech {
    pub addresses: BTreeSet<IpAddr>,
    /// When the right to all of them ends, unless it is renewed.
    pub until: Duration,
}

struct Peer {
    beat: Heartbeat,
    heard: Duration,
    /// Until when its ballots for us hold.
    lease: Duration,
}

/// Who comes first for an address.
struct Order {
    address: IpAddr,
    bucket: usize,
    /// Places in the sorted list of members, best first; only those that are allowed.
    places: Vec<u8>,
}

pub struct Elector {
    me: String,
    incarnation: u64,
    cluster: u64,
    members: Vec<String>,
    plan: Plan,
    orders: Vec<Order>,
    digests: Digests,
    /// Until when our own table has no say, per bucket and altogether: who heard of the one before may still act on it.
    void: [Duration; BUCKETS],
    void_members: Duration,
    peers: BTreeMap<String, Peer>,
    /// The set we vote for, and those before it that may still bind somebody, with the time when they do no more.
    set: u128,
    earlier: Vec<(u128, Duration)>,
    /// Sets that we or others voted for, and until when: the latest last.
    seen: VecDeque<(u128, Duration)>,
    /// Whose an address was before who may announce it changed, and when it did.
    before: BTreeMap<IpAddr, (String, Duration)>,
    sent: VecDeque<(u64, Duration)>,
    sequence: u64,
    starts: Duration,
    tie: bool,
    leaving: bool,
    next_beat: Duration,
}

#[derive(Clone, PartialEq, Eq, Default)]
struct Digests {
    members: u64,
    buckets: [u64; BUCKETS],
}

/// FNV-1a, and a last stir as names differ in few bits.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ hash >> 32
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn winner(set: u128, order: &Order) -> Option<u8> {
    order.places.iter().copied().find(|place| set >> place & 1 == 1)
}

/// Whom somebody votes for, if for anybody.
fn ballot(sets: &[u128], released: u128, order: &Order) -> Option<u8> {
    let (now, earlier) = sets.split_first()?;
    let chosen = winner(*now, order)?;
    let is_bound = |set: &u128| winner(*set, order).is_some_and(|held| held != chosen && released >> held & 1 == 0);
    if earlier.iter().any(is_bound) { None } else { Some(chosen) }
}

impl Elector {
    /// `incarnation` is another one at each start. It has no vote for the first [`LEASE`]: what it said before is forgotten.
    pub fn new(me: &str, cluster: u64, incarnation: u64, now: Duration) -> Elector {
        Elector {
            me: me.to_owned(),
            incarnation,
            cluster,
            members: Vec::new(),
            plan: Plan::default(),
            orders: Vec::new(),
            digests: Digests::default(),
            void: [now; BUCKETS],
            void_members: now,
            peers: BTreeMap::new(),
            set: 0,
            earlier: Vec::new(),
            seen: VecDeque::new(),
            before: BTreeMap::new(),
            sent: VecDeque::new(),
            sequence: 0,
            starts: now + LEASE,
            tie: false,
            leaving: false,
            next_beat: now,
        }
    }

    pub fn set_plan(&mut self, plan: Plan, now: Duration) {
        if plan == self.plan {
            return;
        }
        let members: Vec<String> = plan.members.iter().take(MOST_MEMBERS).cloned().collect();
        let owners = self.owners();
        let mut digests = Digests::default();
        let names: Vec<&[u8]> = members.iter().map(String::as_bytes).collect();
        digests.members = hash(&names).max(1);
        self.orders.clear();
        for (address, allowed) in &plan.addresses {
            let raw = bytes(*address);
            let bucket = (hash(&[&raw]) % BUCKETS as u64) as usize;
            if let Some(allowed) = allowed {
                let mut parts: Vec<&[u8]> = vec![&raw];
                parts.extend(allowed.iter().map(String::as_bytes));
                // The sum does not depend on the order in which addresses come and go.
                digests.buckets[bucket] = digests.buckets[bucket].wrapping_add(hash(&parts));
            }
            let is_allowed = |name: &String| allowed.as_ref().is_none_or(|allowed| allowed.contains(name));
            let mut places: Vec<(u64, u8)> = (0u8..)
                .zip(&members)
                .filter(|(_, name)| is_allowed(name))
                .map(|(place, name)| (hash(&[name.as_bytes(), &raw]), place))
                .collect();
            places.sort_unstable_by(|a, b| b.cmp(a));
            let places = places.into_iter().map(|(_, place)| place).collect();
            self.orders.push(Order { address: *address, bucket, places });
        }
        for (digest, (before, void)) in digests.buckets.iter().zip(self.digests.buckets.iter().zip(&mut self.void)) {
            if digest != before {
                *void = now + LEASE;
            }
        }
        if members != self.members {
            self.void_members = now + LEASE;
            self.members = members;
            let known = &self.members;
            self.peers.retain(|name, _| known.contains(name));
            // Its places are those of the list before.
            self.set = 0;
            self.earlier.clear();
            self.seen.clear();
        }
        self.before.retain(|_, (_, at)| *at + MEMORY > now);
        for (address, owner) in owners {
            if plan.addresses.get(&address).is_some_and(|allowed| self.plan.addresses.get(&address) != Some(allowed)) {
                self.before.insert(address, (owner, now));
            }
        }
        self.digests = digests;
        self.plan = plan;
        self.next_beat = now;
    }

    /// Who has each address as far as our own vote goes.
    fn owners(&self) -> BTreeMap<IpAddr, String> {
        let name = |order: &Order| self.members.get(usize::from(winner(self.set, order)?)).cloned();
        self.orders.iter().filter_map(|order| Some((order.address, name(order)?))).collect()
    }

    /// Who had each of these addresses, which are ours now, before, and knows connections to it: a node that lives, or has just
    /// said that it leaves. The dead serve no connections.
    pub fn predecessors(&self, addresses: &BTreeSet<IpAddr>, now: Duration) -> BTreeMap<IpAddr, String> {
        let serves = |name: &String| {
            let peer = self.peers.get(name);
            peer.is_some_and(|peer| peer.heard + LEASE > now || peer.beat.is_leaving)
        };
        let before = |order: &Order| {
            let by_plan = self.before.get(&order.address).map(|(name, at)| (*at, name));
            let by_sets = self.seen.iter().filter_map(|(set, at)| {
                let name = self.members.get(usize::from(winner(*set, order)?))?;
                Some((*at, name))
            });
            let others = by_sets.chain(by_plan).filter(|(at, name)| *at + MEMORY > now && **name != self.me);
            others.max().map(|(_, name)| name).filter(|name| serves(name)).cloned()
        };
        let ours = self.orders.iter().filter(|order| addresses.contains(&order.address));
        ours.filter_map(|order| Some((order.address, before(order)?))).collect()
    }

    fn remember(&mut self, set: u128, now: Duration) {
        self.seen.retain(|(known, _)| *known != set);
        self.seen.push_back((set, now));
        if self.seen.len() > MOST_SEEN {
            self.seen.pop_front();
        }
    }

    /// Whether we hold the Lease that decides where both halves are equal.
    pub fn set_tie(&mut self, tie: bool) {
        self.tie = tie;
    }

    /// From now on it owns nothing, and says so.
    pub fn leave(&mut self, now: Duration) {
        self.leaving = true;
        self.next_beat = now;
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.members.binary_search_by(|member| member.as_str().cmp(name)).ok()
    }

    /// Takes what another node says. `Some` is what to answer it with at once.
    pub fn receive(&mut self, beat: Heartbeat, now: Duration) -> Option<Heartbeat> {
        if beat.cluster != self.cluster || beat.from == self.me || self.place(&beat.from).is_none() {
            return None;
        }
        let known = self.peers.get(&beat.from);
        if known.is_some_and(|k| k.beat.incarnation == beat.incarnation && beat.sequence <= k.beat.sequence) {
            return None;
        }
        // A node that was started again forgot its ballots, and waits until they have ended.
        let mut lease = known.filter(|k| k.beat.incarnation == beat.incarnation).map_or(Duration::ZERO, |k| k.lease);
        if beat.echo_incarnation == self.incarnation
            && let Some((_, at)) = self.sent.iter().find(|(sequence, _)| *sequence == beat.echo)
        {
            lease = lease.max(*at + LEASE);
        }
        let (from, is_answer) = (beat.from.clone(), beat.is_answer);
        // Another list of members has other places.
        if beat.members == self.digests.members {
            beat.sets.iter().rev().for_each(|set| self.remember(*set, now));
        }
        self.peers.insert(from.clone(), Peer { beat, heard: now, lease });
        self.settle(now);
        if is_answer { None } else { Some(self.beat(&from, true, now)) }
    }

    /// The nodes that we vote for, and what still binds us.
    fn settle(&mut self, now: Duration) {
        let mut set = 0u128;
        for (place, name) in self.members.iter().enumerate() {
            let is_in = if *name == self.me {
                !self.leaving && self.has_majority(now)
            } else {
                self.peers
                    .get(name)
                    .is_some_and(|peer| peer.heard + LEASE > now && peer.beat.is_in_contact && !peer.beat.is_leaving)
            };
            set |= u128::from(is_in) << place;
        }
        self.earlier.retain(|(_, until)| *until > now);
        if set != self.set {
            if self.set != 0 {
                self.remember(self.set, now);
                self.earlier.push((self.set, now + LEASE));
            }
            self.set = set;
            self.next_beat = now;
        }
    }

    /// Those that can hold no ballot of ours any more: they said so, or were silent for too long.
    fn released(&self, now: Duration) -> u128 {
        let mut released = 0u128;
        for (place, name) in self.members.iter().enumerate() {
            let is_out = match self.peers.get(name) {
                Some(peer) => peer.beat.is_leaving || peer.heard + LEASE <= now,
                // We ourselves know what we hold: our own ballot ends when we say so.
                None => true,
            };
            released |= u128::from(is_out && self.set >> place & 1 == 0) << place;
        }
        released
    }

    /// Votes, of which one more than half decides. The Lease gives its holder a second one where the number is even.
    fn weight(&self, has_tie: bool) -> usize {
        if has_tie && self.members.len().is_multiple_of(2) { 2 } else { 1 }
    }

    fn majority(&self) -> usize {
        self.members.len() / 2 + 1
    }

    fn has_majority(&self, now: Duration) -> bool {
        let of_peers = self.peers.values().filter(|peer| peer.lease > now).map(|peer| self.weight(peer.beat.has_tie));
        of_peers.sum::<usize>() + self.weight(self.tie) >= self.majority()
    }

    fn own_sets(&self, now: Duration) -> Vec<u128> {
        if now < self.starts || self.set == 0 {
            return Vec::new();
        }
        [self.set]
            .into_iter()
            .chain(self.earlier.iter().filter(|(_, until)| *until > now).map(|(set, _)| *set))
            .collect()
    }

    fn own_digests(&self, now: Duration) -> Digests {
        let mut digests = self.digests.clone();
        if now < self.void_members {
            digests.members = VOID;
        }
        // An empty bucket is zero, too: only a table that has just changed is marked.
        for (digest, void) in digests.buckets.iter_mut().zip(&self.void) {
            *digest = if now < *void { u64::MAX } else { *digest };
        }
        digests
    }

    fn beat(&mut self, to: &str, is_answer: bool, now: Duration) -> Heartbeat {
        self.sequence += 1;
        self.sent.push_back((self.sequence, now));
        while self.sent.front().is_some_and(|(_, at)| *at + LEASE <= now) {
            self.sent.pop_front();
        }
        let digests = self.own_digests(now);
        let heard = self.peers.get(to);
        Heartbeat {
            cluster: self.cluster,
            from: self.me.clone(),
            incarnation: self.incarnation,
            sequence: self.sequence,
            echo_incarnation: heard.map_or(0, |peer| peer.beat.incarnation),
            echo: heard.map_or(0, |peer| peer.beat.sequence),
            is_answer,
            is_in_contact: self.has_majority(now),
            is_leaving: self.leaving,
            has_tie: self.tie,
            members: digests.members,
            buckets: digests.buckets,
            sets: self.own_sets(now),
            released: self.released(now),
        }
    }

    /// Heartbeats that are due, and for whom.
    pub fn tick(&mut self, now: Duration) -> Vec<Heartbeat> {
        self.settle(now);
        if now < self.next_beat {
            return Vec::new();
        }
        self.next_beat = now + HEARTBEAT;
        let others: Vec<String> = self.members.iter().filter(|name| **name != self.me).cloned().collect();
        others.iter().map(|name| self.beat(name, false, now)).collect()
    }

    /// To whom [`Self::tick`]'s heartbeats go, in the same order.
    pub fn others(&self) -> impl Iterator<Item = &String> {
        self.members.iter().filter(|name| **name != self.me)
    }

    /// When something changes by itself.
    pub fn next(&self, now: Duration) -> Duration {
        let silent = self.peers.values().map(|peer| peer.heard + LEASE);
        let leases = self.peers.values().map(|peer| peer.lease);
        let bound = self.earlier.iter().map(|(_, until)| *until);
        let void = self.void.iter().copied().chain([self.void_members, self.starts]);
        let coming = silent.chain(leases).chain(bound).chain(void).filter(|at| *at > now);
        coming.fold(self.next_beat, Duration::min)
    }

    /// For what we may speak.
    pub fn speech(&self, now: Duration) -> Speech {
        let mut speech = Speech { addresses: BTreeSet::new(), until: now + LEASE };
        let Some(me) = self.place(&self.me).and_then(|place| u8::try_from(place).ok()) else { return speech };
        let own = self.own_digests(now);
        if self.leaving || own.members == VOID {
            return speech;
        }
        let sets = self.own_sets(now);
        let released = self.released(now);
        let voters: Vec<&Peer> =
            self.peers.values().filter(|peer| peer.lease > now && peer.beat.members == own.members).collect();
        let mut ballots: Vec<(Duration, usize)> = Vec::new();
        for order in &self.orders {
            if own.buckets[order.bucket] == u64::MAX || ballot(&sets, released, order) != Some(me) {
                continue;
            }
            ballots.clear();
            ballots.push((now + LEASE, self.weight(self.tie)));
            let for_us = voters.iter().filter(|peer| {
                peer.beat.buckets[order.bucket] == own.buckets[order.bucket]
                    && ballot(&peer.beat.sets, peer.beat.released, order) == Some(me)
            });
            ballots.extend(for_us.map(|peer| (peer.lease, self.weight(peer.beat.has_tie))));
            ballots.sort_unstable_by(|a, b| b.cmp(a));
            let mut votes = 0;
            let decisive = ballots.iter().find(|(_, weight)| {
                votes += weight;
                votes >= self.majority()
            });
            if let Some((until, _)) = decisive {
                speech.until = speech.until.min(*until);
                speech.addresses.insert(order.address);
            }
        }
        speech
    }
}
