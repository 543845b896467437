//! Lets in who has shown a certificate that its route wants, and tells whoever is behind what was shown.

use http::{HeaderName, HeaderValue, Request, Response, StatusCode};

use super::body::ResponseBody;
use super::handle::{answer, redirect};
use super::worker::Client;
use crate::clients::{Asks, ClientAuth, Outcome};

const VERIFY: HeaderName = HeaderName::from_static("ssl-client-verify");
const SUBJECT: HeaderName = HeaderName::from_static("ssl-client-subject-dn");
const ISSUER: HeaderName = HeaderName::from_static("ssl-client-issuer-dn");
const CERTIFICATE: HeaderName = HeaderName::from_static("ssl-client-cert");

/// The answer for who is not let in; the others' requests say who they are, and nobody says it for himself.
pub fn admit<B>(client: &Client, auth: &ClientAuth, request: &mut Request<B>) -> Option<Response<ResponseBody>> {
    let wanted = &auth.wanted;
    for name in [VERIFY, SUBJECT, ISSUER, CERTIFICATE] {
        request.headers_mut().remove(name);
    }
    let Some(roots) = auth.roots.as_ref().filter(|_| !wanted.is_broken) else {
        return Some(answer(StatusCode::FORBIDDEN, "who may come here is not known\n"));
    };
    if client.is_tls && !client.is_asked {
        // Another name was asked for in the handshake, so that no certificate was.
        let text = "this connection was made for another name; use one for this name\n";
        return Some(answer(StatusCode::MISDIRECTED_REQUEST, text));
    }
    let outcome = client.shown.as_ref().map(|shown| shown.verify(roots, wanted.depth));
    let is_good = match (&outcome, wanted.asks) {
        (None, asks) => asks != Asks::Always,
        (Some(Outcome::Success), _) | (Some(Outcome::Stranger(_)), Asks::AnyAuthority) => true,
        (Some(Outcome::Failed(_) | Outcome::Stranger(_)), _) => false,
    };
    if !is_good {
        return Some(match &wanted.error_page {
            Some(page) => redirect(StatusCode::FOUND, page),
            None if outcome.is_none() => answer(StatusCode::BAD_REQUEST, "show a certificate\n"),
            None => answer(StatusCode::BAD_REQUEST, "this certificate is not good here\n"),
        });
    }
    let shown = client.shown.as_ref();
    let subject = shown.map_or("", |shown| &shown.subject);
    if wanted.subject.as_ref().is_some_and(|wanted| !wanted.is_match(subject)) {
        return Some(answer(StatusCode::FORBIDDEN, "this certificate is somebody else's\n"));
    }
    let verified = match outcome {
        None => "NONE".to_owned(),
        Some(Outcome::Success) => "SUCCESS".to_owned(),
        Some(Outcome::Failed(why) | Outcome::Stranger(why)) => format!("FAILED:{why}"),
    };
    let pem = shown.filter(|_| wanted.passes_certificate).map(|shown| shown.pem()).unwrap_or_default();
    let issuer = shown.map_or("", |shown| &shown.issuer).to_owned();
    for (name, value) in [(VERIFY, verified), (SUBJECT, subject.to_owned()), (ISSUER, issuer), (CERTIFICATE, pem)] {
        // What stands in a certificate may be more than what stands in a header.
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes())
            && !value.is_empty()
        {
            request.headers_mut().insert(name, value);
        }
    }
    None
}
