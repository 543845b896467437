//! Tells Prometheus under CoreDNS's names, so that its dashboards work.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::chain::Resolver;
use crate::counts::{CODES, Counts, Histogram, KINDS, PLUGINS, Way};

const MAX_SCRAPES: usize = 16;
const MAX_REQUEST: usize = 8 * 1024;
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// What is told of a server.
pub struct Metrics {
    /// The label by which scrapes tell servers apart, such as `dns://:53`.
    pub server: String,
    pub counts: Counts,
    pub outage: Option<watch::Receiver<Option<Instant>>>,
}

impl Metrics {
    /// The Prometheus text format.
    pub fn text(&self, resolver: &Resolver) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out, resolver);
        out
    }

    fn write(&self, out: &mut String, resolver: &Resolver) -> std::fmt::Result {
        let labels = format!("server=\"{}\",zone=\".\",view=\"\"", self.server);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        head(out, "coredns_dns_requests_total", "counter", "DNS requests by transport and type.")?;
        for way in Way::ALL {
            let (protocol, family) = (way.protocol(), if way.is_ipv6 { 2 } else { 1 });
            for (counter, (_, kind)) in self.counts.requests[way.index()].iter().zip(KINDS).filter(|(n, _)| load(n) > 0)
            {
                let more = format!("proto=\"{protocol}\",family=\"{family}\",type=\"{kind}\"");
                writeln!(out, "coredns_dns_requests_total{{{labels},{more}}} {}", load(counter))?;
            }
        }
        head(out, "coredns_dns_responses_total", "counter", "DNS responses by code and by who answered.")?;
        for (counters, code) in self.counts.responses.iter().zip(CODES) {
            for (counter, plugin) in counters.iter().zip(PLUGINS).filter(|(n, _)| load(n) > 0) {
                let more = format!("rcode=\"{code}\",plugin=\"{plugin}\"");
                writeln!(out, "coredns_dns_responses_total{{{labels},{more}}} {}", load(counter))?;
            }
        }
        let counts = &self.counts;
        histogram(out, "coredns_dns_request_duration_seconds", "Time to answer a request.", &labels, &counts.duration)?;
        histogram(out, "coredns_dns_request_size_bytes", "Size of requests.", &labels, &counts.request_size)?;
        histogram(out, "coredns_dns_response_size_bytes", "Size of responses.", &labels, &counts.response_size)?;
        let plugin = |name: &str| PLUGINS.iter().position(|plugin| *plugin == name).unwrap_or_default();
        let answered = |name: &str| self.counts.responses.iter().map(|by| load(&by[plugin(name)])).sum::<u64>();
        let happened = &resolver.happened;
        for (name, kind, help, value) in [
            ("coredns_cache_hits_total", "counter", "Questions answered from the cache.", answered("cache")),
            (
                "coredns_cache_misses_total",
                "counter",
                "Questions that went to an upstream server.",
                answered("forward"),
            ),
            ("coredns_cache_entries", "gauge", "Answers of upstream servers that are kept.", resolver.cached() as u64),
            (
                "coredns_cache_prefetch_total",
                "counter",
                "Answers that were asked for again before they ended.",
                load(&happened.prefetched),
            ),
            (
                "coredns_cache_served_stale_total",
                "counter",
                "Answers that stood in while upstream servers failed.",
                load(&happened.stale),
            ),
            ("coredns_autopath_success_total", "counter", "Search paths walked for a client.", load(&happened.walked)),
            ("coredns_hosts_entries", "gauge", "Names that the operator wrote down.", resolver.hosts.len() as u64),
        ] {
            head(out, name, kind, help)?;
            writeln!(out, "{name}{{{labels}}} {value}")?;
        }
        upstreams(out, resolver)?;
        let Some(outage) = &self.outage else { return Ok(()) };
        let since = *outage.borrow();
        let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        head(
            out,
            "fairlead_dns_api_connected",
            "gauge",
            "Whether the API server answers; names are kept while it does not.",
        )?;
        writeln!(out, "fairlead_dns_api_connected {}", u8::from(since.is_none()))?;
        head(out, "fairlead_dns_api_outage_seconds", "gauge", "For how long the API server has not answered.")?;
        writeln!(out, "fairlead_dns_api_outage_seconds {seconds}")
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

fn histogram<const N: usize>(
    out: &mut String,
    name: &str,
    help: &str,
    labels: &str,
    values: &Histogram<N>,
) -> std::fmt::Result {
    head(out, name, "histogram", help)?;
    samples(out, name, labels, values)
}

fn samples<const N: usize>(out: &mut String, name: &str, labels: &str, values: &Histogram<N>) -> std::fmt::Result {
    for (bound, count) in values.cumulated() {
        writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}")?;
    }
    let total = values.total.load(Ordering::Relaxed);
    writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {total}")?;
    writeln!(out, "{name}_sum{{{labels}}} {}", values.sum())?;
    writeln!(out, "{name}_count{{{labels}}} {total}")
}

