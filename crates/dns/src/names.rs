//! The compiled answers of all Services. One task keeps them true to the table; questions only look things up.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use services::{Changes, ServiceTable};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::compile::{Compiled, compile, key};
use crate::wire::WireName;

/// The service table and what happens to it. Subscribe before the table's first list is complete.
pub struct Feed {
    pub table: Arc<RwLock<ServiceTable>>,
    pub changes: broadcast::Receiver<Arc<Changes>>,
}

/// Compiled answers by the labels of Service and namespace.
#[derive(Default)]
pub struct Names {
    services: HashMap<Box<[u8]>, Compiled>,
    /// How many Services a namespace has, by its label.
    namespaces: HashMap<Box<[u8]>, usize>,
    pub synced: bool,
}

impl Names {
    pub fn service(&self, key: &[u8]) -> Option<&Compiled> {
        self.services.get(key)
    }

    /// Whether a namespace has a Service. The label comes with its length.
    pub fn has_namespace(&self, label: &[u8]) -> bool {
        self.namespaces.contains_key(label)
    }

    fn set(&mut self, key: Vec<u8>, compiled: Option<Compiled>) {
        let namespace: Box<[u8]> = key[usize::from(key[0]) + 1..].into();
        let exists = compiled.is_some();
        let before = match compiled {
            Some(compiled) => self.services.insert(key.into(), compiled),
            None => self.services.remove(key.as_slice()),
        };
        match (before.is_some(), exists) {
            (false, true) => *self.namespaces.entry(namespace).or_default() += 1,
            (true, false) => {
                if let Some(count) = self.namespaces.get_mut(&namespace) {
                    *count -= 1;
                    if *count == 0 {
                        self.namespaces.remove(&namespace);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Names with the one who writes them.
pub struct Compiler {
    zone: WireName,
    ttl: u32,
    table: Arc<RwLock<ServiceTable>>,
    names: Arc<RwLock<Names>>,
}

impl Compiler {
    /// Compiles all that the table has now.
    pub fn new(zone: WireName, ttl: u32, table: Arc<RwLock<ServiceTable>>) -> Self {
        let compiler = Compiler { zone, ttl, table, names: Arc::default() };
        compiler.refill();
        compiler
    }

    pub fn names(&self) -> Arc<RwLock<Names>> {
        self.names.clone()
    }

    /// Follows the table until the token is cancelled.
    pub async fn follow(self, mut changes: broadcast::Receiver<Arc<Changes>>, token: CancellationToken) {
        // What came between the subscription and now is in the table already.
        self.refill();
        while let Some(change) = token.run_until_cancelled(changes.recv()).await {
            match change {
                Ok(change) => self.apply(&change),
                Err(RecvError::Lagged(missed)) => {
                    debug!(missed, "cluster DNS compiles the whole table again");
                    self.refill();
                }
                // Whoever fed the table has ended; what is known stays true for all we know.
                Err(RecvError::Closed) => return token.cancelled().await,
            }
        }
    }

    fn table(&self) -> RwLockReadGuard<'_, ServiceTable> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, change: &Changes) {
        for (namespace, name) in &change.services {
            let Some(key) = key(namespace, name) else { continue };
            let table = self.table();
            let service = table.service(namespace, name);
            let compiled = service.and_then(|service| compile(&table, service, &self.zone, self.ttl));
            drop(table);
            self.names.write().unwrap_or_else(PoisonError::into_inner).set(key, compiled);
        }
        if change.synced {
            self.names.write().unwrap_or_else(PoisonError::into_inner).synced = true;
        }
    }

    fn refill(&self) {
        let table = self.table();
        let mut fresh = Names { synced: table.is_synced(), ..Names::default() };
        for service in table.services() {
            if let Some(key) = key(&service.namespace, &service.name) {
                fresh.set(key, compile(&table, service, &self.zone, self.ttl));
            }
        }
        drop(table);
        *self.names.write().unwrap_or_else(PoisonError::into_inner) = fresh;
    }
}
