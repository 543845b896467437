//! The proxy with real clients: curl, and what a client or an endpoint may do that curl does not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::world::{Backend, PATIENCE, World, ingress, text};

pub const NGINX: &str = "nginx.ingress.kubernetes.io";

pub async fn one() -> (World, Backend) {
    let backend = Backend::named("hello").await;
    let mut world = World::start(&[&ingress("")], |_| {}).await;
    world.serve("web", &[backend.address]);
    (world, backend)
}

#[tokio::test]
async fn a_request_goes_to_an_endpoint_and_says_who_asked() {
    let (world, backend) = one().await;
    let seen = world
        .curl("-H X-Forwarded-For:\u{a0}6.6.6.6 -H X-Real-IP:\u{a0}6.6.6.6 -H Connection:\u{a0}x-drop -H X-Drop:\u{a0}1 http://shop.example/a?b=c")
        .await;
    assert!(seen.starts_with("HTTP/1.1 200 OK") && seen.ends_with("\n\nhello"), "{seen}");
    let head = backend.last();
    assert!(head.starts_with("GET /a?b=c "), "{head}");
    for part in [
        "\"host\": \"shop.example\"",
        "\"x-forwarded-for\": \"127.0.0.1\"",
        "\"x-real-ip\": \"127.0.0.1\"",
        "\"x-forwarded-proto\": \"http\"",
        "\"x-forwarded-host\": \"shop.example\"",
        "\"x-request-id\": \"",
    ] {
        assert!(head.contains(part), "{part} is not in {head}");
    }
    assert!(!head.contains("6.6.6.6") && !head.contains("x-drop"), "{head}");
    assert!(world.curl("http://other.example/").await.starts_with("HTTP/1.1 404"));
    assert!(world.curl("-I http://shop.example/").await.contains("content-length: 5"));
    assert!((world.metrics)().contains(
        "fairlead_ingress_requests_total{namespace=\"shop\",ingress=\"web\",host=\"shop.example\",path=\"/\",status=\"2xx\"} 2"
    ));
    world.end().await;
}

#[tokio::test]
async fn a_trusted_proxy_in_front_is_believed() {
    let backend = Backend::named("hello").await;
    let mut world =
        World::start(&[&ingress("")], |config| config.trusted = vec!["127.0.0.0/8".parse().expect("a range")]).await;
    world.serve("web", &[backend.address]);
    world.curl("-H X-Forwarded-For:\u{a0}6.6.6.6 -H X-Forwarded-Proto:\u{a0}https http://shop.example/").await;
    let head = backend.last();
    assert!(head.contains("\"6.6.6.6, 127.0.0.1\"") && head.contains("\"x-forwarded-proto\": \"https\""), "{head}");
    world.end().await;
}

#[tokio::test]
async fn tls_shows_the_certificate_of_the_name_and_speaks_both_versions() {
    let backend = Backend::named("hello").await;
    let tls = ingress("").replace("rules:", "tls: [{hosts: [shop.example], secretName: cert}], rules:");
    let mut world = World::start(&[&tls], |_| {}).await;
    world.serve("web", &[backend.address]);
    world.secret("cert", "shop.example");
    for (flag, version) in [("--http1.1", "HTTP/1.1 200"), ("--http2", "HTTP/2 200")] {
        let seen = world.curl(&format!("-v {flag} https://shop.example/")).await;
        assert!(seen.contains(version) && seen.contains("TLSv1.3"), "{seen}");
    }
    assert!(backend.last().contains("\"x-forwarded-proto\": \"https\""));
    assert!(world.curl("-v --tls-max 1.2 https://shop.example/").await.contains("TLSv1.2"));
    assert!(world.curl("-v https://other.example/").await.contains("CN=Fairlead Ingress fallback certificate"));
    // The request's host decides, not the handshake's name.
    assert!(world.curl("-H Host:\u{a0}shop.example https://other.example/").await.contains("200"));
    // Plain requests are sent to TLS.
    let seen = world.curl("http://shop.example/a?b").await;
    assert!(seen.starts_with("HTTP/1.1 308") && seen.contains("location: https://shop.example/a?b\n"), "{seen}");
    world.end().await;
}

