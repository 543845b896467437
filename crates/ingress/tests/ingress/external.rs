//! Somebody else who says which requests may come, with a real one.

use std::collections::HashMap;

use api::object::Key;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use ingress::HeadersState;

use crate::proxy::NGINX;
use crate::world::{Backend, Body, World, ingress, text};

/// Lets in who says `in`, knows nobody else, and forbids who says `never`.
fn decide(request: &Request<Incoming>) -> Response<Body> {
    let said = request.headers().get("x-say").map(|value| value.as_bytes().to_vec()).unwrap_or_default();
    let mut response = Response::new(text("a page of the one who was asked"));
    let headers = response.headers_mut();
    headers.insert("x-user", HeaderValue::from_static("ann"));
    headers.append("set-cookie", HeaderValue::from_static("a=1"));
    headers.append("set-cookie", HeaderValue::from_static("b=2"));
    headers.insert("www-authenticate", HeaderValue::from_static("Bearer"));
    *response.status_mut() = match &said[..] {
        b"in" => StatusCode::OK,
        b"never" => StatusCode::FORBIDDEN,
        b"moved" => StatusCode::FOUND,
        b"broken" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::UNAUTHORIZED,
    };
    response
}

/// A world with `shop/web`, and `shop/auth`, which decides.
async fn world(annotations: &str) -> (World, Backend, Backend) {
    let backend = Backend::named("hello").await;
    let asked = Backend::start(|request| async move { decide(&request) }).await;
    let annotations = format!("{NGINX}/auth-url: \"http://auth.shop.svc/check?a=b\"{annotations}");
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    world.serve("auth", &[asked.address]);
    (world, backend, asked)
}

const BODY: &str = "-d x=y -H X-Say:\u{a0}in -H X-User:\u{a0}mallory";

#[tokio::test]
async fn who_is_asked_sees_the_request_and_decides() {
    let (world, backend, asked) = world(&format!(", {NGINX}/auth-response-headers: \"X-User, X-None\"")).await;
    let seen = world.curl(&format!("{BODY} -H X-None:\u{a0}mallory http://shop.example/path?q=1")).await;
    assert!(seen.starts_with("HTTP/1.1 200") && seen.ends_with("hello"), "{seen}");
    assert!(seen.contains("set-cookie: a=1\n") && seen.contains("set-cookie: b=2\n"), "{seen}");
    let question = asked.last();
    assert!(question.starts_with("GET /check?a=b "), "{question}");
    for part in [
        "\"host\": \"auth.shop.svc\"",
        "\"x-original-url\": \"http://shop.example/path?q=1\"",
        "\"x-original-method\": \"POST\"",
        "\"x-sent-from\": \"nginx-ingress-controller\"",
        "\"x-auth-request-redirect\": \"/path?q=1\"",
        "\"x-real-ip\": \"127.0.0.1\"",
        "\"x-forwarded-for\": \"127.0.0.1\"",
        "\"x-request-id\": ",
    ] {
        assert!(question.contains(part), "{part} is not in {question}");
    }
    assert!(!question.contains("content-length") && !question.contains("x-forwarded-proto"), "{question}");
    let head = backend.last();
    assert!(head.starts_with("POST /path?q=1 ") && head.contains("\"x-user\": \"ann\""), "{head}");
    assert!(!head.contains("mallory") && !head.contains("x-none"), "{head}");
    let id = |head: &str| head.split("\"x-request-id\": ").nth(1).map(|rest| rest[..34].to_owned());
    assert_eq!(id(&question), id(&head), "one request has one number");
    // All ways in, and nobody else.
    assert!(world.curl("--http2-prior-knowledge -H X-Say:\u{a0}in http://shop.example/").await.ends_with("hello"));
    let before = backend.count();
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 401") && seen.contains("www-authenticate: Bearer\n"), "{seen}");
    assert!(!seen.contains("set-cookie"), "{seen}");
    for (say, status) in [("never", 403), ("moved", 500), ("broken", 500)] {
        let seen = world.curl(&format!("-H X-Say:\u{a0}{say} http://shop.example/")).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status}")), "{say}: {seen}");
    }
    assert_eq!(backend.count(), before, "none of these came to the endpoint");
    world.end().await;
}

