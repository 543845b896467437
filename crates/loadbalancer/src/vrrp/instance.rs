//! One virtual router on one interface: its machine, its sockets, and the addresses that it is about.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use linux::hops;
use linux::link::{Links, Mac};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tracing::{debug, warn};

use super::machine::{Action, Machine, Settings};
use super::packet::{Advertisement, Checksum, GROUP_V4, GROUP_V6, HOPS, LONGEST_INTERVAL, PROTOCOL};

/// So many addresses of IPv6 fit into a packet of 1500 bytes, and we name no more of IPv4.
const MOST_NAMED: usize = 80;
/// So many advertisements in a row that name other addresses are no change that is under way.
const SUSPICIOUS: u32 = 20;

#[derive(Debug, thiserror::Error)]
pub enum VrrpError {
    #[error("virtual router {name}: {field} is {value}, which is not {expected}; correct it")]
    Field { name: String, field: &'static str, value: String, expected: &'static str },
    #[error("virtual router {name}: interface {interface} {what}; see `ip address`")]
    Interface { name: String, interface: String, what: &'static str },
    #[error("virtual router {name}: {doing}: {error}; this needs CAP_NET_RAW and CAP_NET_ADMIN")]
    Socket { name: String, doing: &'static str, error: io::Error },
    #[error(transparent)]
    Link(#[from] linux::link::LinkError),
    #[error("start the thread of VRRP: {0}")]
    Thread(io::Error),
}

/// A virtual router as it is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    pub name: String,
    pub interface: String,
    /// From 1 to 255, another one for each virtual router of a network and family.
    pub id: u8,
    pub settings: Settings,
    /// Of one family.
    pub addresses: Vec<IpAddr>,
    /// The other routers, which are told one by one; empty: by multicast.
    pub peers: Vec<IpAddr>,
    /// From which of the interface's addresses; the first by default, for IPv6 the link's own.
    pub source: Option<IpAddr>,
    pub checksum: Checksum,
    /// It takes no part until it is given a priority.
    pub waits: bool,
}

impl RouterConfig {
    /// # Errors
    /// Names what cannot be meant.
    pub fn check(&self) -> Result<(), VrrpError> {
        let wrong =
            |field, value: String, expected| VrrpError::Field { name: self.name.clone(), field, value, expected };
        if self.id == 0 {
            return Err(wrong("id", "0".into(), "from 1 to 255"));
        }
        if self.settings.priority == 0 {
            return Err(wrong("priority", "0".into(), "from 1 to 255"));
        }
        let interval = self.settings.interval;
        if interval < Duration::from_millis(10)
            || interval > LONGEST_INTERVAL
            || !interval.as_millis().is_multiple_of(10)
        {
            return Err(wrong("interval", format!("{interval:?}"), "from 10ms to 40.95s in steps of 10ms"));
        }
        let list = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let Some(first) = self.addresses.first() else {
            return Err(wrong("addresses", "empty".into(), "at least one address"));
        };
        if self.addresses.len() > 255 || self.addresses.iter().any(|one| one.is_ipv4() != first.is_ipv4()) {
            return Err(wrong("addresses", list(&self.addresses), "up to 255 addresses of one family"));
        }
        if self.peers.iter().chain(&self.source).any(|one| one.is_ipv4() != first.is_ipv4()) {
            return Err(wrong("peers and source", list(&self.peers), "of the family of the addresses"));
        }
        Ok(())
    }

    /// Whether both are the same but for their addresses, of one family.
    pub fn is_same_router(&self, other: &RouterConfig) -> bool {
        let same = RouterConfig { addresses: other.addresses.clone(), ..self.clone() };
        same == *other && self.is_v4() == other.is_v4()
    }

    /// The addresses that advertisements name: those that fit into a packet.
    fn named(&self) -> &[IpAddr] {
        &self.addresses[..self.addresses.len().min(MOST_NAMED)]
    }

    fn is_v4(&self) -> bool {
        self.addresses.first().is_some_and(IpAddr::is_ipv4)
    }
}

pub struct Instance {
    pub config: RouterConfig,
    pub machine: Machine,
    pub mac: Mac,
    pub index: u32,
    primary: IpAddr,
    ear: Socket,
    mouth: Socket,
    /// It takes part as far as anybody here is concerned.
    is_wanted: bool,
    /// Something is at the other end of the cable.
    has_carrier: bool,
    /// Advertisements in a row that named other addresses than ours.
    differing: u32,
}

impl Instance {
    /// Opens its sockets in the calling thread's network namespace.
    ///
    /// # Errors
    /// Says what this host lacks, or what cannot be meant.
    pub fn open(config: RouterConfig) -> Result<Instance, VrrpError> {
        config.check()?;
        let missing =
            |what| VrrpError::Interface { name: config.name.clone(), interface: config.interface.clone(), what };
        let links = Links::current()?;
        let link = links.link(&config.interface)?.ok_or_else(|| missing("is not there"))?;
        let mac = link.mac.ok_or_else(|| missing("has no hardware address"))?;
        let is_link_local = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        // Multicast of IPv6 goes from the link's own address (RFC 9568, section 5.1.2.1).
        let wants_link_local = !config.is_v4() && config.peers.is_empty();
        let held = links.addresses()?.into_iter().filter(|held| held.link == config.interface);
        let mut own = held
            .map(|held| held.address.addr())
            .filter(|own| own.is_ipv4() == config.is_v4() && !config.addresses.contains(own))
            .filter(|own| is_link_local(own) == wants_link_local);
        let primary = match config.source {
            Some(source) => source,
            None => own.next().ok_or_else(|| missing("has no address of its family to speak from"))?,
        };
        let failed = |doing, error| VrrpError::Socket { name: config.name.clone(), doing, error };
        let ear = ear(&config, link.index).map_err(|error| failed("listen for advertisements", error))?;
        let mouth = mouth(&config, link.index, primary).map_err(|error| failed("prepare to advertise", error))?;
        let machine = Machine::new(config.settings, primary);
        Ok(Instance {
            machine,
            mac,
            index: link.index,
            primary,
            ear,
            mouth,
            is_wanted: false,
            has_carrier: link.has_carrier,
            differing: 0,
            config,
        })
    }

    /// Whether it is to take part.
    pub fn want(&mut self, is_wanted: bool, now: Duration) -> Vec<Action> {
        self.is_wanted = is_wanted;
        self.settle(now)
    }

    /// Looks whether the cable is in: a host that nobody hears has no part, and tells where addresses are when it is heard again.
    pub fn look(&mut self, links: &Links, now: Duration) -> Vec<Action> {
        match links.link(&self.config.interface) {
            Ok(link) => self.has_carrier = link.is_some_and(|link| link.has_carrier),
            // It stays as it was known to be.
            Err(error) => debug!(name = self.config.name, %error, "the interface cannot be looked at"),
        }
        self.settle(now)
    }

    fn settle(&mut self, now: Duration) -> Vec<Action> {
        if self.is_wanted && self.has_carrier { self.machine.start(now) } else { self.machine.stop() }
    }

    /// Other addresses of the same family; the router goes on as it is.
    pub fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.config.addresses = addresses;
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ear.as_fd()
    }

    fn group(&self) -> IpAddr {
        if self.config.is_v4() { GROUP_V4.into() } else { GROUP_V6.into() }
    }

    /// Takes all advertisements that wait.
    pub fn hear(&mut self, now: Duration) -> Vec<Action> {
        let mut buffer = [0; 4096];
        let mut actions = Vec::new();
        loop {
            let (length, from, hops) = match hops::receive(self.ear.as_fd(), &mut buffer) {
                Ok(heard) => heard,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return actions,
                Err(error) => {
                    debug!(name = self.config.name, %error, "an advertisement is not heard");
                    return actions;
                }
            };
            let Some((to, payload)) = self.unwrap(&buffer[..length]) else { continue };
            let is_meant = match self.config.peers.is_empty() {
                true => to == self.group() && hops == HOPS,
                // keepalived sends these over IPv6 with as many hops as any packet: that it is a peer's address has to do.
                false => self.config.peers.contains(&from),
            };
            if !is_meant || from == self.primary {
                continue;
            }
            let heard = Advertisement::decode(payload, from, to).filter(|one| one.id == self.config.id);
            let Some(heard) = heard else { continue };
            let named = self.config.named();
            let is_same = heard.addresses.len() == named.len() && heard.addresses.iter().all(|one| named.contains(one));
            self.differing = if is_same { 0 } else { self.differing.saturating_add(1) };
            if self.differing == SUSPICIOUS {
                let (name, theirs) = (&self.config.name, &heard.addresses);
                warn!(name, %from, ?theirs, "another router has this id and other addresses; see who that is");
            }
            actions.extend(self.machine.receive(heard.priority, heard.interval, from, now));
        }
    }

    /// Where a packet went, and what is behind its IP header. Raw sockets hand out that of IPv4 and not that of IPv6.
    fn unwrap<'a>(&self, bytes: &'a [u8]) -> Option<(IpAddr, &'a [u8])> {
        if !self.config.is_v4() {
            let to = if self.config.peers.is_empty() { self.group() } else { self.primary };
            return Some((to, bytes));
        }
        let length = usize::from(bytes.first()? & 0xf) * 4;
        let to: [u8; 4] = bytes.get(16..20)?.try_into().ok()?;
        Some((IpAddr::from(to), bytes.get(length..)?))
    }

