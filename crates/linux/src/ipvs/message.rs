//! Values to generic netlink attributes and back (linux/genetlink.h, linux/ip_vs.h). Numbers are in the host's byte order,
//! ports and IPv4 masks in the network's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::value::{Connections, Counters, Destination, Forwarding, Info, Key, Op, Persistence, Scheduler, Service};
use super::value::{ONE_PACKET, SCHEDULER_1, SCHEDULER_2, Timeouts};
use crate::link::wire::{self, Message, attributes, read_text, read_u16, read_u32};

/// The family that names the others.
pub const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

const NEW_SERVICE: u8 = 1;
const SET_SERVICE: u8 = 2;
const DEL_SERVICE: u8 = 3;
const GET_SERVICE: u8 = 4;
const NEW_DEST: u8 = 5;
const SET_DEST: u8 = 6;
const DEL_DEST: u8 = 7;
const GET_DEST: u8 = 8;
const SET_CONFIG: u8 = 12;
const GET_CONFIG: u8 = 13;
const GET_INFO: u8 = 15;

const SERVICE: u16 = 1;
const DEST: u16 = 2;
const TIMEOUT_TCP: u16 = 4;
const TIMEOUT_TCP_FIN: u16 = 5;
const TIMEOUT_UDP: u16 = 6;

const SVC_FAMILY: u16 = 1;
const SVC_PROTOCOL: u16 = 2;
const SVC_ADDRESS: u16 = 3;
const SVC_PORT: u16 = 4;
const SVC_SCHEDULER: u16 = 6;
const SVC_FLAGS: u16 = 7;
const SVC_TIMEOUT: u16 = 8;
const SVC_NETMASK: u16 = 9;

const DEST_ADDRESS: u16 = 1;
const DEST_PORT: u16 = 2;
const DEST_FORWARDING: u16 = 3;
const DEST_WEIGHT: u16 = 4;
const DEST_UPPER: u16 = 5;
const DEST_LOWER: u16 = 6;
const DEST_ACTIVE: u16 = 7;
const DEST_INACTIVE: u16 = 8;
const DEST_PERSISTENT: u16 = 9;
const DEST_FAMILY: u16 = 11;
/// Since Linux 4.1; before it the numbers were of 32 bits, and wrapped.
const DEST_COUNTERS: u16 = 12;

const COUNTED_CONNECTIONS: u16 = 1;
const COUNTED_BYTES_IN: u16 = 4;
const COUNTED_BYTES_OUT: u16 = 5;

const INFO_VERSION: u16 = 1;
const INFO_TABLE: u16 = 2;

const PERSISTENT: u32 = 0x1;
const FORWARDING_MASK: u32 = 0x7;

/// command, version 1, two reserved bytes
pub const HEADER: usize = 4;

fn message(family: u16, flags: u16, command: u8) -> Message {
    Message::new(family, flags, &[command, 1, 0, 0])
}

pub fn find_family(name: &str) -> Message {
    let mut message = message(CONTROLLER, wire::ACK, GET_FAMILY);
    message.text(FAMILY_NAME, name);
    message
}

pub fn family_id(payload: &[u8]) -> Option<u16> {
    attributes(payload, HEADER).find(|(kind, _)| *kind == FAMILY_ID).and_then(|(_, value)| read_u16(value, 0))
}

pub fn list_services(family: u16) -> Message {
    message(family, wire::DUMP, GET_SERVICE)
}

pub fn list_destinations(family: u16, of: &Key) -> Message {
    let mut message = message(family, wire::DUMP, GET_DEST);
    message.nested(SERVICE, |service| put_key(service, of));
    message
}

pub fn get_timeouts(family: u16) -> Message {
    message(family, wire::ACK, GET_CONFIG)
}

pub fn get_info(family: u16) -> Message {
    message(family, wire::ACK, GET_INFO)
}

