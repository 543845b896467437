//! Asks somebody else whether a request may come. What is asked looks as it does from ingress-nginx: the request's head without
//! its body, and beside it where the request wanted to go. 2xx lets in, 401 and 403 do not, and all else is an error of whoever
//! was asked.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use http::header::{CONTENT_LENGTH, HOST, SET_COOKIE, WWW_AUTHENTICATE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};

use super::attempt::{Attempts, Head, Sent};
use super::body::{RequestBody, ResponseBody, Troubles};
use super::facts::facts;
use super::forward::{forwarded, number, protocol_of};
use super::handle::{Arrival, answer, redirect};
use super::hygiene;
use super::worker::{Client, Worker};
use crate::external::{External, Verdict};
use crate::policy::{BackendProtocol, Policy};
use crate::sticky::Wish;
use crate::upstream::Targets;
use crate::url::split_port;
use crate::variables::Facts;

/// For the answer's head, and for its body.
const PATIENCE: Duration = Duration::from_secs(60);
const READING: Duration = Duration::from_secs(5);

/// What becomes of a request.
pub enum Admission {
    In(Arc<Granted>),
    Out(Box<Response<ResponseBody>>),
}

/// What was said of a request that is let in.
pub struct Granted {
    verdict: Verdict,
    always_sets_cookie: bool,
}

impl Granted {
    /// What the endpoint is told: what the client says of these is not believed.
    pub fn set_headers(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.verdict.headers {
            match value {
                Some(value) => drop(headers.insert(name, value.clone())),
                None => drop(headers.remove(name)),
            }
        }
    }

    /// What the client is told, with answers with which nginx adds headers.
    pub fn set_cookies(&self, response: &mut Response<ResponseBody>) {
        let is_plain = matches!(response.status().as_u16(), 200 | 201 | 204 | 206 | 301..=304 | 307 | 308);
        if is_plain || self.always_sets_cookie {
            for cookie in &self.verdict.cookies {
                response.headers_mut().append(SET_COOKIE, cookie.clone());
            }
        }
    }
}

/// Has the request decided about.
pub async fn ask(
    worker: &Arc<Worker>,
    client: &Client,
    arrival: &Arrival,
    external: &External,
    request: &mut Request<Incoming>,
) -> Admission {
    // The same for whoever is asked and for the endpoint.
    number(worker, request.headers_mut());
    let facts = facts(client, request);
    let now = Instant::now();
    let question = &external.question;
    // One route's answers are no other's.
    let of = &arrival.route.name;
    let key = question.remembering.as_ref().map(|held| format!("{}{}\n{}", of.host, of.path, held.key.fill(&facts)));
    let known = key.as_ref().and_then(|key| external.recall(key, now));
    let verdict = match known {
        Some(verdict) => verdict,
        None => {
            let asked = timeout(PATIENCE, consult(worker, client, arrival, external, request, &facts)).await;
            let Ok(Some((verdict, may_remember))) = asked else {
                let text = "whoever decides about this was not reached\n";
                return Admission::Out(Box::new(answer(StatusCode::INTERNAL_SERVER_ERROR, text)));
            };
            if let Some(key) = key.filter(|_| may_remember) {
                external.remember(key, &verdict, now);
            }
            verdict
        }
    };
    match verdict.status {
        status if status.is_success() => {
            Admission::In(Arc::new(Granted { verdict, always_sets_cookie: question.always_sets_cookie }))
        }
        StatusCode::UNAUTHORIZED => {
            let mut response = match &question.signin {
                Some(signin) => redirect(StatusCode::FOUND, &signin.location(&facts)),
                None => answer(StatusCode::UNAUTHORIZED, "say who you are\n"),
            };
            if question.signin.is_none()
                && let Some(challenge) = &verdict.challenge
            {
                response.headers_mut().insert(WWW_AUTHENTICATE, challenge.clone());
            }
            Granted { verdict, always_sets_cookie: question.always_sets_cookie }.set_cookies(&mut response);
            Admission::Out(Box::new(response))
        }
        StatusCode::FORBIDDEN => {
            let mut response = answer(StatusCode::FORBIDDEN, "you may not come here\n");
            Granted { verdict, always_sets_cookie: question.always_sets_cookie }.set_cookies(&mut response);
            Admission::Out(Box::new(response))
        }
        _ => {
            let text = "whoever decides about this does not\n";
            Admission::Out(Box::new(answer(StatusCode::INTERNAL_SERVER_ERROR, text)))
        }
    }
}

