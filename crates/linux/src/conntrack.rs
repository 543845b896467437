//! The kernel's connection table: list flows, delete one (linux/netfilter/nfnetlink_conntrack.h).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use crate::nft::netlink::{Attributes, NLM_F_ACK, NLM_F_DUMP, Raw, Reply, Writer, errno};

const SUBSYSTEM: u16 = 1 << 8;
const MSG_GET: u16 = SUBSYSTEM | 1;
const MSG_DELETE: u16 = SUBSYSTEM | 2;
const MSG_STATISTICS_CPU: u16 = SUBSYSTEM | 4;
const MSG_STATISTICS: u16 = SUBSYSTEM | 5;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const COUNTERS_ORIGINAL: u16 = 9;
const COUNTERS_REPLY: u16 = 10;
const ID: u16 = 12;
const ZONE: u16 = 18;
const STATUS_MASK: u16 = 26;
const SEEN_REPLY: u32 = 1 << 1;
const DNAT: u32 = 1 << 5;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Netlink(#[from] crate::nft::Error),
    #[error("the connection table refused to {doing}: {cause}; is nf_conntrack_netlink in this kernel?")]
    Refused { doing: &'static str, cause: std::io::Error },
    #[error("the connection table said nothing; retry")]
    Silent,
}

impl Error {
    /// This process may not look at the table: it has no CAP_NET_ADMIN.
    pub fn is_forbidden(&self) -> bool {
        match self {
            Error::Netlink(error) => error.is_forbidden(),
            Error::Refused { cause, .. } => cause.raw_os_error() == Some(libc::EPERM),
            Error::Silent => false,
        }
    }
}

/// What sends flows elsewhere than their clients mean, which shows in different ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Translator {
    /// Netfilter's own nat: the flow says so.
    #[default]
    Nat,
    /// IPVS: only who answers says so.
    Ipvs,
}

/// One tracked connection. `reply.0` is who really answers, whatever the client addressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// An IP protocol number.
    pub protocol: u8,
    /// Source and destination as the client sent them.
    pub original: (SocketAddr, SocketAddr),
    /// Source and destination of the answers.
    pub reply: (SocketAddr, SocketAddr),
    /// What the client sent and what it got, if the kernel counts (`net.netfilter.nf_conntrack_acct`).
    pub bytes: Option<(u64, u64)>,
    /// `IPS_…` bits of linux/netfilter/nf_conntrack_common.h.
    status: u32,
    id: u32,
    zone: Option<u16>,
}

impl Flow {
    /// It was sent elsewhere than its client meant.
    pub fn is_translated(&self) -> bool {
        self.status & DNAT != 0
    }

    /// Nobody has answered it yet, and it was sent elsewhere than its client meant.
    fn is_unanswered(&self, by: Translator) -> bool {
        match by {
            Translator::Nat => self.status & (DNAT | SEEN_REPLY) == DNAT,
            Translator::Ipvs => self.status & SEEN_REPLY == 0 && self.reply.0 != self.original.1,
        }
    }
}

/// How full the table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    pub entries: u32,
    pub limit: u32,
    /// Packets that were dropped, and flows that were given up early or could not be entered, for lack of room.
    pub dropped: u64,
}

/// What a data path needs of the connection table. The kernel implements it, and so does [`Fake`].
pub trait Conntrack: Send {
    /// The flows of one family and protocol.
    fn flows(&mut self, v6: bool, protocol: u8) -> Result<Vec<Flow>, Error>;
    /// The translated flows of both families that nobody has answered.
    fn unanswered(&mut self, protocol: u8, by: Translator) -> Result<Vec<Flow>, Error>;
    /// Forgets the flow; the next packet of it is looked at as if it were the first. No error if it has gone.
    fn delete(&mut self, flow: &Flow) -> Result<(), Error>;
}

/// The connection table of one network namespace.
pub struct Socket {
    raw: Raw,
    sequence: u32,
}

