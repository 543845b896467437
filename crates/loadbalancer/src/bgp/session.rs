//! One session with a BGP peer as a state machine (RFC 4271, section 8): events and times in, actions out. No clock, no I/O.
//!
//! It opens a connection or, if it is passive, waits for one; never both, so that two connections never collide. It takes no
//! routes: what a peer announces is read and forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::capability::{Capability, Family};
use super::message::{AS_TRANS, Message, Notification, Open, Update};
use super::update::{Frame, Path, Routes, updates};

/// How long an OPEN is waited for.
const OPENING: Duration = Duration::from_secs(240);
/// The field of an OPEN has twelve bits (RFC 4724).
const LONGEST_RESTART: u64 = 4095;

/// Of which AS the peer has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAs {
    Number(u32),
    /// Of ours.
    Internal,
    /// Of any other.
    External,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub local_as: u32,
    pub peer_as: PeerAs,
    pub router_id: Ipv4Addr,
    /// Zero: the session never ends by silence.
    pub hold_time: Duration,
    /// A third of the hold time, or less.
    pub keepalive: Option<Duration>,
    /// After so long a connection that failed is tried again.
    pub connect_retry: Duration,
    pub families: BTreeSet<Family>,
    /// Where routes lead: this node's addresses. For the family of the session, the address that it is from.
    pub next_hops: BTreeMap<Family, IpAddr>,
    /// The peer opens the connection.
    pub is_passive: bool,
    /// For how long the peer is to keep routes while this node starts again.
    pub restart_time: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// From this address of ours.
    Connected(IpAddr),
    Received(&'a [u8]),
    /// The connection ended, or there was none.
    Closed,
    /// BFD says that the peer cannot be reached.
    Unreachable,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Connect,
    Send(Vec<u8>),
    Close,
    Up,
    /// Why.
    Down(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Connecting,
    OpenSent,
    OpenConfirm,
    Established,
}

#[derive(Debug)]
pub struct Session {
    settings: Settings,
    state: State,
    /// Bytes that are not a whole message yet.
    buffer: Vec<u8>,
    local: IpAddr,
    frame: Frame,
    hold: Duration,
    keepalive: Duration,
    hold_at: Option<Duration>,
    keepalive_at: Option<Duration>,
    retry_at: Option<Duration>,
    wanted: Routes,
    told: Routes,
    /// No peer has heard all routes since this process began.
    has_restarted: bool,
    updates: u64,
}

impl Session {
    pub fn new(settings: Settings, now: Duration) -> Session {
        Session {
            retry_at: (!settings.is_passive).then_some(now),
            settings,
            state: State::Idle,
            buffer: Vec::new(),
            local: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            frame: Frame::default(),
            hold: Duration::ZERO,
            keepalive: Duration::ZERO,
            hold_at: None,
            keepalive_at: None,
            wanted: Routes::new(),
            told: Routes::new(),
            has_restarted: true,
            updates: 0,
        }
    }

    pub fn is_established(&self) -> bool {
        self.state == State::Established
    }

    /// UPDATE messages that were sent, and prefixes that the peer has from us.
    pub fn counts(&self) -> (u64, u64) {
        (self.updates, self.told.len() as u64)
    }

    /// When something is due by itself.
    pub fn next(&self) -> Option<Duration> {
        [self.hold_at, self.keepalive_at, self.retry_at].into_iter().flatten().min()
    }

    pub fn handle(&mut self, event: Event<'_>, now: Duration) -> Vec<Action> {
        match event {
            Event::Connected(local) => self.open(local, now),
            Event::Received(bytes) => {
                self.buffer.extend(bytes);
                let mut actions = Vec::new();
                loop {
                    match self.next_message() {
                        Ok(Some(message)) => actions.extend(self.take(message, now)),
                        Ok(None) => return actions,
                        Err(notification) => {
                            actions.extend(self.fail(notification, now));
                            return actions;
                        }
                    }
                }
            }
            Event::Closed => self.end("the connection ended".into(), now),
            // The peer hears nothing either way; its own BFD tells it.
            Event::Unreachable if self.state == State::Established => self.fail(Notification::new(6, 10), now),
            Event::Unreachable => Vec::new(),
        }
    }

    /// What is due.
    pub fn tick(&mut self, now: Duration) -> Vec<Action> {
        let is_due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        if is_due(self.hold_at) {
            return self.fail(Notification::new(4, 0), now);
        }
        if is_due(self.retry_at) && self.state == State::Idle {
            self.retry_at = None;
            self.state = State::Connecting;
            return vec![Action::Connect];
        }
        if is_due(self.keepalive_at) {
            self.keepalive_at = Some(now + self.keepalive);
            return vec![Action::Send(Message::Keepalive.encode(true))];
        }
        Vec::new()
    }

    /// From now on these are told, and no others.
    pub fn set_routes(&mut self, routes: Routes) -> Vec<Action> {
        self.wanted = routes;
        if self.state == State::Established { self.tell() } else { Vec::new() }
    }

    /// Ends for good. Where the peer keeps routes over a restart it is told nothing (RFC 4724, section 4).
    pub fn stop(&mut self) -> Vec<Action> {
        let keeps = self.settings.restart_time.is_some();
        let was = std::mem::replace(&mut self.state, State::Idle);
        (self.retry_at, self.hold_at, self.keepalive_at) = (None, None, None);
        match was {
            State::Idle => Vec::new(),
            State::Connecting => vec![Action::Close],
            State::Established if keeps => vec![Action::Close],
            _ => vec![Action::Send(Message::Notification(Notification::new(6, 2)).encode(true)), Action::Close],
        }
    }

    fn open(&mut self, local: IpAddr, now: Duration) -> Vec<Action> {
        let expected = if self.settings.is_passive { State::Idle } else { State::Connecting };
        if self.state != expected {
            // The peer connected twice: what there is goes on.
            return vec![];
        }
        self.local = local;
        self.buffer.clear();
        self.state = State::OpenSent;
        self.hold_at = Some(now + OPENING);
        let families: Vec<Family> = self.families().keys().copied().collect();
        let mut capabilities: Vec<Capability> = families.iter().copied().map(Capability::Multiprotocol).collect();
        capabilities.push(Capability::RouteRefresh);
        capabilities.push(Capability::FourOctetAs(self.settings.local_as));
        if let Some(time) = self.settings.restart_time {
            capabilities.push(Capability::GracefulRestart {
                restarted: self.has_restarted,
                seconds: time.as_secs().min(LONGEST_RESTART) as u16,
                families: families.into_iter().map(|family| (family, true)).collect(),
            });
        }
        let open = Open {
            asn: u16::try_from(self.settings.local_as).unwrap_or(AS_TRANS),
            hold_time: u16::try_from(self.settings.hold_time.as_secs()).unwrap_or(u16::MAX),
            router_id: self.settings.router_id,
            capabilities,
        };
        vec![Action::Send(Message::Open(open).encode(true))]
    }

    /// The families that we speak here: those whose routes lead somewhere.
    fn families(&self) -> BTreeMap<Family, IpAddr> {
        let next_hop = |family: &Family| match Family::of(self.local) == *family {
            true => Some(self.local),
            false => self.settings.next_hops.get(family).copied(),
        };
        self.settings.families.iter().filter_map(|family| Some((*family, next_hop(family)?))).collect()
    }

    fn next_message(&mut self) -> Result<Option<Message>, Notification> {
        let Some(length) = Message::length(&self.buffer)?.filter(|length| *length <= self.buffer.len()) else {
            return Ok(None);
        };
        let bytes: Vec<u8> = self.buffer.drain(..length).collect();
        Message::decode(&bytes, self.frame.is_wide).map(Some)
    }

    fn take(&mut self, message: Message, now: Duration) -> Vec<Action> {
        if let Message::Notification(notification) = message {
            return self.end(format!("the peer says: {}", notification.text()), now);
        }
        match (self.state, message) {
            (State::OpenSent, Message::Open(open)) => self.agree(&open, now),
            (State::OpenConfirm, Message::Keepalive) => {
                self.state = State::Established;
                self.heard(now);
                self.told.clear();
                let mut actions = vec![Action::Up];
                actions.extend(self.tell());
                let families: Vec<Family> = self.frame.next_hops.keys().copied().collect();
                for family in families {
                    let end = Message::Update(Update::end_of_rib(family));
                    actions.push(Action::Send(end.encode(self.frame.is_wide)));
                }
                self.has_restarted = false;
                actions
            }
            (State::Established, Message::Keepalive | Message::Update(_)) => {
                self.heard(now);
                Vec::new()
            }
            (State::Established, Message::RouteRefresh(family, sub)) => {
                self.heard(now);
                if let Some(family) = Family::numbered(family, sub) {
                    self.told.retain(|net, _| Family::of(net.addr()) != family);
                }
                self.tell()
            }
            // The number says in which state that was (RFC 6608).
            (State::OpenSent, _) => self.fail(Notification::new(5, 1), now),
            (State::OpenConfirm, _) => self.fail(Notification::new(5, 2), now),
            (State::Established, _) => self.fail(Notification::new(5, 3), now),
            (State::Idle | State::Connecting, _) => Vec::new(),
        }
    }

    /// Takes the peer's OPEN.
    fn agree(&mut self, open: &Open, now: Duration) -> Vec<Action> {
        let asn = open.full_asn();
        let local_as = self.settings.local_as;
        let is_expected = match self.settings.peer_as {
            PeerAs::Number(number) => asn == number,
            PeerAs::Internal => asn == local_as,
            PeerAs::External => asn != local_as && asn != 0,
        };
        if !is_expected {
            return self.fail(Notification::new(2, 2), now);
        }
        let is_internal = asn == local_as;
        if open.router_id.is_unspecified() || (is_internal && open.router_id == self.settings.router_id) {
            return self.fail(Notification::new(2, 3), now);
        }
        if matches!(open.hold_time, 1 | 2) {
            return self.fail(Notification::new(2, 6), now);
        }
        let spoken: BTreeSet<Family> = open
            .capabilities
            .iter()
            .filter_map(|one| if let Capability::Multiprotocol(family) = one { Some(*family) } else { None })
            .collect();
        let mut next_hops = self.families();
        // Who says nothing of families speaks IPv4.
        next_hops.retain(|family, _| spoken.contains(family) || (spoken.is_empty() && *family == Family::Ipv4));
        self.frame = Frame { local_as, is_internal, is_wide: open.has_wide_asns(), next_hops };
        self.hold = self.settings.hold_time.min(Duration::from_secs(u64::from(open.hold_time)));
        let third = self.hold / 3;
        self.keepalive = self.settings.keepalive.map_or(third, |wanted| wanted.min(third));
        self.state = State::OpenConfirm;
        self.keepalive_at = (!self.hold.is_zero()).then(|| now + self.keepalive);
        self.heard(now);
        vec![Action::Send(Message::Keepalive.encode(true))]
    }

    fn heard(&mut self, now: Duration) {
        self.hold_at = (!self.hold.is_zero()).then(|| now + self.hold);
    }

    /// The messages from what the peer was told to what it is to be told.
    fn tell(&mut self) -> Vec<Action> {
        let wanted = self.wanted.iter().filter(|(net, _)| self.frame.next_hops.contains_key(&Family::of(net.addr())));
        let wanted: Routes = wanted.map(|(net, path): (_, &Path)| (*net, path.clone())).collect();
        let messages = updates(&self.told, &wanted, &self.frame);
        self.told = wanted;
        self.updates += messages.len() as u64;
        messages.into_iter().map(|one| Action::Send(Message::Update(one).encode(self.frame.is_wide))).collect()
    }

    /// Tells the peer what is wrong, and ends.
    fn fail(&mut self, notification: Notification, now: Duration) -> Vec<Action> {
        let reason = notification.text();
        let mut actions = Vec::new();
        if matches!(self.state, State::OpenSent | State::OpenConfirm | State::Established) {
            actions.push(Action::Send(Message::Notification(notification).encode(true)));
        }
        actions.extend(self.end(reason, now));
        actions
    }

    fn end(&mut self, reason: String, now: Duration) -> Vec<Action> {
        if self.state == State::Idle {
            return Vec::new();
        }
        let was = std::mem::replace(&mut self.state, State::Idle);
        self.buffer.clear();
        self.told.clear();
        self.frame.is_wide = false;
        (self.hold_at, self.keepalive_at) = (None, None);
        self.retry_at = (!self.settings.is_passive).then(|| now + self.settings.connect_retry);
        match was {
            State::Connecting => vec![Action::Close],
            // Why it did not come to be is worth to be told, too.
            _ => vec![Action::Close, Action::Down(reason)],
        }
    }
}
