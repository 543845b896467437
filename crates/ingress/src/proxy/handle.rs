//! One request: where it may go, decided before a byte of it moves.

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, LOCATION, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::body::ResponseBody;
use super::clients;
use super::entrance::NoRoute;
use super::external::{Admission, Granted, ask};
use super::facts::is_secure;
use super::forward::forward;
use super::hygiene::{self, Refusal};
use super::log::Line;
use super::pages::{Asked, page};
use super::trace;
use super::worker::{Client, Worker};
use crate::basic::Basic;
use crate::limits::{TooMany, UnderWay};
use crate::route::{Action, Ask, Filter, PathRewrite, Redirect, Route};

/// What is known of a request when it has been decided about.
pub struct Arrival {
    pub started: Instant,
    pub route: Arc<Route>,
    /// The path to match and send, if it is not the one in the request.
    pub path: Option<String>,
    /// Counts it at its client's limits.
    pub under_way: Option<UnderWay>,
    /// What whoever let it in said.
    pub granted: Option<Arc<Granted>>,
}

/// Answers a request. Whatever goes wrong is an answer, too.
pub async fn handle(
    worker: Arc<Worker>,
    client: Arc<Client>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let started = Instant::now();
    let mut line = worker.log().is_on().then(|| Box::new(Line::new(&client, &request)));
    let mut arrival = match route(&worker, &client, &request, started) {
        Ok(arrival) => arrival,
        Err(rejected) => {
            let mut response = answer(rejected.status, rejected.text);
            if rejected.is_refused {
                // What follows on the connection may be part of the same trick.
                response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
            }
            worker.tell(line, &response, None, started);
            return Ok(response);
        }
    };
    let trace = trace::begin(&worker, &arrival.route.policy, &mut request);
    if let (Some(line), Some(trace)) = (&mut line, trace) {
        line.trace = Some(trace);
    }
    let refused = arrival.route.policy.clients.clone().and_then(|clients| {
        // Who comes without TLS may be sent to it first.
        let is_judged = client.is_tls || !arrival.route.policy.https_only;
        is_judged.then(|| clients::admit(&client, &clients.0, &mut request)).flatten()
    });
    let decided = match refused.or_else(|| decide(&worker, &client, &mut arrival, &request)) {
        None => admit(&worker, &client, &mut arrival, &mut request).await,
        answered => answered,
    };
    let granted = arrival.granted.clone();
    let after = After::of(&worker, &arrival.route, &mut request).map(|after| (after, worker.clone(), client.clone()));
    let mut response = match decided {
        Some(response) => {
            arrival.route.counts.answered(response.status().as_u16(), started.elapsed());
            worker.tell(line, &response, Some(&arrival.route), started);
            response
        }
        None => forward(worker, client, arrival, request, line).await,
    };
    if let Some(granted) = granted {
        granted.set_cookies(&mut response);
    }
    match after {
        // Rarely there, and large: in a box it costs the others nothing.
        Some((after, worker, client)) => Ok(Box::pin(after.finish(&worker, &client, response)).await),
        None => Ok(response),
    }
}

/// What may still become of an answer, whoever gave it.
struct After {
    route: Arc<Route>,
    asked: Option<Asked>,
}

impl After {
    /// `None`: nothing does.
    fn of<B>(worker: &Worker, route: &Arc<Route>, request: &mut Request<B>) -> Option<Self> {
        let policy = &route.policy;
        let has_pages = policy.pages.as_ref().is_some_and(|pages| !pages.statuses.is_empty());
        let asked = has_pages.then(|| Asked::of(worker, request));
        (has_pages || policy.answer_headers.is_some()).then(|| After { route: route.clone(), asked })
    }

    async fn finish(
        self,
        worker: &Arc<Worker>,
        client: &Client,
        mut response: Response<ResponseBody>,
    ) -> Response<ResponseBody> {
        let (policy, status) = (&self.route.policy, response.status());
        let is_replaced = policy.pages.as_ref().is_some_and(|pages| pages.statuses.contains(status.as_u16()));
        if let Some(asked) = self.asked.filter(|_| is_replaced)
            && let Some(page) = page(worker, client, &self.route, asked, status).await
        {
            response = page;
        }
        if let Some(headers) = policy.answer_headers.as_ref().and_then(|held| Option::clone(&held.0.load())) {
            headers.set(response.headers_mut());
        }
        response
    }
}

/// A request that no route gets.
struct Rejected {
    status: StatusCode,
    text: &'static str,
    /// It could be read in two ways, or asks for what is not served.
    is_refused: bool,
}

