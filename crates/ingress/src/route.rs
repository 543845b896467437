//! What a request must look like for a route, and what becomes of it then. Ingress and Gateway are both translated to this.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use regex::Regex;

use crate::cors::Cors;
use crate::counts::RouteCounts;
use crate::gateway::BackendTls;
use crate::policy::Policy;
use crate::rewrites::{CookieChanges, Replacement};
use crate::upstream::Upstream;
use crate::url::{Place, Url};
use crate::variables::Template;

/// A path as a rule wants it.
#[derive(Clone, Debug)]
pub enum PathMatch {
    /// The whole path.
    Exact(Box<str>),
    /// By elements: `/foo` is for `/foo` and `/foo/bar`, not for `/foobar`. Without slashes at its end.
    Prefix(Box<str>),
    /// From the beginning of the path. The length of what was written decides what comes first.
    Pattern { regex: Regex, length: usize },
}

impl PathMatch {
    pub fn prefix(path: &str) -> Self {
        PathMatch::Prefix(path.trim_end_matches('/').into())
    }
}

/// What is asked of a value.
#[derive(Clone, Debug)]
pub enum ValueMatch {
    Exact(Box<str>),
    Pattern(Regex),
    Present,
}

impl ValueMatch {
    pub fn holds(&self, value: &str) -> bool {
        match self {
            ValueMatch::Exact(wanted) => value == &**wanted,
            ValueMatch::Pattern(regex) => regex.is_match(value),
            ValueMatch::Present => true,
        }
    }
}

/// What a request must have besides its host and path; all of it.
#[derive(Clone, Debug, Default)]
pub struct Matches {
    pub method: Option<Method>,
    pub headers: Vec<(HeaderName, ValueMatch)>,
    pub query: Vec<(Box<str>, ValueMatch)>,
    pub cookies: Vec<(Box<str>, ValueMatch)>,
}

impl Matches {
    pub fn is_empty(&self) -> bool {
        self.method.is_none() && self.headers.is_empty() && self.query.is_empty() && self.cookies.is_empty()
    }

    /// What asks for more comes first: a method, then more headers, then more of the query.
    pub fn rank(&self) -> (bool, usize, usize) {
        (self.method.is_some(), self.headers.len() + self.cookies.len(), self.query.len())
    }

    pub fn hold(&self, ask: &Ask<'_>) -> bool {
        let text = |value: &HeaderValue, wanted: &ValueMatch| value.to_str().is_ok_and(|value| wanted.holds(value));
        self.method.as_ref().is_none_or(|method| method == ask.method)
            && self.headers.iter().all(|(name, wanted)| ask.headers.get(name).is_some_and(|value| text(value, wanted)))
            && self.query.iter().all(|(name, wanted)| {
                // Of a name that is there twice the first counts.
                query_value(ask.query, name).is_some_and(|value| wanted.holds(value))
            })
            && self
                .cookies
                .iter()
                .all(|(name, wanted)| cookie(ask.headers, name).is_some_and(|value| wanted.holds(value)))
    }
}

/// The value of an argument of a query.
pub fn query_value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (held, value) = pair.split_once('=').unwrap_or((pair, ""));
        (held == name).then_some(value)
    })
}

/// The value of a cookie of the request.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(http::header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(';')).find_map(|pair| {
        let (held, value) = pair.trim().split_once('=')?;
        (held == name).then_some(value)
    })
}

/// What of a request decides about its route.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// In lower case, without a port.
    pub host: &'a str,
    pub path: &'a str,
    /// Without the question mark; empty if there is none.
    pub query: &'a str,
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
}

/// Who wrote a route, for people and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteName {
    /// `Ingress`, or a kind of Gateway route.
    pub kind: &'static str,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// As the rule writes it; empty: all.
    pub host: Arc<str>,
    pub path: Arc<str>,
}

/// One path of one rule.
#[derive(Clone, Debug)]
pub struct Route {
    pub name: RouteName,
    pub path: PathMatch,
    pub matches: Matches,
    pub action: Action,
    pub filters: Vec<Filter>,
    pub policy: Arc<Policy>,
    pub counts: Arc<RouteCounts>,
    /// It takes a share from the other route of the same host and path.
    pub canary: Option<Canary>,
}

#[derive(Clone, Debug)]
pub enum Action {
    Forward(Backends),
    Redirect(Redirect),
    /// This status, and nothing else.
    Respond(http::StatusCode),
}

/// Upstreams with their weights.
#[derive(Clone, Debug)]
pub struct Backends {
    list: Vec<WeightedBackend>,
    total: u32,
}

#[derive(Clone, Debug)]
pub struct WeightedBackend {
    pub weight: u32,
    pub upstream: Arc<Upstream>,
    /// Only for requests that go there.
    pub filters: Vec<Filter>,
    /// How its endpoints are spoken to, if over TLS.
    pub tls: Option<Arc<BackendTls>>,
    pub instead: Option<Instead>,
}