/// The message of an operation; `None` for those that are about the interface.
pub fn encode(family: u16, op: &Op) -> Option<Message> {
    let request = |command| message(family, wire::ACK, command);
    let with_destination = |command, key: &Key, fill: &dyn Fn(&mut Message)| {
        let mut message = request(command);
        message.nested(SERVICE, |service| put_key(service, key));
        message.nested(DEST, fill);
        message
    };
    Some(match op {
        Op::AddService(service) | Op::SetService(service) => {
            let command = if matches!(op, Op::AddService(_)) { NEW_SERVICE } else { SET_SERVICE };
            let mut message = request(command);
            message.nested(SERVICE, |nest| put_service(nest, service));
            message
        }
        Op::DeleteService(key) => {
            let mut message = request(DEL_SERVICE);
            message.nested(SERVICE, |service| put_key(service, key));
            message
        }
        Op::AddDestination(key, destination) => {
            with_destination(NEW_DEST, key, &|nest| put_destination(nest, destination))
        }
        Op::SetDestination(key, destination) => {
            with_destination(SET_DEST, key, &|nest| put_destination(nest, destination))
        }
        Op::DeleteDestination(key, address) => with_destination(DEL_DEST, key, &|nest| put_place(nest, *address)),
        Op::SetTimeouts(Timeouts { tcp, tcp_fin, udp }) => {
            let mut message = request(SET_CONFIG);
            for (kind, seconds) in [(TIMEOUT_TCP, tcp), (TIMEOUT_TCP_FIN, tcp_fin), (TIMEOUT_UDP, udp)] {
                message.u32(kind, *seconds);
            }
            message
        }
        Op::Bind(_) | Op::Unbind(_) => return None,
    })
}

/// AF_INET or AF_INET6.
fn family(address: IpAddr) -> u16 {
    if address.is_ipv4() { 2 } else { 10 }
}

/// Always sixteen bytes: the kernel copies a union.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn put_key(nest: &mut Message, key: &Key) {
    nest.attribute(SVC_FAMILY, &family(key.address.ip()).to_ne_bytes());
    nest.attribute(SVC_PROTOCOL, &u16::from(key.protocol).to_ne_bytes());
    nest.attribute(SVC_ADDRESS, &octets(key.address.ip()));
    nest.attribute(SVC_PORT, &key.address.port().to_be_bytes());
}

fn put_service(nest: &mut Message, service: &Service) {
    put_key(nest, &service.key);
    nest.text(SVC_SCHEDULER, service.scheduler.name());
    let persistent = if service.persistence.is_some() { PERSISTENT } else { 0 };
    // Flags, and which of them are meant.
    let mut flags = (service.flags | persistent).to_ne_bytes().to_vec();
    flags.extend(u32::MAX.to_ne_bytes());
    nest.attribute(SVC_FLAGS, &flags);
    nest.u32(SVC_TIMEOUT, service.persistence.map_or(0, |persistence| persistence.timeout_seconds));
    let is_v4 = service.key.address.is_ipv4();
    let prefix = service.persistence.map_or(if is_v4 { 32 } else { 128 }, |persistence| persistence.prefix);
    if is_v4 {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        nest.attribute(SVC_NETMASK, &mask.to_be_bytes());
    } else {
        nest.u32(SVC_NETMASK, prefix.into());
    }
}

fn put_place(nest: &mut Message, address: SocketAddr) {
    nest.attribute(DEST_FAMILY, &family(address.ip()).to_ne_bytes());
    nest.attribute(DEST_ADDRESS, &octets(address.ip()));
    nest.attribute(DEST_PORT, &address.port().to_be_bytes());
}

fn put_destination(nest: &mut Message, destination: &Destination) {
    put_place(nest, destination.address);
    let forwarding = match destination.forwarding {
        Forwarding::Masquerade => 0,
        Forwarding::Local => 1,
        Forwarding::Tunnel => 2,
        Forwarding::DirectRoute => 3,
    };
    nest.u32(DEST_FORWARDING, forwarding);
    nest.u32(DEST_WEIGHT, destination.weight);
    nest.u32(DEST_UPPER, destination.upper_threshold);
    nest.u32(DEST_LOWER, destination.lower_threshold);
}

fn nested(payload: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(payload, HEADER).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn address(family: u16, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        2 => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        10 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _ => None,
    }
}

fn port(value: &[u8]) -> Option<u16> {
    value.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes))
}

