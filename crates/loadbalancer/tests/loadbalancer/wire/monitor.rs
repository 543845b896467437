//! Who says that it has which address: each ARP, NDP and VRRP packet, and what BGP speakers send, with the port of the switch that it came in at and the
//! time that the kernel noted.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use linux::link::Links;
use linux::packet::Tap;
use loadbalancer::vrrp::packet::{Advertisement, PROTOCOL};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::stream::Segment;
use crate::net::{Net, until};

/// An owner that nobody contradicted for so long is one that stays.
const REST: Duration = Duration::from_millis(800);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Arp,
    Ndp,
    Vrrp,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Claim {
    pub at: Duration,
    pub port: String,
    pub address: IpAddr,
    pub how: How,
}

impl Debug for Claim {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        write!(out, "{:.3} {} {:?} {}", self.at.as_secs_f64() % 1000.0, self.port, self.how, self.address)
    }
}

pub struct Monitor {
    claims: Arc<Mutex<Vec<Claim>>>,
    segments: Arc<Mutex<Vec<Segment>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Before any host speaks.
    pub fn start(net: &Net) -> Monitor {
        let switch = net.switch();
        let links = Links::open(&switch).expect("its links").links().expect("listed");
        let ports: BTreeMap<u32, String> =
            links.into_iter().filter(|link| link.kind == "veth").map(|link| (link.index, link.name)).collect();
        let (claims, stop) = (Arc::<Mutex<Vec<Claim>>>::default(), Arc::new(AtomicBool::new(false)));
        let segments = Arc::<Mutex<Vec<Segment>>>::default();
        let (heard, carried, ended) = (claims.clone(), segments.clone(), stop.clone());
        let tap = switch.run(Tap::open).expect("entered").expect("a tap");
        let listen = move || {
            let mut buffer = vec![0; 1 << 17];
            while !ended.load(Ordering::Relaxed) {
                let mut waits = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
                poll(&mut waits, PollTimeout::from(50u16)).expect("waited");
                while let Some(seen) = tap.receive(&mut buffer).expect("received") {
                    // On the bridges all of it comes once more.
                    let Some(port) = ports.get(&seen.index) else { continue };
                    let said = claims_of(&buffer[..seen.length]);
                    let claim = |(how, address)| Claim { at: seen.at, port: port.clone(), address, how };
                    heard.lock().expect("held briefly").extend(said.into_iter().map(claim));
                    let segment = Segment::of(&buffer[..seen.length], seen.at);
                    carried.lock().expect("held briefly").extend(segment);
                }
            }
        };
        Monitor { claims, segments, stop, thread: Some(std::thread::spawn(listen)) }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Claim>> {
        self.claims.lock().expect("held briefly")
    }

    /// All that went between BGP speakers, in order of time.
    pub fn segments(&self) -> Vec<Segment> {
        let mut segments = self.segments.lock().expect("held briefly").clone();
        segments.sort_by_key(|segment| segment.at);
        segments
    }

    /// What was said of an address, in order of time.
    pub fn of(&self, address: IpAddr) -> Vec<Claim> {
        let mut said: Vec<Claim> = self.all().iter().filter(|claim| claim.address == address).cloned().collect();
        said.sort_by_key(|claim| claim.at);
        said
    }

    /// Whoever alone has said of late that it has the address, and goes on saying so.
    pub fn owner(&self, address: IpAddr) -> Option<String> {
        let now = Tap::now();
        let all = self.all();
        let mut late = all.iter().rev().take_while(|claim| claim.at + REST * 2 > now);
        let mut late: Vec<&Claim> = late.by_ref().filter(|claim| claim.address == address).collect();
        late.sort_by_key(|claim| claim.at);
        let last = late.last().filter(|claim| claim.at + REST > now)?;
        let changed = late.iter().rev().find(|claim| claim.port != last.port).map(|claim| claim.at);
        let first = late.iter().find(|claim| changed.is_none_or(|at| claim.at > at))?.at;
        (last.at >= first + REST).then(|| last.port.clone())
    }

    /// Waits until an owner stays from now on, and says which.
    pub fn settled(&self, address: IpAddr) -> String {
        let begun = Tap::now();
        let mut owner = None;
        until("one owner that stays", || {
            owner = self.owner(address).filter(|_| Tap::now() > begun + REST * 2);
            owner.is_some()
        });
        owner.expect("it was there")
    }

    /// Waits until somebody of whom it is true claims the address after a time, and says how long after.
    pub fn claimed(&self, address: IpAddr, since: Duration, is_right: impl Fn(&str) -> bool) -> Duration {
        let found = || {
            let all = self.all();
            let after = all.iter().rev().take_while(|claim| claim.at + REST > since);
            after.filter(|one| one.address == address && one.at > since && is_right(&one.port)).map(|one| one.at).min()
        };
        until("somebody has the address", || found().is_some());
        found().expect("it was there").saturating_sub(since)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the monitor heard all of it");
        }
    }
}

/// Stretches of time in which one host claims an address around claims of another: from and to. A host that claims it again
/// after `least` or more has had it twice.
pub fn overlaps(said: &[Claim], least: Duration) -> Vec<(Duration, Duration, Vec<Claim>)> {
    let mut last: BTreeMap<&str, usize> = BTreeMap::new();
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (place, claim) in said.iter().enumerate() {
        if let Some(before) = last.insert(&claim.port, place)
            && said[before..place].iter().any(|other| other.port != claim.port)
            && claim.at.saturating_sub(said[before].at) < least
        {
            match found.last_mut() {
                Some((_, to)) if *to >= before => *to = place,
                _ => found.push((before, place)),
            }
        }
    }
    found.into_iter().map(|(from, to)| (said[from].at, said[to].at, said[from..=to].to_vec())).collect()
}

/// What a frame says its sender has.
fn claims_of(frame: &[u8]) -> Vec<(How, IpAddr)> {
    let Some((header, packet)) = frame.split_first_chunk::<14>() else { return Vec::new() };
    let v4 = |at: usize| packet.get(at..at + 4).map(|ip| Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3]));
    let v6 = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
    let vrrp = |from: IpAddr, to: IpAddr, bytes: &[u8]| -> Vec<(How, IpAddr)> {
        // Priority 0 gives up.
        let told = Advertisement::decode(bytes, from, to).filter(|told| told.priority > 0);
        told.map_or(Vec::new(), |told| told.addresses.into_iter().map(|one| (How::Vrrp, one)).collect())
    };
    match header[12..] {
        // The sender's protocol address (RFC 826); who asks whether an address is taken has none (RFC 5227).
        [8, 6] => v4(14).filter(|ip| !ip.is_unspecified()).map(|ip| (How::Arp, ip.into())).into_iter().collect(),
        [8, 0] if packet.get(9) == Some(&PROTOCOL) => match (v4(12), v4(16)) {
            (Some(from), Some(to)) => {
                vrrp(from.into(), to.into(), packet.get(usize::from(packet[0] & 15) * 4..).unwrap_or_default())
            }
            _ => Vec::new(),
        },
        [0x86, 0xdd] => match (packet.get(6), packet.get(40), v6(8), v6(24), v6(48)) {
            // A neighbour advertisement's target (RFC 4861, section 4.4).
            (Some(58), Some(136), _, _, Some(target)) => vec![(How::Ndp, target.into())],
            (Some(&PROTOCOL), _, Some(from), Some(to), _) => vrrp(from.into(), to.into(), &packet[40..]),
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}
