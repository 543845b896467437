//! Which connections end, and when. Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use services::{EndPolicy, Frontend, Protocol};

use crate::NodeView;
use crate::stale::addresses;

/// How long the packets of ended connections are refused. A client that is there answers within milliseconds.
const REFUSED: Duration = Duration::from_secs(2);

/// The connections that clients of one address have to one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Way {
    pub protocol: Protocol,
    pub called: SocketAddr,
    pub endpoint: SocketAddr,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The endpoint goes away; its connections have so long.
    Gone { way: Way, after: Duration },
    /// It is used again: whatever was to end goes on.
    Back { way: Way },
    /// The proxy has just started: what clients of these addresses have to anybody else is to end.
    Started { called: BTreeSet<(Protocol, SocketAddr)>, used: BTreeSet<SocketAddr>, after: Duration },
}

/// What new connections use: ready endpoints, or, without one, those that serve while they terminate.
fn used(frontend: &Frontend) -> BTreeSet<SocketAddr> {
    let ready: BTreeSet<SocketAddr> = frontend.endpoints.iter().filter(|e| e.ready).map(|e| e.address).collect();
    if !ready.is_empty() {
        return ready;
    }
    frontend.endpoints.iter().filter(|e| e.serving && e.terminating).map(|e| e.address).collect()
}

/// What one frontend's commit means. Nothing where connections are kept, and nothing if the Service itself has gone.
pub(super) fn changes(before: Option<&Frontend>, after: Option<&Frontend>, node: &NodeView) -> Vec<Change> {
    let Some(frontend) = after else { return Vec::new() };
    let after = match frontend.end_policy {
        EndPolicy::Keep => return Vec::new(),
        EndPolicy::Drain { seconds } => Duration::from_secs(seconds.into()),
        EndPolicy::Reset => Duration::ZERO,
    };
    let protocol = frontend.name.protocol;
    let called = addresses(frontend, node);
    let now = used(frontend);
    let Some(before) = before else {
        return vec![Change::Started {
            called: called.into_iter().map(|called| (protocol, called)).collect(),
            used: frontend.endpoints.iter().filter(|e| !e.terminating).map(|e| e.address).chain(now).collect(),
            after,
        }];
    };
    let were = used(before);
    // One that is only not ready may be back any moment: it is not going away.
    let stays = |address: &SocketAddr| frontend.endpoints.iter().any(|e| e.address == *address && !e.terminating);
    let gone = were.difference(&now).filter(|address| !stays(address));
    let ways = |endpoint: &SocketAddr| {
        let endpoint = *endpoint;
        let reaches = move |called: &&SocketAddr| called.is_ipv6() == endpoint.is_ipv6();
        called.iter().filter(reaches).map(move |called| Way { protocol, called: *called, endpoint }).collect::<Vec<_>>()
    };
    let back = now.difference(&were).flat_map(ways).map(|way| Change::Back { way });
    gone.flat_map(ways).map(|way| Change::Gone { way, after }).chain(back).collect()
}

/// Who has how long.
#[derive(Debug, Default)]
pub(super) struct Endings {
    /// When their connections end.
    draining: BTreeMap<Way, Instant>,
    /// Until when packets of the connections that they had are refused.
    refused: BTreeMap<Way, Instant>,
}

/// What happens now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// The connections they have now are refused, and their clients are told.
    pub begin: Vec<Way>,
    /// Whoever has not heard by now is forgotten.
    pub forget: Vec<Way>,
}

impl Endings {
    pub fn gone(&mut self, way: Way, after: Duration, now: Instant) {
        self.draining.entry(way).or_insert(now + after);
    }

    /// What has ended has ended: only what was to end goes on.
    pub fn back(&mut self, way: &Way) {
        self.draining.remove(way);
    }

    /// When `due` next has something to do.
    pub fn next(&self) -> Option<Instant> {
        self.draining.values().chain(self.refused.values()).min().copied()
    }

    pub fn due(&mut self, now: Instant) -> Due {
        let begin: Vec<Way> = self.draining.extract_if(.., |_, at| *at <= now).map(|(way, _)| way).collect();
        let forget: Vec<Way> = self.refused.extract_if(.., |_, until| *until <= now).map(|(way, _)| way).collect();
        self.refused.extend(begin.iter().map(|way| (*way, now + REFUSED)));
        Due { begin, forget }
    }

