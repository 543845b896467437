//! Tells this node's BGP speaker which peers there are and what each is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};

use api::ObjectExt;
use api::kinds::{
    BFD_PROFILES, BGP_ADVERTISEMENTS, BGP_PEERS, COMMUNITIES, IP_ADDRESS_POOLS, NODES, SECRETS, SERVICES,
};
use api::object::{Key, Metadata};
use base64::Engine as _;
use loadbalancer::bgp::peer::{Peer, PeerObject, ProfileObject};
use loadbalancer::bgp::plan::{BgpAdvertisement, BgpAdvertisementObject, CommunityObject, Offer, routes};
use loadbalancer::bgp::speaker::{Neighbour, Notice, Orders, Speaker};
use loadbalancer::{Metrics, Pool, PoolObject};
use reconcile::{Api, Change, EventKind, Named, ObjectRef, Recorder, Scope, ServiceFeed};
use services::{Changes, TrafficPolicy};
use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{DRAINING, EXCLUDED, GATHER, Node, key, serving_nodes, update};
use crate::node_object;

const PROTOCOL: &str = "bgp";

/// Announces by BGP until the token is cancelled: nothing as long as no BGPPeer is for this node.
pub async fn run(client: kube::Client, feed: ServiceFeed, node: Node, metrics: Arc<Metrics>, token: CancellationToken) {
    // Before the table is read, so that no change is missed.
    let changes = feed.subscribe();
    let (said, notices) = mpsc::unbounded_channel();
    let follower = Follower {
        feed,
        recorder: Recorder::new(&client, "fairlead-bgp", &node.name),
        secrets: Api::new(&client, &SECRETS),
        node,
        metrics,
        own: None,
        peers: BTreeMap::new(),
        advertisements: BTreeMap::new(),
        profiles: BTreeMap::new(),
        communities: BTreeMap::new(),
        pools: BTreeMap::new(),
        passwords: BTreeMap::new(),
        told: BTreeSet::new(),
        announced: BTreeSet::new(),
        speaker: None,
        said,
    };
    let speaker = follower.run(&client, changes, notices, token).await;
    // It withdraws when it is dropped, which waits for its thread.
    if tokio::task::spawn_blocking(move || drop(speaker)).await.is_err() {
        warn!("the BGP speaker did not end well");
    }
}

