//! A packet's way through a plan, question by question as the programs ask.

use std::net::{IpAddr, SocketAddr};

use linux::bpf::Fake;
use linux::nft::{Fate, Packet};
use services::Protocol;

use super::commit::Ebpf;
use super::layout::{Base, Key, LOADS, Line, List, LoadKind, Map, Taken, Target, Value, flag, load_key};
use super::maglev::{self, PLACES};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A socket of a pod here, or of the node itself, that connects.
    Connect { node: bool },
    /// A packet that arrives.
    Arrive,
}

struct Walk<'a> {
    fake: &'a Fake,
    base: &'a Base,
    log: &'a mut Vec<String>,
}

impl Ebpf<Fake> {
    /// What becomes of the first packet of a connection. Sources in pod networks and the node's own addresses are sockets
    /// that connect, all others are packets that arrive.
    pub fn explain(
        &self,
        packet: &Packet,
        node_addresses: &[IpAddr],
        draw: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
    ) -> Fate {
        let source = packet.from.ip();
        let node = node_addresses.contains(&source);
        let is_pod = self.parts().1.is_some_and(|base| base.is_pod(source));
        let way = if node || is_pod { Way::Connect { node } } else { Way::Arrive };
        self.walk(way, packet, draw, log)
    }

    pub fn walk(&self, way: Way, packet: &Packet, draw: &mut dyn FnMut(u32) -> u32, log: &mut Vec<String>) -> Fate {
        let pass = Fate::Sent { to: packet.to, masqueraded: false };
        let (fake, Some(base)) = self.parts() else { return pass };
        let Some(protocol @ (Protocol::Tcp | Protocol::Udp)) = Protocol::from_number(packet.protocol) else {
            log.push(format!("protocol {} is not looked at", packet.protocol));
            return pass;
        };
        let mut walk = Walk { fake, base, log };
        match way {
            Way::Arrive => walk.arrive(packet, protocol, draw),
            Way::Connect { node } => {
                if let Some(fate) = walk.connect(packet, protocol, node, draw) {
                    return fate;
                }
                // Left alone: its packets are looked at where they leave a pod or the node.
                if node { walk.leave(packet, protocol) } else { walk.arrive(packet, protocol, draw) }
            }
        }
    }
}