fn route(worker: &Worker, client: &Client, request: &Request<Incoming>, started: Instant) -> Result<Arrival, Rejected> {
    let refuse = |refusal: Refusal| {
        worker.shared.refused.fetch_add(1, Ordering::Relaxed);
        Rejected { status: refusal.status(), text: refusal.text(), is_refused: true }
    };
    let host = hygiene::host(request).map_err(refuse)?;
    let host: Cow<'_, str> = match host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        true => Cow::Owned(host.to_ascii_lowercase()),
        false => Cow::Borrowed(host),
    };
    let path = hygiene::plain_path(request.uri().path()).map_err(refuse)?;
    let ask = Ask {
        host: &host,
        path: &path,
        query: request.uri().query().unwrap_or_default(),
        method: request.method(),
        headers: request.headers(),
    };
    let route = client.entrance.find(&worker.shared, &ask, client.name.as_deref()).map_err(|why| {
        worker.shared.unrouted.fetch_add(1, Ordering::Relaxed);
        let (status, text) = match why {
            NoRoute::Unknown => (StatusCode::NOT_FOUND, "no rule is for this\n"),
            NoRoute::Misdirected => {
                (StatusCode::MISDIRECTED_REQUEST, "this connection was made for another name; use one for this name\n")
            }
        };
        Rejected { status, text, is_refused: false }
    })?;
    let path = match path {
        Cow::Owned(path) => Some(path),
        Cow::Borrowed(_) => None,
    };
    Ok(Arrival { started, route, path, under_way: None, granted: None })
}

