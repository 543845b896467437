//! Requests on one resource, over a `kube::Client`.

use ::api::{ObjectExt, Resource, Status};
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use kube::client::Body;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Why a request did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API answered, with a `Status`.
    #[error("{0}")]
    Status(Status),
    #[error("the API server cannot be reached: {0}")]
    Transport(String),
    #[error("the API server's answer is not understood: {0}")]
    Decode(String),
}

impl ApiError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, ApiError::Status(s) if s.code == 404)
    }

    /// A stale resourceVersion: read again and decide again.
    pub fn is_conflict(&self) -> bool {
        matches!(self, ApiError::Status(s) if s.code == 409 && s.reason != "AlreadyExists")
    }

    pub fn is_already_exists(&self) -> bool {
        matches!(self, ApiError::Status(s) if s.reason == "AlreadyExists")
    }

    pub fn is_forbidden(&self) -> bool {
        matches!(self, ApiError::Status(s) if s.code == 403)
    }

    /// The resourceVersion is older than the server remembers.
    pub fn is_expired(&self) -> bool {
        matches!(self, ApiError::Status(s) if s.code == 410)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patch {
    Merge,
    Strategic,
    Json,
}

impl Patch {
    fn content_type(self) -> &'static str {
        match self {
            Patch::Merge => "application/merge-patch+json",
            Patch::Strategic => "application/strategic-merge-patch+json",
            Patch::Json => "application/json-patch+json",
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    pub grace_period_seconds: Option<i64>,
    /// Delete only the object with this uid.
    pub uid: Option<String>,
    /// `Background`, `Foreground` or `Orphan`.
    pub propagation: Option<&'static str>,
}

/// One resource of the API, with one identity.
#[derive(Clone)]
pub struct Api {
    client: kube::Client,
    resource: Resource,
}

impl Api {
    pub fn new(client: &kube::Client, resource: &Resource) -> Api {
        Api { client: client.clone(), resource: *resource }
    }

    fn path(&self, namespace: &str, name: &str, subresource: &str) -> String {
        let mut path = self.resource.path(namespace);
        for part in [name, subresource] {
            if !part.is_empty() {
                path.push('/');
                path.push_str(part);
            }
        }
        path
    }

    pub async fn get(&self, namespace: &str, name: &str) -> Result<Value, ApiError> {
        request(&self.client, "GET", &self.path(namespace, name, ""), "", None).await
    }

    /// `None` when there is no such object.
    pub async fn find(&self, namespace: &str, name: &str) -> Result<Option<Value>, ApiError> {
        match self.get(namespace, name).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub async fn list(&self, namespace: &str) -> Result<Vec<Value>, ApiError> {
        let mut list: Value = request(&self.client, "GET", &self.path(namespace, "", ""), "", None).await?;
        match list.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => Ok(items),
            _ => Err(ApiError::Decode("a list without items".into())),
        }
    }

    pub async fn create(&self, namespace: &str, object: &Value) -> Result<Value, ApiError> {
        request(&self.client, "POST", &self.path(namespace, "", ""), "application/json", Some(object)).await
    }

    /// Replaces the object; its resourceVersion, if set, must be current.
    pub async fn replace(&self, object: &Value) -> Result<Value, ApiError> {
        let path = self.path(object.namespace(), object.name(), "");
        request(&self.client, "PUT", &path, "application/json", Some(object)).await
    }

    pub async fn replace_status(&self, object: &Value) -> Result<Value, ApiError> {
        let path = self.path(object.namespace(), object.name(), "status");
        request(&self.client, "PUT", &path, "application/json", Some(object)).await
    }

    pub async fn patch(&self, namespace: &str, name: &str, kind: Patch, body: &Value) -> Result<Value, ApiError> {
        request(&self.client, "PATCH", &self.path(namespace, name, ""), kind.content_type(), Some(body)).await
    }

    /// Merge-patches the status subresource with `{"status": …}` or more.
    pub async fn patch_status(
        &self,
        namespace: &str,
        name: &str,
        kind: Patch,
        body: &Value,
    ) -> Result<Value, ApiError> {
        request(&self.client, "PATCH", &self.path(namespace, name, "status"), kind.content_type(), Some(body)).await
    }

    /// POST to a subresource such as `binding` or `token`.
    pub async fn post(&self, namespace: &str, name: &str, subresource: &str, body: &Value) -> Result<Value, ApiError> {
        request(&self.client, "POST", &self.path(namespace, name, subresource), "application/json", Some(body)).await
    }

    /// Deletes; an object that is not there counts as deleted.
    pub async fn delete(&self, namespace: &str, name: &str, options: &DeleteOptions) -> Result<(), ApiError> {
        let mut body = json!({"apiVersion": "v1", "kind": "DeleteOptions"});
        if let Some(map) = body.as_object_mut() {
            if let Some(seconds) = options.grace_period_seconds {
                map.insert("gracePeriodSeconds".into(), json!(seconds));
            }
            if let Some(uid) = &options.uid {
                map.insert("preconditions".into(), json!({"uid": uid}));
            }
            if let Some(policy) = options.propagation {
                map.insert("propagationPolicy".into(), json!(policy));
            }
        }
        let path = self.path(namespace, name, "");
        match request::<Value>(&self.client, "DELETE", &path, "application/json", Some(&body)).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Creates the object, or replaces the one of that name.
    pub async fn create_or_replace(&self, object: &Value) -> Result<Value, ApiError> {
        match self.create(object.namespace(), object).await {
            Err(error) if error.is_already_exists() => {
                let live = self.get(object.namespace(), object.name()).await?;
                let mut wanted = object.clone();
                wanted.metadata_mut().insert("resourceVersion".into(), json!(live.resource_version()));
                self.replace(&wanted).await
            }
            other => other,
        }
    }
}

/// One request with a JSON answer.
pub async fn request<T: DeserializeOwned>(
    client: &kube::Client,
    method: &str,
    path: &str,
    content_type: &str,
    body: Option<&Value>,
) -> Result<T, ApiError> {
    let bytes = match body {
        Some(body) => serde_json::to_vec(body).map_err(|e| ApiError::Decode(e.to_string()))?,
        None => Vec::new(),
    };
    let answer = send(client, method, path, content_type, bytes).await?;
    serde_json::from_slice(&answer).map_err(|e| ApiError::Decode(e.to_string()))
}

/// One request, its whole answer as bytes.
pub async fn send(
    client: &kube::Client,
    method: &str,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Result<Bytes, ApiError> {
    let response = open(client, method, path, content_type, body).await?;
    let collected = response.into_body().collect().await.map_err(|e| ApiError::Transport(e.to_string()))?;
    Ok(collected.to_bytes())
}

/// One request whose answer is read as it comes. Anything but success is returned as its `Status`.
pub async fn open(
    client: &kube::Client,
    method: &str,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Result<http::Response<Body>, ApiError> {
    let mut builder = Request::builder().method(method).uri(path).header("accept", "application/json");
    if !content_type.is_empty() {
        builder = builder.header("content-type", content_type);
    }
    let request = builder.body(Body::from(body)).map_err(|e| ApiError::Decode(e.to_string()))?;
    let response = client.send(request).await.map_err(|e| ApiError::Transport(e.to_string()))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let code = response.status().as_u16();
    let bytes = response.into_body().collect().await.map_err(|e| ApiError::Transport(e.to_string()))?.to_bytes();
    let status = serde_json::from_slice(&bytes)
        .unwrap_or_else(|_| Status::new(code, "", String::from_utf8_lossy(&bytes).into_owned()));
    Err(ApiError::Status(status))
}
