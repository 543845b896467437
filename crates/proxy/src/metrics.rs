//! What the proxy has done, for Prometheus, under kube-proxy's names, so that its dashboards and alerts go on working.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use services::{Changes, ServiceTable, TrafficPolicy};

use crate::dataplane::userspace::Tally;
use crate::scope::scopes;
use crate::{Mode, NodeView, Status};

/// Durations, counted by upper bounds in seconds.
#[derive(Clone, Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    count: u64,
    seconds: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Histogram { bounds, counts: vec![0; bounds.len()], count: 0, seconds: 0.0 }
    }

    fn observe(&mut self, seconds: f64) {
        self.count += 1;
        self.seconds += seconds;
        for (count, bound) in self.counts.iter_mut().zip(self.bounds) {
            *count += u64::from(seconds <= *bound);
        }
    }
}

/// 1 ms, doubling.
const COMMIT_BOUNDS: [f64; 15] =
    [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192, 16.384];

/// kube-proxy's: seconds up to a minute, then 5 seconds, then half minutes.
static PROGRAMMING_BOUNDS: [f64; 80] = programming_bounds();

const fn programming_bounds() -> [f64; 80] {
    let mut bounds = [0.0; 80];
    bounds[0] = 0.25;
    bounds[1] = 0.5;
    let mut index = 2;
    let mut second = 1;
    while index < 80 {
        bounds[index] = second as f64;
        index += 1;
        second += if second < 60 {
            1
        } else if second < 120 {
            5
        } else {
            30
        };
    }
    bounds
}

/// How many changes of one sort there were, and how many of them wait for a commit.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    total: u64,
    pending: u64,
}

#[derive(Clone, Debug)]
struct Counts {
    /// Changes from before are not this process's delay.
    started: Timestamp,
    commits: Histogram,
    whole: Histogram,
    partial: Histogram,
    programming: Histogram,
    failures: u64,
    last_commit: Option<Timestamp>,
    last_noticed: Option<Timestamp>,
    services: Flow,
    endpoints: Flow,
    /// When what waits for a commit was caused.
    triggers: Vec<Timestamp>,
    /// By probe and code.
    probes: BTreeMap<(bool, u16), u64>,
    /// Connections that were reset because their endpoint went, as an end policy says.
    ended: u64,
    /// Changes of the mode, asked for and done, and those that failed.
    handed_over: [u64; 2],
    /// By method and code; `None` where no answer came.
    requests: BTreeMap<(String, Option<u16>), u64>,
}

/// Counters of one proxy; shared by everybody who has something to count.
pub struct Metrics {
    counts: Mutex<Counts>,
    /// What relays have carried.
    tally: Arc<Tally>,
}

impl Default for Metrics {
    fn default() -> Self {
        let counts = Counts {
            started: Timestamp::now(),
            commits: Histogram::new(&COMMIT_BOUNDS),
            whole: Histogram::new(&COMMIT_BOUNDS),
            partial: Histogram::new(&COMMIT_BOUNDS),
            programming: Histogram::new(&PROGRAMMING_BOUNDS),
            failures: 0,
            last_commit: None,
            last_noticed: None,
            services: Flow::default(),
            endpoints: Flow::default(),
            triggers: Vec::new(),
            probes: BTreeMap::new(),
            ended: 0,
            handed_over: [0; 2],
            requests: BTreeMap::new(),
        };
        Metrics { counts: Mutex::new(counts), tally: Arc::default() }
    }
}

