//! As much of SPDY/3.1 as kubectl's streams use: open, reply, data, reset, ping, and header blocks.
//!
//! Flow control is left out on both sides, as the client's library does.

use std::collections::BTreeMap;
use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const FLAG_FIN: u8 = 1;
/// 24 bits of length.
const FRAME_LIMIT: usize = 1 << 24;
const HEADER_LIMIT: usize = 64 * 1024;

pub type Headers = BTreeMap<String, String>;

/// What a client does.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Opened { id: u32, headers: Headers },
    Data { id: u32, bytes: Bytes, last: bool },
    Reset { id: u32 },
}

pub struct Connection<S> {
    stream: ReadHalf<S>,
    inflate: Decompress,
    sender: Sender,
}

/// Clones write to the same connection, whole frames at a time.
#[derive(Clone)]
pub struct Sender(mpsc::Sender<Frame>);

enum Frame {
    Reply(u32),
    Data { id: u32, bytes: Bytes, last: bool },
    Reset(u32),
    Ping(u32),
}

impl Sender {
    /// Accepts a stream.
    pub async fn reply(&self, id: u32) {
        self.send(Frame::Reply(id)).await;
    }

    pub async fn data(&self, id: u32, bytes: Bytes, last: bool) {
        self.send(Frame::Data { id, bytes, last }).await;
    }

    pub async fn reset(&self, id: u32) {
        self.send(Frame::Reset(id)).await;
    }

    /// A connection that has ended is noticed by its reader.
    async fn send(&self, frame: Frame) {
        let _ = self.0.send(frame).await;
    }
}

impl<S> Connection<S>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    pub fn new(stream: S) -> (Connection<S>, Sender) {
        let (read, write) = tokio::io::split(stream);
        let (frames, receiver) = mpsc::channel(32);
        tokio::spawn(write_all(write, receiver));
        let sender = Sender(frames);
        (Connection { stream: read, inflate: Decompress::new(true), sender: sender.clone() }, sender)
    }

    /// `None` at the end of the connection, or when it makes no sense.
    pub async fn next(&mut self) -> Option<Event> {
        match self.read().await {
            Ok(event) => event,
            Err(e) => {
                if e.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::debug!("a SPDY connection ends: {e}");
                }
                None
            }
        }
    }

    async fn read(&mut self) -> io::Result<Option<Event>> {
        loop {
            let first = self.stream.read_u32().await?;
            let second = self.stream.read_u32().await?;
            let (flags, length) = ((second >> 24) as u8, (second & 0x00ff_ffff) as usize);
            let mut payload = vec![0; length];
            self.stream.read_exact(&mut payload).await?;
            let mut payload = Bytes::from(payload);
            if first & 0x8000_0000 == 0 {
                return Ok(Some(Event::Data { id: first, bytes: payload, last: flags & FLAG_FIN != 0 }));
            }
            let short = || io::Error::new(io::ErrorKind::InvalidData, "a SPDY frame is too short");
            match first as u16 {
                SYN_STREAM => {
                    if payload.len() < 10 {
                        return Err(short());
                    }
                    let id = payload.get_u32() & 0x7fff_ffff;
                    payload.advance(6);
                    let headers = parse_headers(&inflate(&mut self.inflate, &payload)?)?;
                    return Ok(Some(Event::Opened { id, headers }));
                }
                RST_STREAM if payload.len() >= 4 => return Ok(Some(Event::Reset { id: payload.get_u32() })),
                PING if payload.len() >= 4 => {
                    let id = payload.get_u32();
                    // Even ones are answers to pings of ours, which we do not send.
                    if id % 2 == 1 {
                        self.sender.send(Frame::Ping(id)).await;
                    }
                }
                GOAWAY => return Ok(None),
                RST_STREAM | PING => return Err(short()),
                // Settings, window updates and the rest tell us nothing that we use.
                _ => {}
            }
        }
    }
}

async fn write_all<S: AsyncWrite>(mut stream: WriteHalf<S>, mut frames: mpsc::Receiver<Frame>) {
    let mut deflate = Compress::new(Compression::default(), true);
    if let Err(e) = deflate.set_dictionary(&dictionary()) {
        tracing::error!("cannot set up SPDY compression: {e}");
        return;
    }
    while let Some(frame) = frames.recv().await {
        let bytes = match frame {
            Frame::Reply(id) => {
                let mut payload = BytesMut::new();
                payload.put_u32(id);
                match compress(&mut deflate, &0u32.to_be_bytes()) {
                    Ok(block) => payload.put_slice(&block),
                    Err(e) => {
                        tracing::error!("cannot compress SPDY headers: {e}");
                        return;
                    }
                }
                control(SYN_REPLY, &payload)
            }
            Frame::Data { id, bytes, last } => {
                let mut out = BytesMut::new();
                let pieces = bytes.chunks(FRAME_LIMIT - 1).count().max(1);
                for (i, piece) in bytes.chunks(FRAME_LIMIT - 1).chain(bytes.is_empty().then_some(&b""[..])).enumerate()
                {
                    let flags = if last && i + 1 == pieces { FLAG_FIN } else { 0 };
                    out.put_u32(id);
                    out.put_u32(u32::from(flags) << 24 | piece.len() as u32);
                    out.put_slice(piece);
                }
                out
            }
            Frame::Reset(id) => {
                let mut payload = BytesMut::new();
                payload.put_u32(id);
                // 5: CANCEL.
                payload.put_u32(5);
                control(RST_STREAM, &payload)
            }
            Frame::Ping(id) => control(PING, &id.to_be_bytes()),
        };
        if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown().await;
}

fn control(kind: u16, payload: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(payload.len() + 8);
    out.put_u16(0x8003);
    out.put_u16(kind);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
    out
}

/// All header blocks of a connection are one compressed stream.
fn inflate(state: &mut Decompress, block: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(4096);
    let mut rest = block;
    while !rest.is_empty() {
        if out.len() > HEADER_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a SPDY header block is too long"));
        }
        out.reserve(4096);
        let before = (state.total_in(), state.total_out());
        if let Err(e) = state.decompress_vec(rest, &mut out, FlushDecompress::Sync) {
            // The first block asks for the dictionary.
            if e.needs_dictionary().is_none() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, e));
            }
            state.set_dictionary(&dictionary()).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
        let consumed = (state.total_in() - before.0) as usize;
        rest = &rest[consumed.min(rest.len())..];
        if consumed == 0 && state.total_out() == before.1 && !rest.is_empty() && !out.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a SPDY header block is damaged"));
        }
    }
    Ok(out)
}

