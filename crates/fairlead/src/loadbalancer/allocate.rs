//! Follows Services and pools, and writes the addresses that the allocator gives.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::kinds::{IP_ADDRESS_POOLS, NAMESPACES, SERVICES};
use api::object::{Key, Metadata};
use futures::StreamExt;
use jiff::Timestamp;
use loadbalancer::{Allocator, Metrics, Pool, PoolObject, Service};
use reconcile::{Api, Change, EventKind, ObjectRef, Patch, Recorder, Scope};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{LEASE, NAMESPACE, key, update};
use crate::ingress::leader::{self, Terms};

/// How many writes are under way at a time: a store that syncs its disk takes as many together as there are.
const WRITERS: usize = 128;
/// When what was not written is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// Whether a Service has the address that it asks for.
const CONDITION: &str = "fairlead.io/AddressAllocated";

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Namespace {
    metadata: Metadata,
}

/// What is known, by key.
#[derive(Default)]
struct Known {
    services: BTreeMap<Key, Arc<Service>>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pools: BTreeMap<Key, PoolObject>,
    /// Which of the three lists have come.
    lists: [bool; 3],
}

/// Gives addresses until the token is cancelled. Services without a class are ours, too, if `is_default`.
pub async fn run(
    client: kube::Client,
    identity: String,
    is_default: bool,
    metrics: Arc<Metrics>,
    token: CancellationToken,
) {
    let (leads, mut leads_seen) = watch::channel(false);
    let lease = Key::new(NAMESPACE, LEASE);
    let leading = tokio::spawn(leader::run(client.clone(), lease, identity.clone(), Terms::CALM, leads, token.clone()));
    let mut services: mpsc::Receiver<Change<Service>> = reconcile::watch(&client, &SERVICES, Scope::all());
    let mut namespaces: mpsc::Receiver<Change<Namespace>> = reconcile::watch(&client, &NAMESPACES, Scope::all());
    let mut pools: mpsc::Receiver<Change<PoolObject>> = reconcile::watch(&client, &IP_ADDRESS_POOLS, Scope::all());
    let mut known = Known::default();
    let mut work = Work {
        services: Api::new(&client, &SERVICES),
        pools: Api::new(&client, &IP_ADDRESS_POOLS),
        recorder: Recorder::new(&client, "fairlead-loadbalancer", &identity),
        is_default,
        allocator: Allocator::default(),
        dirty: BTreeSet::new(),
        refused: BTreeMap::new(),
        counted: BTreeMap::new(),
        told: BTreeSet::new(),
        metrics,
    };
    let mut again = false;
    loop {
        let wait = async { if again { tokio::time::sleep(AGAIN).await } else { std::future::pending().await } };
        tokio::select! {
            biased;
            () = token.cancelled() => break,
            Some(change) = pools.recv() => {
                known.lists[0] |= matches!(change, Change::Reset(_));
                update(&mut known.pools, change, |pool| key(&pool.metadata), |pool| pool);
                work.new_pools(&known);
            }
            Some(change) = namespaces.recv() => {
                known.lists[1] |= matches!(change, Change::Reset(_));
                update(&mut known.namespaces, change, |n| n.metadata.name.clone(), |n| n.metadata.labels);
                work.dirty.extend(known.services.keys().cloned());
            }
            Some(change) = services.recv() => {
                known.lists[2] |= matches!(change, Change::Reset(_));
                match &change {
                    Change::Reset(all) => {
                        work.dirty.extend(known.services.keys().cloned());
                        work.dirty.extend(all.iter().map(|service| key(&service.metadata)));
                    }
                    Change::Apply(one) | Change::Delete(one) => drop(work.dirty.insert(key(&one.metadata))),
                }
                update(&mut known.services, change, |service| key(&service.metadata), Arc::new);
            }
            changed = leads_seen.changed() => {
                if changed.is_err() {
                    break;
                }
                // What another gave meanwhile is in the status.
                work.allocator = Allocator::default();
                work.new_pools(&known);
            }
            () = wait => {}
        }
        let has_more = !(pools.is_empty() && namespaces.is_empty() && services.is_empty());
        if *leads_seen.borrow() && known.lists == [true; 3] && !has_more {
            again = !work.settle(&known).await;
        }
    }
    leading.await.ok();
}

