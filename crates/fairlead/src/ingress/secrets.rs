//! Follows objects that Ingresses and Gateways name, each by its own watch: no other is ever asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use api::Resource;
use api::object::Key;
use reconcile::{Change, Scope};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Only the data of a Secret or ConfigMap.
#[derive(Deserialize)]
struct Data {
    #[serde(default)]
    data: HashMap<String, String>,
}

/// What an object's data comes to; `None`: there is no such object.
type Reading<S> = fn(Option<&HashMap<String, String>>) -> S;

/// The objects of one kind that are followed now.
pub struct Followed<S> {
    client: kube::Client,
    resource: Resource,
    read: Reading<S>,
    followed: BTreeMap<Key, CancellationToken>,
    sender: mpsc::Sender<(Key, S)>,
    token: CancellationToken,
}

impl<S: Send + 'static> Followed<S> {
    /// What is seen comes out of the receiver.
    pub fn new(
        client: kube::Client,
        resource: Resource,
        read: Reading<S>,
        token: CancellationToken,
    ) -> (Self, mpsc::Receiver<(Key, S)>) {
        let (sender, receiver) = mpsc::channel(64);
        (Followed { client, resource, read, followed: BTreeMap::new(), sender, token }, receiver)
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
                let one =
                    follow(self.client.clone(), self.resource, key.clone(), self.read, self.sender.clone(), token);
                tokio::spawn(one);
            }
        }
    }
}

async fn follow<S: Send + 'static>(
    client: kube::Client,
    resource: Resource,
    key: Key,
    read: Reading<S>,
    sender: mpsc::Sender<(Key, S)>,
    token: CancellationToken,
) {
    let field_selector = format!("metadata.name={}", key.name);
    let scope = Scope { namespace: key.namespace.clone(), field_selector, ..Scope::default() };
    let mut changes = reconcile::watch::<Data>(&client, &resource, scope);
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = token.cancelled() => return,
        };
        let state = match change {
            Some(Change::Reset(all)) => read(all.first().map(|held| &held.data)),
            Some(Change::Apply(held)) => read(Some(&held.data)),
            Some(Change::Delete(_)) => read(None),
            None => return,
        };
        // Whoever listened has ended.
        if sender.send((key.clone(), state)).await.is_err() {
            return;
        }
    }
}