#[tokio::test]
async fn http2_without_tls_is_understood_on_the_same_port() {
    let (world, backend) = one().await;
    let seen = world.curl("--http2-prior-knowledge http://shop.example/h2").await;
    assert!(seen.starts_with("HTTP/2 200") && seen.ends_with("hello"), "{seen}");
    assert!(backend.last().starts_with("GET /h2 ") && backend.last().contains("\"host\": \"shop.example\""));
    world.end().await;
}

#[tokio::test]
async fn bodies_go_through_and_no_further_than_allowed() {
    let backend = Backend::start(|request| async move {
        // A body that is broken off is short.
        let length = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
        Response::new(text(length.to_string()))
    })
    .await;
    let mut world = World::start(&[&ingress(&format!("{NGINX}/proxy-body-size: 1m"))], |_| {}).await;
    world.serve("web", &[backend.address]);
    let dir = std::env::temp_dir().join(format!("fairlead-ingress-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    for (bytes, chunked, status) in [
        (1 << 20, "", "200"),
        ((1 << 20) + 1, "", "413"),
        (2 << 20, "-H Transfer-Encoding:\u{a0}chunked", "413"),
        (1000, "-H Transfer-Encoding:\u{a0}chunked", "200"),
    ] {
        let file = dir.join("body");
        std::fs::write(&file, vec![b'x'; bytes]).expect("written");
        let seen =
            world.curl(&format!("{chunked} -H Expect: --data-binary @{} http://shop.example/", file.display())).await;
        assert!(seen.contains(&format!(" {status} ")), "{bytes} {chunked}: {seen}");
        assert!(status != "200" || seen.ends_with(&format!("\n{bytes}")), "{seen}");
    }
    std::fs::remove_dir_all(&dir).expect("removed");
    world.end().await;
}

/// An address where nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback").local_addr().expect("bound")
}

#[tokio::test]
async fn an_endpoint_that_refuses_costs_nobody_a_request() {
    let good = Backend::named("good").await;
    let mut world = World::start(&[&ingress(&format!("{NGINX}/load-balance: round_robin"))], |_| {}).await;
    world.serve("web", &[nobody().await, good.address, nobody().await]);
    for number in 0..20 {
        let method = if number % 2 == 0 { "-X GET" } else { "-d x=y" };
        let seen = world.curl(&format!("{method} http://shop.example/")).await;
        assert!(seen.ends_with("good"), "{number}: {seen}");
    }
    assert!((world.metrics)().contains("fairlead_ingress_endpoint_failures_total"));
    world.serve("web", &[nobody().await]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 502"));
    world.serve("web", &[]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 503"));
    world.end().await;
}

/// A server that answers one request of a connection, and closes it after the next one has come.
async fn hangs_up() -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                for number in 0..2 {
                    match stream.read(&mut buffer).await {
                        Ok(length) if length > 0 && number == 0 => {
                            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.ok();
                        }
                        _ => return,
                    }
                }
            });
        }
    });
    (address, task)
}

#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_no_failure() {
    let (address, task) = hangs_up().await;
    let mut world = World::start(&[&ingress("")], |config| config.workers = 1).await;
    world.serve("web", &[address]);
    for number in 0..10 {
        let seen = world.curl("http://shop.example/").await;
        assert!(seen.ends_with("ok"), "{number}: {seen}");
    }
    // What may have had an effect is not done twice.
    let seen = world.curl("-d x http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 502") || seen.ends_with("ok"), "{seen}");
    task.abort();
    world.end().await;
}

#[tokio::test]
async fn who_does_not_answer_in_time_is_given_up() {
    let backend = Backend::start(|_| std::future::pending()).await;
    let annotations = format!("{NGINX}/proxy-read-timeout: \"1\", {NGINX}/proxy-next-upstream-tries: \"1\"");
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 504"));
    assert_eq!(backend.count(), 1);
    world.end().await;
}

#[tokio::test]
async fn a_status_may_count_as_a_failure() {
    let bad = Backend::start(|_| async {
        let mut response = Response::new(text("bad"));
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response
    })
    .await;
    let good = Backend::named("good").await;
    let annotations = format!("{NGINX}/proxy-next-upstream: error timeout http_503, {NGINX}/load-balance: round_robin");
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[bad.address, good.address]);
    for _ in 0..6 {
        assert!(world.curl("http://shop.example/").await.ends_with("good"));
    }
    assert!(bad.count() > 0);
    world.end().await;
}

