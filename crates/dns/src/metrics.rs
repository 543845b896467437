//! Counts questions and answers, and tells Prometheus under CoreDNS's names, so that its dashboards work.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::chain::{Resolver, Source};

/// Upper bounds in seconds, CoreDNS's.
const BUCKETS: [f64; 16] =
    [0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];
const MAX_SCRAPES: usize = 16;
const MAX_REQUEST: usize = 8 * 1024;
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// `udp` or `tcp`.
    pub protocol: &'static str,
    pub is_ipv6: bool,
}

#[derive(Default)]
struct Counts {
    requests: BTreeMap<(Way, &'static str), u64>,
    responses: BTreeMap<(&'static str, &'static str), u64>,
    cache_hits: u64,
    cache_misses: u64,
    buckets: [u64; BUCKETS.len()],
    answered: u64,
    seconds: f64,
}

/// What this server has done since it started.
pub struct Metrics {
    /// The label by which scrapes tell servers apart, such as `dns://:53`.
    server: String,
    counts: Mutex<Counts>,
}

impl Metrics {
    pub fn new(server: String) -> Self {
        Metrics { server, counts: Mutex::new(Counts::default()) }
    }

    /// One question was answered. `source` is `None` for one that was refused before anybody was asked.
    pub fn count(
        &self,
        way: Way,
        record_type: Option<RecordType>,
        code: ResponseCode,
        source: Option<Source>,
        took: Duration,
    ) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.requests.entry((way, type_label(record_type))).or_default() += 1;
        *counts.responses.entry((code_label(code), source.map_or("", Source::plugin))).or_default() += 1;
        match source {
            Some(Source::Cache) => counts.cache_hits += 1,
            Some(Source::Forward) => counts.cache_misses += 1,
            _ => {}
        }
        let seconds = took.as_secs_f64();
        counts.answered += 1;
        counts.seconds += seconds;
        for (count, bound) in counts.buckets.iter_mut().zip(BUCKETS) {
            *count += u64::from(seconds <= bound);
        }
    }

    /// The Prometheus text format.
    pub fn text(&self) -> String {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = format!("server=\"{}\",zone=\".\",view=\"\"", self.server);
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out, &counts, &labels);
        out
    }

    fn write(&self, out: &mut String, counts: &Counts, labels: &str) -> std::fmt::Result {
        head(out, "coredns_dns_requests_total", "counter", "DNS requests by transport and type.")?;
        for ((way, record_type), count) in &counts.requests {
            let family = if way.is_ipv6 { 2 } else { 1 };
            let protocol = way.protocol;
            writeln!(
                out,
                "coredns_dns_requests_total{{{labels},proto=\"{protocol}\",family=\"{family}\",type=\"{record_type}\"}} {count}"
            )?;
        }
        head(out, "coredns_dns_responses_total", "counter", "DNS responses by code and by who answered.")?;
        for ((code, plugin), count) in &counts.responses {
            writeln!(out, "coredns_dns_responses_total{{{labels},rcode=\"{code}\",plugin=\"{plugin}\"}} {count}")?;
        }
        head(out, "coredns_dns_request_duration_seconds", "histogram", "Time to answer a request.")?;
        for (count, bound) in counts.buckets.iter().zip(BUCKETS) {
            writeln!(out, "coredns_dns_request_duration_seconds_bucket{{{labels},le=\"{bound}\"}} {count}")?;
        }
        let answered = counts.answered;
        writeln!(out, "coredns_dns_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}} {answered}")?;
        writeln!(out, "coredns_dns_request_duration_seconds_sum{{{labels}}} {}", counts.seconds)?;
        writeln!(out, "coredns_dns_request_duration_seconds_count{{{labels}}} {answered}")?;
        head(out, "coredns_cache_hits_total", "counter", "Questions answered from the cache.")?;
        writeln!(out, "coredns_cache_hits_total{{{labels}}} {}", counts.cache_hits)?;
        head(out, "coredns_cache_misses_total", "counter", "Questions that went to an upstream server.")?;
        writeln!(out, "coredns_cache_misses_total{{{labels}}} {}", counts.cache_misses)
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// Few labels whatever clients ask: unusual types share one.
fn type_label(record_type: Option<RecordType>) -> &'static str {
    match record_type {
        Some(
            known @ (RecordType::A
            | RecordType::AAAA
            | RecordType::ANY
            | RecordType::CNAME
            | RecordType::HTTPS
            | RecordType::MX
            | RecordType::NS
            | RecordType::PTR
            | RecordType::SOA
            | RecordType::SRV
            | RecordType::TXT),
        ) => known.into(),
        _ => "other",
    }
}

fn code_label(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::BADVERS => "BADVERS",
        _ => "other",
    }
}

/// Answers `/metrics`, `/health` and `/ready` until the token is cancelled.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>, resolver: Arc<Resolver>, token: CancellationToken) {
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
        let (metrics, resolver, token) = (metrics.clone(), resolver.clone(), token.clone());
        tasks.spawn(async move {
            let scrape = timeout(REQUEST_PATIENCE, respond(stream, &metrics, &resolver));
            // A scraper that goes away or sends no request needs no answer.
            let _ = token.run_until_cancelled(scrape).await;
            drop(place);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn respond(mut stream: TcpStream, metrics: &Metrics, resolver: &Resolver) -> std::io::Result<()> {
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
        ("GET", "/metrics") => ("200 OK", metrics.text()),
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