impl Metrics {
    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        // Counters are numbers: none is half written.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tally(&self) -> Arc<Tally> {
        self.tally.clone()
    }

    /// The table has changed.
    pub(crate) fn noticed(&self, changes: &Changes) {
        self.noticed_at(changes, Timestamp::now());
    }

    fn noticed_at(&self, changes: &Changes, now: Timestamp) {
        if changes.frontends.is_empty() {
            return;
        }
        let counts = &mut *self.counts();
        counts.last_noticed = Some(now);
        for change in &changes.frontends {
            let endpoints_only = match (&change.before, &change.after) {
                (Some(before), Some(after)) => before.endpoints != after.endpoints,
                _ => false,
            };
            let flow = if endpoints_only { &mut counts.endpoints } else { &mut counts.services };
            flow.total += 1;
            flow.pending += 1;
        }
        let times = changes.triggered.iter().filter_map(|time| time.parse::<Timestamp>().ok());
        counts.triggers.extend(times.filter(|time| *time >= counts.started));
    }

    /// A commit has been tried, of everything or of what has changed.
    pub(crate) fn committed(&self, whole: bool, took: Duration, succeeded: bool) {
        self.committed_at(whole, took, succeeded, Timestamp::now());
    }

    fn committed_at(&self, whole: bool, took: Duration, succeeded: bool, now: Timestamp) {
        let counts = &mut *self.counts();
        let seconds = took.as_secs_f64();
        counts.commits.observe(seconds);
        if whole {
            counts.whole.observe(seconds);
        } else {
            counts.partial.observe(seconds);
        }
        if !succeeded {
            counts.failures += 1;
            return;
        }
        counts.last_commit = Some(now);
        counts.services.pending = 0;
        counts.endpoints.pending = 0;
        for trigger in std::mem::take(&mut counts.triggers) {
            let late = now.duration_since(trigger).as_secs_f64();
            counts.programming.observe(late.max(0.0));
        }
    }

    /// So many connections were reset, as an end policy says.
    pub(crate) fn ended(&self, connections: usize) {
        self.counts().ended += connections as u64;
    }

    /// The mode was to be changed.
    pub(crate) fn handed_over(&self, succeeded: bool) {
        self.counts().handed_over[usize::from(!succeeded)] += 1;
    }

    /// `/healthz` (the one that asks for the node, too) or `/livez` was answered.
    pub(crate) fn probed(&self, with_node: bool, code: u16) {
        *self.counts().probes.entry((with_node, code)).or_default() += 1;
    }

    /// The API server was asked something; `None`: no answer came.
    pub fn requested(&self, method: &str, code: Option<u16>) {
        *self.counts().requests.entry((method.to_owned(), code)).or_default() += 1;
    }

    /// The Prometheus text format.
    pub fn text(&self, mode: Mode, table: &ServiceTable, node: &NodeView, status: &Status) -> String {
        let counts = self.counts().clone();
        let mut out = Text(String::new());
        let sync = "kubeproxy_sync_proxy_rules";
        out.histogram(&format!("{sync}_duration_seconds"), "Time of one commit to the kernel.", &counts.commits);
        let whole = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        out.histogram(whole, "Time of one commit of everything.", &counts.whole);
        let partial = "kubeproxy_sync_partial_proxy_rules_duration_seconds";
        out.histogram(partial, "Time of one commit of what has changed.", &counts.partial);
        let programming = "kubeproxy_network_programming_duration_seconds";
        out.histogram(programming, "Time from a change of a pod or Service to the kernel.", &counts.programming);
        let seconds = |time: Option<Timestamp>| time.map_or(0.0, |time| time.as_millisecond() as f64 / 1000.0);
        let last = [
            ("last_timestamp_seconds", "When a commit last succeeded.", counts.last_commit),
            ("last_queued_timestamp_seconds", "When a change was last seen.", counts.last_noticed),
        ];
        for (name, help, time) in last {
            out.one("gauge", &format!("{sync}_{name}"), help, seconds(time));
        }
        for (what, flow) in [("endpoint", counts.endpoints), ("service", counts.services)] {
            let name = |end: &str| format!("{sync}_{what}_changes_{end}");
            out.one("gauge", &name("pending"), "Changes that are not in the kernel yet.", flow.pending);
            out.one("counter", &name("total"), "Changes that were seen.", flow.total);
        }
        let failures = match mode {
            Mode::Iptables => format!("{sync}_iptables_restore_failures_total"),
            other => format!("{sync}_{other}_sync_failures_total"),
        };
        out.one("counter", &failures, "Commits that failed and were repeated.", counts.failures);
        let name = format!("{sync}_no_local_endpoints_total");
        out.head("gauge", &name, "Service ports with policy Local and no endpoint on this node, though elsewhere.");
        for (policy, count) in without_local_endpoints(table, node) {
            out.line(&format!("{name}{{traffic_policy=\"{policy}\"}}"), count);
        }
        for (with_node, name) in [(true, "kubeproxy_proxy_healthz_total"), (false, "kubeproxy_proxy_livez_total")] {
            out.head("counter", name, "Answers to probes by code.");
            for ((_, code), count) in counts.probes.iter().filter(|((of_node, _), _)| *of_node == with_node) {
                out.line(&format!("{name}{{code=\"{code}\"}}"), count);
            }
        }
        let ejections = "Endpoints that left the pick of this node because they did not answer.";
        out.one("counter", "fairlead_proxy_ejections_total", ejections, status.ejections);
        let retries = "First packets that were sent to another endpoint.";
        out.one("counter", "fairlead_proxy_first_packet_retries_total", retries, status.retries);
        let ejected = "Endpoints that are out of the pick of this node now.";
        out.one("gauge", "fairlead_proxy_ejected_endpoints", ejected, status.ejected.len());
        let ended = "Connections that were reset because their endpoint went, as their Service's end policy says.";
        out.one("counter", "fairlead_proxy_end_policy_resets_total", ended, counts.ended);
        let name = "fairlead_proxy_mode_handovers_total";
        out.head("counter", name, "Changes of the mode while the proxy ran.");
        for (result, count) in ["done", "refused"].into_iter().zip(counts.handed_over) {
            out.line(&format!("{name}{{result=\"{result}\"}}"), count);
        }
        let name = "fairlead_proxy_mode";
        out.head("gauge", name, "The mode whose rules the kernel holds.");
        out.line(&format!("{name}{{mode=\"{mode}\"}}"), 1);
        let repairs = "Changes by others of the proxy's own table that were made undone.";
        out.one("counter", "fairlead_proxy_table_repairs_total", repairs, status.repairs);
        let waited_for = "Slices with a terminating endpoint whose applied version kubelets are told.";
        out.one("gauge", "fairlead_proxy_removal_barrier_slices", waited_for, status.applied.len());
        let unsupported = "Service ports that ask for what the mode cannot do.";
        out.one("gauge", "fairlead_proxy_unsupported_service_ports", unsupported, status.unsupported.len());
        let name = "rest_client_requests_total";
        out.head("counter", name, "Requests to the API server by method and code.");
        for ((method, code), count) in &counts.requests {
            let code = code.map_or("<error>".to_owned(), |code| code.to_string());
            out.line(&format!("{name}{{code=\"{code}\",method=\"{method}\"}}"), count);
        }
        let started = seconds(Some(counts.started));
        out.one("gauge", "process_start_time_seconds", "When this process started counting.", started);
        out.0
    }
}

