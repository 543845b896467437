//! A connection to an endpoint, for one request at a time.

use std::io::ErrorKind;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use super::Http1Error;
use super::outgoing::Outgoing;

/// Bytes asked for in one read at first, and at most.
const READ: usize = 8 * 1024;
const LARGEST_READ: usize = 64 * 1024;

#[derive(Debug)]
pub struct Http1 {
    pub(super) stream: TcpStream,
    /// What was read and not used yet.
    pub(super) unread: Bytes,
    pub(super) out: Outgoing,
    next_read: usize,
}

impl Http1 {
    pub fn new(stream: TcpStream) -> Self {
        Http1 { stream, unread: Bytes::new(), out: Outgoing::default(), next_read: READ }
    }

    /// Whether the endpoint has neither closed it nor said anything unasked. Costs a system call only when there was news.
    pub fn is_quiet(&self) -> bool {
        self.unread.is_empty()
            && matches!(self.stream.try_read(&mut [0; 1]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// Reads more behind what is unread.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        let mut buffer = match std::mem::take(&mut self.unread) {
            held if held.is_empty() => BytesMut::with_capacity(self.next_read),
            held => {
                let mut buffer = BytesMut::from(held);
                buffer.reserve(self.next_read);
                buffer
            }
        };
        let room = buffer.capacity() - buffer.len();
        let read = poll_read_buf(std::pin::Pin::new(&mut self.stream), cx, &mut buffer);
        self.unread = buffer.freeze();
        let read = ready!(read)?;
        if read == 0 {
            return Poll::Ready(Err(Http1Error::Closed));
        }
        // A long answer is read in large pieces, a short one need not hold much.
        self.next_read = if read == room { (2 * self.next_read).min(LARGEST_READ) } else { READ };
        Poll::Ready(Ok(()))
    }
}
