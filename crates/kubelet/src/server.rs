//! The kubelet's own HTTPS server: logs, exec, attach and port-forward, for the API server.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderName, UPGRADE};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use runtime::{ContainerStatus, ExecRequest, RuntimeError, RuntimeService, SandboxState, Session};
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::logs::{self, LogOptions};
use crate::streaming::exec::{self, Version, Wanted};
use crate::streaming::{forward, session, websocket};

/// Who asks, as the connection and the request tell.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// The client's certificate chain, checked by the TLS configuration already.
    pub certificates: Vec<CertificateDer<'static>>,
    pub bearer: Option<String>,
}

/// Whether a caller may make a request: method and path are given. The error is the answer's status and text.
pub type Authorize = Arc<dyn Fn(Caller, Method, String) -> BoxFuture<'static, Result<(), (u16, String)>> + Send + Sync>;

pub struct ServerConfig {
    pub listener: TcpListener,
    pub tls: Arc<rustls::ServerConfig>,
    pub authorize: Authorize,
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What the server answers from.
#[derive(Clone)]
pub struct Server {
    runtime: Arc<dyn RuntimeService>,
    logs: PathBuf,
}

/// Answers until cancelled.
pub async fn serve(config: ServerConfig, server: Server, token: CancellationToken) {
    let acceptor = tokio_rustls::TlsAcceptor::from(config.tls);
    loop {
        let accepted = tokio::select! {
            accepted = config.listener.accept() => accepted,
            () = token.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: others must end first.
                tracing::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, server, authorize, token) =
            (acceptor.clone(), server.clone(), config.authorize.clone(), token.clone());
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(std::time::Duration::from_secs(10), acceptor.accept(stream));
            let Ok(Ok(stream)) = handshake.await else { return };
            let certificates: Vec<_> = stream
                .get_ref()
                .1
                .peer_certificates()
                .unwrap_or_default()
                .iter()
                .map(|c| c.clone().into_owned())
                .collect();
            let service = service_fn(move |request: Request<Incoming>| {
                let (server, authorize, certificates) = (server.clone(), authorize.clone(), certificates.clone());
                async move {
                    let bearer = bearer(request.headers());
                    let caller = Caller { certificates, bearer };
                    let path = request.uri().path().to_owned();
                    Ok::<_, std::convert::Infallible>(match authorize(caller, request.method().clone(), path).await {
                        Ok(()) => server.handle(request).await,
                        Err((code, why)) => text(StatusCode::from_u16(code).unwrap_or(StatusCode::FORBIDDEN), why),
                    })
                }
            });
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
            tokio::select! {
                result = connection => if let Err(e) = result {
                    tracing::debug!("a connection to the kubelet ended: {e}");
                },
                () = token.cancelled() => {}
            }
        });
    }
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?.to_owned())
}

impl Server {
    /// `logs` is the directory that `KubeletConfig::logs` names.
    pub fn new(runtime: Arc<dyn RuntimeService>, logs: PathBuf) -> Server {
        Server { runtime, logs }
    }

