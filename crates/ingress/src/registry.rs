//! What routes refer to, handed out so that two that mean the same share it: upstreams with what is known of their endpoints,
//! and counts that outlive a change of their route.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use api::object::Key;
use services::ServiceTable;

use crate::basic::Users;
use crate::counts::RouteCounts;
use crate::route::RouteName;
use crate::swap::Swap;
use crate::translate::Register;
use crate::upstream::{Upstream, UpstreamKey, Upstreams};

#[derive(Default)]
pub struct Registry {
    upstreams: Upstreams,
    counts: HashMap<RouteName, Weak<RouteCounts>>,
    users: HashMap<Key, Weak<Swap<Option<Arc<Users>>>>>,
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

    /// Says who the users of a Secret are now, to the routes that ask for them.
    pub fn set_users(&mut self, secret: &Key, users: Option<Arc<Users>>) {
        if let Some(held) = self.users.get(secret).and_then(Weak::upgrade) {
            held.store(Arc::new(users));
        }
    }

    /// Forgets counts that nobody holds any more, when there are many beside those of `held` objects.
    pub fn tidy(&mut self, held: usize) {
        if self.counts.len() > 2 * held.max(512) {
            self.counts.retain(|_, held| held.strong_count() > 0);
        }
        self.users.retain(|_, held| held.strong_count() > 0);
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

    fn users(&mut self, secret: &Key) -> Arc<Swap<Option<Arc<Users>>>> {
        if let Some(held) = self.registry.users.get(secret).and_then(Weak::upgrade) {
            return held;
        }
        let made = Arc::default();
        self.registry.users.insert(secret.clone(), Arc::downgrade(&made));
        made
    }
}
