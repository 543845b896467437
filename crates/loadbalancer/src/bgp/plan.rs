//! Which routes a peer of this node is told: MetalLB's BGPAdvertisement and Community.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use api::object::Metadata;
use api::selector::LabelSelectorSpec;
use ipnet::IpNet;
use serde::Deserialize;

use super::update::{Path, Routes};
use crate::pool::{AdvertisementObject, AdvertisementSpec};
use crate::{Advertisement, Pool, PoolError};

/// More would not leave a message room for routes.
const MOST_COMMUNITIES: usize = 128;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("{field} is {value}, which is not from 1 to {most}; correct it")]
    Length { field: &'static str, value: i64, most: u8 },
    #[error("spec.localPref is {0}, which is not from 0 to 4294967295; correct it")]
    Preference(i64),
    #[error(
        "spec.communities: {0:?} is neither a community (65000:100), a large one (large:65000:1:2), nor the name of one in a Community object"
    )]
    Community(String),
    #[error("spec.communities: there are more than {MOST_COMMUNITIES}; take some out")]
    TooMany,
    #[error(transparent)]
    Selector(#[from] PoolError),
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BgpAdvertisementObject {
    pub metadata: Metadata,
    pub spec: BgpAdvertisementSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BgpAdvertisementSpec {
    pub aggregation_length: Option<i64>,
    pub aggregation_length_v6: Option<i64>,
    pub local_pref: Option<i64>,
    pub communities: Vec<String>,
    pub ip_address_pools: Vec<String>,
    pub ip_address_pool_selectors: Vec<LabelSelectorSpec>,
    pub node_selectors: Vec<LabelSelectorSpec>,
    pub service_selectors: Vec<LabelSelectorSpec>,
    pub peers: Vec<String>,
}

/// A Community object: names of communities.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CommunityObject {
    pub metadata: Metadata,
    pub spec: CommunitySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CommunitySpec {
    pub communities: Vec<Alias>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Alias {
    pub name: String,
    pub value: String,
}

/// An advertisement, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BgpAdvertisement {
    /// Its pools, nodes and Services.
    pub scope: Advertisement,
    /// Names of BGPPeers; empty: all.
    peers: BTreeSet<String>,
    /// For IPv4 and IPv6.
    lengths: [u8; 2],
    pub path: Path,
}

impl BgpAdvertisement {
    /// `aliases`: names of communities, of all Community objects.
    ///
    /// # Errors
    /// Names the field that cannot be meant.
    pub fn new(
        object: &BgpAdvertisementObject,
        aliases: &BTreeMap<String, String>,
    ) -> Result<BgpAdvertisement, PlanError> {
        let spec = &object.spec;
        let length = |field, value: Option<i64>, most: u8| {
            let value = value.unwrap_or(i64::from(most));
            u8::try_from(value).ok().filter(|v| (1..=most).contains(v)).ok_or(PlanError::Length { field, value, most })
        };
        let local_pref = spec.local_pref.filter(|value| *value != 0);
        let local_pref = local_pref.map(|value| u32::try_from(value).map_err(|_| PlanError::Preference(value)));
        let mut path = Path { local_pref: local_pref.transpose()?, ..Path::default() };
        if spec.communities.len() > MOST_COMMUNITIES {
            return Err(PlanError::TooMany);
        }
        for text in &spec.communities {
            let value = aliases.get(text).unwrap_or(text);
            match community(value).ok_or_else(|| PlanError::Community(text.clone()))? {
                Community::Plain(number) => path.communities.insert(number),
                Community::Large(parts) => path.large_communities.insert(parts),
            };
        }
        let scope = AdvertisementSpec {
            ip_address_pools: spec.ip_address_pools.clone(),
            ip_address_pool_selectors: spec.ip_address_pool_selectors.clone(),
            node_selectors: spec.node_selectors.clone(),
            service_selectors: spec.service_selectors.clone(),
            interfaces: Vec::new(),
        };
        Ok(BgpAdvertisement {
            scope: Advertisement::new(&AdvertisementObject { metadata: object.metadata.clone(), spec: scope })?,
            peers: spec.peers.iter().cloned().collect(),
            lengths: [
                length("spec.aggregationLength", spec.aggregation_length, 32)?,
                length("spec.aggregationLengthV6", spec.aggregation_length_v6, 128)?,
            ],
            path,
        })
    }

    pub fn is_to(&self, peer: &str) -> bool {
        self.peers.is_empty() || self.peers.contains(peer)
    }

    /// The route that an address is part of.
    fn prefix(&self, address: IpAddr) -> Option<IpNet> {
        let length = if address.is_ipv4() { self.lengths[0] } else { self.lengths[1] };
        IpNet::new(address, length).ok().map(|net| net.trunc())
    }
}

enum Community {
    Plain(u32),
    Large([u32; 3]),
}

fn community(text: &str) -> Option<Community> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts[..] {
        ["large", a, b, c] => Some(Community::Large([a.parse().ok()?, b.parse().ok()?, c.parse().ok()?])),
        [a, b] => {
            let (a, b): (u16, u16) = (a.parse().ok()?, b.parse().ok()?);
            Some(Community::Plain(u32::from(a) << 16 | u32::from(b)))
        }
        _ => None,
    }
}

/// An address of a Service that this node may announce.
pub struct Offer<'a> {
    pub address: IpAddr,
    pub pool: &'a Pool,
    pub service_labels: &'a BTreeMap<String, String>,
}

/// What a peer is told by a node with these labels. Where several advertisements are about one route, it has the communities of
/// all and the greatest preference.
pub fn routes<'a>(
    peer: &str,
    node_labels: &BTreeMap<String, String>,
    advertisements: impl IntoIterator<Item = &'a BgpAdvertisement>,
    offers: &[Offer<'_>],
) -> Routes {
    let mut routes = Routes::new();
    let of_peer = advertisements.into_iter().filter(|one| one.is_to(peer) && one.scope.allows_node(node_labels));
    for advertisement in of_peer {
        let scope = &advertisement.scope;
        let announced = offers.iter().filter(|offer| scope.is_of(offer.pool) && scope.is_for(offer.service_labels));
        for prefix in announced.filter_map(|offer| advertisement.prefix(offer.address)) {
            let route: &mut Path = routes.entry(prefix).or_default();
            route.local_pref = route.local_pref.max(advertisement.path.local_pref);
            route.communities.extend(&advertisement.path.communities);
            route.large_communities.extend(&advertisement.path.large_communities);
        }
    }
    routes
}
