//! Which versions of EndpointSlices the kernel follows: what the kubelet's removal barrier asks of a proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use services::{Changes, FrontendId};

/// Slice uid → the resourceVersion that the kernel holds, for every slice that has a terminating endpoint. The kernel may be
/// ahead of what is said here, never behind. Versions are compared for equality only.
pub type AppliedSlices = BTreeMap<Arc<str>, Arc<str>>;

/// Follows slices from the table's changes to the kernel.
#[derive(Default)]
pub(crate) struct Applied {
    held: Arc<AppliedSlices>,
    /// In the table, and not said yet.
    noticed: BTreeMap<Arc<str>, Noticed>,
    /// A whole plan has been committed: from then on the changes tell everything.
    is_whole: bool,
}

#[derive(Default)]
struct Noticed {
    version: Option<Arc<str>>,
    /// What this version changed, and the versions before it that are not said either.
    frontends: BTreeSet<FrontendId>,
}

impl Applied {
    pub fn notice(&mut self, changes: &Changes) {
        for slice in &changes.slices {
            let noticed = self.noticed.entry(slice.uid.clone()).or_default();
            noticed.version = slice.resource_version.clone();
            noticed.frontends.extend(changes.frontends.iter().map(|change| change.id));
        }
    }

    /// A whole plan is in the kernel, made when the table's terminating slices were these.
    pub fn restart(&mut self, slices: AppliedSlices) {
        self.held = Arc::new(slices);
        self.noticed.clear();
        self.is_whole = true;
    }

    /// What can be said while these frontends wait for their commit.
    pub fn settle(&mut self, pending: &BTreeSet<FrontendId>) -> Arc<AppliedSlices> {
        let is_in_kernel = |noticed: &Noticed| noticed.frontends.is_disjoint(pending);
        if self.is_whole && self.noticed.values().any(is_in_kernel) {
            let mut held = (*self.held).clone();
            for (uid, noticed) in self.noticed.extract_if(.., |_, noticed| is_in_kernel(noticed)) {
                match noticed.version {
                    Some(version) => drop(held.insert(uid, version)),
                    None => drop(held.remove(&uid)),
                }
            }
            if held != *self.held {
                self.held = Arc::new(held);
            }
        }
        self.held.clone()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use services::ServiceTable;

    use super::*;

    fn slice(version: &str, terminating: &[bool]) -> Vec<u8> {
        let endpoint = |(index, terminating): (usize, &bool)| {
            json!({"addresses": [format!("10.244.0.{}", index + 1)],
                "conditions": {"ready": !terminating, "serving": true, "terminating": terminating}})
        };
        let endpoints: Vec<_> = terminating.iter().enumerate().map(endpoint).collect();
        let object = json!({
            "metadata": {"name": "web-1", "namespace": "default", "uid": "u1", "resourceVersion": version,
                "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 80}], "endpoints": endpoints,
        });
        object.to_string().into_bytes()
    }

    fn said(applied: &mut Applied, pending: &BTreeSet<FrontendId>) -> String {
        applied.settle(pending).iter().map(|(uid, version)| format!("{uid}={version} ")).collect()
    }

    #[test]
    fn a_version_is_said_once_its_frontends_are_in_the_kernel() {
        let mut table = ServiceTable::new();
        let service = json!({"metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": 80}]}});
        table.upsert_service(service.to_string().as_bytes()).expect("service");
        let mut applied = Applied::default();
        let mut pending = BTreeSet::new();
        let notice = |applied: &mut Applied, pending: &mut BTreeSet<FrontendId>, changes: Changes| {
            applied.notice(&changes);
            pending.extend(changes.frontends.iter().map(|change| change.id));
        };
        let set = |table: &mut ServiceTable, version: &str, terminating: &[bool]| {
            table.upsert_slice(&slice(version, terminating)).expect("slice")
        };
        notice(&mut applied, &mut pending, set(&mut table, "1", &[false, false]));
        notice(&mut applied, &mut pending, set(&mut table, "2", &[true, false]));
        pending.clear();
        assert_eq!(said(&mut applied, &pending), "", "nothing before the first whole plan");
        applied.restart(table.terminating_slices());
        assert_eq!(said(&mut applied, &pending), "u1=2 ");
        notice(&mut applied, &mut pending, set(&mut table, "3", &[true, true]));
        // This one changes no frontend, and yet it has to wait for the one before.
        notice(&mut applied, &mut pending, set(&mut table, "4", &[true, true]));
        assert_eq!(said(&mut applied, &pending), "u1=2 ", "version 3 waits for its commit");
        pending.clear();
        assert_eq!(said(&mut applied, &pending), "u1=4 ");
        notice(&mut applied, &mut pending, set(&mut table, "5", &[true, true]));
        assert_eq!(said(&mut applied, &pending), "u1=5 ", "a version that changes nothing is there at once");
        notice(&mut applied, &mut pending, set(&mut table, "6", &[false]));
        assert_eq!(said(&mut applied, &pending), "u1=5 ");
        pending.clear();
        assert_eq!(said(&mut applied, &pending), "", "nothing terminates any more");
        notice(&mut applied, &mut pending, set(&mut table, "7", &[true]));
        notice(&mut applied, &mut pending, table.delete_slice("default", "web-1"));
        assert_ne!(pending, BTreeSet::new());
        pending.clear();
        assert_eq!(said(&mut applied, &pending), "", "the slice has gone");
    }
}