    /// The kernel did not take it: once more, then.
    pub fn retry(&mut self, due: Due, at: Instant) {
        for way in due.begin.into_iter().chain(due.forget) {
            self.refused.remove(&way);
            self.draining.insert(way, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use services::{Place, ServiceTable};

    use super::*;

    /// The frontend with endpoints such as `1`, `2!` (not ready) and `3-` (terminating, still serving).
    fn frontend(policy: &str, endpoints: &str) -> Frontend {
        let mut table = ServiceTable::new();
        let service = json!({
            "metadata": {"name": "web", "namespace": "default", "annotations": {EndPolicy::ANNOTATION: policy}},
            "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "type": "NodePort",
                "ports": [{"port": 80, "nodePort": 30080}]},
        });
        let endpoints: Vec<Value> = endpoints
            .split_whitespace()
            .map(|word| {
                let address = format!("10.244.0.{}", word.trim_end_matches(['!', '-']));
                let (unready, terminating) = (word.ends_with('!'), word.ends_with('-'));
                json!({"addresses": [address],
                    "conditions": {"ready": !unready && !terminating, "serving": !unready, "terminating": terminating}})
            })
            .collect();
        let slice = json!({
            "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
        });
        table.upsert_service(service.to_string().as_bytes()).expect("service");
        table.upsert_slice(slice.to_string().as_bytes()).expect("slice");
        (**table.frontends().next().expect("one port")).clone()
    }

    fn node() -> NodeView {
        let place = Place { node: "node-1".into(), zone: None };
        NodeView::new(place, vec!["192.168.49.2".parse().expect("address")], Vec::new(), Vec::new())
    }

    fn show(changes: &[Change]) -> String {
        let at = |way: &Way| {
            format!("{}>{}", way.called.port(), way.endpoint.ip().to_string().rsplit('.').next().unwrap_or(""))
        };
        let one = |change: &Change| match change {
            Change::Gone { way, after } => format!("{} ends in {}", at(way), after.as_secs()),
            Change::Back { way } => format!("{} is back", at(way)),
            Change::Started { called, used, after } => {
                format!("{} addresses keep {} in {}", called.len(), used.len(), after.as_secs())
            }
        };
        changes.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn only_an_endpoint_that_goes_away_loses_its_connections() {
        let cases = [
            ("keep", "1 2", "1", ""),
            ("nonsense", "1 2", "1", ""),
            ("reset", "1 2", "1 2", ""),
            ("reset", "1 2", "1", "80>2 ends in 0, 30080>2 ends in 0"),
            ("drain=30", "1 2", "1 2-", "80>2 ends in 30, 30080>2 ends in 30"),
            // Not ready is not gone.
            ("reset", "1 2", "1 2!", ""),
            // Nobody else is left: what terminates is used on, until somebody is there.
            ("reset", "1", "1-", ""),
            ("reset", "1-", "1- 2", "80>1 ends in 0, 30080>1 ends in 0, 80>2 is back, 30080>2 is back"),
            ("reset", "1-", "", "80>1 ends in 0, 30080>1 ends in 0"),
            ("reset", "1", "1 2", "80>2 is back, 30080>2 is back"),
        ];
        for (policy, before, after, expected) in cases {
            let found = changes(Some(&frontend(policy, before)), Some(&frontend(policy, after)), &node());
            assert_eq!(show(&found), expected, "{policy}: {before} becomes {after}");
        }
        assert_eq!(show(&changes(Some(&frontend("reset", "1")), None, &node())), "", "the Service has gone");
        let started = changes(None, Some(&frontend("drain=9", "1 2- 3!")), &node());
        assert_eq!(show(&started), "2 addresses keep 2 in 9");
    }

    #[test]
    fn endings_have_their_time() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let way = |last: u8| Way {
            protocol: Protocol::Tcp,
            called: "10.96.0.10:80".parse().expect("address"),
            endpoint: SocketAddr::from(([10, 244, 0, last], 8080)),
        };
        let mut endings = Endings::default();
        endings.gone(way(1), Duration::ZERO, at(0));
        endings.gone(way(2), Duration::from_secs(10), at(0));
        endings.gone(way(3), Duration::from_secs(10), at(0));
        // Told twice, it has no more time.
        endings.gone(way(2), Duration::from_secs(10), at(9));
        assert_eq!(endings.due(at(0)), Due { begin: vec![way(1)], forget: vec![] });
        assert_eq!(endings.next(), Some(at(2)));
        assert_eq!(endings.due(at(2)), Due { begin: vec![], forget: vec![way(1)] });
        endings.back(&way(3));
        assert_eq!(endings.next(), Some(at(10)));
        let due = endings.due(at(10));
        assert_eq!(due, Due { begin: vec![way(2)], forget: vec![] });
        endings.retry(due, at(11));
        assert_eq!(endings.next(), Some(at(11)));
        assert_eq!(endings.due(at(11)).begin, [way(2)]);
        endings.back(&way(2));
        assert_eq!(endings.due(at(13)).forget, [way(2)], "what was reset stays so");
        assert_eq!(endings.next(), None);
    }
}
