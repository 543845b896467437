//! The frames of a WebSocket connection, server side (RFC 6455).

use base64::Engine;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

/// Clients send keystrokes and pieces of files.
const MESSAGE_LIMIT: u64 = 32 << 20;

/// The answer to a handshake's key.
pub fn accept(key: &str) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key.trim().as_bytes());
    context.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    base64::engine::general_purpose::STANDARD.encode(context.finish())
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Data(Bytes),
    /// The answer to a ping of ours.
    Pong,
    Close,
}

pub struct Reader<S> {
    stream: ReadHalf<S>,
    /// Pongs go out where everything goes out.
    pongs: mpsc::Sender<Outgoing>,
    /// The pieces of a message so far: control frames may come between them.
    whole: Vec<u8>,
}

/// What a writer task sends.
#[derive(Debug)]
pub enum Outgoing {
    Data(Bytes),
    Ping,
    Pong(Bytes),
    Close,
}

/// Splits a connection into a reader and a sender whose messages one task writes.
pub fn split<S>(stream: S) -> (Reader<S>, mpsc::Sender<Outgoing>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (read, write) = tokio::io::split(stream);
    let (sender, receiver) = mpsc::channel(32);
    tokio::spawn(write_all(write, receiver));
    (Reader { stream: read, pongs: sender.clone(), whole: Vec::new() }, sender)
}

async fn write_all<S: AsyncWrite>(mut stream: WriteHalf<S>, mut receiver: mpsc::Receiver<Outgoing>) {
    while let Some(message) = receiver.recv().await {
        let (opcode, payload) = match &message {
            Outgoing::Data(bytes) => (0x2, &bytes[..]),
            Outgoing::Ping => (0x9, &[][..]),
            Outgoing::Pong(bytes) => (0xa, &bytes[..]),
            // 1000: a normal end.
            Outgoing::Close => (0x8, &[0x03, 0xe8][..]),
        };
        let mut head = vec![0x80 | opcode];
        match payload.len() {
            n @ 0..=125 => head.push(n as u8),
            n @ 126..=0xffff => {
                head.push(126);
                head.extend_from_slice(&(n as u16).to_be_bytes());
            }
            n => {
                head.push(127);
                head.extend_from_slice(&(n as u64).to_be_bytes());
            }
        }
        // One write for head and payload: small messages stay one packet.
        head.extend_from_slice(payload);
        if stream.write_all(&head).await.is_err() || stream.flush().await.is_err() {
            return;
        }
        if matches!(message, Outgoing::Close) {
            // The client answers and hangs up; an error means that it has already.
            let _ = stream.shutdown().await;
            return;
        }
    }
    let _ = stream.shutdown().await;
}

impl<S: AsyncRead> Reader<S> {
    /// The next whole message. An end of the connection is a close.
    pub async fn next(&mut self) -> std::io::Result<Message> {
        loop {
            let mut head = [0; 2];
            match self.stream.read_exact(&mut head).await {
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(Message::Close),
                other => other?,
            };
            let length = match head[1] & 0x7f {
                126 => u64::from(self.stream.read_u16().await?),
                127 => self.stream.read_u64().await?,
                n => u64::from(n),
            };
            let invalid = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
            if length.saturating_add(self.whole.len() as u64) > MESSAGE_LIMIT {
                return Err(invalid("a message is too long"));
            }
            if head[1] & 0x80 == 0 {
                return Err(invalid("a client must mask its frames"));
            }
            let mut mask = [0; 4];
            self.stream.read_exact(&mut mask).await?;
            let mut payload = vec![0; length as usize];
            self.stream.read_exact(&mut payload).await?;
            payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
            match head[0] & 0x0f {
                0x0..=0x2 => {
                    self.whole.append(&mut payload);
                    if head[0] & 0x80 != 0 {
                        return Ok(Message::Data(std::mem::take(&mut self.whole).into()));
                    }
                }
                0x8 => return Ok(Message::Close),
                0x9 => {
                    // A writer that has ended makes the next read fail as well.
                    let _ = self.pongs.send(Outgoing::Pong(payload.into())).await;
                }
                0xa => return Ok(Message::Pong),
                _ => return Err(invalid("an unknown kind of frame")),
            }
        }
    }
}

/// A byte stream whose pieces travel as messages: SPDY inside a WebSocket.
pub fn tunnel<S>(stream: S) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (mut reader, sender) = split(stream);
    let (mut from, mut to) = tokio::io::split(theirs);
    tokio::spawn(async move {
        loop {
            match reader.next().await {
                Ok(Message::Data(bytes)) if to.write_all(&bytes).await.is_err() => return,
                Ok(Message::Data(_) | Message::Pong) => {}
                Ok(Message::Close) | Err(_) => break,
            }
        }
        let _ = to.shutdown().await;
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; 32 * 1024];
        while let Ok(n) = from.read(&mut buffer).await {
            if n == 0 || sender.send(Outgoing::Data(Bytes::copy_from_slice(&buffer[..n]))).await.is_err() {
                break;
            }
        }
        let _ = sender.send(Outgoing::Close).await;
    });
    ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_of_the_rfc() {
        assert_eq!(accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[tokio::test]
    async fn masked_pieces_become_one_message() {
        let (mut client, server) = tokio::io::duplex(1024);
        let (mut reader, sender) = split(server);
        // "Hel" and "lo", masked with 1 2 3 4.
        client.write_all(&[0x02, 0x83, 1, 2, 3, 4, b'H' ^ 1, b'e' ^ 2, b'l' ^ 3]).await.expect("written");
        client.write_all(&[0x80, 0x82, 1, 2, 3, 4, b'l' ^ 1, b'o' ^ 2]).await.expect("written");
        assert_eq!(reader.next().await.expect("read"), Message::Data("Hello".into()));
        // A pong between two pieces is told at once and loses neither.
        client.write_all(&[0x02, 0x81, 1, 2, 3, 4, b'a' ^ 1, 0x8a, 0x80, 1, 2, 3, 4]).await.expect("written");
        assert_eq!(reader.next().await.expect("read"), Message::Pong);
        client.write_all(&[0x80, 0x81, 1, 2, 3, 4, b'b' ^ 1]).await.expect("written");
        assert_eq!(reader.next().await.expect("read"), Message::Data("ab".into()));
        sender.send(Outgoing::Data("x".into())).await.expect("sent");
        let mut frame = [0; 3];
        client.read_exact(&mut frame).await.expect("read");
        assert_eq!(frame, [0x82, 1, b'x']);
        client.write_all(&[0x82, 0x01, b'x']).await.expect("written");
        assert!(reader.next().await.is_err(), "an unmasked frame");
    }
}
