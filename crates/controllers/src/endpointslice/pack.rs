//! Spreads endpoints over slices of at most a hundred, changing as few slices as it can.

use super::slice::{Endpoint, EndpointSlice};
use crate::service::EndpointPort;
use std::collections::BTreeMap;
use std::sync::Arc;

const CAPACITY: usize = 100;

/// What becomes of one slice.
#[derive(Debug)]
pub struct Packed {
    /// The slice there is; `None` for a new one.
    pub slice: Option<Arc<EndpointSlice>>,
    pub ports: Vec<EndpointPort>,
    /// What it holds; `None` deletes it.
    pub endpoints: Option<Vec<Endpoint>>,
}

/// Fits groups of endpoints, one per list of ports, into the slices of one address family.
///
/// Endpoints stay where they are. New ones go to slices that change anyway, then to one that has room for all of them, then to new ones.
/// Where there is no endpoint at all, one empty slice says so.
pub fn pack(groups: BTreeMap<Vec<EndpointPort>, Vec<Endpoint>>, existing: &[Arc<EndpointSlice>]) -> Vec<Packed> {
    let mut slices = existing.to_vec();
    slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    // Slices whose ports no group has, and empty ones, are free for any group.
    let (used, mut free): (Vec<_>, Vec<_>) =
        slices.into_iter().partition(|s| groups.contains_key(s.ports()) && !s.endpoints().is_empty());
    let mut packed = Vec::new();
    for (ports, endpoints) in groups {
        let of_group: Vec<_> = used.iter().filter(|s| s.ports() == ports.as_slice()).cloned().collect();
        packed.extend(pack_group(&ports, endpoints, of_group, &mut free));
    }
    let is_empty = packed.iter().all(|p| p.endpoints.is_none());
    for slice in free {
        packed.push(Packed { slice: Some(slice), ports: Vec::new(), endpoints: None });
    }
    if is_empty {
        match packed.first_mut() {
            Some(first) => {
                first.ports = Vec::new();
                first.endpoints = Some(Vec::new());
            }
            None => packed.push(Packed { slice: None, ports: Vec::new(), endpoints: Some(Vec::new()) }),
        }
    }
    packed
}

fn pack_group(
    ports: &[EndpointPort],
    endpoints: Vec<Endpoint>,
    slices: Vec<Arc<EndpointSlice>>,
    free: &mut Vec<Arc<EndpointSlice>>,
) -> Vec<Packed> {
    let mut homeless: BTreeMap<_, _> = endpoints.into_iter().map(|e| (e.identity(), e)).collect();
    let mut filled: Vec<(Arc<EndpointSlice>, Vec<Endpoint>)> = Vec::new();
    for slice in slices {
        let kept = slice.endpoints().iter().filter_map(|e| homeless.remove(&e.identity())).collect();
        filled.push((slice, kept));
    }
    let mut homeless: Vec<Endpoint> = homeless.into_values().collect();
    homeless.sort_by(|a, b| a.addresses.cmp(&b.addresses));

    // Fullest first, so that few slices stay half empty.
    let mut changing: Vec<_> = filled.iter_mut().filter(|(slice, kept)| kept.as_slice() != slice.endpoints()).collect();
    changing.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.len()));
    for (_, kept) in changing {
        let room = CAPACITY.saturating_sub(kept.len()).min(homeless.len());
        kept.extend(homeless.drain(..room));
    }
    if !homeless.is_empty() {
        let count = homeless.len();
        let fits = filled.iter_mut().filter(|(_, kept)| kept.len() + count <= CAPACITY);
        if let Some((_, kept)) = fits.max_by_key(|(_, kept)| kept.len()) {
            kept.append(&mut homeless);
        }
    }
    let mut packed: Vec<Packed> = filled
        .into_iter()
        .map(|(slice, kept)| Packed {
            slice: Some(slice),
            ports: ports.to_vec(),
            endpoints: (!kept.is_empty()).then_some(kept),
        })
        .collect();
    while !homeless.is_empty() {
        let chunk = homeless.drain(..CAPACITY.min(homeless.len())).collect();
        let slice = if free.is_empty() { None } else { Some(free.remove(0)) };
        packed.push(Packed { slice, ports: ports.to_vec(), endpoints: Some(chunk) });
    }
    packed
}
