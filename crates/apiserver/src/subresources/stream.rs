//! Logs, exec, attach and port-forward: handed to the node's kubelet, byte for byte.

use crate::body::{self, Body};
use crate::server::ApiServer;
use crate::verbs::Call;
use api::{ObjectExt, Status, kinds};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

/// A connection, whatever carries it.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}
pub type BoxedIo = Box<dyn Io>;

/// Opens the server's own connections to nodes, in the network namespace where nodes are reached.
pub trait Connector: Send + Sync {
    /// A TLS connection to a node's kubelet, with the server's client certificate.
    fn kubelet<'a>(&'a self, node: &'a str, address: SocketAddr) -> BoxFuture<'a, io::Result<BoxedIo>>;
}

struct Target {
    node: String,
    address: SocketAddr,
}

/// The kubelet of a pod's node.
fn target(call: &Call, pod: &Value) -> Result<Target, Status> {
    let name = pod.text("/spec/nodeName");
    if name.is_empty() {
        return Err(Status::bad_request(format!("pod {} does not have a host assigned", call.info.name)));
    }
    let node = call.registry.read(&kinds::NODES, "", name).ok_or_else(|| Status::not_found("", "nodes", name))?.parse();
    let addresses = node.pointer("/status/addresses").and_then(Value::as_array);
    let ip: Option<IpAddr> = addresses
        .into_iter()
        .flatten()
        .filter(|a| a.text("/type") == "InternalIP")
        .find_map(|a| a.text("/address").parse().ok());
    let ip = ip.ok_or_else(|| Status::unavailable(format!("node {name:?} has no internal address yet; try again")))?;
    let port = node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64).unwrap_or(10250);
    let port = u16::try_from(port).map_err(|_| Status::internal(format!("node {name:?} names kubelet port {port}")))?;
    Ok(Target { node: name.into(), address: SocketAddr::new(ip, port) })
}

fn pod(call: &Call) -> Result<Value, Status> {
    let found = call.registry.cache.get(&call.row, &call.info.namespace, &call.info.name);
    Ok(found.ok_or_else(|| call.not_found())?.parse())
}

/// The container asked for, or the only or default one.
fn container(call: &Call, pod: &Value) -> Result<String, Status> {
    let names: Vec<&str> = ["containers", "initContainers"]
        .iter()
        .flat_map(|l| pod.pointer(&format!("/spec/{l}")).and_then(Value::as_array).into_iter().flatten())
        .map(|c| c.text("/name"))
        .collect();
    let asked = call.info.query.get("container");
    if !asked.is_empty() {
        return match names.contains(&asked) {
            true => Ok(asked.into()),
            false => Err(Status::bad_request(format!("container {asked} is not valid for pod {}", call.info.name))),
        };
    }
    let main: Vec<&str> = pod
        .pointer("/spec/containers")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|c| c.text("/name"))
        .collect();
    if let Some(default) = pod.annotation("kubectl.kubernetes.io/default-container").filter(|d| main.contains(d)) {
        return Ok(default.into());
    }
    match main.as_slice() {
        [only] => Ok((*only).into()),
        _ => Err(Status::bad_request(format!(
            "a container name must be specified for pod {}, choose one of: [{}]",
            call.info.name,
            main.join(" ")
        ))),
    }
}

async fn dial(
    server: &ApiServer,
    target: &Target,
) -> Result<hyper::client::conn::http1::SendRequest<Full<Bytes>>, Status> {
    let unreachable = |e: &dyn std::fmt::Display| {
        Status::internal(format!("error dialing backend: {} at {}: {e}", target.node, target.address))
    };
    let Some(connector) = server.connector() else {
        return Err(Status::unavailable("this server has no connection to nodes"));
    };
    let io = connector.kubelet(&target.node, target.address).await.map_err(|e| unreachable(&e))?;
    let (sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|e| unreachable(&e))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            debug!(%error, "connection to a kubelet ended");
        }
    });
    Ok(sender)
}

fn query_without_container(uri_query: &str) -> String {
    uri_query.split('&').filter(|p| !p.is_empty() && !p.starts_with("container=")).collect::<Vec<_>>().join("&")
}