/// A listed service; `None` for one of a firewall mark, which has no address.
pub fn decode_service(payload: &[u8]) -> Option<Service> {
    let (mut af, mut protocol, mut octets, mut at) = (0, None, None, None);
    let (mut scheduler, mut flags, mut timeout_seconds, mut mask) = (None, 0, 0, [0; 4]);
    for (kind, value) in attributes(nested(payload, SERVICE)?, 0) {
        match kind {
            SVC_FAMILY => af = read_u16(value, 0)?,
            SVC_PROTOCOL => protocol = Some(u8::try_from(read_u16(value, 0)?).ok()?),
            SVC_ADDRESS => octets = Some(value),
            SVC_PORT => at = port(value),
            SVC_SCHEDULER => scheduler = Some(Scheduler::named(&read_text(value))),
            SVC_FLAGS => flags = read_u32(value, 0)?,
            SVC_TIMEOUT => timeout_seconds = read_u32(value, 0)?,
            SVC_NETMASK => mask = *value.first_chunk::<4>()?,
            _ => {}
        }
    }
    let key = Key { address: SocketAddr::new(address(af, octets?)?, at?), protocol: protocol? };
    let prefix = match key.address {
        SocketAddr::V4(_) => u32::from_be_bytes(mask).leading_ones() as u8,
        SocketAddr::V6(_) => u8::try_from(u32::from_ne_bytes(mask)).ok()?,
    };
    let persistence = (flags & PERSISTENT != 0).then_some(Persistence { timeout_seconds, prefix });
    let flags = flags & (ONE_PACKET | SCHEDULER_1 | SCHEDULER_2);
    Some(Service { key, scheduler: scheduler?, persistence, flags })
}

/// A listed destination of a service of the family of `of`.
pub fn decode_destination(payload: &[u8], of: &Key) -> Option<(Destination, Connections)> {
    let (mut af, mut octets, mut at) = (family(of.address.ip()), None, None);
    let (mut forwarding, mut weight, mut upper_threshold, mut lower_threshold) = (0, 0, 0, 0);
    let mut connections = Connections::default();
    for (kind, value) in attributes(nested(payload, DEST)?, 0) {
        match kind {
            DEST_FAMILY => af = read_u16(value, 0)?,
            DEST_ADDRESS => octets = Some(value),
            DEST_PORT => at = port(value),
            DEST_FORWARDING => forwarding = read_u32(value, 0)? & FORWARDING_MASK,
            DEST_WEIGHT => weight = read_u32(value, 0)?,
            DEST_UPPER => upper_threshold = read_u32(value, 0)?,
            DEST_LOWER => lower_threshold = read_u32(value, 0)?,
            DEST_ACTIVE => connections.active = read_u32(value, 0)?,
            DEST_INACTIVE => connections.inactive = read_u32(value, 0)?,
            DEST_PERSISTENT => connections.persistent = read_u32(value, 0)?,
            _ => {}
        }
    }
    let address = SocketAddr::new(address(af, octets?)?, at?);
    let forwarding = match forwarding {
        0 => Forwarding::Masquerade,
        1 => Forwarding::Local,
        2 => Forwarding::Tunnel,
        3 => Forwarding::DirectRoute,
        _ => return None,
    };
    Some((Destination { address, forwarding, weight, upper_threshold, lower_threshold }, connections))
}

/// What a listed destination has had; nothing if the kernel does not tell.
pub fn decode_counters(payload: &[u8]) -> Option<Counters> {
    let mut counters = Counters::default();
    let nest = attributes(nested(payload, DEST)?, 0).find(|(kind, _)| *kind == DEST_COUNTERS);
    for (kind, value) in nest.into_iter().flat_map(|(_, nest)| attributes(nest, 0)) {
        let number = value.first_chunk::<8>().map(|bytes| u64::from_ne_bytes(*bytes));
        match kind {
            COUNTED_CONNECTIONS => counters.connections = number?,
            COUNTED_BYTES_IN => counters.bytes_in = number?,
            COUNTED_BYTES_OUT => counters.bytes_out = number?,
            _ => {}
        }
    }
    Some(counters)
}

pub fn decode_timeouts(payload: &[u8]) -> Option<Timeouts> {
    let seconds = |wanted| {
        attributes(payload, HEADER).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| read_u32(value, 0))
    };
    Some(Timeouts { tcp: seconds(TIMEOUT_TCP)?, tcp_fin: seconds(TIMEOUT_TCP_FIN)?, udp: seconds(TIMEOUT_UDP)? })
}

