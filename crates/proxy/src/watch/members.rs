//! What the watch's sets hold: where there is another endpoint to go to, and who is out.

use std::net::SocketAddr;

use linux::nft::{DataType, Datum, Element, ElementData, Key, Op, Set, Transaction};
use services::{Frontend, Protocol, TrafficPolicy};

use super::layout::{FAMILY, TABLE};
use crate::NodeView;
use crate::dataplane::frame::{at, named};
use crate::scope::{Scopes, scopes};

/// What one frontend adds to the sets, in order and each once. One for each of many frontends, mostly of one member.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Alternatives(Box<[Member]>);

/// An element of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Member {
    /// A TCP address with at least two endpoints to pick from.
    Alternative(SocketAddr),
    /// An endpoint that has left the pick of an address, where one other is left.
    Out(SocketAddr, SocketAddr),
    /// An endpoint of this node that has others beside it: whose proxy picked it does not matter.
    Here(SocketAddr),
    /// A listener of this node that takes no connections.
    Frozen(SocketAddr),
}

impl Alternatives {
    pub fn new(frontend: &Frontend, node: &NodeView) -> Self {
        let mut members = Vec::new();
        if frontend.name.protocol != Protocol::Tcp || frontend.endpoints.len() < 2 {
            return Alternatives::default();
        }
        let here = frontend.endpoints.iter().filter(|endpoint| match &endpoint.node {
            Some(name) => *name == node.place.node,
            None => true,
        });
        members.extend(here.map(|endpoint| Member::Here(endpoint.address)));
        for v6 in [false, true] {
            let scopes = scopes(frontend, node, v6);
            let addresses = crate::stale::addresses(frontend, node).into_iter();
            for address in addresses.filter(|address| address.is_ipv6() == v6) {
                match picks(frontend, &scopes, address) {
                    0 => {}
                    1 => members.extend(scopes.out.iter().map(|out| Member::Out(address, out.address))),
                    _ => members.push(Member::Alternative(address)),
                }
            }
        }
        members.into_iter().collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.0.iter()
    }

    /// What the other does not have.
    pub fn without<'a>(&'a self, other: &'a Alternatives) -> impl Iterator<Item = &'a Member> {
        self.iter().filter(|member| other.0.binary_search(member).is_err())
    }
}

impl FromIterator<Member> for Alternatives {
    fn from_iter<I: IntoIterator<Item = Member>>(members: I) -> Self {
        let mut members: Vec<Member> = members.into_iter().collect();
        members.sort_unstable();
        members.dedup();
        Alternatives(members.into())
    }
}

/// From how many endpoints a packet to this address has its pick, whoever sent it.
fn picks(frontend: &Frontend, scopes: &Scopes<'_>, address: SocketAddr) -> usize {
    let of = |policy| match policy {
        TrafficPolicy::Cluster => scopes.cluster.len(),
        TrafficPolicy::Local => scopes.local.len(),
    };
    if frontend.cluster_ips.contains(&address.ip()) {
        return of(frontend.internal_policy);
    }
    // The cluster's own traffic to an external address may go anywhere.
    of(TrafficPolicy::Cluster).min(of(frontend.external_policy))
}

/// The sets, each once per address family.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// address . protocol . port
    Alternatives,
    /// The same . endpoint's address . port
    Out,
    /// address . port
    Here,
    Frozen,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Alternatives, Kind::Out, Kind::Here, Kind::Frozen];

    pub fn name(self, v6: bool) -> String {
        let stem = match self {
            Kind::Alternatives => "alternatives",
            Kind::Out => "out",
            Kind::Here => "here",
            Kind::Frozen => "frozen",
        };
        named(stem, v6)
    }

    pub fn set(self, v6: bool) -> Set {
        use DataType::{InetProto, InetService};
        let ip = if v6 { DataType::Ipv6Addr } else { DataType::Ipv4Addr };
        let key: &[DataType] = match self {
            Kind::Alternatives => &[ip, InetProto, InetService],
            Kind::Out => &[ip, InetProto, InetService, ip, InetService],
            Kind::Here | Kind::Frozen => &[ip, InetService],
        };
        Set::of(&self.name(v6), key)
    }

    pub fn member(self, key: &[Datum]) -> Option<Member> {
        match (self, key) {
            (Kind::Alternatives, [ip, _, Datum::Port(port)]) => Some(Member::Alternative(at(ip, *port)?)),
            (Kind::Out, [ip, _, Datum::Port(port), endpoint, Datum::Port(target)]) => {
                Some(Member::Out(at(ip, *port)?, at(endpoint, *target)?))
            }
            (Kind::Here, [ip, Datum::Port(port)]) => Some(Member::Here(at(ip, *port)?)),
            (Kind::Frozen, [ip, Datum::Port(port)]) => Some(Member::Frozen(at(ip, *port)?)),
            _ => None,
        }
    }
}

pub const TCP: Datum = Datum::Proto(6);

fn place(member: &Member) -> (Kind, bool, Key) {
    let pair = |address: &SocketAddr| [Datum::from(address.ip()), Datum::Port(address.port())];
    let triple = |address: &SocketAddr| [Datum::from(address.ip()), TCP, Datum::Port(address.port())];
    match member {
        Member::Alternative(address) => (Kind::Alternatives, address.is_ipv6(), Key::new(triple(address))),
        Member::Out(address, endpoint) => {
            (Kind::Out, address.is_ipv6(), Key::new(triple(address).into_iter().chain(pair(endpoint))))
        }
        Member::Here(address) => (Kind::Here, address.is_ipv6(), Key::new(pair(address))),
        Member::Frozen(address) => (Kind::Frozen, address.is_ipv6(), Key::new(pair(address))),
    }
}

/// Adds or deletes elements.
pub fn elements(members: &[Member], add: bool) -> Transaction {
    let mut transaction = Transaction::new(FAMILY, TABLE);
    for v6 in [false, true] {
        for kind in Kind::ALL {
            let places = members.iter().map(place).filter(|(of, family, _)| *of == kind && *family == v6);
            let elements: Vec<Element> =
                places.map(|(_, _, key)| Element { key, end: None, data: ElementData::None }).collect();
            let set = kind.name(v6).into();
            if !elements.is_empty() {
                transaction.push(if add {
                    Op::AddElements { set, elements }
                } else {
                    Op::DeleteElements { set, elements }
                });
            }
        }
    }
    transaction
}
