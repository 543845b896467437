//! Follows all that routes are made of, and hands the proxy new tables. One task owns the compiler.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use api::kinds::{CONFIG_MAPS, INGRESS_CLASSES, INGRESSES, SECRETS, SERVICES};
use api::object::Key;
use ingress::gateway::CaState;
use ingress::{
    Certificates, Compiler, HeadersState, Ingress, IngressClass, LoadBalancerIngress, RouteTable, SecretState, Swap,
};
use reconcile::{Change, Scope, ServiceFeed};
use serde::Deserialize;
use services::Changes;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::report::Report;
use super::secrets::Followed;

/// How long people's news may gather before they are written; requests never wait for it.
const GATHER: Duration = Duration::from_millis(200);
/// How long the first tables wait for Secrets that do not come.
const SECRETS_PATIENCE: Duration = Duration::from_secs(3);

/// The Service whose addresses are published.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Published {
    status: PublishedStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PublishedStatus {
    load_balancer: PublishedBalancer,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PublishedBalancer {
    ingress: Vec<LoadBalancerIngress>,
}

pub struct Follower {
    client: kube::Client,
    feed: ServiceFeed,
    changes: broadcast::Receiver<Arc<Changes>>,
    compiler: Compiler,
    routes: Arc<Swap<RouteTable>>,
    certificates: Arc<Swap<Certificates>>,
    leads: watch::Receiver<bool>,
    reports: watch::Sender<Report>,
}

/// What is known by now of the first lists.
#[derive(Default)]
struct Lists {
    ingresses: bool,
    classes: bool,
}

impl Follower {
    #[allow(clippy::too_many_arguments, reason = "its parts, each from somewhere else, put together once")]
    pub fn new(
        client: kube::Client,
        feed: ServiceFeed,
        changes: broadcast::Receiver<Arc<Changes>>,
        compiler: Compiler,
        routes: Arc<Swap<RouteTable>>,
        certificates: Arc<Swap<Certificates>>,
        leads: watch::Receiver<bool>,
        reports: watch::Sender<Report>,
    ) -> Self {
        Follower { client, feed, changes, compiler, routes, certificates, leads, reports }
    }

    /// Follows until the token is cancelled; `complete` hears when the first tables are.
    pub async fn run(mut self, publish: Option<Key>, complete: oneshot::Sender<()>, token: CancellationToken) {
        let mut ingresses: mpsc::Receiver<Change<Ingress>> = reconcile::watch(&self.client, &INGRESSES, Scope::all());
        let mut classes: mpsc::Receiver<Change<IngressClass>> =
            reconcile::watch(&self.client, &INGRESS_CLASSES, Scope::all());
        let (mut secrets, mut secret_states) =
            Followed::new(self.client.clone(), SECRETS, SecretState::of, token.clone());
        let (mut config_maps, mut header_states) =
            Followed::new(self.client.clone(), CONFIG_MAPS, HeadersState::of, token.clone());
        let (mut authorities, mut authority_states) =
            Followed::new(self.client.clone(), SECRETS, CaState::of_secret, token.clone());
        let mut published = publish.as_ref().map(|key| {
            let field_selector = format!("metadata.name={}", key.name);
            let scope = Scope { namespace: key.namespace.clone(), field_selector, ..Scope::default() };
            reconcile::watch::<Published>(&self.client, &SERVICES, scope)
        });
        let (mut complete, mut lists) = (Some(complete), Lists::default());
        let mut addresses: Option<Vec<LoadBalancerIngress>> = None;
        let mut report_at: Option<Instant> = None;
        let mut secrets_by: Option<Instant> = None;
        loop {
            let report = sleep_until(report_at);
            let late = sleep_until(secrets_by);
            let service = async {
                match &mut published {
                    Some(published) => published.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                change = ingresses.recv() => match change {
                    Some(change) => {
                        lists.ingresses |= matches!(change, Change::Reset(_));
                        self.take_ingress(change);
                    }
                    None => return,
                },
                change = classes.recv() => match change {
                    Some(change) => {
                        lists.classes |= matches!(change, Change::Reset(_));
                        self.take_class(change);
                    }
                    None => return,
                },
                change = self.changes.recv() => match change {
                    Ok(changes) => changes.services.iter().for_each(|(namespace, name)| {
                        self.compiler.service_changed(namespace, name);
                    }),
                    Err(broadcast::error::RecvError::Lagged(_)) => self.compiler.all_services_changed(),
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                Some((key, state)) = secret_states.recv() => self.compiler.set_secret(&key, state),
                Some((key, state)) = authority_states.recv() => self.compiler.set_authorities(&key, state),
                Some((key, state)) = header_states.recv() => self.compiler.set_config_map(&key, state),
                change = service => match change {
                    Some(Change::Reset(mut all)) => addresses = Some(all.pop().map(balanced).unwrap_or_default()),
                    Some(Change::Apply(one)) => addresses = Some(balanced(one)),
                    Some(Change::Delete(_)) => addresses = Some(Vec::new()),
                    None => published = None,
                },
                changed = self.leads.changed() => if changed.is_err() { return },
                () = late => {}
                () = report => {
                    report_at = None;
                    self.report(addresses.clone());
                    continue;
                }
            }
            if let Some(wanted) = self.compiler.new_secrets() {
                secrets.follow(&wanted);
            }
            if let Some(wanted) = self.compiler.new_authorities() {
                authorities.follow(&wanted);
            }
            if let Some(wanted) = self.compiler.new_config_maps() {
                config_maps.follow(&wanted);
            }
            if complete.is_none() {
                self.publish();
                report_at.get_or_insert_with(|| Instant::now() + GATHER);
                continue;
            }
            // The first tables: all at once, so that no client sees a part of them.
            if lists.ingresses && lists.classes && self.is_synced() {
                let has_secrets = !self.compiler.waits_for_secrets();
                let by = *secrets_by.get_or_insert_with(|| Instant::now() + SECRETS_PATIENCE);
                if has_secrets || Instant::now() >= by {
                    secrets_by = None;
                    self.compiler.all_services_changed();
                    self.publish();
                    report_at = Some(Instant::now() + GATHER);
                    if let Some(complete) = complete.take() {
                        // Nobody waits any more when the proxy is ending.
                        complete.send(()).ok();
                    }
                }
            }
        }
    }

    fn is_synced(&self) -> bool {
        self.feed.table.read().unwrap_or_else(PoisonError::into_inner).is_synced()
    }

    fn publish(&mut self) {
        if let Some(routes) = self.compiler.routes() {
            self.routes.store(Arc::new(routes));
        }
        if let Some(certificates) = self.compiler.certificates() {
            self.certificates.store(Arc::new(certificates));
        }
    }

    /// Only who holds the Lease has anything to say.
    fn report(&self, addresses: Option<Vec<LoadBalancerIngress>>) {
        let report = match *self.leads.borrow() {
            true => Report {
                ingresses: self.compiler.ingresses().map(|one| (one.key(), one.clone())).collect(),
                faults: self.compiler.faults(),
                addresses,
            },
            false => Report::default(),
        };
        self.reports.send_replace(report);
    }

    fn take_ingress(&mut self, change: Change<Ingress>) {
        match change {
            Change::Reset(all) => {
                let keys: std::collections::BTreeSet<Key> = all.iter().map(Ingress::key).collect();
                self.compiler.retain_ingresses(|key| keys.contains(key));
                all.into_iter().for_each(|one| self.compiler.set_ingress(one));
            }
            Change::Apply(one) => self.compiler.set_ingress(one),
            Change::Delete(one) => self.compiler.remove_ingress(&one.key()),
        }
    }

    fn take_class(&mut self, change: Change<IngressClass>) {
        match change {
            Change::Reset(all) => {
                let names: std::collections::BTreeSet<String> =
                    all.iter().map(|class| class.metadata.name.clone()).collect();
                self.compiler.retain_classes(|name| names.contains(name));
                all.into_iter().for_each(|one| self.compiler.set_class(one));
            }
            Change::Apply(one) => self.compiler.set_class(one),
            Change::Delete(one) => self.compiler.remove_class(&one.metadata.name),
        }
    }
}

fn balanced(service: Published) -> Vec<LoadBalancerIngress> {
    service.status.load_balancer.ingress
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