/// An answer that needs no endpoint.
fn decide(
    worker: &Worker,
    client: &Client,
    arrival: &mut Arrival,
    request: &Request<Incoming>,
) -> Option<Response<ResponseBody>> {
    let route = arrival.route.clone();
    let policy = &route.policy;
    let ip = client.peer.ip();
    let has_more_doors = policy.one_is_enough && policy.has_doors();
    if policy.allows(ip) == Some(false) && !has_more_doors {
        return Some(answer(StatusCode::FORBIDDEN, "this address may not come here\n"));
    }
    if let Some(limits) = &policy.limits {
        match limits.enter(ip, worker.milliseconds()) {
            Ok(under_way) => arrival.under_way = under_way,
            // What ingress-nginx says then, too.
            Err(TooMany) => {
                return Some(answer(StatusCode::SERVICE_UNAVAILABLE, "too many requests from this address\n"));
            }
        }
    }
    if policy.https_only && !is_secure(client, request) {
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        let path = arrival.path.as_deref().unwrap_or(request.uri().path());
        let location = format!("https://{}{path}{query}", host_of(request));
        return Some(redirect(StatusCode::PERMANENT_REDIRECT, &location));
    }
    let cors = arrival.route.filters.iter().find_map(|filter| match filter {
        Filter::Cors(cors) => Some(cors),
        _ => None,
    });
    if let Some(cors) = cors.filter(|_| request.method() == Method::OPTIONS) {
        let mut response = Response::new(ResponseBody::Own(None));
        *response.status_mut() = StatusCode::NO_CONTENT;
        cors.preflight(request.headers(), response.headers_mut());
        return Some(response);
    }
    match &arrival.route.action {
        Action::Forward(_) => {}
        Action::Respond(status) => return Some(answer(*status, "there is nothing behind this path\n")),
        Action::Redirect(wanted) => {
            let location = location(wanted, client, arrival, request);
            return Some(redirect(wanted.status, &location));
        }
    }
    let length = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if policy.body_limit > 0 && length.is_some_and(|length| length > policy.body_limit) {
        return Some(answer(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than allowed here\n"));
    }
    None
}

/// The answer for who is not let in.
async fn admit(
    worker: &Arc<Worker>,
    client: &Client,
    arrival: &mut Arrival,
    request: &mut Request<Incoming>,
) -> Option<Response<ResponseBody>> {
    let policy = arrival.route.policy.clone();
    if policy.is_shut {
        return Some(answer(StatusCode::SERVICE_UNAVAILABLE, "who may come here is not known\n"));
    }
    if policy.one_is_enough && policy.allows(client.peer.ip()) == Some(true) {
        return None;
    }
    let mut refused = None;
    if let Some(basic) = &policy.basic {
        match (knows(basic, request).await, policy.one_is_enough) {
            (None, true) => return None,
            (Some(response), false) => return Some(response),
            (response, _) => refused = response,
        }
    }
    let Some(external) = &policy.external else { return refused };
    // Rarely there, and large: in a box it costs the others nothing.
    match Box::pin(ask(worker, client, arrival, external, request)).await {
        Admission::In(granted) => {
            arrival.granted = Some(granted);
            None
        }
        Admission::Out(response) => {
            // Who may still say who it is hears that.
            let asks = refused.filter(|first| {
                first.status() == StatusCode::UNAUTHORIZED && response.status() == StatusCode::FORBIDDEN
            });
            Some(asks.unwrap_or(*response))
        }
    }
}

/// The answer for who has not said who it is.
async fn knows(basic: &Basic, request: &Request<Incoming>) -> Option<Response<ResponseBody>> {
    let Some(users) = Option::clone(&basic.users.load()) else {
        return Some(answer(StatusCode::SERVICE_UNAVAILABLE, "who may come here is not known\n"));
    };
    if users.admit(request.headers().get(AUTHORIZATION)).await {
        return None;
    }
    let mut response = answer(StatusCode::UNAUTHORIZED, "say who you are\n");
    response.headers_mut().insert(WWW_AUTHENTICATE, basic.challenge());
    Some(response)
}

/// In lower case, without its port, as it was when the route was found.
fn host_of(request: &Request<Incoming>) -> String {
    hygiene::host(request).map(str::to_ascii_lowercase).unwrap_or_default()
}

pub fn location(wanted: &Redirect, client: &Client, arrival: &Arrival, request: &Request<Incoming>) -> String {
    if let Some(location) = &wanted.location {
        return location.to_string();
    }
    let is_tls = is_secure(client, request);
    let scheme = wanted.scheme.unwrap_or(if is_tls { "https" } else { "http" });
    let host = wanted.host.as_deref().map_or_else(|| host_of(request), str::to_owned);
    let held = arrival.path.as_deref().unwrap_or(request.uri().path());
    let path = match &wanted.path {
        Some(rewrite) => rewritten(rewrite, &arrival.route, held),
        None => held.to_owned(),
    };
    // Without another scheme the client's own port stays.
    let named = request.headers().get(HOST).and_then(|value| value.to_str().ok()).and_then(|h| h.rsplit_once(':'));
    let named = named.and_then(|(_, port)| port.parse::<u16>().ok());
    // A Gateway's own port is the listener's, whatever the client calls it.
    let kept = client.gateway_port.or(named).filter(|_| wanted.scheme.is_none());
    let port = wanted.port.or(kept).filter(|port| !matches!((scheme, port), ("http", 80) | ("https", 443)));
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{path}{query}")
}

/// The path that an endpoint sees.
pub fn rewritten(rewrite: &PathRewrite, route: &Route, path: &str) -> String {
    use crate::route::PathMatch;
    match (rewrite, &route.path) {
        (PathRewrite::Full(path), _) => path.to_string(),
        (PathRewrite::Prefix(new), PathMatch::Prefix(old)) => {
            let rest = path.get(old.len()..).unwrap_or_default().trim_start_matches('/');
            match (new.trim_end_matches('/'), rest) {
                ("", rest) => format!("/{rest}"),
                (new, "") if !path.ends_with('/') || old.len() == path.len() => new.to_owned(),
                (new, rest) => format!("{new}/{rest}"),
            }
        }
        (PathRewrite::Groups(template), PathMatch::Pattern { regex, .. }) => {
            let Some(captures) = regex.captures(path) else { return path.to_owned() };
            let mut out = String::with_capacity(path.len());
            let mut rest = &**template;
            // As nginx has them: `$1` to `$9`, not the regex crate's `${name}`.
            while let Some(at) = rest.find('$') {
                out.push_str(&rest[..at]);
                let number = rest[at + 1..].chars().next().and_then(|digit| digit.to_digit(10));
                match number {
                    Some(number) => {
                        out.push_str(captures.get(number as usize).map_or("", |group| group.as_str()));
                        rest = &rest[at + 2..];
                    }
                    None => {
                        out.push('$');
                        rest = &rest[at + 1..];
                    }
                }
            }
            out.push_str(rest);
            if out.starts_with('/') { out } else { format!("/{out}") }
        }
        (PathRewrite::Prefix(new) | PathRewrite::Groups(new), _) => new.to_string(),
    }
}

/// An answer of our own.
pub fn answer(status: StatusCode, text: &'static str) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::text(text));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, plain);
    response
}

pub fn redirect(status: StatusCode, location: &str) -> Response<ResponseBody> {
    match HeaderValue::from_str(location) {
        Ok(location) => {
            let mut response = answer(status, "");
            response.headers_mut().insert(LOCATION, location);
            response
        }
        Err(_) => answer(StatusCode::BAD_REQUEST, "there is no such place to be sent to\n"),
    }
}
