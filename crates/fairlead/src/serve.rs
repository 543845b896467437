//! The API server's front door: TLS, HTTP/1.1 and HTTP/2 on one port, and a client's certificate beside each request.
//!
//! Whatever a client does, the loop goes on: a connection lives in a task of its own, must say something within ten
//! seconds, and is one of a limited number. On the drain token, requests under way are finished.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use apiserver::ApiServer;
use apiserver::auth::authenticate::{ForeignCertificate, PeerCertificate};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::pki::{self, CertifiedKey, Rotating};

/// How long a client may take for its handshake, and for the head of a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an HTTP/1.1 connection may be idle, or slow with a later request: longer than clients keep theirs, so that
/// none finds its connection closed under a request. The first request's head is held to `PATIENCE`.
const IDLE: Duration = Duration::from_secs(120);
/// How long requests under way have once the drain has begun. Watches and streams end with their own tokens.
const DRAIN: Duration = Duration::from_secs(10);
const MAX_CONNECTIONS: usize = 8192;
/// How much of a body that nobody wants is read, so that its sender gets to see the answer.
const MAX_DISCARD: u64 = 256 * 1024 * 1024;

/// TLS of the API server. A certificate of a foreign authority ends no handshake: its bearer is told 401, in words.
#[derive(Clone)]
pub struct ApiTls {
    config: Arc<rustls::ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
}

pub fn api_tls(certificate: &CertifiedKey, ca_pem: &str) -> anyhow::Result<ApiTls> {
    let verifier = verifier(ca_pem)?;
    let config = config(Rotating::new(certificate)?, Arc::new(AnyCertificate(verifier.clone())))?;
    Ok(ApiTls { config, verifier })
}

/// Takes any client certificate whose key the client holds. Whose it is, is found out after the handshake.
#[derive(Debug)]
struct AnyCertificate(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AnyCertificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// TLS for a listener: the certificate as it is at each handshake; clients may show one that `ca_pem` signed, and need not.
pub fn tls_config(certificate: Arc<Rotating>, ca_pem: &str) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    config(certificate, verifier(ca_pem)?)
}

fn verifier(ca_pem: &str) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in pki::certificates(ca_pem.as_bytes())? {
        roots.add(authority).context("the certificate authority cannot be used for TLS")?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated().build();
    verifier.context("prepare the check of client certificates")
}

fn config(
    certificate: Arc<Rotating>,
    verifier: Arc<dyn ClientCertVerifier>,
) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("choose TLS versions")?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Answers on `listener` until `token` is cancelled; returns when the last connection is through or the drain's time is up.
pub async fn serve_api(listener: TcpListener, tls: ApiTls, server: ApiServer, token: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Nobody is accepted while the house is full: the kernel's queue makes newcomers wait.
        let accepted = tokio::select! {
            () = token.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
        };
        match accepted {
            Ok((stream, permit)) => {
                let connection = serve_connection(tls.clone(), stream, server.clone(), token.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: those that end give some back, which nothing announces.
                warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let through = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, through).await.is_err() {
        debug!("the drain's time is up; the rest is cut off");
    }
    connections.shutdown().await;
}

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

async fn serve_connection(tls: ApiTls, stream: TcpStream, server: ApiServer, token: CancellationToken) {
    let acceptor = TlsAcceptor::from(tls.config);
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "TCP_NODELAY");
    }
    let handshake = tokio::time::timeout(PATIENCE, acceptor.accept(stream));
    let stream = tokio::select! {
        done = handshake => match done {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return debug!(%error, "TLS handshake"),
            Err(_) => return debug!("no TLS handshake in time"),
        },
        () = token.cancelled() => return,
    };
    let peer = peer(&stream, &*tls.verifier);
    let begun = Arc::new(Begun::default());
    let service = {
        let begun = begun.clone();
        service_fn(move |request: Request<Incoming>| {
            begun.mark();
            answer(server.clone(), peer.clone(), request)
        })
    };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(1000_u32);
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let silence = async {
        tokio::select! {
            () = tokio::time::sleep(PATIENCE) => {}
            () = begun.wait() => std::future::pending().await,
        }
    };
    let mut silence = pin!(silence);
    let mut draining = false;
    loop {
        tokio::select! {
            done = connection.as_mut() => {
                if let Err(error) = done {
                    debug!(%error, "connection ended");
                }
                return;
            }
            () = silence.as_mut() => return debug!("no request in time"),
            () = token.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Whether a connection's first request has come: before that, HTTP itself sets no limit.
#[derive(Default)]
struct Begun {
    yes: AtomicBool,
    told: Notify,
}

impl Begun {
    fn mark(&self) {
        if !self.yes.swap(true, Ordering::AcqRel) {
            // One permit is kept for a waiter that comes later.
            self.told.notify_one();
        }
    }

    async fn wait(&self) {
        if !self.yes.load(Ordering::Acquire) {
            self.told.notified().await;
        }
    }
}

/// The certificate that the client has shown: ours, or somebody else's.
#[derive(Clone)]
enum Peer {
    Ours(PeerCertificate),
    Foreign,
}

fn peer(stream: &TlsStream<TcpStream>, verifier: &dyn ClientCertVerifier) -> Option<Peer> {
    let (_, session) = stream.get_ref();
    let (leaf, chain) = session.peer_certificates()?.split_first()?;
    Some(match verifier.verify_client_cert(leaf, chain, UnixTime::now()) {
        Ok(_) => Peer::Ours(PeerCertificate(leaf.to_vec())),
        Err(error) => {
            debug!(%error, "a client's certificate is not of this cluster");
            Peer::Foreign
        }
    })
}

async fn answer(
    server: ApiServer,
    peer: Option<Peer>,
    mut request: Request<Incoming>,
) -> Result<Response<apiserver::body::Body>, Infallible> {
    match peer {
        Some(Peer::Ours(certificate)) => drop(request.extensions_mut().insert(certificate)),
        Some(Peer::Foreign) => drop(request.extensions_mut().insert(ForeignCertificate)),
        None => {}
    }
    Ok(server.handle(request.map(|body| Received(Some(body)))).await)
}

/// A request's body. One that is dropped half read is read to its end and thrown away: resetting the connection, or the
/// stream, under a client that still sends would lose the answer (413, say), even where HTTP/2 calls that reset no error.
struct Received(Option<Incoming>);

impl HttpBody for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.0.as_mut() {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(SizeHint::default, HttpBody::size_hint)
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        let Some(mut body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            let mut left = MAX_DISCARD;
            let discard = async {
                while let Some(Ok(frame)) = body.frame().await {
                    let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                    match left.checked_sub(length) {
                        Some(rest) => left = rest,
                        None => return,
                    }
                }
            };
            // A client that sends slowly is not waited for.
            let _ = tokio::time::timeout(PATIENCE * 3, discard).await;
        });
    }
}
