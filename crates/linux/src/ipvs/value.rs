//! Virtual services and destinations, and how `ipvsadm` would write them.

use std::fmt::{Display, Formatter, Result};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use super::Error;

/// Names a virtual service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub address: SocketAddr,
    /// An IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
}

/// How a service chooses among its destinations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// One after the other.
    #[default]
    RoundRobin,
    LeastConnection,
    DestinationHash,
    SourceHash,
    ShortestExpectedDelay,
    NeverQueue,
    WeightedRoundRobin,
    WeightedLeastConnection,
    /// Maglev's consistent hash.
    Maglev,
    /// One that somebody else asked the kernel for.
    Other(Box<str>),
}

impl Scheduler {
    /// Those that can be chosen.
    pub const ALL: [Scheduler; 9] = [
        Scheduler::RoundRobin,
        Scheduler::LeastConnection,
        Scheduler::DestinationHash,
        Scheduler::SourceHash,
        Scheduler::ShortestExpectedDelay,
        Scheduler::NeverQueue,
        Scheduler::WeightedRoundRobin,
        Scheduler::WeightedLeastConnection,
        Scheduler::Maglev,
    ];

    /// The kernel's name of it, which is also that of its module after `ip_vs_`.
    pub fn name(&self) -> &str {
        match self {
            Scheduler::RoundRobin => "rr",
            Scheduler::LeastConnection => "lc",
            Scheduler::DestinationHash => "dh",
            Scheduler::SourceHash => "sh",
            Scheduler::ShortestExpectedDelay => "sed",
            Scheduler::NeverQueue => "nq",
            Scheduler::WeightedRoundRobin => "wrr",
            Scheduler::WeightedLeastConnection => "wlc",
            Scheduler::Maglev => "mh",
            Scheduler::Other(name) => name,
        }
    }

    pub(super) fn named(name: &str) -> Self {
        name.parse().unwrap_or_else(|_| Scheduler::Other(name.into()))
    }
}

impl FromStr for Scheduler {
    type Err = Error;

    fn from_str(text: &str) -> std::result::Result<Self, Error> {
        let known = Scheduler::ALL.into_iter().find(|scheduler| scheduler.name() == text);
        known.ok_or_else(|| Error::Scheduler(text.to_owned()))
    }
}

impl Display for Scheduler {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(self.name())
    }
}

/// Each datagram is scheduled on its own (IP_VS_SVC_F_ONEPACKET).
pub const ONE_PACKET: u32 = 0x4;
/// sh and mh: fall back to another destination if the hashed one has weight 0 (IP_VS_SVC_F_SCHED1).
pub const SCHEDULER_1: u32 = 0x8;
/// sh and mh: hash the source port too (IP_VS_SVC_F_SCHED2).
pub const SCHEDULER_2: u32 = 0x10;

/// A client stays with its destination until it was idle for so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Persistence {
    pub timeout_seconds: u32,
    /// How many leading bits of its address make a client: 32 or 128 for each address on its own.
    pub prefix: u8,
}

/// A virtual service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub key: Key,
    pub scheduler: Scheduler,
    pub persistence: Option<Persistence>,
    /// Of [`ONE_PACKET`], [`SCHEDULER_1`], [`SCHEDULER_2`].
    pub flags: u32,
}

/// How packets get to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding {
    /// Translated, both ways.
    Masquerade,
    Local,
    Tunnel,
    DirectRoute,
}

/// One of those that a service chooses from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub address: SocketAddr,
    pub forwarding: Forwarding,
    /// 0: no new connection, those there are go on.
    pub weight: u32,
    /// No new connection above so many; 0: no limit.
    pub upper_threshold: u32,
    /// After that, none until there are fewer than this.
    pub lower_threshold: u32,
}

impl Destination {
    /// Translated, without limits.
    pub fn new(address: SocketAddr, weight: u32) -> Self {
        Destination { address, forwarding: Forwarding::Masquerade, weight, upper_threshold: 0, lower_threshold: 0 }
    }
}

/// What a destination has open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    pub active: u32,
    /// Closing, or not TCP.
    pub inactive: u32,
    /// Clients that persistence ties to it.
    pub persistent: u32,
}

impl Connections {
    pub fn is_idle(&self) -> bool {
        self.active == 0 && self.inactive == 0
    }
}

/// What a destination has had since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub connections: u64,
    /// From its clients.
    pub bytes_in: u64,
    /// To its clients.
    pub bytes_out: u64,
}

/// Seconds after which an idle connection is forgotten; 0 leaves a value as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp: u32,
    pub tcp_fin: u32,
    pub udp: u32,
}

/// What the kernel says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Major, minor, patch.
    pub version: (u8, u8, u8),
    /// Buckets of the connection table.
    pub connection_table: u32,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    AddService(Service),
    SetService(Service),
    /// With its destinations; its connections are cut.
    DeleteService(Key),
    AddDestination(Key, Destination),
    SetDestination(Key, Destination),
    DeleteDestination(Key, SocketAddr),
    /// Puts an address on [`super::DEVICE`], so that packets to it are this host's.
    Bind(IpAddr),
    Unbind(IpAddr),
    SetTimeouts(Timeouts),
}

impl Display for Key {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let option = match self.protocol {
            6 => "-t",
            17 => "-u",
            _ => "--sctp-service",
        };
        write!(f, "{option} {}", self.address)
    }
}

impl Display for Service {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{} -s {}", self.key, self.scheduler)?;
        if let Some(Persistence { timeout_seconds, prefix }) = self.persistence {
            write!(f, " -p {timeout_seconds}")?;
            match self.key.address {
                SocketAddr::V4(_) if prefix != 32 => write!(f, " -M /{prefix}")?,
                SocketAddr::V6(_) if prefix != 128 => write!(f, " -M {prefix}")?,
                _ => {}
            }
        }
        for (flag, name) in [(ONE_PACKET, " -o"), (SCHEDULER_1, " -b flag-1"), (SCHEDULER_2, " -b flag-2")] {
            if self.flags & flag != 0 {
                f.write_str(name)?;
            }
        }
        Ok(())
    }
}

impl Display for Destination {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let how = match self.forwarding {
            Forwarding::Masquerade => "-m",
            Forwarding::Local => "local",
            Forwarding::Tunnel => "-i",
            Forwarding::DirectRoute => "-g",
        };
        write!(f, "-r {} {how} -w {}", self.address, self.weight)?;
        if self.upper_threshold > 0 {
            write!(f, " -x {} -y {}", self.upper_threshold, self.lower_threshold)?;
        }
        Ok(())
    }
}

impl Display for Op {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Op::AddService(service) => write!(f, "-A {service}"),
            Op::SetService(service) => write!(f, "-E {service}"),
            Op::DeleteService(key) => write!(f, "-D {key}"),
            Op::AddDestination(key, destination) => write!(f, "-a {key} {destination}"),
            Op::SetDestination(key, destination) => write!(f, "-e {key} {destination}"),
            Op::DeleteDestination(key, address) => write!(f, "-d {key} -r {address}"),
            Op::Bind(address) => write!(f, "ip address add {address} dev {}", super::DEVICE),
            Op::Unbind(address) => write!(f, "ip address delete {address} dev {}", super::DEVICE),
            Op::SetTimeouts(Timeouts { tcp, tcp_fin, udp }) => write!(f, "--set {tcp} {tcp_fin} {udp}"),
        }
    }
}
