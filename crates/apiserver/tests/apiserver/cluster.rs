//! A server over a store, and clients of it that hold an identity.

use apiserver::auth::token::TokenKey;
use apiserver::auth::{Identity, MASTERS};
use apiserver::body::Body;
use apiserver::{Allocation, ApiServer, Config, bootstrap};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use store::{MemoryStore, Store};
use tokio_util::sync::{CancellationToken, DropGuard};

/// What may differ between clusters.
pub struct Options {
    pub service_cidrs: Vec<String>,
    pub node_ports: RangeInclusive<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Options { service_cidrs: vec!["10.96.0.0/12".into()], node_ports: 30000..=32767 }
    }
}

/// A running server. It stops when dropped.
pub struct Cluster {
    pub server: ApiServer,
    pub store: Arc<dyn Store>,
    _stop: DropGuard,
}

impl Cluster {
    /// A cluster as it is after its first start, with the account that every pod of `default` uses.
    pub async fn new(options: Options) -> Cluster {
        let cluster = Cluster::bare(Arc::new(MemoryStore::new()), options).await;
        bootstrap::run(&cluster.server, &[]).await.expect("a new cluster takes its first objects");
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        let made = cluster.admin().send("POST", "/api/v1/namespaces/default/serviceaccounts", &account).await;
        assert_eq!(made.code, 201, "{made:?}");
        cluster
    }

    /// A server over a store as it is.
    pub async fn bare(store: Arc<dyn Store>, options: Options) -> Cluster {
        let token = CancellationToken::new();
        let key = TokenKey::generate().expect("a key is made");
        let config = Config {
            store: store.clone(),
            allocation: Allocation {
                pod_cidrs: vec!["10.244.0.0/16".parse().expect("a range")],
                service_cidrs: options.service_cidrs.iter().map(|c| c.parse().expect("a CIDR")).collect(),
                node_ports: options.node_ports,
            },
            tokens: TokenKey::from_pkcs8(&key, "https://kubernetes.default.svc").expect("a fresh key is good"),
            connector: None,
            token: token.clone(),
        };
        let server = ApiServer::start(config).await.expect("the store is readable");
        Cluster { server, store, _stop: token.drop_guard() }
    }

    pub fn admin(&self) -> Client {
        self.client(Identity::user("admin", &[MASTERS]))
    }

    pub fn client(&self, who: Identity) -> Client {
        Client { server: self.server.as_identity(who) }
    }

    /// A client that is known only by the credentials it sends.
    pub fn stranger(&self) -> Client {
        Client { server: self.server.clone() }
    }
}

#[derive(Clone)]
pub struct Client {
    server: ApiServer,
}

#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// The body; `Null` if it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn text(&self, pointer: &str) -> String {
        self.json().pointer(pointer).and_then(Value::as_str).unwrap_or("").to_string()
    }
}

/// Longer than any answer takes on a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

impl Client {
    pub async fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Bytes) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).expect("the test makes a good request");
        tokio::time::timeout(PATIENCE, self.server.handle(request)).await.expect("the server answers")
    }

    pub async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
        let response = self.open(method, path, headers, body.into()).await;
        let (parts, body) = response.into_parts();
        let body = tokio::time::timeout(PATIENCE, body.collect()).await.expect("the answer ends");
        let body = body.expect("the answer is whole").to_bytes();
        Answer { code: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub async fn send(&self, method: &str, path: &str, object: &Value) -> Answer {
        self.request(method, path, &[("content-type", "application/json")], object.to_string()).await
    }

    /// A patch; `kind` is the first word of its media type, such as `merge-patch+json`.
    pub async fn patch(&self, path: &str, kind: &str, patch: &Value) -> Answer {
        let media = format!("application/{kind}");
        self.request("PATCH", path, &[("content-type", media.as_str())], patch.to_string()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], Bytes::new()).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.request("DELETE", path, &[], Bytes::new()).await
    }

    /// Opens a watch, which must be granted.
    pub async fn watch(&self, path: &str, headers: &[(&str, &str)]) -> Watch {
        let response = self.open("GET", path, headers, Bytes::new()).await;
        assert_eq!(response.status().as_u16(), 200, "a watch of {path} is granted");
        Watch { body: response.into_body(), buffer: Vec::new() }
    }
}

/// The events of a watch, one at a time.
pub struct Watch {
    body: Body,
    buffer: Vec<u8>,
}

impl Watch {
    /// The next event; `None` when the server has ended the watch.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Option<T> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).expect("a line of a watch is an event"));
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("an event comes in time")?;
            if let Ok(data) = frame.expect("a watch is not cut off").into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }

    /// Type, name and object of the next event, which must come.
    pub async fn event(&mut self) -> (String, String, Value) {
        let event: Value = self.next().await.expect("the watch goes on");
        let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or("").to_string();
        (text("/type"), text("/object/metadata/name"), event["object"].clone())
    }
}

/// A ConfigMap, the plainest of objects.
pub fn config_map(name: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}, "data": {"a": "1"}})
}

pub const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
