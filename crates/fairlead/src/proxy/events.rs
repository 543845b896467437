//! What people hear of a node's proxy, as events at its Services and at its Node.

use std::collections::BTreeSet;

use proxy::Status;
use reconcile::{EventKind, ObjectRef, Recorder};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn service(namespace: &str, name: &str) -> ObjectRef {
    ObjectRef::new("v1", "Service", namespace, name, "")
}

/// Writes events about an endpoint that left the pick of this node, or is back in it.
pub fn tell(recorder: &Recorder, notice: proxy::Notice) {
    let (address, _) = notice.endpoint;
    for (namespace, name) in &notice.services {
        let about = service(namespace, name);
        match notice.ejected {
            Some(evidence) => {
                let message = format!("endpoint {address} gets no new connections from this node: {evidence}");
                recorder.event(&about, EventKind::Warning, "EndpointEjected", message);
            }
            None => {
                let message = format!("endpoint {address} answers again");
                recorder.event(&about, EventKind::Normal, "EndpointReturned", message);
            }
        }
    }
}

/// An event, as a value: beside what, of which kind, why, and in which words.
type Event = (ObjectRef, EventKind, &'static str, String);

/// What was told already.
#[derive(Default)]
struct Told {
    error: Option<String>,
    repairs: u64,
    /// Services, and what of them the mode cannot do.
    unsupported: BTreeSet<(String, String, &'static str)>,
}

impl Told {
    /// What is new in this status.
    fn news(&mut self, status: &Status, node: &ObjectRef) -> Vec<Event> {
        let mut news = Vec::new();
        if status.error != self.error {
            news.push(match &status.error {
                Some(error) => (node.clone(), EventKind::Warning, "ProxyRulesFailed", error.clone()),
                None => {
                    let text = "the rules are in the kernel again";
                    (node.clone(), EventKind::Normal, "ProxyRulesCommitted", text.to_owned())
                }
            });
            self.error.clone_from(&status.error);
        }
        if status.repairs > self.repairs {
            let text = "somebody else changed the proxy's own rules; they have been made right";
            news.push((node.clone(), EventKind::Warning, "ProxyRulesRepaired", text.to_owned()));
        }
        self.repairs = status.repairs;
        // Once of each Service and reason, however many ports it has.
        let all = status.unsupported.values().flat_map(|one| {
            let (namespace, name) = (&one.name.namespace, &one.name.service);
            one.what.iter().map(move |what| (namespace.to_string(), name.to_string(), *what))
        });
        let unsupported: BTreeSet<_> = all.collect();
        for (namespace, name, what) in unsupported.difference(&self.unsupported) {
            let about = service(namespace, name);
            news.push((about, EventKind::Warning, "NotSupportedByProxyMode", (*what).to_owned()));
        }
        self.unsupported = unsupported;
        news
    }
}

/// Events for each error, repair and unmet wish that is new, until cancelled.
pub async fn follow(mut status: watch::Receiver<Status>, events: Recorder, node: ObjectRef, token: CancellationToken) {
    let mut told = Told::default();
    loop {
        let news = told.news(&status.borrow_and_update(), &node);
        for (about, kind, reason, message) in news {
            events.event(&about, kind, reason, message);
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = token.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy::Unsupported;
    use services::{FrontendId, PortName, Protocol};

    use super::*;

    #[test]
    fn each_service_hears_once_of_each_reason() {
        let node = ObjectRef::new("v1", "Node", "", "n1", "n1");
        let port = |service: &str, port: &str, what: &[&'static str]| Unsupported {
            name: PortName {
                namespace: "shop".into(),
                service: service.into(),
                port: port.into(),
                protocol: Protocol::Sctp,
            },
            what: what.to_vec(),
        };
        let mut told = Told::default();
        let mut status = Status::default();
        let mut look = |status: &Status| -> Vec<String> {
            let news = told.news(status, &node);
            news.into_iter()
                .map(|(about, _, reason, text)| format!("{}/{} {reason}: {text}", about.kind, about.name))
                .collect()
        };
        assert!(look(&status).is_empty());
        status.unsupported.insert(FrontendId(1), port("db", "a", &["no SCTP"]));
        status.unsupported.insert(FrontendId(2), port("db", "b", &["no SCTP", "no end policy"]));
        let expected = ["no SCTP", "no end policy"].map(|what| format!("Service/db NotSupportedByProxyMode: {what}"));
        assert_eq!(look(&status), expected);
        status.commits += 1;
        assert!(look(&status).is_empty(), "nothing is new");
        status.unsupported.clear();
        status.repairs = 2;
        status.error = Some("no room".into());
        assert_eq!(look(&status).len(), 2, "an error, and a repair");
        status.error = None;
        status.unsupported.insert(FrontendId(3), port("db", "c", &["no SCTP"]));
        assert_eq!(look(&status).len(), 2, "all is well but for a Service that asks again");
    }
}
