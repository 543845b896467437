//! Packets that no client would send, and every one that a broken one might: nothing crashes, and what comes back can be
//! read and says so.

use std::net::IpAddr;
use std::sync::{Arc, RwLock};

use dns::{Forward, Hosts, Objects, Parts, PodMode, Resolver, ReverseZones, SearchPath, Step, Zone};
use hickory_proto::op::{Edns, Message, MessageType, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::time::Instant;

use crate::zone::{packet, ranges, table};

/// Each changes every seed packet once in some way.
fn cases() -> u64 {
    match std::env::var("FAIRLEAD_CASES") {
        Ok(cases) => cases.parse().expect("FAIRLEAD_CASES is a number"),
        Err(_) => 2000,
    }
}

/// The generator of Knuth's MMIX: the same packets in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.0 >> 33) % limit.max(1) as u64).expect("a small number")
    }

    fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }
}

fn resolver() -> Arc<Resolver> {
    let common = crate::cases::parse(crate::zone::ZONE)[0].sections[0].text.clone();
    let mut table = table(&common);
    table.set_synced();
    let zone = Zone::new("cluster.local", 5, PodMode::Insecure).expect("a zone");
    let reverse = ReverseZones::new(zone.origin().clone(), 5, ranges());
    Resolver::new(Parts {
        zone,
        reverse,
        table: Arc::new(RwLock::new(table)),
        objects: Arc::new(Objects::default()),
        hosts: Hosts::parse("192.0.2.80 intranet.example").expect("an entry"),
        search: SearchPath { clients: ranges(), domains: Vec::new() },
        forward: Forward::nowhere(),
    })
    .0
}

/// Questions of all kinds, with and without EDNS.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (name, record_type) in [
        ("web.default.svc.cluster.local.", RecordType::A),
        ("_sql._tcp.db.prod.svc.cluster.local.", RecordType::SRV),
        ("db.prod.svc.cluster.local.", RecordType::AAAA),
        ("docs.prod.svc.cluster.local.", RecordType::A),
        ("alias.prod.svc.cluster.local.", RecordType::A),
        ("20.0.96.10.in-addr.arpa.", RecordType::PTR),
        ("4.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa.", RecordType::PTR),
        ("10-244-1-5.default.pod.cluster.local.", RecordType::A),
        ("www.example.com.default.svc.cluster.local.", RecordType::A),
        ("intranet.example.", RecordType::A),
        ("cluster.local.", RecordType::NS),
        ("cluster.local.", RecordType::AXFR),
        ("dns-version.cluster.local.", RecordType::TXT),
        ("example.com.", RecordType::ANY),
    ] {
        let plain = packet(Name::from_ascii(name).expect("a name"), record_type);
        let mut message = Message::from_vec(&plain).expect("a message");
        let mut edns = Edns::new();
        edns.set_max_payload(1232).set_dnssec_ok(true);
        message.set_edns(edns);
        seeds.push(plain);
        seeds.push(message.to_vec().expect("a message"));
    }
    seeds
}

fn mutate(packet: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(packet.len());
        match random.below(8) {
            0 => packet.truncate(at),
            1 => packet.extend((0..random.below(40)).map(|_| random.byte())),
            2 => packet.insert(at, random.byte()),
            // A pointer, to anywhere.
            3 if at + 1 < packet.len() => {
                packet[at] = 0xc0 | (random.byte() & 0x3f);
                packet[at + 1] = random.byte();
            }
            4 => {
                let from = random.below(other.len());
                packet.truncate(at);
                packet.extend_from_slice(&other[from..]);
            }
            5 if !packet.is_empty() => packet[at] ^= 1 << random.below(8),
            _ if !packet.is_empty() => packet[at] = random.byte(),
            _ => packet.push(random.byte()),
        }
    }
}

/// What comes back to a packet; the code, if anything.
fn receive(resolver: &Arc<Resolver>, packet: &[u8], client: IpAddr, limit: Option<usize>) -> Option<ResponseCode> {
    let mut out = Vec::new();
    match resolver.receive(packet, client, limit, Instant::now(), &mut out) {
        Step::Silence => {
            let is_reply = packet.len() < 4 || packet[2] & 0x80 != 0;
            assert!(is_reply, "a question was not answered: {packet:02x?}");
            None
        }
        Step::Wait(waiting) => {
            assert!(!waiting.walk.is_empty() || !waiting.question.name.is_root() || packet.len() >= 17);
            None
        }
        Step::Replied { .. } => {
            assert_eq!(out[..2], packet[..2], "the id is the question's");
            assert!(out.len() <= limit.unwrap_or(1232), "{} bytes", out.len());
            let message =
                Message::from_vec(&out).unwrap_or_else(|error| panic!("{error}: {packet:02x?} -> {out:02x?}"));
            assert_eq!(message.metadata.message_type, MessageType::Response);
            Some(message.metadata.response_code)
        }
    }
}

#[test]
fn mutated_packets_crash_nothing() {
    let (resolver, seeds, mut random) = (resolver(), seeds(), Random(7));
    let clients: [IpAddr; 2] = ["10.244.1.77".parse().expect("an address"), "2001:db8::9".parse().expect("an address")];
    let mut codes = std::collections::BTreeMap::<String, u64>::new();
    let mut count = 0;
    for case in 0..cases() {
        for seed in &seeds {
            let mut packet = seed.clone();
            let other = &seeds[random.below(seeds.len())];
            mutate(&mut packet, other, &mut random);
            let limit = (case % 2 == 0).then_some(usize::from(u16::MAX));
            let code = receive(&resolver, &packet, clients[random.below(2)], limit);
            *codes.entry(code.map_or("silence or upstream".to_owned(), |code| code.to_string())).or_default() += 1;
            count += 1;
        }
    }
    println!("{count} packets: {codes:?}");
    // A packet that is still a question gets its answer; all others one of these, or nothing.
    for (code, seen) in &codes {
        let known = ["Form Error", "Query Refused", "Not Implemented", "No Error", "Non-Existent Domain"];
        // 16 is BADVERS here and BADSIG in signed messages; the library reads it as the latter.
        let is_known = known.contains(&code.as_str()) || code == "TSIG Failure" || code.starts_with("silence");
        assert!(is_known, "{code}: {seen}");
    }
    assert!(codes["Form Error"] > count / 4, "most of them are broken: {codes:?}");
}

/// No packet that is not a question any more is taken for one: what hickory cannot read is never answered well.
#[test]
fn what_another_reader_finds_broken_is_not_answered() {
    let (resolver, seeds, mut random) = (resolver(), seeds(), Random(11));
    let client: IpAddr = "10.244.1.77".parse().expect("an address");
    for _ in 0..cases() {
        for seed in &seeds {
            let mut packet = seed.clone();
            mutate(&mut packet, seed, &mut random);
            if Message::from_vec(&packet).is_err()
                && let Some(code) = receive(&resolver, &packet, client, None)
            {
                // The other reader also looks into records that follow the question, which nobody asked about.
                let is_short = packet.len() < 12 || packet[6..12] == [0; 6];
                let is_good = matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
                assert!(!(is_short && is_good), "{code}: {packet:02x?}");
            }
        }
    }
}
