//! Messages as bytes: what is written is read back, and no bytes crash the reader.

use std::net::IpAddr;

use loadbalancer::bgp::attribute::{Attribute, path};
use loadbalancer::bgp::bfd::{Packet, State};
use loadbalancer::bgp::capability::{Capability, Family};
use loadbalancer::bgp::message::{Message, Notification, Open, Update};

use crate::random::{Random, cases};

fn examples() -> Vec<Message> {
    let open = Open {
        asn: 23456,
        hold_time: 90,
        router_id: [192, 0, 2, 1].into(),
        capabilities: vec![
            Capability::Multiprotocol(Family::Ipv4),
            Capability::Multiprotocol(Family::Ipv6),
            Capability::RouteRefresh,
            Capability::FourOctetAs(4_200_000_000),
            Capability::GracefulRestart {
                restarted: true,
                seconds: 120,
                families: vec![(Family::Ipv4, true), (Family::Ipv6, false)],
            },
            Capability::Other(73, vec![1, b'x', 0]),
        ],
    };
    let next_hop: IpAddr = "2001:db8::1".parse().expect("an address");
    let nets = vec!["2001:db8:1::/48".parse().expect("a range"), "2001:db8:2::7/128".parse().expect("a range")];
    let update = Update {
        withdrawn: vec!["10.0.0.0/8".parse().expect("a range"), "0.0.0.0/0".parse().expect("a range")],
        attributes: vec![
            Attribute::Origin(0),
            Attribute::AsPath(path(&[4_200_000_000, 65001])),
            Attribute::NextHop([192, 0, 2, 1].into()),
            Attribute::LocalPref(200),
            Attribute::Communities(vec![0xffff_ff01, 65000 << 16 | 7]),
            Attribute::LargeCommunities(vec![[4_200_000_000, 1, 2]]),
            Attribute::As4Path(path(&[4_200_000_000])),
            Attribute::Reach(Family::Ipv6, next_hop, nets.clone()),
            Attribute::Unreach(Family::Ipv6, nets),
            // Longer than a length of one byte can say.
            Attribute::Other(0xc0, 99, vec![7; 300]),
        ],
        announced: vec!["192.0.2.129/32".parse().expect("a range"), "198.51.100.0/25".parse().expect("a range")],
    };
    vec![
        Message::Open(open),
        Message::Update(update),
        Message::Update(Update::end_of_rib(Family::Ipv4)),
        Message::Update(Update::end_of_rib(Family::Ipv6)),
        Message::Notification(Notification { code: 6, subcode: 2, data: b"bye".to_vec() }),
        Message::Keepalive,
        Message::RouteRefresh(2, 1),
    ]
}

#[test]
fn messages_are_read_as_they_were_written() {
    for message in examples() {
        let bytes = message.encode(true);
        assert_eq!(Message::length(&bytes), Ok(Some(bytes.len())), "{message:?}");
        assert_eq!(Message::decode(&bytes, true), Ok(message));
    }
}

/// The bytes of an OPEN as RFC 4271, 5492 and 6793 draw them.
#[test]
fn an_open_is_as_the_standards_draw_it() {
    let open = Open {
        asn: 65000,
        hold_time: 90,
        router_id: [10, 0, 0, 1].into(),
        capabilities: vec![Capability::Multiprotocol(Family::Ipv4), Capability::FourOctetAs(65000)],
    };
    let mut expected = vec![0xff; 16];
    expected.extend([0, 43, 1, 4, 0xfd, 0xe8, 0, 90, 10, 0, 0, 1, 14, 2, 12]);
    expected.extend([1, 4, 0, 1, 0, 1, 65, 4, 0, 0, 0xfd, 0xe8]);
    assert_eq!(Message::Open(open).encode(true), expected);
}

