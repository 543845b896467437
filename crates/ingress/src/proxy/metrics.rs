//! What Prometheus sees: requests by route, endpoints by address, connections.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::Shared;
use crate::gateway::{PortTable, StreamRoute};
use crate::route::{Route, RouteName};
use crate::upstream::{Endpoint, Upstream};

/// The Prometheus text format.
pub fn text(shared: &Shared) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, shared);
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

fn labels(name: &RouteName) -> String {
    let clean = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
    let owner = match name.kind {
        "Ingress" => format!("ingress=\"{}\"", name.name),
        kind => format!("kind=\"{kind}\",route=\"{}\"", name.name),
    };
    format!("namespace=\"{}\",{owner},host=\"{}\",path=\"{}\"", name.namespace, name.host, clean(&name.path))
}

fn write(out: &mut String, shared: &Shared) -> std::fmt::Result {
    let table = shared.routes.load();
    // One port of a Gateway may be open at several addresses; it is one to its routes.
    let ports: Vec<Arc<PortTable>> = shared.ports.borrow().values().map(|port| port.load()).collect();
    let all: Vec<&Arc<Route>> = table.routes().chain(ports.iter().flat_map(|port| port.routes())).collect();
    let mut routes: BTreeMap<&RouteName, &Arc<Route>> = BTreeMap::new();
    for route in all.iter().filter(|route| route.counts.total() > 0) {
        routes.insert(&route.name, route);
    }
    let name = "fairlead_ingress_requests_total";
    head(out, name, "counter", "Requests by route and the first digit of their status.")?;
    for (route, held) in &routes {
        for (class, count) in held.counts.statuses.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                writeln!(out, "{name}{{{},status=\"{}xx\"}} {count}", labels(route), class + 1)?;
            }
        }
    }
    let name = "fairlead_ingress_request_duration_seconds";
    head(out, name, "histogram", "Time from a request's head to its answer's.")?;
    for (route, held) in &routes {
        let labels = labels(route);
        for (bound, count) in held.counts.cumulated() {
            writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}")?;
        }
        let total = held.counts.total();
        writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {total}")?;
        writeln!(out, "{name}_sum{{{labels}}} {}\n{name}_count{{{labels}}} {total}", held.counts.seconds())?;
    }
    let counters = [
        ("fairlead_ingress_retries_total", "Requests that were tried once more.", 0),
        ("fairlead_ingress_sent_bytes_total", "Bytes of answers' bodies.", 1),
        ("fairlead_ingress_retries_refused_total", "Requests that the retry budget kept from a second endpoint.", 2),
    ];
    for (name, help, which) in counters {
        head(out, name, "counter", help)?;
        for (route, held) in &routes {
            let counter = [&held.counts.retries, &held.counts.sent, &held.counts.budget.refused][which];
            writeln!(out, "{name}{{{}}} {}", labels(route), counter.load(Ordering::Relaxed))?;
        }
    }
    let passing = table.streams().cloned();
    let streams: BTreeMap<RouteName, Arc<StreamRoute>> =
        ports.iter().flat_map(|port| port.streams()).chain(passing).map(|route| (route.name.clone(), route)).collect();
    write_streams(out, &streams)?;
    let of_routes = all.iter().flat_map(|route| route.upstreams());
    let of_streams = streams.values().flat_map(|route| route.backends.list()).map(|backend| &backend.upstream);
    write_endpoints(out, of_routes.chain(of_streams))?;
    let single = [
        ("fairlead_ingress_connections", "gauge", "Client connections.", shared.open.load(Ordering::Relaxed) as u64),
        (
            "fairlead_ingress_connections_accepted_total",
            "counter",
            "Client connections since the start.",
            shared.accepted.load(Ordering::Relaxed),
        ),
        (
            "fairlead_ingress_tls_handshakes_failed_total",
            "counter",
            "TLS handshakes that came to nothing.",
            shared.handshakes_failed.load(Ordering::Relaxed),
        ),
        (
            "fairlead_ingress_unrouted_total",
            "counter",
            "Requests that no rule is for.",
            shared.unrouted.load(Ordering::Relaxed),
        ),
        (
            "fairlead_ingress_refused_total",
            "counter",
            "Requests that could be read in two ways, or whose method is not served.",
            shared.refused.load(Ordering::Relaxed),
        ),
    ];
    for (name, kind, help, value) in single {
        head(out, name, kind, help)?;
        writeln!(out, "{name} {value}")?;
    }
    Ok(())
}

fn write_streams(out: &mut String, streams: &BTreeMap<RouteName, Arc<StreamRoute>>) -> std::fmt::Result {
    let names = [
        ("fairlead_ingress_stream_received_bytes_total", "Bytes from clients of connections that are not looked into."),
        ("fairlead_ingress_stream_sent_bytes_total", "Bytes to clients of connections that are not looked into."),
    ];
    for (at, (name, help)) in names.into_iter().enumerate() {
        head(out, name, "counter", help)?;
        for (route, held) in streams {
            let counter = if at == 0 { &held.counts.received } else { &held.counts.sent };
            writeln!(out, "{name}{{{}}} {}", labels(route), counter.load(Ordering::Relaxed))?;
        }
    }
    Ok(())
}

fn write_endpoints<'a>(out: &mut String, upstreams: impl Iterator<Item = &'a Arc<Upstream>>) -> std::fmt::Result {
    let mut endpoints: BTreeMap<String, (String, Arc<Endpoint>)> = BTreeMap::new();
    for upstream in upstreams {
        for endpoint in &upstream.targets().endpoints {
            if endpoint.requests.load(Ordering::Relaxed) > 0 {
                let key = &upstream.key;
                let labels = format!(
                    "namespace=\"{}\",service=\"{}\",endpoint=\"{}\"",
                    key.namespace, key.service, endpoint.address
                );
                endpoints.insert(format!("{labels} {}", key.port), (labels, endpoint.clone()));
            }
        }
    }
    // A Service's ports by name and by number are two upstreams; their requests are told together.
    let mut sums: BTreeMap<&str, [u64; 3]> = BTreeMap::new();
    for (labels, endpoint) in endpoints.values() {
        let sum = sums.entry(labels).or_default();
        sum[0] += endpoint.requests.load(Ordering::Relaxed);
        sum[1] += endpoint.failed.load(Ordering::Relaxed);
        sum[2] += u64::from(endpoint.active.load(Ordering::Relaxed));
    }
    let names = [
        ("fairlead_ingress_endpoint_requests_total", "counter", "Requests sent to an endpoint."),
        ("fairlead_ingress_endpoint_failures_total", "counter", "Requests that an endpoint did not answer."),
        ("fairlead_ingress_endpoint_active", "gauge", "Requests under way at an endpoint."),
    ];
    for (at, (name, kind, help)) in names.into_iter().enumerate() {
        head(out, name, kind, help)?;
        for (labels, sum) in &sums {
            writeln!(out, "{name}{{{labels}}} {}", sum[at])?;
        }
    }
    Ok(())
}
