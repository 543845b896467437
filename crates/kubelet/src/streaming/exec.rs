//! Carries a session over WebSocket channels or SPDY streams.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use runtime::Session;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::session::{self, Client, Output, parse_sizes};
use super::spdy::{Connection, Event};
use super::websocket::{self, Message, Outgoing};

/// Which protocol of the `channel.k8s.io` family was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Errors as bare text.
    V1,
    V2,
    V3,
    /// Errors as a `Status`.
    V4,
    /// A client can end its input without ending the connection.
    V5,
}

impl Version {
    pub fn parse(name: &str) -> Option<Version> {
        Some(match name {
            "v5.channel.k8s.io" => Version::V5,
            "v4.channel.k8s.io" => Version::V4,
            "v3.channel.k8s.io" => Version::V3,
            "v2.channel.k8s.io" => Version::V2,
            "channel.k8s.io" => Version::V1,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Version::V5 => "v5.channel.k8s.io",
            Version::V4 => "v4.channel.k8s.io",
            Version::V3 => "v3.channel.k8s.io",
            Version::V2 => "v2.channel.k8s.io",
            Version::V1 => "channel.k8s.io",
        }
    }

    fn render(self, status: &Value) -> Option<Bytes> {
        if self >= Version::V4 {
            return Some(status.to_string().into());
        }
        // Older clients know only text, and nothing means success.
        (status["status"] != "Success").then(|| status["message"].as_str().unwrap_or("failed").to_owned().into())
    }
}

/// The streams that a request asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Wanted {
    /// Both spellings: the API's and the kubelet's own.
    pub fn parse(query: &[(String, String)]) -> Wanted {
        let is = |names: [&str; 2]| {
            query.iter().any(|(n, v)| names.contains(&n.as_str()) && matches!(v.as_str(), "true" | "1"))
        };
        Wanted {
            stdin: is(["stdin", "input"]),
            stdout: is(["stdout", "output"]),
            stderr: is(["stderr", "error"]),
            tty: is(["tty", "tty"]),
        }
    }
}

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// How long a client has to answer the ping that tells us that it listens.
const LISTENS_WITHIN: Duration = Duration::from_millis(500);
/// How long a client that listens may need to know its own channels.
const KNOWS_ITS_CHANNELS: Duration = Duration::from_millis(30);

pub async fn over_websocket<S>(stream: S, version: Version, session: Result<Session, Value>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut reader, sender) = websocket::split(stream);
    let frame = |channel: u8, bytes: &[u8]| {
        let mut message = BytesMut::with_capacity(bytes.len() + 1);
        message.put_u8(channel);
        message.put_slice(bytes);
        Outgoing::Data(message.freeze())
    };
    let gone = CancellationToken::new();
    let (stdin_sender, stdin) = mpsc::channel::<Bytes>(16);
    let (resize_sender, resize) = mpsc::channel(4);
    let (output, mut outputs) = mpsc::channel::<(Output, Bytes)>(16);
    let is_gone = gone.clone();
    // Clients before 1.34 throw away what comes before they have made their channels, the exit code included
    // (kubernetes/kubernetes#131203), and a command can be quicker than they are. A session starts at once; what it says
    // is held back until the client has answered a ping and had a moment more.
    let (listens, listening) = oneshot::channel();
    let mut listens = Some(listens);
    // A connection that is gone already is seen by the reader.
    let _ = sender.send(Outgoing::Ping).await;
    let incoming = tokio::spawn(async move {
        let mut stdin = Some(stdin_sender);
        loop {
            let message = match reader.next().await {
                Ok(Message::Data(message)) => message,
                Ok(Message::Pong) => {
                    if let Some(listens) = listens.take() {
                        // Nobody waits any more: it has taken too long.
                        let _ = listens.send(());
                    }
                    continue;
                }
                Ok(Message::Close) | Err(_) => break,
            };
            match message.first() {
                Some(&STDIN) => {
                    // An empty message is a keep-alive of some clients.
                    if let Some(sender) = &stdin
                        && message.len() > 1
                        && sender.send(message.slice(1..)).await.is_err()
                    {
                        stdin = None;
                    }
                }
                Some(&RESIZE) => {
                    for size in parse_sizes(&message[1..]) {
                        // A session that has ended has nobody to tell.
                        let _ = resize_sender.send(size).await;
                    }
                }
                Some(&CLOSE) if message.get(1) == Some(&STDIN) => stdin = None,
                _ => {}
            }
        }
        is_gone.cancel();
    });
    let writer = sender.clone();
    let outgoing = tokio::spawn(async move {
        // A client that never answers pings has had its time as well.
        let _ = tokio::time::timeout(LISTENS_WITHIN, listening).await;
        tokio::time::sleep(KNOWS_ITS_CHANNELS).await;
        while let Some((kind, bytes)) = outputs.recv().await {
            let channel = if kind == Output::Stdout { STDOUT } else { STDERR };
            if writer.send(frame(channel, &bytes)).await.is_err() {
                return;
            }
        }
    });
    let status = match session {
        Ok(session) => session::run(session, Client { stdin, resize, output, gone }).await,
        Err(status) => {
            drop(output);
            status
        }
    };
    // All output leaves before the status does.
    let _ = outgoing.await;
    if let Some(text) = version.render(&status) {
        let _ = sender.send(frame(ERROR, &text)).await;
    }
    let _ = sender.send(Outgoing::Close).await;
    // The client closes its side when it has read ours.
    let _ = tokio::time::timeout(Duration::from_secs(5), incoming).await;
}

