//! What a namespace holds: links, addresses, routes, neighbours and forwarding entries.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use nix::errno::Errno;

use super::code;
use super::wire::{self, Message, attributes, read_text, read_u32};
use super::{Address, Fdb, Link, LinkError, Links, Mac, Neighbour, Route, RouteKind};
use crate::netns::Netns;

/// Fixed parts: ifinfomsg, ifaddrmsg, rtmsg, ndmsg.
const LINK_PART: usize = 16;
/// rtgenmsg, padded.
const NAMESPACE_PART: usize = 4;
const ADDRESS_PART: usize = 8;
const ROUTE_PART: usize = 12;
const NEIGHBOUR_PART: usize = 12;

const FAMILIES: [u8; 2] = [code::AF_INET, code::AF_INET6];

impl Links {
    pub fn links(&self) -> Result<Vec<Link>, LinkError> {
        self.dump("the list of links", || link_query(wire::DUMP), parse_link)
    }

    /// A link by name; `None` when there is none.
    pub fn link(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let mut message = link_query(wire::ACK);
        message.text(code::IFLA_IFNAME, name);
        let mut found = None;
        match self.socket().exchange(message, |payload| found = found.take().or_else(|| parse_link(payload))) {
            Ok(_) => Ok(found),
            Err(Errno::ENODEV) => Ok(None),
            Err(errno) => Err(LinkError::Kernel { item: format!("look up link {name}"), errno }),
        }
    }

    /// Whether a link of this namespace has its other end in the other one, or had: the kernel numbers those that it has shown
    /// a link to (RTM_GETNSID), and only those.
    pub fn reach(&self, other: &Netns) -> Result<bool, LinkError> {
        let mut message = Message::new(wire::GET_NAMESPACE_ID, wire::ACK, &[0; NAMESPACE_PART]);
        message.u32(code::NETNSA_FD, other.as_fd().as_raw_fd().cast_unsigned());
        let mut number = None;
        let whole = self.socket().exchange(message, |payload| {
            let found = attributes(payload, NAMESPACE_PART).find(|(kind, _)| *kind == code::NETNSA_NSID);
            number = found.and_then(|(_, value)| read_u32(value, 0)).map(u32::cast_signed);
        });
        match whole {
            Ok(_) => Ok(number.is_some_and(|number| number >= 0)),
            Err(errno) => Err(LinkError::Kernel { item: "look up the number of a namespace".into(), errno }),
        }
    }

    pub(super) fn index(&self, name: &str) -> Result<u32, LinkError> {
        self.link(name)?.map(|link| link.index).ok_or_else(|| LinkError::NoSuchLink(name.into()))
    }

    /// The addresses of every link, IPv6 link-local ones included.
    pub fn addresses(&self) -> Result<Vec<Address>, LinkError> {
        let names = self.names()?;
        let query = || Message::new(wire::GET_ADDRESS, wire::DUMP, &[0; ADDRESS_PART]);
        self.dump("the list of addresses", query, |payload| {
            let length = *payload.get(1)?;
            let link = names.get(&read_u32(payload, 4)?)?.clone();
            let (mut local, mut peer) = (None, None);
            for (kind, value) in attributes(payload, ADDRESS_PART) {
                match kind {
                    code::IFA_LOCAL => local = ip(value),
                    code::IFA_ADDRESS => peer = ip(value),
                    _ => {}
                }
            }
            // On point-to-point links IFA_ADDRESS is the other end's; IPv6 has no IFA_LOCAL.
            Some(Address { link, address: IpNet::new(local.or(peer)?, length).ok()? })
        })
    }

    /// The routes of the main table with one next hop, of every maker.
    pub fn routes(&self) -> Result<Vec<Route>, LinkError> {
        let names = self.names()?;
        let mut all = Vec::new();
        for family in FAMILIES {
            let mut fixed = [0; ROUTE_PART];
            fixed[0] = family;
            let query = || Message::new(wire::GET_ROUTE, wire::DUMP, &fixed);
            all.extend(self.dump("the list of routes", query, |payload| parse_route(payload, &names))?);
        }
        Ok(all)
    }

    /// The permanent neighbours of one link.
    pub fn neighbours(&self, link: &str) -> Result<Vec<Neighbour>, LinkError> {
        let index = self.index(link)?;
        let mut all = Vec::new();
        for family in FAMILIES {
            all.extend(self.dump(
                "the list of neighbours",
                || neighbour_query(family),
                |payload| {
                    let (address, mac) = parse_neighbour(payload, index)?;
                    Some(Neighbour { link: link.into(), address, mac })
                },
            )?);
        }
        Ok(all)
    }

