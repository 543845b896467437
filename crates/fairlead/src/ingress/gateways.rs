//! Follows all that Gateways are made of, opens their ports, and says what is to be written about them. Where a cluster has no
//! Gateway API, it waits until there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use api::Resource;
use api::kinds;
use api::object::{Key, Metadata};
use ingress::gateway::{
    AnyRoute, CaState, GatewayCompiler, GatewayObject, ObjectKind, PortKey, PortTable, RouteType, Transport,
};
use ingress::{LoadBalancerIngress, OpenPorts, PortOpener, SecretState, Swap};
use reconcile::{Api, Change, Scope, ServiceFeed};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use services::Changes;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::provision::{Published, Report};
use super::secrets::Followed;

/// Says which Gateway a Service is in front of.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// How long people's news may gather before they are written; requests never wait for it.
const GATHER: Duration = Duration::from_millis(50);
/// How often a cluster without Gateway API is asked whether it has it now.
const AGAIN: Duration = Duration::from_secs(10);

/// What follows Gateways besides the API.
pub struct Parts {
    pub client: kube::Client,
    pub feed: ServiceFeed,
    pub changes: broadcast::Receiver<Arc<Changes>>,
    pub opener: PortOpener,
    /// Where ports are opened.
    pub addresses: Vec<IpAddr>,
    /// `spec.controllerName` of the classes that are served.
    pub controller: String,
    /// The Service that leads to all proxies; without one Gateways have none of their own.
    pub publish: Option<Key>,
    pub leads: watch::Receiver<bool>,
    pub reports: watch::Sender<Report>,
}

