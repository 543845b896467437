//! How connections to endpoints go, as the programs count it: the maps of `watch.h` as values.

use std::net::SocketAddr;
use std::time::Duration;

use linux::bpf::{self, Kernel, Layout};
use services::Protocol;

use super::layout::{FLOWS, Reader, write_address};
use crate::Error;

pub const CONTACTS: Layout = Layout { name: "contacts", key_size: 40, value_size: 96, limit: 1 << 16 };
pub const SETTINGS: Layout = Layout { name: "settings", key_size: 4, value_size: 16, limit: 1 };
pub const LISTENERS: Layout = Layout { name: "listeners", key_size: 20, value_size: 4, limit: 1 << 14 };
pub const REJECTED: Layout = Layout { name: "rejected", key_size: 20, value_size: 8, limit: 1 << 14 };
/// The ring of events.
pub const EVENTS: &str = "events";

/// An address that clients asked for, and the endpoint they were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pair {
    pub protocol: Protocol,
    pub asked: SocketAddr,
    pub given: SocketAddr,
}

/// What came of it. Times are of the clock of `linux::bpf::now`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contact {
    /// When the first of the SYNs was sent that no answer has followed.
    pub asked_at: Option<Duration>,
    pub answered_at: Duration,
    /// Connections, or UDP flows; and of the former, those answered and those refused.
    pub begun: u64,
    pub answered: u64,
    pub refused: u64,
    /// Clients that were sent to another endpoint after this one.
    pub retried: u64,
    /// Sockets of this node: those that are open, those that ended without both sides having closed.
    pub open: u64,
    pub resets: u64,
    /// What they carried until they ended.
    pub sent: u64,
    pub received: u64,
    /// All together, from first SYN to answer.
    pub waited: Duration,
}

fn pair(reader: &mut Reader<'_>) -> Option<Pair> {
    let (asked, given) = (reader.address(), reader.address());
    let (asked_port, given_port) = (reader.port(), reader.port());
    let protocol = Protocol::from_number(reader.take::<4>()[0])?;
    Some(Pair { protocol, asked: (asked, asked_port).into(), given: (given, given_port).into() })
}

/// Everything that was counted.
pub fn contacts(kernel: &mut dyn Kernel) -> Result<Vec<(Pair, Contact)>, Error> {
    let bpf::Entries { keys, values } = kernel.entries(CONTACTS.name)?;
    let entries = keys.chunks(CONTACTS.key_size).zip(values.chunks(CONTACTS.value_size));
    Ok(entries.filter_map(|(key, value)| Some((pair(&mut Reader(key))?, contact(value)))).collect())
}

fn contact(bytes: &[u8]) -> Contact {
    let mut reader = Reader(bytes);
    let (asked_at, answered_at, _told_at) = (reader.long(), reader.long(), reader.long());
    Contact {
        asked_at: (asked_at > 0).then(|| Duration::from_nanos(asked_at)),
        answered_at: Duration::from_nanos(answered_at),
        begun: reader.long(),
        answered: reader.long(),
        refused: reader.long(),
        retried: reader.long(),
        open: reader.long(),
        resets: reader.long(),
        sent: reader.long(),
        received: reader.long(),
        waited: Duration::from_nanos(reader.long()),
    }
}

/// Connections and first packets that found no endpoint, by the address that they asked for.
pub fn rejections(kernel: &mut dyn Kernel) -> Result<Vec<(Protocol, SocketAddr, u64)>, Error> {
    let bpf::Entries { keys, values } = kernel.entries(REJECTED.name)?;
    let entries = keys.chunks(REJECTED.key_size).zip(values.chunks(REJECTED.value_size));
    let rejection = |(key, value): (&[u8], &[u8])| {
        let mut reader = Reader(key);
        let address = SocketAddr::new(reader.address(), reader.port());
        Some((Protocol::from_number(reader.take::<2>()[0])?, address, Reader(value).long()))
    };
    Ok(entries.filter_map(rejection).collect())
}

/// One direction of a connection whose packets are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub client: SocketAddr,
    pub pair: Pair,
    /// From the endpoint, not to it.
    pub is_answer: bool,
    /// A FIN or a RST has gone this way.
    pub is_closed: bool,
    /// With IP headers.
    pub bytes: u64,
    /// When its last packet was seen.
    pub seen: Duration,
}

/// Bits of `enum flow_flags`.
pub(super) mod flow_flag {
    pub const PICKED: u32 = 1;
    pub const ANSWER: u32 = 2;
    pub const ANSWERED: u32 = 4;
    pub const MOVED: u32 = 16;
    pub const CLOSED: u32 = 32;
}

