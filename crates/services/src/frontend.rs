//! One port of one Service, with everything decided that does not depend on the node.

use std::fmt::{Display, Formatter, Result};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::Endpoint;

/// Names a Service port for as long as it lives. Below 2^30, so that a data path has bits left for what it
/// keeps per port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The number in an IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            132 => Some(Protocol::Sctp),
            _ => None,
        }
    }

    /// `tcp`, as iptables and DNS write it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }

    /// Parses Kubernetes' `TCP`, `UDP` or `SCTP`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => Some(Protocol::Sctp),
            _ => None,
        }
    }
}

impl Display for Protocol {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(self.name())
    }
}

/// Whose endpoints traffic of one kind may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// All of the cluster's.
    Cluster,
    /// Those on the node the traffic arrives at.
    Local,
}

/// A client stays with the endpoint it was given, until it was idle for so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Affinity {
    pub timeout_seconds: u32,
}

/// What becomes of the connections to an endpoint that goes away: one that terminates while others are left, or has gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EndPolicy {
    /// They go on as long as both sides want.
    #[default]
    Keep,
    /// They have so long to end, then they are reset.
    Drain {
        seconds: u32,
    },
    Reset,
}

impl EndPolicy {
    pub const ANNOTATION: &'static str = "fairlead.io/end-policy";
    /// A day.
    const LONGEST: u32 = 86_400;

    /// Parses `keep`, `drain=SECONDS` or `reset`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "keep" => Some(EndPolicy::Keep),
            "reset" => Some(EndPolicy::Reset),
            drain => match drain.strip_prefix("drain=")?.parse() {
                Ok(seconds @ 1..=Self::LONGEST) => Some(EndPolicy::Drain { seconds }),
                _ => None,
            },
        }
    }
}

/// How a new connection gets its endpoint, where affinity does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Selection {
    /// Each endpoint is equally likely.
    #[default]
    Random,
    /// A table that every node computes alike, so that a flow that comes in through another node keeps its endpoint, and
    /// few flows move when an endpoint comes or goes (Maglev, NSDI 2016).
    Maglev,
    /// Of two endpoints drawn at random the one with fewer live connections.
    LeastLoad,
}

impl Selection {
    pub const ANNOTATION: &'static str = "fairlead.io/endpoint-selection";
    pub const NAMES: [(&'static str, Self); 3] =
        [("random", Selection::Random), ("maglev", Selection::Maglev), ("least-load", Selection::LeastLoad)];

    /// Parses `random`, `maglev` or `least-load`.
    pub fn parse(text: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == text.trim()).map(|(_, selection)| *selection)
    }
}

impl FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Self::parse(text).ok_or_else(|| format!("{text:?} is not random, maglev or least-load"))
    }
}

impl Display for Selection {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let name = Self::NAMES.iter().find(|(_, selection)| selection == self).map(|(name, _)| *name);
        f.write_str(name.expect("every selection has a name"))
    }
}

/// `namespace/name:port`, as kube-proxy writes it; the port's name may be empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortName {
    pub namespace: Arc<str>,
    pub service: Arc<str>,
    pub port: Arc<str>,
    pub protocol: Protocol,
}

impl Display for PortName {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{}/{}", self.namespace, self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

/// Says of a Service whether its endpoints answer past the node that a client came to: `true` or `false`.
pub const DSR_ANNOTATION: &str = "fairlead.io/dsr";

/// One port of one Service. Back ends destructure it fully, so that a new field asks each of them for a decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Frontend {
    pub id: FrontendId,
    pub name: PortName,
    pub app_protocol: Option<Arc<str>>,
    pub port: u16,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// Those that the node is to capture (`ipMode: VIP`); traffic to the others goes out to the load balancer.
    pub load_balancer_ips: Vec<IpAddr>,
    pub node_port: Option<NonZeroU16>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    pub affinity: Option<Affinity>,
    /// Who may use the load balancer's addresses; empty: everybody.
    pub source_ranges: Vec<IpNet>,
    pub health_check_node_port: Option<NonZeroU16>,
    pub end_policy: EndPolicy,
    /// `None`: as the node's proxy does by default.
    pub selection: Option<Selection>,
    /// Whether endpoints on other nodes answer clients from outside without the node that these came to (DSR); `None` as
    /// above.
    pub direct_return: Option<bool>,
    /// In slot order: ready IPv4, ready IPv6, all others. A ready endpoint keeps its slot; when one leaves, the last
    /// ready one of its family moves into the hole.
    pub endpoints: Vec<Arc<Endpoint>>,
}

impl Frontend {
    /// Whether anything outside the cluster can reach it.
    pub fn is_external(&self) -> bool {
        self.node_port.is_some() || !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty()
    }
}
