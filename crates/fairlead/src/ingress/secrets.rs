//! Follows the Secrets that Ingresses name, each by its own watch: no other Secret is ever asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use api::kinds::SECRETS;
use api::object::Key;
use ingress::SecretState;
use reconcile::{Change, Scope};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Only what a certificate is made of.
#[derive(Deserialize)]
struct Secret {
    #[serde(default)]
    data: HashMap<String, String>,
}

/// The Secrets that are followed now.
pub struct Secrets {
    client: kube::Client,
    followed: BTreeMap<Key, CancellationToken>,
    sender: mpsc::Sender<(Key, SecretState)>,
    token: CancellationToken,
}

impl Secrets {
    /// What is seen comes out of the receiver.
    pub fn new(client: kube::Client, token: CancellationToken) -> (Self, mpsc::Receiver<(Key, SecretState)>) {
        let (sender, receiver) = mpsc::channel(64);
        (Secrets { client, followed: BTreeMap::new(), sender, token }, receiver)
    }

    /// Follows these, and no others any more.
    pub fn follow(&mut self, wanted: &BTreeSet<Key>) {
        self.followed.retain(|key, token| {
            let is_wanted = wanted.contains(key);
            if !is_wanted {
                token.cancel();
            }
            is_wanted
        });
        for key in wanted {
            if !self.followed.contains_key(key) {
                let token = self.token.child_token();
                self.followed.insert(key.clone(), token.clone());
                tokio::spawn(follow(self.client.clone(), key.clone(), self.sender.clone(), token));
            }
        }
    }
}

async fn follow(client: kube::Client, key: Key, sender: mpsc::Sender<(Key, SecretState)>, token: CancellationToken) {
    let field_selector = format!("metadata.name={}", key.name);
    let scope = Scope { namespace: key.namespace.clone(), field_selector, ..Scope::default() };
    let mut changes = reconcile::watch::<Secret>(&client, &SECRETS, scope);
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = token.cancelled() => return,
        };
        let state = match change {
            Some(Change::Reset(all)) => SecretState::of(all.first().map(|secret| &secret.data)),
            Some(Change::Apply(secret)) => SecretState::of(Some(&secret.data)),
            Some(Change::Delete(_)) => SecretState::of(None),
            None => return,
        };
        // Whoever listened has ended.
        if sender.send((key.clone(), state)).await.is_err() {
            return;
        }
    }
}
