//! Gives every namespace its service account `default`.

use crate::plain::Plain;
use crate::plan::{Change, act, settled};
use crate::{Context, Descriptor};
use api::kinds::{NAMESPACES, SERVICE_ACCOUNTS};
use api::object::Key;
use reconcile::{Outcome, Queue, Scope, feed, run_queue};
use serde_json::json;
use std::sync::Arc;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "service-account",
    watches: &[NAMESPACES, SERVICE_ACCOUNTS],
    writes: &[SERVICE_ACCOUNTS],
    run: |context| Box::pin(run(context)),
};

const NAME: &str = "default";

fn plan(namespace: &Plain, account: Option<&Plain>) -> Option<Change> {
    if namespace.metadata.is_deleting() || account.is_some() {
        return None;
    }
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": NAME, "namespace": namespace.metadata.name},
    });
    Some(Change::Create(SERVICE_ACCOUNTS, account))
}

async fn run(context: Context) {
    let Context { client, token, .. } = context;
    let queue: Queue<Key> = Queue::default();
    let adds = queue.clone();
    let namespaces = feed::<Plain, _>(&client, &NAMESPACES, Scope::all(), &token, move |_, after| {
        if let Some(namespace) = after {
            adds.add(namespace.metadata.key());
        }
    });
    let (adds, scope) = (queue.clone(), Scope::fields(format!("metadata.name={NAME}")));
    let accounts = feed::<Plain, _>(&client, &SERVICE_ACCOUNTS, scope, &token, move |before, after| {
        if let (Some(gone), None) = (before, after) {
            adds.add(Key::new("", &gone.metadata.namespace));
        }
    });
    namespaces.synced().await;
    accounts.synced().await;
    run_queue("service-account", queue, 2, token, move |key: Key| {
        let (client, namespaces, accounts) = (client.clone(), namespaces.clone(), accounts.clone());
        async move {
            let Some(namespace) = namespaces.get(&key) else { return Ok(Outcome::Done) };
            let account: Option<Arc<Plain>> = accounts.get(&Key::new(&key.name, NAME));
            let Some(change) = plan(&namespace, account.as_deref()) else { return Ok(Outcome::Done) };
            settled(act(&client, &change).await)
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_namespace_gets_its_account() {
        let named = |value| serde_json::from_value::<Plain>(value).expect("the case is an object");
        let living = named(json!({"metadata": {"name": "a"}}));
        let dying = named(json!({"metadata": {"name": "a", "deletionTimestamp": "2026-01-01T00:00:00Z"}}));
        assert!(matches!(plan(&living, None), Some(Change::Create(r, _)) if r.plural == "serviceaccounts"));
        assert_eq!(plan(&living, Some(&Plain::default())), None);
        assert_eq!(plan(&dying, None), None);
    }
}
