//! What a BGP speaker says it can, in its OPEN (RFC 5492).

use std::net::IpAddr;

/// Unicast routes of one of IP's versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    Ipv4,
    Ipv6,
}

/// The subsequent address family of unicast routes (RFC 4760).
pub const UNICAST: u8 = 1;

impl Family {
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }

    /// IANA's number of the address family.
    pub fn number(self) -> u16 {
        match self {
            Family::Ipv4 => 1,
            Family::Ipv6 => 2,
        }
    }

    pub fn numbered(number: u16, sub: u8) -> Option<Family> {
        match (number, sub) {
            (1, UNICAST) => Some(Family::Ipv4),
            (2, UNICAST) => Some(Family::Ipv6),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capability {
    /// RFC 4760.
    Multiprotocol(Family),
    /// RFC 2918.
    RouteRefresh,
    /// RFC 6793.
    FourOctetAs(u32),
    /// RFC 4724.
    GracefulRestart {
        /// The speaker has just started again.
        restarted: bool,
        /// For how many seconds, 4095 at most, its routes are to be kept.
        seconds: u16,
        /// Families, and whether it went on forwarding their packets.
        families: Vec<(Family, bool)>,
    },
    /// Its code and value.
    Other(u8, Vec<u8>),
}

impl Capability {
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (code, value) = match self {
            Capability::Multiprotocol(family) => {
                let [high, low] = family.number().to_be_bytes();
                (1, vec![high, low, 0, UNICAST])
            }
            Capability::RouteRefresh => (2, Vec::new()),
            Capability::FourOctetAs(asn) => (65, asn.to_be_bytes().to_vec()),
            Capability::GracefulRestart { restarted, seconds, families } => {
                let head = (seconds & 0x0fff) | u16::from(*restarted) << 15;
                let mut value = head.to_be_bytes().to_vec();
                for (family, forwards) in families {
                    value.extend(family.number().to_be_bytes());
                    value.extend([UNICAST, u8::from(*forwards) << 7]);
                }
                (64, value)
            }
            Capability::Other(code, value) => (*code, value.clone()),
        };
        out.extend([code, value.len() as u8]);
        out.extend(value);
    }

    /// All of one parameter. `None`: their lengths do not fit.
    pub fn decode_all(mut bytes: &[u8]) -> Option<Vec<Capability>> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_first_chunk::<2>()?;
            let value = rest.get(..usize::from(head[1]))?;
            bytes = &rest[value.len()..];
            all.push(Capability::decode(head[0], value));
        }
        Some(all)
    }

    fn decode(code: u8, value: &[u8]) -> Capability {
        let known = match (code, value) {
            (1, [high, low, 0, sub]) => {
                Family::numbered(u16::from_be_bytes([*high, *low]), *sub).map(Capability::Multiprotocol)
            }
            (2, []) => Some(Capability::RouteRefresh),
            (65, [a, b, c, d]) => Some(Capability::FourOctetAs(u32::from_be_bytes([*a, *b, *c, *d]))),
            (64, [high, low, families @ ..]) if families.len() % 4 == 0 => {
                let head = u16::from_be_bytes([*high, *low]);
                let family = |four: &[u8]| {
                    Some((Family::numbered(u16::from_be_bytes([four[0], four[1]]), four[2])?, four[3] & 0x80 != 0))
                };
                // One of a family that we do not know, or flags that we do not, leaves the rest as it is.
                let families: Option<Vec<(Family, bool)>> = families.chunks(4).map(family).collect();
                let is_plain = head & 0x7000 == 0 && value[2..].chunks(4).all(|four| four[3] & 0x7f == 0);
                families.filter(|_| is_plain).map(|families| Capability::GracefulRestart {
                    restarted: head & 0x8000 != 0,
                    seconds: head & 0x0fff,
                    families,
                })
            }
            _ => None,
        };
        known.unwrap_or_else(|| Capability::Other(code, value.to_vec()))
    }
}
