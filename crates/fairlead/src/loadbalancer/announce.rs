//! Tells this node's announcer which addresses there are and who may announce them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use api::ObjectExt;
use api::kinds::{IP_ADDRESS_POOLS, L2_ADVERTISEMENTS, NAMESPACES, NODES, SERVICES};
use api::object::Key;
use loadbalancer::layer2::{Announcer, Config, Notice, Orders};
use loadbalancer::{Advertisement, AdvertisementObject, Metrics, Plan, Pool, PoolObject};
use reconcile::{Api, Change, EventKind, Named, ObjectRef, Recorder, Scope, ServiceFeed};
use services::{Changes, TrafficPolicy};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::vrrp::Group;
use super::{DRAINING, EXCLUDED, GATHER, NAMESPACE, TIE, key, serving_nodes};
use crate::ingress::leader::{self, Terms};
use crate::node_object;

/// Changes gather for so many times as long as the orders before took to make: with thousands of addresses, one in four or five
/// moments goes into orders.
const SHARE: u32 = 4;
/// When the API server is asked again for what the announcer has to know before it starts.
const AGAIN: Duration = Duration::from_secs(1);

/// The node that announces.
#[derive(Clone)]
pub struct Node {
    pub name: String,
    /// The primary one first.
    pub addresses: Vec<IpAddr>,
}

/// Announces until the token is cancelled. A host that cannot says so, and goes on without.
pub async fn run(client: kube::Client, feed: ServiceFeed, node: Node, metrics: Arc<Metrics>, token: CancellationToken) {
    // Before the table is read, so that no change is missed.
    let changes = feed.subscribe();
    let Some(cluster) = cluster_id(&client, &token).await else { return };
    let mut incarnation = [0; 8];
    if let Err(error) = getrandom::fill(&mut incarnation) {
        warn!(%error, "no random bytes: this node announces nothing");
        return;
    }
    let incarnation = u64::from_be_bytes(incarnation).max(1);
    let config = Config { node: node.name.clone(), addresses: node.addresses, cluster, incarnation };
    let (said, notices) = mpsc::unbounded_channel();
    // At the end nobody listens any more.
    let tell = move |notice| said.send(notice).unwrap_or_default();
    let announcer = match Announcer::start(config, metrics.clone(), tell) {
        Ok(announcer) => announcer,
        Err(error) => {
            warn!(%error, "this node announces no LoadBalancer addresses");
            return;
        }
    };
    let (tie, tie_seen) = watch::channel(false);
    let lease = Key::new(NAMESPACE, TIE);
    let leading = tokio::spawn(leader::run(client.clone(), lease, node.name.clone(), Terms::QUICK, tie, token.clone()));
    let follower = Follower {
        feed,
        nodes: BTreeMap::new(),
        pools: BTreeMap::new(),
        advertisements: BTreeMap::new(),
        lists: [false; 3],
        recorder: Recorder::new(&client, "fairlead-layer2", &node.name),
        name: node.name,
        held: BTreeSet::new(),
        split: BTreeSet::new(),
        metrics,
    };
    follower.run(&client, changes, &announcer, notices, tie_seen, token).await;
    // It withdraws when it is dropped, which waits for its thread.
    if tokio::task::spawn_blocking(move || drop(announcer)).await.is_err() {
        warn!("the announcer did not end well");
    }
    leading.await.ok();
}

/// The same number in all of a cluster: of its first namespace's uid.
async fn cluster_id(client: &kube::Client, token: &CancellationToken) -> Option<u64> {
    let namespaces = Api::new(client, &NAMESPACES);
    loop {
        match namespaces.get("", NAMESPACE).await {
            Ok(found) => {
                let uid = found.text("/metadata/uid").replace('-', "");
                return Some(uid.get(..16).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or_default());
            }
            Err(error) => warn!(%error, "announcing waits for the API server"),
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = token.cancelled() => return None,
        }
    }
}

/// A node as a candidate.
struct Candidate {
    /// The primary one first; one without any takes no part.
    addresses: Vec<IpAddr>,
    /// It turns away, and serves what still comes.
    is_draining: bool,
    labels: BTreeMap<String, String>,
}

/// An advertisement, and the nodes that announce by it.
type Announced<'a> = (&'a Advertisement, BTreeSet<String>);

struct Follower {
    feed: ServiceFeed,
    nodes: BTreeMap<String, Candidate>,
    pools: BTreeMap<Key, Pool>,
    advertisements: BTreeMap<Key, Advertisement>,
    /// Which of the three lists have come.
    lists: [bool; 3],
    recorder: Recorder,
    name: String,
    /// What the announcer says here.
    held: BTreeSet<IpAddr>,
    /// Services that a virtual router cannot announce, as it was told.
    split: BTreeSet<Key>,
    metrics: Arc<Metrics>,
}

