//! A TCP stream as hyper wants it. Small pieces are sent together in one buffer: for the kernel a list of pieces costs more than
//! copying them.

use std::cell::RefCell;
use std::io::{Error, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Up to so many bytes are copied.
const TOGETHER: usize = 4096;

thread_local! {
    /// What is sent together; nothing is kept in it between two calls.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(TOGETHER));
}

pub struct Io(TokioIo<TcpStream>);

impl Io {
    pub fn new(stream: TcpStream) -> Self {
        Io(TokioIo::new(stream))
    }
}

impl Read for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl Write for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Error>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<Result<usize, Error>> {
        if let [only] = pieces {
            return Pin::new(&mut self.0).poll_write(cx, only);
        }
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        if total > TOGETHER {
            return Pin::new(&mut self.0).poll_write_vectored(cx, pieces);
        }
        SCRATCH.with_borrow_mut(|together| {
            together.clear();
            pieces.iter().for_each(|piece| together.extend_from_slice(piece));
            Pin::new(&mut self.0).poll_write(cx, together)
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
