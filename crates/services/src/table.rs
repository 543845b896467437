//! The table of Services and their endpoints: objects in, changed frontends out.

use std::collections::{BTreeMap, HashMap, HashSet, btree_map};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};

use crate::{
    Endpoint, Error, Frontend, FrontendId, PortName, Protocol, Service, ServiceKind, Slice, SliceEndpoint, SliceVersion,
};

/// Namespace and name of a Service.
pub type ServiceKey = (Arc<str>, Arc<str>);

/// What one event did to one frontend. `before` and `after` are never both `None`, nor equal.
#[derive(Clone, Debug)]
pub struct FrontendChange {
    pub id: FrontendId,
    pub before: Option<Arc<Frontend>>,
    pub after: Option<Arc<Frontend>>,
}

/// A slice that has a terminating endpoint, or had one until now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceChange {
    pub uid: Arc<str>,
    /// The version that the table holds; `None` once no endpoint of it terminates any more.
    pub resource_version: Option<Arc<str>>,
}

impl SliceChange {
    fn between(before: Option<Box<SliceVersion>>, after: Option<Box<SliceVersion>>) -> Option<SliceChange> {
        let uid = after.as_deref().or(before.as_deref())?.uid.clone();
        Some(SliceChange { uid, resource_version: after.map(|after| after.resource_version) })
    }
}

/// What one event did. Cheap to send around in an `Arc`.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    pub frontends: Vec<FrontendChange>,
    /// Services whose names, addresses or endpoints may have changed: what cluster DNS cares for.
    pub services: Vec<ServiceKey>,
    /// When what this event tells of happened (RFC 3339), where its object says so.
    pub triggered: Vec<Arc<str>>,
    /// What the removal barrier asks of a proxy; `frontends` names what these versions changed.
    pub slices: Vec<SliceChange>,
    /// The table became complete with this event.
    pub synced: bool,
    /// An object that says what makes no sense: the table holds what it said before, if anything.
    pub refused: Option<Box<Refused>>,
}

/// An object that was not taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// `Service` or `EndpointSlice`
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// The object, its field, and what is expected there.
    pub why: String,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        let is_silent = self.frontends.is_empty() && self.services.is_empty() && self.slices.is_empty();
        is_silent && !self.synced && self.refused.is_none()
    }

    fn append(&mut self, mut later: Changes) {
        self.frontends.append(&mut later.frontends);
        self.services.append(&mut later.services);
        self.triggered.append(&mut later.triggered);
        self.slices.append(&mut later.slices);
        self.synced |= later.synced;
        self.refused = later.refused.or(self.refused.take());
    }
}

/// What a data path found in the kernel at start: frontends keep their ids and endpoints their slots.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seed {
    pub ids: HashMap<(IpAddr, Protocol, u16), FrontendId>,
    /// Endpoints by slot.
    pub slots: HashMap<FrontendId, Vec<SocketAddr>>,
}

/// Who an address belongs to, for reverse lookups.
#[derive(Clone, Debug, PartialEq)]
pub enum Owner<'a> {
    ClusterIp(&'a Service),
    Endpoint(&'a Service, &'a SliceEndpoint),
}

#[derive(Default)]
struct Entry {
    service: Option<Arc<Service>>,
    /// By name. Vectors, as there are few of each in a Service and many Services: a map takes room for eleven.
    slices: Vec<Slice>,
    /// By name.
    frontends: Vec<Arc<Frontend>>,
}

impl Entry {
    fn find_slice(&self, name: &str) -> Result<usize, usize> {
        self.slices.binary_search_by(|slice| (*slice.name).cmp(name))
    }

    fn remove_slice(&mut self, name: &str) -> Option<Slice> {
        self.find_slice(name).ok().map(|at| self.slices.remove(at))
    }
}

fn find<'a>(frontends: &'a [Arc<Frontend>], name: &PortName) -> Option<&'a Arc<Frontend>> {
    frontends.iter().find(|frontend| frontend.name == *name)
}

