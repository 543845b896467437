//! Advertisements as bytes: what is written is read back, and no bytes crash the reader.

use std::net::IpAddr;
use std::time::Duration;

use loadbalancer::vrrp::packet::{Advertisement, Checksum, GROUP_V4, GROUP_V6};

use crate::random::{Random, cases};

fn example(v4: bool) -> (Advertisement, IpAddr, IpAddr) {
    let text = if v4 { ["192.0.2.1", "192.0.2.10", "192.0.2.11"] } else { ["fe80::1", "fe80::10", "2001:db8::11"] };
    let [from, one, two] = text.map(|text| text.parse::<IpAddr>().expect("an address"));
    let interval = Duration::from_millis(250);
    let advertisement = Advertisement { id: 51, priority: 150, interval, addresses: vec![one, two] };
    (advertisement, from, if v4 { GROUP_V4.into() } else { GROUP_V6.into() })
}

#[test]
fn advertisements_are_read_as_they_were_written() {
    for v4 in [true, false] {
        let (advertisement, from, to) = example(v4);
        for checksum in [Checksum::WithPseudoHeader, Checksum::Plain] {
            let bytes = advertisement.encode(from, to, checksum);
            assert_eq!(Advertisement::decode(&bytes, from, to), Some(advertisement.clone()), "{v4} {checksum:?}");
        }
    }
}

/// As RFC 9568, section 5.1, draws it; the checksum was added up by hand.
#[test]
fn an_advertisement_is_as_the_standard_draws_it() {
    let (mut advertisement, from, to) = example(true);
    advertisement.addresses.truncate(1);
    let bytes = advertisement.encode(from, to, Checksum::Plain);
    // 3133 + 9601 + 0019 + c000 + 020a = 18957, folded 8958, its complement 76a7.
    assert_eq!(bytes, [0x31, 51, 150, 1, 0, 25, 0x76, 0xa7, 192, 0, 2, 10]);
    // And c000 + 0201 + e000 + 0012 + 0070 + 000c of the pseudo-header: 2ab46 in all with the sum above, folded ab48.
    let bytes = advertisement.encode(from, to, Checksum::WithPseudoHeader);
    let sum = 0x8958u32 + 0xc000 + 0x0201 + 0xe000 + 0x12 + 0x70 + 0xc;
    let folded = (sum & 0xffff) + (sum >> 16);
    assert_eq!(bytes[6..8], (!(folded as u16)).to_be_bytes());
}

#[test]
fn what_is_not_whole_is_dropped() {
    let (advertisement, from, to) = example(true);
    let good = advertisement.encode(from, to, Checksum::WithPseudoHeader);
    for (title, bytes) in [
        ("empty", Vec::new()),
        ("cut", good[..good.len() - 1].to_vec()),
        ("longer", [good.clone(), vec![0, 0]].concat()),
        ("version 2", [vec![0x21], good[1..].to_vec()].concat()),
        ("id 0", [vec![0x31, 0], good[2..].to_vec()].concat()),
        ("a wrong checksum", [good[..6].to_vec(), vec![1, 2], good[8..].to_vec()].concat()),
    ] {
        assert_eq!(Advertisement::decode(&bytes, from, to), None, "{title}");
    }
    // From another network than it says.
    assert_eq!(Advertisement::decode(&good, "192.0.2.9".parse().expect("an address"), to), None);
}

#[test]
fn no_bytes_crash_the_reader() {
    let mut random = Random::new(11);
    for case in 0..cases(20_000) {
        let (advertisement, from, to) = example(case % 2 == 0);
        let mut bytes = advertisement.encode(from, to, Checksum::WithPseudoHeader);
        let at = random.below(bytes.len());
        bytes[at] = random.byte();
        bytes.truncate(random.below(bytes.len() + 1));
        if let Some(read) = Advertisement::decode(&bytes, from, to) {
            let again = read.encode(from, to, Checksum::WithPseudoHeader);
            assert_eq!(Advertisement::decode(&again, from, to), Some(read));
        }
    }
}
