//! Health check node ports: a Service with `externalTrafficPolicy: Local` has a port on every node where a load balancer
//! asks whether the node has an endpoint of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::StatusCode;
use linux::netns::Netns;
use reconcile::{EventKind, ObjectRef, Recorder};
use serde_json::json;
use services::{Changes, Frontend, FrontendId};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::{Answer, Respond, serve};
use crate::{Feed, Health, NodeView};

/// A port that is taken may become free; nobody tells when.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Namespace and name.
type Service = (Arc<str>, Arc<str>);

/// What the health check node ports of a node need.
pub struct HealthChecks {
    /// Where the node's addresses are; `None`: where the caller is.
    pub namespace: Option<Netns>,
    pub node: watch::Receiver<Arc<NodeView>>,
    pub feed: Feed,
    pub health: Arc<Health>,
    /// Who is told of a port that cannot be opened.
    pub events: Option<Recorder>,
}

/// What a load balancer is told of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    service: Service,
    /// Ready endpoints on this node; one that terminates does not count, though it may still be served.
    local_endpoints: u64,
}

impl Check {
    fn answer(&self, is_proxy_live: bool) -> Answer {
        let status = match self.local_endpoints > 0 && is_proxy_live {
            true => StatusCode::OK,
            false => StatusCode::SERVICE_UNAVAILABLE,
        };
        let (namespace, name) = &self.service;
        let body = json!({
            "service": {"namespace": namespace, "name": name},
            "localEndpoints": self.local_endpoints,
            "serviceProxyHealthy": is_proxy_live,
        });
        let weight = ("x-load-balancing-endpoint-weight", self.local_endpoints);
        Answer { header: Some(weight), ..Answer::json(status, body.to_string()) }
    }
}

/// The Services of a node that have a health check port, from all their frontends.
fn checks<'a>(frontends: impl Iterator<Item = &'a Arc<Frontend>>, node: &str) -> BTreeMap<NonZeroU16, Check> {
    let mut found: BTreeMap<NonZeroU16, (Service, HashSet<IpAddr>)> = BTreeMap::new();
    // By name: if two Services claim one port, it is always the same that gets it.
    let mut frontends: Vec<_> = frontends.collect();
    frontends.sort_by(|a, b| a.name.cmp(&b.name));
    for frontend in frontends {
        let Some(port) = frontend.health_check_node_port else { continue };
        let service = (frontend.name.namespace.clone(), frontend.name.service.clone());
        let (owner, addresses) = found.entry(port).or_insert_with(|| (service.clone(), HashSet::new()));
        if *owner != service {
            continue;
        }
        let local =
            frontend.endpoints.iter().filter(|endpoint| endpoint.ready && endpoint.node.as_deref() == Some(node));
        // A pod that serves two ports is still one.
        addresses.extend(local.map(|endpoint| endpoint.address.ip()));
    }
    let count = |addresses: HashSet<IpAddr>| addresses.len() as u64;
    found.into_iter().map(|(port, (service, all))| (port, Check { service, local_endpoints: count(all) })).collect()
}

/// One open port: what it answers, and how it is closed.
struct Open {
    check: Arc<RwLock<Check>>,
    /// Each address has a listener, which ends with its token.
    listeners: BTreeMap<IpAddr, CancellationToken>,
}

struct Server {
    config: HealthChecks,
    /// Frontends with a health check port.
    frontends: HashMap<FrontendId, Arc<Frontend>>,
    open: BTreeMap<NonZeroU16, Open>,
    /// Addresses that could not be listened on, so that each failure is told once.
    failed: BTreeSet<SocketAddr>,
    tasks: TaskTracker,
    token: CancellationToken,
}

/// Serves the health check node ports until cancelled.
pub async fn serve_health_checks(config: HealthChecks, token: CancellationToken) {
    let server = Server {
        config,
        frontends: HashMap::new(),
        open: BTreeMap::new(),
        failed: BTreeSet::new(),
        tasks: TaskTracker::new(),
        token,
    };
    server.run().await;
}

