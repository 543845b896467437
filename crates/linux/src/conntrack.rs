//! The kernel's connection table: list flows, delete one (linux/netfilter/nfnetlink_conntrack.h).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use crate::nft::netlink::{Attributes, NLM_F_ACK, NLM_F_DUMP, Raw, Reply, Writer, errno};

const SUBSYSTEM: u16 = 1 << 8;
const MSG_GET: u16 = SUBSYSTEM | 1;
const MSG_DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
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

/// One tracked connection. `reply.0` is who really answers, whatever the client addressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// An IP protocol number.
    pub protocol: u8,
    /// Source and destination as the client sent them.
    pub original: (SocketAddr, SocketAddr),
    /// Source and destination of the answers.
    pub reply: (SocketAddr, SocketAddr),
    /// `IPS_…` bits of linux/netfilter/nf_conntrack_common.h.
    status: u32,
    id: u32,
    zone: Option<u16>,
}

impl Flow {
    /// Nobody has answered it yet, and it was sent elsewhere than its client meant.
    fn is_unanswered(&self) -> bool {
        self.status & (DNAT | SEEN_REPLY) == DNAT
    }
}

/// What a data path needs of the connection table. The kernel implements it, and so does [`Fake`].
pub trait Conntrack: Send {
    /// The flows of one family and protocol.
    fn flows(&mut self, v6: bool, protocol: u8) -> Result<Vec<Flow>, Error>;
    /// The translated flows of both families that nobody has answered.
    fn unanswered(&mut self, protocol: u8) -> Result<Vec<Flow>, Error>;
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
    Some(Flow { protocol, original: (from, to), reply: (reply_from, reply_to), status, id, zone })
}

impl Conntrack for Socket {
    fn flows(&mut self, v6: bool, protocol: u8) -> Result<Vec<Flow>, Error> {
        let writer = self.begin(MSG_GET, NLM_F_DUMP, family(v6))?;
        self.dump(writer, |flow| flow.protocol == protocol)
    }

    fn unanswered(&mut self, protocol: u8) -> Result<Vec<Flow>, Error> {
        let mut writer = self.begin(MSG_GET, NLM_F_DUMP, libc::AF_UNSPEC)?;
        // The kernel leaves out what does not match; one that is too old to know these sends all.
        writer.u32(STATUS, DNAT);
        writer.u32(STATUS_MASK, DNAT | SEEN_REPLY);
        self.dump(writer, |flow| flow.protocol == protocol && flow.is_unanswered())
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
        self.flows.push(Flow { protocol, original, reply, status, id, zone: None });
    }
}

impl Conntrack for Fake {
    fn flows(&mut self, v6: bool, protocol: u8) -> Result<Vec<Flow>, Error> {
        let wanted = |flow: &&Flow| flow.protocol == protocol && flow.original.0.is_ipv6() == v6;
        Ok(self.flows.iter().filter(wanted).cloned().collect())
    }

    fn unanswered(&mut self, protocol: u8) -> Result<Vec<Flow>, Error> {
        let wanted = |flow: &&Flow| flow.protocol == protocol && flow.is_unanswered();
        Ok(self.flows.iter().filter(wanted).cloned().collect())
    }

    fn delete(&mut self, flow: &Flow) -> Result<(), Error> {
        self.flows.retain(|held| held != flow);
        Ok(())
    }
}