impl Socket {
    /// Opens the table of the namespace given, or of the calling thread's.
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        Ok(Socket { raw: Raw::open(namespace)?, sequence: 0 })
    }

    /// All flows that are translated.
    pub fn translated(&mut self) -> Result<Vec<Flow>, Error> {
        let mut writer = self.begin(MSG_GET, NLM_F_DUMP, libc::AF_UNSPEC)?;
        writer.u32(STATUS, DNAT);
        writer.u32(STATUS_MASK, DNAT);
        self.dump(writer, Flow::is_translated)
    }

    pub fn fill(&mut self) -> Result<Fill, Error> {
        let mut fill = Fill::default();
        let mut add = |kind: u16, flags: u16, visit: &mut dyn FnMut(&mut Fill, Attributes<'_>)| {
            let mut writer = self.begin(kind, flags, libc::AF_UNSPEC)?;
            writer.end();
            self.raw.send(&writer.buffer)?;
            let mut outcome = Err(Error::Silent);
            self.raw.replies(|reply| {
                match reply {
                    Reply::Object(attributes) => {
                        visit(&mut fill, attributes);
                        outcome = Ok(());
                    }
                    Reply::Failed { errno: number, .. } => {
                        outcome = Err(Error::Refused { doing: "tell how full it is", cause: errno(number) });
                    }
                    Reply::Ack { .. } | Reply::Done => {}
                }
                Ok(true)
            })?;
            outcome
        };
        add(MSG_STATISTICS, 0, &mut |fill, attributes| {
            fill.entries = attributes.u32(1).unwrap_or(0);
            fill.limit = attributes.u32(2).unwrap_or(0);
        })?;
        add(MSG_STATISTICS_CPU, NLM_F_DUMP, &mut |fill, attributes| {
            // Insertions that failed, packets dropped, flows dropped early; one message for each processor.
            let counts = [9, 10, 11].map(|kind| u64::from(attributes.u32(kind).unwrap_or(0)));
            fill.dropped += counts.iter().sum::<u64>();
        })?;
        Ok(fill)
    }

    fn begin(&mut self, kind: u16, flags: u16, family: i32) -> Result<Writer, Error> {
        self.raw.drain()?;
        self.sequence += 1;
        let mut writer = Writer::default();
        writer.begin(kind, flags, self.sequence, family as u8, 0);
        Ok(writer)
    }

    /// Sends what asks for a dump; the flows that came back and are wanted.
    fn dump(&mut self, mut writer: Writer, wanted: impl Fn(&Flow) -> bool) -> Result<Vec<Flow>, Error> {
        writer.end();
        self.raw.send(&writer.buffer)?;
        let mut flows = Vec::new();
        let mut outcome = Err(Error::Silent);
        self.raw.replies(|reply| {
            match reply {
                Reply::Object(attributes) => {
                    flows.extend(decode(attributes).filter(|flow| wanted(flow)));
                    return Ok(true);
                }
                Reply::Ack { .. } => return Ok(true),
                Reply::Done => outcome = Ok(()),
                Reply::Failed { errno: number, .. } => {
                    outcome = Err(Error::Refused { doing: "list flows", cause: errno(number) });
                }
            }
            Ok(false)
        })?;
        outcome.map(|()| flows)
    }
}

fn family(v6: bool) -> i32 {
    if v6 { libc::AF_INET6 } else { libc::AF_INET }
}

fn address(attributes: Attributes<'_>, v4: u16) -> Option<IpAddr> {
    if let Some(bytes) = attributes.get(v4) {
        return <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    }
    attributes.get(v4 + 2).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from)
}

fn port(attributes: Attributes<'_>, kind: u16) -> u16 {
    // Protocols without ports have none.
    attributes.get(kind).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes).unwrap_or(0)
}

pub(crate) fn tuple(attributes: Attributes<'_>) -> Option<(u8, SocketAddr, SocketAddr)> {
    let (ip, protocol) = (attributes.nested(1)?, attributes.nested(2)?);
    let source = SocketAddr::new(address(ip, 1)?, port(protocol, 2));
    let destination = SocketAddr::new(address(ip, 2)?, port(protocol, 3));
    Some((*protocol.get(1)?.first()?, source, destination))
}

fn decode(attributes: Attributes<'_>) -> Option<Flow> {
    let (protocol, from, to) = tuple(attributes.nested(TUPLE_ORIGINAL)?)?;
    let (_, reply_from, reply_to) = tuple(attributes.nested(TUPLE_REPLY)?)?;
    let zone = attributes.get(ZONE).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes);
    let (id, status) = (attributes.u32(ID).unwrap_or(0), attributes.u32(STATUS).unwrap_or(0));
    let bytes = |kind| attributes.nested(kind)?.get(2)?.try_into().ok().map(u64::from_be_bytes);
    let bytes = bytes(COUNTERS_ORIGINAL).zip(bytes(COUNTERS_REPLY));
    Some(Flow { protocol, original: (from, to), reply: (reply_from, reply_to), bytes, status, id, zone })
}