#[test]
fn bad_messages_get_their_notification() {
    let keepalive = Message::Keepalive.encode(true);
    let with = |at: usize, byte: u8| {
        let mut bytes = keepalive.clone();
        bytes[at] = byte;
        bytes
    };
    for (bytes, code) in [(with(3, 0), (1, 1)), (with(17, 20), (1, 2)), (with(16, 0x20), (1, 2)), (with(18, 9), (1, 3))]
    {
        let refused = Message::length(&bytes).expect_err("not to be meant");
        assert_eq!((refused.code, refused.subcode), code);
    }
    let open = examples().swap_remove(0).encode(true);
    for (at, byte, code) in [(19, 3, (2, 1)), (28, 1, (2, 0)), (29, 9, (2, 4))] {
        let mut bytes = open.clone();
        bytes[at] = byte;
        let refused = Message::decode(&bytes, true).expect_err("not to be meant");
        assert_eq!((refused.code, refused.subcode), code, "byte {at}");
    }
    // Prefixes of 33 bits, and attributes that end in the middle.
    let mut bytes =
        Message::Update(Update { announced: vec!["10.0.0.0/8".parse().expect("a range")], ..Update::default() })
            .encode(true);
    let last = bytes.len() - 2;
    bytes[last] = 33;
    assert_eq!(Message::decode(&bytes, true).map_err(|n| (n.code, n.subcode)), Err((3, 10)));
    bytes[22] = 9;
    assert_eq!(Message::decode(&bytes, true).map_err(|n| (n.code, n.subcode)), Err((3, 1)));
}

#[test]
fn no_bytes_crash_the_reader() {
    let mut random = Random::new(7);
    let examples: Vec<Vec<u8>> = examples().iter().map(|one| one.encode(true)).collect();
    let packet = bfd_packet().encode();
    for case in 0..cases(20_000) {
        let mut bytes = examples[random.below(examples.len())].clone();
        for _ in 0..=random.below(4) {
            // The marker and the length stay as they are, or every case would end there.
            let at = 18 + random.below(bytes.len() - 18);
            bytes[at] = random.byte();
        }
        if case % 5 == 0 {
            bytes.truncate(19 + random.below(bytes.len() - 18));
            let length = (bytes.len() as u16).to_be_bytes();
            bytes[16..18].copy_from_slice(&length);
        }
        for wide in [true, false] {
            if let Ok(message) = Message::decode(&bytes, wide) {
                // What was read can be written, and means the same then.
                let again = message.encode(wide);
                assert_eq!(Message::decode(&again, wide), Ok(message), "{bytes:?}");
            }
        }
        let mut bytes = packet;
        bytes[random.below(24)] = random.byte();
        if let Some(read) = Packet::decode(&bytes) {
            assert_eq!(Packet::decode(&read.encode()), Some(read), "{bytes:?}");
        }
    }
}

fn bfd_packet() -> Packet {
    Packet {
        diagnostic: 1,
        state: State::Up,
        is_poll: true,
        is_final: false,
        multiplier: 3,
        mine: 0x0102_0304,
        yours: 5,
        transmit: std::time::Duration::from_millis(300),
        receive: std::time::Duration::from_millis(50),
    }
}

/// The bytes of a control packet as RFC 5880, section 4.1, draws them.
#[test]
fn a_bfd_packet_is_as_the_standard_draws_it() {
    let bytes = bfd_packet().encode();
    assert_eq!(bytes[..12], [0x21, 0xe0, 3, 24, 1, 2, 3, 4, 0, 0, 0, 5]);
    assert_eq!(bytes[12..], [0, 4, 0x93, 0xe0, 0, 0, 0xc3, 0x50, 0, 0, 0, 0]);
    assert_eq!(Packet::decode(&bytes), Some(bfd_packet()));
    for (at, byte, why) in [
        (0, 0x01, "version 0"),
        (1, 0xe4, "authentication"),
        (1, 0xe1, "multipoint"),
        (2, 0, "no multiplier"),
        (3, 23, "too short"),
        (3, 25, "longer than it is"),
    ] {
        let mut bad = bytes;
        bad[at] = byte;
        assert_eq!(Packet::decode(&bad), None, "{why}");
    }
    let mut nobody = bytes;
    nobody[8..12].fill(0);
    assert_eq!(Packet::decode(&nobody), None, "up, with nobody");
}
