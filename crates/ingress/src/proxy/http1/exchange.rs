//! One request and its answer on a connection: both move whenever either is polled.

use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, TRAILER};
use http::{Method, StatusCode};
use http_body::{Body, Frame, SizeHint};

use super::Http1Error;
use super::connection::Http1;
use super::decode::{Decoder, Part, is_framing};
use super::head::{self, Framing, RequestHead, ResponseHead};
use super::stream::Stream;
use crate::proxy::body::RequestBody;

/// Answers before the answer (1xx) that are passed over.
const INTERIM: u32 = 8;
/// Turns of the client's connection, which asks us twice before it reads again.
const YIELDS: u8 = 2;
/// Of the answer's head with all interim ones.
const LONGEST_HEAD: usize = 64 * 1024;

pub struct Exchange {
    connection: Http1,
    method: Method,
    body: RequestBody,
    framing: Framing,
    sending: Sending,
    /// Something of the body has been taken from the client.
    has_body: bool,
    /// How often the head has waited for the client's connection to look what it has read already.
    yields: u8,
    /// Trailers that the request has named before.
    trailers: Vec<HeaderName>,
    decoder: Decoder,
    interim: u32,
    is_kept: bool,
}

/// How far the request has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sending {
    Body,
    /// The last bytes are on their way.
    End,
    Done,
    /// The endpoint does not take more; its answer may still come.
    Broken,
}

impl Exchange {
    pub fn new(mut connection: Http1, head: RequestHead<'_>, body: RequestBody) -> Self {
        let (framing, sending) = match (&body, body.size_hint().exact()) {
            (RequestBody::Empty, _) => (Framing::None, Sending::End),
            (_, Some(length)) => (Framing::Length(length), Sending::Body),
            (_, None) => (Framing::Chunked, Sending::Body),
        };
        head::write(connection.out.begin(), head, framing);
        let trailers = match framing {
            Framing::Chunked => named(head.headers),
            Framing::None | Framing::Length(_) => Vec::new(),
        };
        let method = head.method.clone();
        let (decoder, interim, is_kept) = (Decoder::UntilClosed, 0, false);
        Exchange {
            connection,
            method,
            body,
            framing,
            sending,
            has_body: false,
            yields: 0,
            trailers,
            decoder,
            interim,
            is_kept,
        }
    }

