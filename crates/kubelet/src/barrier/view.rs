//! What slices and proxies say about a pod that ends: who may still send it connections. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

use api::object::{Key, Metadata};
use reconcile::Change;
use serde::Deserialize;

/// Called so in the Lease of a node's proxy.
pub const APPLIED: &str = "fairlead.io/applied-slices";
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Slices of headless Services carry it; no proxy has anything to do with them.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Versions of a slice that are remembered. A proxy that is further behind is waited for as if it had said nothing.
const REMEMBERED: usize = 256;

/// What is read of an EndpointSlice.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Slice {
    metadata: Metadata,
    endpoints: Vec<Endpoint>,
    ports: Vec<Port>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Endpoint {
    addresses: Vec<String>,
    conditions: Conditions,
    target_ref: Option<Target>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Conditions {
    terminating: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Target {
    kind: String,
    uid: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Port {
    protocol: Option<String>,
    port: Option<u16>,
}

/// What is read of a proxy's Lease.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Report {
    metadata: Metadata,
    spec: ReportSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ReportSpec {
    holder_identity: String,
}

/// A slice as it is now, and the versions it had since it is followed, in the order in which the watch told them.
#[derive(Debug, Default)]
struct Followed {
    uid: String,
    versions: VecDeque<String>,
    /// How many versions were forgotten.
    forgotten: usize,
    /// Pods it names, with where they answer.
    targets: HashMap<String, BTreeSet<SocketAddr>>,
    /// Pod → number of the first version since when it is terminating without a break.
    terminating: HashMap<String, usize>,
}

impl Followed {
    fn set(&mut self, slice: &Slice) {
        if self.uid != slice.metadata.uid {
            // Deleted, and another one made under its name.
            *self = Followed { uid: slice.metadata.uid.clone(), ..Followed::default() };
        }
        if self.versions.back() != Some(&slice.metadata.resource_version) {
            self.versions.push_back(slice.metadata.resource_version.clone());
        }
        if self.versions.len() > REMEMBERED {
            self.versions.pop_front();
            self.forgotten += 1;
        }
        let number = self.forgotten + self.versions.len() - 1;
        let is_tcp = |port: &&Port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let ports: Vec<u16> = slice.ports.iter().filter(is_tcp).filter_map(|port| port.port).collect();
        let before = std::mem::take(&mut self.terminating);
        self.targets.clear();
        for endpoint in &slice.endpoints {
            let Some(pod) = endpoint.target_ref.as_ref().filter(|target| target.kind == "Pod") else { continue };
            let addresses = endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok());
            let answers = addresses.flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)));
            self.targets.entry(pod.uid.clone()).or_default().extend(answers);
            if endpoint.conditions.terminating == Some(true) {
                let since = before.get(&pod.uid).copied().unwrap_or(number);
                self.terminating.insert(pod.uid.clone(), since);
            }
        }
    }

    /// Whether a proxy that has applied this version has applied one in which the pod is terminating.
    fn is_applied(&self, version: &str, since: usize) -> bool {
        self.versions.iter().rposition(|known| known == version).is_some_and(|at| self.forgotten + at >= since)
    }
}

/// The slices of one namespace, and every proxy's report.
#[derive(Debug, Default)]
pub struct View {
    slices: Option<BTreeMap<Key, Followed>>,
    /// Node → slice uid → version.
    reports: Option<BTreeMap<String, HashMap<String, String>>>,
}

/// How far a pod's removal has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Stage {
    /// The first lists are not complete.
    Unknown,
    /// No Service sends it anything.
    Unnamed,
    /// No node's proxy reports.
    Unreported,
    /// A slice names it and does not say yet that it is terminating.
    Unmarked,
    /// These nodes' proxies may still send it new connections.
    Sent(BTreeSet<String>),
    /// Nobody does any more.
    Applied,
}

impl View {
    pub fn change_slice(&mut self, change: Change<Slice>) {
        let is_proxied = |slice: &Slice| {
            let labels = &slice.metadata.labels;
            labels.contains_key(SERVICE_NAME) && !labels.contains_key(HEADLESS)
        };
        let slices = self.slices.get_or_insert_default();
        match change {
            Change::Reset(all) => {
                let listed: BTreeSet<Key> =
                    all.iter().filter(|s| is_proxied(s)).map(|slice| slice.metadata.key()).collect();
                slices.retain(|key, _| listed.contains(key));
                for slice in all.iter().filter(|slice| is_proxied(slice)) {
                    slices.entry(slice.metadata.key()).or_default().set(slice);
                }
            }
            Change::Apply(slice) if is_proxied(&slice) => slices.entry(slice.metadata.key()).or_default().set(&slice),
            Change::Apply(slice) | Change::Delete(slice) => drop(slices.remove(&slice.metadata.key())),
        }
    }

