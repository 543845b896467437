//! Prefixes as messages hold them: a length in bits and as many bytes as it needs.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::capability::Family;

pub fn encode(net: IpNet, out: &mut Vec<u8>) {
    let length = net.prefix_len();
    let count = usize::from(length.div_ceil(8));
    out.push(length);
    match net {
        IpNet::V4(net) => out.extend(&net.network().octets()[..count]),
        IpNet::V6(net) => out.extend(&net.network().octets()[..count]),
    }
}

/// The bytes of one prefix, filled up with zeros, and its length.
fn next<const N: usize>(bytes: &mut &[u8]) -> Option<([u8; N], u8)> {
    let (length, rest) = bytes.split_first()?;
    let count = usize::from(length.div_ceil(8));
    if count > N || rest.len() < count {
        return None;
    }
    let mut whole = [0; N];
    whole[..count].copy_from_slice(&rest[..count]);
    *bytes = &rest[count..];
    Some((whole, *length))
}

/// `None`: they make no sense.
pub fn decode_v4(mut bytes: &[u8]) -> Option<Vec<Ipv4Net>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (octets, length) = next::<4>(&mut bytes)?;
        all.push(Ipv4Net::new(octets.into(), length).ok()?.trunc());
    }
    Some(all)
}

pub fn decode(family: Family, mut bytes: &[u8]) -> Option<Vec<IpNet>> {
    if family == Family::Ipv4 {
        return Some(decode_v4(bytes)?.into_iter().map(IpNet::V4).collect());
    }
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (octets, length) = next::<16>(&mut bytes)?;
        all.push(IpNet::V6(Ipv6Net::new(octets.into(), length).ok()?.trunc()));
    }
    Some(all)
}
