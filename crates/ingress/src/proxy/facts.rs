//! What is known of a request before anybody is asked.

use http::Request;
use http::header::HOST;

use super::hygiene;
use super::worker::Client;
use crate::route::Ask;
use crate::variables::Facts;

/// What variables stand for in this request.
pub fn facts<'a, B>(client: &Client, request: &'a Request<B>) -> Facts<'a> {
    let named = || request.headers().get(HOST).and_then(|value| value.to_str().ok());
    let ask = Ask {
        host: hygiene::host(request).unwrap_or_default(),
        path: request.uri().path(),
        query: request.uri().query().unwrap_or_default(),
        method: request.method(),
        headers: request.headers(),
    };
    let authority = request.uri().authority().map(|authority| authority.as_str()).or_else(named).unwrap_or_default();
    Facts { ask, authority, client: client.peer.ip(), is_secure: is_secure(client, request) }
}

/// It came over TLS, to us or to a proxy in front that is believed.
pub fn is_secure<B>(client: &Client, request: &Request<B>) -> bool {
    let told = || request.headers().get("x-forwarded-proto").is_some_and(|value| value == "https");
    client.is_tls || (client.is_trusted && told())
}