#[tokio::test]
async fn a_websocket_carries_bytes_both_ways() {
    let backend = Backend::start(|mut request| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.expect("an upgrade"));
            let mut buffer = [0; 64];
            while let Ok(length) = stream.read(&mut buffer).await {
                if length == 0 || stream.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        });
        let mut response = Response::new(text(""));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
        response.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
        response
    })
    .await;
    let mut world = World::start(&[&ingress("")], |_| {}).await;
    world.serve("web", &[backend.address]);
    let mut stream = TcpStream::connect(world.http).await.expect("loopback");
    let head = "GET /ws HTTP/1.1\r\nHost: shop.example\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut seen = vec![0; 4096];
    let length = timeout(PATIENCE, stream.read(&mut seen)).await.expect("in time").expect("an answer");
    let answer = String::from_utf8_lossy(&seen[..length]).to_ascii_lowercase();
    assert!(answer.starts_with("http/1.1 101") && answer.contains("upgrade: websocket"), "{answer}");
    for word in ["one", "two"] {
        stream.write_all(word.as_bytes()).await.expect("sent");
        let mut echo = vec![0; word.len()];
        timeout(PATIENCE, stream.read_exact(&mut echo)).await.expect("in time").expect("an echo");
        assert_eq!(echo, word.as_bytes());
    }
    drop(stream);
    world.end().await;
}

#[tokio::test]
async fn grpc_keeps_its_trailers_in_both_ways_of_asking_for_it() {
    let backend = Backend::start(|request| async move {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        let version = format!("{:?}", request.version());
        trailers.insert("seen-version", HeaderValue::try_from(version).expect("a version"));
        let body = request.into_body().collect().await.expect("a body").to_bytes();
        let frames = futures::stream::iter([Ok(Frame::data(body)), Ok(Frame::trailers(trailers))]);
        Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
    })
    .await;
    for is_annotated in [true, false] {
        let annotation = if is_annotated { format!("{NGINX}/backend-protocol: GRPC") } else { String::new() };
        let mut world = World::start(&[&ingress(&annotation)], |_| {}).await;
        world.serve("web", &[backend.address]);
        if !is_annotated {
            world.apply(&[
                "Service shop/web {clusterIPs: [10.96.0.9], ports: [{port: 80, appProtocol: kubernetes.io/h2c}]}",
            ]);
        }
        let stream = TcpStream::connect(world.http).await.expect("loopback");
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
        let driver = tokio::spawn(connection);
        let request = Request::post("http://shop.example/pkg.Service/Method")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(text("question"))
            .expect("a request");
        let response = timeout(PATIENCE, sender.send_request(request)).await.expect("in time").expect("an answer");
        let body = response.into_body().collect().await.expect("a body");
        let trailers = body.trailers().cloned().expect("trailers");
        assert_eq!(
            (&trailers["grpc-status"], &trailers["seen-version"]),
            (&HeaderValue::from_static("0"), &HeaderValue::from_static("HTTP/2.0"))
        );
        assert_eq!(body.to_bytes(), "question");
        assert!(backend.last().contains("\"te\": \"trailers\""), "{}", backend.last());
        driver.abort();
        world.end().await;
    }
}

