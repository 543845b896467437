//! Path attributes (RFC 4271, section 4.3; RFC 4760, 1997, 8092, 6793).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::capability::{Family, UNICAST};
use super::message::AS_TRANS;
use super::prefix;

const OPTIONAL: u8 = 0x80;
const TRANSITIVE: u8 = 0x40;
const EXTENDED: u8 = 0x10;
/// Segments of an AS path that say an order.
const SEQUENCE: u8 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// 0: a network of the speaker's own.
    Origin(u8),
    /// Segments: their type and AS numbers.
    AsPath(Vec<(u8, Vec<u32>)>),
    NextHop(Ipv4Addr),
    LocalPref(u32),
    Communities(Vec<u32>),
    LargeCommunities(Vec<[u32; 3]>),
    /// The path in full where `AsPath` has two bytes a number.
    As4Path(Vec<(u8, Vec<u32>)>),
    Reach(Family, IpAddr, Vec<IpNet>),
    Unreach(Family, Vec<IpNet>),
    /// Flags, code and value.
    Other(u8, u8, Vec<u8>),
}

/// A path of one AS, or of none within it.
pub fn path(asns: &[u32]) -> Vec<(u8, Vec<u32>)> {
    if asns.is_empty() { Vec::new() } else { vec![(SEQUENCE, asns.to_vec())] }
}

fn encode_path(segments: &[(u8, Vec<u32>)], wide: bool, out: &mut Vec<u8>) {
    for (kind, asns) in segments {
        out.extend([*kind, asns.len() as u8]);
        for asn in asns {
            match wide {
                true => out.extend(asn.to_be_bytes()),
                false => out.extend(u16::try_from(*asn).unwrap_or(AS_TRANS).to_be_bytes()),
            }
        }
    }
}

fn decode_path(mut bytes: &[u8], wide: bool) -> Option<Vec<(u8, Vec<u32>)>> {
    let width = if wide { 4 } else { 2 };
    let mut segments = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<2>()?;
        let value = rest.get(..usize::from(head[1]) * width)?;
        bytes = &rest[value.len()..];
        let number = |raw: &[u8]| raw.iter().fold(0, |number, byte| number << 8 | u32::from(*byte));
        segments.push((head[0], value.chunks(width).map(number).collect()));
    }
    Some(segments)
}

impl Attribute {
    pub fn encode(&self, wide: bool, out: &mut Vec<u8>) {
        let mut value = Vec::new();
        let (flags, code) = match self {
            Attribute::Origin(origin) => {
                value.push(*origin);
                (TRANSITIVE, 1)
            }
            Attribute::AsPath(segments) => {
                encode_path(segments, wide, &mut value);
                (TRANSITIVE, 2)
            }
            Attribute::NextHop(address) => {
                value.extend(address.octets());
                (TRANSITIVE, 3)
            }
            Attribute::LocalPref(preference) => {
                value.extend(preference.to_be_bytes());
                (TRANSITIVE, 5)
            }
            Attribute::Communities(all) => {
                all.iter().for_each(|one| value.extend(one.to_be_bytes()));
                (OPTIONAL | TRANSITIVE, 8)
            }
            Attribute::LargeCommunities(all) => {
                all.iter().flatten().for_each(|part| value.extend(part.to_be_bytes()));
                (OPTIONAL | TRANSITIVE, 32)
            }
            Attribute::As4Path(segments) => {
                encode_path(segments, true, &mut value);
                (OPTIONAL | TRANSITIVE, 17)
            }
            Attribute::Reach(family, next_hop, prefixes) => {
                value.extend(family.number().to_be_bytes());
                value.push(UNICAST);
                match next_hop {
                    IpAddr::V4(v4) => {
                        value.push(4);
                        value.extend(v4.octets());
                    }
                    IpAddr::V6(v6) => {
                        value.push(16);
                        value.extend(v6.octets());
                    }
                }
                value.push(0);
                prefixes.iter().for_each(|net| prefix::encode(*net, &mut value));
                (OPTIONAL, 14)
            }
            Attribute::Unreach(family, prefixes) => {
                value.extend(family.number().to_be_bytes());
                value.push(UNICAST);
                prefixes.iter().for_each(|net| prefix::encode(*net, &mut value));
                (OPTIONAL, 15)
            }
            Attribute::Other(flags, code, bytes) => {
                value.extend(bytes);
                (*flags & !EXTENDED, *code)
            }
        };
        match u8::try_from(value.len()) {
            Ok(length) => out.extend([flags, code, length]),
            Err(_) => {
                out.extend([flags | EXTENDED, code]);
                out.extend((value.len() as u16).to_be_bytes());
            }
        }
        out.extend(value);
    }

    /// All of an UPDATE. `None`: their lengths do not fit. One whose value makes no sense is kept as it is.
    pub fn decode_all(mut bytes: &[u8], wide: bool) -> Option<Vec<Attribute>> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_first_chunk::<2>()?;
            let (length, rest) = match head[0] & EXTENDED {
                0 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
                _ => rest.split_first_chunk().map(|(raw, rest)| (usize::from(u16::from_be_bytes(*raw)), rest))?,
            };
            let value = rest.get(..length)?;
            bytes = &rest[length..];
            let known = Attribute::decode(head[1], value, wide);
            all.push(known.unwrap_or_else(|| Attribute::Other(head[0] & !EXTENDED, head[1], value.to_vec())));
        }
        Some(all)
    }

    fn decode(code: u8, value: &[u8], wide: bool) -> Option<Attribute> {
        let numbers = || {
            let chunks = value.chunks(4).map(|four| four.try_into().ok().map(u32::from_be_bytes));
            chunks.collect::<Option<Vec<u32>>>()
        };
        match code {
            1 => <[u8; 1]>::try_from(value).ok().map(|[origin]| Attribute::Origin(origin)),
            2 => decode_path(value, wide).map(Attribute::AsPath),
            3 => <[u8; 4]>::try_from(value).ok().map(|raw| Attribute::NextHop(raw.into())),
            5 => <[u8; 4]>::try_from(value).ok().map(|raw| Attribute::LocalPref(u32::from_be_bytes(raw))),
            8 => numbers().map(Attribute::Communities),
            17 => decode_path(value, true).map(Attribute::As4Path),
            32 => {
                let all = numbers().filter(|all| all.len() % 3 == 0)?;
                Some(Attribute::LargeCommunities(all.chunks(3).map(|c| [c[0], c[1], c[2]]).collect()))
            }
            14 => {
                let (family, rest) = decode_family(value)?;
                let (length, rest) = rest.split_first()?;
                let next_hop = rest.get(..usize::from(*length))?;
                let (_, prefixes) = rest[next_hop.len()..].split_first()?;
                let next_hop = match next_hop.len() {
                    4 => <[u8; 4]>::try_from(next_hop).ok().map(IpAddr::from)?,
                    16 => <[u8; 16]>::try_from(next_hop).ok().map(|raw| IpAddr::V6(Ipv6Addr::from(raw)))?,
                    // With a link-local address behind it, which says nothing more to us: it stays as it is.
                    _ => return None,
                };
                Some(Attribute::Reach(family, next_hop, prefix::decode(family, prefixes)?))
            }
            15 => {
                let (family, prefixes) = decode_family(value)?;
                Some(Attribute::Unreach(family, prefix::decode(family, prefixes)?))
            }
            _ => None,
        }
    }
}

fn decode_family(bytes: &[u8]) -> Option<(Family, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<3>()?;
    Some((Family::numbered(u16::from_be_bytes([head[0], head[1]]), head[2])?, rest))
}
