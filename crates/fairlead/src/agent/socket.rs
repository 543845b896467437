//! The agent's unix socket: what `fairlead node`, `status`, `top`, `explain` and `image` ask of a node.

use crate::{explain, top};
use anyhow::{Context, bail};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use proxy::{Mode, NodeView};
use reconcile::{ObjectRef, Recorder, ServiceFeed};
use runtime::Builtin;
use runtime::ImageService;
use runtime::image::ImageStore;
use serde_json::json;
use std::convert::Infallible;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What local commands may ask.
pub struct Local {
    pub name: String,
    /// The mode that the agent was started in. `None`: Services are another process's affair.
    pub first_mode: Option<Mode>,
    pub switch: Option<proxy::Switch>,
    pub events: Option<Recorder>,
    pub feed: ServiceFeed,
    pub view: watch::Receiver<Arc<NodeView>>,
    pub hooks: proxy::Hooks,
    pub proxy: watch::Receiver<proxy::Status>,
    pub metrics: Arc<proxy::Metrics>,
    pub images: Arc<Builtin>,
    pub store: ImageStore,
}

impl Local {
    fn mode(&self) -> Option<Mode> {
        self.proxy.borrow().mode.or(self.first_mode)
    }

    /// Returns when the node is in the mode, or says why it stays in its own.
    async fn change_mode(&self, mode: Mode) -> anyhow::Result<()> {
        let from = self.mode().context(NO_PROXY)?;
        let switch = self.switch.as_ref().context("this node keeps its mode (--feature-gates ModeHandOver=false)")?;
        let events = self.events.as_ref().context(NO_PROXY)?;
        let node = ObjectRef::new("v1", "Node", "", &self.name, "");
        let outcome = switch.to(mode).await;
        match &outcome {
            Ok(()) if from == mode => {}
            Ok(()) => {
                let message = format!("Services of this node have changed from {from} to {mode} mode");
                events.event(&node, reconcile::EventKind::Normal, "ProxyModeChanged", message);
            }
            Err(error) => events.event(&node, reconcile::EventKind::Warning, "ProxyModeNotChanged", error.to_string()),
        }
        Ok(outcome?)
    }
}

/// A bound socket, and how its file is told from that of another agent at the same path.
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode; the kernel gives them to no other file while the listener is open.
    file: (u64, u64),
}

impl Socket {
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        // A socket file outlives its process; nobody answers on an old one.
        std::fs::remove_file(path).ok();
        let listener = UnixListener::bind(path).with_context(|| {
            format!("listen on {}; a socket's path has at most 107 bytes, choose a shorter --data-dir", path.display())
        })?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Socket { listener, path: path.to_owned(), file: identity(path)? })
    }

    /// Answers until the token is cancelled.
    pub async fn serve(self, state: Arc<Local>, token: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = token.cancelled() => return,
            };
            let Ok((stream, _)) = accepted else { continue };
            let state = state.clone();
            connections.spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let state = state.clone();
                    async move { Ok::<_, Infallible>(answer(&state, request).await) }
                });
                // A local command that goes away early is no fault of ours.
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok();
            });
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another agent may have taken the path meanwhile; then it is not ours to remove.
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            std::fs::remove_file(&self.path).ok();
        }
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

async fn answer(state: &Local, request: Request<hyper::body::Incoming>) -> Response<Full<bytes::Bytes>> {
    let result = local_request(state, request).await;
    let (code, text) = match result {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}")),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = code;
    response
}

const NO_PROXY: &str = "Services are another process's affair on this node (--proxy-mode none)";

