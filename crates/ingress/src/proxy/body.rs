//! Bodies on their way through: bounded in size and in silence, and counted.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::forward::Finish;
use super::http1::{Exchange, Http1};
use super::mirror::{CopiedBody, Copies};
use super::pace::Pace;
use crate::policy::Rate;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a request's body ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    TooLarge,
    TooSlow,
    /// The client broke off, or what it sent is no body.
    Broken,
}

/// Tells why, once it has happened.
#[derive(Clone, Debug, Default)]
pub struct Troubles(Option<Arc<Progress>>);

/// How far a request's body has come.
#[derive(Debug, Default)]
struct Progress {
    trouble: AtomicU8,
    frames: AtomicU32,
    is_over: AtomicBool,
}

impl Troubles {
    /// For a body that there is.
    fn new() -> Self {
        Troubles(Some(Arc::default()))
    }

    fn set(&self, trouble: Trouble) {
        let number = match trouble {
            Trouble::TooLarge => 1,
            Trouble::TooSlow => 2,
            Trouble::Broken => 3,
        };
        if let Some(held) = &self.0 {
            held.trouble.store(number, Ordering::Relaxed);
        }
    }

    fn moved(&self, is_over: bool) {
        if let Some(held) = &self.0 {
            held.frames.fetch_add(1, Ordering::Relaxed);
            held.is_over.store(is_over, Ordering::Relaxed);
        }
    }

    /// Parts of the body that have gone to the endpoint, and whether these are all.
    pub fn progress(&self) -> (u32, bool) {
        let held = self.0.as_ref();
        held.map_or((0, true), |held| (held.frames.load(Ordering::Relaxed), held.is_over.load(Ordering::Relaxed)))
    }

    pub fn get(&self) -> Option<Trouble> {
        match self.0.as_ref()?.trouble.load(Ordering::Relaxed) {
            1 => Some(Trouble::TooLarge),
            2 => Some(Trouble::TooSlow),
            3 => Some(Trouble::Broken),
            _ => None,
        }
    }
}

/// Runs out when nothing moves for a while. Made only when somebody really waits.
struct Patience {
    limit: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Patience { limit, sleep: None }
    }

    fn moved(&mut self) {
        self.sleep = None;
    }

    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        let limit = self.limit;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + limit)));
        sleep.as_mut().poll(cx).is_ready()
    }
}

/// A request's body towards an endpoint.
#[derive(Default)]
pub enum RequestBody {
    #[default]
    Empty,
    Client(Box<ClientBody>),
    /// What a mirror gets.
    Copy(CopiedBody),
}

pub struct ClientBody {
    inner: Incoming,
    patience: Patience,
    /// Bytes that may still come; `None`: any.
    left: Option<u64>,
    trouble: Troubles,
    pub copies: Option<Copies>,
}

