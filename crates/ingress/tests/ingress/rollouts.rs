//! Rolling updates under load at every protocol: endpoints come, others stop being asked, end what is under way, and go. No
//! request fails.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ingress::gateway::BackendTls;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;

use crate::world::{Backend, PATIENCE, World, ingress, text};

/// Rolling updates: twenty, or fewer where FAIRLEAD_CASES asks for little.
fn wanted_rollouts() -> usize {
    let cases = std::env::var("FAIRLEAD_CASES");
    cases.map_or(4, |cases| (cases.parse::<usize>().expect("FAIRLEAD_CASES is a number") / 10).clamp(4, 20))
}

/// A request under way, until dropped.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        UnderWay(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An endpoint that answers HTTP, gRPC and upgrades, and how much of it is under way.
pub async fn endpoint() -> (Backend, Arc<AtomicUsize>) {
    let count: Arc<AtomicUsize> = Arc::default();
    let of_requests = count.clone();
    let backend = Backend::start(move |mut request| {
        let under_way = UnderWay::new(&of_requests);
        async move {
            if request.headers().contains_key("upgrade") {
                let upgrade = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let _under_way = under_way;
                    // The client may go before it has its answer.
                    let Ok(stream) = upgrade.await else { return };
                    let mut stream = TokioIo::new(stream);
                    let mut buffer = [0; 64];
                    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                        if stream.write_all(&buffer[..length]).await.is_err() {
                            return;
                        }
                    }
                });
                let mut response = Response::new(text(""));
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                response.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
                response.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
                return response;
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let frames = futures::stream::iter([Ok(Frame::data(body)), Ok(Frame::trailers(trailers))]);
            // Under way for as long as its body is.
            let frames = futures::StreamExt::chain(
                frames,
                futures::stream::once(async move {
                    drop(under_way);
                    Ok(Frame::data("".into()))
                }),
            );
            let frames = futures::StreamExt::filter(frames, |frame: &Result<Frame<_>, _>| {
                let is_something = frame.as_ref().is_ok_and(|frame: &Frame<bytes::Bytes>| {
                    frame.is_trailers() || frame.data_ref().is_some_and(|data| !data.is_empty())
                });
                futures::future::ready(is_something)
            });
            Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
        }
    })
    .await;
    (backend, count)
}

fn question(host: &str) -> Request<crate::world::Body> {
    Request::post(format!("http://{host}/pkg.Service/Method"))
        .header("host", host)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(text("question"))
        .expect("a request")
}

/// A way to the proxy.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    Plain(SocketAddr),
    Tls(SocketAddr),
}

trait Connected: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Connected for S {}

impl Way {
    /// A connection for requests of `host`.
    async fn dial(self, host: &str, is_http2: bool) -> Result<Box<dyn Connected>, String> {
        let (Way::Plain(to) | Way::Tls(to)) = self;
        let stream = TcpStream::connect(to).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        if matches!(self, Way::Plain(_)) {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let tls = BackendTls::unverified(Some(name.clone()), Arc::new(ring::default_provider()));
        let config = tls.config(None, is_http2).map_err(|error| error.to_string())?;
        let stream = TlsConnector::from(config).connect(name, stream).await.map_err(|error| error.to_string())?;
        Ok(Box::new(stream))
    }
}

async fn http1(way: Way) -> Result<(), String> {
    let stream = way.dial("plain.example", false).await?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let driver = tokio::spawn(connection);
    for _ in 0..20 {
        let request = Request::get("/x").header("host", "plain.example").body(text("")).expect("a request");
        sender.ready().await.map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        response.into_body().collect().await.map_err(|error| error.to_string())?;
        (status == 200).then_some(()).ok_or(format!("HTTP/1.1: {status}"))?;
    }
    driver.abort();
    Ok(())
}

/// Over HTTP/2: plain requests, or gRPC with its trailers.
async fn http2(way: Way, host: &'static str) -> Result<(), String> {
    let stream = way.dial(host, true).await?;
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let driver = tokio::spawn(connection);
    for _ in 0..20 {
        let response = sender.send_request(question(host)).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| error.to_string())?;
        let is_whole = body.trailers().is_some_and(|trailers| trailers["grpc-status"] == "0");
        let is_good = status == 200 && (is_whole || host != "grpc.example") && body.to_bytes() == "question";
        is_good.then_some(()).ok_or(format!("{host}: {status}"))?;
    }
    driver.abort();
    Ok(())
}