/// What is answered now, and whether that may be remembered.
async fn consult(
    worker: &Arc<Worker>,
    client: &Client,
    arrival: &Arrival,
    external: &External,
    request: &Request<Incoming>,
    facts: &Facts<'_>,
) -> Option<(Verdict, bool)> {
    let url = &external.question.url;
    let authority = url.authority.fill(facts);
    let (host, port) = split_port(&authority, url.is_tls)?;
    let mut head = head(client, external, request, facts, host)?;
    let targets: Arc<Targets> = match &external.place.upstream {
        Some(upstream) => upstream.targets(),
        None => worker.shared.names.find(host, port).await,
    };
    let policy = Policy::shared();
    let protocol = protocol_of(&targets, &policy);
    if protocol == BackendProtocol::H2c {
        head.make_http2().ok()?;
    }
    let tls = match url.is_tls {
        true => Some(external.place.tls(host)?),
        false => None,
    };
    let attempts = Attempts {
        worker,
        policy: &policy,
        tls,
        identity: None,
        turn: &AtomicU32::new(0),
        targets: &targets,
        protocol,
        trouble: Troubles::default(),
        wish: Wish::None,
        announce: None,
    };
    let sent = attempts.run(head, RequestBody::Empty, &arrival.route, Instant::now()).await.ok()?;
    let Sent { response, active, peer } = sent;
    let (parts, body) = response.into_parts();
    if let Ok(Some(connection)) = timeout(READING, body.drain()).await {
        worker.pool.put(&peer, connection);
    }
    drop(active);
    let headers = &parts.headers;
    let passed = external.question.passed.iter().map(|name| (name.clone(), headers.get(name).cloned()));
    let verdict = Verdict {
        status: parts.status,
        headers: passed.collect(),
        cookies: headers.get_all(SET_COOKIE).iter().cloned().collect(),
        challenge: headers.get(WWW_AUTHENTICATE).cloned(),
    };
    Some((verdict, may_remember(headers)))
}

/// As nginx's cache: not what sets a cookie, nor what asks not to be kept.
fn may_remember(headers: &HeaderMap) -> bool {
    let control = headers.get_all(http::header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut words = control.flat_map(|line| line.split(',')).map(|word| word.trim().to_ascii_lowercase());
    !headers.contains_key(SET_COOKIE)
        && !words.any(|word| matches!(word.as_str(), "no-cache" | "no-store" | "private" | "max-age=0" | "s-maxage=0"))
}

const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_ORIGINAL_URL: HeaderName = HeaderName::from_static("x-original-url");
const X_ORIGINAL_METHOD: HeaderName = HeaderName::from_static("x-original-method");
const X_ORIGINAL_URI: HeaderName = HeaderName::from_static("x-original-uri");
const X_SENT_FROM: HeaderName = HeaderName::from_static("x-sent-from");
const X_SCHEME: HeaderName = HeaderName::from_static("x-scheme");
const X_AUTH_REQUEST_REDIRECT: HeaderName = HeaderName::from_static("x-auth-request-redirect");

/// The head of the question; `None`: a variable holds what can stand in no head.
fn head(
    client: &Client,
    external: &External,
    request: &Request<Incoming>,
    facts: &Facts<'_>,
    host: &str,
) -> Option<Head> {
    let question = &external.question;
    let path = question.url.path.fill(facts);
    let path = if path.starts_with('/') { path } else { format!("/{path}") };
    let uri = Uri::from(PathAndQuery::try_from(path).ok()?);
    let value = |text: String| HeaderValue::try_from(text).ok();
    let request_uri = facts.request_uri();
    let mut headers = request.headers().clone();
    hygiene::strip_request(&mut headers);
    headers.remove(CONTENT_LENGTH);
    headers.insert(HOST, value(facts.authority.to_owned())?);
    forwarded(client, &mut headers);
    headers.remove(X_FORWARDED_PROTO);
    headers.insert(HOST, value(host.to_owned())?);
    headers.insert(X_ORIGINAL_URL, value(format!("{}://{}{request_uri}", facts.scheme(), facts.authority))?);
    headers.insert(X_ORIGINAL_METHOD, value(request.method().to_string())?);
    headers.insert(X_SENT_FROM, HeaderValue::from_static("nginx-ingress-controller"));
    let redirect = question.redirect.as_ref().map_or_else(|| request_uri.clone(), |to| to.fill(facts));
    headers.insert(X_AUTH_REQUEST_REDIRECT, value(redirect)?);
    if question.method.is_some() {
        headers.insert(X_ORIGINAL_URI, value(request_uri)?);
        headers.insert(X_SCHEME, HeaderValue::from_static(facts.scheme()));
    }
    if let Some(slot) = &external.headers {
        // As long as nobody knows what is to be said, nobody is asked.
        Option::clone(&slot.load())?.fill(&mut headers, facts)?;
    }
    Some(Head { method: question.method.clone().unwrap_or(Method::GET), uri, headers })
}