    pub fn advertise(&self, priority: u8) {
        let Settings { interval, .. } = self.config.settings;
        let addresses = self.config.named().to_vec();
        let advertisement = Advertisement { id: self.config.id, priority, interval, addresses };
        let group = [self.group()];
        let to = if self.config.peers.is_empty() { &group[..] } else { &self.config.peers[..] };
        for to in to {
            let bytes = advertisement.encode(self.primary, *to, self.config.checksum);
            let at = match to {
                IpAddr::V6(v6) => SocketAddr::V6(SocketAddrV6::new(*v6, 0, 0, self.index)),
                IpAddr::V4(_) => SocketAddr::new(*to, 0),
            };
            // What is lost, for whatever reason, is what the others' patience is about.
            if let Err(error) = self.mouth.send_to(&bytes, &at.into()) {
                debug!(name = self.config.name, %to, %error, "an advertisement is not sent");
            }
        }
    }
}

fn raw(config: &RouterConfig) -> io::Result<Socket> {
    let domain = if config.is_v4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(PROTOCOL))))?;
    socket.set_nonblocking(true)?;
    socket.bind_device(Some(config.interface.as_bytes()))?;
    Ok(socket)
}

fn ear(config: &RouterConfig, index: u32) -> io::Result<Socket> {
    let socket = raw(config)?;
    hops::tell(socket.as_fd(), config.is_v4())?;
    match (config.peers.is_empty(), config.is_v4()) {
        (true, true) => socket.join_multicast_v4_n(&GROUP_V4, &InterfaceIndexOrAddress::Index(index))?,
        (true, false) => socket.join_multicast_v6(&GROUP_V6, index)?,
        (false, _) => {}
    }
    Ok(socket)
}

fn mouth(config: &RouterConfig, index: u32, primary: IpAddr) -> io::Result<Socket> {
    let socket = raw(config)?;
    // It only speaks: what comes is the other one's.
    socket.set_recv_buffer_size(0)?;
    let hops = u32::from(HOPS);
    match primary {
        IpAddr::V4(_) => {
            socket.set_ttl_v4(hops)?;
            socket.set_multicast_ttl_v4(hops)?;
            socket.set_multicast_loop_v4(false)?;
            socket.bind(&SocketAddr::new(primary, 0).into())?;
        }
        IpAddr::V6(v6) => {
            socket.set_unicast_hops_v6(hops)?;
            socket.set_multicast_hops_v6(hops)?;
            socket.set_multicast_if_v6(index)?;
            socket.set_multicast_loop_v6(false)?;
            let scope = if v6.is_unicast_link_local() { index } else { 0 };
            socket.bind(&SocketAddrV6::new(v6, 0, 0, scope).into())?;
        }
    }
    Ok(socket)
}