impl RequestBody {
    /// `limit` in bytes, 0 for any. Also returned is where it will stand why the body ended early.
    pub fn new(inner: Incoming, limit: u64, patience: Duration) -> (Self, Troubles) {
        if inner.is_end_stream() {
            return (RequestBody::Empty, Troubles::default());
        }
        let trouble = Troubles::new();
        let left = (limit > 0).then_some(limit);
        let body =
            ClientBody { inner, patience: Patience::new(patience), left, trouble: trouble.clone(), copies: None };
        (RequestBody::Client(Box::new(body)), trouble)
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, RequestBody::Empty)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let body = match &mut *self {
            RequestBody::Empty => return Poll::Ready(None),
            RequestBody::Copy(body) => return body.poll_frame(cx),
            RequestBody::Client(body) => body,
        };
        match Pin::new(&mut body.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                body.patience.moved();
                if let (Some(left), Some(data)) = (&mut body.left, frame.data_ref()) {
                    match left.checked_sub(data.len() as u64) {
                        Some(rest) => *left = rest,
                        None => {
                            body.trouble.set(Trouble::TooLarge);
                            return Poll::Ready(Some(Err("the body is larger than allowed".into())));
                        }
                    }
                }
                if let (Some(copies), Some(data)) = (&mut body.copies, frame.data_ref()) {
                    copies.put(data);
                }
                let is_over = body.inner.is_end_stream();
                if is_over {
                    body.copies = None;
                }
                body.trouble.moved(is_over);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                body.trouble.set(Trouble::Broken);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                body.copies = None;
                body.trouble.moved(true);
                Poll::Ready(None)
            }
            Poll::Pending if body.patience.is_over(cx) => {
                body.trouble.set(Trouble::TooSlow);
                Poll::Ready(Some(Err("the body does not come".into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            RequestBody::Empty => true,
            RequestBody::Copy(_) => false,
            RequestBody::Client(body) => body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            RequestBody::Empty => SizeHint::with_exact(0),
            RequestBody::Copy(_) => SizeHint::default(),
            RequestBody::Client(body) => body.inner.size_hint(),
        }
    }
}

/// Bytes of an answer that nobody wants, up to which a connection is worth more.
const WORTH_READING: usize = 64 * 1024;

/// An endpoint's answer behind its head.
pub enum Answered {
    Nothing,
    Http1(Box<Exchange>),
    Http2(Incoming),
}

impl Answered {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self {
            Answered::Nothing => Poll::Ready(None),
            Answered::Http1(exchange) => exchange.poll_body(cx).map(|frame| frame.map(|one| one.map_err(Into::into))),
            Answered::Http2(incoming) => {
                Pin::new(incoming).poll_frame(cx).map(|frame| frame.map(|one| one.map_err(Into::into)))
            }
        }
    }

    /// Reads what is left, if that is little, so that the connection can carry another request.
    pub async fn drain(mut self) -> Option<Http1> {
        let mut left = WORTH_READING;
        while let Some(frame) = std::future::poll_fn(|cx| self.poll_frame(cx)).await {
            left = left.checked_sub(frame.ok()?.data_ref().map_or(0, Bytes::len))?;
        }
        self.into_connection()
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Answered::Nothing => true,
            Answered::Http1(exchange) => exchange.is_over(),
            Answered::Http2(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Answered::Nothing => SizeHint::with_exact(0),
            Answered::Http1(exchange) => exchange.size_hint(),
            Answered::Http2(incoming) => incoming.size_hint(),
        }
    }

    /// The connection for another request, if it may carry one. The answer must be over.
    fn into_connection(self) -> Option<Http1> {
        match self {
            Answered::Http1(exchange) => exchange.into_connection(),
            Answered::Nothing | Answered::Http2(_) => None,
        }
    }
}

/// An answer's body towards the client.
pub enum ResponseBody {
    Own(Option<Bytes>),
    Endpoint(EndpointBody),
}

pub struct EndpointBody {
    inner: Answered,
    patience: Patience,
    /// Where it may not go as fast as it comes.
    pace: Option<Box<Pace>>,
    /// What remains to be done when the answer is over.
    finish: Finish,
}

impl EndpointBody {
    /// Bytes that came and wait for their time.
    fn held(&self) -> usize {
        self.pace.as_ref().map_or(0, |pace| pace.held())
    }

    fn complete(&mut self) {
        let inner = std::mem::replace(&mut self.inner, Answered::Nothing);
        self.finish.complete(inner.into_connection());
    }
}

impl ResponseBody {
    pub fn endpoint(inner: Answered, patience: Duration, rate: Option<Rate>, finish: Finish) -> Self {
        let is_over = inner.is_end_stream();
        let mut body = EndpointBody { inner, patience: Patience::new(patience), pace: rate.map(Pace::new), finish };
        if is_over {
            body.complete();
        }
        ResponseBody::Endpoint(body)
    }

    pub fn text(text: impl Into<Bytes>) -> Self {
        ResponseBody::Own(Some(text.into()))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let body = match &mut *self {
            ResponseBody::Own(text) => return Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            ResponseBody::Endpoint(body) => body,
        };
        if let Some(pace) = &mut body.pace
            && let Some(part) = ready!(pace.poll_part(cx))
        {
            return Poll::Ready(Some(Ok(Frame::data(part))));
        }
        match body.inner.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                body.patience.moved();
                if let Some(data) = frame.data_ref() {
                    body.finish.sent(data.len());
                }
                if body.inner.is_end_stream() {
                    body.complete();
                }
                let Some(pace) = &mut body.pace else { return Poll::Ready(Some(Ok(frame))) };
                match frame.into_data() {
                    Ok(data) => {
                        pace.put(data);
                        self.poll_frame(cx)
                    }
                    Err(trailers) => Poll::Ready(Some(Ok(trailers))),
                }
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
            Poll::Ready(None) => {
                body.complete();
                Poll::Ready(None)
            }
            Poll::Pending if body.patience.is_over(cx) => {
                Poll::Ready(Some(Err("the endpoint's answer does not go on".into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ResponseBody::Own(text) => text.is_none(),
            ResponseBody::Endpoint(body) => body.held() == 0 && body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ResponseBody::Own(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            ResponseBody::Endpoint(body) => match (body.held() as u64, body.inner.size_hint()) {
                (0, hint) => hint,
                (held, hint) => hint.exact().map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + held)),
            },
        }
    }
}