    /// Answers one request of a caller who may make it.
    pub async fn handle(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let parts: Vec<String> = path.split('/').skip(1).map(decode).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let query = parse_query(request.uri().query().unwrap_or_default());
        match parts[..] {
            ["healthz"] => text(StatusCode::OK, "ok".to_owned()),
            ["pods"] => self.pods().await,
            ["containerLogs", namespace, pod, container] => self.logs(namespace, pod, container, &query).await,
            ["exec", namespace, pod, container] => self.exec(namespace, pod, container, query, request, false).await,
            ["attach", namespace, pod, container] => self.exec(namespace, pod, container, query, request, true).await,
            // With the pod's uid, as the kubelet's own paths may have it.
            ["exec", namespace, pod, _, container] => self.exec(namespace, pod, container, query, request, false).await,
            ["attach", namespace, pod, _, container] => {
                self.exec(namespace, pod, container, query, request, true).await
            }
            ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
                self.port_forward(namespace, pod, request).await
            }
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
        }
    }

    async fn pods(&self) -> Response<Body> {
        match self.runtime.list_pod_sandboxes().await {
            Ok(all) => {
                let items: Vec<Value> = all
                    .iter()
                    .map(|s| {
                        serde_json::json!({
                            "metadata": {"name": s.config.name, "namespace": s.config.namespace, "uid": s.config.uid},
                            "status": {"podIPs": s.ips.iter().map(|ip| serde_json::json!({"ip": ip})).collect::<Vec<_>>()},
                        })
                    })
                    .collect();
                let list = serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
                let mut response = text(StatusCode::OK, list.to_string());
                response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
                response
            }
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        }
    }

    async fn logs(&self, namespace: &str, pod: &str, container: &str, query: &[(String, String)]) -> Response<Body> {
        let options = match LogOptions::parse(query) {
            Ok(options) => options,
            Err(e) => return text(StatusCode::BAD_REQUEST, e),
        };
        // Paths are made of these names.
        if [namespace, pod, container].iter().any(|p| p.is_empty() || p.contains('/') || p.starts_with('.')) {
            return text(StatusCode::BAD_REQUEST, "a name is not valid".to_owned());
        }
        let previous = options.previous;
        let Some(path) = logs::find_file(&self.logs, namespace, pod, container, previous) else {
            let message = if previous {
                format!("previous terminated container {container:?} in pod {pod:?} not found")
            } else {
                format!("container {container:?} in pod {pod:?} is waiting to start: ContainerCreating")
            };
            return text(StatusCode::BAD_REQUEST, message);
        };
        let (sender, receiver) = mpsc::channel::<Bytes>(64);
        let (runtime, watched) = (self.runtime.clone(), path.clone());
        let ended = move || -> BoxFuture<'static, bool> {
            let (runtime, watched) = (runtime.clone(), watched.clone());
            Box::pin(async move {
                let all = runtime.list_containers().await.unwrap_or_default();
                !all.iter().any(|c| c.config.log_path == watched && c.state.is_running())
            })
        };
        let events = self.runtime.events();
        tokio::spawn(async move {
            if let Err(e) = logs::stream(path, options, ended, events, sender).await {
                tracing::debug!("a log cannot be read: {e}");
            }
        });
        let frames = futures::stream::unfold(receiver, |mut receiver| async move {
            let mut bytes = receiver.recv().await?;
            // Lines that are ready travel together.
            if !receiver.is_empty() {
                let mut together = bytes::BytesMut::from(&bytes[..]);
                while together.len() < 64 * 1024 {
                    match receiver.try_recv() {
                        Ok(more) => together.extend_from_slice(&more),
                        Err(_) => break,
                    }
                }
                bytes = together.freeze();
            }
            Some((bytes, receiver))
        });
        let body = StreamBody::new(frames.map(|bytes| Ok(Frame::data(bytes))));
        let mut response = Response::new(BodyExt::boxed_unsync(body));
        response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
        response
    }

    async fn find(&self, namespace: &str, pod: &str, container: &str) -> Result<ContainerStatus, Response<Body>> {
        let internal = |e: RuntimeError| text(StatusCode::INTERNAL_SERVER_ERROR, e.to_string());
        let sandbox = self.find_sandbox(namespace, pod).await?;
        let all = self.runtime.list_containers().await.map_err(internal)?;
        let newest = all
            .into_iter()
            .filter(|c| c.sandbox_id == sandbox && (container.is_empty() || c.config.name == container))
            .max_by_key(|c| (c.state.is_running(), c.config.attempt, c.created_at));
        match newest {
            Some(found) if found.state.is_running() => Ok(found),
            Some(_) => Err(text(StatusCode::BAD_REQUEST, format!("container not running ({container})"))),
            None => Err(text(StatusCode::NOT_FOUND, format!("container not found ({container:?})"))),
        }
    }

    async fn find_sandbox(&self, namespace: &str, pod: &str) -> Result<String, Response<Body>> {
        let internal = |e: RuntimeError| text(StatusCode::INTERNAL_SERVER_ERROR, e.to_string());
        let all = self.runtime.list_pod_sandboxes().await.map_err(internal)?;
        all.into_iter()
            .filter(|s| s.config.namespace == namespace && s.config.name == pod && s.state == SandboxState::Ready)
            .max_by_key(|s| s.created_at)
            .map(|s| s.id)
            .ok_or_else(|| text(StatusCode::NOT_FOUND, format!("pod {pod:?} in namespace {namespace:?} not found")))
    }

    async fn exec(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        query: Vec<(String, String)>,
        mut request: Request<Incoming>,
        attach: bool,
    ) -> Response<Body> {
        let found = match self.find(namespace, pod, container).await {
            Ok(found) => found,
            Err(response) => return response,
        };
        let wanted = Wanted::parse(&query);
        if !(wanted.stdin || wanted.stdout || wanted.stderr) {
            let message = "you must specify at least 1 of stdin, stdout, stderr".to_owned();
            return text(StatusCode::BAD_REQUEST, message);
        }
        let command: Vec<String> = query.iter().filter(|(n, _)| n == "command").map(|(_, v)| v.clone()).collect();
        if command.is_empty() && !attach {
            return text(StatusCode::BAD_REQUEST, "you must specify at least 1 command for the container".to_owned());
        }
        let runtime = self.runtime.clone();
        let session = async move {
            let mut session = if attach {
                runtime.attach(&found.id).await
            } else {
                let request = ExecRequest { command, stdin: wanted.stdin, tty: wanted.tty };
                runtime.exec(&found.id, request).await
            }
            .map_err(|e| session::failure(&e))?;
            if !wanted.stdin {
                session.stdin = None;
            }
            if attach {
                // Who attached was not the one who started it: how the container ended stands in the pod's status.
                let exit = std::mem::replace(&mut session.exit, Box::pin(std::future::pending()));
                session.exit = Box::pin(async move { exit.await.map(|_| 0) });
            }
            Ok::<Session, Value>(session)
        };
        match upgrade_of(request.headers()) {
            Some(Upgrade::WebSocket { key, protocols }) => {
                // A client that offers nothing speaks the oldest form.
                let version = match protocols.iter().filter_map(|p| Version::parse(p)).max() {
                    Some(version) => version,
                    None if protocols.is_empty() => Version::V1,
                    None => return text(StatusCode::BAD_REQUEST, format!("none of {protocols:?} is supported")),
                };
                let upgraded = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    match upgraded.await {
                        Ok(stream) => {
                            let session = session.await;
                            exec::over_websocket(TokioIo::new(stream), version, session).await;
                        }
                        Err(e) => tracing::debug!("an upgrade failed: {e}"),
                    }
                });
                let protocol = (!protocols.is_empty()).then(|| version.name());
                switch_to_websocket(&key, protocol)
            }
            Some(Upgrade::Spdy { protocols }) => {
                let version = match protocols.iter().filter_map(|p| Version::parse(p)).max() {
                    Some(version) => version,
                    None if protocols.is_empty() => Version::V1,
                    None => return text(StatusCode::FORBIDDEN, format!("none of {protocols:?} is supported")),
                };
                let upgraded = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    match upgraded.await {
                        Ok(stream) => exec::over_spdy(TokioIo::new(stream), version, wanted, session).await,
                        Err(e) => tracing::debug!("an upgrade failed: {e}"),
                    }
                });
                switch_to_spdy(version.name())
            }
            None => text(StatusCode::BAD_REQUEST, "Upgrade request required".to_owned()),
        }
    }

    async fn port_forward(&self, namespace: &str, pod: &str, mut request: Request<Incoming>) -> Response<Body> {
        const TUNNELLED: &str = "SPDY/3.1+portforward.k8s.io";
        let sandbox = match self.find_sandbox(namespace, pod).await {
            Ok(sandbox) => sandbox,
            Err(response) => return response,
        };
        let Some(upgrade) = upgrade_of(request.headers()) else {
            return text(StatusCode::BAD_REQUEST, "Upgrade request required".to_owned());
        };
        if let Upgrade::WebSocket { protocols, .. } = &upgrade
            && !protocols.iter().any(|p| p == TUNNELLED)
        {
            return text(StatusCode::BAD_REQUEST, format!("none of {protocols:?} is supported: use {TUNNELLED}"));
        }
        let upgraded = hyper::upgrade::on(&mut request);
        let runtime = self.runtime.clone();
        let tunnelled = matches!(upgrade, Upgrade::WebSocket { .. });
        tokio::spawn(async move {
            match upgraded.await {
                Ok(stream) if tunnelled => {
                    forward::over_spdy(websocket::tunnel(TokioIo::new(stream)), runtime, sandbox).await;
                }
                Ok(stream) => forward::over_spdy(TokioIo::new(stream), runtime, sandbox).await,
                Err(e) => tracing::debug!("an upgrade failed: {e}"),
            }
        });
        match upgrade {
            Upgrade::WebSocket { key, .. } => switch_to_websocket(&key, Some(TUNNELLED)),
            Upgrade::Spdy { .. } => switch_to_spdy("portforward.k8s.io"),
        }
    }
}