    /// Sends, and reads the head of the answer. To be asked until it is there.
    ///
    /// # Errors
    /// There will be no answer.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, Http1Error>> {
        self.send(cx)?;
        loop {
            let held = &self.connection.unread;
            if !held.is_empty() {
                match head::read(held, &self.method)? {
                    Some((head, length)) => {
                        let _ = self.connection.unread.split_to(length);
                        if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS {
                            self.interim += 1;
                            if self.interim > INTERIM {
                                return Poll::Ready(Err(Http1Error::NotHttp("its answer does not come to an end")));
                            }
                            continue;
                        }
                        (self.decoder, self.is_kept) = (head.decoder, head.is_kept);
                        return Poll::Ready(Ok(head));
                    }
                    None if held.len() >= LONGEST_HEAD => {
                        return Poll::Ready(Err(Http1Error::NotHttp("its head is too long")));
                    }
                    None => {}
                }
            }
            ready!(self.connection.poll_more(cx))?;
        }
    }

    /// The next part of the answer's body, after its head.
    ///
    /// # Errors
    /// It is not complete.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Http1Error>>> {
        if let Err(error) = self.send(cx) {
            return Poll::Ready(Some(Err(error)));
        }
        loop {
            let unread = &mut self.connection.unread;
            match self.decoder.next(unread) {
                Ok(Some(Part::Data(data))) => {
                    self.decoder.settle(unread);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Ok(Some(Part::Trailers(trailers))) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(None) if self.decoder.is_done() => return Poll::Ready(None),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            match ready!(self.connection.poll_more(cx)) {
                Ok(()) => {}
                Err(Http1Error::Closed) if self.decoder == Decoder::UntilClosed => self.decoder = Decoder::Done,
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// The answer has been read to its end.
    pub fn is_over(&self) -> bool {
        self.decoder.is_done()
    }

    pub fn size_hint(&self) -> SizeHint {
        match self.decoder {
            Decoder::Done => SizeHint::with_exact(0),
            Decoder::Length(left) => SizeHint::with_exact(left),
            Decoder::UntilClosed | Decoder::Chunked(_) => SizeHint::default(),
        }
    }

    /// The connection, if another request may follow: both messages are whole, and nothing stands behind them.
    pub fn into_connection(self) -> Option<Http1> {
        let is_whole = self.is_kept && self.is_over() && self.sending == Sending::Done;
        (is_whole && self.connection.unread.is_empty()).then_some(self.connection)
    }

    /// The request's body, if the endpoint has seen nothing of the request.
    pub fn into_unsent(self) -> Option<RequestBody> {
        (!self.has_body && !self.connection.out.has_begun).then_some(self.body)
    }

    /// After 101: the connection, and what the endpoint has already said in the new protocol.
    pub fn into_upgraded(self) -> (Stream, Bytes) {
        (self.connection.stream, self.connection.unread)
    }

    /// Writes what can be written now.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<(), Http1Error> {
        while matches!(self.sending, Sending::Body | Sending::End) {
            let mut waits = false;
            // What the client has ready leaves with the head.
            while self.sending == Sending::Body && !waits && !self.connection.out.is_full() {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(frame) => {
                        self.has_body = true;
                        self.take(frame.transpose().map_err(Http1Error::Body)?)?;
                    }
                    Poll::Pending => waits = true,
                }
            }
            // A body's first part, or that it is none, is mostly read by now: the head waits until it has been looked at.
            if waits && !self.has_body && self.yields < YIELDS {
                self.yields += 1;
                cx.waker().wake_by_ref();
                return Ok(());
            }
            let connection = &mut self.connection;
            match connection.out.poll_write(&mut connection.stream, cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Err(_)) => self.sending = Sending::Broken,
                Poll::Ready(Ok(())) if self.sending == Sending::End => self.sending = Sending::Done,
                Poll::Ready(Ok(())) if waits => return Ok(()),
                Poll::Ready(Ok(())) => {}
            }
        }
        Ok(())
    }

    /// Puts a part of the request's body behind what goes out; `None` is its end.
    fn take(&mut self, frame: Option<Frame<Bytes>>) -> Result<(), Http1Error> {
        let out = &mut self.connection.out;
        let wrong = |text: &str| Err(Http1Error::Body(text.into()));
        match (&mut self.framing, frame.map(Frame::into_data)) {
            (Framing::Length(left), Some(Ok(data))) => {
                let Some(rest) = left.checked_sub(data.len() as u64) else {
                    return wrong("it is longer than its Content-Length");
                };
                *left = rest;
                out.push(data, b"");
                if rest == 0 {
                    self.sending = Sending::End;
                }
            }
            (Framing::Length(1..), None) => return wrong("it is shorter than its Content-Length"),
            // Only chunks have room for trailers.
            (Framing::Length(_), Some(Err(_))) => {}
            (Framing::Length(0) | Framing::None, _) => self.sending = Sending::End,
            (Framing::Chunked, Some(Ok(data))) if data.is_empty() => {}
            (Framing::Chunked, Some(Ok(data))) => {
                // Writing to a Vec cannot fail.
                drop(write!(out.front(), "{:x}\r\n", data.len()));
                out.push(data, b"\r\n");
            }
            (Framing::Chunked, end) => {
                let front = out.front();
                front.extend_from_slice(b"0\r\n");
                let trailers = end.and_then(Result::err).and_then(|frame| frame.into_trailers().ok());
                for (name, value) in trailers.iter().flatten().filter(|(name, _)| self.trailers.contains(name)) {
                    front.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
                }
                front.extend_from_slice(b"\r\n");
                self.sending = Sending::End;
            }
        }
        Ok(())
    }
}

/// Trailers that a request may have: those that its Trailer header names, if they do not say how it is carried.
fn named(headers: &HeaderMap) -> Vec<HeaderName> {
    let lines = headers.get_all(TRAILER).iter().filter_map(|line| line.to_str().ok());
    let names = lines.flat_map(|line| line.split(',')).filter_map(|one| HeaderName::try_from(one.trim()).ok());
    names.filter(|name| !is_framing(name)).collect()
}