fn compress(state: &mut Compress, block: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(block.len() + 128);
    state.compress_vec(block, &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
    Ok(out)
}

fn parse_headers(mut block: &[u8]) -> io::Result<Headers> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "SPDY headers are damaged");
    let number = |block: &mut &[u8]| -> io::Result<usize> {
        if block.len() < 4 {
            return Err(damaged());
        }
        Ok(block.get_u32() as usize)
    };
    let text = |block: &mut &[u8]| -> io::Result<String> {
        let length = number(block)?;
        if block.len() < length {
            return Err(damaged());
        }
        let text = String::from_utf8_lossy(&block[..length]).into_owned();
        block.advance(length);
        Ok(text)
    };
    let mut headers = Headers::new();
    for _ in 0..number(&mut block)? {
        let name = text(&mut block)?.to_ascii_lowercase();
        headers.insert(name, text(&mut block)?);
    }
    Ok(headers)
}

/// What compressors of both sides know from the start (SPDY protocol, draft 3.1, section 2.6.10.1): words with their
/// lengths, then plain text.
fn dictionary() -> Vec<u8> {
    const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
        accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
        content-length content-location content-md5 content-range content-type date etag expect expires from host \
        if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards \
        pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding \
        upgrade user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public \
        set-cookie keep-alive origin";
    const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
        203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
        403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
        Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
        chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
        text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";
    let mut all = Vec::with_capacity(1423);
    for word in WORDS.split_whitespace() {
        let word = word.replace('_', " ");
        all.extend_from_slice(&(word.len() as u32).to_be_bytes());
        all.extend_from_slice(word.as_bytes());
    }
    all.extend_from_slice(TEXT.as_bytes());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn syn_stream(state: &mut Compress, id: u32, headers: &[(&str, &str)]) -> BytesMut {
        let mut block = BytesMut::new();
        block.put_u32(headers.len() as u32);
        for text in headers.iter().flat_map(|(k, v)| [k, v]) {
            block.put_u32(text.len() as u32);
            block.put_slice(text.as_bytes());
        }
        let mut payload = BytesMut::new();
        payload.put_u32(id);
        payload.put_u32(0);
        payload.put_u16(0);
        payload.put_slice(&compress(state, &block).expect("compressed"));
        control(SYN_STREAM, &payload)
    }

    #[test]
    fn the_dictionary_is_the_one_that_clients_name() {
        let mut state = Compress::new(Compression::default(), true);
        let all = dictionary();
        assert_eq!(all.len(), 1423);
        assert_eq!(state.set_dictionary(&all).expect("accepted"), 0xe3c6_a7c2);
    }

    #[tokio::test]
    async fn streams_open_carry_data_and_are_answered() {
        let (mut client, server) = tokio::io::duplex(65536);
        let (mut connection, sender) = Connection::new(server);
        let mut state = Compress::new(Compression::default(), true);
        state.set_dictionary(&dictionary()).expect("accepted");
        for (id, kind) in [(1, "error"), (3, "data")] {
            let frame = syn_stream(&mut state, id, &[("Streamtype", kind), ("port", "80")]);
            client.write_all(&frame).await.expect("written");
            match connection.next().await {
                Some(Event::Opened { id: opened, headers }) => {
                    assert_eq!((opened, headers["streamtype"].as_str()), (id, kind));
                }
                other => panic!("{other:?}"),
            }
        }
        client.write_all(&[0, 0, 0, 3, 1, 0, 0, 2, b'h', b'i']).await.expect("written");
        let data = connection.next().await;
        assert_eq!(data, Some(Event::Data { id: 3, bytes: "hi".into(), last: true }));
        sender.data(3, "yo".into(), true).await;
        let mut answer = [0; 10];
        client.read_exact(&mut answer).await.expect("read");
        assert_eq!(answer, [0, 0, 0, 3, 1, 0, 0, 2, b'y', b'o']);
        client.write_all(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]).await.expect("written");
        tokio::spawn(async move { while connection.next().await.is_some() {} });
        let mut ping = [0; 12];
        client.read_exact(&mut ping).await.expect("read");
        assert_eq!(ping[8..], [0, 0, 0, 1]);
    }
}
