//! Calls to an etcd cluster: one connection per endpoint, the next one when one does not answer.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use http::uri::PathAndQuery;
use prost::Message;
use tonic::client::Grpc;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, ConnectError, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::messages::{WatchRequest, WatchResponse};
use super::{EtcdOptions, EtcdTls};
use crate::Error;

/// What may be done with a call that got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// It changes nothing, or changes nothing more the second time.
    Always,
    /// It may have been carried out: repeat it only if it was never sent.
    Unsent,
}

#[derive(Debug)]
pub(crate) struct Client {
    endpoints: Vec<(String, Channel)>,
    /// The endpoint that answered last.
    current: AtomicUsize,
    timeout: Duration,
}

impl Client {
    /// Connects when first called.
    pub fn new(options: &EtcdOptions) -> Result<Self, Error> {
        let endpoints: Result<Vec<_>, _> = options.endpoints.iter().map(|url| endpoint(url, options)).collect();
        let endpoints = endpoints?;
        if endpoints.is_empty() {
            return Err(Error::Connection("no endpoint is given".into()));
        }
        Ok(Self { endpoints, current: AtomicUsize::new(0), timeout: options.timeout })
    }

    /// One request, one answer.
    pub async fn call<Q, A>(&self, path: &'static str, request: Q, repeat: Repeat) -> Result<A, Status>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.try_endpoints(repeat, |mut grpc| {
            let request = Request::new(request.clone());
            async move {
                ready(&mut grpc).await?;
                let codec = ProstCodec::<Q, A>::default();
                Ok(grpc.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
            }
        })
        .await
    }

    /// A stream that begins with the answer to `request` and goes on until dropped.
    pub async fn watch(&self, request: WatchRequest) -> Result<Streaming<WatchResponse>, Status> {
        self.try_endpoints(Repeat::Always, |mut grpc| {
            // etcd ends the watch when the requests end.
            let requests = futures::stream::iter([request.clone()]).chain(futures::stream::pending());
            let mut request = Request::new(requests);
            // End the stream when this member loses its leader, rather than fall silent.
            request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
            async move {
                ready(&mut grpc).await?;
                let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
                let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
                Ok(grpc.streaming(request, path, codec).await?.into_inner())
            }
        })
        .await
    }

    async fn try_endpoints<A, F>(&self, repeat: Repeat, mut call: impl FnMut(Grpc<Channel>) -> F) -> Result<A, Status>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let mut last = Status::unavailable("no endpoint was tried");
        for _ in 0..self.endpoints.len() {
            let at = self.current.load(Ordering::Relaxed);
            let (url, channel) = &self.endpoints[at];
            // A list of everything comes as one message.
            let grpc = Grpc::new(channel.clone()).max_decoding_message_size(usize::MAX);
            let answer = tokio::time::timeout(self.timeout, call(grpc)).await;
            let status = match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) if !is_transient(&status) => return Err(status),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {:?}", self.timeout)),
            };
            let next = (at + 1) % self.endpoints.len();
            // If it has moved meanwhile, another call has found the same.
            self.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).ok();
            let may_repeat = repeat == Repeat::Always || is_unsent(&status);
            last = Status::new(status.code(), format!("{url}: {}", reason(&status)));
            if !may_repeat {
                break;
            }
        }
        Err(last)
    }
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Status> {
    grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))
}

/// Whether another endpoint, or this one later, may do better.
pub(crate) fn is_transient(status: &Status) -> bool {
    // A connection that breaks under a call is Unknown or Internal.
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal | Code::Aborted
    )
}

/// Whether the call failed before a byte of it was sent.
fn is_unsent(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<ConnectError>())
}

/// The innermost cause, which is the one that says something ("Connection refused").
fn reason(status: &Status) -> String {
    causes(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    let first = std::error::Error::source(status);
    std::iter::successors(first, |&error| error.source())
}

fn endpoint(url: &str, options: &EtcdOptions) -> Result<(String, Channel), Error> {
    let connection = |reason: &dyn std::fmt::Display| Error::Connection(format!("{url}: {reason}"));
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| connection(&e))?;
    let endpoint = endpoint
        .connect_timeout(Duration::from_secs(2).min(options.timeout))
        .tcp_nodelay(true)
        // A watch may be silent for hours; this tells a silent peer from a dead one. etcd hangs up on more than one in 5 s.
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5));
    let scheme = endpoint.uri().scheme_str().map(str::to_owned);
    let endpoint = match (scheme.as_deref(), &options.tls) {
        (Some("http"), None) => endpoint,
        (Some("https"), Some(tls)) => endpoint.tls_config(tls_config(tls)).map_err(|e| connection(&e))?,
        (Some("https"), None) => return Err(connection(&"an https endpoint needs a CA certificate")),
        (Some("http"), Some(_)) => return Err(connection(&"certificates are given: use https")),
        _ => return Err(connection(&"the endpoint must start with http:// or https://")),
    };
    Ok((url.to_owned(), endpoint.connect_lazy()))
}

fn tls_config(tls: &EtcdTls) -> ClientTlsConfig {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca));
    match &tls.client {
        Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
        None => config,
    }
}
