//! Port-forward: each connection of the client is a pair of SPDY streams, `data` and `error`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use runtime::RuntimeService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::spdy::{Connection, Event, Sender};

/// Serves one port-forward session until its client has gone.
pub async fn over_spdy<S>(stream: S, runtime: Arc<dyn RuntimeService>, sandbox: String)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, sender) = Connection::new(stream);
    // Error streams by request id, waiting for their data streams.
    let mut errors: HashMap<String, u32> = HashMap::new();
    let mut inputs: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let mut tasks = JoinSet::new();
    while let Some(event) = connection.next().await {
        match event {
            Event::Opened { id, headers } => {
                sender.reply(id).await;
                let request = headers.get("requestid").cloned().unwrap_or_default();
                match headers.get("streamtype").map(String::as_str) {
                    Some("error") => {
                        errors.insert(request, id);
                    }
                    Some("data") => {
                        let port = headers.get("port").and_then(|p| p.parse::<u16>().ok());
                        let (input, received) = mpsc::channel(16);
                        inputs.insert(id, input);
                        let error = errors.remove(&request);
                        let (runtime, sandbox, sender) = (runtime.clone(), sandbox.clone(), sender.clone());
                        tasks.spawn(forward(runtime, sandbox, port, id, error, received, sender));
                    }
                    _ => sender.reset(id).await,
                }
            }
            Event::Data { id, bytes, last } => {
                if let Some(input) = inputs.get(&id)
                    && !bytes.is_empty()
                    && input.send(bytes).await.is_err()
                {
                    inputs.remove(&id);
                }
                if last {
                    inputs.remove(&id);
                }
            }
            Event::Reset { id } => {
                inputs.remove(&id);
            }
        }
        while tasks.try_join_next().is_some() {}
    }
    // Dropping the tasks closes their connections into the pod.
}

async fn forward(
    runtime: Arc<dyn RuntimeService>,
    sandbox: String,
    port: Option<u16>,
    id: u32,
    error: Option<u32>,
    mut input: mpsc::Receiver<Bytes>,
    sender: Sender,
) {
    let result = async {
        let port = port.ok_or("the stream names no port")?;
        let v4 = runtime.dial(&sandbox, IpAddr::from([127, 0, 0, 1]), port).await;
        let stream = match v4 {
            Ok(stream) => stream,
            Err(e) => match runtime.dial(&sandbox, IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), port).await {
                Ok(stream) => stream,
                Err(_) => return Err(e.to_string()),
            },
        };
        let (mut read, mut write) = stream.into_split();
        let up = async {
            while let Some(bytes) = input.recv().await {
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            let _ = write.shutdown().await;
        };
        let down = async {
            let mut buffer = vec![0; 32 * 1024];
            while let Ok(n) = read.read(&mut buffer).await {
                if n == 0 {
                    break;
                }
                sender.data(id, Bytes::copy_from_slice(&buffer[..n]), false).await;
            }
            sender.data(id, Bytes::new(), true).await;
        };
        tokio::pin!(up);
        tokio::pin!(down);
        let mut is_up = true;
        loop {
            tokio::select! {
                () = &mut up, if is_up => is_up = false,
                // When the pod has said its last word, what the client still sends reaches nobody.
                () = &mut down => return Ok::<(), String>(()),
            }
        }
    }
    .await;
    if let Err(e) = &result {
        sender.data(id, Bytes::new(), true).await;
        if let Some(error) = error {
            let text = format!("error forwarding port {} to pod {sandbox}: {e}", port.unwrap_or(0));
            sender.data(error, text.into(), true).await;
        }
    } else if let Some(error) = error {
        sender.data(error, Bytes::new(), true).await;
    }
}