    pub fn change_report(&mut self, change: Change<Report>) {
        let reports = self.reports.get_or_insert_default();
        let read = |report: &Report| {
            let text = report.metadata.annotations.get(APPLIED).map(String::as_str).unwrap_or("{}");
            serde_json::from_str::<HashMap<String, String>>(text).unwrap_or_else(|error| {
                tracing::warn!(lease = %report.metadata.name, "{APPLIED} is not understood: {error}");
                HashMap::new()
            })
        };
        // The node is in the Lease's name, so that a proxy that ended can be told from all others.
        let node = |report: &Report| report.metadata.name.strip_prefix("fairlead-proxy-").map(str::to_owned);
        let set = |reports: &mut BTreeMap<String, HashMap<String, String>>, report: &Report| {
            let Some(node) = node(report) else { return };
            // Without a holder the proxy has ended and follows nothing.
            if report.spec.holder_identity.is_empty() {
                reports.remove(&node);
            } else {
                reports.insert(node, read(report));
            }
        };
        match change {
            Change::Reset(all) => {
                reports.clear();
                all.iter().for_each(|report| set(reports, report));
            }
            Change::Apply(report) => set(reports, &report),
            Change::Delete(report) => drop(node(&report).and_then(|node| reports.remove(&node))),
        }
    }

    pub fn stage(&self, pod: &str) -> Stage {
        let (Some(slices), Some(reports)) = (&self.slices, &self.reports) else { return Stage::Unknown };
        let mut naming = slices.values().filter(|slice| slice.targets.contains_key(pod)).peekable();
        if naming.peek().is_none() {
            return Stage::Unnamed;
        }
        if reports.is_empty() {
            return Stage::Unreported;
        }
        let mut sent = BTreeSet::new();
        for slice in naming {
            let Some(since) = slice.terminating.get(pod) else { return Stage::Unmarked };
            let behind = reports.iter().filter(|(_, applied)| {
                !applied.get(&slice.uid).is_some_and(|version| slice.is_applied(version, *since))
            });
            sent.extend(behind.map(|(node, _)| node.clone()));
        }
        if sent.is_empty() { Stage::Applied } else { Stage::Sent(sent) }
    }