/// Entries by namespace and name, so that a reader can ask without making a key.
#[derive(Default)]
struct Entries(HashMap<Arc<str>, HashMap<Arc<str>, Entry>>);

impl Entries {
    fn get(&self, namespace: &str, name: &str) -> Option<&Entry> {
        self.0.get(namespace)?.get(name)
    }

    fn get_mut(&mut self, key: &ServiceKey) -> Option<&mut Entry> {
        self.0.get_mut(&key.0)?.get_mut(&key.1)
    }

    fn get_or_add(&mut self, key: &ServiceKey) -> &mut Entry {
        self.0.entry(key.0.clone()).or_default().entry(key.1.clone()).or_default()
    }

    fn remove(&mut self, key: &ServiceKey) -> Option<Entry> {
        let names = self.0.get_mut(&key.0)?;
        let removed = names.remove(&key.1);
        if names.is_empty() {
            self.0.remove(&key.0);
        }
        removed
    }

    fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>, &Entry)> {
        self.0.iter().flat_map(|(namespace, names)| names.iter().map(move |(name, entry)| (namespace, name, entry)))
    }
}

/// Services joined with their endpoints. One task writes it; others read.
#[derive(Default)]
pub struct ServiceTable {
    entries: Entries,
    /// Which Service a slice was last seen to belong to.
    slice_owners: HashMap<ServiceKey, ServiceKey>,
    ids: BTreeMap<FrontendId, ServiceKey>,
    /// How often a Service has an address. One tree of plain keys, as nearly every address has one owner and there are many.
    by_address: BTreeMap<(IpAddr, ServiceKey), u32>,
    namespaces: BTreeMap<Arc<str>, usize>,
    names: HashSet<Arc<str>>,
    /// How many names are kept before the unused ones are thrown away.
    names_limit: usize,
    seed: Seed,
    next_id: u32,
    synced: bool,
    /// Only Services that name this proxy have frontends; `None`: only those that name none.
    proxy_name: Option<Arc<str>>,
    /// Nobody asks for frontends: who only answers names does without their memory.
    names_only: bool,
}

impl ServiceTable {
    pub fn new() -> Self {
        Self::default()
    }

    /// A table whose frontends keep the ids and slots that the kernel already has.
    pub fn with_seed(seed: Seed) -> Self {
        let next_id = seed.ids.values().chain(seed.slots.keys()).map(|id| id.0 + 1).max().unwrap_or(0);
        ServiceTable { seed, next_id, ..Self::default() }
    }

    /// Makes frontends only of Services whose label `service.kubernetes.io/service-proxy-name` has this value, not of those
    /// without it.
    pub fn for_proxy(self, name: &str) -> Self {
        ServiceTable { proxy_name: Some(name.into()), ..self }
    }

    /// Makes no frontends at all: for cluster DNS by itself.
    pub fn without_frontends(self) -> Self {
        ServiceTable { names_only: true, ..self }
    }

    /// Adds or replaces a Service. After an error the last valid version stays.
    pub fn upsert_service(&mut self, json: &[u8]) -> Result<Changes, Error> {
        let service = Service::parse(json)?;
        let key = (self.intern(&service.namespace), self.intern(&service.name));
        let entry = self.entries.get_or_add(&key);
        if entry.service.as_deref() == Some(&service) {
            return Ok(Changes::default());
        }
        let service = Arc::new(service);
        let before = entry.service.replace(service.clone());
        match before {
            None => *self.namespaces.entry(key.0.clone()).or_default() += 1,
            Some(before) => self.forget_cluster_ips(&before, &key),
        }
        for address in cluster_ips(&service) {
            *self.by_address.entry((*address, key.clone())).or_default() += 1;
        }
        Ok(self.rebuild(key))
    }

