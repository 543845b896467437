//! The agent's end of the conversation with a pod's helper.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::fdpass::{receive_with_fds, send_with_fds};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::helper::protocol::{Reply, Request};
use crate::types::RuntimeError;

/// Creating a container takes milliseconds; a machine under load gets patience.
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer, what came with it, and the connection for what follows.
pub struct Answer {
    pub reply: Reply,
    pub fds: Vec<OwnedFd>,
    pub more: Lines,
}

/// Later replies on the same connection.
pub struct Lines(tokio::io::Lines<BufReader<tokio::net::UnixStream>>);

impl Lines {
    /// `None` when the helper has gone.
    pub async fn next(&mut self) -> Option<Reply> {
        let line = self.0.next_line().await.ok()??;
        serde_json::from_str(&line).ok()
    }
}

/// Asks, and waits for the first answer. `Reply::Failed` becomes an error.
pub async fn ask(socket: &Path, request: &Request, fds: Vec<OwnedFd>) -> Result<Answer, RuntimeError> {
    let socket: PathBuf = socket.to_owned();
    let mut line = serde_json::to_vec(request).expect("plain data");
    line.push(b'\n');
    let (stream, reply, fds) = tokio::task::spawn_blocking(move || -> io::Result<_> {
        let stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let raw: Vec<RawFd> = fds.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
        send_with_fds(&stream, &line, &raw)?;
        // The helper's side has its own copies now; ours would keep pipes from ending.
        drop(fds);
        let (reply, fds) = first_reply(&stream)?;
        stream.set_nonblocking(true)?;
        Ok((stream, reply, fds))
    })
    .await
    .map_err(|e| RuntimeError::Helper(e.to_string()))?
    .map_err(|e| RuntimeError::Helper(format!("cannot speak to it: {e}")))?;
    match reply {
        Reply::Failed(message) => Err(RuntimeError::StartFailed(message)),
        reply => Ok(Answer { reply, fds, more: lines(stream)? }),
    }
}

/// Connects for `Watch`, whose first answer may take as long as a container lives.
pub async fn watch(socket: &Path) -> Result<Lines, RuntimeError> {
    let stream = UnixStream::connect(socket).map_err(|e| RuntimeError::Helper(format!("cannot speak to it: {e}")))?;
    let mut line = serde_json::to_vec(&Request::Watch).expect("plain data");
    line.push(b'\n');
    send_with_fds(&stream, &line, &[]).map_err(|e| RuntimeError::Helper(e.to_string()))?;
    stream.set_nonblocking(true).map_err(|e| RuntimeError::Helper(e.to_string()))?;
    lines(stream)
}

fn lines(stream: UnixStream) -> Result<Lines, RuntimeError> {
    let stream = tokio::net::UnixStream::from_std(stream).map_err(|e| RuntimeError::Helper(e.to_string()))?;
    Ok(Lines(BufReader::new(stream).lines()))
}

/// Byte by byte: what follows the line belongs to the asynchronous reader.
fn first_reply(stream: &UnixStream) -> io::Result<(Reply, Vec<OwnedFd>)> {
    let (mut line, mut fds) = (Vec::new(), Vec::new());
    loop {
        let mut byte = [0];
        let (n, mut received) = receive_with_fds(stream, &mut byte)?;
        fds.append(&mut received);
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up"));
        }
        if byte[0] == b'\n' {
            return Ok((serde_json::from_slice(&line)?, fds));
        }
        line.push(byte[0]);
    }
}
