//! What processes of one machine tell each other: readiness over standard output, signals, and an agent's unix socket.

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use std::io::Write;
use std::path::Path;
use tokio::signal::unix::{SignalKind, signal};

/// Tells whoever started this process that it is ready, and lets go of its standard output.
pub fn announce(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    // Whoever started us may have stopped waiting; we go on.
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    nix::unistd::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), 1)?;
    Ok(())
}

/// Returns when this process is asked to end.
pub async fn wait_for_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Asks an agent over its socket. Returns its answer, or its complaint as an error.
pub async fn ask(socket: &Path, method: &str, path: &str, body: Vec<u8>) -> anyhow::Result<String> {
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .with_context(|| format!("the agent at {} does not answer; `fairlead status` tells", socket.display()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request =
        http::Request::builder().method(method).uri(path).header("host", "agent").body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let good = response.status().is_success();
    let text = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
    driver.abort();
    if good { Ok(text) } else { Err(anyhow::anyhow!(text)) }
}
