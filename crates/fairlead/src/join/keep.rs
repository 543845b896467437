//! Keeps a running node's certificates fresh.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use api::kinds;
use kube::client::Body;
use reconcile::{Change, Scope, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Files, NodeIdentity, connect, obtain, save, user};
use crate::pki::{CertifiedKey, Rotating, San};
use crate::signer::{KUBELET_CLIENT, KUBELET_SERVING, NodeAddresses};

/// What a running node uses; both follow renewals.
pub struct Kept {
    pub client: kube::Client,
    pub serving: Arc<Rotating>,
    /// Ends when the token given to `keep_renewed` is cancelled.
    pub task: JoinHandle<()>,
}

impl NodeIdentity {
    /// Renews the node's certificates at four fifths of their lives, and asks for a serving certificate with the node's
    /// addresses once the Node object has them.
    pub fn keep_renewed(&self, server_url: &str, token: CancellationToken) -> anyhow::Result<Kept> {
        let current = Arc::new(Mutex::new(self.client(server_url)?));
        let client = switching(current.clone());
        let serving = Rotating::new(&self.serving)?;
        let mut sans = vec![San::Name(self.node.clone())];
        sans.extend(self.addresses.iter().copied().map(San::from));
        let keeper = Keeper {
            node: self.node.clone(),
            server_url: server_url.to_string(),
            ca_pem: self.ca_pem.clone(),
            files: Files::of(&self.dir),
            sans,
            current,
            client: client.clone(),
            held: CertifiedKey::from_pem(self.client_cert_pem.as_bytes(), self.client_key_pem.as_bytes())?,
            serving: self.serving.clone(),
            rotating: serving.clone(),
        };
        let task = tokio::spawn(async move {
            tokio::select! {
                () = keeper.run() => {}
                () = token.cancelled() => {}
            }
        });
        Ok(Kept { client, serving, task })
    }
}

/// A client whose inner client may be replaced under it.
fn switching(current: Arc<Mutex<kube::Client>>) -> kube::Client {
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let client = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        async move { client.send(request).await }
    });
    kube::Client::new(service, "default")
}

/// Owns a running node's certificates.
struct Keeper {
    node: String,
    server_url: String,
    ca_pem: String,
    files: Files,
    sans: Vec<San>,
    current: Arc<Mutex<kube::Client>>,
    client: kube::Client,
    held: CertifiedKey,
    serving: CertifiedKey,
    rotating: Arc<Rotating>,
}

impl Keeper {
    async fn run(mut self) {
        let mut nodes = None;
        loop {
            let names_all = self.names_all();
            if names_all {
                nodes = None;
            } else if nodes.is_none() {
                let scope = Scope::fields(format!("metadata.name={}", self.node));
                nodes = Some(watch::<NodeAddresses>(&self.client, &kinds::NODES, scope));
            }
            let done = tokio::select! {
                () = until(self.held.renew_at()) => self.renew_client().await,
                () = until(self.serving.renew_at()) => self.renew_serving().await,
                change = next(&mut nodes) => match change {
                    Some(node) if self.sans[1..].iter().all(|san| node.sans().contains(san)) => {
                        self.renew_serving().await
                    }
                    _ => Ok(()),
                },
            };
            if let Err(error) = done {
                warn!(error = format!("{error:#}"), "a certificate of this node could not be renewed; will try again");
                tokio::time::sleep(Duration::from_secs(60)).await;
                // The watch is begun anew, and tells the addresses again.
                nodes = None;
            }
        }
    }

    fn names_all(&self) -> bool {
        let named = self.serving.sans();
        self.sans.iter().all(|san| named.contains(san))
    }

    async fn renew_client(&mut self) -> anyhow::Result<()> {
        let new = obtain(&self.client, &self.node, KUBELET_CLIENT, &[]).await?;
        let next = connect(&self.server_url, &self.ca_pem, &user(&new))?;
        save(&self.files.client, &new)?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.held = new;
        info!("the node's client certificate is renewed");
        Ok(())
    }

    async fn renew_serving(&mut self) -> anyhow::Result<()> {
        let new = obtain(&self.client, &self.node, KUBELET_SERVING, &self.sans).await?;
        save(&self.files.serving, &new)?;
        self.rotating.replace(&new)?;
        self.serving = new;
        info!("the node's serving certificate is renewed");
        Ok(())
    }
}

async fn until(at: Option<SystemTime>) {
    match at {
        Some(at) => tokio::time::sleep(at.duration_since(SystemTime::now()).unwrap_or_default()).await,
        None => std::future::pending().await,
    }
}

/// The node's next state; never, when nobody waits for it.
async fn next(nodes: &mut Option<tokio::sync::mpsc::Receiver<Change<NodeAddresses>>>) -> Option<NodeAddresses> {
    let Some(receiver) = nodes else { return std::future::pending().await };
    match receiver.recv().await {
        Some(Change::Reset(mut all)) => all.pop(),
        Some(Change::Apply(node)) => Some(node),
        Some(Change::Delete(_)) => None,
        None => {
            *nodes = None;
            None
        }
    }
}
