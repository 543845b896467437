//! Copies between a container's session and a client's channels, whatever carries them.

use bytes::Bytes;
use runtime::{Reader, RuntimeError, Session};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Stdout,
    Stderr,
}

/// A client's side of a session.
pub struct Client {
    /// Ends with the client's input.
    pub stdin: mpsc::Receiver<Bytes>,
    /// Columns and rows.
    pub resize: mpsc::Receiver<(u16, u16)>,
    pub output: mpsc::Sender<(Output, Bytes)>,
    /// Cancelled when the client has gone.
    pub gone: CancellationToken,
}

/// Runs until the process has ended and its output has been handed over, or the client has gone. The answer is the
/// `Status` that ends the session.
pub async fn run(session: Session, client: Client) -> Value {
    let Session { stdin, stdout, stderr, terminal, exit } = session;
    let Client { stdin: mut input, mut resize, output, gone } = client;
    let feed = async move {
        if let Some(mut stdin) = stdin {
            while let Some(bytes) = input.recv().await {
                if stdin.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            let _ = stdin.shutdown().await;
        }
    };
    let sizes = async move {
        while let Some((columns, rows)) = resize.recv().await {
            if let Some(terminal) = &terminal
                && let Err(e) = terminal.resize(columns, rows)
            {
                tracing::debug!("cannot resize a terminal: {e}");
            }
        }
        // The terminal stays open until the process has ended.
        std::future::pending::<()>().await;
    };
    let copied = async {
        tokio::join!(copy(stdout, Output::Stdout, &output), copy(stderr, Output::Stderr, &output));
    };
    let feed = tokio::spawn(feed);
    let sizes = tokio::spawn(sizes);
    let work = async {
        let mut copied = std::pin::pin!(copied);
        let mut exit = exit;
        let mut drained = false;
        let code = loop {
            tokio::select! {
                code = &mut exit => break code,
                () = &mut copied, if !drained => drained = true,
            }
        };
        if !drained {
            // What the process wrote is in the pipes; a child of its that keeps them open does not hold us.
            let _ = tokio::time::timeout(std::time::Duration::from_millis(500), copied).await;
        }
        code
    };
    let status = tokio::select! {
        code = work => exit_status(code),
        () = gone.cancelled() => success(),
    };
    feed.abort();
    sizes.abort();
    status
}

async fn copy(reader: Option<Reader>, kind: Output, output: &mpsc::Sender<(Output, Bytes)>) {
    let Some(mut reader) = reader else { return };
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(n) = reader.read(&mut buffer).await {
        if n == 0 || output.send((kind, Bytes::copy_from_slice(&buffer[..n]))).await.is_err() {
            return;
        }
    }
}

fn success() -> Value {
    json!({"metadata": {}, "status": "Success"})
}

/// A code other than zero is a failure that kubectl turns into its own exit code.
fn exit_status(code: Result<i32, RuntimeError>) -> Value {
    match code {
        Ok(0) => success(),
        Ok(code) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(e) => failure(&e),
    }
}

pub fn failure(error: &dyn std::fmt::Display) -> Value {
    json!({
        "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
        "message": format!("Internal error occurred: {error}"),
    })
}

/// `TerminalSize`s as clients send them, one after another.
pub fn parse_sizes(bytes: &[u8]) -> Vec<(u16, u16)> {
    let field = |value: &Value, name: &str| value.get(name)?.as_u64().and_then(|n| u16::try_from(n).ok());
    serde_json::Deserializer::from_slice(bytes)
        .into_iter::<Value>()
        .flatten()
        .filter_map(|value| Some((field(&value, "Width")?, field(&value, "Height")?)))
        .collect()
}