pub fn decode_info(payload: &[u8]) -> Option<Info> {
    let number = |wanted| {
        attributes(payload, HEADER).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| read_u32(value, 0))
    };
    let [_, major, minor, patch] = number(INFO_VERSION)?.to_be_bytes();
    Some(Info { version: (major, minor, patch), connection_table: number(INFO_TABLE)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(message: Message) -> Vec<u8> {
        message.finish(1)[wire::HEADER..].to_vec()
    }

    #[test]
    fn services_and_destinations_survive_the_way_out_and_back() {
        for (address, prefix) in [("10.96.0.10:80", 24), ("[fd00:10:96::10]:53", 64)] {
            let key = Key { address: address.parse().expect("address"), protocol: 132 };
            for persistence in [None, Some(Persistence { timeout_seconds: 10_800, prefix })] {
                for scheduler in Scheduler::ALL {
                    let service = Service { key, scheduler, persistence, flags: SCHEDULER_2 };
                    let message = encode(30, &Op::AddService(service.clone())).expect("a message");
                    assert_eq!(decode_service(&payload(message)), Some(service));
                }
            }
            let destination = Destination {
                address: address.parse().expect("address"),
                forwarding: Forwarding::Tunnel,
                weight: 7,
                upper_threshold: 100,
                lower_threshold: 50,
            };
            let message = encode(30, &Op::SetDestination(key, destination.clone())).expect("a message");
            assert_eq!(decode_destination(&payload(message), &key), Some((destination, Connections::default())));
        }
        let timeouts = Timeouts { tcp: 900, tcp_fin: 120, udp: 300 };
        let message = encode(30, &Op::SetTimeouts(timeouts)).expect("a message");
        assert_eq!(decode_timeouts(&payload(message)), Some(timeouts));
    }

    /// The bytes that libipvs sends for `ipvsadm -A -t 10.0.0.1:80 -s rr`, after the headers.
    #[test]
    fn a_service_has_the_bytes_of_the_kernel_s_abi() {
        let key = Key { address: "10.0.0.1:80".parse().expect("address"), protocol: 6 };
        let service = Service { key, scheduler: Scheduler::RoundRobin, persistence: None, flags: 0 };
        let bytes = payload(encode(30, &Op::AddService(service)).expect("a message"));
        assert_eq!(bytes[..4], [NEW_SERVICE, 1, 0, 0]);
        let fields: Vec<(u16, &[u8])> = attributes(nested(&bytes, SERVICE).expect("a service"), 0).collect();
        let expected: [(u16, &[u8]); 8] = [
            (1, &2u16.to_ne_bytes()),
            (2, &6u16.to_ne_bytes()),
            (3, &[10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (4, &[0, 80]),
            (6, b"rr\0"),
            (7, &[0, 0, 0, 0, 255, 255, 255, 255]),
            (8, &[0; 4]),
            (9, &[255; 4]),
        ];
        assert_eq!(fields, expected);
    }

    #[test]
    fn counters_are_found_beside_the_destination() {
        let mut message = message(30, 0, NEW_DEST);
        message.nested(DEST, |nest| {
            put_place(nest, "10.244.0.5:80".parse().expect("address"));
            nest.nested(DEST_COUNTERS, |counters| {
                for (kind, number) in [(1, 3u64), (2, 30), (3, 20), (4, 5_000_000_000), (5, 7)] {
                    counters.attribute(kind, &number.to_ne_bytes());
                }
            });
        });
        let expected = Counters { connections: 3, bytes_in: 5_000_000_000, bytes_out: 7 };
        assert_eq!(decode_counters(&payload(message)), Some(expected));
    }

    #[test]
    fn a_cut_answer_is_no_service_and_no_panic() {
        let key = Key { address: "10.0.0.1:80".parse().expect("address"), protocol: 6 };
        let service = Service { key, scheduler: Scheduler::RoundRobin, persistence: None, flags: 0 };
        let bytes = payload(encode(30, &Op::AddService(service)).expect("a message"));
        for cut in 0..bytes.len() {
            assert_eq!(decode_service(&bytes[..cut]), None);
            assert_eq!(decode_destination(&bytes[..cut], &key), None);
        }
    }
}