async fn websocket(way: Way) -> Result<(), String> {
    let mut stream = way.dial("plain.example", false).await?;
    let head = "GET /ws HTTP/1.1\r\nHost: plain.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    stream.write_all(head.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        let byte =
            stream.read_u8().await.map_err(|error| format!("{error} after {}", String::from_utf8_lossy(&seen)))?;
        seen.push(byte);
    }
    let is_changed = seen.starts_with(b"HTTP/1.1 101");
    is_changed.then_some(()).ok_or_else(|| String::from_utf8_lossy(&seen).into_owned())?;
    for _ in 0..5 {
        stream.write_all(b"echo").await.map_err(|error| error.to_string())?;
        let mut echo = [0; 4];
        stream.read_exact(&mut echo).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Kinds of requests.
pub const KINDS: usize = 4;

/// Requests of one kind, over one connection: HTTP/1.1, HTTP/2, gRPC, WebSocket.
pub async fn ask(kind: usize, way: Way) -> Result<(), String> {
    match kind {
        0 => http1(way).await,
        1 => http2(way, "plain.example").await,
        2 => http2(way, "grpc.example").await,
        _ => websocket(way).await,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_updates_cost_nobody_a_request() {
    let plain = ingress("").replace("shop.example", "plain.example");
    let grpc = ingress("nginx.ingress.kubernetes.io/backend-protocol: GRPC")
        .replace("shop.example", "grpc.example")
        .replace("Ingress shop/web", "Ingress shop/grpc");
    let mut world = World::start(&[&plain, &grpc], |_| {}).await;
    let mut held = vec![endpoint().await, endpoint().await, endpoint().await];
    let addresses = |held: &[(Backend, Arc<AtomicUsize>)]| -> Vec<SocketAddr> {
        held.iter().map(|(backend, _)| backend.address).collect()
    };
    world.serve("web", &addresses(&held));
    let stop = Arc::new(AtomicBool::new(false));
    let done: [Arc<AtomicUsize>; KINDS] = std::array::from_fn(|_| Arc::default());
    let mut clients = JoinSet::new();
    for (kind, done) in done.iter().enumerate() {
        let (stop, done, way) = (stop.clone(), done.clone(), Way::Plain(world.http));
        clients.spawn(async move {
            let mut bad = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                match timeout(PATIENCE, ask(kind, way)).await {
                    Ok(Ok(())) => drop(done.fetch_add(1, Ordering::Relaxed)),
                    Ok(Err(problem)) => bad.push(problem),
                    Err(_) => bad.push(format!("{kind} takes too long")),
                }
            }
            bad
        });
    }
    for _ in 0..wanted_rollouts() {
        // One more, one less, until all are others.
        for _ in 0..held.len() {
            held.push(endpoint().await);
            world.serve("web", &addresses(&held));
            let (old, count) = held.remove(0);
            world.serve("web", &addresses(&held));
            // It ends what it has, and what was on its way to it when it stopped being asked.
            let mut quiet = 0;
            timeout(PATIENCE, async {
                while quiet < 10 {
                    quiet = if count.load(Ordering::SeqCst) == 0 { quiet + 1 } else { 0 };
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await
            .expect("it comes to an end");
            drop(old);
        }
        // Every protocol has been through this one.
        let before: Vec<usize> = done.iter().map(|done| done.load(Ordering::Relaxed)).collect();
        timeout(PATIENCE, async {
            while done.iter().zip(&before).any(|(done, before)| done.load(Ordering::Relaxed) == *before) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("requests go on at every protocol");
    }
    stop.store(true, Ordering::Relaxed);
    let mut bad = Vec::new();
    while let Some(found) = clients.join_next().await {
        bad.extend(found.expect("no panic"));
    }
    assert!(bad.is_empty(), "{} failed: {bad:?}", bad.len());
    world.end().await;
}
