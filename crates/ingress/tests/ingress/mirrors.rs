//! Copies of requests for whoever an annotation names.

use http::Response;
use http_body_util::BodyExt;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use crate::proxy::NGINX;
use crate::world::{Backend, PATIENCE, World, ingress, text};

/// Says how long each body was, and answers nobody.
async fn mirror() -> (Backend, UnboundedReceiver<usize>) {
    let (sender, bodies) = unbounded_channel();
    let backend = Backend::start(move |request| {
        let sender = sender.clone();
        async move {
            let body = request.into_body().collect().await.map(|body| body.to_bytes().len());
            sender.send(body.unwrap_or_default()).ok();
            std::future::pending::<()>().await;
            Response::new(text(""))
        }
    })
    .await;
    (backend, bodies)
}

async fn next(bodies: &mut UnboundedReceiver<usize>) -> usize {
    timeout(PATIENCE, bodies.recv()).await.expect("in time").expect("a copy")
}

#[tokio::test]
async fn copies_go_where_the_annotation_says() {
    let backend = Backend::named("hello").await;
    let (mirror, mut bodies) = mirror().await;
    let annotations = format!(
        "{NGINX}/mirror-target: \"http://mirror.shop.svc/copies$request_uri\", {NGINX}/mirror-host: \"$host.copy\", \
         {NGINX}/upstream-vhost: inner.example, {NGINX}/app-root: /never"
    );
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    // Nobody is there yet, which harms nobody.
    assert!(world.curl("http://shop.example/alone").await.ends_with("hello"));
    world.serve("mirror", &[mirror.address]);
    for flags in ["", "--http2-prior-knowledge "] {
        let seen = world.curl(&format!("{flags}-d x=y http://shop.example/a%20b?c=d")).await;
        assert!(seen.ends_with("hello"), "{flags}{seen}");
        assert_eq!(next(&mut bodies).await, 3, "{flags}");
        let (copy, original) = (mirror.last(), backend.last());
        assert!(
            copy.starts_with("POST /copies/a%20b?c=d ") && copy.contains("\"host\": \"shop.example.copy\""),
            "{copy}"
        );
        assert!(
            original.starts_with("POST /a%20b?c=d ") && original.contains("\"host\": \"inner.example\""),
            "{original}"
        );
        let id = |head: &str| head.split("\"x-request-id\": ").nth(1).map(|rest| rest[..34].to_owned());
        assert!(id(&copy).is_some() && id(&copy) == id(&original), "one request has one number: {copy} {original}");
    }
    // What needs no endpoint is not copied.
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 302"));
    assert!(world.curl("http://shop.example/last").await.ends_with("hello"));
    assert_eq!(next(&mut bodies).await, 0);
    assert_eq!((mirror.count(), mirror.last().starts_with("GET /copies/last ")), (3, true), "{}", mirror.last());
    world.end().await;
}

#[tokio::test]
async fn copies_without_bodies_go_out_of_the_cluster() {
    let backend = Backend::start(|request| async move {
        let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Response::new(text(body))
    })
    .await;
    let (mirror, mut bodies) = mirror().await;
    let annotations = format!(
        "{NGINX}/mirror-target: \"http://127.0.0.1:{}\", {NGINX}/mirror-request-body: \"off\"",
        mirror.address.port()
    );
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    let seen = world.curl("-d x=y http://shop.example/a?b=c").await;
    assert!(seen.ends_with("x=y"), "the request itself is whole: {seen}");
    assert_eq!(next(&mut bodies).await, 0);
    let copy = mirror.last();
    assert!(copy.starts_with("POST /a?b=c ") && copy.contains("\"host\": \"127.0.0.1\""), "{copy}");
    assert!(!copy.contains("\"content-length\": \"3\""), "{copy}");
    world.end().await;
}