impl Conntrack for Socket {
    fn flows(&mut self, v6: bool, protocol: u8) -> Result<Vec<Flow>, Error> {
        let writer = self.begin(MSG_GET, NLM_F_DUMP, family(v6))?;
        self.dump(writer, |flow| flow.protocol == protocol)
    }

    fn unanswered(&mut self, protocol: u8, by: Translator) -> Result<Vec<Flow>, Error> {
        let mut writer = self.begin(MSG_GET, NLM_F_DUMP, libc::AF_UNSPEC)?;
        // The kernel leaves out what does not match; one that is too old to know these sends all.
        let (status, mask) = match by {
            Translator::Nat => (DNAT, DNAT | SEEN_REPLY),
            Translator::Ipvs => (0, SEEN_REPLY),
        };
        writer.u32(STATUS, status);
        writer.u32(STATUS_MASK, mask);
        self.dump(writer, |flow| flow.protocol == protocol && flow.is_unanswered(by))
    }

    fn delete(&mut self, flow: &Flow) -> Result<(), Error> {
        let (from, to) = flow.original;
        let mut writer = self.begin(MSG_DELETE, NLM_F_ACK, family(from.is_ipv6()))?;
        let tuple = writer.nest(TUPLE_ORIGINAL);
        let ip = writer.nest(1);
        for (kind, address) in [(1, from.ip()), (2, to.ip())] {
            match address {
                IpAddr::V4(address) => writer.bytes(kind, &address.octets()),
                IpAddr::V6(address) => writer.bytes(kind + 2, &address.octets()),
            }
        }
        writer.close(ip);
        let protocol = writer.nest(2);
        writer.u8(1, flow.protocol);
        writer.u16(2, from.port());
        writer.u16(3, to.port());
        writer.close(protocol);
        writer.close(tuple);
        // The id keeps a newer flow with the same addresses alive.
        writer.u32(ID, flow.id);
        if let Some(zone) = flow.zone {
            writer.u16(ZONE, zone);
        }
        writer.end();
        self.raw.send(&writer.buffer)?;
        let mut outcome = Err(Error::Silent);
        self.raw.replies(|reply| {
            match reply {
                Reply::Ack { .. } | Reply::Done | Reply::Failed { errno: libc::ENOENT, .. } => outcome = Ok(()),
                Reply::Failed { errno: number, .. } => {
                    outcome = Err(Error::Refused { doing: "delete a flow", cause: errno(number) });
                }
                Reply::Object(_) => {}
            }
            Ok(true)
        })?;
        outcome
    }
}

/// A connection table that is a list.
#[derive(Default)]
pub struct Fake {
    pub flows: Vec<Flow>,
}

impl Fake {
    pub fn add(&mut self, protocol: u8, original: (SocketAddr, SocketAddr), reply: (SocketAddr, SocketAddr)) {
        let id = self.flows.len() as u32;
        // Translated if somebody else answers than was asked.
        let status = if original.1 == reply.0 { 0 } else { DNAT };
        self.flows.push(Flow { protocol, original, reply, bytes: None, status, id, zone: None });
    }
}

impl Conntrack for Fake {
    fn flows(&mut self, v6: bool, protocol: u8) -> Result<Vec<Flow>, Error> {
        let wanted = |flow: &&Flow| flow.protocol == protocol && flow.original.0.is_ipv6() == v6;
        Ok(self.flows.iter().filter(wanted).cloned().collect())
    }

    fn unanswered(&mut self, protocol: u8, by: Translator) -> Result<Vec<Flow>, Error> {
        let wanted = |flow: &&Flow| flow.protocol == protocol && flow.is_unanswered(by);
        Ok(self.flows.iter().filter(wanted).cloned().collect())
    }

    fn delete(&mut self, flow: &Flow) -> Result<(), Error> {
        self.flows.retain(|held| held != flow);
        Ok(())
    }
}