    pub fn delete_service(&mut self, namespace: &str, name: &str) -> Changes {
        let key: ServiceKey = (namespace.into(), name.into());
        let Some(before) = self.entries.get_mut(&key).and_then(|entry| entry.service.take()) else {
            return Changes::default();
        };
        self.forget_cluster_ips(&before, &key);
        if let Some(count) = self.namespaces.get_mut(namespace) {
            *count -= 1;
            if *count == 0 {
                self.namespaces.remove(namespace);
            }
        }
        self.rebuild(key)
    }

    /// Adds or replaces an EndpointSlice. After an error the last valid version stays.
    pub fn upsert_slice(&mut self, json: &[u8]) -> Result<Changes, Error> {
        let mut slice = Slice::parse(json)?;
        // Not part of what the slice says: the same endpoints are the same slice.
        let triggered = slice.triggered.take();
        for endpoint in &mut slice.endpoints {
            endpoint.node = endpoint.node.take().map(|name| self.intern(&name));
            endpoint.zone = endpoint.zone.take().map(|name| self.intern(&name));
        }
        let namespace = self.intern(&slice.namespace);
        let at = (namespace.clone(), slice.name.clone());
        let owner = slice.service.as_ref().map(|service| (namespace, self.intern(service)));
        let mut changes = Changes::default();
        if self.slice_owners.get(&at) != owner.as_ref() {
            changes = self.delete_slice(&at.0, &at.1);
        }
        let Some(owner) = owner else { return Ok(changes) };
        let entry = self.entries.get_or_add(&owner);
        let found = entry.find_slice(&slice.name);
        if found.is_ok_and(|at| entry.slices[at] == slice) {
            return Ok(changes);
        }
        let before = found.ok().and_then(|at| entry.slices[at].terminating.clone());
        changes.slices.extend(SliceChange::between(before, slice.terminating.clone()));
        let addresses: Vec<IpAddr> = slice.endpoints.iter().map(|endpoint| endpoint.address).collect();
        let before = match found {
            Ok(at) => Some(std::mem::replace(&mut entry.slices[at], slice)),
            Err(at) => {
                entry.slices.reserve_exact(1);
                entry.slices.insert(at, slice);
                None
            }
        };
        if let Some(before) = before {
            self.forget_endpoints(&before, &owner);
        }
        for address in addresses {
            *self.by_address.entry((address, owner.clone())).or_default() += 1;
        }
        self.slice_owners.insert(at, owner.clone());
        changes.triggered.extend(triggered);
        changes.append(self.rebuild(owner));
        Ok(changes)
    }

    pub fn delete_slice(&mut self, namespace: &str, name: &str) -> Changes {
        let at: ServiceKey = (namespace.into(), name.into());
        let Some(owner) = self.slice_owners.remove(&at) else { return Changes::default() };
        let mut changes = Changes::default();
        if let Some(before) = self.entries.get_mut(&owner).and_then(|entry| entry.remove_slice(&at.1)) {
            self.forget_endpoints(&before, &owner);
            changes.slices.extend(SliceChange::between(before.terminating, None));
        }
        changes.append(self.rebuild(owner));
        changes
    }

    /// Deletes the Services that a fresh list no longer has.
    pub fn retain_services(&mut self, mut keep: impl FnMut(&str, &str) -> bool) -> Changes {
        let listed = self.entries.iter().filter(|(_, _, entry)| entry.service.is_some());
        let gone = listed.filter(|(namespace, name, _)| !keep(namespace, name));
        let gone: Vec<ServiceKey> = gone.map(|(namespace, name, _)| (namespace.clone(), name.clone())).collect();
        self.collect(gone, Self::delete_service)
    }

    /// Deletes the EndpointSlices that a fresh list no longer has.
    pub fn retain_slices(&mut self, mut keep: impl FnMut(&str, &str) -> bool) -> Changes {
        let listed = self.slice_owners.keys();
        let gone: Vec<ServiceKey> = listed.filter(|(namespace, name)| !keep(namespace, name)).cloned().collect();
        self.collect(gone, Self::delete_slice)
    }