/// Requests that one reader ends elsewhere than another, as they have been published: none reaches an endpoint in a form of
/// which it could make two.
#[tokio::test]
async fn what_could_be_read_in_two_ways_reaches_nobody() {
    let (world, backend) = one().await;
    let host = "Host: shop.example\r\n";
    let second = "GET /smuggled HTTP/1.1\r\nHost: shop.example\r\n\r\n";
    let patterns = [
        format!("POST / HTTP/1.1\r\n{host}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: 5\r\nContent-Length: 6\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: 5, 6\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: +5\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: 0x5\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: -1\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host} Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n1 x\r\n{second}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\n{host}Host: other.example\r\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\nHost: shop.example:80@evil\r\n\r\n{second}"),
        format!("GET http://other.example/ HTTP/1.1\r\n{host}\r\n{second}"),
        format!("GET / HTTP/1.1\r\n{host}X: a\rb\r\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\n{host}X: a\0b\r\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\n{host}X\r\n\r\n{second}"),
        format!("GET / HTTP/9.9\r\n{host}\r\n{second}"),
        format!("GET /../etc HTTP/1.1\r\n{host}\r\n{second}"),
        format!("CONNECT shop.example:80 HTTP/1.1\r\n{host}\r\n{second}"),
        format!("TRACE / HTTP/1.1\r\n{host}\r\n{second}"),
    ];
    for pattern in &patterns {
        let answer = world.raw(pattern.as_bytes()).await;
        let is_refused = ["HTTP/1.1 4", "HTTP/1.0 4", "HTTP/1.1 5"].iter().any(|start| answer.starts_with(start));
        // With both lengths one of them is taken away, and nothing more is read (RFC 9112 6.3).
        let is_last = answer.contains("connection: close");
        assert!(is_refused || is_last || answer.is_empty(), "{pattern:?} -> {answer}");
        assert!(answer.matches("HTTP/1.").count() <= 1, "{pattern:?} -> {answer}");
        assert!(!backend.last().contains("smuggled"), "{pattern:?} reached the endpoint");
    }
    assert!(world.curl("http://shop.example/").await.ends_with("hello"), "others are served");
    world.end().await;
}

#[tokio::test]
async fn slow_and_large_heads_hold_a_bounded_number_of_connections() {
    let backend = Backend::named("hello").await;
    let mut world = World::start(&[&ingress("")], |config| {
        config.limits.head_timeout = Duration::from_millis(700);
        config.limits.handshake_timeout = Duration::from_millis(700);
        config.limits.connections = 64;
    })
    .await;
    world.serve("web", &[backend.address]);
    let mut held = Vec::new();
    for number in 0..200 {
        let address = if number % 2 == 0 { world.http } else { world.https };
        let mut stream = TcpStream::connect(address).await.expect("loopback");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: shop").await.expect("sent");
        held.push(stream);
    }
    // All of them are turned away in time, and whoever waits behind them is served.
    let seen = timeout(PATIENCE, world.curl("http://shop.example/")).await.expect("in time");
    assert!(seen.ends_with("hello"), "{seen}");
    drop(held);
    let large = format!("GET / HTTP/1.1\r\nHost: shop.example\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let answer = world.raw(large.as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many = format!("GET / HTTP/1.1\r\nHost: shop.example\r\n{}\r\n", "X: y\r\n".repeat(1000));
    assert!(world.raw(many.as_bytes()).await.starts_with("HTTP/1.1 431"));
    assert_eq!(backend.count(), 1);
    world.end().await;
}

/// Changes that are made at least: FAIRLEAD_CASES up to some thousands, or else some.
pub fn wanted_changes() -> usize {
    let cases = std::env::var("FAIRLEAD_CASES");
    cases.map_or(20, |cases| cases.parse::<usize>().expect("FAIRLEAD_CASES is a number").min(2_000))
}

/// Routes, certificates and endpoints change while requests go through, at every protocol.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_cost_nobody_a_request() {
    let backends = [Backend::named("a").await, Backend::named("a").await, Backend::named("a").await];
    let tls = ingress(&format!("{NGINX}/ssl-redirect: \"false\""))
        .replace("rules:", "tls: [{hosts: [shop.example], secretName: cert}], rules:");
    let mut world = World::start(&[&tls], |_| {}).await;
    world.serve("web", &[backends[0].address]);
    world.secret("cert", "shop.example");
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::new(AtomicUsize::new(0));
    let mut clients = tokio::task::JoinSet::new();
    // Debian's curl cannot use a connection of the last kind twice.
    for (flags, each) in [
        ("http://shop.example/[1-40]", 40),
        ("--http2 https://shop.example/[1-40]", 40),
        ("--http1.1 https://shop.example/[1-40]", 40),
        ("--http2-prior-knowledge http://shop.example/", 1),
    ] {
        let (stop, asked) = (stop.clone(), asked.clone());
        let mut command = Vec::new();
        for (port, address) in [(80, world.http), (443, world.https)] {
            command.extend(["--connect-to".to_owned(), format!(":{port}:{address}")]);
        }
        command.extend(["-sSk", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code} "].map(str::to_owned));
        command.extend(flags.split(' ').map(str::to_owned));
        clients.spawn(async move {
            let mut bad = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let output = tokio::process::Command::new("curl").args(&command).output().await.expect("curl");
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let good = text.split_whitespace().filter(|code| *code == "200").count();
                asked.fetch_add(good, Ordering::Relaxed);
                if good != each || !output.status.success() {
                    bad.push(format!("{text} {}", String::from_utf8_lossy(&output.stderr)));
                }
            }
            bad
        });
    }
    let (mut changes, mut last) = (0, 0);
    let wanted = wanted_changes();
    while asked.load(Ordering::Relaxed) < 1500.max(wanted) && changes < 4000.max(2 * wanted) || changes < wanted {
        let extra = format!(
            "Ingress shop/extra {{ingressClassName: fairlead, rules: [{{host: shop.example, http: {{paths: [{{path: /x{changes}, pathType: Exact, backend: {{service: {{name: web, port: {{number: 80}}}}}}}}]}}}}]}}"
        );
        world.apply(&[&extra]);
        if changes % 7 == 0 {
            world.secret("cert", "shop.example");
        }
        let some: Vec<SocketAddr> = backends.iter().skip(changes % 3).map(|backend| backend.address).collect();
        world.serve("web", &some);
        changes += 1;
        // At the pace of the requests.
        let patience = tokio::time::Instant::now() + PATIENCE;
        while asked.load(Ordering::Relaxed) == last && tokio::time::Instant::now() < patience && changes % 4 == 0 {
            tokio::task::yield_now().await;
        }
        last = asked.load(Ordering::Relaxed);
    }
    stop.store(true, Ordering::Relaxed);
    let mut bad = Vec::new();
    while let Some(found) = clients.join_next().await {
        bad.extend(found.expect("no panic"));
    }
    assert!(asked.load(Ordering::Relaxed) >= 1000 && changes >= wanted, "{changes} changes");
    assert!(bad.is_empty(), "after {changes} changes: {bad:?}");
    world.end().await;
}