struct Follower {
    feed: ServiceFeed,
    recorder: Recorder,
    secrets: Api,
    node: Node,
    metrics: Arc<Metrics>,
    /// This node's object.
    own: Option<node_object::Node>,
    peers: BTreeMap<Key, PeerObject>,
    advertisements: BTreeMap<Key, BgpAdvertisementObject>,
    profiles: BTreeMap<Key, ProfileObject>,
    communities: BTreeMap<Key, CommunityObject>,
    /// `None`: what is wrong with it is told by who gives its addresses.
    pools: BTreeMap<Key, Option<Pool>>,
    /// Of Secrets that peers name, or why there is none.
    passwords: BTreeMap<Key, Result<String, String>>,
    /// What is wrong with objects, as it was told: kind, object, text.
    told: BTreeSet<(&'static str, Key, String)>,
    /// Services and addresses that peers are told of.
    announced: BTreeSet<(Key, IpAddr)>,
    speaker: Option<Speaker>,
    said: mpsc::UnboundedSender<Notice>,
}

impl Follower {
    async fn run(
        mut self,
        client: &kube::Client,
        mut changes: broadcast::Receiver<Arc<Changes>>,
        mut notices: mpsc::UnboundedReceiver<Notice>,
        token: CancellationToken,
    ) -> Option<Speaker> {
        let own = Scope::fields(format!("metadata.name={}", self.node.name));
        let mut nodes: mpsc::Receiver<Change<node_object::Node>> = reconcile::watch(client, &NODES, own);
        let mut peers: mpsc::Receiver<Change<PeerObject>> = reconcile::watch(client, &BGP_PEERS, Scope::all());
        let mut advertisements: mpsc::Receiver<Change<BgpAdvertisementObject>> =
            reconcile::watch(client, &BGP_ADVERTISEMENTS, Scope::all());
        let mut profiles: mpsc::Receiver<Change<ProfileObject>> = reconcile::watch(client, &BFD_PROFILES, Scope::all());
        let mut communities: mpsc::Receiver<Change<CommunityObject>> =
            reconcile::watch(client, &COMMUNITIES, Scope::all());
        let mut pools: mpsc::Receiver<Change<PoolObject>> = reconcile::watch(client, &IP_ADDRESS_POOLS, Scope::all());
        // Until all lists have come, nothing is told: routes would be withdrawn that others still need.
        let mut lists = [false; 6];
        let mut due: Option<Instant> = None;
        let mut last = Orders::new();
        loop {
            let order = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = token.cancelled() => return self.speaker,
                () = order => {
                    due = None;
                    let is_synced = self.feed.table.read().unwrap_or_else(PoisonError::into_inner).is_synced();
                    if lists == [true; 6] && is_synced {
                        self.fetch_passwords().await;
                        let orders = self.orders();
                        if orders != last {
                            self.give(orders.clone());
                            last = orders;
                        }
                    }
                    continue;
                }
                Some(notice) = notices.recv() => self.tell(notice),
                Some(change) = nodes.recv() => {
                    lists[0] |= matches!(change, Change::Reset(_));
                    self.own = match change {
                        Change::Reset(all) => all.into_iter().next(),
                        Change::Apply(node) => Some(node),
                        Change::Delete(_) => None,
                    };
                }
                Some(change) = peers.recv() => {
                    lists[1] |= matches!(change, Change::Reset(_));
                    update(&mut self.peers, change, |one| key(&one.metadata), |one| one);
                }
                Some(change) = advertisements.recv() => {
                    lists[2] |= matches!(change, Change::Reset(_));
                    update(&mut self.advertisements, change, |one| key(&one.metadata), |one| one);
                }
                Some(change) = profiles.recv() => {
                    lists[3] |= matches!(change, Change::Reset(_));
                    update(&mut self.profiles, change, |one| key(&one.metadata), |one| one);
                }
                Some(change) = communities.recv() => {
                    lists[4] |= matches!(change, Change::Reset(_));
                    update(&mut self.communities, change, |one| key(&one.metadata), |one| one);
                }
                Some(change) = pools.recv() => {
                    lists[5] |= matches!(change, Change::Reset(_));
                    update(&mut self.pools, change, |one| key(&one.metadata), |one| Pool::new(&one).ok());
                }
                change = changes.recv() => if matches!(change, Err(broadcast::error::RecvError::Closed)) {
                    return self.speaker;
                },
            }
            due.get_or_insert_with(|| Instant::now() + GATHER);
        }
    }

    fn give(&mut self, orders: Orders) {
        if self.speaker.is_none() {
            let said = self.said.clone();
            // At the end nobody listens any more.
            let tell = move |notice| said.send(notice).unwrap_or_default();
            match Speaker::start(self.metrics.clone(), tell) {
                Ok(speaker) => self.speaker = Some(speaker),
                Err(error) => return warn!(%error, "this node announces nothing by BGP"),
            }
        }
        if let Some(speaker) = &self.speaker {
            speaker.set_orders(orders);
        }
    }

    /// Asks for the Secrets that peers name, each by its name, if it is not known.
    async fn fetch_passwords(&mut self) {
        let wanted: BTreeSet<Key> = self.peers.values().filter_map(|object| Peer::new(object).ok()?.secret).collect();
        self.passwords.retain(|key, _| wanted.contains(key));
        for key in wanted {
            if self.passwords.contains_key(&key) {
                continue;
            }
            let found = self.secrets.get(&key.namespace, &key.name).await;
            let password = found.map_err(|error| error.to_string()).and_then(|secret| {
                let decoded = base64::engine::general_purpose::STANDARD.decode(secret.text("/data/password"));
                let text = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
                text.filter(|text| !text.is_empty()).ok_or_else(|| format!("Secret {key} has no key `password`"))
            });
            self.passwords.insert(key, password);
        }
    }

