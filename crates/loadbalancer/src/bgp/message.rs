//! BGP messages as values and bytes (RFC 4271, section 4; RFC 2918 for ROUTE-REFRESH).

use std::net::Ipv4Addr;

use super::attribute::Attribute;
use super::capability::{Capability, Family};
use super::prefix;

/// Marker, length and type.
pub const HEADER: usize = 19;
pub const LONGEST: usize = 4096;
/// Stands for an AS number that has no place in two bytes (RFC 6793).
pub const AS_TRANS: u16 = 23456;
const VERSION: u8 = 4;
/// The optional parameter of an OPEN that holds capabilities (RFC 5492).
const CAPABILITIES: u8 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Open(Open),
    Update(Update),
    Notification(Notification),
    Keepalive,
    /// Address family and subsequent family as they stand there.
    RouteRefresh(u16, u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// As the fixed field says; one that does not fit there is in a capability.
    pub asn: u16,
    /// Seconds.
    pub hold_time: u16,
    pub router_id: Ipv4Addr,
    pub capabilities: Vec<Capability>,
}

impl Open {
    /// The AS number, wherever it stands.
    pub fn full_asn(&self) -> u32 {
        let wide = self.capabilities.iter().find_map(|one| match one {
            Capability::FourOctetAs(asn) => Some(*asn),
            _ => None,
        });
        wide.unwrap_or(u32::from(self.asn))
    }

    pub fn has_wide_asns(&self) -> bool {
        self.capabilities.iter().any(|one| matches!(one, Capability::FourOctetAs(_)))
    }
}

/// IPv4 prefixes stand in the message itself, others in attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    pub withdrawn: Vec<ipnet::Ipv4Net>,
    pub attributes: Vec<Attribute>,
    pub announced: Vec<ipnet::Ipv4Net>,
}

impl Update {
    /// Tells that all routes of a family were told (RFC 4724, section 2).
    pub fn end_of_rib(family: Family) -> Update {
        match family {
            Family::Ipv4 => Update::default(),
            Family::Ipv6 => Update { attributes: vec![Attribute::Unreach(family, Vec::new())], ..Update::default() },
        }
    }
}

/// Why a session ends: what a NOTIFICATION says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    pub code: u8,
    pub subcode: u8,
    pub data: Vec<u8>,
}

impl Notification {
    pub fn new(code: u8, subcode: u8) -> Notification {
        Notification { code, subcode, data: Vec::new() }
    }

    /// In the RFC's words.
    pub fn text(&self) -> String {
        let code = match self.code {
            1 => "message header error",
            2 => "OPEN message error",
            3 => "UPDATE message error",
            4 => "hold timer expired",
            5 => "finite state machine error",
            6 => "cease",
            _ => "unknown error",
        };
        let detail = match (self.code, self.subcode) {
            (2, 1) => ": unsupported version",
            (2, 2) => ": bad peer AS",
            (2, 3) => ": bad BGP identifier",
            (2, 6) => ": unacceptable hold time",
            (2, 7) => ": unsupported capability",
            (6, 1) => ": too many prefixes",
            (6, 2) => ": administrative shutdown",
            (6, 3) => ": peer de-configured",
            (6, 4) => ": administrative reset",
            (6, 5) => ": connection rejected",
            (6, 7) => ": connection collision",
            (6, 9) => ": hard reset",
            (6, 10) => ": BFD down",
            _ => "",
        };
        format!("{code}{detail} ({}/{})", self.code, self.subcode)
    }
}