#[tokio::test]
async fn what_annotations_ask_for_is_done() {
    let backend = Backend::named("hello").await;
    let paths = ingress(&format!("{NGINX}/rewrite-target: /new/$2?from=$1, {NGINX}/upstream-vhost: inner.example"))
        .replace("path: /,", "path: /old(/|$)(.*),");
    let mut world = World::start(&[&paths], |_| {}).await;
    world.serve("web", &[backend.address]);
    world.curl("http://shop.example/old/a/b?q=1").await;
    assert!(
        backend.last().starts_with("GET /new/a/b?from=/ ") && backend.last().contains("\"host\": \"inner.example\""),
        "{}",
        backend.last()
    );
    world.apply(&[&ingress(&format!("{NGINX}/denylist-source-range: 127.0.0.0/8"))]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 403"));
    world.apply(&[&ingress(&format!("{NGINX}/whitelist-source-range: \"10.0.0.0/8,192.0.2.1\""))]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 403"));
    world.apply(&[&ingress(&format!("{NGINX}/permanent-redirect: https://new.example/x"))]);
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 301") && seen.contains("location: https://new.example/x\n"), "{seen}");
    // Dots are resolved before anybody matches, and the endpoint gets what was matched.
    world.apply(&[&ingress("")]);
    world.curl("--path-as-is http://shop.example/a/%2e%2e/b/./c").await;
    assert!(backend.last().starts_with("GET /b/c "), "{}", backend.last());
    world.end().await;
}

#[tokio::test]
async fn clients_stay_with_their_endpoint() {
    let backends = [Backend::named("a").await, Backend::named("b").await, Backend::named("c").await];
    let all: Vec<SocketAddr> = backends.iter().map(|backend| backend.address).collect();
    let mut world =
        World::start(&[&ingress(&format!("{NGINX}/affinity: cookie, {NGINX}/session-cookie-name: stay"))], |_| {})
            .await;
    world.serve("web", &all);
    let first = world.curl("http://shop.example/").await;
    let cookie = first.lines().find_map(|line| line.strip_prefix("set-cookie: stay=")?.split(';').next());
    let cookie = cookie.expect("a cookie").to_owned();
    let name = first.chars().last().expect("a name");
    for _ in 0..8 {
        let seen = world.curl(&format!("-b stay={cookie} http://shop.example/")).await;
        assert!(seen.ends_with(name) && !seen.contains("set-cookie"), "{seen}");
    }
    // Its endpoint goes: another one, and a new cookie.
    let at = backends.iter().position(|one| one.count() > 1).expect("the one that was asked");
    let rest: Vec<SocketAddr> = all.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, one)| *one).collect();
    world.serve("web", &rest);
    let seen = world.curl(&format!("-b stay={cookie} http://shop.example/")).await;
    assert!(!seen.ends_with(name) && seen.contains("set-cookie: stay="), "{seen}");
    // By a key of the request.
    world.apply(&[&ingress(&format!("{NGINX}/upstream-hash-by: $http_x_user"))]);
    world.serve("web", &all);
    let mut names = std::collections::BTreeSet::new();
    for user in 0..12 {
        let ask = format!("-H X-User:\u{a0}{user} http://shop.example/");
        let (one, two) = (world.curl(&ask).await, world.curl(&ask).await);
        assert_eq!(one.chars().last(), two.chars().last());
        names.insert(one.chars().last());
    }
    assert!(names.len() > 1, "users are shared out");
    world.end().await;
}

