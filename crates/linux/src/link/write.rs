//! Makes items true or untrue: the only place that changes links, addresses, routes and neighbours.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::code;
use super::wire::{self, Message};
use super::{Address, Bridge, Fdb, Item, Link, LinkError, Links, Mac, Neighbour, Port, Route, RouteKind, Veth, Vxlan};

impl Links {
    /// Makes one item true.
    pub fn ensure(&self, item: &Item) -> Result<(), LinkError> {
        match item {
            Item::Bridge(bridge) => self.ensure_bridge(bridge, item),
            Item::Dummy(name) => self.ensure_dummy(name, item),
            Item::Veth(veth) => self.ensure_veth(veth, item),
            Item::Vxlan(vxlan) => self.ensure_vxlan(vxlan, item),
            Item::Port(port) => self.ensure_port(port, item),
            Item::Up(name) => self.set_flags(name, code::IFF_UP, item),
            Item::Address(address) => {
                let message = self.address(wire::NEW_ADDRESS, wire::CREATE | wire::REPLACE, address)?;
                self.send(message, item, &[Errno::EEXIST])
            }
            Item::Route(route) => {
                let message = self.route(wire::NEW_ROUTE, wire::CREATE | wire::REPLACE, route)?;
                self.send(message, item, &[])
            }
            Item::Neighbour(neighbour) => {
                let message = self.neighbour(wire::NEW_NEIGHBOUR, wire::CREATE | wire::REPLACE, neighbour)?;
                self.send(message, item, &[])
            }
            Item::Fdb(entry) => {
                let message = self.fdb(wire::NEW_NEIGHBOUR, wire::CREATE | wire::REPLACE, entry)?;
                self.send(message, item, &[])
            }
        }
    }