    /// The permanent forwarding entries of one VXLAN link.
    pub fn forwarding(&self, link: &str) -> Result<Vec<Fdb>, LinkError> {
        let index = self.index(link)?;
        self.dump(
            "the forwarding table",
            || neighbour_query(code::AF_BRIDGE),
            |payload| {
                let (remote, mac) = parse_neighbour(payload, index)?;
                Some(Fdb { link: link.into(), mac, remote })
            },
        )
    }

    fn names(&self) -> Result<BTreeMap<u32, String>, LinkError> {
        Ok(self.links()?.into_iter().map(|link| (link.index, link.name)).collect())
    }

    /// Repeats a dump that the kernel calls incomplete, a few times.
    fn dump<T>(
        &self,
        doing: &'static str,
        query: impl Fn() -> Message,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, LinkError> {
        for _ in 0..20 {
            let mut all = Vec::new();
            let whole = self
                .socket()
                .exchange(query(), |payload| all.extend(parse(payload)))
                .map_err(|errno| LinkError::Kernel { item: format!("read {doing}"), errno })?;
            if whole {
                return Ok(all);
            }
        }
        Err(LinkError::Unsteady { doing })
    }
}

fn link_query(flags: u16) -> Message {
    let mut message = Message::new(wire::GET_LINK, flags, &[0; LINK_PART]);
    // RTEXT_FILTER_SKIP_STATS: counters are most of an answer and nobody here reads them.
    message.u32(code::IFLA_EXT_MASK, 1 << 3);
    message
}

fn neighbour_query(family: u8) -> Message {
    let mut fixed = [0; NEIGHBOUR_PART];
    fixed[0] = family;
    Message::new(wire::GET_NEIGHBOUR, wire::DUMP, &fixed)
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let flags = read_u32(payload, 8)?;
    let mut link = Link {
        index: read_u32(payload, 4)?,
        name: String::new(),
        kind: String::new(),
        mtu: 0,
        mac: None,
        is_up: flags & code::IFF_UP != 0,
        has_carrier: flags & code::IFF_LOWER_UP != 0,
        bridge: None,
    };
    for (kind, value) in attributes(payload, LINK_PART) {
        match kind {
            code::IFLA_IFNAME => link.name = read_text(value),
            code::IFLA_MTU => link.mtu = read_u32(value, 0)?,
            code::IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            code::IFLA_MASTER => link.bridge = read_u32(value, 0),
            code::IFLA_LINKINFO => {
                let name = attributes(value, 0).find(|(kind, _)| *kind == code::IFLA_INFO_KIND);
                link.kind = name.map(|(_, name)| read_text(name)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

fn parse_route(payload: &[u8], names: &BTreeMap<u32, String>) -> Option<Route> {
    let &[family, length, _, _, table, protocol, _, kind] = payload.first_chunk::<8>()?;
    let flags = read_u32(payload, 8)?;
    let kind = match kind {
        code::RTN_UNICAST => RouteKind::Unicast,
        code::RTN_BLACKHOLE => RouteKind::Blackhole,
        code::RTN_UNREACHABLE => RouteKind::Unreachable,
        _ => return None,
    };
    if table != code::RT_TABLE_MAIN || flags & code::RTM_F_CLONED != 0 {
        return None;
    }
    let any = if family == code::AF_INET { IpAddr::from([0_u8; 4]) } else { IpAddr::from([0_u8; 16]) };
    let (mut to, mut via, mut link, mut source) = (any, None, None, None);
    for (attribute, value) in attributes(payload, ROUTE_PART) {
        match attribute {
            code::RTA_DST => to = ip(value)?,
            code::RTA_GATEWAY => via = Some(ip(value)?),
            code::RTA_OIF => link = names.get(&read_u32(value, 0)?).cloned(),
            code::RTA_PREFSRC => source = Some(ip(value)?),
            code::RTA_MULTIPATH => return None,
            _ => {}
        }
    }
    if kind != RouteKind::Unicast {
        // IPv6 says `lo` here.
        link = None;
    }
    let to = IpNet::new(to, length).ok()?;
    let is_onlink = flags & code::RTNH_F_ONLINK != 0;
    Some(Route { to, kind, via, link, is_onlink, source, protocol })
}

/// The address and the hardware address of a permanent entry of the link with this index.
fn parse_neighbour(payload: &[u8], index: u32) -> Option<(IpAddr, Mac)> {
    let state = wire::read_u16(payload, 8)?;
    if read_u32(payload, 4)? != index || state & code::NUD_PERMANENT == 0 {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attributes(payload, NEIGHBOUR_PART) {
        match kind {
            code::NDA_DST => address = ip(value),
            code::NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some((address?, mac?))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