#[tokio::test]
async fn browsers_and_busy_clients_hear_what_they_may() {
    let backend = Backend::named("hello").await;
    let cors = format!(
        "{NGINX}/enable-cors: \"true\", {NGINX}/cors-allow-origin: \"https://*.a.example\", {NGINX}/from-to-www-redirect: \"true\""
    );
    let mut world = World::start(&[&ingress(&cors)], |_| {}).await;
    world.serve("web", &[backend.address]);
    let seen = world.curl("-X OPTIONS -H Origin:\u{a0}https://x.a.example http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 204") && seen.contains("access-control-allow-methods: GET, PUT"), "{seen}");
    let seen = world.curl("-H Origin:\u{a0}https://x.a.example http://shop.example/").await;
    assert!(seen.contains("access-control-allow-origin: https://x.a.example\n") && seen.ends_with("hello"), "{seen}");
    assert!(!world.curl("-H Origin:\u{a0}https://b.example http://shop.example/").await.contains("access-control"));
    let seen = world.curl("http://www.shop.example/a?b").await;
    assert!(seen.starts_with("HTTP/1.1 308") && seen.contains("location: http://shop.example/a?b\n"), "{seen}");
    world.apply(&[&ingress(&format!("{NGINX}/limit-rpm: \"1\", {NGINX}/limit-burst-multiplier: \"2\""))]);
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(world.curl("http://shop.example/").await.split(' ').nth(1).map(str::to_owned));
    }
    assert_eq!(statuses, ["200", "200", "503", "503"].map(|status| Some(status.to_owned())));
    world.end().await;
}

/// A body may take longer than an answer may, as long as it moves; an endpoint that stops reading is given up.
#[tokio::test]
async fn a_slow_body_is_no_late_answer() {
    let backend = Backend::start(|request| async move {
        if request.uri().path() == "/never" {
            return std::future::pending().await;
        }
        let length = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
        Response::new(text(length.to_string()))
    })
    .await;
    let annotations = format!("{NGINX}/proxy-read-timeout: \"1\", {NGINX}/proxy-send-timeout: \"1\"");
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    let mut stream = TcpStream::connect(world.http).await.expect("loopback");
    let head = "POST / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\nContent-Length: 8\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("sent");
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        stream.write_all(b"x").await.expect("sent");
    }
    let mut seen = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut seen)).await.expect("in time").expect("an answer");
    assert!(seen.starts_with("HTTP/1.1 200") && seen.ends_with("\r\n8"), "{seen}");
    assert!(world.curl("-d x http://shop.example/never").await.starts_with("HTTP/1.1 504"));
    world.end().await;
}
