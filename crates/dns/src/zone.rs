//! The cluster's own zone: which name has which records, by the Kubernetes DNS specification 1.1.0.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::compile::{self, Held, PREFERENCE, Records, key, labels, record};
use crate::config::PodMode;
use crate::error::DnsError;
use crate::names::Names;
use crate::objects::Objects;
use crate::wire::{HEADER, QUESTION_NAME, WireName, kind};

/// The version of the specification that the records follow.
const SCHEMA_VERSION: &str = "1.1.0";
/// The Service behind which cluster DNS itself is found.
const DNS_SERVICE: (&str, &str) = ("kube-system", "kube-dns");
/// Fields of the SOA record besides its names and its minimum: nobody may transfer the zone, so nobody compares serials.
const SOA: [u32; 4] = [1, 7200, 1800, 86_400];

/// A zone whose content is the table of Services.
#[derive(Clone)]
pub struct Zone {
    text: String,
    origin: WireName,
    ttl: u32,
    pods: PodMode,
}

/// What is known of a name and type.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// Compiled before.
    Held(Held<'a>),
    /// Written for this question.
    Made { answers: Vec<u8>, answer_count: u16, additionals: Vec<u8>, additional_count: u16 },
    /// The table is not complete: nothing can be said about it.
    NotYet,
}

impl Found<'_> {
    const NO_DATA: Found<'static> = Found::Held(Held::NoData);
    const NO_NAME: Found<'static> = Found::Held(Held::NoName);

    fn one(answer: Vec<u8>) -> Self {
        Found::Made { answers: answer, answer_count: 1, additionals: Vec::new(), additional_count: 0 }
    }

    fn exists(exists: bool) -> Self {
        if exists { Self::NO_DATA } else { Self::NO_NAME }
    }
}

impl Zone {
    pub fn new(origin: &str, ttl: u32, pods: PodMode) -> Result<Self, DnsError> {
        let wrong = |reason: &str| DnsError::Zone { zone: origin.to_owned(), reason: reason.to_owned() };
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
        if !origin.chars().all(is_plain) {
            return Err(wrong("only letters, digits, hyphens and dots are in a zone's name"));
        }
        let wire = compile::name(origin).ok_or_else(|| wrong("labels have 1 to 63 letters, names up to 253"))?;
        let origin = WireName::read(&wire, 0).ok_or_else(|| wrong("the name is too long"))?;
        Ok(Zone { text: String::from_utf8_lossy(&wire).into_owned(), origin, ttl, pods })
    }

    pub fn origin(&self) -> &WireName {
        &self.origin
    }

    pub fn ttl(&self) -> u32 {
        self.ttl
    }

    pub fn verifies_pods(&self) -> bool {
        self.pods == PodMode::Verified
    }

