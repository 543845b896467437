//! Bytes on their way to an endpoint: a head and a small piece of body leave together, a large piece is not copied.

use std::io::{ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use super::stream::Stream;

/// Up to so many bytes of a body are copied behind what is in front of them: for the kernel a list of pieces costs more.
const TOGETHER: usize = 4096;

#[derive(Debug, Default)]
pub struct Outgoing {
    /// Goes first. It keeps its memory for the next request.
    front: Vec<u8>,
    at: usize,
    data: Bytes,
    end: &'static [u8],
    /// Something has been given to the kernel since the last [`Outgoing::begin`].
    pub has_begun: bool,
}

impl Outgoing {
    /// What a new request's head is written to.
    pub fn begin(&mut self) -> &mut Vec<u8> {
        (self.at, self.data, self.end, self.has_begun) = (0, Bytes::new(), b"", false);
        self.front.clear();
        &mut self.front
    }

    /// A piece of a body, with what belongs behind it.
    pub fn push(&mut self, data: Bytes, end: &'static [u8]) {
        if data.len() <= TOGETHER {
            self.front.extend_from_slice(&data);
            self.front.extend_from_slice(end);
        } else {
            (self.data, self.end) = (data, end);
        }
    }

    /// For what comes in front of a piece. To be used when all that was pushed is written, or nothing large was pushed.
    pub fn front(&mut self) -> &mut Vec<u8> {
        &mut self.front
    }

    /// A large piece must go before anything can be put behind it.
    pub fn is_full(&self) -> bool {
        !self.data.is_empty() || !self.end.is_empty() || self.front.len() - self.at > TOGETHER
    }

    pub fn poll_write(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        loop {
            let front = &self.front[self.at..];
            if front.is_empty() && self.data.is_empty() && self.end.is_empty() {
                self.front.clear();
                self.at = 0;
                // TLS keeps what the kernel did not take.
                return Pin::new(stream).poll_flush(cx);
            }
            let stream = Pin::new(&mut *stream);
            let written = ready!(match self.data.is_empty() && self.end.is_empty() {
                true => stream.poll_write(cx, front),
                false => {
                    let pieces = [IoSlice::new(front), IoSlice::new(&self.data), IoSlice::new(self.end)];
                    stream.poll_write_vectored(cx, &pieces)
                }
            })?;
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.has_begun = true;
            self.advance(written);
        }
    }

    fn advance(&mut self, mut written: usize) {
        let front = written.min(self.front.len() - self.at);
        self.at += front;
        written -= front;
        let data = written.min(self.data.len());
        self.data.advance(data);
        self.end = &self.end[written - data..];
    }
}
