//! Follows what names depend on besides Services, and whether the API answers at all.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use api::Resource;
use api::kinds::{NAMESPACES, PODS};
use api::object::Metadata;
use dns::Objects;
use http::Request;
use kube::client::Body;
use reconcile::{Change, Scope};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Since when no request was answered; `None` while they are.
pub type Outage = watch::Receiver<Option<Instant>>;

/// The same client, and what becomes of its requests.
pub fn observed(client: kube::Client) -> (kube::Client, Outage) {
    let (sender, receiver) = watch::channel(None);
    let sender = Arc::new(sender);
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, sender) = (client.clone(), sender.clone());
        async move {
            let answer = client.send(request).await;
            let is_answered = answer.as_ref().is_ok_and(|answer| !answer.status().is_server_error());
            sender.send_if_modified(|since| {
                let changed = since.is_none() != is_answered;
                if changed {
                    *since = (!is_answered).then(Instant::now);
                }
                changed
            });
            answer
        }
    });
    (kube::Client::new(service, "default"), receiver)
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Named {
    metadata: Metadata,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Pod {
    metadata: Metadata,
    status: PodStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodStatus {
    phase: String,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

impl Pod {
    /// None once it has ended: its addresses are free for others.
    fn addresses(&self) -> Vec<IpAddr> {
        if matches!(self.status.phase.as_str(), "Succeeded" | "Failed") {
            return Vec::new();
        }
        self.status.pod_ips.iter().filter_map(|held| held.ip.parse().ok()).collect()
    }
}

/// What has to be listed and watched.
pub fn resources(with_pods: bool) -> Vec<&'static Resource> {
    if with_pods { vec![&NAMESPACES, &PODS] } else { vec![&NAMESPACES] }
}

/// Keeps the objects true until the token is cancelled.
pub async fn follow(client: kube::Client, objects: Arc<Objects>, with_pods: bool, token: CancellationToken) {
    let mut namespaces: mpsc::Receiver<Change<Named>> = reconcile::watch(&client, &NAMESPACES, Scope::all());
    let mut pods: Option<mpsc::Receiver<Change<Pod>>> =
        with_pods.then(|| reconcile::watch(&client, &PODS, Scope::all()));
    loop {
        let pod = async {
            match &mut pods {
                Some(pods) => pods.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            change = namespaces.recv() => match change {
                Some(change) => take_namespace(&objects, change),
                None => return,
            },
            change = pod => match change {
                Some(change) => take_pod(&objects, change),
                None => return,
            },
            () = token.cancelled() => return,
        }
    }
}

fn take_namespace(objects: &Objects, change: Change<Named>) {
    match change {
        Change::Reset(all) => objects.set_namespaces(all.into_iter().map(|one| one.metadata.name).collect()),
        Change::Apply(one) => objects.set_namespace(&one.metadata.name, true),
        Change::Delete(one) => objects.set_namespace(&one.metadata.name, false),
    }
}

fn take_pod(objects: &Objects, change: Change<Pod>) {
    let set = |pod: &Pod| objects.set_pod(&pod.metadata.namespace, &pod.metadata.name, &pod.addresses());
    match change {
        Change::Reset(all) => {
            let names: HashSet<(&str, &str)> =
                all.iter().map(|pod| (pod.metadata.namespace.as_str(), pod.metadata.name.as_str())).collect();
            objects.retain_pods(|namespace, name| names.contains(&(namespace, name)));
            all.iter().for_each(set);
        }
        Change::Apply(pod) => set(&pod),
        Change::Delete(pod) => objects.set_pod(&pod.metadata.namespace, &pod.metadata.name, &[]),
    }
}