/// A Service in front of a Gateway, as it is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct FrontService {
    pub metadata: Metadata,
    pub spec: FrontSpec,
    pub status: FrontStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct FrontSpec {
    pub ports: Vec<FrontPort>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct FrontPort {
    pub name: String,
    pub port: u16,
    pub protocol: String,
    /// A number in all that we make.
    pub target_port: serde_json::Value,
    pub node_port: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct FrontStatus {
    pub load_balancer: FrontBalancer,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct FrontBalancer {
    pub ingress: Vec<LoadBalancerIngress>,
}

impl FrontPort {
    pub fn transport(&self) -> Transport {
        if self.protocol == "UDP" { Transport::Udp } else { Transport::Tcp }
    }

    /// Where proxies listen for it.
    pub fn target(&self) -> Option<u16> {
        self.target_port.as_u64().and_then(|port| u16::try_from(port).ok())
    }
}

impl FrontService {
    pub fn gateway(&self) -> Option<Key> {
        let name = self.metadata.labels.get(GATEWAY_NAME)?;
        Some(Key::new(self.metadata.namespace.clone(), name.clone()))
    }
}

type News = (ObjectKind, Change<GatewayObject>);

/// Follows until the token is cancelled.
pub async fn run(mut parts: Parts, token: CancellationToken) {
    let Some(served) = served(&parts.client, &token).await else { return };
    let (sender, mut news) = mpsc::channel::<News>(256);
    let missing = follow_all(&parts.client, &served, &sender, &token);
    let scope = Scope { label_selector: GATEWAY_NAME.to_owned(), ..Scope::default() };
    let mut services = reconcile::watch::<FrontService>(&parts.client, &kinds::SERVICES, scope);
    let (mut secrets, mut secret_states) =
        Followed::new(parts.client.clone(), kinds::SECRETS, SecretState::of, token.clone());
    let (mut authorities, mut authority_states) =
        Followed::new(parts.client.clone(), kinds::CONFIG_MAPS, CaState::of, token.clone());
    let compiler = GatewayCompiler::new(&parts.controller, parts.feed.table.clone());
    let mut world = Gateways { compiler, tables: BTreeMap::new(), services: BTreeMap::new(), wanted: Vec::new() };
    let (mut waiting, mut has_services) = (missing, false);
    let mut report_at: Option<Instant> = None;
    // Somebody may be to listen elsewhere.
    let mut moved = false;
    loop {
        tokio::select! {
            biased;
            () = token.cancelled() => return,
            Some((kind, change)) = news.recv() => {
                if matches!(change, Change::Reset(_)) {
                    waiting.remove(&kind);
                }
                world.take(kind, change);
                // What has come meanwhile is one change.
                while let Ok((kind, change)) = news.try_recv() {
                    if matches!(change, Change::Reset(_)) {
                        waiting.remove(&kind);
                    }
                    world.take(kind, change);
                }
            }
            change = services.recv() => match change {
                Some(change) => {
                    has_services |= matches!(change, Change::Reset(_));
                    moved = true;
                    world.take_service(change);
                }
                None => return,
            },
            change = parts.changes.recv() => match change {
                Ok(changes) => changes.services.iter().for_each(|(namespace, name)| {
                    world.compiler.service_changed(namespace, name);
                }),
                Err(broadcast::error::RecvError::Lagged(_)) => world.compiler.all_services_changed(),
                Err(broadcast::error::RecvError::Closed) => return,
            },
            Some((key, state)) = secret_states.recv() => world.compiler.set_secret(&key, state),
            Some((key, state)) = authority_states.recv() => world.compiler.set_authority(&key, state),
            changed = parts.leads.changed() => if changed.is_err() { return },
            () = sleep_until(report_at) => {
                report_at = None;
                let report = world.report(&parts);
                parts.reports.send_replace(report);
                continue;
            }
        }
        let is_synced = parts.feed.table.read().unwrap_or_else(PoisonError::into_inner).is_synced();
        if !waiting.is_empty() || !has_services || !is_synced {
            continue;
        }
        if world.compile() {
            let (wanted_secrets, wanted_authorities) = world.compiler.wanted();
            secrets.follow(wanted_secrets);
            authorities.follow(wanted_authorities);
            moved = true;
        }
        if std::mem::take(&mut moved) {
            parts.opener.open(world.open_ports(&parts.addresses));
        }
        report_at.get_or_insert_with(|| Instant::now() + GATHER);
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[derive(Deserialize)]
struct ResourceList {
    resources: Vec<Served>,
}

#[derive(Deserialize)]
struct Served {
    name: String,
}

/// The resources of Gateway API that the server has, once it has Gateways. `None`: the token was cancelled.
async fn served(client: &kube::Client, token: &CancellationToken) -> Option<BTreeSet<String>> {
    let path = format!("/apis/{}/v1", kinds::GATEWAY);
    let mut is_told = false;
    loop {
        match reconcile::request::<ResourceList>(client, "GET", &path, "", None).await {
            Ok(list) if list.resources.iter().any(|one| one.name == kinds::GATEWAYS.plural) => {
                return Some(list.resources.into_iter().map(|one| one.name).collect());
            }
            Ok(_) => {}
            Err(error) if error.is_not_found() => {
                if !std::mem::replace(&mut is_told, true) {
                    info!("this cluster has no Gateway API; Gateways are served when it has");
                }
            }
            Err(error) => debug!(%error, "cannot ask for Gateway API"),
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = token.cancelled() => return None,
        }
    }
}

/// Follows every kind that there is, and says which of them have not been listed yet.
fn follow_all(
    client: &kube::Client,
    served: &BTreeSet<String>,
    sender: &mpsc::Sender<News>,
    token: &CancellationToken,
) -> BTreeSet<ObjectKind> {
    let mut all = BTreeSet::from([ObjectKind::Namespace]);
    follow(client, kinds::NAMESPACES, ObjectKind::Namespace, GatewayObject::Namespace, sender, token);
    let mut is_served = |resource: Resource, kind: ObjectKind| {
        let is_served = served.contains(resource.plural);
        match is_served {
            true => drop(all.insert(kind)),
            false => info!(kind = resource.kind, "this cluster does not have the kind; it is left out"),
        }
        is_served
    };
    if is_served(kinds::GATEWAY_CLASSES, ObjectKind::Class) {
        follow(client, kinds::GATEWAY_CLASSES, ObjectKind::Class, GatewayObject::Class, sender, token);
    }
    if is_served(kinds::GATEWAYS, ObjectKind::Gateway) {
        let wrap = |held| GatewayObject::Gateway(Box::new(held));
        follow(client, kinds::GATEWAYS, ObjectKind::Gateway, wrap, sender, token);
    }
    if is_served(kinds::LISTENER_SETS, ObjectKind::ListenerSet) {
        follow(client, kinds::LISTENER_SETS, ObjectKind::ListenerSet, GatewayObject::ListenerSet, sender, token);
    }
    if is_served(kinds::REFERENCE_GRANTS, ObjectKind::Grant) {
        follow(client, kinds::REFERENCE_GRANTS, ObjectKind::Grant, GatewayObject::Grant, sender, token);
    }
    if is_served(kinds::BACKEND_TLS_POLICIES, ObjectKind::Policy) {
        follow(client, kinds::BACKEND_TLS_POLICIES, ObjectKind::Policy, GatewayObject::Policy, sender, token);
    }
    for kind in RouteType::ALL {
        if is_served(resource_of(kind), ObjectKind::Route(kind)) {
            let wrap = move |held: AnyRoute| GatewayObject::Route(kind, held);
            follow(client, resource_of(kind), ObjectKind::Route(kind), wrap, sender, token);
        }
    }
    all
}

pub fn resource_of(kind: RouteType) -> Resource {
    match kind {
        RouteType::Http => kinds::HTTP_ROUTES,
        RouteType::Grpc => kinds::GRPC_ROUTES,
        RouteType::Tls => kinds::TLS_ROUTES,
        RouteType::Tcp => kinds::TCP_ROUTES,
        RouteType::Udp => kinds::UDP_ROUTES,
    }
}

fn follow<T: DeserializeOwned + Send + 'static>(
    client: &kube::Client,
    resource: Resource,
    kind: ObjectKind,
    wrap: impl Fn(T) -> GatewayObject + Send + 'static,
    sender: &mpsc::Sender<News>,
    token: &CancellationToken,
) {
    let mut changes = reconcile::watch::<T>(client, &resource, Scope::all());
    let (sender, token) = (sender.clone(), token.clone());
    tokio::spawn(async move {
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = token.cancelled() => return,
            };
            let change = match change {
                Some(Change::Reset(all)) => Change::Reset(all.into_iter().map(&wrap).collect()),
                Some(Change::Apply(one)) => Change::Apply(wrap(one)),
                Some(Change::Delete(one)) => Change::Delete(wrap(one)),
                None => return,
            };
            // Whoever listened has ended.
            if sender.send((kind, change)).await.is_err() {
                return;
            }
        }
    });
}

/// What is known, and what became of it.
struct Gateways {
    compiler: GatewayCompiler,
    /// What ports do. Each is one place, whose table is replaced.
    tables: BTreeMap<PortKey, Arc<Swap<PortTable>>>,
    services: BTreeMap<Key, FrontService>,
    wanted: Vec<ingress::gateway::WantedGateway>,
}

impl Gateways {
    fn take(&mut self, kind: ObjectKind, change: Change<GatewayObject>) {
        match change {
            Change::Reset(all) => self.compiler.reset(kind, all),
            Change::Apply(one) => self.compiler.set(one),
            Change::Delete(one) => self.compiler.remove(kind, &one.metadata().key()),
        }
    }

    fn take_service(&mut self, change: Change<FrontService>) {
        let before: BTreeSet<Key> = self.services.values().filter_map(FrontService::gateway).collect();
        match change {
            Change::Reset(all) => {
                self.services = all.into_iter().map(|one| (one.metadata.key(), one)).collect();
            }
            Change::Apply(one) => drop(self.services.insert(one.metadata.key(), one)),
            Change::Delete(one) => drop(self.services.remove(&one.metadata.key())),
        }
        let mut gone = before;
        for service in self.services.values() {
            let Some(gateway) = service.gateway() else { continue };
            self.compiler.set_addresses(&gateway, Some(service.status.load_balancer.ingress.clone()));
            gone.remove(&gateway);
        }
        gone.iter().for_each(|gateway| self.compiler.set_addresses(gateway, None));
    }

    /// Says whether anything was to be done.
    fn compile(&mut self) -> bool {
        let Some(outcome) = self.compiler.compile() else { return false };
        self.tables.retain(|key, _| outcome.ports.contains_key(key));
        for (key, table) in outcome.ports {
            match self.tables.get(&key) {
                Some(held) => held.store(table),
                None => drop(self.tables.insert(key, Arc::new(Swap::from(table)))),
            }
        }
        self.wanted = outcome.gateways;
        true
    }

    /// Ports whose Service says where proxies listen.
    fn open_ports(&self, addresses: &[IpAddr]) -> OpenPorts {
        let mut open = OpenPorts::new();
        for service in self.services.values() {
            let Some(gateway) = service.gateway() else { continue };
            for port in &service.spec.ports {
                let key = PortKey { gateway: gateway.clone(), port: port.port, transport: port.transport() };
                let (Some(table), Some(target)) = (self.tables.get(&key), port.target()) else { continue };
                for address in addresses {
                    open.insert((SocketAddr::new(*address, target), key.transport), table.clone());
                }
            }
        }
        open
    }

    /// Only who holds the Lease has anything to say.
    fn report(&mut self, parts: &Parts) -> Report {
        if !*parts.leads.borrow() {
            return Report::default();
        }
        let now = api::time::seconds(jiff::Timestamp::now());
        let table = parts.feed.table.read().unwrap_or_else(PoisonError::into_inner);
        Report {
            leads: true,
            controller: parts.controller.clone(),
            statuses: self.compiler.unwritten(&now),
            gateways: self.wanted.clone(),
            services: self.services.clone(),
            published: parts.publish.as_ref().map(|key| Published::of(&table, key, self.services.keys())),
        }
    }
}

/// Every kind that has a status of ours.
pub fn api_of(client: &kube::Client, kind: ObjectKind) -> Option<Api> {
    let resource = match kind {
        ObjectKind::Class => kinds::GATEWAY_CLASSES,
        ObjectKind::Gateway => kinds::GATEWAYS,
        ObjectKind::ListenerSet => kinds::LISTENER_SETS,
        ObjectKind::Route(route) => resource_of(route),
        ObjectKind::Policy => kinds::BACKEND_TLS_POLICIES,
        ObjectKind::Grant | ObjectKind::Namespace => return None,
    };
    Some(Api::new(client, &resource))
}
