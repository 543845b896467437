//! Just enough of an API server for a kubelet and for kubectl: objects by path, watches, merge patches, no rules.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::sync::broadcast;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

#[derive(Clone)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<(String, Value)>,
    kubelet: Arc<Mutex<Option<kubelet::Server>>>,
}

#[derive(Default)]
struct State {
    /// By path, such as `/api/v1/namespaces/default/pods/web`.
    objects: BTreeMap<String, Value>,
    version: u64,
}

impl FakeApi {
    pub async fn start() -> Result<(FakeApi, SocketAddr)> {
        let api = FakeApi { state: Arc::default(), events: broadcast::channel(4096).0, kubelet: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serving = api.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = serving.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let api = api.clone();
                        async move { Ok::<_, Infallible>(api.handle(request).await) }
                    });
                    let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                        .serve_connection_with_upgrades(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok((api, address))
    }

    pub fn set_kubelet(&self, server: kubelet::Server) {
        *self.kubelet.lock().expect("no panic") = Some(server);
    }

    pub fn put(&self, path: &str, mut object: Value) {
        let mut state = self.state.lock().expect("no panic");
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", state.version));
        }
        let kind = if state.objects.insert(path.to_owned(), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        let _ = self.events.send((path.to_owned(), json!({"type": kind, "object": object})));
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.state.lock().expect("no panic").objects.get(path).cloned()
    }

    pub fn remove(&self, path: &str) {
        if let Some(object) = self.state.lock().expect("no panic").objects.remove(path) {
            let _ = self.events.send((path.to_owned(), json!({"type": "DELETED", "object": object})));
        }
    }

    pub fn all(&self, collection: &str) -> Vec<Value> {
        let state = self.state.lock().expect("no panic");
        state.objects.iter().filter(|(path, _)| is_in(path, collection)).map(|(_, o)| o.clone()).collect()
    }

    /// Waits until a condition on an object holds.
    pub async fn until(&self, path: &str, what: &str, holds: impl Fn(Option<&Value>) -> bool) -> Result<()> {
        let mut events = self.events.subscribe();
        let wait = async {
            while !holds(self.get(path).as_ref()) {
                let _ = events.recv().await;
            }
        };
        match tokio::time::timeout(std::time::Duration::from_secs(30), wait).await {
            Ok(()) => Ok(()),
            Err(_) => anyhow::bail!("not {what}: {:#}", self.get(path).unwrap_or_default()["status"]),
        }
    }

    async fn handle(&self, mut request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        if let ["api", "v1", "namespaces", namespace, "pods", pod, verb] = parts[..]
            && let Some(target) = match verb {
                "log" => Some(format!("/containerLogs/{namespace}/{pod}/{}?{query}", container(&query))),
                "exec" | "attach" => Some(format!("/{verb}/{namespace}/{pod}/{}?{query}", container(&query))),
                "portforward" => Some(format!("/portForward/{namespace}/{pod}?{query}")),
                _ => None,
            }
        {
            let server = self.kubelet.lock().expect("no panic").clone();
            let Some(server) = server else { return answer(503, json!({"message": "no kubelet"})) };
            *request.uri_mut() = target.parse().expect("a path");
            return server.handle(request).await;
        }
        let method = request.method().clone();
        let body = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        match (method, path.as_str()) {
            (_, "/api") => answer(200, json!({"kind": "APIVersions", "versions": ["v1"]})),
            (_, "/apis") => answer(200, json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})),
            (_, "/api/v1") => answer(
                200,
                json!({"kind": "APIResourceList", "groupVersion": "v1", "resources": [
                    {"name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod", "verbs": ["get", "list"]}
                ]}),
            ),
            (Method::GET, path) if query.contains("watch=true") => self.watch(path, &query),
            (Method::GET, path) => match self.get(path) {
                Some(object) => answer(200, object),
                None if is_collection(path) => {
                    let version = self.state.lock().expect("no panic").version.to_string();
                    answer(
                        200,
                        json!({"kind": "List", "metadata": {"resourceVersion": version}, "items": self.all(path)}),
                    )
                }
                None => missing(path),
            },
            (Method::POST, path) if path.ends_with("/token") => {
                answer(201, json!({"status": {"token": "a-token", "expirationTimestamp": "2099-01-01T00:00:00Z"}}))
            }
            (Method::POST, path) => {
                let mut object = body;
                let count = self.state.lock().expect("no panic").version;
                let generated = object["metadata"]["generateName"].as_str().map(|g| format!("{g}{count}"));
                if let Some(name) = generated {
                    object["metadata"]["name"] = json!(name);
                }
                let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                let path = format!("{path}/{name}");
                self.put(&path, object);
                answer(201, self.get(&path).unwrap_or_default())
            }
            (Method::PATCH, path) => {
                let path = path.strip_suffix("/status").unwrap_or(path);
                match self.get(path) {
                    Some(mut object) => {
                        merge(&mut object, &body);
                        self.put(path, object.clone());
                        answer(200, object)
                    }
                    None => missing(path),
                }
            }
            (Method::DELETE, path) => {
                self.remove(path);
                answer(200, json!({"kind": "Status", "status": "Success"}))
            }
            _ => answer(405, json!({})),
        }
    }

    /// What has changed since the version that the client knows, then what changes from now on.
    fn watch(&self, collection: &str, query: &str) -> Response<Body> {
        let events = self.events.subscribe();
        let since = query.split('&').find_map(|p| p.strip_prefix("resourceVersion=")?.parse::<u64>().ok()).unwrap_or(0);
        let version = |o: &Value| o["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse::<u64>().ok());
        let missed = self.all(collection).into_iter().filter(|o| version(o) > Some(since));
        let missed: Vec<Value> = missed.map(|object| json!({"type": "MODIFIED", "object": object})).collect();
        let collection = collection.to_owned();
        let later = futures::stream::unfold(events, move |mut events| {
            let collection = collection.clone();
            async move {
                loop {
                    let (path, event) = events.recv().await.ok()?;
                    if is_in(&path, &collection) {
                        return Some((event, events));
                    }
                }
            }
        });
        let lines = futures::stream::iter(missed).chain(later);
        let frames = lines.map(|event| Ok(Frame::data(Bytes::from(format!("{event}\n")))));
        Response::new(StreamBody::new(frames.boxed()).boxed_unsync())
    }
}

fn container(query: &str) -> &str {
    query.split('&').find_map(|p| p.strip_prefix("container=")).unwrap_or_default()
}

fn is_collection(path: &str) -> bool {
    ["pods", "services", "nodes", "leases", "events", "endpointslices"]
        .contains(&path.rsplit('/').next().unwrap_or_default())
}

/// `/api/v1/pods` holds the pods of all namespaces.
fn is_in(path: &str, collection: &str) -> bool {
    let Some((parent, _)) = path.rsplit_once('/') else { return false };
    let (root, plural) = collection.rsplit_once('/').unwrap_or(("", collection));
    parent == collection
        || parent.starts_with(&format!("{root}/namespaces/")) && parent.ends_with(&format!("/{plural}"))
}

fn merge(target: &mut Value, patch: &Value) {
    match patch {
        Value::Object(fields) => {
            if !target.is_object() {
                *target = json!({});
            }
            for (key, value) in fields {
                if value.is_null() {
                    target.as_object_mut().map(|o| o.remove(key));
                } else {
                    merge(&mut target[key.as_str()], value);
                }
            }
        }
        other => *target = other.clone(),
    }
}

fn missing(path: &str) -> Response<Body> {
    answer(404, json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404, "message": path}))
}

fn answer(code: u16, body: Value) -> Response<Body> {
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).expect("a status");
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}