impl Server {
    async fn run(mut self) {
        let token = self.token.clone();
        self.read_table();
        let mut back_off = FIRST_RETRY;
        loop {
            self.adjust().await;
            let retry_at = (!self.failed.is_empty()).then(|| Instant::now() + back_off);
            back_off = if self.failed.is_empty() { FIRST_RETRY } else { (back_off * 2).min(LAST_RETRY) };
            // Most changes are about other Services and cost nothing here.
            loop {
                tokio::select! {
                    () = token.cancelled() => {
                        self.tasks.close();
                        return self.tasks.wait().await;
                    }
                    changed = self.config.node.changed() => match changed {
                        Ok(()) => break,
                        // Whoever knew the node has ended, and so will we.
                        Err(_) => token.cancelled().await,
                    },
                    received = self.config.feed.changes.recv() => match received {
                        Ok(changes) => if self.notice(&changes) { break },
                        Err(broadcast::error::RecvError::Lagged(_)) => {
                            self.read_table();
                            break;
                        }
                        Err(broadcast::error::RecvError::Closed) => token.cancelled().await,
                    },
                    () = async { tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)).await },
                        if retry_at.is_some() => break,
                }
            }
        }
    }

    fn read_table(&mut self) {
        // A writer that panicked left a table that is whole: each event is applied in one call.
        let table = self.config.feed.table.read().unwrap_or_else(PoisonError::into_inner);
        let with_check = table.frontends().filter(|frontend| frontend.health_check_node_port.is_some());
        self.frontends = with_check.map(|frontend| (frontend.id, frontend.clone())).collect();
    }

    /// Whether the change is about a health check.
    fn notice(&mut self, changes: &Changes) -> bool {
        let mut concerned = false;
        for change in &changes.frontends {
            let known = self.frontends.remove(&change.id).is_some();
            let after = change.after.as_ref().filter(|after| after.health_check_node_port.is_some());
            concerned |= known || after.is_some();
            if let Some(after) = after {
                self.frontends.insert(change.id, after.clone());
            }
        }
        concerned
    }

    /// Opens, changes and closes ports.
    async fn adjust(&mut self) {
        let node = self.config.node.borrow_and_update().clone();
        let wanted = checks(self.frontends.values(), &node.place.node);
        let listening = node.node_port_addresses.as_ref().unwrap_or(&node.addresses);
        let addresses: BTreeSet<IpAddr> = listening.iter().copied().collect();
        self.open.retain(|port, open| {
            open.listeners.retain(|address, token| {
                let keep = wanted.contains_key(port) && addresses.contains(address);
                if !keep {
                    token.cancel();
                }
                keep
            });
            wanted.contains_key(port)
        });
        let mut failed = BTreeSet::new();
        for (port, check) in wanted {
            let open = self
                .open
                .entry(port)
                .or_insert_with(|| Open { check: Arc::new(RwLock::new(check.clone())), listeners: BTreeMap::new() });
            *open.check.write().unwrap_or_else(PoisonError::into_inner) = check.clone();
            for address in &addresses {
                if open.listeners.contains_key(address) {
                    continue;
                }
                let at = SocketAddr::new(*address, port.get());
                match listen(self.config.namespace.as_ref(), at) {
                    Ok(listener) => {
                        let token = self.token.child_token();
                        let respond = respond(open.check.clone(), self.config.health.clone());
                        self.tasks.spawn(serve(listener, respond, token.clone()));
                        open.listeners.insert(*address, token);
                    }
                    Err(error) => {
                        failed.insert(at);
                        if !self.failed.contains(&at) {
                            tell(self.config.events.as_ref(), &check.service, at, &error);
                        }
                    }
                }
            }
        }
        self.failed = failed;
    }
}

fn respond(check: Arc<RwLock<Check>>, health: Arc<Health>) -> Respond {
    Arc::new(move |_| check.read().unwrap_or_else(PoisonError::into_inner).answer(health.is_live()))
}

fn listen(namespace: Option<&Netns>, at: SocketAddr) -> Result<TcpListener, String> {
    let listener = match namespace {
        Some(namespace) => namespace.tcp_listen(at).map_err(|error| error.to_string())?,
        None => {
            let listener = std::net::TcpListener::bind(at).map_err(|error| format!("listen on {at}: {error}"))?;
            listener.set_nonblocking(true).map_err(|error| error.to_string())?;
            listener
        }
    };
    TcpListener::from_std(listener).map_err(|error| error.to_string())
}

fn tell(events: Option<&Recorder>, (namespace, name): &Service, at: SocketAddr, error: &str) {
    let message = format!(
        "the health check port {} of {namespace}/{name} cannot be opened on this node: {error}; load balancers will \
         not send traffic here",
        at.port()
    );
    tracing::warn!("proxy: {message}");
    if let Some(events) = events {
        let about = ObjectRef::new("v1", "Service", namespace, name, "");
        events.event(&about, EventKind::Warning, "FailedToStartServiceHealthcheck", message);
    }
}
