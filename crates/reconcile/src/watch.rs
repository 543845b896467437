//! Follows one resource for ever: list, then watch, and again when the server forgets or the connection breaks.

use crate::api::{ApiError, open, send};
use ::api::Resource;
use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use percent::encode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::debug;

/// What happened to the objects of a scope. `Reset` holds all of them and replaces what was known.
#[derive(Debug, Clone, PartialEq)]
pub enum Change<T> {
    Reset(Vec<T>),
    Apply(T),
    Delete(T),
}

/// Which objects are followed.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// Empty: all namespaces.
    pub namespace: String,
    pub label_selector: String,
    pub field_selector: String,
}

impl Scope {
    pub fn all() -> Scope {
        Scope::default()
    }

    pub fn fields(selector: impl Into<String>) -> Scope {
        Scope { field_selector: selector.into(), ..Scope::default() }
    }

    pub fn namespace(namespace: impl Into<String>) -> Scope {
        Scope { namespace: namespace.into(), ..Scope::default() }
    }

    fn query(&self) -> String {
        let mut query = String::new();
        for (key, value) in [("labelSelector", &self.label_selector), ("fieldSelector", &self.field_selector)] {
            if !value.is_empty() {
                query.push_str(&format!("&{key}={}", encode(value)));
            }
        }
        query
    }
}

mod percent {
    pub fn encode(text: &str) -> String {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~');
        text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
    }
}

const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Starts following. The task ends when the receiver is dropped.
///
/// `T` is a narrow struct: only the fields it names are kept.
pub fn watch<T>(client: &kube::Client, resource: &Resource, scope: Scope) -> mpsc::Receiver<Change<T>>
where
    T: DeserializeOwned + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(256);
    let (client, resource) = (client.clone(), *resource);
    tokio::spawn(async move {
        let mut backoff = Duration::from_millis(50);
        let mut version: Option<String> = None;
        while !sender.is_closed() {
            let result = match version.clone() {
                None => list(&client, &resource, &scope, &sender).await.map(|v| version = Some(v)),
                Some(from) => follow(&client, &resource, &scope, &sender, from, &mut version).await,
            };
            match result {
                Ok(()) => backoff = Duration::from_millis(50),
                Err(Ended::Dropped) => return,
                Err(Ended::Failed(error)) => {
                    if error.is_expired() {
                        version = None;
                        continue;
                    }
                    debug!(resource = resource.plural, %error, "watch interrupted");
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(MAX_BACKOFF);
                }
            }
        }
    });
    receiver
}

enum Ended {
    /// Nobody listens any more.
    Dropped,
    Failed(ApiError),
}

impl From<ApiError> for Ended {
    fn from(error: ApiError) -> Ended {
        Ended::Failed(error)
    }
}

#[derive(Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
struct List<T> {
    metadata: ListMeta,
    items: Vec<T>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    resource_version: String,
}

async fn list<T: DeserializeOwned>(
    client: &kube::Client,
    resource: &Resource,
    scope: &Scope,
    sender: &mpsc::Sender<Change<T>>,
) -> Result<String, Ended> {
    let path = format!("{}?resourceVersion=0{}", resource.path(&scope.namespace), scope.query());
    let bytes = send(client, "GET", &path, "", Vec::new()).await?;
    let list: List<T> = serde_json::from_slice(&bytes).map_err(|e| ApiError::Decode(e.to_string()))?;
    sender.send(Change::Reset(list.items)).await.map_err(|_| Ended::Dropped)?;
    Ok(list.metadata.resource_version)
}

#[derive(Deserialize)]
struct Line<'a> {
    r#type: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: ListMeta,
}

async fn follow<T: DeserializeOwned>(
    client: &kube::Client,
    resource: &Resource,
    scope: &Scope,
    sender: &mpsc::Sender<Change<T>>,
    from: String,
    version: &mut Option<String>,
) -> Result<(), Ended> {
    let path = format!(
        "{}?watch=true&allowWatchBookmarks=true&resourceVersion={from}{}",
        resource.path(&scope.namespace),
        scope.query()
    );
    let mut body = open(client, "GET", &path, "", Vec::new()).await?.into_body();
    let mut buffer = BytesMut::new();
    let mut scanned = 0;
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            () = sender.closed() => return Err(Ended::Dropped),
        };
        let Some(frame) = frame else { return Ok(()) };
        let frame = frame.map_err(|e| ApiError::Transport(e.to_string()))?;
        let Ok(data) = frame.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while let Some(end) = buffer[scanned..].iter().position(|b| *b == b'\n').map(|p| p + scanned) {
            let line = buffer.split_to(end);
            buffer.advance(1);
            scanned = 0;
            if let Some(change) = read_line(&line, version)? {
                sender.send(change).await.map_err(|_| Ended::Dropped)?;
            }
        }
        scanned = buffer.len();
    }
}

fn read_line<T: DeserializeOwned>(line: &[u8], version: &mut Option<String>) -> Result<Option<Change<T>>, ApiError> {
    let decode = |e: serde_json::Error| ApiError::Decode(e.to_string());
    let line: Line<'_> = serde_json::from_slice(line).map_err(decode)?;
    if line.r#type == "ERROR" {
        return Err(ApiError::Status(serde_json::from_str(line.object.get()).map_err(decode)?));
    }
    let versioned: Versioned = serde_json::from_str(line.object.get()).map_err(decode)?;
    *version = Some(versioned.metadata.resource_version);
    let object = || serde_json::from_str::<T>(line.object.get()).map_err(decode);
    Ok(match line.r#type {
        "ADDED" | "MODIFIED" => Some(Change::Apply(object()?)),
        "DELETED" => Some(Change::Delete(object()?)),
        _ => None,
    })
}
