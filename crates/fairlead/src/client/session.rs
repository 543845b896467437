//! What the client commands have in common: where the cluster is, requests, and the server's complaints.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use api::Status;
use bytes::{Buf, Bytes, BytesMut};
use clap::Args;
use http::{Request, Response};
use http_body_util::BodyExt;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use reconcile::ApiError;
use serde_json::Value;

pub const JSON: &str = "application/json";
pub const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
const DEFAULT_DIR: &str = "/var/lib/fairlead";

/// Which cluster is meant.
#[derive(Args, Debug, Clone)]
pub struct Connection {
    /// The kubeconfig that says where the cluster is. By default that of --data-dir, else that of KUBECONFIG.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The cluster's directory, whose kubeconfig is used.
    #[arg(long, env = "FAIRLEAD_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// The namespace of the objects; the kubeconfig's by default.
    #[arg(short, long)]
    namespace: Option<String>,
}

/// A cluster to talk to.
pub struct Session {
    client: kube::Client,
    /// Where objects are that do not say.
    pub namespace: String,
    /// Given on the command line, so that objects must be there.
    pub is_given: bool,
}

impl Connection {
    /// The cluster's directory.
    pub fn dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| DEFAULT_DIR.into())
    }

    pub async fn open(&self) -> anyhow::Result<Session> {
        let file = match (&self.kubeconfig, &self.data_dir) {
            (Some(path), _) => read(path)?,
            (None, Some(dir)) => read(&dir.join("kubeconfig"))?,
            (None, None) => match Kubeconfig::from_env().context("KUBECONFIG")? {
                Some(found) => found,
                None => read(&Path::new(DEFAULT_DIR).join("kubeconfig"))?,
            },
        };
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .context("the kubeconfig does not say where the cluster is")?;
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = kube::Client::try_from(config).context("prepare the connection")?;
        Ok(Session { client, namespace, is_given: self.namespace.is_some() })
    }
}

fn read(path: &Path) -> anyhow::Result<Kubeconfig> {
    Kubeconfig::read_from(path).with_context(|| {
        format!("no cluster in {}; say where it is with --data-dir, --kubeconfig or KUBECONFIG", path.display())
    })
}

impl Session {
    /// One request; anything but success is the server's `Status`. Its warnings go to standard error.
    pub async fn open(
        &self,
        method: &str,
        path: &str,
        accept: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<Response<Body>, ApiError> {
        let mut builder = Request::builder().method(method).uri(path).header("accept", accept);
        if !content_type.is_empty() {
            builder = builder.header("content-type", content_type);
        }
        let request = builder.body(Body::from(body)).map_err(|e| ApiError::Decode(e.to_string()))?;
        let response = self.client.send(request).await.map_err(|e| ApiError::Transport(chain(&e)))?;
        for warning in response.headers().get_all("warning") {
            // 299 - "text"
            let text = warning.to_str().unwrap_or_default();
            let text = text.split_once('"').map_or(text, |(_, t)| t.trim_end_matches('"'));
            writeln!(std::io::stderr(), "Warning: {text}").ok();
        }
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status().as_u16();
        let bytes = whole(response).await?;
        let status: Option<Status> = serde_json::from_slice(&bytes).ok();
        Err(ApiError::Status(
            status.unwrap_or_else(|| Status::new(code, "", String::from_utf8_lossy(&bytes).trim().to_string())),
        ))
    }

    pub async fn json(
        &self,
        method: &str,
        path: &str,
        accept: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<Value, ApiError> {
        let bytes = whole(self.open(method, path, accept, content_type, body).await?).await?;
        serde_json::from_slice(&bytes).map_err(|e| ApiError::Decode(e.to_string()))
    }

    pub async fn get(&self, path: &str, accept: &str) -> Result<Value, ApiError> {
        self.json("GET", path, accept, "", Vec::new()).await
    }

    /// A watch, line by line.
    pub async fn lines(&self, path: &str, accept: &str) -> Result<Lines, ApiError> {
        let response = self.open("GET", path, accept, "", Vec::new()).await?;
        Ok(Lines { body: response.into_body(), buffer: BytesMut::new() })
    }
}

async fn whole(response: Response<Body>) -> Result<Bytes, ApiError> {
    let collected = response.into_body().collect().await.map_err(|e| ApiError::Transport(chain(&e)))?;
    Ok(collected.to_bytes())
}

/// An error with its causes: what a TLS or connection error is about stands in the last of them.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = inner.source();
    }
    text
}

/// The events of a watch.
pub struct Lines {
    body: Body,
    buffer: BytesMut,
}

impl Lines {
    /// Type and object of the next event; `None` when the server has ended the watch.
    pub async fn next(&mut self) -> Result<Option<(String, Value)>, ApiError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                let mut event: Value = serde_json::from_slice(&line).map_err(|e| ApiError::Decode(e.to_string()))?;
                let kind = event.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
                let object = event.get_mut("object").map(Value::take).unwrap_or_default();
                if kind == "ERROR" {
                    let status = serde_json::from_value(object).map_err(|e| ApiError::Decode(e.to_string()))?;
                    return Err(ApiError::Status(status));
                }
                return Ok(Some((kind, object)));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|e| ApiError::Transport(chain(&e)))?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

/// An error in kubectl's words.
pub fn complaint(error: &ApiError) -> String {
    match error {
        ApiError::Status(status) if status.reason.is_empty() => format!("Error from server: {}", status.message),
        ApiError::Status(status) => format!("Error from server ({}): {}", status.reason, status.message),
        other => other.to_string(),
    }
}

pub fn fail(error: ApiError) -> anyhow::Error {
    anyhow!(complaint(&error))
}

/// Tells a complaint, where a command goes on with other objects.
pub fn complain(text: &str) {
    writeln!(std::io::stderr(), "{text}").ok();
}

/// Writes to standard output. Whoever reads it may be gone: that ends the command without complaint.
pub fn say(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("write to standard output")
}

/// Percent-encodes a query value or a part of a path.
pub fn encode(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~');
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
