//! What becomes of answers on their way: error pages, headers, speed; and names that lead out of the cluster.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use api::object::Key;
use http::{HeaderValue, Response, StatusCode};
use ingress::HeadersState;

use crate::proxy::NGINX;
use crate::world::{Backend, World, ingress, text};

/// Answers with the status that is asked for in the path.
async fn obliging() -> Backend {
    Backend::start(|request| async move {
        let status = request.uri().path().trim_start_matches('/').parse().unwrap_or(200);
        let mut response = Response::new(text("of the endpoint"));
        *response.status_mut() = StatusCode::from_u16(status).expect("a status");
        response
    })
    .await
}

#[tokio::test]
async fn error_pages_come_from_their_service() {
    let backend = obliging().await;
    let pages = Backend::start(|_| async {
        let mut response = Response::new(text("a kind word"));
        *response.status_mut() = StatusCode::IM_A_TEAPOT;
        response.headers_mut().insert("x-page", HeaderValue::from_static("1"));
        response
    })
    .await;
    let annotations = format!("{NGINX}/default-backend: errors, {NGINX}/custom-http-errors: \"404,503\"");
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    assert!(world.curl("http://shop.example/404").await.ends_with("of the endpoint"), "nobody gives pages yet");
    world.serve("errors", &[pages.address]);
    assert!(world.curl("http://shop.example/200").await.ends_with("of the endpoint"));
    assert!(world.curl("http://shop.example/500").await.ends_with("of the endpoint"), "no page is for this");
    let seen = world.curl("-d x=y -H Accept:\u{a0}text/html -H X-Code:\u{a0}200 http://shop.example/404?a=b").await;
    assert!(seen.starts_with("HTTP/1.1 418") && seen.contains("x-page: 1") && seen.ends_with("a kind word"), "{seen}");
    let head = pages.last();
    assert!(head.starts_with("GET / "), "{head}");
    for part in [
        "\"x-code\": \"404\"",
        "\"x-format\": \"text/html\"",
        "\"x-original-uri\": \"/404?a=b\"",
        "\"x-namespace\": \"shop\"",
        "\"x-ingress-name\": \"web\"",
        "\"x-service-name\": \"web\"",
        "\"x-service-port\": \"80\"",
        "\"x-request-id\": ",
        "\"host\": \"shop.example\"",
    ] {
        assert!(head.contains(part), "{part} is not in {head}");
    }
    let seen = world.curl("--http2-prior-knowledge -I http://shop.example/503").await;
    assert!(seen.starts_with("HTTP/2 418") && pages.last().starts_with("HEAD / "), "{seen}");
    // Without an endpoint the request itself goes there.
    world.serve("web", &[]);
    let seen = world.curl("-X PUT -d x=y http://shop.example/some/path").await;
    assert!(seen.starts_with("HTTP/1.1 418"), "{seen}");
    let head = pages.last();
    assert!(head.starts_with("PUT /some/path ") && head.contains("\"x-code\": \"503\""), "{head}");
    world.end().await;
}

#[tokio::test]
async fn headers_of_a_config_map_stand_in_every_answer() {
    let backend = obliging().await;
    let mut world = World::start(&[&ingress(&format!("{NGINX}/custom-headers: more"))], |_| {}).await;
    world.serve("web", &[backend.address]);
    world.compiler.new_config_maps();
    assert!(world.curl("http://shop.example/").await.ends_with("of the endpoint"), "no header keeps anybody out");
    let data =
        HashMap::from([("X-Frame-Options".to_owned(), "DENY".to_owned()), ("X-Price".to_owned(), "$5".to_owned())]);
    world.compiler.set_config_map(&Key::new("shop", "more"), HeadersState::of(Some(&data)));
    for (path, status) in [("/", 200), ("/404", 404)] {
        let seen = world.curl(&format!("http://shop.example{path}")).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status}")), "{seen}");
        assert!(seen.contains("x-frame-options: DENY\n") && seen.contains("x-price: $5\n"), "{seen}");
    }
    world.serve("web", &[]);
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 503") && seen.contains("x-price: $5\n"), "{seen}");
    world.end().await;
}

#[tokio::test]
async fn a_body_goes_no_faster_than_allowed() {
    let backend = Backend::start(|_| async { Response::new(text("x".repeat(60 << 10))) }).await;
    let annotations = format!("{NGINX}/limit-rate: \"40\", {NGINX}/limit-rate-after: \"20\"");
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    for flags in ["", "--http2-prior-knowledge"] {
        let started = Instant::now();
        let seen = world.curl(&format!("{flags} http://shop.example/")).await;
        // 40 of the 60 KB at 40 KB a second; the last tenth of a second's worth goes before its time has passed.
        assert!(started.elapsed() >= Duration::from_millis(850), "{:?}", started.elapsed());
        let body = seen.split("\n\n").nth(1).unwrap_or_default();
        assert_eq!(body.len(), 60 << 10, "the body is whole");
        assert!(seen.contains("content-length: 61440\n"), "{seen}");
    }
    world.end().await;
}

#[tokio::test]
async fn an_external_name_is_resolved_and_its_port_asked() {
    let backend = Backend::named("hello").await;
    let port = backend.address.port();
    let far = format!("Service shop/far {{type: ExternalName, externalName: NAME, ports: [{{port: {port}}}]}}");
    let lines = [
        far.replace("NAME", "localhost"),
        ingress("").replace("name: web", "name: far").replace("80", &port.to_string()),
    ];
    let mut world = World::start(&lines.each_ref().map(String::as_str), |_| {}).await;
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.ends_with("hello") && backend.last().contains("\"host\": \"shop.example\""), "{seen}");
    // The name becomes a Service's, whose endpoints change without it.
    world.apply(&[&far.replace("NAME", "web.shop.svc.cluster.local").replace(&port.to_string(), "80")]);
    world.apply(&[&ingress("").replace("name: web", "name: far")]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 503"));
    world.serve("web", &[backend.address]);
    assert!(world.curl("http://shop.example/").await.ends_with("hello"));
    world.end().await;
}

#[tokio::test]
async fn who_refuses_external_names_answers_for_them() {
    let backend = Backend::named("hello").await;
    let mut world = World::start(&[], |_| {}).await;
    world.compiler.refuse_external_names();
    let port = backend.address.port();
    let far = format!("Service shop/far {{type: ExternalName, externalName: localhost, ports: [{{port: {port}}}]}}");
    world.apply(&[&far, &ingress("").replace("name: web", "name: far").replace("80", &port.to_string())]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 503"));
    assert_eq!(world.compiler.faults().into_iter().next().map(|(_, fault)| fault.reason), Some("ExternalName"));
    world.end().await;
}