/// What requests for a backend get instead of an endpoint's answer.
#[derive(Clone, Debug)]
pub enum Instead {
    /// It may not be used, or is not there.
    Refusal(http::StatusCode),
    Redirect(Redirect),
}

impl Backends {
    pub fn new(list: Vec<WeightedBackend>) -> Self {
        let total = list.iter().map(|one| one.weight).fold(0, u32::saturating_add);
        Backends { list, total }
    }

    pub fn one(upstream: Arc<Upstream>) -> Self {
        Backends::new(vec![WeightedBackend { weight: 1, upstream, filters: Vec::new(), tls: None, instead: None }])
    }

    /// One, that is spoken to over TLS if so.
    pub fn over(upstream: Arc<Upstream>, tls: Option<Arc<BackendTls>>) -> Self {
        let mut all = Backends::one(upstream);
        all.list.iter_mut().for_each(|one| one.tls.clone_from(&tls));
        all
    }

    pub fn list(&self) -> &[WeightedBackend] {
        &self.list
    }

    /// `draw` is any number, as likely as any other. `None`: nobody has a weight.
    pub fn pick(&self, draw: u32) -> Option<&WeightedBackend> {
        if let [only] = &self.list[..] {
            return (only.weight > 0).then_some(only);
        }
        let mut rest = draw.checked_rem(self.total)?;
        self.list.iter().find(|one| match rest.checked_sub(one.weight) {
            Some(left) => {
                rest = left;
                false
            }
            None => true,
        })
    }
}

/// A share of another route's requests.
#[derive(Clone, Debug, Default)]
pub struct Canary {
    /// Out of `total`.
    pub weight: u32,
    pub total: u32,
    /// Requests with such a header always; with the same header and another value never, if `never` is that value.
    pub header: Option<(HeaderName, ValueMatch)>,
    pub cookie: Option<Box<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    pub status: http::StatusCode,
    pub scheme: Option<&'static str>,
    pub host: Option<Box<str>>,
    /// `None`: the port that the scheme means.
    pub port: Option<u16>,
    pub path: Option<PathRewrite>,
    /// All of the location at once.
    pub location: Option<Box<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    Full(Box<str>),
    /// In place of the prefix that matched.
    Prefix(Box<str>),
    /// `$1` stands for the first group of the pattern that matched.
    Groups(Box<str>),
}

/// What is changed on the way, in order.
#[derive(Clone, Debug)]
pub enum Filter {
    RequestHeaders(HeaderChanges),
    ResponseHeaders(HeaderChanges),
    RewritePath(PathRewrite),
    RewriteHost(HeaderValue),
    Cors(Arc<Cors>),
    /// Where redirects of endpoints lead.
    Redirects(Replacement),
    Cookies(CookieChanges),
    Mirror(Arc<Mirror>),
}

/// Requests also go there, and what is answered is thrown away.
#[derive(Debug)]
pub struct Mirror {
    pub to: MirrorTo,
    /// So many of `whole` requests.
    pub part: u32,
    pub whole: u32,
}

#[derive(Debug)]
pub enum MirrorTo {
    /// With the request's own path and host.
    Service {
        upstream: Arc<Upstream>,
        tls: Option<Arc<BackendTls>>,
    },
    Url {
        wanted: MirrorUrl,
        place: Place,
    },
}

impl MirrorTo {
    /// The Service, if it is one of this cluster.
    pub fn upstream(&self) -> Option<&Arc<Upstream>> {
        match self {
            MirrorTo::Service { upstream, .. } => Some(upstream),
            MirrorTo::Url { place, .. } => place.upstream.as_ref(),
        }
    }
}

/// What an annotation says about copies of requests.
#[derive(Clone, Debug)]
pub struct MirrorUrl {
    pub url: Url,
    /// What copies name as their host; `None`: the host of the URL.
    pub host: Option<Template>,
    pub has_body: bool,
}

#[derive(Clone, Debug, Default)]
pub struct HeaderChanges {
    pub set: Vec<(HeaderName, HeaderValue)>,
    pub add: Vec<(HeaderName, HeaderValue)>,
    pub remove: Vec<HeaderName>,
}

impl HeaderChanges {
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
    }
}

impl Route {
    /// Where its requests go, for people.
    pub fn upstreams(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        let list = match &self.action {
            Action::Forward(backends) => backends.list(),
            Action::Redirect(_) | Action::Respond(_) => &[],
        };
        list.iter().map(|one| &one.upstream)
    }

    /// Services that get copies of its requests.
    pub fn mirrors(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.filters.iter().filter_map(|filter| match filter {
            Filter::Mirror(mirror) => mirror.to.upstream(),
            _ => None,
        })
    }
}
