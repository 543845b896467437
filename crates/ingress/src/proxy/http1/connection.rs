//! A connection to an endpoint, for one request at a time.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio_util::io::poll_read_buf;

use super::Http1Error;
use super::outgoing::Outgoing;
use super::stream::Stream;

/// Bytes that there is room for in one read at least, and for a long answer.
const READ: usize = 8 * 1024;
const LONG_READ: usize = 64 * 1024;
/// Short answers are read into one piece of memory by turns: each has what it took of it.
const SHARED: usize = 32 * 1024;

thread_local! {
    static ROOM: RefCell<BytesMut> = RefCell::default();
}

#[derive(Debug)]
pub struct Http1 {
    pub(super) stream: Stream,
    /// What was read and not used yet.
    pub(super) unread: Bytes,
    pub(super) out: Outgoing,
    is_long: bool,
}

impl Http1 {
    pub fn new(stream: Stream) -> Self {
        Http1 { stream, unread: Bytes::new(), out: Outgoing::default(), is_long: false }
    }

    /// Whether the endpoint has neither closed it nor said anything unasked.
    pub fn is_quiet(&self) -> bool {
        self.unread.is_empty() && self.stream.is_quiet()
    }

    /// Reads more behind what is unread.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        let read = match self.unread.is_empty() && !self.is_long {
            true => ROOM.with_borrow_mut(|room| {
                if room.capacity() < READ {
                    *room = BytesMut::with_capacity(SHARED);
                }
                let read = poll_read_buf(Pin::new(&mut self.stream), cx, room);
                self.unread = room.split().freeze();
                read
            }),
            false => {
                let mut buffer = BytesMut::from(std::mem::take(&mut self.unread));
                buffer.reserve(if self.is_long { LONG_READ } else { READ });
                let read = poll_read_buf(Pin::new(&mut self.stream), cx, &mut buffer);
                self.unread = buffer.freeze();
                read
            }
        };
        let read = ready!(read)?;
        if read == 0 {
            return Poll::Ready(Err(Http1Error::Closed));
        }
        self.is_long = read >= READ;
        Poll::Ready(Ok(()))
    }
}
