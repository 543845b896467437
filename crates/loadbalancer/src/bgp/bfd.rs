//! Bidirectional forwarding detection as a state machine (RFC 5880; 5881 for one hop, 5883 for several): packets and times in,
//! packets and changes out. Asynchronous mode, without echo and authentication.

use std::time::Duration;

/// Where packets of one hop go, and those of several.
pub const PORT: u16 = 3784;
pub const MULTIHOP_PORT: u16 = 4784;
/// What packets of one hop arrive with: nobody from farther away can have sent them (RFC 5881, section 5).
pub const HOPS: u8 = 255;
const LENGTH: usize = 24;
/// While it is not up, packets are rare (RFC 5880, section 6.8.3).
const SLOW: Duration = Duration::from_secs(1);
const POLL: u8 = 0x20;
const FINAL: u8 = 0x10;
const AUTHENTICATED: u8 = 0x04;
const MULTIPOINT: u8 = 0x01;
/// Diagnostics.
const EXPIRED: u8 = 1;
const NEIGHBOUR_DOWN: u8 = 3;
const ADMINISTRATIVELY_DOWN: u8 = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    pub transmit: Duration,
    pub receive: Duration,
    /// After so many packets that did not come the peer is down.
    pub multiplier: u8,
    /// The peer speaks first.
    pub is_passive: bool,
    /// Packets over several hops arrive with no fewer left.
    pub least_hops: u8,
    pub is_multihop: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    AdminDown,
    Down,
    Init,
    Up,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Out {
    Send([u8; LENGTH]),
    Up,
    Down,
}

/// A control packet (RFC 5880, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub diagnostic: u8,
    pub state: State,
    pub is_poll: bool,
    pub is_final: bool,
    pub multiplier: u8,
    pub mine: u32,
    pub yours: u32,
    pub transmit: Duration,
    pub receive: Duration,
}

impl Packet {
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let state = match self.state {
            State::AdminDown => 0,
            State::Down => 1,
            State::Init => 2,
            State::Up => 3,
        };
        bytes[0] = 1 << 5 | self.diagnostic & 0x1f;
        bytes[1] = state << 6 | if self.is_poll { POLL } else { 0 } | if self.is_final { FINAL } else { 0 };
        bytes[2] = self.multiplier;
        bytes[3] = LENGTH as u8;
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        for (at, number) in [(4, self.mine), (8, self.yours), (12, micros(self.transmit)), (16, micros(self.receive))] {
            bytes[at..at + 4].copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    /// `None`: it is to be dropped (section 6.8.6).
    pub fn decode(bytes: &[u8]) -> Option<Packet> {
        let head: &[u8; LENGTH] = bytes.first_chunk()?;
        let length = usize::from(head[3]);
        if head[0] >> 5 != 1 || length < LENGTH || length > bytes.len() || head[2] == 0 {
            return None;
        }
        if head[1] & (AUTHENTICATED | MULTIPOINT) != 0 {
            return None;
        }
        let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let micros = |at| Duration::from_micros(u64::from(number(at)));
        let state = [State::AdminDown, State::Down, State::Init, State::Up][usize::from(head[1] >> 6)];
        let (mine, yours) = (number(4), number(8));
        if mine == 0 || (yours == 0 && !matches!(state, State::Down | State::AdminDown)) {
            return None;
        }
        Some(Packet {
            diagnostic: head[0] & 0x1f,
            state,
            is_poll: head[1] & POLL != 0,
            is_final: head[1] & FINAL != 0,
            multiplier: head[2],
            mine,
            yours,
            transmit: micros(12),
            receive: micros(16),
        })
    }
}

#[derive(Debug)]
pub struct Bfd {
    timing: Timing,
    state: State,
    diagnostic: u8,
    mine: u32,
    /// Zero until the peer has spoken.
    yours: u32,
    /// What the peer said last.
    remote: Option<Packet>,
    send_at: Option<Duration>,
    expires_at: Option<Duration>,
    polls: bool,
    dice: u32,
}

impl Bfd {
    /// `mine` is another number for each session of this node, and not zero.
    pub fn new(timing: Timing, mine: u32, now: Duration) -> Bfd {
        Bfd {
            send_at: (!timing.is_passive).then_some(now),
            timing,
            state: State::Down,
            diagnostic: 0,
            mine,
            yours: 0,
            remote: None,
            expires_at: None,
            polls: false,
            dice: mine | 1,
        }
    }