/// The streams come one by one, each named by a header; the session begins when all that were asked for are there.
pub async fn over_spdy<S>(
    stream: S,
    version: Version,
    wanted: Wanted,
    session: impl Future<Output = Result<Session, Value>>,
) where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, sender) = Connection::new(stream);
    let mut kinds: HashMap<u32, String> = HashMap::new();
    let is_there = |kinds: &HashMap<u32, String>, kind: &str| kinds.values().any(|k| k == kind);
    let complete = |kinds: &HashMap<u32, String>| {
        is_there(kinds, "error")
            && (!wanted.stdin || is_there(kinds, "stdin"))
            && (!wanted.stdout || is_there(kinds, "stdout"))
            && (!wanted.stderr || wanted.tty || is_there(kinds, "stderr"))
            && (!wanted.tty || version < Version::V3 || is_there(kinds, "resize"))
    };
    let mut early: Vec<Event> = Vec::new();
    while !complete(&kinds) {
        match connection.next().await {
            Some(Event::Opened { id, headers }) => {
                kinds.insert(id, headers.get("streamtype").cloned().unwrap_or_default());
                sender.reply(id).await;
            }
            Some(event) => early.push(event),
            None => return,
        }
    }
    let find = |kind: &str| kinds.iter().find(|(_, k)| *k == kind).map(|(id, _)| *id);
    let (stdin_id, resize_id, error_id) = (find("stdin"), find("resize"), find("error"));
    let (stdout_id, stderr_id) = (find("stdout"), find("stderr"));
    let gone = CancellationToken::new();
    let (stdin_sender, stdin) = mpsc::channel::<Bytes>(16);
    let (resize_sender, resize) = mpsc::channel(4);
    let (output, mut outputs) = mpsc::channel::<(Output, Bytes)>(16);
    let is_gone = gone.clone();
    let answers = sender.clone();
    let incoming = tokio::spawn(async move {
        let mut stdin = stdin_id.map(|_| stdin_sender);
        let mut early = early.into_iter();
        loop {
            let event = match early.next() {
                Some(event) => event,
                None => match connection.next().await {
                    Some(event) => event,
                    None => break,
                },
            };
            match event {
                Event::Data { id, bytes, last } => {
                    if Some(id) == stdin_id {
                        if let Some(sender) = &stdin
                            && !bytes.is_empty()
                            && sender.send(bytes).await.is_err()
                        {
                            stdin = None;
                        }
                        if last {
                            stdin = None;
                        }
                    } else if Some(id) == resize_id {
                        for size in parse_sizes(&bytes) {
                            let _ = resize_sender.send(size).await;
                        }
                    }
                }
                Event::Opened { id, .. } => answers.reply(id).await,
                Event::Reset { id } if Some(id) == stdin_id => stdin = None,
                Event::Reset { .. } => {}
            }
        }
        is_gone.cancel();
    });
    let writer = sender.clone();
    let outgoing = tokio::spawn(async move {
        while let Some((kind, bytes)) = outputs.recv().await {
            let id = if kind == Output::Stdout { stdout_id } else { stderr_id };
            if let Some(id) = id {
                writer.data(id, bytes, false).await;
            }
        }
    });
    let status = match session.await {
        Ok(session) => session::run(session, Client { stdin, resize, output, gone }).await,
        Err(status) => {
            drop(output);
            status
        }
    };
    let _ = outgoing.await;
    for id in [stdout_id, stderr_id].into_iter().flatten() {
        sender.data(id, Bytes::new(), true).await;
    }
    if let Some(id) = error_id {
        sender.data(id, version.render(&status).unwrap_or_default(), true).await;
    }
    // Hanging up at once would overtake what was sent; the client hangs up when it has read it all.
    let _ = tokio::time::timeout(Duration::from_secs(5), incoming).await;
}
