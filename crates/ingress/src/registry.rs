//! What routes refer to, handed out so that two that mean the same share it: upstreams with what is known of their endpoints,
//! and counts that outlive a change of their route.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use services::ServiceTable;

use crate::counts::RouteCounts;
use crate::route::RouteName;
use crate::translate::Register;
use crate::upstream::{Upstream, UpstreamKey, Upstreams};

#[derive(Default)]
pub struct Registry {
    upstreams: Upstreams,
    counts: HashMap<RouteName, Weak<RouteCounts>>,
}

impl Registry {
    pub fn refresh(&mut self, namespace: &str, name: &str, table: &ServiceTable) {
        self.upstreams.refresh(namespace, name, table);
    }

    pub fn refresh_all(&mut self, table: &ServiceTable) {
        self.upstreams.refresh_all(table);
    }

    pub fn upstreams(&self) -> impl Iterator<Item = Arc<Upstream>> + '_ {
        self.upstreams.iter()
    }

    /// Forgets counts that nobody holds any more, when there are many beside those of `held` objects.
    pub fn tidy(&mut self, held: usize) {
        if self.counts.len() > 2 * held.max(512) {
            self.counts.retain(|_, held| held.strong_count() > 0);
        }
    }
}

/// A registry, and the table that new upstreams are looked up in.
pub struct Registering<'a> {
    pub registry: &'a mut Registry,
    pub table: &'a ServiceTable,
}

impl Register for Registering<'_> {
    fn upstream(&mut self, key: &UpstreamKey) -> Arc<Upstream> {
        self.registry.upstreams.get(key, self.table)
    }

    fn counts(&mut self, name: &RouteName) -> Arc<RouteCounts> {
        if let Some(held) = self.registry.counts.get(name).and_then(Weak::upgrade) {
            return held;
        }
        let made = Arc::default();
        self.registry.counts.insert(name.clone(), Arc::downgrade(&made));
        made
    }
}