/// The connections from outside, and others that no program saw connect. What masquerades them is left out, and so are
/// sockets that were given another endpoint: they are counted as sockets.
pub fn flows(kernel: &mut dyn Kernel) -> Result<Vec<Flow>, Error> {
    let bpf::Entries { keys, values } = kernel.entries(FLOWS.name)?;
    let entries = keys.chunks(FLOWS.key_size).zip(values.chunks(FLOWS.value_size));
    Ok(entries.filter_map(|(key, value)| flow(key, value)).collect())
}

fn flow(key: &[u8], value: &[u8]) -> Option<Flow> {
    let mut reader = Reader(key);
    let (source, destination) = (reader.address(), reader.address());
    let (source, destination): (SocketAddr, SocketAddr) =
        ((source, reader.port()).into(), (destination, reader.port()).into());
    let protocol = Protocol::from_number(reader.take::<4>()[0])?;
    let mut reader = Reader(value);
    let (to, port) = (reader.address(), reader.port());
    let to = SocketAddr::new(to, port);
    reader.take::<6>();
    let (_id, flags, bytes, seen) = (reader.number(), reader.number(), reader.long(), reader.long());
    let (client, asked, given) = match flags & (flow_flag::PICKED | flow_flag::ANSWER | flow_flag::MOVED) {
        flow_flag::PICKED => (source, destination, to),
        flow_flag::ANSWER => (destination, to, source),
        _ => return None,
    };
    Some(Flow {
        client,
        pair: Pair { protocol, asked, given },
        is_answer: flags & flow_flag::ANSWER != 0,
        is_closed: flags & flow_flag::CLOSED != 0,
        bytes,
        seen: Duration::from_nanos(seen),
    })
}

/// What the programs tell at once, `enum event_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// There are new connections, this one among them.
    Begun,
    /// A SYN was refused.
    Refused(Pair),
}

impl Event {
    /// `None`: not of our making.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes.get(..CONTACTS.key_size + 8)?);
        let pair = pair(&mut reader)?;
        match reader.number() {
            1 => Some(Event::Begun),
            2 => Some(Event::Refused(pair)),
            _ => None,
        }
    }
}

/// What the programs are to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub counts: bool,
    /// Clients hear of every refusal.
    pub passes_refusals: bool,
    /// Of the first SYN of sockets that are sent to an endpoint; `None`: the kernel's own.
    pub first_timeout: Option<Duration>,
}

impl Settings {
    pub fn put(&self, kernel: &mut dyn Kernel) -> Result<(), Error> {
        let ticks = |time: Duration| time.as_nanos().div_ceil(bpf::tick().as_nanos().max(1)) as u32;
        let numbers = [u32::from(self.counts), u32::from(self.passes_refusals), self.first_timeout.map_or(0, ticks), 0];
        let values = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        Ok(kernel.put(SETTINGS.name, &bpf::Entries { keys: 0_u32.to_ne_bytes().to_vec(), values })?)
    }
}

/// Bits of what the programs know of a listener of this node, `enum listener_flags`.
pub mod listener {
    pub const HERE: u32 = 1;
    pub const FROZEN: u32 = 2;
}

/// Listeners of this node that the programs know.
pub fn listeners(kernel: &mut dyn Kernel) -> Result<Vec<(SocketAddr, u32)>, Error> {
    let bpf::Entries { keys, values } = kernel.entries(LISTENERS.name)?;
    let entries = keys.chunks(LISTENERS.key_size).zip(values.chunks(LISTENERS.value_size));
    let listener = |(key, value)| {
        let mut reader = Reader(key);
        let ip = reader.address();
        (SocketAddr::new(ip, reader.port()), Reader(value).number())
    };
    Ok(entries.map(listener).collect())
}

/// Changes them; without a bit one is not known.
pub fn set_listeners(kernel: &mut dyn Kernel, changes: &[(SocketAddr, u32)]) -> Result<(), Error> {
    let mut gone = Vec::new();
    let mut put = bpf::Entries::default();
    for (address, flags) in changes {
        let keys = if *flags == 0 { &mut gone } else { &mut put.keys };
        write_address(keys, address.ip());
        keys.extend(address.port().to_be_bytes());
        keys.extend([0; 2]);
        if *flags != 0 {
            put.values.extend(flags.to_ne_bytes());
        }
    }
    kernel.remove(LISTENERS.name, &gone)?;
    Ok(kernel.put(LISTENERS.name, &put)?)
}
