//! The ranges of cluster IPs as the API server's ServiceCIDRs say: a packet to an address of them that nobody has is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::object::Metadata;
use ipnet::IpNet;
use proxy::NodeView;
use reconcile::Change;
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceCidr {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Spec {
    cidrs: Vec<IpNet>,
}

/// All there are, by the name of the object.
#[derive(Debug, Clone, Default)]
pub struct ServiceCidrs(BTreeMap<String, Vec<IpNet>>);

impl ServiceCidrs {
    pub fn take(&mut self, change: Change<ServiceCidr>) {
        match change {
            Change::Reset(all) => self.0 = all.into_iter().map(|one| (one.metadata.name, one.spec.cidrs)).collect(),
            Change::Apply(one) => drop(self.0.insert(one.metadata.name, one.spec.cidrs)),
            Change::Delete(one) => drop(self.0.remove(&one.metadata.name)),
        }
    }

    /// In order, each once.
    pub fn ranges(&self) -> Vec<IpNet> {
        let mut ranges: Vec<IpNet> = self.0.values().flatten().map(IpNet::trunc).collect();
        ranges.sort();
        ranges.dedup();
        ranges
    }
}

/// Keeps the view of a node true to them until cancelled. Before the first is seen, the view stays as it is.
pub async fn follow(
    mut changes: mpsc::Receiver<Change<ServiceCidr>>,
    views: watch::Sender<Arc<NodeView>>,
    token: CancellationToken,
) {
    let mut held = ServiceCidrs::default();
    loop {
        tokio::select! {
            change = changes.recv() => match change {
                Some(change) => held.take(change),
                None => return,
            },
            () = token.cancelled() => return,
        }
        let ranges = held.ranges();
        views.send_if_modified(|view| {
            let mut known = view.service_cidrs.clone();
            known.sort();
            let differs = !ranges.is_empty() && known != ranges;
            if differs {
                let mut next = NodeView::clone(view);
                next.service_cidrs.clone_from(&ranges);
                *view = Arc::new(next);
            }
            differs
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn a_range_more_is_a_range_to_guard() {
        let cidr = |name: &str, net: &str| -> ServiceCidr {
            serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"cidrs": [net]}}))
                .expect("a ServiceCIDR")
        };
        let net = |text: &str| text.parse::<IpNet>().expect("a range");
        let first = NodeView { service_cidrs: vec![net("10.96.0.0/12")], ..NodeView::default() };
        let (views, mut seen) = watch::channel(Arc::new(first));
        let (sender, changes) = mpsc::channel(4);
        let token = CancellationToken::new();
        let task = tokio::spawn(follow(changes, views, token.clone()));
        seen.mark_unchanged();
        sender.send(Change::Reset(vec![cidr("kubernetes", "10.96.0.0/12")])).await.expect("heard");
        sender.send(Change::Apply(cidr("more", "10.200.0.0/16"))).await.expect("heard");
        seen.changed().await.expect("a view");
        assert_eq!(seen.borrow_and_update().service_cidrs, [net("10.96.0.0/12"), net("10.200.0.0/16")]);
        sender.send(Change::Delete(cidr("more", "10.200.0.0/16"))).await.expect("heard");
        seen.changed().await.expect("a view");
        assert_eq!(seen.borrow().service_cidrs, [net("10.96.0.0/12")]);
        token.cancel();
        task.await.expect("no panic");
    }
}