impl Message {
    /// `wide`: AS numbers in paths have four bytes, as both sides said (RFC 6793).
    pub fn encode(&self, wide: bool) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            Message::Open(open) => {
                body.push(VERSION);
                body.extend(open.asn.to_be_bytes());
                body.extend(open.hold_time.to_be_bytes());
                body.extend(open.router_id.octets());
                let mut all = Vec::new();
                open.capabilities.iter().for_each(|one| one.encode(&mut all));
                if all.is_empty() {
                    body.push(0);
                } else {
                    // Ours are few: their lengths fit into one byte.
                    body.extend([all.len() as u8 + 2, CAPABILITIES, all.len() as u8]);
                    body.extend(all);
                }
                1
            }
            Message::Update(update) => {
                let mut part = Vec::new();
                update.withdrawn.iter().for_each(|net| prefix::encode((*net).into(), &mut part));
                body.extend((part.len() as u16).to_be_bytes());
                body.append(&mut part);
                update.attributes.iter().for_each(|one| one.encode(wide, &mut part));
                body.extend((part.len() as u16).to_be_bytes());
                body.append(&mut part);
                update.announced.iter().for_each(|net| prefix::encode((*net).into(), &mut body));
                2
            }
            Message::Notification(notification) => {
                body.extend([notification.code, notification.subcode]);
                body.extend(&notification.data);
                3
            }
            Message::Keepalive => 4,
            Message::RouteRefresh(family, sub) => {
                body.extend(family.to_be_bytes());
                body.extend([0, *sub]);
                5
            }
        };
        let mut bytes = vec![0xff; 16];
        bytes.extend(((HEADER + body.len()) as u16).to_be_bytes());
        bytes.push(kind);
        bytes.extend(body);
        bytes
    }

    /// The length of the message that begins here, as soon as its header is whole.
    ///
    /// # Errors
    /// What the other side is to be told.
    pub fn length(bytes: &[u8]) -> Result<Option<usize>, Notification> {
        let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        if header[..16].iter().any(|byte| *byte != 0xff) {
            return Err(Notification::new(1, 1));
        }
        let raw = [header[16], header[17]];
        let length = usize::from(u16::from_be_bytes(raw));
        let shortest = match header[18] {
            1 => 29,
            2 => 23,
            3 => 21,
            4 => HEADER,
            5 => 23,
            kind => return Err(Notification { data: vec![kind], ..Notification::new(1, 3) }),
        };
        let longest = if header[18] == 4 { HEADER } else { LONGEST };
        if length < shortest || length > longest {
            return Err(Notification { data: raw.to_vec(), ..Notification::new(1, 2) });
        }
        Ok(Some(length))
    }

    /// One whole message, header included.
    ///
    /// # Errors
    /// What the other side is to be told. Attributes that make no sense are left out: we take no routes from anybody, and a
    /// session outlives them (RFC 7606).
    pub fn decode(bytes: &[u8], wide: bool) -> Result<Message, Notification> {
        let length = Message::length(bytes)?.filter(|length| *length == bytes.len());
        let body = length.and_then(|_| bytes.get(HEADER..)).ok_or(Notification::new(1, 2))?;
        match bytes[18] {
            1 => decode_open(body).map(Message::Open),
            2 => decode_update(body, wide).map(Message::Update),
            3 => {
                let (code, subcode) = (body[0], body[1]);
                Ok(Message::Notification(Notification { code, subcode, data: body[2..].to_vec() }))
            }
            4 => Ok(Message::Keepalive),
            _ => Ok(Message::RouteRefresh(u16::from_be_bytes([body[0], body[1]]), body[3])),
        }
    }
}

fn decode_open(body: &[u8]) -> Result<Open, Notification> {
    let bad = || Notification::new(2, 0);
    let fixed: &[u8; 10] = body.first_chunk().ok_or_else(bad)?;
    if fixed[0] != VERSION {
        return Err(Notification { data: vec![0, VERSION], ..Notification::new(2, 1) });
    }
    let mut parameters = &body[10..];
    if parameters.len() != usize::from(fixed[9]) {
        return Err(bad());
    }
    let mut capabilities = Vec::new();
    while let Some((head, rest)) = parameters.split_first_chunk::<2>() {
        let value = rest.get(..usize::from(head[1])).ok_or_else(bad)?;
        parameters = &rest[value.len()..];
        if head[0] != CAPABILITIES {
            return Err(Notification::new(2, 4));
        }
        capabilities.extend(Capability::decode_all(value).ok_or_else(bad)?);
    }
    if !parameters.is_empty() {
        return Err(bad());
    }
    Ok(Open {
        asn: u16::from_be_bytes([fixed[1], fixed[2]]),
        hold_time: u16::from_be_bytes([fixed[3], fixed[4]]),
        router_id: Ipv4Addr::new(fixed[5], fixed[6], fixed[7], fixed[8]),
        capabilities,
    })
}

fn decode_update(body: &[u8], wide: bool) -> Result<Update, Notification> {
    let malformed = || Notification::new(3, 1);
    let mut rest = body;
    let mut part = || -> Result<&[u8], Notification> {
        let (head, tail) = rest.split_first_chunk::<2>().ok_or_else(malformed)?;
        let part = tail.get(..usize::from(u16::from_be_bytes(*head))).ok_or_else(malformed)?;
        rest = &tail[part.len()..];
        Ok(part)
    };
    let (withdrawn, attributes) = (part()?, part()?);
    let bad_network = || Notification::new(3, 10);
    Ok(Update {
        withdrawn: prefix::decode_v4(withdrawn).ok_or_else(bad_network)?,
        announced: prefix::decode_v4(rest).ok_or_else(bad_network)?,
        attributes: Attribute::decode_all(attributes, wide).ok_or_else(malformed)?,
    })
}
