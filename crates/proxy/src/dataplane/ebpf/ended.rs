//! Connections of the ebpf mode that end, or are forgotten: what sockets and flows are in the maps, and what is written there.

use std::net::{IpAddr, SocketAddr};

use linux::bpf::{self, Kernel, Layout};
use services::Protocol;

use super::contacts::{Pair, flow_flag};
use super::layout::{FLOWS, NODES, Reader, write_address};
use crate::Error;

/// The storage of TCP sockets: `struct peer`.
pub const PEERS: &str = "peers";

/// Whom a TCP socket asked for, and who answers; `None` unless it has sent its SYN and has not ended.
pub fn peer(value: &[u8]) -> Option<Pair> {
    const SENT: u32 = 2;
    let mut reader = Reader(value.get(..88)?);
    let mut endpoint = || {
        let (address, port) = (reader.address(), reader.port());
        reader.take::<6>();
        SocketAddr::new(address, port)
    };
    let (asked, _given, actual) = (endpoint(), endpoint(), endpoint());
    reader.long();
    (reader.number() == SENT).then_some(Pair { protocol: Protocol::Tcp, asked, given: actual })
}

/// What masqueraded packets come from, of each family there is.
pub fn node_addresses(kernel: &mut dyn Kernel) -> Result<Vec<IpAddr>, Error> {
    let values = kernel.entries(NODES.name)?.values;
    let Some(addresses) = values.get(8..40) else { return Ok(Vec::new()) };
    let mut reader = Reader(addresses);
    Ok([reader.address(), reader.address()].into_iter().filter(|address| !address.is_unspecified()).collect())
}

/// A translated connection that ends: its client's packets go to `refuser`, whose answers seem to come from whom it asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub client: SocketAddr,
    pub pair: Pair,
    pub refuser: SocketAddr,
}

impl Ended {
    /// The keys of what the client sends, and of what the refuser answers.
    fn keys(&self) -> [Vec<u8>; 2] {
        [(self.client, self.pair.asked, 0), (self.refuser, self.client, 1)].map(|(source, destination, leaving)| {
            let mut key = Vec::new();
            write_address(&mut key, source.ip());
            write_address(&mut key, destination.ip());
            key.extend(source.port().to_be_bytes());
            key.extend(destination.port().to_be_bytes());
            key.extend([self.pair.protocol.number(), leaving, 0, 0]);
            key
        })
    }
}

pub fn end_flows(kernel: &mut dyn Kernel, ended: &[Ended]) -> Result<(), Error> {
    let mut entries = bpf::Entries::default();
    let now = bpf::now().as_nanos() as u64;
    for flow in ended {
        let ways = [(flow.refuser, flow_flag::PICKED), (flow.pair.asked, flow_flag::ANSWER)];
        for (key, (to, flag)) in flow.keys().into_iter().zip(ways) {
            entries.keys.extend(key);
            write_address(&mut entries.values, to.ip());
            entries.values.extend(to.port().to_be_bytes());
            entries.values.extend([0; 6 + 4]);
            entries.values.extend((flag | flow_flag::ANSWERED | flow_flag::CLOSED).to_ne_bytes());
            entries.values.extend([0; 8]);
            entries.values.extend(now.to_ne_bytes());
        }
    }
    Ok(kernel.put(FLOWS.name, &entries)?)
}

pub fn forget_flows(kernel: &mut dyn Kernel, ended: &[Ended]) -> Result<(), Error> {
    Ok(kernel.remove(FLOWS.name, &ended.iter().flat_map(Ended::keys).flatten().collect::<Vec<u8>>())?)
}

/// What UDP sockets that send without connecting were given, and by whom they asked: `sockets`.
const SOCKETS: Layout = Layout { name: "sockets", key_size: 40, value_size: 24, limit: 1 << 16 };

/// Lets sockets that send without connecting have another endpoint than these.
pub fn forget_senders(kernel: &mut dyn Kernel, is_gone: impl Fn(SocketAddr, SocketAddr) -> bool) -> Result<(), Error> {
    const ASKED: u64 = 1;
    let bpf::Entries { keys, values } = kernel.entries(SOCKETS.name)?;
    let mut gone = Vec::new();
    for (key, value) in keys.chunks(SOCKETS.key_size).zip(values.chunks(SOCKETS.value_size)) {
        let place = |reader: &mut Reader<'_>| {
            let (address, port) = (reader.address(), reader.port());
            reader.take::<6>();
            SocketAddr::new(address, port)
        };
        let mut reader = Reader(key);
        reader.long();
        let asked = place(&mut reader);
        if reader.long() == ASKED && is_gone(asked, place(&mut Reader(value))) {
            gone.extend(key);
        }
    }
    Ok(kernel.remove(SOCKETS.name, &gone)?)
}