    /// Which peers there are, and what each is told.
    fn orders(&mut self) -> Orders {
        let mut wrong: BTreeSet<(&'static str, Key, String)> = BTreeSet::new();
        let Some(own) = &self.own else { return Orders::new() };
        let labels = own.metadata().labels.clone();
        let is_silent = labels.contains_key(EXCLUDED) || own.taints().any(|taint| taint == DRAINING);
        let aliases: BTreeMap<String, String> = self
            .communities
            .values()
            .flat_map(|object| &object.spec.communities)
            .map(|alias| (alias.name.clone(), alias.value.clone()))
            .collect();
        let mut advertisements: Vec<(&Key, BgpAdvertisement)> = Vec::new();
        for (key, object) in &self.advertisements {
            match BgpAdvertisement::new(object, &aliases) {
                Ok(one) => advertisements.push((key, one)),
                Err(error) => drop(wrong.insert((BGP_ADVERTISEMENTS.kind, key.clone(), error.to_string()))),
            }
        }
        let table = self.feed.table.read().unwrap_or_else(PoisonError::into_inner);
        let unlabelled = BTreeMap::new();
        let mut offers: Vec<Offer<'_>> = Vec::new();
        let mut announced = BTreeSet::new();
        for service in table.services().filter(|service| !is_silent && !service.load_balancer_ips.is_empty()) {
            if service.external_policy == TrafficPolicy::Local
                && !serving_nodes(&table, &service.namespace, &service.name).contains(self.node.name.as_str())
            {
                continue;
            }
            for address in &service.load_balancer_ips {
                let pool = self.pools.values().flatten().find(|pool| pool.contains(*address));
                let service_labels = service.labels.as_deref().unwrap_or(&unlabelled);
                if let Some(pool) = pool {
                    offers.push(Offer { address: *address, pool, service_labels });
                    announced.insert((Key::new(&*service.namespace, &*service.name), *address));
                }
            }
        }
        let mut orders = Orders::new();
        let mut told: BTreeSet<ipnet::IpNet> = BTreeSet::new();
        for (key, object) in &self.peers {
            let made = Peer::new(object).map_err(|error| error.to_string());
            let made = made.map(|peer| peer.allows_node(&labels).then_some(peer)).transpose();
            let Some(made) = made else { continue };
            let neighbour = made.and_then(|peer| Ok((self.neighbour(&peer)?, peer)));
            match neighbour {
                Ok((neighbour, peer)) => {
                    for (place, one) in advertisements.iter().filter(|(_, one)| one.is_to(&key.name)) {
                        if one.path.local_pref.is_some() && !peer.is_internal() {
                            let text =
                                format!("spec.localPref is for peers of the own AS; peer {} gets none", key.name);
                            wrong.insert((BGP_ADVERTISEMENTS.kind, (*place).clone(), text));
                        }
                    }
                    let routes = routes(&key.name, &labels, advertisements.iter().map(|(_, one)| one), &offers);
                    told.extend(routes.keys());
                    orders.insert(key.to_string(), (neighbour, routes));
                }
                Err(text) => drop(wrong.insert((BGP_PEERS.kind, key.clone(), text))),
            }
        }
        announced.retain(|(_, address)| told.iter().any(|net| net.contains(address)));
        drop(table);
        for (kind, key, text) in wrong.difference(&self.told) {
            let resource = if *kind == BGP_PEERS.kind { &BGP_PEERS } else { &BGP_ADVERTISEMENTS };
            let reason = if *kind == BGP_PEERS.kind { "PeerNotUsed" } else { "AdvertisementNotUsed" };
            let about = ObjectRef::new(&resource.api_version(), kind, &key.namespace, &key.name, self.uid(kind, key));
            self.recorder.event(&about, EventKind::Warning, reason, text.clone());
        }
        self.told = wrong;
        self.count(announced);
        orders
    }

    fn uid(&self, kind: &str, key: &Key) -> &str {
        let metadata: Option<&Metadata> = match kind == BGP_PEERS.kind {
            true => self.peers.get(key).map(|one| &one.metadata),
            false => self.advertisements.get(key).map(|one| &one.metadata),
        };
        metadata.map_or("", |metadata| metadata.uid.as_str())
    }

    /// How to speak with a peer; or why it cannot be.
    fn neighbour(&self, peer: &Peer) -> Result<Neighbour, String> {
        let password = match &peer.secret {
            Some(key) => match self.passwords.get(key) {
                Some(Ok(password)) => Some(password.clone()),
                Some(Err(error)) => return Err(format!("spec.passwordSecret: {error}")),
                None => return Err(format!("spec.passwordSecret: Secret {key} is not known yet")),
            },
            None => peer.password.clone(),
        };
        let bfd = match &peer.bfd {
            Some(name) => {
                let profile = self.profiles.get(&Key::new(&peer.key.namespace, name));
                let profile = profile.ok_or_else(|| format!("spec.bfdProfile: there is no BFDProfile {name:?}"))?;
                Some(profile.timing(peer.is_multihop).map_err(|error| format!("BFDProfile {name}: {error}"))?)
            }
            None => None,
        };
        Ok(Neighbour {
            address: peer.address,
            port: peer.port,
            source: peer.source,
            hops: (!peer.is_internal() && !peer.is_multihop).then_some(1),
            password,
            settings: peer.settings(&self.node.name, &self.node.addresses),
            bfd,
        })
    }

    /// An event for each Service that is new here, in MetalLB's words, and what a scrape is told.
    fn count(&mut self, announced: BTreeSet<(Key, IpAddr)>) {
        let had: BTreeSet<&Key> = self.announced.iter().map(|(key, _)| key).collect();
        let fresh: BTreeSet<&Key> = announced.iter().map(|(key, _)| key).filter(|key| !had.contains(key)).collect();
        for key in fresh {
            let about = ObjectRef::new("v1", SERVICES.kind, &key.namespace, &key.name, "");
            let message = format!("announcing from node \"{}\" with protocol \"{PROTOCOL}\"", self.node.name);
            self.recorder.event(&about, EventKind::Normal, "nodeAssigned", message);
        }
        let mut counts = self.metrics.write();
        counts.announced.retain(|(.., protocol)| *protocol != PROTOCOL);
        counts.announced.extend(announced.iter().map(|(key, ip)| (key.to_string(), *ip, PROTOCOL)));
        drop(counts);
        self.announced = announced;
    }

    /// An event at the peer for what became of its session.
    fn tell(&mut self, notice: Notice) {
        let node = &self.node.name;
        let (name, kind, reason, text) = match notice {
            Notice::Up(name) => (name, EventKind::Normal, "SessionUp", format!("the session with node {node} is up")),
            Notice::Down(name, why) => {
                (name, EventKind::Warning, "SessionDown", format!("the session with node {node} is down: {why}"))
            }
            Notice::Failed(name, why) => {
                (name, EventKind::Warning, "SessionFailed", format!("node {node} has no session: {why}"))
            }
        };
        let Some((key, object)) = self.peers.iter().find(|(key, _)| key.to_string() == name) else { return };
        if let (EventKind::Warning, Some(secret)) = (kind, Peer::new(object).ok().and_then(|peer| peer.secret)) {
            // Perhaps the password is another one by now.
            self.passwords.remove(&secret);
        }
        let about =
            ObjectRef::new(&BGP_PEERS.api_version(), BGP_PEERS.kind, &key.namespace, &key.name, &object.metadata.uid);
        self.recorder.event(&about, kind, reason, text);
    }
}