impl Walk<'_> {
    fn get(&mut self, key: Key) -> Option<Value> {
        let mut bytes = Vec::new();
        key.write(&mut bytes);
        let value = Value::read(key.map(), self.fake.get(key.map().layout().name, &bytes)?);
        self.log.push(Line(&key, &value).to_string());
        Some(value)
    }

    fn frontend(&mut self, to: SocketAddr, protocol: Protocol) -> Option<Target> {
        let exact = Key::Frontend { address: to.ip(), port: Some((protocol, to.port())) };
        let rest = Key::Frontend { address: to.ip(), port: None };
        match self.get(exact).or_else(|| self.get(rest))? {
            Value::Target(target) => Some(target),
            Value::Endpoint(_) | Value::Places(_) | Value::Present => None,
        }
    }

    fn endpoint(&mut self, list: List, slot: u32) -> Option<SocketAddr> {
        match self.get(Key::Endpoint { list, slot })? {
            Value::Endpoint(endpoint) => Some(endpoint),
            Value::Target(_) | Value::Places(_) | Value::Present => None,
        }
    }

    /// How many connections an endpoint has; what has not been counted is none.
    fn load(&mut self, endpoint: SocketAddr, protocol: Protocol) -> i64 {
        let of_kind = |kind| {
            let value = self.fake.get(LOADS.name, &load_key(endpoint, protocol, kind))?;
            Some(i64::from_ne_bytes(*value.first_chunk()?))
        };
        let load = [LoadKind::Sockets, LoadKind::Flows].into_iter().filter_map(of_kind).sum();
        if load != 0 {
            self.log.push(format!("loads {{ {endpoint} . {protocol} : {load} }}"));
        }
        load
    }

    /// `pick` in pick.h. `hash` names the connection on every node alike, if anything does.
    fn pick(
        &mut self,
        (list, count): (List, u32),
        Target { flags, id: _, inside: _, outside: _, affinity_seconds: _ }: &Target,
        protocol: Protocol,
        hash: Option<u64>,
        draw: &mut dyn FnMut(u32) -> u32,
    ) -> Option<SocketAddr> {
        let picked = if flags & flag::MAGLEV != 0 {
            let size = maglev::size(count as usize);
            let place = hash.map_or_else(|| draw(size as u32) as usize, |hash| (hash % size as u64) as usize);
            let slot = match self.get(Key::Places { list, part: (place / PLACES) as u32 }) {
                Some(Value::Places(slots)) => slots[place % PLACES].into(),
                _ => 0,
            };
            self.endpoint(list, slot)
        } else {
            let slot = if count > 1 { draw(count) } else { 0 };
            let first = self.endpoint(list, slot);
            if flags & flag::LEAST_LOAD != 0 && count > 1 {
                let other = self.endpoint(list, (slot + 1 + draw(count - 1)) % count);
                match (first, other) {
                    (Some(one), Some(other)) if self.load(one, protocol) > self.load(other, protocol) => Some(other),
                    _ => first,
                }
            } else {
                first
            }
        };
        picked.or_else(|| self.endpoint(list, 0))
    }

    fn may_use(&mut self, target: &Target, source: IpAddr) -> bool {
        let mut keys = self.fake.iter("sources").filter_map(|(key, _)| Key::read(Map::Sources, key));
        let mine =
            |key: &Key| matches!(key, Key::Source { id, network } if *id == target.id && network.contains(&source));
        match keys.find(mine) {
            _ if target.flags & flag::FIREWALL == 0 => true,
            Some(key) => {
                self.log.push(Line(&key, &Value::Present).to_string());
                true
            }
            None => false,
        }
    }

    fn nobodys(&mut self, to: SocketAddr) -> Fate {
        match self.base.services.iter().find(|network| network.contains(&to.ip())) {
            Some(network) => {
                self.log.push(format!("nodes {{ Services in {network} }}"));
                Fate::Dropped
            }
            None => Fate::Sent { to, masqueraded: false },
        }
    }

    /// `choose` in connect.h.
    fn connect(
        &mut self,
        packet: &Packet,
        protocol: Protocol,
        node: bool,
        draw: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Fate> {
        self.log.push("connect".into());
        let target = self.frontend(packet.to, protocol)?;
        if target.flags & flag::FIREWALL != 0 && !(node && target.flags & flag::NODE_ALLOWED != 0) {
            return None;
        }
        if target.inside.1 == 0 {
            return (target.flags & flag::REFUSED != 0).then_some(Fate::Rejected);
        }
        let to = self.pick(target.inside, &target, protocol, None, draw)?;
        Some(Fate::Sent { to, masqueraded: false })
    }

    /// `leaving` in packet.h, for what a socket of the node sends.
    fn leave(&mut self, packet: &Packet, protocol: Protocol) -> Fate {
        self.log.push("leaving".into());
        match self.frontend(packet.to, protocol) {
            None => self.nobodys(packet.to),
            Some(target) if target.flags & flag::FIREWALL != 0 || target.inside.1 == 0 => Fate::Dropped,
            Some(_) => Fate::Sent { to: packet.to, masqueraded: false },
        }
    }

    /// `arriving` in packet.h.
    fn arrive(&mut self, packet: &Packet, protocol: Protocol, draw: &mut dyn FnMut(u32) -> u32) -> Fate {
        self.log.push("arriving".into());
        let source = packet.from.ip();
        let Some(target) = self.frontend(packet.to, protocol) else { return self.nobodys(packet.to) };
        let is_pod = self.base.is_pod(source);
        if !self.may_use(&target, source) {
            return Fate::Dropped;
        }
        let scope = if is_pod { target.inside } else { target.outside };
        if scope.1 == 0 {
            return if target.flags & flag::REFUSED != 0 { Fate::Rejected } else { Fate::Dropped };
        }
        let hash = maglev::hash(packet.from, protocol);
        let Some(to) = self.pick(scope, &target, protocol, Some(hash), draw) else { return Fate::Dropped };
        if target.flags & flag::DIRECT != 0 && !is_pod {
            let is_node = self.base.takers.contains(&source);
            let mut is_taken = |by| self.get(Key::Taken { by, endpoint: to }).is_some();
            let past = !is_node && is_taken(Taken::There(target.id));
            if past || is_taken(Taken::Here(target.id)) {
                let answer = if past { "answers past this node" } else { "sees the client" };
                self.log.push(format!("{to} {answer}"));
                return Fate::Sent { to, masqueraded: false };
            }
        }
        let outside = !is_pod && self.base.has_pods(source.is_ipv6());
        let masqueraded = target.flags & flag::MASQUERADE != 0
            || (target.flags & flag::MASQUERADE_OUTSIDE != 0 && outside)
            || to.ip() == source;
        Fate::Sent { to, masqueraded }
    }
}
