//! How many flows each endpoint has, counted anew. The programs count as flows begin and end, but a flow whose client vanished
//! has no end, and one that made room for others was not told of.

use std::collections::BTreeMap;
use std::time::Duration;

use linux::bpf::{Entries, Kernel};
use services::Protocol;

use super::layout::{FLOWS, LOADS, LoadKind, counted_flow, flow_seen, is_load_of, load_key};
use crate::Error;

/// Between two counts.
pub const PAUSE: Duration = Duration::from_secs(30);
/// A flow that was silent for so long has ended, whatever it said.
const TCP_IDLE: Duration = Duration::from_secs(3_600);
const UDP_IDLE: Duration = Duration::from_secs(120);

/// Writes what there is in place of what the programs believe. A flow that begins or ends meanwhile is right the next time.
pub fn recount(kernel: &mut impl Kernel, now: Duration) -> Result<(), Error> {
    let (flows, held) = (kernel.entries(FLOWS.name)?, kernel.entries(LOADS.name)?);
    let known = held.keys.chunks(LOADS.key_size).filter(|key| is_load_of(key, LoadKind::Flows));
    let mut loads: BTreeMap<Vec<u8>, i64> = known.map(|key| (key.to_vec(), 0)).collect();
    for (key, flow) in flows.keys.chunks(FLOWS.key_size).zip(flows.values.chunks(FLOWS.value_size)) {
        let Some((endpoint, protocol)) = counted_flow(key, flow) else { continue };
        let idle = if protocol == Protocol::Udp { UDP_IDLE } else { TCP_IDLE };
        if now.saturating_sub(flow_seen(flow)) < idle {
            *loads.entry(load_key(endpoint, protocol, LoadKind::Flows)).or_default() += 1;
        }
    }
    let mut entries = Entries::default();
    for (key, load) in loads {
        entries.keys.extend(key);
        entries.values.extend(load.to_ne_bytes());
    }
    Ok(kernel.put(LOADS.name, &entries)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux::bpf::Fake;
    use std::net::SocketAddr;

    const NOW: Duration = Duration::from_secs(10_000);

    /// As the programs write it: `struct flow_key` and `struct flow`.
    fn flow(client_port: u16, protocol: Protocol, to: [u8; 4], flags: u32, idle: u64) -> Entries {
        let mapped = |address: [u8; 4]| std::net::Ipv4Addr::from(address).to_ipv6_mapped().octets();
        let mut keys = [mapped([203, 0, 113, 9]), mapped([10, 96, 0, 10])].concat();
        keys.extend([client_port.to_be_bytes(), 80_u16.to_be_bytes()].concat());
        keys.extend([protocol.number(), 0, 0, 0]);
        let mut values = mapped(to).to_vec();
        values.extend(80_u16.to_be_bytes());
        values.extend([0; 6]);
        values.extend([7_u32.to_ne_bytes(), flags.to_ne_bytes()].concat());
        values.resize(FLOWS.value_size - 8, 0);
        values.extend((NOW - Duration::from_secs(idle)).as_nanos().to_le_bytes()[..8].iter());
        Entries { keys, values }
    }

    #[test]
    fn what_has_ended_unseen_is_not_counted() {
        let mut kernel = Fake::new(&[FLOWS, LOADS]);
        let (picked, counted) = (1, 65);
        let (one, other) = ([10, 244, 0, 1], [10, 244, 0, 2]);
        for entry in [
            flow(1, Protocol::Tcp, one, counted, 0),
            flow(2, Protocol::Tcp, one, counted, 600),
            flow(3, Protocol::Tcp, one, counted, 3_601),
            flow(4, Protocol::Tcp, one, picked, 0),
            flow(5, Protocol::Udp, one, counted, 1),
            flow(6, Protocol::Udp, one, counted, 121),
        ] {
            kernel.put(FLOWS.name, &entry).expect("a fake");
        }
        let key = |host, protocol, kind| load_key(SocketAddr::from((host, 80)), protocol, kind);
        let believed = [
            (key(one, Protocol::Tcp, LoadKind::Flows), 9_i64),
            (key(other, Protocol::Tcp, LoadKind::Flows), 4),
            (key(one, Protocol::Tcp, LoadKind::Sockets), 5),
        ];
        for (key, load) in &believed {
            let entry = Entries { keys: key.clone(), values: load.to_ne_bytes().to_vec() };
            kernel.put(LOADS.name, &entry).expect("a fake");
        }
        recount(&mut kernel, NOW).expect("a fake");
        let load =
            |key: &[u8]| kernel.get(LOADS.name, key).map(|load| i64::from_ne_bytes(load.try_into().expect("a load")));
        assert_eq!(believed.each_ref().map(|(key, _)| load(key)), [Some(2), Some(0), Some(5)]);
        assert_eq!(load(&key(one, Protocol::Udp, LoadKind::Flows)), Some(1));
    }
}
