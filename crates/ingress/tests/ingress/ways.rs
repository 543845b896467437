//! How endpoints are asked: how often, and what they are told before and beside the request.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::proxy::NGINX;
use crate::world::{Backend, World, ingress, text};

const OURS: &str = "ingress.fairlead.io";

/// Every request fails and could be repeated: the first hundred are, and then as many as time earns.
#[tokio::test]
async fn what_fails_is_asked_again_only_so_often() {
    const COUNT: usize = 400;
    let fails = || {
        Backend::start(|_| async {
            let mut response = Response::new(text("no"));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response
        })
    };
    let (one, other) = (fails().await, fails().await);
    let annotations = format!(
        "{NGINX}/proxy-next-upstream: http_503 error, {NGINX}/proxy-next-upstream-tries: \"2\", {OURS}/retry-budget: \"0\""
    );
    let mut world = World::start(&[&ingress(&annotations)], |config| config.workers = 1).await;
    world.serve("web", &[one.address, other.address]);
    let started = Instant::now();
    let stream = TcpStream::connect(world.http).await.expect("loopback");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a connection");
    let driver = tokio::spawn(connection);
    for _ in 0..COUNT {
        let request = Request::builder().uri("/").header("host", "shop.example").body(Empty::<bytes::Bytes>::new());
        sender.ready().await.expect("it stays");
        let response = sender.send_request(request.expect("a request")).await.expect("an answer");
        assert!(response.status().is_server_error(), "{}", response.status());
        http_body_util::BodyExt::collect(response.into_body()).await.expect("a body");
    }
    let repeated = one.count() + other.count() - COUNT;
    let earned = 10.0 * started.elapsed().as_secs_f64();
    assert!(repeated >= 100 && repeated as f64 <= 101.0 + earned, "{repeated} of {COUNT}, {earned} earned");
    let metrics = (world.metrics)();
    let labels = "{namespace=\"shop\",ingress=\"web\",host=\"shop.example\",path=\"/\"}";
    let refused = format!("fairlead_ingress_retries_refused_total{labels} {}\n", COUNT - repeated);
    assert!(metrics.contains(&refused), "{refused} is not in {metrics}");
    drop(sender);
    driver.abort();
    world.end().await;
}

/// An endpoint of which each connection carries what its client is called, and then requests.
async fn listens() -> (std::net::SocketAddr, Arc<Mutex<Vec<Vec<u8>>>>, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let heard: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let memory = heard.clone();
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut all = Vec::new();
            while !all.windows(4).any(|end| end == b"\r\n\r\n") {
                match stream.read_buf(&mut all).await {
                    Ok(count) if count > 0 => {}
                    _ => break,
                }
            }
            memory.lock().expect("unpoisoned").push(all);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.ok();
        }
    });
    (address, heard, task)
}

#[tokio::test]
async fn endpoints_hear_who_asks_before_the_first_byte() {
    for version in ["v1", "v2"] {
        let (address, heard, task) = listens().await;
        let mut world = World::start(&[&ingress(&format!("{OURS}/proxy-protocol: {version}"))], |_| {}).await;
        world.serve("web", &[address]);
        // Two requests of one client connection: each endpoint's connection is for one.
        let seen = world.curl("http://shop.example/a http://shop.example/b").await;
        assert_eq!(seen.matches("hello").count(), 2, "{seen}");
        let heard = heard.lock().expect("unpoisoned").clone();
        assert_eq!(heard.len(), 2);
        for (one, path) in heard.iter().zip(["/a", "/b"]) {
            let rest = match version {
                "v1" => {
                    let line = one.split(|byte| *byte == b'\n').next().unwrap_or_default();
                    let said = String::from_utf8_lossy(line).into_owned();
                    let ending = format!(" {}\r", world.http.port());
                    assert!(said.starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 ") && said.ends_with(&ending), "{said}");
                    &one[line.len() + 1..]
                }
                _ => {
                    assert_eq!(&one[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", "{one:?}");
                    assert_eq!(&one[16..24], [127, 0, 0, 1, 127, 0, 0, 1]);
                    assert_eq!(&one[26..28], world.http.port().to_be_bytes());
                    &one[28..]
                }
            };
            // The signature of version 2 ends no head.
            assert!(version == "v2" || rest.starts_with(format!("GET {path} ").as_bytes()), "{one:?}");
        }
        task.abort();
        world.end().await;
    }
}

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_request_has_one_trace() {
    let backend = Backend::named("hello").await;
    let mut world = World::start(&[&ingress("")], |_| {}).await;
    world.serve("web", &[backend.address]);
    let trace = |head: &str| {
        let rest = head.split("\"traceparent\": \"").nth(1)?;
        Some(rest.split('"').next().unwrap_or_default().to_owned())
    };
    world.curl("http://shop.example/").await;
    assert_eq!(trace(&backend.last()), None, "nobody wants one");
    let brought = format!("-H traceparent:\u{a0}{TRACE} -H tracestate:\u{a0}a=b");
    world.curl(&format!("{brought} http://shop.example/")).await;
    assert!(trace(&backend.last()).as_deref() == Some(TRACE) && backend.last().contains("a=b"), "it is passed on");
    world.apply(&[&ingress(&format!("{NGINX}/enable-opentelemetry: \"true\""))]);
    world.curl(&format!("{brought} http://shop.example/")).await;
    assert!(trace(&backend.last()).as_deref() == Some(TRACE) && backend.last().contains("a=b"), "it is kept");
    let mut made = Vec::new();
    for flags in ["", "-H traceparent:\u{a0}nonsense -H tracestate:\u{a0}a=b"] {
        world.curl(&format!("{flags} http://shop.example/")).await;
        let one = trace(&backend.last()).expect("one is made");
        assert!(one.len() == 55 && one.starts_with("00-") && one.ends_with("-01"), "{one}");
        assert!(!backend.last().contains("a=b"), "what was said of no trace is not said of this one");
        made.push(one);
    }
    assert_ne!(made[0][..35], made[1][..35], "each has its own");
    let own = format!("{NGINX}/enable-opentelemetry: \"true\", {NGINX}/opentelemetry-trust-incoming-span: \"false\"");
    world.apply(&[&ingress(&own)]);
    world.curl(&format!("{brought} http://shop.example/")).await;
    assert_ne!(trace(&backend.last()).expect("one is made"), TRACE);
    world.end().await;
    // For all that do not say otherwise.
    let mut world = World::start(&[&ingress("")], |config| config.trace = true).await;
    world.serve("web", &[backend.address]);
    world.curl("http://shop.example/").await;
    assert!(trace(&backend.last()).is_some());
    world.apply(&[&ingress(&format!("{NGINX}/enable-opentelemetry: \"false\""))]);
    world.curl("http://shop.example/").await;
    assert_eq!(trace(&backend.last()), None);
    world.end().await;
}
