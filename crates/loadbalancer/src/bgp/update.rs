//! What a peer is told when routes change: as few UPDATE messages as hold it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::attribute::{Attribute, path};
use super::capability::Family;
use super::message::{HEADER, LONGEST, Update};

/// What is said of a route beside where it leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path {
    /// Told within the own AS only.
    pub local_pref: Option<u32>,
    pub communities: BTreeSet<u32>,
    pub large_communities: BTreeSet<[u32; 3]>,
}

pub type Routes = BTreeMap<IpNet, Path>;

/// What the same of all messages of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub local_as: u32,
    /// The peer is of the same AS.
    pub is_internal: bool,
    /// AS numbers have four bytes.
    pub is_wide: bool,
    /// The families that both sides speak, and where their routes lead: to this node.
    pub next_hops: BTreeMap<Family, IpAddr>,
}

/// Within an AS a route has a preference; this is everybody's default.
const PREFERENCE: u32 = 100;

fn family(net: &IpNet) -> Family {
    Family::of(net.addr())
}

fn attributes(path: &Path, next_hop: IpAddr, frame: &Frame) -> Vec<Attribute> {
    let asns = if frame.is_internal { Vec::new() } else { vec![frame.local_as] };
    let mut all = vec![Attribute::Origin(0), Attribute::AsPath(self::path(&asns))];
    if let IpAddr::V4(next_hop) = next_hop {
        all.push(Attribute::NextHop(next_hop));
    }
    if frame.is_internal {
        all.push(Attribute::LocalPref(path.local_pref.unwrap_or(PREFERENCE)));
    }
    if !path.communities.is_empty() {
        all.push(Attribute::Communities(path.communities.iter().copied().collect()));
    }
    if !frame.is_wide && asns.iter().any(|asn| u16::try_from(*asn).is_err()) {
        all.push(Attribute::As4Path(self::path(&asns)));
    }
    if !path.large_communities.is_empty() {
        all.push(Attribute::LargeCommunities(path.large_communities.iter().copied().collect()));
    }
    all
}

/// How many prefixes of a family fit beside these attributes.
fn room(family: Family, attributes: &[Attribute]) -> usize {
    let mut bytes = Vec::new();
    attributes.iter().for_each(|one| one.encode(true, &mut bytes));
    // Two lengths, and the head of the attribute that holds prefixes of IPv6.
    let left = LONGEST.saturating_sub(HEADER + 4 + 26 + bytes.len());
    let each = if family == Family::Ipv4 { 5 } else { 17 };
    (left / each).max(1)
}

fn only_v4(nets: &[IpNet]) -> Vec<ipnet::Ipv4Net> {
    let v4 = |net: &IpNet| match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    };
    nets.iter().filter_map(v4).collect()
}

/// From what was told to what is to be told: withdrawals first. Families that are not in the frame are passed over.
pub fn updates(before: &Routes, after: &Routes, frame: &Frame) -> Vec<Update> {
    let mut all = Vec::new();
    for (of, next_hop) in &frame.next_hops {
        let gone: Vec<IpNet> =
            before.keys().filter(|net| family(net) == *of && !after.contains_key(*net)).copied().collect();
        for part in gone.chunks(room(*of, &[])) {
            all.push(match of {
                Family::Ipv4 => Update { withdrawn: only_v4(part), ..Update::default() },
                Family::Ipv6 => {
                    Update { attributes: vec![Attribute::Unreach(*of, part.to_vec())], ..Update::default() }
                }
            });
        }
        let mut by_path: BTreeMap<&Path, Vec<IpNet>> = BTreeMap::new();
        for (net, path) in after.iter().filter(|(net, path)| family(net) == *of && before.get(*net) != Some(*path)) {
            by_path.entry(path).or_default().push(*net);
        }
        for (path, nets) in by_path {
            let attributes = attributes(path, *next_hop, frame);
            for part in nets.chunks(room(*of, &attributes)) {
                let mut update = Update { attributes: attributes.clone(), ..Update::default() };
                match of {
                    Family::Ipv4 => update.announced = only_v4(part),
                    Family::Ipv6 => update.attributes.push(Attribute::Reach(*of, *next_hop, part.to_vec())),
                }
                all.push(update);
            }
        }
    }
    all
}