struct Work {
    services: Api,
    pools: Api,
    recorder: Recorder,
    is_default: bool,
    allocator: Allocator,
    /// Services to be looked at.
    dirty: BTreeSet<Key>,
    /// Those that got nothing, and what they were told.
    refused: BTreeMap<Key, String>,
    /// The counts in the pools' status.
    counted: BTreeMap<Key, [u64; 4]>,
    /// What is wrong with pools, as it was told.
    told: BTreeSet<(Key, String)>,
    metrics: Arc<Metrics>,
}

impl Work {
    fn new_pools(&mut self, known: &Known) {
        let mut wrong = BTreeSet::new();
        let mut pools = Vec::new();
        for (key, object) in &known.pools {
            match Pool::new(object) {
                Ok(pool) => pools.push(pool),
                Err(error) => drop(wrong.insert((key.clone(), error.to_string()))),
            }
        }
        for (name, error) in self.allocator.set_pools(pools) {
            let key = known.pools.keys().find(|key| key.name == name);
            wrong.extend(key.map(|key| (key.clone(), error.to_string())));
        }
        for (key, message) in wrong.difference(&self.told) {
            let uid = known.pools.get(key).map_or("", |pool| pool.metadata.uid.as_str());
            let kind = &IP_ADDRESS_POOLS;
            let about = ObjectRef::new(&kind.api_version(), kind.kind, &key.namespace, &key.name, uid);
            self.recorder.event(&about, EventKind::Warning, "PoolNotUsed", message.clone());
        }
        self.told = wrong;
        self.dirty.extend(known.services.keys().cloned());
    }

    /// Decides about all that changed and writes it; whether all was written.
    async fn settle(&mut self, known: &Known) -> bool {
        let mut queue = std::mem::take(&mut self.dirty);
        let mut writes: Vec<(Key, Value)> = Vec::new();
        let mut is_free = false;
        let is_ours = |key: &Key| known.services.get(key).filter(|service| service.is_ours(self.is_default));
        for key in queue.iter().filter(|key| is_ours(key).is_none()) {
            self.refused.remove(key);
            let Some(given) = self.allocator.release(key) else { continue };
            is_free = true;
            // What is of another type now has no address of a load balancer.
            let held = known.services.get(key).map(|service| service.held()).unwrap_or_default();
            if held.iter().any(|address| given.addresses.contains(address)) {
                writes.push((key.clone(), json!({"status": {"loadBalancer": {"ingress": null}}})));
            }
        }
        if is_free {
            queue.extend(self.refused.keys().cloned());
        }
        let mut queue: Vec<(Key, Arc<Service>)> =
            queue.into_iter().filter_map(|key| is_ours(&key).cloned().map(|service| (key, service))).collect();
        // Who holds addresses keeps them; then the older ones come first.
        queue.sort_by_cached_key(|(key, service)| {
            (service.held().is_empty(), service.metadata.creation_timestamp.clone(), key.clone())
        });
        for (key, service) in queue {
            writes.extend(self.assign(known, &key, &service).map(|body| (key, body)));
        }
        let unwritten = write(&self.services, writes).await;
        self.dirty.extend(unwritten);
        self.count(known).await && self.dirty.is_empty()
    }

