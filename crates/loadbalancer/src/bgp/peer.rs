//! MetalLB's BGPPeer and BFDProfile, read.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use api::duration::GoDuration;
use api::object::{Key, Metadata};
use api::selector::{LabelSelector, LabelSelectorSpec};
use serde::Deserialize;

use super::bfd::Timing;
use super::capability::Family;
use super::session::{PeerAs, Settings};
use crate::PoolError;
use crate::pool::selectors;

const PORT: u16 = 179;
const HOLD_TIME: Duration = Duration::from_secs(90);
const CONNECT_RETRY: Duration = Duration::from_secs(5);
/// Nothing is repeated more often.
const SHORTEST: Duration = Duration::from_secs(1);
/// How long a peer keeps routes of a node that starts again, if it is asked to.
const RESTART_TIME: Duration = Duration::from_secs(120);
/// The annotation of a BGPPeer that opens the connection itself, while this side waits.
pub const PASSIVE_ANNOTATION: &str = "fairlead.io/bgp-passive";

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    #[error("spec.{0} is not supported here; take it out")]
    Unsupported(&'static str),
    #[error("spec.{field} is {value:?}, which is not {expected}; correct it")]
    Field { field: &'static str, value: String, expected: &'static str },
    #[error("spec.peerASN and spec.dynamicASN say the same in two ways; give exactly one of them")]
    PeerAs,
    #[error("spec.password and spec.passwordSecret say the same in two ways; give one of them")]
    Password,
    #[error(transparent)]
    Selector(#[from] PoolError),
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PeerObject {
    pub metadata: Metadata,
    pub spec: PeerSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerSpec {
    #[serde(rename = "myASN")]
    pub my_asn: u32,
    #[serde(rename = "localASN")]
    pub local_asn: u32,
    #[serde(rename = "peerASN")]
    pub peer_asn: u32,
    #[serde(rename = "dynamicASN")]
    pub dynamic_asn: String,
    pub peer_address: String,
    pub interface: String,
    pub source_address: String,
    pub peer_port: Option<u16>,
    /// Durations as Go writes them, such as 90s.
    pub hold_time: Option<String>,
    pub keepalive_time: Option<String>,
    pub connect_time: Option<String>,
    #[serde(rename = "routerID")]
    pub router_id: String,
    pub node_selectors: Vec<LabelSelectorSpec>,
    pub password: String,
    pub password_secret: SecretReference,
    pub bfd_profile: String,
    pub enable_graceful_restart: bool,
    pub ebgp_multi_hop: bool,
    pub vrf: String,
    #[serde(rename = "disableMP")]
    pub disable_mp: bool,
    pub dual_stack_address_family: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct SecretReference {
    pub name: String,
    pub namespace: String,
}

/// A peer, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub key: Key,
    node_selectors: Vec<LabelSelector>,
    pub address: IpAddr,
    pub port: u16,
    pub source: Option<IpAddr>,
    pub is_passive: bool,
    pub is_multihop: bool,
    pub password: Option<String>,
    /// Of type kubernetes.io/basic-auth, whose `password` is that of the session.
    pub secret: Option<Key>,
    /// The name of a BFDProfile.
    pub bfd: Option<String>,
    local_as: u32,
    peer_as: PeerAs,
    router_id: Option<Ipv4Addr>,
    hold_time: Duration,
    keepalive: Option<Duration>,
    connect_retry: Duration,
    families: BTreeSet<Family>,
    restart_time: Option<Duration>,
}

fn address<T: std::str::FromStr>(field: &'static str, text: &str) -> Result<Option<T>, PeerError> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |_| PeerError::Field { field, value: text.to_owned(), expected: "an IP address" };
    text.parse().map(Some).map_err(wrong)
}

fn duration(field: &'static str, text: Option<&str>) -> Result<Option<Duration>, PeerError> {
    let wrong = |text: &str| PeerError::Field { field, value: text.to_owned(), expected: "a duration such as 90s" };
    text.map(|text| text.parse::<GoDuration>().map(|time| time.0).map_err(|_| wrong(text))).transpose()
}

impl Peer {
    /// # Errors
    /// Names the field that cannot be meant or is not supported.
    pub fn new(object: &PeerObject) -> Result<Peer, PeerError> {
        let spec = &object.spec;
        if !spec.interface.is_empty() {
            return Err(PeerError::Unsupported("interface"));
        }
        if !spec.vrf.is_empty() {
            return Err(PeerError::Unsupported("vrf"));
        }
        let peer_as = match (spec.peer_asn, spec.dynamic_asn.as_str()) {
            (0, "internal") => PeerAs::Internal,
            (0, "external") => PeerAs::External,
            (number, "") if number != 0 => PeerAs::Number(number),
            _ => return Err(PeerError::PeerAs),
        };
        let local_as = if spec.local_asn == 0 { spec.my_asn } else { spec.local_asn };
        if local_as == 0 {
            let expected = "an AS number from 1 to 4294967295";
            return Err(PeerError::Field { field: "myASN", value: "0".into(), expected });
        }
        let hold_time = duration("holdTime", spec.hold_time.as_deref())?.unwrap_or(HOLD_TIME);
        let keepalive = duration("keepaliveTime", spec.keepalive_time.as_deref())?;
        let connect_retry = duration("connectTime", spec.connect_time.as_deref())?.unwrap_or(CONNECT_RETRY);
        if !hold_time.is_zero() && !(3..=65535).contains(&hold_time.as_secs()) {
            let value = GoDuration(hold_time).to_string();
            return Err(PeerError::Field { field: "holdTime", value, expected: "0 or from 3s to 65535s" });
        }
        let missing = || PeerError::Field { field: "peerAddress", value: String::new(), expected: "an IP address" };
        let peer_address: IpAddr = address("peerAddress", &spec.peer_address)?.ok_or_else(missing)?;
        let source: Option<IpAddr> = address("sourceAddress", &spec.source_address)?;
        if source.is_some_and(|source| source.is_ipv4() != peer_address.is_ipv4()) {
            let value = spec.source_address.clone();
            return Err(PeerError::Field { field: "sourceAddress", value, expected: "of peerAddress's family" });
        }
        let has_secret = !spec.password_secret.name.is_empty();
        if has_secret && !spec.password.is_empty() {
            return Err(PeerError::Password);
        }
        let namespace = match spec.password_secret.namespace.as_str() {
            "" => object.metadata.namespace.clone(),
            given => given.to_owned(),
        };
        let mut families = BTreeSet::from([Family::of(peer_address)]);
        if spec.dual_stack_address_family {
            families.extend([Family::Ipv4, Family::Ipv6]);
        }
        let is_passive = object.metadata.annotations.get(PASSIVE_ANNOTATION).is_some_and(|text| text == "true");
        Ok(Peer {
            key: Key::new(&object.metadata.namespace, &object.metadata.name),
            node_selectors: selectors("spec.nodeSelectors", &spec.node_selectors)?,
            address: peer_address,
            port: spec.peer_port.unwrap_or(PORT),
            source,
            is_passive,
            is_multihop: spec.ebgp_multi_hop,
            password: (!spec.password.is_empty()).then(|| spec.password.clone()),
            secret: has_secret.then(|| Key::new(namespace, &spec.password_secret.name)),
            bfd: (!spec.bfd_profile.is_empty()).then(|| spec.bfd_profile.clone()),
            local_as,
            peer_as,
            router_id: address("routerID", &spec.router_id)?,
            hold_time,
            keepalive: keepalive.map(|time| time.max(SHORTEST)),
            connect_retry: connect_retry.max(SHORTEST),
            families,
            restart_time: spec.enable_graceful_restart.then_some(RESTART_TIME),
        })
    }

    pub fn allows_node(&self, labels: &BTreeMap<String, String>) -> bool {
        self.node_selectors.is_empty() || self.node_selectors.iter().any(|selector| selector.matches_map(labels))
    }

    /// Whether the peer is of our own AS, as far as that is known before it says so.
    pub fn is_internal(&self) -> bool {
        self.peer_as == PeerAs::Internal || self.peer_as == PeerAs::Number(self.local_as)
    }

    /// How its session is on a node with these addresses.
    pub fn settings(&self, node: &str, addresses: &[IpAddr]) -> Settings {
        let mut next_hops = BTreeMap::new();
        for address in addresses {
            next_hops.entry(Family::of(*address)).or_insert(*address);
        }
        let own = addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        // Any number that no other node of the AS has will do (RFC 6286); one of its name, where there is no address.
        let router_id = self.router_id.or(own).unwrap_or_else(|| {
            let hash =
                node.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
            Ipv4Addr::from(hash | 1)
        });
        Settings {
            local_as: self.local_as,
            peer_as: self.peer_as,
            router_id,
            hold_time: self.hold_time,
            keepalive: self.keepalive,
            connect_retry: self.connect_retry,
            families: self.families.clone(),
            next_hops,
            is_passive: self.is_passive,
            restart_time: self.restart_time,
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ProfileObject {
    pub metadata: Metadata,
    pub spec: ProfileSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProfileSpec {
    /// Milliseconds.
    pub receive_interval: Option<u32>,
    pub transmit_interval: Option<u32>,
    pub detect_multiplier: Option<u8>,
    pub echo_mode: bool,
    pub passive_mode: bool,
    pub minimum_ttl: Option<u8>,
}

impl ProfileObject {
    /// # Errors
    /// Names what is not supported.
    pub fn timing(&self, is_multihop: bool) -> Result<Timing, PeerError> {
        if self.spec.echo_mode {
            return Err(PeerError::Unsupported("echoMode"));
        }
        let interval = |field, given: Option<u32>| match given.unwrap_or(300) {
            milliseconds @ 10..=60_000 => Ok(Duration::from_millis(u64::from(milliseconds))),
            other => {
                Err(PeerError::Field { field, value: other.to_string(), expected: "from 10 to 60000 milliseconds" })
            }
        };
        let multiplier = self.spec.detect_multiplier.unwrap_or(3);
        if multiplier < 2 {
            let (field, value) = ("detectMultiplier", multiplier.to_string());
            return Err(PeerError::Field { field, value, expected: "from 2 to 255" });
        }
        Ok(Timing {
            transmit: interval("transmitInterval", self.spec.transmit_interval)?,
            receive: interval("receiveInterval", self.spec.receive_interval)?,
            multiplier,
            is_passive: self.spec.passive_mode,
            least_hops: self.spec.minimum_ttl.unwrap_or(254),
            is_multihop,
        })
    }
}
