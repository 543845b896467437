//! Who is let in, what endpoints say about places, and endpoints that lie.

use std::collections::HashMap;
use std::net::SocketAddr;

use api::object::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderValue, Response};
use ingress::SecretState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::proxy::{NGINX, one};
use crate::world::{Backend, World, ingress, text};

#[tokio::test]
async fn who_has_no_password_stays_outside() {
    let (mut world, backend) = one().await;
    world.apply(&[&ingress(&format!("{NGINX}/auth-type: basic, {NGINX}/auth-secret: who, {NGINX}/auth-realm: Shop"))]);
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 503"), "nobody knows the users yet");
    let key = Key::new("shop", "who");
    // Of the password `secret`, by htpasswd -s.
    let file = |user: &str| {
        HashMap::from([("auth".to_owned(), BASE64.encode(format!("{user}:{{SHA}}5en6G6MezRroT3XKqkdPOmY/BfQ=")))])
    };
    world.compiler.wanted_secrets();
    world.compiler.set_secret(&key, SecretState::of(Some(&file("ann"))));
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.starts_with("HTTP/1.1 401") && seen.contains("www-authenticate: Basic realm=\"Shop\""), "{seen}");
    assert!(world.curl("-u ann:wrong http://shop.example/").await.starts_with("HTTP/1.1 401"));
    assert_eq!(backend.count(), 0, "none of these came to the endpoint");
    assert!(world.curl("-u ann:secret http://shop.example/").await.ends_with("hello"));
    assert!(world.curl("-u ann:secret --http2-prior-knowledge http://shop.example/").await.ends_with("hello"));
    // The Secret changes: who was let in before is not any more.
    world.compiler.set_secret(&key, SecretState::of(Some(&file("bob"))));
    assert!(world.curl("-u ann:secret http://shop.example/").await.starts_with("HTTP/1.1 401"));
    assert!(world.curl("-u bob:secret http://shop.example/").await.ends_with("hello"));
    world.compiler.set_secret(&key, SecretState::of(None));
    assert!(world.curl("-u bob:secret http://shop.example/").await.starts_with("HTTP/1.1 503"));
    world.end().await;
}

#[tokio::test]
async fn one_way_in_is_enough_where_the_ingress_says_so() {
    let (mut world, backend) = one().await;
    let asked = Backend::start(|request| async move {
        let mut response = Response::new(text(""));
        if !request.headers().contains_key("x-friend") {
            *response.status_mut() = http::StatusCode::FORBIDDEN;
        }
        response
    })
    .await;
    world.serve("auth", &[asked.address]);
    let key = Key::new("shop", "who");
    let file = HashMap::from([("auth".to_owned(), BASE64.encode("ann:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ="))]);
    let basic = format!("{NGINX}/auth-type: basic, {NGINX}/auth-secret: who");
    let auth = format!("{basic}, {NGINX}/auth-url: \"http://auth.shop.svc/\"");
    let near = format!("{NGINX}/whitelist-source-range: 127.0.0.0/8");
    let far = format!("{NGINX}/whitelist-source-range: 192.0.2.0/24");
    let denied = format!("{NGINX}/denylist-source-range: 127.0.0.0/8");
    let (any, all) = (format!("{NGINX}/satisfy: any"), format!("{NGINX}/satisfy: all"));
    const ANN: &str = "-u ann:secret ";
    const FRIEND: &str = "-H X-Friend:\u{a0}yes ";
    for (annotations, flags, status) in [
        (vec![&near, &basic, &any], "", 200),
        (vec![&near, &basic, &all], "", 401),
        (vec![&far, &basic, &any], "", 401),
        (vec![&far, &basic, &any], ANN, 200),
        (vec![&far, &basic, &all], ANN, 403),
        (vec![&denied, &basic, &any], ANN, 200),
        (vec![&denied, &basic, &any], "", 401),
        // Without another way in there is the address only.
        (vec![&far, &any], ANN, 403),
        (vec![&near, &any], "", 200),
        (vec![&auth, &any], "", 401),
        (vec![&auth, &any], ANN, 200),
        (vec![&auth, &any], FRIEND, 200),
        (vec![&auth, &all], ANN, 403),
        (vec![&auth, &all], FRIEND, 401),
        (vec![&auth, &near, &any], "", 200),
    ] {
        let said: Vec<&str> = annotations.iter().map(|one| one.as_str()).collect();
        world.apply(&[&ingress(&said.join(", "))]);
        world.compiler.wanted_secrets();
        world.compiler.set_secret(&key, SecretState::of(Some(&file)));
        let before = backend.count();
        let seen = world.curl(&format!("{flags}http://shop.example/")).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status}")), "{said:?} {flags}: {seen}");
        assert_eq!(backend.count() - before, usize::from(status == 200), "{said:?} {flags}");
    }
    world.end().await;
}

#[tokio::test]
async fn redirects_and_cookies_of_endpoints_are_made_those_of_the_outside() {
    let backend = Backend::start(|_| async {
        let mut response = Response::new(text("moved"));
        *response.status_mut() = http::StatusCode::FOUND;
        let headers = response.headers_mut();
        headers.insert("location", HeaderValue::from_static("http://inner:8080/a"));
        headers.append("set-cookie", HeaderValue::from_static("a=b; Path=/inner/x; Domain=inner.example"));
        response
    })
    .await;
    let annotations = format!(
        "{NGINX}/proxy-redirect-from: \"http://inner:8080/\", {NGINX}/proxy-redirect-to: \"https://shop.example/\", \
         {NGINX}/proxy-cookie-path: /inner/ /, {NGINX}/proxy-cookie-domain: inner.example shop.example"
    );
    let mut world = World::start(&[&ingress(&annotations)], |_| {}).await;
    world.serve("web", &[backend.address]);
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.contains("location: https://shop.example/a\n"), "{seen}");
    assert!(seen.contains("set-cookie: a=b; Path=/x; Domain=shop.example\n"), "{seen}");
    world.end().await;
}

/// An endpoint whose answers are no HTTP/1.1, or end in two places, answers nobody, and what stands behind an answer is no
/// other client's.
#[tokio::test]
async fn an_endpoint_that_lies_about_its_answer_harms_nobody_else() {
    let answers = [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "hello\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\nhello",
    ];
    for answer in answers {
        let (address, _task) = says(answer.to_owned()).await;
        let mut world = World::start(&[&ingress("")], |_| {}).await;
        world.serve("web", &[address]);
        let seen = world.curl("http://shop.example/").await;
        assert!(seen.starts_with("HTTP/1.1 502"), "{answer:?}: {seen}");
        world.end().await;
    }
    // Two answers for one request: the second is nobody's.
    let twice = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirstHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond";
    let (address, _task) = says(twice.to_owned()).await;
    let mut world = World::start(&[&ingress("")], |config| config.workers = 1).await;
    world.serve("web", &[address]);
    for _ in 0..3 {
        let seen = world.curl("http://shop.example/").await;
        assert!(seen.ends_with("first"), "{seen}");
    }
    world.end().await;
}

/// An endpoint that answers each head with these bytes, and keeps the connection.
async fn says(answer: String) -> (SocketAddr, AbortOnDrop) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            connections.spawn(async move {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, AbortOnDrop(task))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