enum Upgrade {
    WebSocket { key: String, protocols: Vec<String> },
    Spdy { protocols: Vec<String> },
}

const WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
const WEBSOCKET_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");

fn upgrade_of(headers: &HeaderMap) -> Option<Upgrade> {
    let list = |name: HeaderName| -> Vec<String> {
        let lines = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
        lines.flat_map(|l| l.split(',')).map(|p| p.trim().to_owned()).filter(|p| !p.is_empty()).collect()
    };
    let upgrade = headers.get(UPGRADE)?.to_str().ok()?.to_ascii_lowercase();
    if upgrade.starts_with("spdy/3.1") {
        return Some(Upgrade::Spdy { protocols: list(STREAM_PROTOCOL) });
    }
    if upgrade == "websocket" {
        let key = headers.get(WEBSOCKET_KEY)?.to_str().ok()?.to_owned();
        return Some(Upgrade::WebSocket { key, protocols: list(WEBSOCKET_PROTOCOL) });
    }
    None
}

fn switch_to_websocket(key: &str, protocol: Option<&str>) -> Response<Body> {
    let mut builder = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(UPGRADE, "websocket")
        .header(CONNECTION, "Upgrade")
        .header(WEBSOCKET_ACCEPT, websocket::accept(key));
    if let Some(protocol) = protocol {
        builder = builder.header(WEBSOCKET_PROTOCOL, protocol);
    }
    builder.body(empty()).expect("these headers are valid")
}

fn switch_to_spdy(protocol: &str) -> Response<Body> {
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(UPGRADE, "SPDY/3.1")
        .header(CONNECTION, "Upgrade")
        .header(STREAM_PROTOCOL, protocol)
        .body(empty())
        .expect("these headers are valid")
}

fn empty() -> Body {
    Full::default().map_err(|never: std::convert::Infallible| match never {}).boxed_unsync()
}

fn text(status: StatusCode, message: String) -> Response<Body> {
    let body = Full::new(Bytes::from(message)).map_err(|never: std::convert::Infallible| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    response
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn parse_query(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(&name.replace('+', " ")), decode(&value.replace('+', " ")))
        })
        .collect()
}