async fn local_request(state: &Local, request: Request<hyper::body::Incoming>) -> anyhow::Result<String> {
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let body = request.into_body().collect().await?.to_bytes();
    match (&method, path.as_str()) {
        (&Method::GET, "/status") => {
            let proxy = state.proxy.borrow().clone();
            let table = state.feed.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            Ok(json!({
                "node": state.name, "proxyMode": state.mode().map_or("none".to_owned(), |mode| mode.to_string()),
                "proxy": {"synced": proxy.synced, "commits": proxy.commits, "pending": proxy.pending, "error": proxy.error, "about": proxy.about,
                    "ejections": proxy.ejections, "retries": proxy.retries, "watchError": proxy.watch_error,
                    "ejected": proxy.ejected.iter().map(|(address, _)| address.to_string()).collect::<Vec<_>>()},
                "services": table.services().count(), "synced": table.is_synced(),
            })
            .to_string())
        }
        (&Method::POST, "/mode") => {
            state.change_mode(std::str::from_utf8(&body)?.parse()?).await?;
            Ok(String::new())
        }
        (&Method::GET, "/plan") => {
            let view = state.view.borrow().clone();
            let table = state.feed.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            Ok(proxy::dump(state.mode().context(NO_PROXY)?, &table, &view))
        }
        (&Method::GET, "/traffic") => {
            let mode = state.mode().context(NO_PROXY)?;
            let (table, hooks, metrics) = (state.feed.table.clone(), state.hooks.clone(), state.metrics.clone());
            let mut view = NodeView::clone(&state.view.borrow());
            view.ejected.extend(&state.proxy.borrow().ejected);
            let traffic = tokio::task::spawn_blocking(move || {
                let table = table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                proxy::traffic(mode, None, Some(&hooks), &metrics, &table, &view)
            })
            .await??;
            Ok(serde_json::to_string(&top::Traffic::from(traffic))?)
        }
        (&Method::POST, "/explain") => {
            let question: explain::Question = serde_json::from_slice(&body).context("read the question")?;
            let mode = state.mode().context(NO_PROXY)?;
            let table = state.feed.table.clone();
            let mut view = NodeView::clone(&state.view.borrow());
            let pending = {
                let proxy = state.proxy.borrow();
                view.ejected.extend(&proxy.ejected);
                proxy.pending
            };
            let hooks = state.hooks.clone();
            let report = tokio::task::spawn_blocking(move || {
                let (mut report, frontends) = {
                    let table = table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let frontends: Vec<_> = table.frontends().cloned().collect();
                    (proxy::explain::report(mode, &table, &view, &question.packet())?, frontends)
                };
                // The kernel is asked without holding up those who follow the table.
                let mut drift = proxy::explain::drift(mode, &frontends, &view, None, Some(&hooks))?;
                if pending > 0 {
                    drift.push(format!("{pending} changed ports of Services are being committed"));
                }
                report.drift = Some(drift);
                anyhow::Ok(report)
            })
            .await??;
            Ok(serde_json::to_string(&report)?)
        }
        (&Method::GET, "/images") => {
            let images = state.images.list_images().await?;
            Ok(json!(
                images.iter().map(|i| json!({"id": i.id, "names": i.repo_tags, "size": i.size})).collect::<Vec<_>>()
            )
            .to_string())
        }
        (&Method::POST, "/images") => {
            let archive = PathBuf::from(String::from_utf8(body.to_vec())?);
            let store = state.store.clone();
            let imported = tokio::task::spawn_blocking(move || {
                let file = std::fs::File::open(&archive).with_context(|| format!("open {}", archive.display()))?;
                Ok::<_, anyhow::Error>(store.import(file, None)?)
            })
            .await??;
            Ok(json!(imported.iter().map(|i| i.status().repo_tags).collect::<Vec<_>>()).to_string())
        }
        (&Method::DELETE, "/images") => {
            state.images.remove_image(std::str::from_utf8(&body)?).await?;
            Ok(String::new())
        }
        _ => bail!("the agent has no {method} {path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_file_goes_with_its_agent_and_with_no_other() {
        let dir = std::env::temp_dir().join(format!("fairlead-socket-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let path = dir.join("agent.sock");
        let first = Socket::bind(&path).expect("bind");
        let second = Socket::bind(&path).expect("bind where somebody else is");
        drop(first);
        tokio::net::UnixStream::connect(&path).await.expect("the second agent's socket is there");
        drop(second);
        assert!(!path.exists(), "an agent removes its own");
        std::fs::remove_dir_all(&dir).expect("remove the directory");
    }
}
