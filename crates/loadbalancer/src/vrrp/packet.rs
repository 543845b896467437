//! VRRP version 3 advertisements (RFC 9568, section 5), from behind the IP header on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// The number of the protocol in IP headers.
pub const PROTOCOL: u8 = 112;
pub const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 18);
pub const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x12);
/// What packets arrive with: nobody from farther away can have sent them.
pub const HOPS: u8 = 255;
/// Version 3, an advertisement: the only type there is.
const HEAD: u8 = 0x31;
const HEADER: usize = 8;
const CENTISECOND: Duration = Duration::from_millis(10);
/// Centiseconds have twelve bits.
pub const LONGEST_INTERVAL: Duration = Duration::from_millis(40_950);

/// RFC 5798 has the pseudo-header of IPv4 in the checksum, and so does keepalived; RFC 9568 has not. Both are understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    #[default]
    WithPseudoHeader,
    Plain,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// The virtual router.
    pub id: u8,
    /// 0: the sender gives up.
    pub priority: u8,
    /// In steps of 10 ms.
    pub interval: Duration,
    /// Of one family.
    pub addresses: Vec<IpAddr>,
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
    bytes.chunks(2).map(word).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo-header; addresses of two families have none.
fn pseudo(from: IpAddr, to: IpAddr, length: usize) -> u64 {
    let rest = length as u64 + u64::from(PROTOCOL);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => sum(&from.octets()) + sum(&to.octets()) + rest,
        (IpAddr::V6(from), IpAddr::V6(to)) => sum(&from.octets()) + sum(&to.octets()) + rest,
        _ => 0,
    }
}

impl Advertisement {
    pub fn encode(&self, from: IpAddr, to: IpAddr, checksum: Checksum) -> Vec<u8> {
        let count = u8::try_from(self.addresses.len()).unwrap_or(u8::MAX);
        let mut bytes = vec![HEAD, self.id, self.priority, count];
        let steps = (self.interval.as_millis() / CENTISECOND.as_millis()).min(0xfff) as u16;
        bytes.extend(steps.to_be_bytes());
        bytes.extend([0, 0]);
        for address in self.addresses.iter().take(usize::from(count)) {
            match address {
                IpAddr::V4(v4) => bytes.extend(v4.octets()),
                IpAddr::V6(v6) => bytes.extend(v6.octets()),
            }
        }
        let head = match checksum {
            Checksum::Plain if from.is_ipv4() => 0,
            _ => pseudo(from, to, bytes.len()),
        };
        let checksum = !fold(sum(&bytes) + head);
        bytes[6..8].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    /// `None`: it is to be dropped (section 7.1).
    pub fn decode(bytes: &[u8], from: IpAddr, to: IpAddr) -> Option<Advertisement> {
        let head: &[u8; HEADER] = bytes.first_chunk()?;
        let width = if from.is_ipv4() { 4 } else { 16 };
        let (list, rest) = bytes[HEADER..].split_at_checked(usize::from(head[3]) * width)?;
        if head[0] != HEAD || head[1] == 0 || head[3] == 0 || !rest.is_empty() {
            return None;
        }
        let plain = sum(bytes);
        let is_whole = |sum: u64| fold(sum) == 0xffff;
        let is_good = is_whole(plain + pseudo(from, to, bytes.len())) || (from.is_ipv4() && is_whole(plain));
        if !is_good {
            return None;
        }
        let address = |raw: &[u8]| match <[u8; 4]>::try_from(raw) {
            Ok(octets) => Some(IpAddr::from(octets)),
            Err(_) => <[u8; 16]>::try_from(raw).ok().map(IpAddr::from),
        };
        Some(Advertisement {
            id: head[1],
            priority: head[2],
            interval: CENTISECOND * u32::from(u16::from_be_bytes([head[4], head[5]]) & 0xfff),
            addresses: list.chunks(width).map(address).collect::<Option<_>>()?,
        })
    }
}
