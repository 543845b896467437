//! What names depend on besides Services: namespaces that exist, and addresses that pods have.
//!
//! Whoever starts DNS may keep these true. Without namespaces, those count that have a Service; without pods, no address
//! can be verified.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{PoisonError, RwLock};

/// Namespaces and pods, shared by who follows the API and who answers.
#[derive(Default)]
pub struct Objects {
    /// `None` until the first list is in.
    namespaces: RwLock<Option<HashSet<String>>>,
    pods: RwLock<Pods>,
}

#[derive(Default)]
struct Pods {
    /// By `namespace/name`.
    addresses: HashMap<String, (String, Vec<IpAddr>)>,
    /// How many pods of a namespace have an address: while one goes and another comes there may be two.
    holders: HashMap<(IpAddr, String), u32>,
}

impl Objects {
    /// The names of all namespaces.
    pub fn set_namespaces(&self, names: HashSet<String>) {
        *self.namespaces.write().unwrap_or_else(PoisonError::into_inner) = Some(names);
    }

    pub fn set_namespace(&self, name: &str, exists: bool) {
        let mut namespaces = self.namespaces.write().unwrap_or_else(PoisonError::into_inner);
        let names = namespaces.get_or_insert_default();
        if exists {
            names.insert(name.to_owned());
        } else {
            names.remove(name);
        }
    }

    /// `None`: nobody follows namespaces.
    pub(crate) fn has_namespace(&self, name: &str) -> Option<bool> {
        let namespaces = self.namespaces.read().unwrap_or_else(PoisonError::into_inner);
        namespaces.as_ref().map(|names| names.contains(name))
    }

    /// The addresses that a pod has now; none when it has ended or is gone.
    pub fn set_pod(&self, namespace: &str, name: &str, addresses: &[IpAddr]) {
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        let pod = format!("{namespace}/{name}");
        let before = match addresses {
            [] => pods.addresses.remove(&pod),
            held => pods.addresses.insert(pod, (namespace.to_owned(), held.to_vec())),
        };
        for address in addresses {
            *pods.holders.entry((*address, namespace.to_owned())).or_default() += 1;
        }
        for holder in before.into_iter().flat_map(|(space, held)| held.into_iter().map(move |ip| (ip, space.clone()))) {
            if let Some(count) = pods.holders.get_mut(&holder) {
                *count -= 1;
                if *count == 0 {
                    pods.holders.remove(&holder);
                }
            }
        }
    }

    /// Forgets the pods that a fresh list no longer has.
    pub fn retain_pods(&self, keep: impl Fn(&str, &str) -> bool) {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        let split = |pod: &str| pod.split_once('/').map(|(space, name)| (space.to_owned(), name.to_owned()));
        let known: Vec<(String, String)> = pods.addresses.keys().filter_map(|pod| split(pod)).collect();
        drop(pods);
        for (namespace, name) in known.iter().filter(|(namespace, name)| !keep(namespace, name)) {
            self.set_pod(namespace, name, &[]);
        }
    }

    pub(crate) fn is_pod(&self, namespace: &str, address: IpAddr) -> bool {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        pods.holders.contains_key(&(address, namespace.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_known_while_some_pod_has_it() {
        let objects = Objects::default();
        let ip: IpAddr = "10.244.0.9".parse().expect("an address");
        objects.set_pod("a", "old", &[ip]);
        objects.set_pod("a", "new", &[ip]);
        objects.set_pod("a", "old", &[]);
        assert!(objects.is_pod("a", ip) && !objects.is_pod("b", ip));
        objects.set_pod("a", "new", &["10.244.0.10".parse().expect("an address")]);
        assert!(!objects.is_pod("a", ip));
        objects.retain_pods(|_, name| name != "new");
        assert!(objects.pods.read().expect("unpoisoned").holders.is_empty());
    }

    #[test]
    fn namespaces_are_unknown_until_they_are_told() {
        let objects = Objects::default();
        assert_eq!(objects.has_namespace("a"), None);
        objects.set_namespaces(["a".to_owned()].into());
        objects.set_namespace("b", true);
        objects.set_namespace("a", false);
        assert_eq!((objects.has_namespace("a"), objects.has_namespace("b")), (Some(false), Some(true)));
    }
}
