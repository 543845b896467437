//! BGP as the wire has it: streams put together from segments, and which routes a router was told by them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use loadbalancer::bgp::attribute::Attribute;
use loadbalancer::bgp::message::Message;

pub const PORT: u16 = 179;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// One of TCP, to or from the port of BGP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub at: Duration,
    from: SocketAddr,
    to: SocketAddr,
    flags: u8,
    sequence: u32,
    data: Vec<u8>,
}

impl Segment {
    /// `None`: the frame carries something else.
    pub fn of(frame: &[u8], at: Duration) -> Option<Segment> {
        let (header, packet) = frame.split_first_chunk::<14>()?;
        let (from, to, body): (IpAddr, IpAddr, &[u8]) = match header[12..] {
            [8, 0] if *packet.get(9)? == 6 => {
                let ip = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
                let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
                (ip(12)?.into(), ip(16)?.into(), packet.get(usize::from(packet[0] & 15) * 4..length)?)
            }
            [0x86, 0xdd] if *packet.get(6)? == 6 => {
                let ip = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
                let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
                (ip(8)?.into(), ip(24)?.into(), packet.get(40..40 + length)?)
            }
            _ => return None,
        };
        let head: &[u8; 20] = body.first_chunk()?;
        let port = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let (from, to) = (SocketAddr::new(from, port(0)), SocketAddr::new(to, port(2)));
        if from.port() != PORT && to.port() != PORT {
            return None;
        }
        let sequence = u32::from_be_bytes(*head[4..].first_chunk()?);
        let data = body.get(usize::from(head[12] >> 4) * 4..)?.to_vec();
        Some(Segment { at, from, to, flags: head[13], sequence, data })
    }
}

/// One direction of a connection.
#[derive(Default)]
struct Stream {
    next: Option<u32>,
    early: BTreeMap<u32, Vec<u8>>,
    bytes: Vec<u8>,
    routes: BTreeSet<IpNet>,
}

impl Stream {
    /// Whether the sender ends the session.
    fn take(&mut self, segment: &Segment) -> bool {
        let mut is_end = false;
        if segment.flags & SYN != 0 {
            *self = Stream { next: Some(segment.sequence.wrapping_add(1)), ..Stream::default() };
        }
        if !segment.data.is_empty() {
            self.early.insert(segment.sequence, segment.data.clone());
        }
        // What is sent again was taken already.
        while let Some(next) = self.next
            && let Some(data) = self.early.remove(&next)
        {
            self.next = Some(next.wrapping_add(data.len() as u32));
            self.bytes.extend(data);
        }
        while let Ok(Some(length)) = Message::length(&self.bytes)
            && length <= self.bytes.len()
        {
            let rest = self.bytes.split_off(length);
            let whole = std::mem::replace(&mut self.bytes, rest);
            let message = Message::decode(&whole, true);
            is_end |= matches!(message, Ok(Message::Notification(_)));
            if let Ok(Message::Update(update)) = message {
                for net in update.withdrawn {
                    self.routes.remove(&IpNet::V4(net));
                }
                self.routes.extend(update.announced.into_iter().map(IpNet::V4));
                for attribute in update.attributes {
                    match attribute {
                        Attribute::Reach(_, _, nets) => self.routes.extend(nets),
                        Attribute::Unreach(_, nets) => self.routes.retain(|net| !nets.contains(net)),
                        _ => {}
                    }
                }
            }
        }
        is_end
    }
}

/// Which nodes lead a router to which networks.
pub type Table = BTreeMap<IpNet, BTreeSet<IpAddr>>;

/// What each router was told, by the router's address.
#[derive(Default)]
pub struct Tables {
    streams: BTreeMap<(SocketAddr, SocketAddr), Stream>,
}

impl Tables {
    pub fn take(&mut self, segment: &Segment) {
        let ends = (segment.from, segment.to);
        if segment.flags & SYN != 0 {
            // Who begins anew has forgotten the session before, of whose end nothing may have reached the wire.
            let hosts = [segment.from.ip(), segment.to.ip()];
            let of_both =
                self.streams.iter_mut().filter(|((a, b), _)| hosts.contains(&a.ip()) && hosts.contains(&b.ip()));
            of_both.for_each(|(_, stream)| stream.routes.clear());
        }
        let is_end = segment.flags & (FIN | RST) != 0 || self.streams.entry(ends).or_default().take(segment);
        if is_end {
            // Whoever ends it, nothing that it told is true any more.
            self.streams.remove(&ends);
            self.streams.remove(&(segment.to, segment.from));
        }
    }

    /// What the router with this address was told by nodes that are connected with it now.
    pub fn of(&self, routers: &[IpAddr]) -> Table {
        let mut table = Table::new();
        let told = self.streams.iter().filter(|((_, to), _)| routers.contains(&to.ip()));
        for ((node, _), net) in told.flat_map(|(ends, stream)| stream.routes.iter().map(move |net| (ends, net))) {
            table.entry(*net).or_default().insert(node.ip());
        }
        table
    }
}