#[tokio::test]
async fn who_is_not_known_is_sent_to_sign_in() {
    let more = format!(
        ", {NGINX}/auth-signin: \"https://$host/start\", {NGINX}/auth-method: HEAD, {NGINX}/auth-always-set-cookie: \"true\", \
         {NGINX}/auth-request-redirect: \"https://after.example/\""
    );
    let (world, _backend, asked) = world(&more).await;
    let seen = world.curl("http://shop.example/a?b=c").await;
    assert!(seen.starts_with("HTTP/1.1 302"), "{seen}");
    assert!(seen.contains("location: https://shop.example/start?rd=http://shop.example%2Fa%3Fb%3Dc\n"), "{seen}");
    assert!(seen.contains("set-cookie: a=1\n"), "{seen}");
    let question = asked.last();
    assert!(
        question.starts_with("HEAD /check?a=b ") && question.contains("\"x-original-uri\": \"/a?b=c\""),
        "{question}"
    );
    assert!(question.contains("\"x-auth-request-redirect\": \"https://after.example/\""), "{question}");
    let seen = world.curl("-H X-Say:\u{a0}never http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 403") && seen.contains("set-cookie: a=1\n"), "{seen}");
    world.end().await;
}

#[tokio::test]
async fn nobody_comes_in_while_nobody_can_be_asked() {
    let (mut world, backend, asked) = world(&format!(", {NGINX}/auth-proxy-set-headers: more")).await;
    let key = Key::new("shop", "more");
    let (seen, wanted) = (world.curl("-H X-Say:\u{a0}in http://shop.example/").await, world.compiler.new_config_maps());
    assert!(seen.starts_with("HTTP/1.1 500") && asked.count() == 0, "what is to be said is not known: {seen}");
    assert_eq!(wanted.into_iter().flatten().next(), Some(key.clone()));
    let data = HashMap::from([("X-Team".to_owned(), "$host".to_owned()), ("X-Say".to_owned(), "in".to_owned())]);
    world.compiler.set_config_map(&key, HeadersState::of(Some(&data)));
    assert!(world.curl("http://shop.example/").await.ends_with("hello"), "the ConfigMap says it");
    assert!(asked.last().contains("\"x-team\": \"shop.example\""), "{}", asked.last());
    let count = backend.count();
    world.serve("auth", &[]);
    assert!(world.curl("-H X-Say:\u{a0}in http://shop.example/").await.starts_with("HTTP/1.1 500"));
    assert_eq!(backend.count(), count);
    world.end().await;
}

/// Of a key that was asked about, nobody is asked again; of another key, and of what may not be kept, each time.
#[tokio::test]
async fn answers_are_remembered_by_their_key() {
    let backend = Backend::named("hello").await;
    let asked = Backend::start(|request| async move {
        let mut response = decide(&request);
        response.headers_mut().remove("set-cookie");
        if request.headers().contains_key("x-fresh") {
            response.headers_mut().insert("cache-control", HeaderValue::from_static("private, no-store"));
        }
        response
    })
    .await;
    let annotations = format!(
        "{NGINX}/auth-url: \"http://auth.shop.svc/\", {NGINX}/auth-cache-key: $http_x_say$http_x_fresh, {NGINX}/auth-cache-duration: 200 401 1h"
    );
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    world.serve("auth", &[asked.address]);
    for (flags, status, count) in [
        ("-H X-Say:\u{a0}in", 200, 1),
        ("-H X-Say:\u{a0}in", 200, 1),
        ("", 401, 2),
        ("", 401, 2),
        ("-H X-Say:\u{a0}never", 403, 3),
        ("-H X-Say:\u{a0}never", 403, 4),
        ("-H X-Say:\u{a0}in -H X-Fresh:\u{a0}1", 200, 5),
        ("-H X-Say:\u{a0}in -H X-Fresh:\u{a0}1", 200, 6),
    ] {
        let seen = world.curl(&format!("{flags} http://shop.example/")).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status}")) && asked.count() == count, "{flags}: {seen}");
    }
    world.end().await;
}

/// A URL whose host is no Service is resolved; here by what stands in the request.
#[tokio::test]
async fn a_name_outside_the_cluster_is_asked() {
    let backend = Backend::named("hello").await;
    let asked = Backend::start(|request| async move { decide(&request) }).await;
    let annotations = format!("{NGINX}/auth-url: \"http://$http_x_place:{}/\"", asked.address.port());
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    let seen = world.curl("-H X-Place:\u{a0}127.0.0.1 -H X-Say:\u{a0}in http://shop.example/").await;
    assert!(seen.ends_with("hello") && asked.last().contains("\"host\": \"127.0.0.1\""), "{seen}");
    for place in ["127.0.0.1:1@x", "a..b"] {
        let seen = world.curl(&format!("-H X-Place:\u{a0}{place} -H X-Say:\u{a0}in http://shop.example/")).await;
        assert!(seen.starts_with("HTTP/1.1 500"), "{place}: {seen}");
    }
    world.end().await;
}
