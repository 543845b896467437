//! Connections that are not HTTP, from a port to an endpoint: as they are, or with their TLS taken off.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::net::TcpStream;
use tokio_rustls::rustls::server::Acceptor;

use super::balance::{Active, pick};
use super::pool::connect;
use super::worker::Worker;
use crate::gateway::StreamRoute;
use crate::policy::Balance;
use crate::sticky::Wish;

/// For an endpoint to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A ClientHello that is longer is none.
const HELLO_LIMIT: usize = 64 * 1024;

/// Carries a connection until one side has ended it. An endpoint that does not accept is passed over.
pub async fn carry<S>(worker: &Arc<Worker>, route: &StreamRoute, mut client: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Some(backend) = route.backends.pick(worker.random() as u32).filter(|one| one.instead.is_none()) else { return };
    let mut targets = backend.upstream.targets();
    if let Some((name, port)) = &targets.name {
        targets = worker.shared.names.find(name, *port).await;
    }
    let mut tried: Vec<SocketAddr> = Vec::new();
    loop {
        let now = worker.milliseconds();
        let balance = Balance::default();
        let chosen =
            pick(&backend.upstream.turn, &targets.endpoints, balance, &tried, Wish::None, now, worker.random());
        let Some(endpoint) = chosen else { return };
        let active = Active::new(endpoint.clone());
        match connect(endpoint.address, CONNECT_TIMEOUT).await {
            Ok(mut stream) => {
                endpoint.succeeded();
                // Whoever breaks off has been told as much as the other.
                if let Ok((sent, received)) = copy_bidirectional(&mut client, &mut stream).await {
                    route.counts.received.fetch_add(sent, Ordering::Relaxed);
                    route.counts.sent.fetch_add(received, Ordering::Relaxed);
                }
                return;
            }
            Err(_) => {
                endpoint.failed(now);
                tried.push(endpoint.address);
                route.counts.retries.fetch_add(1, Ordering::Relaxed);
                drop(active);
            }
        }
    }
}

/// Reads a ClientHello, and says which name it asks for, in lower case; empty if it names none. What was read comes out of the
/// stream again.
///
/// # Errors
/// It is no ClientHello, or the client ends before it is complete.
pub async fn hello(mut stream: TcpStream) -> Result<(Prefixed<TcpStream>, String), Error> {
    let (mut acceptor, mut read) = (Acceptor::default(), Vec::with_capacity(2048));
    let wrong = || Error::new(ErrorKind::InvalidData, "no ClientHello");
    loop {
        let from = read.len();
        if from > HELLO_LIMIT {
            return Err(wrong());
        }
        if stream.read_buf(&mut read).await? == 0 {
            return Err(Error::from(ErrorKind::UnexpectedEof));
        }
        let mut new = &read[from..];
        while !new.is_empty() {
            acceptor.read_tls(&mut new)?;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().unwrap_or_default().to_ascii_lowercase();
                return Ok((Prefixed { prefix: read.into(), inner: stream }, name));
            }
            Err(_) => return Err(wrong()),
        }
    }
}

/// A stream with some bytes in front that were read from it before.
pub struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<Result<(), Error>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, out);
        }
        let count = self.prefix.len().min(out.remaining());
        out.put_slice(&self.prefix[..count]);
        self.prefix.advance(count);
        if self.prefix.is_empty() {
            // Its memory is not kept for as long as the connection is there.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Error>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
