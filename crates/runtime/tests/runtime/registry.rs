//! A registry on loopback: an OCI layout behind bearer tokens, with layers behind a redirect.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use base64::Engine;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;

pub struct Registry {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    address: SocketAddr,
    files: BTreeMap<String, Vec<u8>>,
    manifest: String,
    layers: AtomicUsize,
    damaged: AtomicBool,
}

impl Registry {
    pub fn layers_sent(&self) -> usize {
        self.state.layers.load(Ordering::SeqCst)
    }

    /// From now on layers are not what they say.
    pub fn damage(&self) {
        self.state.damaged.store(true, Ordering::SeqCst);
    }
}

pub async fn start(layout: Vec<u8>) -> Result<Registry> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(&layout[..]).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(path, bytes);
    }
    let index: serde_json::Value = serde_json::from_slice(&files["index.json"])?;
    let manifest = index["manifests"][0]["digest"].as_str().context("a manifest")?.to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let state =
        Arc::new(State { address, files, manifest, layers: AtomicUsize::new(0), damaged: AtomicBool::new(false) });
    let serving = state.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let state = serving.clone();
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let state = state.clone();
                    async move { Ok::<_, Infallible>(state.answer(&request)) }
                });
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Ok(Registry { address, state })
}

impl State {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let authorization = request.headers().get("authorization").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let reply = |code: u16, body: &[u8]| {
            let mut response = Response::new(Full::from(body.to_vec()));
            *response.status_mut() = http::StatusCode::from_u16(code).expect("a status");
            response
        };
        let path = request.uri().path();
        if path == "/token" {
            let expected = base64::engine::general_purpose::STANDARD.encode("me:secret");
            return match authorization == format!("Basic {expected}") {
                true => reply(200, br#"{"token": "the-token"}"#),
                false => reply(401, b"{}"),
            };
        }
        if let Some(digest) = path.strip_prefix("/storage/") {
            // Storage behind a redirect refuses strangers' tokens.
            if !authorization.is_empty() {
                return reply(400, b"a token was sent to the storage");
            }
            self.layers.fetch_add(1, Ordering::SeqCst);
            let mut bytes = self.files[&format!("blobs/sha256/{digest}")].clone();
            if self.damaged.load(Ordering::SeqCst) {
                bytes[100] ^= 1;
            }
            return reply(200, &bytes);
        }
        if authorization != "Bearer the-token" {
            let mut response = reply(401, b"{}");
            let challenge = format!("Bearer realm=\"http://{}/token\",service=\"test\",scope=\"a b\"", self.address);
            response.headers_mut().insert("www-authenticate", challenge.parse().expect("a header"));
            return response;
        }
        let Some(rest) = path.strip_prefix("/v2/team/busybox/") else { return reply(404, b"{}") };
        let file = |digest: &str| self.files.get(&format!("blobs/sha256/{}", digest.trim_start_matches("sha256:")));
        match rest.split_once('/') {
            Some(("manifests", wanted)) => {
                let digest = if wanted == "1" { &self.manifest } else { wanted };
                file(digest).map_or_else(|| reply(404, b"{}"), |bytes| reply(200, bytes))
            }
            Some(("blobs", digest)) => match file(digest) {
                Some(bytes) if bytes.starts_with(b"{") => reply(200, bytes),
                Some(_) => {
                    let mut response = reply(307, b"");
                    let place = format!("http://{}/storage/{}", self.address, digest.trim_start_matches("sha256:"));
                    response.headers_mut().insert("location", place.parse().expect("a header"));
                    response
                }
                None => reply(404, b"{}"),
            },
            _ => reply(404, b"{}"),
        }
    }
}