    fn collect(&mut self, mut gone: Vec<ServiceKey>, delete: fn(&mut Self, &str, &str) -> Changes) -> Changes {
        gone.sort();
        let mut changes = Changes::default();
        for (namespace, name) in gone {
            changes.append(delete(self, &namespace, &name));
        }
        changes
    }

    /// The first list of Services and slices is in: readers may now act, and the seed has served.
    pub fn set_synced(&mut self) -> Changes {
        let synced = !self.synced;
        self.synced = true;
        self.seed = Seed::default();
        Changes { synced, ..Changes::default() }
    }

    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// All frontends, by id.
    pub fn frontends(&self) -> impl Iterator<Item = &Arc<Frontend>> {
        self.ids.keys().filter_map(|id| self.frontend(*id))
    }

    pub fn frontend(&self, id: FrontendId) -> Option<&Arc<Frontend>> {
        let (namespace, name) = self.ids.get(&id)?;
        self.entries.get(namespace, name)?.frontends.iter().find(|frontend| frontend.id == id)
    }

    /// A Service of any type.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.entries.get(namespace, name)?.service.as_deref()
    }

    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.entries.iter().filter_map(|(_, _, entry)| entry.service.as_deref())
    }

    /// The slices of a Service; each endpoint of a slice has all ports of that slice.
    pub fn slices(&self, namespace: &str, name: &str) -> impl Iterator<Item = &Slice> {
        self.entries.get(namespace, name).into_iter().flat_map(|entry| &entry.slices)
    }

    /// The endpoints of one port of a Service of any type over all its slices, by address; for who carries bytes itself.
    pub fn endpoints(&self, namespace: &str, name: &str, port: &str, protocol: Protocol) -> Vec<Endpoint> {
        let Some(entry) = self.entries.get(namespace, name) else { return Vec::new() };
        endpoints_of(&entry.slices, port, protocol).into_values().collect()
    }

    /// The version of each slice that has a terminating endpoint, by uid.
    pub fn terminating_slices(&self) -> BTreeMap<Arc<str>, Arc<str>> {
        let slices = self.entries.iter().flat_map(|(_, _, entry)| &entry.slices);
        let terminating = slices.filter_map(|slice| slice.terminating.as_deref());
        terminating.map(|version| (version.uid.clone(), version.resource_version.clone())).collect()
    }

    /// The ready endpoints of a Service that have this hostname, or this address written with dashes.
    pub fn endpoints_named(&self, namespace: &str, name: &str, host: &str) -> Vec<(&Slice, &SliceEndpoint)> {
        let slices = self.slices(namespace, name);
        let all = slices.flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice, endpoint)));
        all.filter(|(_, endpoint)| endpoint.ready && endpoint.host().eq_ignore_ascii_case(host)).collect()
    }

    /// What has this address: a Service, or an endpoint once per Service that selects it.
    pub fn by_address(&self, address: IpAddr) -> Vec<Owner<'_>> {
        let mut owners = Vec::new();
        let first = (address, (NO_NAME.clone(), NO_NAME.clone()));
        let known = self.by_address.range(first..).map(|(known, _)| known);
        for (_, key) in known.take_while(|(known, _)| *known == address) {
            let Some(entry) = self.entries.get(&key.0, &key.1) else { continue };
            let Some(service) = entry.service.as_deref() else { continue };
            let mut found = Vec::new();
            if cluster_ips(service).contains(&address) {
                found.push(Owner::ClusterIp(service));
            }
            let endpoints = entry.slices.iter().flat_map(|slice| &slice.endpoints);
            let matching = endpoints.filter(|endpoint| endpoint.address == address && endpoint.ready);
            found.extend(matching.map(|endpoint| Owner::Endpoint(service, endpoint)));
            owners.extend(found.into_iter().filter(|owner| !owners.contains(owner)).collect::<Vec<_>>());
        }
        owners
    }

    /// Namespaces that have a Service, in order.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.namespaces.keys().map(|name| &**name)
    }

    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// Node names, zones and Service names repeat in every endpoint: keep one copy, while somebody uses it.
    fn intern(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        if self.names.len() >= self.names_limit {
            self.names.retain(|name| Arc::strong_count(name) > 1);
            self.names_limit = (self.names.len() * 2).max(1024);
        }
        let name: Arc<str> = name.into();
        self.names.insert(name.clone());
        name
    }

    fn forget(&mut self, address: IpAddr, key: &ServiceKey) {
        if let btree_map::Entry::Occupied(mut count) = self.by_address.entry((address, key.clone())) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    fn forget_cluster_ips(&mut self, service: &Service, key: &ServiceKey) {
        for address in cluster_ips(service) {
            self.forget(*address, key);
        }
    }

    fn forget_endpoints(&mut self, slice: &Slice, key: &ServiceKey) {
        for endpoint in &slice.endpoints {
            self.forget(endpoint.address, key);
        }
    }

    /// Makes the frontends of one Service anew and says which of them are different now.
    fn rebuild(&mut self, key: ServiceKey) -> Changes {
        let Some(mut entry) = self.entries.remove(&key) else { return Changes::default() };
        let before = std::mem::take(&mut entry.frontends);
        let mut frontends = Vec::new();
        if let Some(service) = &entry.service
            && let ServiceKind::ClusterIp(cluster_ips) = &service.kind
            && service.proxy_name == self.proxy_name
            && !self.names_only
        {
            for port in &service.ports {
                let name = PortName {
                    namespace: key.0.clone(),
                    service: key.1.clone(),
                    port: port.name.clone(),
                    protocol: port.protocol,
                };
                let known = find(&before, &name);
                let id = match known {
                    Some(known) => known.id,
                    None => self.assign_id(cluster_ips, port.protocol, port.port),
                };
                let seeded = if self.synced { None } else { self.seed.slots.get(&id).map(Vec::as_slice) };
                let slots = match (seeded, known) {
                    (Some(seeded), _) => seeded.to_vec(),
                    (None, Some(known)) => ready_addresses(known),
                    (None, None) => Vec::new(),
                };
                let after = Frontend {
                    id,
                    endpoints: in_slot_order(&slots, endpoints_of(&entry.slices, &name.port, name.protocol)),
                    name,
                    app_protocol: port.app_protocol.clone(),
                    port: port.port,
                    cluster_ips: cluster_ips.clone(),
                    external_ips: service.external_ips.clone(),
                    load_balancer_ips: service.load_balancer_ips.clone(),
                    node_port: port.node_port,
                    internal_policy: service.internal_policy,
                    external_policy: service.external_policy,
                    affinity: service.affinity,
                    source_ranges: service.source_ranges.clone(),
                    health_check_node_port: service.health_check_node_port,
                    end_policy: service.end_policy,
                    selection: service.selection,
                    direct_return: service.direct_return,
                };
                self.ids.insert(id, key.clone());
                frontends.push(after);
            }
        }
        let mut changes = Changes { services: vec![key.clone()], ..Changes::default() };
        entry.frontends.reserve_exact(frontends.len());
        for after in frontends {
            // Two ports of one name and protocol, which no API server lets through: the first counts.
            if find(&entry.frontends, &after.name).is_some() {
                continue;
            }
            let unchanged = find(&before, &after.name).filter(|before| ***before == after);
            let after = unchanged.cloned().unwrap_or_else(|| Arc::new(after));
            if unchanged.is_none() {
                let before = find(&before, &after.name).cloned();
                changes.frontends.push(FrontendChange { id: after.id, before, after: Some(after.clone()) });
            }
            entry.frontends.push(after);
        }
        entry.frontends.sort_by(|a, b| a.name.cmp(&b.name));
        for frontend in before {
            if find(&entry.frontends, &frontend.name).is_none() {
                self.ids.remove(&frontend.id);
                changes.frontends.push(FrontendChange { id: frontend.id, before: Some(frontend), after: None });
            }
        }
        if entry.service.is_some() || !entry.slices.is_empty() {
            *self.entries.get_or_add(&key) = entry;
        }
        changes
    }

    fn assign_id(&mut self, cluster_ips: &[IpAddr], protocol: Protocol, port: u16) -> FrontendId {
        let seeded = cluster_ips.iter().find_map(|address| self.seed.ids.get(&(*address, protocol, port)));
        if let Some(id) = seeded.filter(|id| !self.ids.contains_key(id)) {
            return *id;
        }
        let id = FrontendId(self.next_id);
        // Two ports of a process's lifetime share an id only after a thousand million others.
        self.next_id = (self.next_id + 1) & (u32::MAX >> 2);
        id
    }
}

