//! ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861), from the network header on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use linux::link::Mac;

/// A new owner says so more than once, as packets may be lost: after so long each.
pub const BURST: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2)];

pub const BROADCAST: Mac = Mac([0xff; 6]);
/// Where `ff02::1`, all nodes of a link, is sent to.
pub const ALL_NODES: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
const ALL_NODES_IP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// An ARP packet between Ethernet and IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    pub is_request: bool,
    pub sender: (Mac, Ipv4Addr),
    pub target: (Mac, Ipv4Addr),
}

impl Arp {
    pub fn parse(bytes: &[u8]) -> Option<Arp> {
        let bytes: &[u8; 28] = bytes.first_chunk()?;
        if bytes[..6] != [0, 1, 8, 0, 6, 4] || bytes[6] != 0 {
            return None;
        }
        let mac = |at: usize| Some(Mac(*bytes[at..].first_chunk()?));
        let ip = |at: usize| Some(Ipv4Addr::from(*bytes[at..].first_chunk::<4>()?));
        Some(Arp { is_request: bytes[7] == 1, sender: (mac(8)?, ip(14)?), target: (mac(18)?, ip(24)?) })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, if self.is_request { 1 } else { 2 }];
        for (Mac(mac), ip) in [self.sender, self.target] {
            bytes.extend(mac);
            bytes.extend(ip.octets());
        }
        bytes
    }
}

/// Who asks for which address in a neighbour solicitation; who only looks whether an address is taken asks as `::`.
pub fn parse_solicitation(bytes: &[u8]) -> Option<(Ipv6Addr, Ipv6Addr)> {
    let header: &[u8; 64] = bytes.first_chunk()?;
    // Hop limit 255: it comes from this link (RFC 4861, section 7.1.1).
    if header[6] != 58 || header[7] != 255 || header[40] != 135 {
        return None;
    }
    let ip = |at: usize| Some(Ipv6Addr::from(*header[at..].first_chunk::<16>()?));
    Some((ip(8)?, ip(48)?))
}

/// A neighbour advertisement for `address`: to who asked, or to all.
pub fn advertisement(address: Ipv6Addr, mac: Mac, to: Option<Ipv6Addr>) -> Vec<u8> {
    let destination = to.unwrap_or(ALL_NODES_IP);
    // Solicited where it answers; Override in any case.
    let flags: u8 = if to.is_some() { 0x60 } else { 0x20 };
    let mut body = vec![136, 0, 0, 0, flags, 0, 0, 0];
    body.extend(address.octets());
    body.extend([2, 1]);
    body.extend(mac.0);
    let pseudo = address.octets().into_iter().chain(destination.octets()).chain([0, 0, 0, 32, 0, 0, 0, 58]);
    let all: Vec<u8> = pseudo.chain(body.iter().copied()).collect();
    let sum = all.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    body[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, 32, 58, 255];
    packet.extend(address.octets());
    packet.extend(destination.octets());
    packet.extend(body);
    packet
}

/// What tells everybody that this address is here now: for IPv4 a request for itself, which all kinds of hosts believe.
pub fn gratuitous(address: IpAddr, mac: Mac) -> (Vec<u8>, Mac) {
    match address {
        IpAddr::V4(v4) => {
            let arp = Arp { is_request: true, sender: (mac, v4), target: (Mac([0; 6]), v4) };
            (arp.encode(), BROADCAST)
        }
        IpAddr::V6(v6) => (advertisement(v6, mac, None), ALL_NODES),
    }
}