    /// Where Services reach the pod over TCP.
    pub fn targets(&self, pod: &str) -> BTreeSet<SocketAddr> {
        let slices = self.slices.iter().flat_map(BTreeMap::values);
        slices.filter_map(|slice| slice.targets.get(pod)).flatten().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// `b@12 p1 p2!`: slice b in version 12 names p1, and p2 as terminating; `node-1: b@12 c@9` is a proxy's report, `node-1 ended` its
    /// end; `-b` deletes a slice.
    fn apply(view: &mut View, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        if let Some(node) = words[0].strip_suffix(':') {
            let applied: Value = words[1..]
                .iter()
                .filter_map(|word| word.split_once('@'))
                .map(|(s, v)| (s.to_owned(), json!(v)))
                .collect();
            let text = applied.to_string();
            let lease = json!({"metadata": {"name": format!("fairlead-proxy-{node}"), "annotations": {APPLIED: text}},
                "spec": {"holderIdentity": node}});
            view.change_report(Change::Apply(serde_json::from_value(lease).expect("a lease")));
        } else if words.get(1) == Some(&"ended") {
            let lease =
                json!({"metadata": {"name": format!("fairlead-proxy-{}", words[0])}, "spec": {"holderIdentity": ""}});
            view.change_report(Change::Apply(serde_json::from_value(lease).expect("a lease")));
        } else {
            let (name, version) = words[0].split_once('@').unwrap_or((words[0], ""));
            let endpoints: Vec<Value> = words[1..]
                .iter()
                .map(|pod| {
                    json!({"addresses": ["10.244.0.5"], "conditions": {"terminating": pod.ends_with('!')},
                        "targetRef": {"kind": "Pod", "uid": pod.trim_end_matches('!')}})
                })
                .collect();
            let slice = json!({
                "metadata": {"name": name.trim_start_matches('-'), "uid": name, "resourceVersion": version,
                    "labels": {SERVICE_NAME: "web"}},
                "ports": [{"port": 80}, {"port": 53, "protocol": "UDP"}], "endpoints": endpoints,
            });
            let slice = serde_json::from_value(slice).expect("a slice");
            view.change_slice(if name.starts_with('-') { Change::Delete(slice) } else { Change::Apply(slice) });
        }
    }

    fn show(stage: &Stage) -> String {
        match stage {
            Stage::Sent(nodes) => nodes.iter().cloned().collect::<Vec<_>>().join(" "),
            other => format!("{other:?}").to_lowercase(),
        }
    }

    #[test]
    fn a_pod_is_let_go_when_every_proxy_has_it_terminating() {
        let cases: &[(&str, &[&str], &str)] = &[
            ("nobody names it", &["node-1:", "b@1 other"], "unnamed"),
            ("nobody reports", &["b@1 pod"], "unreported"),
            ("the controller has not seen its end", &["node-1: b@1", "b@1 pod"], "unmarked"),
            ("no proxy has the version", &["node-1:", "node-2:", "b@2 pod!"], "node-1 node-2"),
            ("one has", &["node-1: b@2", "node-2:", "b@2 pod!"], "node-2"),
            ("all have", &["node-1: b@2", "node-2: b@2", "b@2 pod!"], "applied"),
            ("an older version is not enough", &["node-1: b@1", "b@1 pod", "b@2 pod!"], "node-1"),
            ("a later one is", &["node-1: b@3", "b@2 pod!", "b@3 pod! more!"], "applied"),
            ("the first of several is, too", &["node-1: b@2", "b@2 pod!", "b@3 pod! more!"], "applied"),
            ("versions have no order: 9 is not before 10", &["node-1: b@9", "b@10 pod", "b@9 pod!"], "applied"),
            ("nor is 10 after 9", &["node-1: b@10", "b@10 pod", "b@9 pod!"], "node-1"),
            ("a version nobody here saw yet", &["node-1: b@4", "b@2 pod!"], "node-1"),
            ("every slice that names it counts", &["node-1: b@2", "b@2 pod!", "c@7 pod!"], "node-1"),
            ("both are applied", &["node-1: b@2 c@7", "b@2 pod!", "c@7 pod!"], "applied"),
            ("a slice that is gone does not hold it", &["node-1: b@2", "b@2 pod!", "c@7 pod!", "-c"], "applied"),
            ("a proxy that ended does not either", &["node-1: b@2", "node-2:", "b@2 pod!", "node-2 ended"], "applied"),
            ("it left the slice", &["node-1:", "b@2 pod!", "b@3 other"], "unnamed"),
            ("a pod that came back has to be marked anew", &["node-1: b@2", "b@2 pod!", "b@3 pod"], "unmarked"),
        ];
        for (title, lines, expected) in cases {
            let mut view = View::default();
            view.change_slice(Change::Reset(Vec::new()));
            view.change_report(Change::Reset(Vec::new()));
            lines.iter().for_each(|line| apply(&mut view, line));
            assert_eq!(show(&view.stage("pod")), *expected, "{title}");
        }
    }

    #[test]
    fn before_the_lists_nothing_is_known() {
        let mut view = View::default();
        assert_eq!(view.stage("pod"), Stage::Unknown);
        view.change_slice(Change::Reset(Vec::new()));
        assert_eq!(view.stage("pod"), Stage::Unknown);
    }

    #[test]
    fn connections_are_looked_for_where_tcp_is_answered() {
        let mut view = View::default();
        apply(&mut view, "b@1 pod!");
        assert_eq!(view.targets("pod").into_iter().map(|t| t.to_string()).collect::<Vec<_>>(), ["10.244.0.5:80"]);
    }

    #[test]
    fn a_long_history_is_forgotten() {
        let mut view = View::default();
        view.change_report(Change::Reset(Vec::new()));
        apply(&mut view, "node-1: b@5");
        for version in 0..2000 {
            apply(&mut view, &format!("b@{version} {}", if version < 3 { "pod" } else { "pod!" }));
        }
        assert_eq!(show(&view.stage("pod")), "node-1", "version 5 is long forgotten");
        apply(&mut view, "node-1: b@1990");
        assert_eq!(view.stage("pod"), Stage::Applied);
    }
}