/// Service ports of each policy whose traffic is dropped here, while another node would serve it.
fn without_local_endpoints(table: &ServiceTable, node: &NodeView) -> [(&'static str, u64); 2] {
    let (mut internal, mut external) = (0, 0);
    for frontend in table.frontends() {
        let is_internal = frontend.internal_policy == TrafficPolicy::Local;
        let is_external = frontend.external_policy == TrafficPolicy::Local && frontend.is_external();
        if !is_internal && !is_external {
            continue;
        }
        let families = [false, true].map(|v6| scopes(frontend, node, v6));
        let any = families.iter().any(|scopes| scopes.any);
        let here = families.iter().any(|scopes| !scopes.local.is_empty());
        if any && !here {
            internal += u64::from(is_internal);
            external += u64::from(is_external);
        }
    }
    [("external", external), ("internal", internal)]
}

/// The text format while it is written; writing to a string cannot fail.
pub(crate) struct Text(pub String);

impl Text {
    pub fn head(&mut self, kind: &str, name: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub fn line(&mut self, name: &str, value: impl Display) {
        let _ = writeln!(self.0, "{name} {value}");
    }

    pub fn one(&mut self, kind: &str, name: &str, help: &str, value: impl Display) {
        self.head(kind, name, help);
        self.line(name, value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head("histogram", name, help);
        for (count, bound) in histogram.counts.iter().zip(histogram.bounds) {
            self.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), count);
        }
        self.line(&format!("{name}_bucket{{le=\"+Inf\"}}"), histogram.count);
        self.line(&format!("{name}_sum"), histogram.seconds);
        self.line(&format!("{name}_count"), histogram.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use services::Place;

    fn table() -> (ServiceTable, Vec<Changes>) {
        let mut table = ServiceTable::new();
        let service = |name: &str, ip: &str, policies: &str| {
            format!(
                r#"{{"metadata":{{"namespace":"d","name":"{name}"}},"spec":{{"type":"NodePort","clusterIP":"{ip}",
                {policies}"ports":[{{"port":80,"nodePort":30080}}]}}}}"#
            )
        };
        let slice = |name: &str, node: &str| {
            format!(
                r#"{{"metadata":{{"namespace":"d","name":"{name}-1","labels":{{"kubernetes.io/service-name":"{name}"}},
                "annotations":{{"endpoints.kubernetes.io/last-change-trigger-time":"2030-01-01T00:00:00Z"}}}},
                "addressType":"IPv4","ports":[{{"port":80}}],
                "endpoints":[{{"addresses":["10.244.0.1"],"nodeName":"{node}"}}]}}"#
            )
        };
        let both = r#""internalTrafficPolicy":"Local","externalTrafficPolicy":"Local","#;
        let changes = vec![
            table.upsert_service(service("far", "10.96.0.1", both).as_bytes()).expect("a Service"),
            table.upsert_slice(slice("far", "node-2").as_bytes()).expect("a slice"),
            table.upsert_service(service("near", "10.96.0.2", both).as_bytes()).expect("a Service"),
            table.upsert_slice(slice("near", "node-1").as_bytes()).expect("a slice"),
            table.upsert_service(service("nowhere", "10.96.0.3", both).as_bytes()).expect("a Service"),
        ];
        (table, changes)
    }

    fn status() -> Status {
        let ejected = [("10.244.0.1:80".parse().expect("an endpoint"), services::Protocol::Tcp)].into();
        Status { ejections: 3, retries: 5, repairs: 2, ejected, ..Status::default() }
    }

    fn text(metrics: &Metrics, table: &ServiceTable) -> String {
        let place = Place { node: "node-1".into(), zone: None };
        metrics.text(Mode::Nftables, table, &NodeView { place, ..NodeView::default() }, &status())
    }

    #[test]
    fn counters_stand_under_the_names_that_kube_proxy_gives_them() {
        let metrics = Metrics::default();
        let (table, changes) = table();
        let at = |time: &str| time.parse::<Timestamp>().expect("a time");
        for change in &changes {
            metrics.noticed_at(change, at("2030-01-01T00:00:01Z"));
        }
        let waiting = text(&metrics, &table);
        assert!(waiting.contains("kubeproxy_sync_proxy_rules_service_changes_pending 3\n"), "{waiting}");
        metrics.committed_at(true, Duration::from_millis(3), false, at("2030-01-01T00:00:01Z"));
        metrics.committed_at(true, Duration::from_millis(3), true, at("2030-01-01T00:00:02.5Z"));
        metrics.committed_at(false, Duration::from_micros(500), true, at("2030-01-01T00:00:03Z"));
        metrics.probed(true, 503);
        metrics.ended(4);
        [true, false, false].into_iter().for_each(|done| metrics.handed_over(done));
        metrics.requested("GET", Some(200));
        metrics.requested("GET", None);
        let text = text(&metrics, &table);
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.001\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 3",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"+Inf\"} 3",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count 2",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds 1893456003",
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds 1893456001",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_service_changes_total 3",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_nftables_sync_failures_total 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"2\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"3\"} 2",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"300\"} 2",
            "kubeproxy_network_programming_duration_seconds_sum 5",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "fairlead_proxy_ejections_total 3",
            "fairlead_proxy_first_packet_retries_total 5",
            "fairlead_proxy_ejected_endpoints 1",
            "fairlead_proxy_end_policy_resets_total 4",
            "fairlead_proxy_mode_handovers_total{result=\"done\"} 1",
            "fairlead_proxy_mode_handovers_total{result=\"refused\"} 2",
            "fairlead_proxy_mode{mode=\"nftables\"} 1",
            "fairlead_proxy_table_repairs_total 2",
            "fairlead_proxy_removal_barrier_slices 0",
            "fairlead_proxy_unsupported_service_ports 0",
            "rest_client_requests_total{code=\"200\",method=\"GET\"} 1",
            "rest_client_requests_total{code=\"<error>\",method=\"GET\"} 1",
        ] {
            assert!(text.lines().any(|held| held == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn every_line_is_one_that_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.probed(false, 200);
        let mut declared = String::new();
        for line in text(&metrics, &ServiceTable::new()).lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                declared = rest.split(' ').next().expect("a name").to_owned();
            } else if !line.starts_with("# HELP ") {
                let (name, value) = line.rsplit_once(' ').expect("a name and a value");
                assert!(name.starts_with(&declared), "{line} stands under {declared}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
            }
        }
        let mut sorted = PROGRAMMING_BOUNDS.to_vec();
        sorted.sort_by(f64::total_cmp);
        assert_eq!((sorted.as_slice(), sorted.last()), (PROGRAMMING_BOUNDS.as_slice(), Some(&300.0)));
    }
}