pub async fn logs(server: &ApiServer, call: &Call) -> Result<Response<Body>, Status> {
    let pod = pod(call)?;
    let container = container(call, &pod)?;
    if pod.text("/spec/nodeName").is_empty() {
        // Not scheduled yet: there is nothing to read, and that is no error.
        return Ok(body::typed(StatusCode::OK, "text/plain", Bytes::new()));
    }
    let target = target(call, &pod)?;
    let mut query = Vec::new();
    for key in ["follow", "previous", "sinceSeconds", "sinceTime", "timestamps", "tailLines", "limitBytes"] {
        let value = call.info.query.get(key);
        if !value.is_empty() {
            query.push(format!(
                "{key}={}",
                percent_encoding::utf8_percent_encode(value, percent_encoding::NON_ALPHANUMERIC)
            ));
        }
    }
    let path = format!("/containerLogs/{}/{}/{container}?{}", call.info.namespace, call.info.name, query.join("&"));
    let mut sender = dial(server, &target).await?;
    let request = Request::get(path)
        .header(header::HOST, target.node.as_str())
        .body(Full::default())
        .map_err(Status::internal)?;
    let response = sender.send_request(request).await.map_err(Status::internal)?;
    pass_on(response, "text/plain").await
}

async fn pass_on(response: Response<hyper::body::Incoming>, media: &'static str) -> Result<Response<Body>, Status> {
    let (parts, incoming) = response.into_parts();
    if !parts.status.is_success() {
        let text = incoming.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        return Err(serde_json::from_slice(&text).unwrap_or_else(|_| {
            let message = String::from_utf8_lossy(&text).trim().to_string();
            match parts.status.as_u16() {
                404 => Status::new(404, "NotFound", message),
                400 => Status::bad_request(message),
                _ => Status::internal(message),
            }
        }));
    }
    let mut answer = Response::new(incoming.map_err(Into::into).boxed_unsync());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    Ok(answer)
}

/// Opens the stream at the kubelet first; the client's is accepted with what the kubelet answered.
pub async fn upgrade(
    server: &ApiServer,
    call: &Arc<Call>,
    client: Option<OnUpgrade>,
) -> Result<Response<Body>, Status> {
    let pod = pod(call)?;
    let kind = call.info.subresource.as_str();
    let (namespace, name) = (&call.info.namespace, &call.info.name);
    let raw = call.headers.get("x-fairlead-query").and_then(|v| v.to_str().ok()).unwrap_or("");
    let query = query_without_container(raw);
    let path = match kind {
        "portforward" => format!("/portForward/{namespace}/{name}?{query}"),
        _ => format!("/{kind}/{namespace}/{name}/{}?{query}", container(call, &pod)?),
    };
    if matches!(pod.text("/status/phase"), "Succeeded" | "Failed") {
        return Err(Status::bad_request(format!(
            "cannot exec into a container in a completed pod; current phase is {}",
            pod.text("/status/phase")
        )));
    }
    let Some(client) = client.filter(|_| call.headers.contains_key(header::UPGRADE)) else {
        return Err(Status::bad_request("Upgrade request required"));
    };
    let target = target(call, &pod)?;
    let mut sender = dial(server, &target).await?;
    let method = if call.headers.get(header::UPGRADE).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket")) {
        "GET"
    } else {
        "POST"
    };
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, target.node.as_str());
    for key in [
        "connection",
        "upgrade",
        "sec-websocket-key",
        "sec-websocket-version",
        "sec-websocket-protocol",
        "x-stream-protocol-version",
    ] {
        for value in call.headers.get_all(key) {
            request = request.header(key, value);
        }
    }
    let request = request.body(Full::default()).map_err(Status::internal)?;
    let mut response = sender.send_request(request).await.map_err(Status::internal)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return pass_on(response, "application/json").await;
    }
    let kubelet = hyper::upgrade::on(&mut response);
    tokio::spawn(async move {
        // The sender must live until the upgrade is through, or the connection is closed under it.
        let _sender = sender;
        let (client, kubelet) = match tokio::try_join!(client, kubelet) {
            Ok(both) => both,
            Err(error) => {
                debug!(%error, "a stream was not taken over");
                return;
            }
        };
        let (mut client, mut kubelet) = (TokioIo::new(client), TokioIo::new(kubelet));
        if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut kubelet).await {
            debug!(%error, "a stream ended");
        }
    });
    let mut answer = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    for (key, value) in response.headers() {
        answer.headers_mut().insert(key, value.clone());
    }
    Ok(answer)
}
