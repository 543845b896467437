//! Pools of addresses and what is said about them: MetalLB's IPAddressPool and L2Advertisement.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use api::duration::GoDuration;
use api::object::Metadata;
use api::selector::{LabelSelector, LabelSelectorSpec};
use ipnet::IpNet;
use serde::Deserialize;

use crate::Request;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PoolError {
    #[error(
        "spec.addresses: {0:?} is neither a range FIRST-LAST of one family nor a CIDR; write 192.0.2.0/25 or 192.0.2.1-192.0.2.9"
    )]
    Range(String),
    #[error("{field}: {why}; correct the selector")]
    Selector { field: &'static str, why: String },
    #[error("annotation {name} is {value:?}, which is not {expected}; correct it")]
    Annotation { name: &'static str, value: String, expected: &'static str },
    #[error("it overlaps pool {0}; let them not share addresses")]
    Overlap(String),
}

/// An IPAddressPool as it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PoolObject {
    pub metadata: Metadata,
    pub spec: PoolSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PoolSpec {
    pub addresses: Vec<String>,
    pub auto_assign: Option<bool>,
    #[serde(rename = "avoidBuggyIPs")]
    pub avoid_buggy_ips: bool,
    pub service_allocation: Option<AllocationSpec>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AllocationSpec {
    pub priority: i64,
    pub namespaces: Vec<String>,
    pub namespace_selectors: Vec<LabelSelectorSpec>,
    pub service_selectors: Vec<LabelSelectorSpec>,
}

/// A pool, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// First and last address of each range, both included, of one family.
    pub ranges: Vec<(IpAddr, IpAddr)>,
    /// Services that ask for nothing get addresses of it.
    pub auto_assign: bool,
    /// Addresses that end in .0 and .255 are left out: some clients take them for a network's own.
    pub avoids_buggy: bool,
    /// Lower comes first; 0 is last, as MetalLB has it.
    pub priority: i64,
    /// For whom it is; `None`: for everybody.
    pub only: Option<Only>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Only {
    pub namespaces: BTreeSet<String>,
    pub namespace_selectors: Vec<LabelSelector>,
    pub service_selectors: Vec<LabelSelector>,
}

pub(crate) fn selectors(field: &'static str, specs: &[LabelSelectorSpec]) -> Result<Vec<LabelSelector>, PoolError> {
    let parse = |spec| LabelSelector::from_spec(spec).map_err(|error| PoolError::Selector { field, why: error.0 });
    specs.iter().map(parse).collect()
}

/// `192.0.2.0/25` or `192.0.2.1-192.0.2.9`.
fn range(text: &str) -> Result<(IpAddr, IpAddr), PoolError> {
    let bad = || PoolError::Range(text.to_owned());
    if let Some((first, last)) = text.split_once('-') {
        let (first, last): (IpAddr, IpAddr) =
            (first.trim().parse().map_err(|_| bad())?, last.trim().parse().map_err(|_| bad())?);
        return if first.is_ipv4() == last.is_ipv4() && first <= last { Ok((first, last)) } else { Err(bad()) };
    }
    let net: IpNet = text.trim().parse().map_err(|_| bad())?;
    Ok((net.network(), net.broadcast()))
}

impl Pool {
    /// # Errors
    /// Names the field that cannot be meant.
    pub fn new(object: &PoolObject) -> Result<Pool, PoolError> {
        let spec = &object.spec;
        let only = match &spec.service_allocation {
            Some(a)
                if !(a.namespaces.is_empty() && a.namespace_selectors.is_empty() && a.service_selectors.is_empty()) =>
            {
                Some(Only {
                    namespaces: a.namespaces.iter().cloned().collect(),
                    namespace_selectors: selectors(
                        "spec.serviceAllocation.namespaceSelectors",
                        &a.namespace_selectors,
                    )?,
                    service_selectors: selectors("spec.serviceAllocation.serviceSelectors", &a.service_selectors)?,
                })
            }
            _ => None,
        };
        Ok(Pool {
            name: object.metadata.name.clone(),
            labels: object.metadata.labels.clone(),
            ranges: spec.addresses.iter().map(|text| range(text)).collect::<Result<_, _>>()?,
            auto_assign: spec.auto_assign.unwrap_or(true),
            avoids_buggy: spec.avoid_buggy_ips,
            priority: spec.service_allocation.as_ref().map_or(0, |a| a.priority),
            only,
        })
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        let within = |(first, last): &(IpAddr, IpAddr)| {
            first.is_ipv4() == address.is_ipv4() && *first <= address && address <= *last
        };
        self.ranges.iter().any(within) && !(self.avoids_buggy && is_buggy(address))
    }

    pub fn overlaps(&self, other: &Pool) -> bool {
        let meet =
            |a: &(IpAddr, IpAddr), b: &(IpAddr, IpAddr)| a.0.is_ipv4() == b.0.is_ipv4() && a.0 <= b.1 && b.0 <= a.1;
        self.ranges.iter().any(|a| other.ranges.iter().any(|b| meet(a, b)))
    }

    /// Whether this Service may have addresses of it.
    pub fn is_for(&self, request: &Request) -> bool {
        let Some(only) = &self.only else { return true };
        let by_name = only.namespaces.contains(&request.key.namespace);
        let by_label = only.namespace_selectors.iter().any(|s| s.matches_map(&request.namespace_labels));
        let namespace = (only.namespaces.is_empty() && only.namespace_selectors.is_empty()) || by_name || by_label;
        let service =
            only.service_selectors.is_empty() || only.service_selectors.iter().any(|s| s.matches_map(&request.labels));
        namespace && service
    }

    /// How many addresses of a family it has.
    pub fn size(&self, v4: bool) -> u128 {
        let of_family = self.ranges.iter().filter(|(first, _)| first.is_ipv4() == v4);
        of_family
            .map(|(first, last)| {
                let all = (number(*last) - number(*first)).saturating_add(1);
                match (self.avoids_buggy, v4) {
                    (true, true) => all - buggy_between(number(*first), number(*last)),
                    _ => all,
                }
            })
            .fold(0, u128::saturating_add)
    }
}

/// How many addresses from `first` to `last` end in .0 or .255.
fn buggy_between(first: u128, last: u128) -> u128 {
    let ending = |end: u128, up_to: u128| (up_to + 256 - end) / 256;
    let before = |end| if first == 0 { 0 } else { ending(end, first - 1) };
    ending(0, last) - before(0) + ending(255, last) - before(255)
}

pub(crate) fn is_buggy(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if matches!(v4.octets()[3], 0 | 255))
}

pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The address with this number, of the family given.
pub(crate) fn numbered(number: u128, v4: bool) -> IpAddr {
    if v4 { IpAddr::from((number as u32).to_be_bytes()) } else { IpAddr::from(number.to_be_bytes()) }
}

/// An L2Advertisement as it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AdvertisementObject {
    pub metadata: Metadata,
    pub spec: AdvertisementSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AdvertisementSpec {
    pub ip_address_pools: Vec<String>,
    pub ip_address_pool_selectors: Vec<LabelSelectorSpec>,
    pub node_selectors: Vec<LabelSelectorSpec>,
    pub interfaces: Vec<String>,
    pub service_selectors: Vec<LabelSelectorSpec>,
}

/// Which pools are announced by which nodes, for which Services, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advertisement {
    pools: BTreeSet<String>,
    pool_selectors: Vec<LabelSelector>,
    node_selectors: Vec<LabelSelector>,
    service_selectors: Vec<LabelSelector>,
    /// Names of interfaces; empty: those that hold the node's own addresses.
    pub interfaces: BTreeSet<String>,
    /// The virtual router that decides who announces, instead of the nodes' vote.
    pub vrrp: Option<VrrpGroup>,
}

/// A virtual router (RFC 9568) as annotations of an L2Advertisement say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VrrpGroup {
    pub id: u8,
    pub interval: Duration,
}

/// From 1 to 255.
pub const VRRP_ID_ANNOTATION: &str = "fairlead.io/vrrp-id";
/// Such as 100ms, which it is by default.
pub const VRRP_INTERVAL_ANNOTATION: &str = "fairlead.io/vrrp-interval";
const VRRP_INTERVAL: Duration = Duration::from_millis(100);

fn vrrp(metadata: &Metadata) -> Result<Option<VrrpGroup>, PoolError> {
    let Some(text) = metadata.annotations.get(VRRP_ID_ANNOTATION) else { return Ok(None) };
    let wrong = |name, value: &String, expected| PoolError::Annotation { name, value: value.clone(), expected };
    let id = text.parse().ok().filter(|id| *id != 0);
    let id = id.ok_or_else(|| wrong(VRRP_ID_ANNOTATION, text, "a number from 1 to 255"))?;
    let interval = match metadata.annotations.get(VRRP_INTERVAL_ANNOTATION) {
        None => VRRP_INTERVAL,
        Some(text) => {
            let read = text.parse::<GoDuration>().ok().map(|read| read.0);
            let fits =
                |time: &Duration| (10..=40_950).contains(&time.as_millis()) && time.as_millis().is_multiple_of(10);
            let expected = "from 10ms to 40.95s in steps of 10ms";
            read.filter(fits).ok_or_else(|| wrong(VRRP_INTERVAL_ANNOTATION, text, expected))?
        }
    };
    Ok(Some(VrrpGroup { id, interval }))
}

impl Advertisement {
    /// # Errors
    /// Names the field that cannot be meant.
    pub fn new(object: &AdvertisementObject) -> Result<Advertisement, PoolError> {
        let spec = &object.spec;
        Ok(Advertisement {
            pools: spec.ip_address_pools.iter().cloned().collect(),
            pool_selectors: selectors("spec.ipAddressPoolSelectors", &spec.ip_address_pool_selectors)?,
            node_selectors: selectors("spec.nodeSelectors", &spec.node_selectors)?,
            service_selectors: selectors("spec.serviceSelectors", &spec.service_selectors)?,
            interfaces: spec.interfaces.iter().cloned().collect(),
            vrrp: vrrp(&object.metadata)?,
        })
    }

    pub fn is_of(&self, pool: &Pool) -> bool {
        (self.pools.is_empty() && self.pool_selectors.is_empty())
            || self.pools.contains(&pool.name)
            || self.pool_selectors.iter().any(|selector| selector.matches_map(&pool.labels))
    }

    pub fn allows_node(&self, labels: &BTreeMap<String, String>) -> bool {
        self.node_selectors.is_empty() || self.node_selectors.iter().any(|selector| selector.matches_map(labels))
    }

    pub fn is_for(&self, service_labels: &BTreeMap<String, String>) -> bool {
        let selectors = &self.service_selectors;
        selectors.is_empty() || selectors.iter().any(|selector| selector.matches_map(service_labels))
    }
}