    /// An address for so many seconds: the kernel takes it away by itself unless it is lent again. It is not used as a source
    /// unless it is asked for.
    pub fn lend(&self, address: &Address, seconds: u32) -> Result<(), LinkError> {
        let mut message = self.address(wire::NEW_ADDRESS, wire::CREATE | wire::REPLACE, address)?;
        // struct ifa_cacheinfo: preferred and valid lifetime, and two times that only the kernel tells.
        let lifetimes: Vec<u8> = [0, seconds, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        message.attribute(code::IFA_CACHEINFO, &lifetimes);
        self.send(message, &Item::Address(address.clone()), &[])
    }

    /// Makes one item untrue. What hangs on a link that is gone is gone with it.
    pub fn remove(&self, item: &Item) -> Result<(), LinkError> {
        let message = match item {
            Item::Bridge(Bridge { name, .. }) | Item::Veth(Veth { name, .. }) | Item::Vxlan(Vxlan { name, .. }) => {
                return self.remove_link(name);
            }
            Item::Dummy(name) => return self.remove_link(name),
            Item::Port(port) => return self.set_bridge(&port.link, 0, item),
            Item::Up(name) => return self.set_flags(name, 0, item),
            Item::Address(address) => self.address(wire::DEL_ADDRESS, 0, address),
            Item::Route(route) => self.route(wire::DEL_ROUTE, 0, route),
            Item::Neighbour(neighbour) => self.neighbour(wire::DEL_NEIGHBOUR, 0, neighbour),
            Item::Fdb(entry) => self.fdb(wire::DEL_NEIGHBOUR, 0, entry),
        };
        match message {
            Ok(message) => self.send(message, item, &[Errno::ESRCH, Errno::ENOENT, Errno::EADDRNOTAVAIL]),
            Err(LinkError::NoSuchLink(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes a link; with one end of a veth pair goes the other.
    pub fn remove_link(&self, name: &str) -> Result<(), LinkError> {
        let Some(link) = self.link(name)? else { return Ok(()) };
        let message = Message::new(wire::DEL_LINK, wire::ACK, &link_part(link.index, 0, 0));
        self.exchange(message, || format!("delete link {name}"), &[Errno::ENODEV])
    }

    fn ensure_bridge(&self, bridge: &Bridge, item: &Item) -> Result<(), LinkError> {
        if let Some(held) = self.held(&bridge.name, "bridge")? {
            return self.adjust(&held, bridge.mac, bridge.mtu, item);
        }
        let mut message = new_link(&bridge.name, bridge.mac, bridge.mtu)?;
        message.nested(code::IFLA_LINKINFO, |info| info.text(code::IFLA_INFO_KIND, "bridge"));
        self.send(message, item, &[])
    }

    fn ensure_dummy(&self, name: &str, item: &Item) -> Result<(), LinkError> {
        if self.held(name, "dummy")?.is_some() {
            return Ok(());
        }
        let mut message = new_link(name, None, None)?;
        message.nested(code::IFLA_LINKINFO, |info| info.text(code::IFLA_INFO_KIND, "dummy"));
        self.send(message, item, &[])
    }

    fn ensure_veth(&self, veth: &Veth, item: &Item) -> Result<(), LinkError> {
        if let Some(held) = self.held(&veth.name, "veth")? {
            let there = Links::open(&veth.peer_netns)?;
            if let Some(peer) = there.link(&veth.peer)?.filter(|peer| peer.kind == "veth") {
                there.adjust(&peer, veth.peer_mac, veth.mtu, item)?;
                return self.adjust(&held, None, veth.mtu, item);
            }
            // Its peer is in another namespace or has another name: a leftover.
            self.remove_link(&veth.name)?;
        }
        check_name(&veth.peer)?;
        let mut message = new_link(&veth.name, None, veth.mtu)?;
        message.nested(code::IFLA_LINKINFO, |info| {
            info.text(code::IFLA_INFO_KIND, "veth");
            info.nested(code::IFLA_INFO_DATA, |data| {
                data.nested(code::VETH_INFO_PEER, |peer| {
                    peer.raw(&link_part(0, 0, 0));
                    peer.text(code::IFLA_IFNAME, &veth.peer);
                    put_mac_and_mtu(peer, veth.peer_mac, veth.mtu);
                    // A descriptor is never negative.
                    peer.u32(code::IFLA_NET_NS_FD, veth.peer_netns.as_fd().as_raw_fd().cast_unsigned());
                });
            });
        });
        self.send(message, item, &[])
    }

    fn ensure_vxlan(&self, vxlan: &Vxlan, item: &Item) -> Result<(), LinkError> {
        if let Some(held) = self.held(&vxlan.name, "vxlan")? {
            return self.adjust(&held, Some(vxlan.mac), Some(vxlan.mtu), item);
        }
        let mut message = new_link(&vxlan.name, Some(vxlan.mac), Some(vxlan.mtu))?;
        message.nested(code::IFLA_LINKINFO, |info| {
            info.text(code::IFLA_INFO_KIND, "vxlan");
            info.nested(code::IFLA_INFO_DATA, |data| {
                data.u32(code::IFLA_VXLAN_ID, vxlan.id);
                match vxlan.local {
                    IpAddr::V4(local) => data.attribute(code::IFLA_VXLAN_LOCAL, &local.octets()),
                    IpAddr::V6(local) => data.attribute(code::IFLA_VXLAN_LOCAL6, &local.octets()),
                }
                data.u8(code::IFLA_VXLAN_LEARNING, 0);
                data.attribute(code::IFLA_VXLAN_PORT, &vxlan.port.to_be_bytes());
            });
        });
        self.send(message, item, &[])
    }

    fn ensure_port(&self, port: &Port, item: &Item) -> Result<(), LinkError> {
        self.set_bridge(&port.link, self.index(&port.bridge)?, item)?;
        let mut message = Message::new(wire::NEW_LINK, wire::ACK, &link_part(self.index(&port.link)?, 0, 0));
        message.nested(code::IFLA_LINKINFO, |info| {
            info.text(code::IFLA_INFO_SLAVE_KIND, "bridge");
            info.nested(code::IFLA_INFO_SLAVE_DATA, |data| data.u8(code::IFLA_BRPORT_MODE, port.hairpin.into()));
        });
        self.send(message, item, &[])
    }

    fn set_bridge(&self, name: &str, bridge: u32, item: &Item) -> Result<(), LinkError> {
        let Some(link) = self.link(name)? else {
            return if bridge == 0 { Ok(()) } else { Err(LinkError::NoSuchLink(name.into())) };
        };
        if link.bridge.unwrap_or(0) == bridge {
            return Ok(());
        }
        let mut message = Message::new(wire::NEW_LINK, wire::ACK, &link_part(link.index, 0, 0));
        message.u32(code::IFLA_MASTER, bridge);
        self.send(message, item, &[])
    }

    /// Sets IFF_UP as `flags` says and leaves every other flag.
    fn set_flags(&self, name: &str, flags: u32, item: &Item) -> Result<(), LinkError> {
        let Some(link) = self.link(name)? else {
            return if flags == 0 { Ok(()) } else { Err(LinkError::NoSuchLink(name.into())) };
        };
        if link.is_up == (flags == code::IFF_UP) {
            return Ok(());
        }
        let message = Message::new(wire::NEW_LINK, wire::ACK, &link_part(link.index, flags, code::IFF_UP));
        self.send(message, item, &[])
    }

    /// A link of this name, if it is of this kind; one of another kind is somebody else's and is left alone.
    fn held(&self, name: &str, wanted: &'static str) -> Result<Option<Link>, LinkError> {
        check_name(name)?;
        match self.link(name)? {
            Some(link) if link.kind != wanted => Err(LinkError::OtherKind { name: name.into(), wanted }),
            held => Ok(held),
        }
    }

    fn adjust(&self, held: &Link, mac: Option<Mac>, mtu: Option<u32>, item: &Item) -> Result<(), LinkError> {
        let mac = mac.filter(|mac| held.mac != Some(*mac));
        let mtu = mtu.filter(|mtu| held.mtu != *mtu);
        if mac.is_none() && mtu.is_none() {
            return Ok(());
        }
        let mut message = Message::new(wire::NEW_LINK, wire::ACK, &link_part(held.index, 0, 0));
        put_mac_and_mtu(&mut message, mac, mtu);
        self.send(message, item, &[])
    }

    fn address(&self, kind: u16, flags: u16, address: &Address) -> Result<Message, LinkError> {
        let index = self.index(&address.link)?;
        let ip = address.address.addr();
        let length = address.address.prefix_len();
        let mut fixed = [family(ip), length, 0, code::RT_SCOPE_UNIVERSE, 0, 0, 0, 0];
        fixed[4..].copy_from_slice(&index.to_ne_bytes());
        let mut message = Message::new(kind, flags | wire::ACK, &fixed);
        with_octets(ip, |octets| {
            message.attribute(code::IFA_LOCAL, octets);
            message.attribute(code::IFA_ADDRESS, octets);
        });
        if ip.is_ipv6() {
            message.u32(code::IFA_FLAGS, code::IFA_F_NODAD);
        }
        Ok(message)
    }

    fn route(&self, message_kind: u16, flags: u16, route: &Route) -> Result<Message, LinkError> {
        let is_new = message_kind == wire::NEW_ROUTE;
        let kind = match route.kind {
            RouteKind::Unicast => code::RTN_UNICAST,
            RouteKind::Blackhole => code::RTN_BLACKHOLE,
            RouteKind::Unreachable => code::RTN_UNREACHABLE,
        };
        let is_direct = route.via.is_none() && route.kind == RouteKind::Unicast && route.to.addr().is_ipv4();
        let scope = match (is_new, is_direct) {
            // When deleting, this matches every scope.
            (false, _) => code::RT_SCOPE_NOWHERE,
            (true, true) => code::RT_SCOPE_LINK,
            (true, false) => code::RT_SCOPE_UNIVERSE,
        };
        let onlink = if route.is_onlink { code::RTNH_F_ONLINK } else { 0 };
        let length = route.to.prefix_len();
        let mut fixed =
            [family(route.to.addr()), length, 0, 0, code::RT_TABLE_MAIN, route.protocol, scope, kind, 0, 0, 0, 0];
        fixed[8..].copy_from_slice(&onlink.to_ne_bytes());
        let mut message = Message::new(message_kind, flags | wire::ACK, &fixed);
        if length > 0 {
            with_octets(route.to.network(), |octets| message.attribute(code::RTA_DST, octets));
        }
        if let Some(via) = route.via {
            with_octets(via, |octets| message.attribute(code::RTA_GATEWAY, octets));
        }
        if let Some(source) = route.source {
            with_octets(source, |octets| message.attribute(code::RTA_PREFSRC, octets));
        }
        if let Some(link) = &route.link {
            message.u32(code::RTA_OIF, self.index(link)?);
        }
        Ok(message)
    }

    fn neighbour(&self, kind: u16, flags: u16, neighbour: &Neighbour) -> Result<Message, LinkError> {
        let index = self.index(&neighbour.link)?;
        let fixed = neighbour_part(family(neighbour.address), index, code::NUD_PERMANENT, 0);
        let mut message = Message::new(kind, flags | wire::ACK, &fixed);
        with_octets(neighbour.address, |octets| message.attribute(code::NDA_DST, octets));
        message.attribute(code::NDA_LLADDR, &neighbour.mac.0);
        Ok(message)
    }

    fn fdb(&self, kind: u16, flags: u16, entry: &Fdb) -> Result<Message, LinkError> {
        let index = self.index(&entry.link)?;
        // NTF_SELF: the device's own table, not that of a bridge it may be a port of.
        let fixed = neighbour_part(code::AF_BRIDGE, index, code::NUD_PERMANENT | code::NUD_NOARP, code::NTF_SELF);
        let mut message = Message::new(kind, flags | wire::ACK, &fixed);
        message.attribute(code::NDA_LLADDR, &entry.mac.0);
        with_octets(entry.remote, |octets| message.attribute(code::NDA_DST, octets));
        Ok(message)
    }

    fn send(&self, message: Message, item: &Item, fine: &[Errno]) -> Result<(), LinkError> {
        self.exchange(message, || item.to_string(), fine)
    }

    fn exchange(&self, message: Message, item: impl FnOnce() -> String, fine: &[Errno]) -> Result<(), LinkError> {
        match self.socket().exchange(message, |_| ()) {
            Ok(_) => Ok(()),
            Err(errno) if fine.contains(&errno) => Ok(()),
            Err(errno) => Err(LinkError::Kernel { item: item(), errno }),
        }
    }
}

fn check_name(name: &str) -> Result<(), LinkError> {
    let is_fine = (1..=15).contains(&name.len()) && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if is_fine { Ok(()) } else { Err(LinkError::Name(name.into())) }
}

fn new_link(name: &str, mac: Option<Mac>, mtu: Option<u32>) -> Result<Message, LinkError> {
    check_name(name)?;
    let flags = wire::CREATE | wire::EXCLUSIVE | wire::ACK;
    let mut message = Message::new(wire::NEW_LINK, flags, &link_part(0, 0, 0));
    message.text(code::IFLA_IFNAME, name);
    put_mac_and_mtu(&mut message, mac, mtu);
    Ok(message)
}

fn put_mac_and_mtu(message: &mut Message, mac: Option<Mac>, mtu: Option<u32>) {
    if let Some(mac) = mac {
        message.attribute(code::IFLA_ADDRESS, &mac.0);
    }
    if let Some(mtu) = mtu {
        message.u32(code::IFLA_MTU, mtu);
    }
}

fn link_part(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut part = [0; 16];
    part[4..8].copy_from_slice(&index.to_ne_bytes());
    part[8..12].copy_from_slice(&flags.to_ne_bytes());
    part[12..16].copy_from_slice(&change.to_ne_bytes());
    part
}

fn neighbour_part(family: u8, index: u32, state: u16, flags: u8) -> [u8; 12] {
    let mut part = [0; 12];
    part[0] = family;
    part[4..8].copy_from_slice(&index.to_ne_bytes());
    part[8..10].copy_from_slice(&state.to_ne_bytes());
    part[10] = flags;
    part
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { code::AF_INET } else { code::AF_INET6 }
}

fn with_octets(address: IpAddr, then: impl FnOnce(&[u8])) {
    match address {
        IpAddr::V4(v4) => then(&v4.octets()),
        IpAddr::V6(v6) => then(&v6.octets()),
    }
}
