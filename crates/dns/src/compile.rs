//! One Service becomes the bytes of all its answers, once, when it changes.
//!
//! A name's length decides where its records stand in a reply, and it is known here; so pointers within the reply are
//! written now, and an answer is a copy. Only the case in which a client writes the zone is not known: SRV targets may not
//! be compressed (RFC 2782), and the places of the zone in them are kept, to be overwritten.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use services::{Service, ServiceKind, ServiceTable, Slice, SliceEndpoint};

use crate::wire::{HEADER, QUESTION_NAME, WireName, kind};

/// Names and types below a Service, in order, and what stands there.
pub struct Compiled {
    entries: Box<[Entry]>,
    bytes: Box<[u8]>,
}

struct Entry {
    /// Where its bytes begin: labels below the Service, answers, additional records, places of the zone.
    at: u32,
    below_len: u8,
    kind: u16,
    answers: u16,
    additionals: u16,
    answers_len: u32,
    additionals_len: u32,
    zones: u16,
}

/// Below it are zones whose endpoints are preferred to others.
pub const PREFERENCE: &[u8] = b"\x06prefer\x05_zone";
/// The type of an entry that only says: this name exists.
const NOTHING: u16 = 0;
/// A pointer can lead so far into a message, and no further (RFC 1035, 4.1.4).
const POINTER_LIMIT: usize = 0x3fff;

/// The records of one name and type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Records<'a> {
    /// Each begins with a pointer to the question's name.
    pub answers: &'a [u8],
    pub answer_count: u16,
    pub additionals: &'a [u8],
    pub additional_count: u16,
    /// Offsets of the zone, from the begin of `answers`: four bytes each, big end first.
    pub zones: &'a [u8],
}

/// What a Service knows of a name below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held<'a> {
    Records(Records<'a>),
    /// Another name, on the wire; its records stand for this one's.
    Alias(&'a [u8]),
    NoData,
    NoName,
}

impl Compiled {
    /// `below`: the labels below the Service's own, each with its length before it.
    pub fn find(&self, below: &[u8], wanted: u16) -> Held<'_> {
        let first = self.entries.partition_point(|entry| self.below(entry) < below);
        let mut held = Held::NoName;
        for entry in self.entries[first..].iter().take_while(|entry| self.below(entry) == below) {
            let records = self.records(entry);
            if entry.kind == wanted || (wanted == kind::ANY && entry.kind != NOTHING) {
                // For ANY one set of records is enough (RFC 8482, 4.1).
                return Held::Records(records);
            }
            if entry.kind == kind::CNAME {
                return Held::Alias(records.answers.get(RECORD..).unwrap_or_default());
            }
            held = Held::NoData;
        }
        held
    }

    fn below(&self, entry: &Entry) -> &[u8] {
        let at = entry.at as usize;
        &self.bytes[at..at + usize::from(entry.below_len)]
    }

    fn records(&self, entry: &Entry) -> Records<'_> {
        let rest = &self.bytes[entry.at as usize + usize::from(entry.below_len)..];
        let (answers, rest) = rest.split_at(entry.answers_len as usize);
        let (additionals, rest) = rest.split_at(entry.additionals_len as usize);
        Records {
            answers,
            answer_count: entry.answers,
            additionals,
            additional_count: entry.additionals,
            zones: &rest[..usize::from(entry.zones) * 4],
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Bytes of a record before its data, when its name is a pointer.
pub const RECORD: usize = 12;

/// Appends a record; the length of its data comes last, when it is known.
pub fn record(out: &mut Vec<u8>, owner: [u8; 2], kind: u16, ttl: u32, data: &[u8]) {
    out.extend_from_slice(&owner);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&[0, 1]);
    out.extend_from_slice(&ttl.to_be_bytes());
    out.extend_from_slice(&(data.len() as u16).to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends the record of an address.
pub fn address(out: &mut Vec<u8>, owner: [u8; 2], ttl: u32, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => record(out, owner, kind::A, ttl, &ip.octets()),
        IpAddr::V6(ip) => record(out, owner, kind::AAAA, ttl, &ip.octets()),
    }
}

/// Labels with their lengths. `None`: one of them is empty or longer than DNS allows.
pub fn labels(texts: &[&str]) -> Option<Vec<u8>> {
    let mut wire = Vec::new();
    for text in texts {
        let length = u8::try_from(text.len()).ok().filter(|length| (1..=63).contains(length))?;
        wire.push(length);
        wire.extend_from_slice(text.as_bytes());
    }
    Some(wire)
}

/// A whole name on the wire. `None`: it is not one.
pub fn name(text: &str) -> Option<Vec<u8>> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let mut wire = labels(&text.split('.').collect::<Vec<_>>())?;
    wire.push(0);
    (wire.len() <= 255).then_some(wire)
}

/// Where the answers of a Service are looked for: its name and its namespace's.
pub fn key(namespace: &str, service: &str) -> Option<Vec<u8>> {
    let mut wire = labels(&[service, namespace])?;
    wire.make_ascii_lowercase();
    Some(wire)
}

#[derive(Default)]
struct Set {
    answers: Vec<u8>,
    answer_count: u16,
    additionals: Vec<u8>,
    additional_count: u16,
    zones: Vec<u32>,
}

struct Compiler<'a> {
    zone: &'a WireName,
    ttl: u32,
    /// The Service's labels and its namespace's.
    key: &'a [u8],
    sets: BTreeMap<(Vec<u8>, u16), Set>,
}

