//! When the change began that a slice is written for, so that others can tell how long it took to reach the network.

use crate::conditions;
use crate::service::{Backend, Service};
use api::object::Key;
use api::time;
use jiff::Timestamp;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// What was seen of each Service when it was last looked at.
#[derive(Default)]
pub struct Triggers(Mutex<HashMap<Key, Seen>>);

#[derive(Default)]
struct Seen {
    service: Option<Timestamp>,
    pods: BTreeMap<String, Timestamp>,
}

impl Triggers {
    /// The oldest of the times that are new since the last look: a pod became ready or unready, or the Service was made.
    /// A Service that nobody has looked at yet began when it was made.
    pub fn look(&self, service: &Service, pods: &[Arc<Backend>]) -> Option<Timestamp> {
        let made = service.metadata.creation_timestamp.as_deref().and_then(time::parse);
        let turned = |pod: &Arc<Backend>| {
            let ready = conditions::find(&pod.status.conditions, "Ready")?.since()?;
            Some((pod.metadata.name.clone(), ready))
        };
        let now = Seen { service: made, pods: pods.iter().filter_map(turned).collect() };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = all.get(&service.metadata.key()) else {
            all.insert(service.metadata.key(), now);
            return made;
        };
        let news = now.pods.iter().filter(|(name, at)| before.pods.get(*name).is_none_or(|before| *at > before));
        let made = made.filter(|made| before.service.is_none_or(|before| *made > before));
        let first = news.map(|(_, at)| *at).chain(made).min();
        all.insert(service.metadata.key(), now);
        first
    }

    pub fn forget(&self, service: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(service);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn at(second: i64) -> String {
        time::seconds(Timestamp::from_second(second).expect("a time"))
    }

    fn pod(name: &str, second: i64) -> Arc<Backend> {
        let ready = json!([{"type": "Ready", "status": "True", "lastTransitionTime": at(second)}]);
        let pod = json!({"metadata": {"name": name}, "status": {"conditions": ready}});
        Arc::new(serde_json::from_value(pod).expect("the case is a pod"))
    }

    #[test]
    fn the_oldest_change_since_the_last_look() {
        let service = |made: i64| -> Service {
            serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n", "creationTimestamp": at(made)}}))
                .expect("the case is a Service")
        };
        let triggers = Triggers::default();
        let look = |made: i64, pods: &[Arc<Backend>]| triggers.look(&service(made), pods).map(|at| at.as_second());
        assert_eq!(look(10, &[pod("a", 5)]), Some(10), "a new Service began when it was made");
        assert_eq!(look(10, &[pod("a", 5)]), None, "nothing is new");
        assert_eq!(look(10, &[pod("a", 30), pod("b", 20)]), Some(20), "the older of two changes");
        assert_eq!(look(10, &[pod("b", 20)]), None, "nobody knows when a pod went");
        assert_eq!(look(40, &[pod("b", 50)]), Some(40), "it was made again");
        triggers.forget(&service(40).metadata.key());
        assert_eq!(look(40, &[pod("b", 60)]), Some(40));
    }
}
