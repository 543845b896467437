//! What is said on the announcer's links, as long as it may be: answers, and bursts that tell everybody.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use linux::link::Mac;
use linux::packet::PacketSocket;
use tracing::{debug, warn};

use super::interface::Interface;
use super::{DEFENCE, Notice, Worker};
use crate::metrics::Layer2Counts;
use crate::packets::{ALL_NODES, Arp, BURST, advertisement, gratuitous, parse_solicitation};

impl Worker {
    fn is_announced_on(&self, address: IpAddr, interface: &Interface) -> bool {
        self.only.get(&address).map_or(interface.is_own, |names| names.contains(&interface.name))
    }

    fn may_speak(&self, address: IpAddr) -> bool {
        self.held.contains(&address) && self.now() < self.right
    }

    pub(super) fn answer(&mut self) {
        let mut buffer = [0; 2048];
        let mut conflicts = Vec::new();
        for interface in &self.interfaces {
            while let Ok(Some((length, from))) = interface.arp.receive(&mut buffer) {
                let Some(arp) = Arp::parse(&buffer[..length]) else { continue };
                let (mac, sender) = arp.sender;
                if self.held.contains(&IpAddr::V4(sender)) && self.interfaces.iter().all(|own| own.mac != mac) {
                    conflicts.push((IpAddr::V4(sender), mac));
                }
                let asked = IpAddr::V4(arp.target.1);
                if arp.is_request && arp.target.1 != sender && self.is_asked(asked, interface) {
                    let answer = Arp { is_request: false, sender: (interface.mac, arp.target.1), target: arp.sender };
                    if self.say(&interface.arp, &answer.encode(), from) {
                        self.count(asked, |counts| counts.responses += 1);
                    }
                }
            }
            while let Ok(Some((length, from))) = interface.solicitations.receive(&mut buffer) {
                let Some((who, address)) = parse_solicitation(&buffer[..length]) else { continue };
                if self.is_asked(address.into(), interface) {
                    // Who asks as `::` wants the address for itself: all are told that it is taken.
                    let (to, mac) = match who.is_unspecified() {
                        true => (None, ALL_NODES),
                        false => (Some(who), from),
                    };
                    if self.say(&interface.solicitations, &advertisement(address, interface.mac, to), mac) {
                        self.count(address.into(), |counts| counts.responses += 1);
                    }
                }
            }
        }
        let now = self.now();
        for (address, mac) in conflicts {
            if self.defended.get(&address).is_none_or(|at| *at + DEFENCE <= now) {
                self.defended.insert(address, now);
                warn!(%address, %mac, "another host says that it has this address");
                self.bursts.push((now, BURST.len() - 1, BTreeSet::from([address])));
                (self.notice)(Notice::Conflict(address, mac.to_string()));
            }
        }
    }

    /// A request that reached us for an address of ours, which is counted; whether it is answered.
    fn is_asked(&self, address: IpAddr, interface: &Interface) -> bool {
        let is_asked = self.may_speak(address) && self.is_announced_on(address, interface);
        if is_asked {
            self.count(address, |counts| counts.requests += 1);
        }
        is_asked
    }

    fn count(&self, address: IpAddr, change: impl FnOnce(&mut Layer2Counts)) {
        change(self.metrics.write().layer2.entry(address).or_default());
    }

    /// Whether it was said.
    fn say(&self, socket: &PacketSocket, packet: &[u8], to: Mac) -> bool {
        match socket.send(packet, to) {
            Ok(()) => true,
            Err(error) => {
                debug!(%error, "not said");
                false
            }
        }
    }

    /// Tells everybody of the addresses that are new here.
    pub(super) fn burst(&mut self) {
        let now = self.now();
        let (due, later) = std::mem::take(&mut self.bursts).into_iter().partition(|(at, ..)| *at <= now);
        self.bursts = later;
        let due: Vec<(Duration, usize, BTreeSet<IpAddr>)> = due;
        for (at, round, addresses) in due {
            for address in addresses.iter().filter(|address| self.may_speak(**address)) {
                for interface in self.interfaces.iter().filter(|one| self.is_announced_on(*address, one)) {
                    let (packet, to) = gratuitous(*address, interface.mac);
                    let socket = if address.is_ipv4() { &interface.arp } else { &interface.solicitations };
                    if self.say(socket, &packet, to) {
                        self.count(*address, |counts| counts.gratuitous += 1);
                    }
                }
            }
            if let (Some(before), Some(after)) = (BURST.get(round), BURST.get(round + 1)) {
                self.bursts.push((at + (*after - *before), round + 1, addresses));
            }
        }
    }
}