/// All answers of a Service that the table has.
pub fn compile(table: &ServiceTable, service: &Service, zone: &WireName, ttl: u32) -> Option<Compiled> {
    let key = key(&service.namespace, &service.name)?;
    let mut compiler = Compiler { zone, ttl, key: &key, sets: BTreeMap::new() };
    let slices: Vec<&Slice> = table.slices(&service.namespace, &service.name).collect();
    let all = slices.iter().flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (*slice, endpoint)));
    let ready: Vec<(&Slice, &SliceEndpoint)> = all.filter(|(_, endpoint)| endpoint.ready).collect();
    match &service.kind {
        ServiceKind::ClusterIp(addresses) => {
            compiler.addresses(&[], addresses.iter().copied());
            compiler.cluster_ports(service, addresses);
            compiler.endpoints(&ready);
        }
        ServiceKind::Headless => {
            compiler.addresses(&[], ready.iter().map(|(_, endpoint)| endpoint.address));
            compiler.headless_ports(&ready);
            compiler.endpoints(&ready);
            compiler.zones(&ready);
        }
        ServiceKind::ExternalName(target) => compiler.alias(target),
        ServiceKind::Pending => compiler.exists(&[]),
    }
    Some(pack(compiler.sets))
}

impl Compiler<'_> {
    fn set(&mut self, below: &[u8], kind: u16) -> &mut Set {
        self.sets.entry((below.to_vec(), kind)).or_default()
    }

    fn exists(&mut self, below: &[u8]) {
        self.set(below, NOTHING);
    }

    /// Where the first record stands in a reply to a question about this name.
    fn base(&self, below: &[u8]) -> usize {
        HEADER + below.len() + self.key.len() + b"\x03svc".len() + self.zone.bytes().len() + 4
    }

    fn addresses(&mut self, below: &[u8], addresses: impl Iterator<Item = IpAddr>) {
        let ttl = self.ttl;
        for ip in addresses.collect::<BTreeSet<_>>() {
            let set = self.set(below, if ip.is_ipv4() { kind::A } else { kind::AAAA });
            address(&mut set.answers, QUESTION_NAME, ttl, ip);
            set.answer_count = set.answer_count.saturating_add(1);
        }
    }

    /// An address is not a name: it has no record.
    fn alias(&mut self, target: &str) {
        if target.trim_end_matches('.').parse::<IpAddr>().is_ok() {
            return;
        }
        let Some(target) = name(target) else { return };
        let ttl = self.ttl;
        let set = self.set(&[], kind::CNAME);
        record(&mut set.answers, QUESTION_NAME, kind::CNAME, ttl, &target);
        set.answer_count = 1;
    }

    fn endpoints(&mut self, ready: &[(&Slice, &SliceEndpoint)]) {
        let mut hosts: BTreeMap<Vec<u8>, Vec<IpAddr>> = BTreeMap::new();
        for (_, endpoint) in ready {
            let Some(mut below) = labels(&[&endpoint.host()]) else { continue };
            below.make_ascii_lowercase();
            hosts.entry(below).or_default().push(endpoint.address);
        }
        for (below, addresses) in hosts {
            self.addresses(&below, addresses.into_iter());
        }
    }

    /// Names for who wants the endpoints of one zone only (`pin`), or first of all (`prefer`).
    fn zones(&mut self, ready: &[(&Slice, &SliceEndpoint)]) {
        let mut zones: BTreeMap<&str, Vec<IpAddr>> = BTreeMap::new();
        for (_, endpoint) in ready {
            if let Some(zone) = &endpoint.zone {
                zones.entry(zone).or_default().push(endpoint.address);
            }
        }
        for (zone, addresses) in zones {
            let zone = zone.to_ascii_lowercase();
            for way in ["pin", "prefer"] {
                let Some(below) = labels(&[&zone, way, "_zone"]) else { continue };
                self.addresses(&below, addresses.iter().copied());
                self.exists(&below[zone.len() + 1..]);
            }
        }
        // For a zone without endpoints there is no name to pin to, and all endpoints to prefer.
        if !ready.is_empty() {
            self.exists(b"\x05_zone");
            self.exists(PREFERENCE);
        }
    }

    fn cluster_ports(&mut self, service: &Service, addresses: &[IpAddr]) {
        let targets = addresses.iter().map(|ip| (Vec::new(), *ip)).collect::<Vec<_>>();
        for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
            let number = BTreeMap::from([((port.port, Vec::new()), targets.clone())]);
            self.port(&port.name, port.protocol.name(), number);
        }
    }

    /// The slices of both families name one endpoint: one record, two addresses.
    fn headless_ports(&mut self, ready: &[(&Slice, &SliceEndpoint)]) {
        let mut ports: BTreeMap<(&str, &str), Targets> = BTreeMap::new();
        for (slice, endpoint) in ready {
            let Some(host) = labels(&[&endpoint.host()]) else { continue };
            for port in slice.ports.iter().filter(|port| !port.name.is_empty()) {
                let Some(number) = port.port else { continue };
                let targets = ports.entry((&port.name, port.protocol.name())).or_default();
                targets.entry((number, host.clone())).or_default().push((host.clone(), endpoint.address));
            }
        }
        for ((name, protocol), targets) in ports {
            self.port(name, protocol, targets);
        }
    }

    /// The SRV records of one named port, and what is between them and the Service.
    fn port(&mut self, port: &str, protocol: &str, targets: Targets) {
        let (port, protocol) = (format!("_{}", port.to_ascii_lowercase()), format!("_{protocol}"));
        let Some(below) = labels(&[&port, &protocol]) else { return };
        self.exists(&below[port.len() + 1..]);
        let (base, ttl) = (self.base(&below), self.ttl);
        let (zone, key) = (self.zone.bytes(), self.key);
        let mut set = Set::default();
        let weight = u16::try_from(100 / targets.len().max(1)).unwrap_or(0).max(1);
        // Where a target was written first: its addresses point there.
        let mut written: BTreeMap<&[u8], usize> = BTreeMap::new();
        for (number, host) in targets.keys() {
            let mut data = [0u16.to_be_bytes(), weight.to_be_bytes(), number.to_be_bytes()].concat();
            written.entry(host).or_insert(set.answers.len() + RECORD + data.len());
            for part in [host.as_slice(), key, b"\x03svc"] {
                data.extend_from_slice(part);
            }
            let Ok(zone_at) = u32::try_from(set.answers.len() + RECORD + data.len()) else { break };
            data.extend_from_slice(zone);
            set.zones.push(zone_at);
            record(&mut set.answers, QUESTION_NAME, kind::SRV, ttl, &data);
            set.answer_count = set.answer_count.saturating_add(1);
        }
        let addresses: BTreeSet<&(Vec<u8>, IpAddr)> = targets.values().flatten().collect();
        for (host, ip) in addresses {
            let at = base + written.get(host.as_slice()).copied().unwrap_or(POINTER_LIMIT);
            // Further on no pointer leads; the client asks for the addresses that it misses.
            let Some(owner) = u16::try_from(at).ok().filter(|at| usize::from(*at) <= POINTER_LIMIT) else { continue };
            address(&mut set.additionals, (owner | 0xc000).to_be_bytes(), ttl, *ip);
            set.additional_count = set.additional_count.saturating_add(1);
        }
        self.sets.insert((below, kind::SRV), set);
    }
}

/// By port number and host, the addresses of each host. An empty host is the Service itself.
type Targets = BTreeMap<(u16, Vec<u8>), Vec<(Vec<u8>, IpAddr)>>;

fn pack(sets: BTreeMap<(Vec<u8>, u16), Set>) -> Compiled {
    let mut bytes = Vec::new();
    let mut entries = Vec::with_capacity(sets.len());
    for ((below, kind), set) in sets {
        entries.push(Entry {
            at: bytes.len() as u32,
            below_len: below.len() as u8,
            kind,
            answers: set.answer_count,
            additionals: set.additional_count,
            answers_len: set.answers.len() as u32,
            additionals_len: set.additionals.len() as u32,
            zones: set.zones.len().min(usize::from(u16::MAX)) as u16,
        });
        bytes.extend_from_slice(&below);
        bytes.extend_from_slice(&set.answers);
        bytes.extend_from_slice(&set.additionals);
        bytes.extend(set.zones.iter().flat_map(|at| at.to_be_bytes()));
    }
    Compiled { entries: entries.into(), bytes: bytes.into() }
}