impl SliceEndpoint {
    /// Its name below the Service's: the hostname, otherwise the address with dashes.
    pub fn host(&self) -> String {
        match &self.hostname {
            Some(name) => name.to_string(),
            None => self.address.to_string().replace(['.', ':'], "-"),
        }
    }
}

/// The name before all others.
static NO_NAME: LazyLock<Arc<str>> = LazyLock::new(|| Arc::from(""));

fn cluster_ips(service: &Service) -> &[IpAddr] {
    match &service.kind {
        ServiceKind::ClusterIp(addresses) => addresses,
        ServiceKind::Headless | ServiceKind::ExternalName(_) | ServiceKind::Pending => &[],
    }
}

fn ready_addresses(frontend: &Frontend) -> Vec<SocketAddr> {
    frontend.endpoints.iter().filter(|endpoint| endpoint.ready).map(|endpoint| endpoint.address).collect()
}

/// The endpoints of a port over all slices. An endpoint may be in two slices while a controller moves it: the better
/// one counts.
fn endpoints_of(slices: &[Slice], port: &str, protocol: Protocol) -> BTreeMap<SocketAddr, Endpoint> {
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices {
        let matching = slice.ports.iter().filter(|held| *held.name == *port && held.protocol == protocol);
        for port in matching.filter_map(|port| port.port) {
            for endpoint in &slice.endpoints {
                let address = SocketAddr::new(endpoint.address, port);
                let candidate = Endpoint {
                    address,
                    node: endpoint.node.clone(),
                    zone: endpoint.zone.clone(),
                    ready: endpoint.ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    hints: endpoint.hints.clone(),
                };
                let rank = |endpoint: &Endpoint| (endpoint.ready, endpoint.serving, !endpoint.terminating);
                if found.get(&address).is_none_or(|held| rank(held) < rank(&candidate)) {
                    found.insert(address, candidate);
                }
            }
        }
    }
    found
}

/// Ready endpoints keep the slot they had within their family; the last moves into a hole; new ones come last.
fn in_slot_order(slots: &[SocketAddr], mut endpoints: BTreeMap<SocketAddr, Endpoint>) -> Vec<Arc<Endpoint>> {
    let mut ordered = Vec::with_capacity(endpoints.len());
    for v6 in [false, true] {
        let is_ready = |address: &SocketAddr| endpoints.get(address).is_some_and(|endpoint| endpoint.ready);
        let mut kept: Vec<SocketAddr> = slots.iter().filter(|address| address.is_ipv6() == v6).copied().collect();
        let mut slot = 0;
        while slot < kept.len() {
            if is_ready(&kept[slot]) {
                slot += 1;
            } else {
                kept.swap_remove(slot);
            }
        }
        let held: HashSet<SocketAddr> = kept.iter().copied().collect();
        let ready = endpoints.values().filter(|endpoint| endpoint.ready).map(|endpoint| endpoint.address);
        kept.extend(ready.filter(|address| address.is_ipv6() == v6 && !held.contains(address)));
        ordered.extend(kept.iter().filter_map(|address| endpoints.remove(address)).map(Arc::new));
    }
    ordered.extend(endpoints.into_values().map(Arc::new));
    ordered
}
