//! HTTP/1.1 towards endpoints (RFC 9112), in the task of the request: no second task, no channel, and nothing is said to an
//! endpoint that is not written here.

mod connection;
mod decode;
mod exchange;
mod head;
mod outgoing;
mod stream;

pub use connection::Http1;
pub use exchange::Exchange;
pub use head::RequestHead;
pub use stream::Stream;

/// Why there is no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum Http1Error {
    #[error("the endpoint's connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("the endpoint closed the connection")]
    Closed,
    #[error("the endpoint's answer is not HTTP/1.1: {0}")]
    NotHttp(&'static str),
    #[error("the request's body ended early: {0}")]
    Body(super::body::BoxError),
}
