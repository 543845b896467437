//! Answers GET: what probes, scrapers and load balancers ask of a proxy.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// How long a client may take over the head of a request.
const PATIENCE: Duration = Duration::from_secs(5);
/// A rest after a failed accept: usually there are too many open files, and trying again at once would fail again.
const REST: Duration = Duration::from_millis(100);

/// What a client gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    pub content_type: &'static str,
    /// A header more, if there is one to tell.
    pub header: Option<(&'static str, u64)>,
    pub body: String,
}

impl Answer {
    pub fn json(status: StatusCode, body: String) -> Self {
        Answer { status, content_type: "application/json", header: None, body }
    }

    pub fn text(body: impl Into<String>) -> Self {
        Answer { status: StatusCode::OK, content_type: "text/plain; charset=utf-8", header: None, body: body.into() }
    }

    pub fn not_found() -> Self {
        Answer { status: StatusCode::NOT_FOUND, ..Answer::text("404 page not found\n") }
    }
}

/// From the path of a request to its answer. It may ask the kernel, which blocks for milliseconds.
pub type Respond = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

async fn answer(request: &Request<Incoming>, respond: &Respond) -> Response<Full<Bytes>> {
    let answer = match *request.method() {
        Method::GET | Method::HEAD => {
            let (path, respond) = (request.uri().path().to_owned(), respond.clone());
            tokio::task::spawn_blocking(move || respond(&path)).await.unwrap_or_else(|error| Answer {
                status: StatusCode::INTERNAL_SERVER_ERROR,
                ..Answer::text(format!("this answer died: {error}\n"))
            })
        }
        _ => Answer { status: StatusCode::METHOD_NOT_ALLOWED, ..Answer::text("only GET is answered here\n") },
    };
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some((name, value)) = answer.header {
        headers.insert(name, HeaderValue::from(value));
    }
    response
}

/// Serves until cancelled, and then lets running answers end.
pub async fn serve(listener: TcpListener, respond: Respond, token: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = token.cancelled() => break,
            accepted = async {
                // The semaphore is never closed.
                let slot = slots.clone().acquire_owned().await.ok();
                listener.accept().await.map(|(stream, _)| (slot, stream))
            } => accepted,
        };
        let (slot, stream) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("proxy: a probe or scrape could not be accepted: {error}");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let (respond, token) = (respond.clone(), token.clone());
        connections.spawn(async move {
            let _held = slot;
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let respond = respond.clone();
                async move { Ok::<_, Infallible>(answer(&request, &respond).await) }
            });
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
            let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
            // How a client ends its connection is its own affair.
            tokio::select! {
                _ = connection.as_mut() => return,
                () = token.cancelled() => {}
            }
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        });
    }
    connections.close();
    connections.wait().await;
}