    pub fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// When something is due by itself.
    pub fn next(&self) -> Option<Duration> {
        [self.send_at, self.expires_at].into_iter().flatten().min()
    }

    /// A packet of the peer's, with so many hops left.
    pub fn receive(&mut self, bytes: &[u8], hops: u8, now: Duration) -> Vec<Out> {
        let least = if self.timing.is_multihop { self.timing.least_hops } else { HOPS };
        let Some(packet) = Packet::decode(bytes).filter(|_| hops >= least) else { return Vec::new() };
        if packet.yours != 0 && packet.yours != self.mine {
            return Vec::new();
        }
        let is_first = self.remote.is_none();
        self.yours = packet.mine;
        self.remote = Some(packet);
        if packet.is_final {
            self.polls = false;
        }
        let after = match (self.state, packet.state) {
            (State::AdminDown, _) => State::AdminDown,
            (_, State::AdminDown) => State::Down,
            (State::Down, State::Down) => State::Init,
            (State::Down, State::Init) | (State::Init, State::Init | State::Up) => State::Up,
            (State::Up, State::Down) => State::Down,
            (same, _) => same,
        };
        let diagnostic = if after == State::Down { NEIGHBOUR_DOWN } else { 0 };
        let mut out = self.become_(after, diagnostic, now);
        // How long the peer may be silent (section 6.8.4).
        let each = self.timing.receive.max(packet.transmit);
        self.expires_at = Some(now + each * u32::from(packet.multiplier));
        if packet.is_poll {
            out.push(Out::Send(Packet { is_poll: false, is_final: true, ..self.packet() }.encode()));
        }
        if is_first || !out.is_empty() {
            // The peer waits for what we say now.
            self.send_at = Some(now);
        }
        out
    }

    /// What is due.
    pub fn tick(&mut self, now: Duration) -> Vec<Out> {
        let mut out = Vec::new();
        if self.expires_at.is_some_and(|at| at <= now) {
            self.expires_at = None;
            self.yours = 0;
            self.remote = None;
            out.extend(self.become_(State::Down, EXPIRED, now));
        }
        if self.send_at.is_some_and(|at| at <= now) {
            out.push(Out::Send(self.packet().encode()));
            self.send_at = self.interval().map(|interval| now + interval);
        }
        out
    }

    /// Tells the peer that this end is no failure.
    pub fn stop(&mut self) -> Out {
        (self.state, self.diagnostic) = (State::AdminDown, ADMINISTRATIVELY_DOWN);
        (self.send_at, self.expires_at, self.polls) = (None, None, false);
        Out::Send(self.packet().encode())
    }

    fn become_(&mut self, state: State, diagnostic: u8, now: Duration) -> Vec<Out> {
        let was = std::mem::replace(&mut self.state, state);
        if was == state {
            return Vec::new();
        }
        self.diagnostic = diagnostic;
        self.send_at = Some(now);
        match (was, state) {
            (_, State::Up) => {
                // The interval is another one now, which the peer has to acknowledge (section 6.5).
                self.polls = true;
                vec![Out::Up]
            }
            (State::Up, _) => vec![Out::Down],
            _ => Vec::new(),
        }
    }

    fn transmit(&self) -> Duration {
        if self.state == State::Up { self.timing.transmit } else { self.timing.transmit.max(SLOW) }
    }

    fn packet(&self) -> Packet {
        Packet {
            diagnostic: self.diagnostic,
            state: self.state,
            is_poll: self.polls,
            is_final: false,
            multiplier: self.timing.multiplier,
            mine: self.mine,
            yours: self.yours,
            transmit: self.transmit(),
            receive: self.timing.receive,
        }
    }

    /// Until the next packet, a little less than agreed so that not all speak at once (section 6.8.7). `None`: the peer wants
    /// none, or has to speak first.
    fn interval(&mut self) -> Option<Duration> {
        let wanted = match &self.remote {
            Some(remote) if remote.receive.is_zero() => return None,
            Some(remote) => remote.receive,
            None if self.timing.is_passive => return None,
            None => Duration::ZERO,
        };
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 17;
        self.dice ^= self.dice << 5;
        // From 75 to 100 in 100; no more than 90 where one lost packet is enough.
        let span = if self.timing.multiplier == 1 { 15 } else { 25 };
        let share = 75 + self.dice % (span + 1);
        Some(self.transmit().max(wanted) * share / 100)
    }
}
