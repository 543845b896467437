//! What routes refer to, handed out so that two that mean the same share it: upstreams with what is known of their endpoints,
//! counts that outlive a change of their route, and what was read from Secrets and ConfigMaps.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};

use api::object::Key;
use services::ServiceTable;
use tokio_rustls::rustls::RootCertStore;

use crate::basic::Users;
use crate::counts::RouteCounts;
use crate::gateway::CaState;
use crate::headers::SetHeaders;
use crate::route::RouteName;
use crate::swap::Swap;
use crate::translate::Register;
use crate::upstream::{Upstream, UpstreamKey, Upstreams};

/// What an object says at any time; `None` as long as it is not there or makes no sense.
pub type Slot<T> = Arc<Swap<Option<Arc<T>>>>;

/// The slots that any route holds, by object.
struct Slots<T>(HashMap<Key, Weak<Swap<Option<Arc<T>>>>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Slots(HashMap::new())
    }
}

impl<T> Slots<T> {
    fn get(&mut self, key: &Key) -> Slot<T> {
        if let Some(held) = self.0.get(key).and_then(Weak::upgrade) {
            return held;
        }
        let made = Slot::<T>::default();
        self.0.insert(key.clone(), Arc::downgrade(&made));
        made
    }

    fn set(&self, key: &Key, value: Option<Arc<T>>) {
        if let Some(held) = self.0.get(key).and_then(Weak::upgrade) {
            held.store(Arc::new(value));
        }
    }

    fn tidy(&mut self) {
        self.0.retain(|_, held| held.strong_count() > 0);
    }
}

#[derive(Default)]
pub struct Registry {
    upstreams: Upstreams,
    counts: HashMap<RouteName, Weak<RouteCounts>>,
    users: Slots<Users>,
    headers: Slots<SetHeaders>,
    /// Of Secrets, as they were last seen.
    authorities: HashMap<Key, CaState>,
}

impl Registry {
    /// Says which authorities a Secret holds now, to what is translated from now on.
    pub fn set_authorities(&mut self, secret: &Key, state: CaState) {
        self.authorities.insert(secret.clone(), state);
    }

    pub fn authorities(&self, secret: &Key) -> &CaState {
        self.authorities.get(secret).unwrap_or(&CaState::Unknown)
    }

    pub fn keep_authorities(&mut self, wanted: &BTreeSet<Key>) {
        self.authorities.retain(|key, _| wanted.contains(key));
    }

    pub fn refresh(&mut self, namespace: &str, name: &str, table: &ServiceTable) {
        self.upstreams.refresh(namespace, name, table);
    }

    pub fn refresh_all(&mut self, table: &ServiceTable) {
        self.upstreams.refresh_all(table);
    }

    pub fn upstreams(&self) -> impl Iterator<Item = Arc<Upstream>> + '_ {
        self.upstreams.iter()
    }

    /// Whether backends of the kind ExternalName lead anywhere, for those that are named from now on.
    pub fn follow_names(&mut self, follows: bool) {
        self.upstreams.follows_names = follows;
    }

    /// Says who the users of a Secret are now, to the routes that ask for them.
    pub fn set_users(&mut self, secret: &Key, users: Option<Arc<Users>>) {
        self.users.set(secret, users);
    }

    /// Says which headers a ConfigMap holds now, to the routes that set them.
    pub fn set_headers(&mut self, config_map: &Key, headers: Option<Arc<SetHeaders>>) {
        self.headers.set(config_map, headers);
    }

    /// Forgets counts that nobody holds any more, when there are many beside those of `held` objects.
    pub fn tidy(&mut self, held: usize) {
        if self.counts.len() > 2 * held.max(512) {
            self.counts.retain(|_, held| held.strong_count() > 0);
        }
        self.users.tidy();
        self.headers.tidy();
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

    fn users(&mut self, secret: &Key) -> Slot<Users> {
        self.registry.users.get(secret)
    }

    fn authorities(&self, secret: &Key) -> Option<Arc<RootCertStore>> {
        match self.registry.authorities(secret) {
            CaState::Good(roots) => Some(roots.clone()),
            CaState::Unknown | CaState::Missing | CaState::Broken(_) => None,
        }
    }

    fn headers(&mut self, config_map: &Key) -> Slot<SetHeaders> {
        self.registry.headers.get(config_map)
    }
}
