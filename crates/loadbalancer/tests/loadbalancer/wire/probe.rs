//! A client that asks all the time who has the addresses, so that an owner that may speak does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use linux::link::{Links, Mac};
use linux::packet::{PacketSocket, Protocol};

use super::vips;
use crate::net::{LINK, Net, address};

/// Between questions: much shorter than anybody may be in doubt.
const PACE: Duration = Duration::from_millis(10);

pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Probe {
    /// On the host at this place.
    pub fn start(net: &Net, host: &str, place: usize) -> Probe {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let open = || {
            let link = Links::current().expect("links").link(LINK).expect("looked up").expect("a link");
            let open = |protocol| PacketSocket::open(link.index, protocol, 0).expect("a packet socket");
            (link.mac.expect("it has one"), open(Protocol::Arp), open(Protocol::NeighbourSolicitation))
        };
        let (mac, arp, solicitations) = net.host(host).run(open).expect("entered");
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                for vip in vips() {
                    // A cable that is out carries no question.
                    let _ = match (vip, address(place, vip.is_ipv4())) {
                        (IpAddr::V4(vip), IpAddr::V4(own)) => arp.send(&request(mac, own, vip), Mac([0xff; 6])),
                        (IpAddr::V6(vip), IpAddr::V6(own)) => {
                            let [.., a, b, c] = vip.octets();
                            solicitations.send(&solicitation(mac, own, vip), Mac([0x33, 0x33, 0xff, a, b, c]))
                        }
                        _ => unreachable!("both are of one family"),
                    };
                }
                std::thread::park_timeout(PACE);
            }
        });
        Probe { stop, thread: Some(thread) }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "it asked all the time");
    }
}

fn request(mac: Mac, own: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    let parts: [&[u8]; 5] = [&[0, 1, 8, 0, 6, 4, 0, 1], &mac.0, &own.octets(), &[0; 6], &wanted.octets()];
    parts.concat()
}

fn solicitation(mac: Mac, own: Ipv6Addr, wanted: Ipv6Addr) -> Vec<u8> {
    let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
    group[13..].copy_from_slice(&wanted.octets()[13..]);
    let mut body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &wanted.octets(), &[1, 1], &mac.0].concat();
    let pseudo = [&own.octets()[..], &group, &[0, 0, 0, 32, 0, 0, 0, 58], &body].concat();
    let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    body[2..4].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
    [&[0x60, 0, 0, 0, 0, 32, 58, 255][..], &own.octets(), &group, &body].concat()
}