/// Of each upstream server, under the names of CoreDNS's plugin forward and what it is built on.
fn upstreams(out: &mut String, resolver: &Resolver) -> std::fmt::Result {
    let forward = &resolver.forward;
    let name = "coredns_proxy_request_duration_seconds";
    head(out, name, "histogram", "Time until an upstream server answered.")?;
    for server in forward.servers() {
        for (took, code) in server.took.iter().zip(CODES).filter(|(took, _)| took.total.load(Ordering::Relaxed) > 0) {
            let labels = format!("proxy_name=\"forward\",to=\"{}\",rcode=\"{code}\"", server.address());
            samples(out, name, &labels, took)?;
        }
    }
    let name = "coredns_proxy_healthcheck_failures_total";
    head(out, name, "counter", "How often an upstream server failed and was left alone for a while.")?;
    for server in forward.servers() {
        let failures = server.failures.load(Ordering::Relaxed);
        writeln!(out, "{name}{{proxy_name=\"forward\",to=\"{}\"}} {failures}", server.address())?;
    }
    let name = "coredns_forward_healthcheck_broken_total";
    head(out, name, "counter", "Questions that came when all upstream servers for them had failed lately.")?;
    writeln!(out, "{name} {}", forward.broken())
}

/// Answers `/metrics`, `/health` and `/ready` until the token is cancelled.
pub async fn serve(
    listener: TcpListener,
    text: impl Fn() -> String + Clone + Send + Sync + 'static,
    resolver: Arc<Resolver>,
    token: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(MAX_SCRAPES));
    let tasks = TaskTracker::new();
    while let Some(accepted) = token.run_until_cancelled(listener.accept()).await {
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept a scrape of the DNS metrics");
                // Out of descriptors, most likely: trying again at once would only burn the CPU.
                sleep(PAUSE).await;
                continue;
            }
        };
        // Too many at once: the scraper sees a closed connection and comes back.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let (text, resolver, token) = (text.clone(), resolver.clone(), token.clone());
        tasks.spawn(async move {
            let scrape = timeout(REQUEST_PATIENCE, respond(stream, &text, &resolver));
            // A scraper that goes away or sends no request needs no answer.
            let _ = token.run_until_cancelled(scrape).await;
            drop(place);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn respond(
    mut stream: TcpStream,
    metrics: &(impl Fn() -> String + Sync),
    resolver: &Resolver,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        let length = stream.read(&mut chunk).await?;
        request.extend_from_slice(&chunk[..length]);
        if length == 0 || request.len() > MAX_REQUEST {
            return Ok(());
        }
    }
    let text = String::from_utf8_lossy(&request);
    let mut words = text.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        ("GET", "/metrics") => ("200 OK", metrics()),
        ("GET", "/health") => ("200 OK", "OK".to_owned()),
        ("GET", "/ready") if resolver.is_ready() => ("200 OK", "OK".to_owned()),
        ("GET", "/ready") => ("503 Service Unavailable", "the service table is not complete yet".to_owned()),
        ("GET", _) => ("404 Not Found", "try /metrics, /health or /ready".to_owned()),
        _ => ("405 Method Not Allowed", "only GET".to_owned()),
    };
    let length = body.len();
    let response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}
