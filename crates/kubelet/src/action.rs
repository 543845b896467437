//! Does what probes and hooks ask for: a command, an HTTP request, a connection, a sleep.
//!
//! Connections begin in the agent's own network namespace, which is the node's.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use runtime::{RuntimeError, RuntimeService};
use tokio::net::TcpStream;

use crate::pod::{Action, Container, HttpGet};

/// Whom an action is about.
pub struct Target<'a> {
    pub runtime: &'a dyn RuntimeService,
    pub container_id: &'a str,
    pub container: &'a Container,
    pub pod_ip: Option<IpAddr>,
}

/// Why an action counts as failed; the text goes into events.
pub async fn perform(action: &Action, target: &Target<'_>, timeout: Duration) -> Result<(), String> {
    if let Some(exec) = &action.exec {
        return match target.runtime.exec_sync(target.container_id, exec.command.clone(), timeout).await {
            Ok(output) if output.exit_code == 0 => Ok(()),
            Ok(output) => {
                let mut text = output.stdout;
                text.extend(output.stderr);
                Err(String::from_utf8_lossy(&text[..text.len().min(1024)]).into_owned())
            }
            Err(RuntimeError::Timeout { .. }) => {
                Err(format!("command timed out: {:?} timed out after {}s", exec.command, timeout.as_secs()))
            }
            Err(e) => Err(e.to_string()),
        };
    }
    if let Some(sleep) = &action.sleep {
        tokio::time::sleep(Duration::from_secs(sleep.seconds)).await;
        return Ok(());
    }
    let work = async {
        if let Some(get) = &action.http_get {
            let port = get.port.resolve(target.container).ok_or("the named port is not in the container")?;
            return http_get(get, address(&get.host, port, target)?).await;
        }
        if let Some(tcp) = &action.tcp_socket {
            let port = tcp.port.resolve(target.container).ok_or("the named port is not in the container")?;
            let address = address(&tcp.host, port, target)?;
            return TcpStream::connect(address).await.map(drop).map_err(|e| format!("dial tcp {address}: {e}"));
        }
        if action.grpc.is_some() {
            return Err("grpc probes are not supported: use exec, httpGet or tcpSocket".to_owned());
        }
        Err("no action is set: use exec, httpGet, tcpSocket or sleep".to_owned())
    };
    tokio::time::timeout(timeout, work)
        .await
        .unwrap_or_else(|_| Err(format!("context deadline exceeded after {}s", timeout.as_secs())))
}

fn address(host: &str, port: u16, target: &Target<'_>) -> Result<SocketAddr, String> {
    let ip = match host {
        "" => target.pod_ip.ok_or("the pod has no address yet")?,
        "localhost" => IpAddr::from([127, 0, 0, 1]),
        host => host.parse().map_err(|_| format!("host {host:?} is not an address"))?,
    };
    Ok(SocketAddr::new(ip, port))
}

/// One HTTP or HTTPS request, as a probe makes it: whether its status is from 200 to 399. Certificates are not checked.
///
/// # Errors
/// Why it counts as failed.
pub async fn probe_http(scheme: &str, address: SocketAddr, path: &str) -> Result<(), String> {
    let get = HttpGet { scheme: scheme.to_owned(), path: path.to_owned(), ..HttpGet::default() };
    http_get(&get, address).await
}

async fn http_get(get: &HttpGet, address: SocketAddr) -> Result<(), String> {
    if get.scheme.eq_ignore_ascii_case("https") {
        return https_get(get, address).await;
    }
    let stream = TcpStream::connect(address).await.map_err(|e| format!("Get \"http://{address}\": {e}"))?;
    send(get, address, TokioIo::new(stream)).await
}

async fn send<S>(get: &HttpGet, address: SocketAddr, stream: S) -> Result<(), String>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let path = if get.path.starts_with('/') { get.path.clone() } else { format!("/{}", get.path) };
    let failed = |e: &dyn std::fmt::Display| format!("Get \"{}://{address}{path}\": {e}", get.scheme.to_lowercase());
    let mut request = http::Request::get(&path).header("user-agent", "kube-probe/1.33").header("accept", "*/*");
    let named = |name: &str| get.http_headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
    if named("host").is_none() {
        request = request.header("host", address.to_string());
    }
    for header in &get.http_headers {
        request = request.header(&header.name, &header.value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| failed(&e))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(|e| failed(&e))?;
    tokio::spawn(connection);
    let status = sender.send_request(request).await.map_err(|e| failed(&e))?.status();
    if (200..400).contains(&status.as_u16()) {
        return Ok(());
    }
    Err(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
}

/// Certificates are not checked: a pod's own probe knows nothing that could vouch for it.
async fn https_get(get: &HttpGet, address: SocketAddr) -> Result<(), String> {
    let failed = |e: &dyn std::fmt::Display| format!("Get \"https://{address}\": {e}");
    let connector = crate::insecure::connector().map_err(|e| failed(&e))?;
    let stream = TcpStream::connect(address).await.map_err(|e| failed(&e))?;
    let name = rustls::pki_types::ServerName::from(address.ip());
    let stream = connector.connect(name, stream).await.map_err(|e| failed(&e))?;
    send(get, address, TokioIo::new(stream)).await
}