impl Follower {
    async fn run(
        mut self,
        client: &kube::Client,
        mut changes: broadcast::Receiver<Arc<Changes>>,
        announcer: &Announcer,
        mut notices: mpsc::UnboundedReceiver<Notice>,
        mut tie: watch::Receiver<bool>,
        token: CancellationToken,
    ) {
        let mut nodes: mpsc::Receiver<Change<node_object::Node>> = reconcile::watch(client, &NODES, Scope::all());
        let mut pools: mpsc::Receiver<Change<PoolObject>> = reconcile::watch(client, &IP_ADDRESS_POOLS, Scope::all());
        let mut advertisements: mpsc::Receiver<Change<AdvertisementObject>> =
            reconcile::watch(client, &L2_ADVERTISEMENTS, Scope::all());
        let mut due: Option<Instant> = Some(Instant::now());
        let mut gather = GATHER;
        let mut last = Orders::default();
        loop {
            let order = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                () = order => {
                    due = None;
                    let begun = Instant::now();
                    self.count();
                    let orders = if self.lists == [true; 3] { self.orders() } else { last.clone() };
                    if orders != last {
                        announcer.set_orders(orders.clone());
                        last = orders;
                    }
                    gather = GATHER.max(begun.elapsed() * SHARE);
                    continue;
                }
                Some(notice) = notices.recv() => self.tell(&notice),
                changed = tie.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    announcer.set_tie(*tie.borrow_and_update());
                    continue;
                }
                change = nodes.recv() => match change {
                    Some(change) => self.take_node(change),
                    None => return,
                },
                Some(change) = pools.recv() => self.take_pool(change),
                Some(change) = advertisements.recv() => self.take_advertisement(change),
                change = changes.recv() => if matches!(change, Err(broadcast::error::RecvError::Closed)) { return },
            }
            due.get_or_insert_with(|| Instant::now() + gather);
        }
    }

    fn take_node(&mut self, change: Change<node_object::Node>) {
        let candidate = |node: &node_object::Node| Candidate {
            addresses: node.addresses(),
            is_draining: node.taints().any(|taint| taint == DRAINING),
            labels: node.metadata().labels.clone(),
        };
        match change {
            Change::Reset(all) => {
                self.lists[0] = true;
                self.nodes = all.iter().map(|node| (node.name().to_owned(), candidate(node))).collect();
            }
            Change::Apply(node) => drop(self.nodes.insert(node.name().to_owned(), candidate(&node))),
            Change::Delete(node) => drop(self.nodes.remove(node.name())),
        }
    }

    fn take_pool(&mut self, change: Change<PoolObject>) {
        // What is wrong with a pool is told by who gives its addresses.
        let parse = |object: PoolObject| Some((key(&object.metadata), Pool::new(&object).ok()?));
        match change {
            Change::Reset(all) => {
                self.lists[1] = true;
                self.pools = all.into_iter().filter_map(parse).collect();
            }
            Change::Apply(object) => {
                self.pools.remove(&key(&object.metadata));
                self.pools.extend(parse(object));
            }
            Change::Delete(object) => drop(self.pools.remove(&key(&object.metadata))),
        }
    }

    fn take_advertisement(&mut self, change: Change<AdvertisementObject>) {
        let objects = match change {
            Change::Reset(all) => {
                self.lists[2] = true;
                self.advertisements.clear();
                all
            }
            Change::Apply(object) => vec![object],
            Change::Delete(object) => return drop(self.advertisements.remove(&key(&object.metadata))),
        };
        for object in objects {
            let key = key(&object.metadata);
            self.advertisements.remove(&key);
            match Advertisement::new(&object) {
                Ok(advertisement) => drop(self.advertisements.insert(key, advertisement)),
                Err(error) => {
                    let (kind, uid) = (&L2_ADVERTISEMENTS, &object.metadata.uid);
                    let about = ObjectRef::new(&kind.api_version(), kind.kind, &key.namespace, &key.name, uid);
                    self.recorder.event(&about, EventKind::Warning, "AdvertisementNotUsed", error.to_string());
                }
            }
        }
    }

    fn orders(&mut self) -> Orders {
        let nodes = self.nodes.iter().filter(|(_, node)| !node.labels.contains_key(EXCLUDED));
        let members: BTreeMap<String, Vec<IpAddr>> = nodes
            .filter(|(_, node)| !node.addresses.is_empty())
            .map(|(name, node)| (name.clone(), node.addresses.clone()))
            .collect();
        let mut plan = Plan { members: members.keys().cloned().collect(), addresses: BTreeMap::new() };
        let mut interfaces: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
        // For each pool, its advertisements and who announces by each: nobody where none names it.
        let by_pool: Vec<(&Pool, Vec<Announced<'_>>)> = self
            .pools
            .values()
            .map(|pool| {
                let named = self.advertisements.values().filter(|one| one.is_of(pool));
                let allowed = |one: &Advertisement| {
                    let may = |name: &&String| self.nodes.get(*name).is_some_and(|node| one.allows_node(&node.labels));
                    members.keys().filter(may).cloned().collect()
                };
                (pool, named.map(|one| (one, allowed(one))).collect())
            })
            .collect();
        // By the id of the virtual router and the family of its addresses.
        let mut groups: BTreeMap<(u8, bool), Group> = BTreeMap::new();
        let mut split: BTreeSet<Key> = BTreeSet::new();
        let is_draining = |name: &String| self.nodes.get(name).is_some_and(|node| node.is_draining);
        let unlabelled = BTreeMap::new();
        let table = self.feed.table.read().unwrap_or_else(PoisonError::into_inner);
        for service in table.services() {
            let labels = service.labels.as_deref().unwrap_or(&unlabelled);
            for address in &service.load_balancer_ips {
                let Some((_, named)) = by_pool.iter().find(|(pool, _)| pool.contains(*address)) else { continue };
                let of_service = || named.iter().filter(|(one, _)| one.is_for(labels));
                let mut allowed: BTreeSet<String> = of_service().flat_map(|(_, names)| names).cloned().collect();
                if service.external_policy == TrafficPolicy::Local {
                    let serving = serving_nodes(&table, &service.namespace, &service.name);
                    allowed.retain(|name| serving.contains(name.as_str()));
                }
                if allowed.iter().any(|name| !is_draining(name)) {
                    allowed.retain(|name| !is_draining(name));
                }
                if let Some(Some(others)) = plan.addresses.get(address) {
                    allowed.retain(|name| others.contains(name));
                }
                if let Some((router, by)) = of_service().find_map(|(one, names)| Some((one.vrrp?, names))) {
                    if service.external_policy == TrafficPolicy::Local {
                        split.insert(Key::new(&*service.namespace, &*service.name));
                    } else if by.contains(&self.name) && !is_draining(&self.name) {
                        let key = (router.id, address.is_ipv4());
                        let group = groups.entry(key).or_insert_with(|| Group {
                            router,
                            nodes: by.iter().filter(|name| !is_draining(name)).cloned().collect(),
                            addresses: BTreeSet::new(),
                        });
                        group.addresses.insert(*address);
                    }
                    continue;
                }
                // One that names no interface means all of the node's own.
                if of_service().all(|(one, _)| !one.interfaces.is_empty()) {
                    let names = of_service().flat_map(|(one, _)| &one.interfaces).cloned();
                    interfaces.entry(*address).or_default().extend(names);
                }
                plan.addresses.insert(*address, (allowed.len() < members.len()).then_some(allowed));
            }
        }
        drop(table);
        for key in split.difference(&self.split) {
            let about = ObjectRef::new("v1", SERVICES.kind, &key.namespace, &key.name, "");
            let message = "a virtual router moves all of its addresses at a time, and with externalTrafficPolicy Local each \
                           goes its own way: use Cluster, or an L2Advertisement without fairlead.io/vrrp-id";
            self.recorder.event(&about, EventKind::Warning, "AddressNotAnnounced", message.to_owned());
        }
        self.split = split;
        let routers = groups.into_values().map(|group| group.router_of(&self.name)).collect();
        Orders { plan, members, interfaces, routers }
    }

    /// What a scrape is told of what is announced here.
    fn count(&self) {
        let table = self.feed.table.read().unwrap_or_else(PoisonError::into_inner);
        let announced = table.services().flat_map(|service| {
            let here = service.load_balancer_ips.iter().filter(|ip| self.held.contains(ip));
            here.map(move |ip| (format!("{}/{}", service.namespace, service.name), *ip, "layer2"))
        });
        let mut announced: BTreeSet<(String, IpAddr, &'static str)> = announced.collect();
        let mut counts = self.metrics.write();
        counts.announced.retain(|(.., protocol)| *protocol != "layer2");
        counts.announced.append(&mut announced);
    }

    /// An event for each Service whose address came here, in MetalLB's words, or is another host's, too.
    fn tell(&mut self, notice: &Notice) {
        match notice {
            Notice::Took(addresses) => self.held.extend(addresses),
            Notice::Lost(addresses) => self.held.retain(|address| !addresses.contains(address)),
            Notice::Conflict(..) | Notice::Refused(..) => {}
        }
        let (addresses, kind, reason, message) = match notice {
            Notice::Took(addresses) => {
                let message = format!("announcing from node \"{}\" with protocol \"layer2\"", self.name);
                (addresses.clone(), EventKind::Normal, "nodeAssigned", message)
            }
            Notice::Lost(_) => return,
            Notice::Refused(name, error) => {
                warn!(name, error, "a virtual router has no part here");
                return;
            }
            Notice::Conflict(address, mac) => {
                let message = format!(
                    "{mac} says that it has {address}, which node \"{}\" announces; find that host and take the address from it",
                    self.name
                );
                (BTreeSet::from([*address]), EventKind::Warning, "AddressConflict", message)
            }
        };
        let table = self.feed.table.read().unwrap_or_else(PoisonError::into_inner);
        for service in table.services().filter(|s| s.load_balancer_ips.iter().any(|ip| addresses.contains(ip))) {
            let about = ObjectRef::new("v1", SERVICES.kind, &service.namespace, &service.name, "");
            self.recorder.event(&about, kind, reason, message.clone());
        }
    }
}
