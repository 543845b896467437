//! What is known of one kind, as narrow structs, kept true by a watch.

use crate::watch::{Change, Scope, watch};
use ::api::Resource;
use ::api::object::{Key, Metadata};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use tokio_util::sync::CancellationToken;

/// A narrow struct of an object: what is kept of it, with its metadata.
pub trait Named {
    fn metadata(&self) -> &Metadata;
}

/// A read handle on the objects of one kind.
pub struct Cache<T> {
    objects: Arc<RwLock<BTreeMap<Key, Arc<T>>>>,
    synced: tokio::sync::watch::Receiver<bool>,
}

impl<T> Clone for Cache<T> {
    fn clone(&self) -> Self {
        Cache { objects: self.objects.clone(), synced: self.synced.clone() }
    }
}

impl<T> Cache<T> {
    pub fn get(&self, key: &Key) -> Option<Arc<T>> {
        self.objects.read().expect("no writer panics while it holds the lock").get(key).cloned()
    }

    /// In order of namespace and name.
    pub fn list(&self) -> Vec<Arc<T>> {
        self.objects.read().expect("no writer panics while it holds the lock").values().cloned().collect()
    }

    pub fn list_namespace(&self, namespace: &str) -> Vec<Arc<T>> {
        let objects = self.objects.read().expect("no writer panics while it holds the lock");
        objects
            .range(Key::new(namespace, "")..)
            .take_while(|(key, _)| key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Returns once the first list has arrived.
    pub async fn synced(&self) {
        let mut synced = self.synced.clone();
        // The sender lives as long as the watch task; its end means shutdown.
        let _ended = synced.wait_for(|synced| *synced).await;
    }

    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }
}

/// Watches a kind into a cache. `on_change` sees each object before and after, once the cache holds the new state.
pub fn feed<T, F>(
    client: &kube::Client,
    resource: &Resource,
    scope: Scope,
    token: &CancellationToken,
    on_change: F,
) -> Cache<T>
where
    T: Named + DeserializeOwned + Send + Sync + 'static,
    F: Fn(Option<&Arc<T>>, Option<&Arc<T>>) + Send + 'static,
{
    let objects: Arc<RwLock<BTreeMap<Key, Arc<T>>>> = Arc::default();
    let (sender, synced) = tokio::sync::watch::channel(false);
    let mut changes = watch::<T>(client, resource, scope);
    let (writer, token) = (objects.clone(), token.clone());
    tokio::spawn(async move {
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = token.cancelled() => return,
            };
            let Some(change) = change else { return };
            let lock = || writer.write().expect("no writer panics while it holds the lock");
            match change {
                Change::Reset(items) => {
                    let fresh: BTreeMap<Key, Arc<T>> =
                        items.into_iter().map(|o| (o.metadata().key(), Arc::new(o))).collect();
                    let old = std::mem::replace(&mut *lock(), fresh.clone());
                    sender.send_replace(true);
                    for (key, before) in &old {
                        if !fresh.contains_key(key) {
                            on_change(Some(before), None);
                        }
                    }
                    for (key, after) in &fresh {
                        on_change(old.get(key), Some(after));
                    }
                }
                Change::Apply(object) => {
                    let after = Arc::new(object);
                    let before = lock().insert(after.metadata().key(), after.clone());
                    on_change(before.as_ref(), Some(&after));
                }
                Change::Delete(object) => {
                    let before = lock().remove(&object.metadata().key());
                    on_change(Some(&before.unwrap_or_else(|| Arc::new(object))), None);
                }
            }
        }
    });
    Cache { objects, synced }
}
