//! Keeps ServiceCIDRs and IPAddresses true: a range is ready, and goes only when no address of it is in use; each cluster IP
//! has its IPAddress, and each IPAddress of the allocator its Service.
//!
//! The API server makes and removes an IPAddress with its Service, in one write. What is repaired here is what somebody did
//! by hand.

mod plan;

use crate::plan::{Change, act, settled};
use crate::{Context, Descriptor, Error};
use api::kinds::{IP_ADDRESSES, SERVICE_CIDRS, SERVICES};
use api::object::Key;
use jiff::Timestamp;
use plan::{ALLOCATOR, IpAddress, MANAGED_BY, Service, ServiceCidr, range, restored};
use reconcile::{Api, Cache, Client, EventKind, ObjectRef, Outcome, Queue, Recorder, Scope, feed, run_queue};
use std::collections::BTreeSet;
use std::fmt::{Display, Formatter};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "service-cidr",
    watches: &[SERVICE_CIDRS, IP_ADDRESSES, SERVICES],
    writes: &[SERVICE_CIDRS, IP_ADDRESSES],
    run: |context| Box::pin(run(context)),
};

/// How long an IPAddress may be without its Service: somebody may be about to make it.
const ORPHANED: Duration = Duration::from_secs(60);

/// What is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    Range(Key),
    Service(Key),
    Address(Key),
}

impl Display for Work {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Work::Range(key) => write!(f, "ServiceCIDR {}", key.name),
            Work::Service(key) => write!(f, "Service {}/{}", key.namespace, key.name),
            Work::Address(key) => write!(f, "IPAddress {}", key.name),
        }
    }
}

struct Controller {
    client: Client,
    recorder: Recorder,
    ranges: Cache<ServiceCidr>,
    addresses: Cache<IpAddress>,
    services: Cache<Service>,
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Work> = Queue::default();
    let recorder = Recorder::new(&client, "service-cidr-controller", "");
    // Those that are to go look again whenever a range comes or an address goes.
    let going: Arc<Mutex<BTreeSet<Key>>> = Arc::default();
    let (adds, waiting) = (queue.clone(), going.clone());
    let ranges = feed::<ServiceCidr, _>(&client, &SERVICE_CIDRS, Scope::all(), &token, move |before, after| {
        let Some(cidr) = after.or(before) else { return };
        let mut going = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match after.is_some_and(|cidr| cidr.metadata.is_deleting()) {
            true => going.insert(cidr.metadata.key()),
            false => going.remove(&cidr.metadata.key()),
        };
        adds.add(Work::Range(cidr.metadata.key()));
        going.iter().for_each(|key| adds.add(Work::Range(key.clone())));
    });
    ranges.synced().await;
    let (adds, waiting) = (queue.clone(), going);
    let addresses = feed::<IpAddress, _>(&client, &IP_ADDRESSES, Scope::all(), &token, move |before, after| {
        let Some(address) = after.or(before) else { return };
        match after {
            Some(_) if address.metadata.labels.get(MANAGED_BY).is_some_and(|by| by == ALLOCATOR) => {
                adds.add_after(Work::Address(address.metadata.key()), ORPHANED);
            }
            Some(_) => {}
            None => {
                let going = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                going.iter().for_each(|key| adds.add(Work::Range(key.clone())));
                address.service().into_iter().for_each(|service| adds.add(Work::Service(service)));
            }
        }
    });
    addresses.synced().await;
    let adds = queue.clone();
    let services = feed::<Service, _>(&client, &SERVICES, Scope::all(), &token, move |before, after| {
        if let Some(service) =
            after.filter(|after| before.is_none_or(|before| before.spec.cluster_ips != after.spec.cluster_ips))
        {
            adds.add(Work::Service(service.metadata.key()));
        }
        if let Some(before) = before {
            let gone = before.addresses().filter(|ip| !after.is_some_and(|after| after.addresses().any(|a| a == *ip)));
            gone.for_each(|ip| adds.add_after(Work::Address(Key::new("", ip.to_string())), ORPHANED));
        }
    });
    services.synced().await;
    let controller = Arc::new(Controller { client, recorder, ranges, addresses, services });
    run_queue("service-cidr", queue, 2, token, move |work: Work| {
        let controller = controller.clone();
        async move {
            match &work {
                Work::Range(key) => controller.range(key).await,
                Work::Service(key) => controller.service(key).await,
                Work::Address(key) => controller.address(key).await,
            }
        }
    })
    .await;
}

impl Controller {
    async fn range(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(cidr) = self.ranges.get(key) else { return Ok(Outcome::Done) };
        // A range that is going away gives out no address any more, but the cache may be behind the last ones.
        let addresses = match cidr.metadata.is_deleting() {
            true => {
                let live = Api::new(&self.client, &IP_ADDRESSES).list("").await?;
                let live = live.into_iter().map(|object| serde_json::from_value(object).map(Arc::new));
                live.collect::<Result<Vec<_>, _>>().map_err(|error| Error::Object(error.to_string()))?
            }
            false => Vec::new(),
        };
        match range(&cidr, &self.ranges.list(), &addresses, Timestamp::now()) {
            Some(change) => act(&self.client, &change).await.map(|_| Outcome::Done).map_err(Error::from),
            None => Ok(Outcome::Done),
        }
    }

    async fn service(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(service) = self.services.get(key) else { return Ok(Outcome::Done) };
        for ip in service.addresses() {
            let is_there = || self.addresses.get(&Key::new("", ip.to_string())).is_some();
            // The API server writes both at once; the caches see one before the other.
            if is_there() || !self.holds(key, ip).await? {
                continue;
            }
            match act(&self.client, &restored(key, ip)).await {
                Ok(_) => {
                    let about = ObjectRef::new("v1", "Service", &key.namespace, &key.name, &service.metadata.uid);
                    let text = format!("Cluster IP {ip} is not allocated; repairing");
                    self.recorder.event(&about, EventKind::Warning, "ClusterIPNotAllocated", text);
                }
                Err(error) if error.is_already_exists() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Outcome::Done)
    }

    async fn address(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(address) = self.addresses.get(key) else { return Ok(Outcome::Done) };
        let is_ours = address.metadata.labels.get(MANAGED_BY).is_some_and(|by| by == ALLOCATOR);
        let (Some(service), Some(ip), true) = (address.service(), address.ip(), is_ours) else {
            return Ok(Outcome::Done);
        };
        if self.holds(&service, ip).await? {
            return Ok(Outcome::Done);
        }
        settled(act(&self.client, &Change::delete(IP_ADDRESSES, key.clone(), &address.metadata.uid)).await)
    }

    /// Whether the Service has this cluster IP now, whatever the caches say.
    async fn holds(&self, service: &Key, ip: std::net::IpAddr) -> Result<bool, Error> {
        let live = Api::new(&self.client, &SERVICES).find(&service.namespace, &service.name).await?;
        let live: Option<Service> =
            live.map(serde_json::from_value).transpose().map_err(|e| Error::Object(e.to_string()))?;
        Ok(live.is_some_and(|service| service.addresses().any(|held| held == ip)))
    }
}