    /// What is to be written into the status of one Service, if anything.
    fn assign(&mut self, known: &Known, key: &Key, service: &Service) -> Option<Value> {
        let labels = known.namespaces.get(&key.namespace).cloned().unwrap_or_default();
        let about = ObjectRef::new("v1", SERVICES.kind, &key.namespace, &key.name, &service.metadata.uid);
        let asked = service.request(labels).map_err(|why| ("AddressNotAllowed", why));
        let given = asked.and_then(|request| {
            self.allocator.assign(request).map_err(|refusal| (refusal.reason(), refusal.to_string()))
        });
        match given {
            Ok(given) => {
                let was_refused = self.refused.remove(key).is_some();
                if service.held() == given.addresses && !was_refused {
                    return None;
                }
                let list: Vec<String> = given.addresses.iter().map(ToString::to_string).collect();
                let text = format!("{} of pool {}", list.join(", "), given.pool);
                info!(%key, addresses = ?list, "allocated");
                self.recorder.event(&about, EventKind::Normal, "IPAllocated", format!("Assigned {text}"));
                let ingress: Vec<Value> = list.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
                let condition = condition(service, true, "Allocated", &text);
                Some(json!({"status": {"loadBalancer": {"ingress": ingress}, "conditions": [condition]}}))
            }
            Err((reason, message)) => {
                self.allocator.release(key);
                if self.refused.get(key) == Some(&message) {
                    return None;
                }
                self.recorder.event(&about, EventKind::Warning, reason, message.clone());
                let condition = condition(service, false, reason, &message);
                self.refused.insert(key.clone(), message);
                Some(json!({"status": {"loadBalancer": {"ingress": null}, "conditions": [condition]}}))
            }
        }
    }

    /// Writes how full the pools are; whether all is written.
    async fn count(&mut self, known: &Known) -> bool {
        let mut is_written = true;
        let clamp = |count: u128| u64::try_from(count).unwrap_or(u64::MAX).min(i64::MAX as u64);
        let pools: Vec<(String, [u64; 2])> =
            self.allocator.pools().map(|p| (p.name.clone(), [clamp(p.size(true)), clamp(p.size(false))])).collect();
        let in_use = pools.iter().map(|(name, [four, six])| {
            let (used_four, used_six) = self.allocator.used(name);
            (name.clone(), (used_four + used_six, four.saturating_add(*six)))
        });
        let in_use = in_use.collect();
        self.metrics.write().pools = in_use;
        for (name, [four, six]) in pools {
            let Some(key) = known.pools.keys().find(|key| key.name == name).cloned() else { continue };
            let (used_four, used_six) = self.allocator.used(&name);
            let counts = [used_four, used_six, four.saturating_sub(used_four), six.saturating_sub(used_six)];
            if self.counted.get(&key) == Some(&counts) {
                continue;
            }
            let body = json!({"status": {"assignedIPv4": counts[0], "assignedIPv6": counts[1],
                "availableIPv4": counts[2], "availableIPv6": counts[3]}});
            match self.pools.patch_status(&key.namespace, &key.name, Patch::Merge, &body).await {
                Ok(_) => drop(self.counted.insert(key, counts)),
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    debug!(%error, %key, "the pool's counts are not written");
                    is_written = false;
                }
            }
        }
        is_written
    }
}

/// Writes what is said of each Service; those of which it could not be written come back.
async fn write(api: &Api, writes: Vec<(Key, Value)>) -> BTreeSet<Key> {
    let unwritten = Mutex::new(BTreeSet::new());
    futures::stream::iter(writes)
        .for_each_concurrent(WRITERS, |(key, body)| {
            let unwritten = &unwritten;
            async move {
                match api.patch_status(&key.namespace, &key.name, Patch::Strategic, &body).await {
                    Ok(_) => {}
                    Err(error) if error.is_not_found() => {}
                    Err(error) => {
                        debug!(%error, %key, "the status is not written");
                        unwritten.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
                    }
                }
            }
        })
        .await;
    unwritten.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn condition(service: &Service, is_true: bool, reason: &str, message: &str) -> Value {
    json!({"type": CONDITION, "status": if is_true { "True" } else { "False" }, "reason": reason, "message": message,
        "observedGeneration": service.metadata.generation, "lastTransitionTime": api::time::seconds(Timestamp::now())})
}