    /// What the zone knows of a name that is `below` labels below it.
    pub fn find<'a>(
        &self,
        names: &'a Names,
        objects: &Objects,
        name: &WireName,
        wanted: u16,
        below: usize,
    ) -> Found<'a> {
        if !names.synced {
            return Found::NotYet;
        }
        let Some(last) = below.checked_sub(1) else { return self.apex(names, name, wanted) };
        match (name.label(last), last) {
            (b"svc", 0) => Found::NO_DATA,
            (b"svc", 1) => Found::exists(has_namespace(names, objects, name.part(0, 1))),
            (b"svc", _) => match names.service(name.part(last - 2, last)) {
                Some(service) => {
                    let held = service.find(name.part(0, last - 2), wanted);
                    let is_preference = last == 5 && name.part(1, 3) == PREFERENCE;
                    if held == Held::NoName && is_preference && service.find(PREFERENCE, wanted) != Held::NoName {
                        // No endpoint is in that zone: any other will do.
                        return Found::Held(service.find(&[], wanted));
                    }
                    Found::Held(held)
                }
                None => Found::NO_NAME,
            },
            (b"dns-version", 0) => self.version(wanted),
            (b"dns", 0) => Found::NO_DATA,
            (b"dns", 1) if name.label(0) == b"ns" => self.own_address(names, wanted),
            (b"pod", _) if self.pods != PodMode::Disabled => self.pod(names, objects, name, wanted, last),
            _ => Found::NO_NAME,
        }
    }

    fn version(&self, wanted: u16) -> Found<'static> {
        if !matches!(wanted, kind::TXT | kind::ANY) {
            return Found::NO_DATA;
        }
        let mut answer = Vec::new();
        // A character string has its length before it, as a label has.
        let text = labels(&[SCHEMA_VERSION]).unwrap_or_default();
        record(&mut answer, QUESTION_NAME, kind::TXT, self.ttl, &text);
        Found::one(answer)
    }

    fn own_address<'a>(&self, names: &'a Names, wanted: u16) -> Found<'a> {
        let own = key(DNS_SERVICE.0, DNS_SERVICE.1).unwrap_or_default();
        Found::Held(names.service(&own).map_or(Held::NoData, |service| service.find(&[], wanted)))
    }

    fn apex<'a>(&self, names: &'a Names, name: &WireName, wanted: u16) -> Found<'a> {
        let mut answer = Vec::new();
        match wanted {
            kind::SOA | kind::ANY => {
                self.write_soa(&mut answer, HEADER, HEADER, self.ttl);
                Found::one(answer)
            }
            kind::NS => {
                let mut data = b"\x02ns\x03dns".to_vec();
                data.extend_from_slice(&QUESTION_NAME);
                let target = HEADER + name.bytes().len() + 4 + compile::RECORD;
                record(&mut answer, QUESTION_NAME, kind::NS, self.ttl, &data);
                let (mut additionals, mut additional_count) = (Vec::new(), 0);
                for family in [kind::A, kind::AAAA] {
                    if let Found::Held(Held::Records(records)) = self.own_address(names, family) {
                        let from = additionals.len();
                        additionals.extend_from_slice(records.answers);
                        retarget(&mut additionals[from..], target);
                        additional_count += records.answer_count;
                    }
                }
                Found::Made { answers: answer, answer_count: 1, additionals, additional_count }
            }
            _ => Found::NO_DATA,
        }
    }

    /// `1-2-3-4.NAMESPACE.pod`; `last` is the index of `pod`.
    fn pod(&self, names: &Names, objects: &Objects, name: &WireName, wanted: u16, last: usize) -> Found<'static> {
        if last == 0 {
            return Found::NO_DATA;
        }
        if !has_namespace(names, objects, name.part(last - 1, last)) {
            return Found::NO_NAME;
        }
        let (1, Some(ip)) = (last - 1, parse_dashed(name.label(0))) else { return Found::exists(last == 1) };
        let namespace = String::from_utf8_lossy(name.label(1));
        if self.pods == PodMode::Verified && !objects.is_pod(&namespace, ip) {
            return Found::NO_NAME;
        }
        let own = if ip.is_ipv4() { kind::A } else { kind::AAAA };
        if wanted != own && wanted != kind::ANY {
            return Found::NO_DATA;
        }
        let mut answer = Vec::new();
        compile::address(&mut answer, QUESTION_NAME, self.ttl, ip);
        Found::one(answer)
    }

    /// Appends the start of authority, which tells clients how long they may believe that there is nothing.
    ///
    /// `owner` and `zone` are offsets of names in the reply: who has the record, and the cluster's zone; the latter is
    /// written out when it is not there.
    pub fn write_soa(&self, out: &mut Vec<u8>, owner: usize, zone: impl Into<Option<usize>>, ttl: u32) {
        let mut data = Vec::with_capacity(64);
        let zone = zone.into();
        for host in [b"\x02ns\x03dns".as_slice(), b"\x0ahostmaster"] {
            data.extend_from_slice(host);
            match zone {
                Some(at) => data.extend_from_slice(&pointer(at)),
                None => data.extend_from_slice(self.origin.bytes()),
            }
        }
        for number in SOA.into_iter().chain([self.ttl]) {
            data.extend_from_slice(&number.to_be_bytes());
        }
        record(out, pointer(owner), kind::SOA, ttl, &data);
    }
}

impl std::fmt::Debug for Zone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Zone({:?})", self.text)
    }
}

/// A name by where it stands in the reply. Questions end before byte 271, so that every part of one can be pointed to.
pub fn pointer(at: usize) -> [u8; 2] {
    ((at as u16 & 0x3fff) | 0xc000).to_be_bytes()
}

/// Gives records with a pointer for a name another owner.
fn retarget(records: &mut [u8], owner: usize) {
    let mut at = 0;
    while let Some(length) = record_len(&records[at..]) {
        records[at..at + 2].copy_from_slice(&pointer(owner));
        at += length;
    }
}

/// The bytes of the first record, whose name is a pointer.
pub fn record_len(records: &[u8]) -> Option<usize> {
    let length = records.get(10..12)?;
    Some(compile::RECORD + usize::from(u16::from_be_bytes([length[0], length[1]])))
}

pub fn has_namespace(names: &Names, objects: &Objects, label: &[u8]) -> bool {
    let text = std::str::from_utf8(label.get(1..).unwrap_or_default()).unwrap_or_default();
    objects.has_namespace(text).unwrap_or_else(|| names.has_namespace(label))
}

/// `10-244-1-5` or `fd00-10-244--5`.
fn parse_dashed(label: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(label).ok()?;
    let v4 = text.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| text.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}

/// The records of a found name, however they came to be.
pub fn records<'a>(found: &'a Found<'_>) -> Option<Records<'a>> {
    match found {
        Found::Held(Held::Records(records)) => Some(*records),
        Found::Made { answers, answer_count, additionals, additional_count } => Some(Records {
            answers,
            answer_count: *answer_count,
            additionals,
            additional_count: *additional_count,
            zones: &[],
        }),
        _ => None,
    }
}
