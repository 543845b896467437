//! Tables after Maglev (Eisenbud and others, NSDI 2016): every endpoint fills places in an order of its own, in turn, so that
//! all have the same share, and few places change when an endpoint comes or goes. The same endpoints give the same table on
//! every node, in whatever order a node knows them.

use std::net::{IpAddr, SocketAddr};

use services::Protocol;

/// Places of one map entry, `PLACES` in `layout.h`.
pub const PLACES: usize = 16;

/// How many places the table for so many endpoints has: a prime, so that every order reaches all of them, and so many that
/// shares differ by a tenth at most. `slot_by_table` in `select.h` has the same numbers.
pub fn size(endpoints: usize) -> usize {
    match endpoints {
        0..=100 => 1_021,
        101..=1_600 => 16_381,
        _ => 65_521,
    }
}

/// `mix` in `select.h`.
fn mix(mut number: u64) -> u64 {
    number ^= number >> 33;
    number = number.wrapping_mul(0xff51_afd7_ed55_8ccd);
    number ^= number >> 33;
    number = number.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    number ^ number >> 33
}

fn halves(address: IpAddr) -> [u64; 2] {
    let bytes = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let half = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("half of sixteen bytes"));
    [half(0), half(8)]
}

/// Where a client's connection falls, `hash_client` in `select.h`.
pub fn hash(client: SocketAddr, protocol: Protocol) -> u64 {
    let [first, second] = halves(client.ip());
    // The port as the packet has it.
    let port = u64::from(u16::from_ne_bytes(client.port().to_be_bytes()));
    mix(mix(mix(first) ^ second) ^ (port << 8 | u64::from(protocol.number())))
}

/// For each place the slot of an endpoint, given the endpoints in slot order.
pub fn table(endpoints: &[SocketAddr]) -> Vec<u16> {
    let size = size(endpoints.len());
    let mut table = vec![u16::MAX; size];
    // More than places: the first ones by address have them all.
    let mut turns: Vec<(SocketAddr, u16)> = endpoints.iter().copied().zip(0..u16::MAX).collect();
    turns.sort_unstable();
    let mut orders: Vec<(usize, usize, u16)> = turns
        .into_iter()
        .map(|(endpoint, slot)| {
            let [first, second] = halves(endpoint.ip());
            let start = mix(mix(mix(first) ^ second) ^ u64::from(endpoint.port()));
            let step = mix(start);
            ((start % size as u64) as usize, (step % (size as u64 - 1)) as usize + 1, slot)
        })
        .collect();
    let mut left = if orders.is_empty() { 0 } else { size };
    while left > 0 {
        for (next, step, slot) in &mut orders {
            while table[*next] != u16::MAX {
                *next = (*next + *step) % size;
            }
            table[*next] = *slot;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(hosts: impl IntoIterator<Item = u16>) -> Vec<SocketAddr> {
        hosts.into_iter().map(|host| ([10, 244, (host >> 8) as u8, host as u8], 8080).into()).collect()
    }

    /// Who has each place.
    fn owners(endpoints: &[SocketAddr]) -> Vec<SocketAddr> {
        table(endpoints).into_iter().map(|slot| endpoints[usize::from(slot)]).collect()
    }

    #[test]
    fn every_endpoint_has_its_share() {
        for count in [1, 2, 3, 10, 100, 101, 1_000, 3_000] {
            let owners = owners(&endpoints(0..count));
            let mut shares = std::collections::BTreeMap::new();
            owners.iter().for_each(|owner| *shares.entry(owner).or_insert(0) += 1);
            let (least, most) = (shares.values().min(), shares.values().max());
            assert_eq!(shares.len(), usize::from(count));
            assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{count}: {least:?} to {most:?}");
        }
    }

    #[test]
    fn every_node_has_the_same_table() {
        let mut others = endpoints(1..20);
        others.rotate_left(7);
        others.swap(2, 9);
        assert_eq!(owners(&endpoints(1..20)), owners(&others));
    }

    #[test]
    fn few_flows_move_when_an_endpoint_goes() {
        let (before, after) = (owners(&endpoints(1..=10)), owners(&endpoints(1..=9)));
        let gone = endpoints([10])[0];
        let moved = before.iter().zip(&after).filter(|(before, after)| **before != gone && before != after).count();
        // A hash modulo the number of endpoints would move nine of ten.
        assert!(moved * 100 <= before.len() * 5, "{moved} of {} moved although their endpoint stays", before.len());
    }
}
