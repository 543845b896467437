//! Which TCP connections to an endpoint are open, as the node's connection table sees them.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use crate::conntrack::{Error, tuple};
use crate::nft::netlink::{Attributes, NLM_F_DUMP, Raw, Reply, Writer, errno};

const MSG_GET: u16 = 1 << 8 | 1;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const PROTOINFO: u16 = 4;
const FILTER: u16 = 25;
const FILTER_REPLY: u16 = 2;
const FILTER_IP_SOURCE: u32 = 1 << 0;
const FILTER_PROTOCOL: u32 = 1 << 3;
const TCP: u8 = 6;
/// linux/netfilter/nf_conntrack_tcp.h: from here on both sides have closed, or one has reset.
const LAST_ACK: u8 = 6;
/// Both sides have sent a SYN.
const SYN_SENT2: u8 = 9;

/// One open connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    pub client: SocketAddr,
    /// Whom the client called.
    pub called: SocketAddr,
    /// Who answers.
    pub endpoint: SocketAddr,
    /// Where the answers go first: not to the client if it is masqueraded.
    pub answered: SocketAddr,
}

impl Connection {
    /// This node sent it elsewhere than its client meant, as it does for a Service.
    pub fn is_translated(&self) -> bool {
        self.called != self.endpoint
    }
}

/// The connection table of one network namespace.
pub struct Connections {
    raw: Raw,
    sequence: u32,
}

impl Connections {
    /// Opens the table of the namespace given, or of the calling thread's.
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        Ok(Connections { raw: Raw::open(namespace)?, sequence: 0 })
    }

    /// The TCP connections that this address answers and that are not closed on both sides. One look walks the kernel's whole
    /// table, but only what fits is copied (of IPv6, all of TCP).
    pub fn open_to(&mut self, endpoint: IpAddr) -> Result<Vec<Connection>, Error> {
        self.raw.drain()?;
        self.sequence += 1;
        let mut writer = Writer::default();
        let family = if endpoint.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
        writer.begin(MSG_GET, NLM_F_DUMP, self.sequence, family as u8, 0);
        let reply = writer.nest(TUPLE_REPLY);
        let mut flags = FILTER_PROTOCOL;
        // Of IPv6 addresses the kernel's filter (6.18 still) leaves out just those that are asked for.
        if let IpAddr::V4(address) = endpoint {
            let ip = writer.nest(1);
            writer.bytes(1, &address.octets());
            writer.close(ip);
            flags |= FILTER_IP_SOURCE;
        }
        let protocol = writer.nest(2);
        writer.u8(1, TCP);
        writer.close(protocol);
        writer.close(reply);
        // A kernel before 5.8 does not know the filter and sends everything.
        let filter = writer.nest(FILTER);
        writer.bytes(FILTER_REPLY, &flags.to_ne_bytes());
        writer.close(filter);
        writer.end();
        self.raw.send(&writer.buffer)?;
        let mut open = Vec::new();
        let mut outcome = Err(Error::Silent);
        self.raw.replies(|reply| {
            match reply {
                Reply::Object(attributes) => {
                    open.extend(decode(attributes).filter(|connection| connection.endpoint.ip() == endpoint));
                    return Ok(true);
                }
                Reply::Ack { .. } => return Ok(true),
                Reply::Done => outcome = Ok(()),
                Reply::Failed { errno: number, .. } => {
                    outcome = Err(Error::Refused { doing: "list connections", cause: errno(number) });
                }
            }
            Ok(false)
        })?;
        outcome.map(|()| open)
    }
}

fn decode(attributes: Attributes<'_>) -> Option<Connection> {
    let (protocol, client, called) = tuple(attributes.nested(TUPLE_ORIGINAL)?)?;
    let (_, endpoint, answered) = tuple(attributes.nested(TUPLE_REPLY)?)?;
    let state = *attributes.nested(PROTOINFO)?.nested(1)?.get(1)?.first()?;
    let is_open = state < LAST_ACK || state == SYN_SENT2;
    (protocol == TCP && is_open).then_some(Connection { client, called, endpoint, answered })
}
