//! Somebody else who says which requests may come (`auth-url`), asked for each with the request's own headers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use rustls_pki_types::ServerName;
use tokio::time::Instant;

use crate::crypto;
use crate::gateway::BackendTls;
use crate::headers::SetHeaders;
use crate::registry::Slot;
use crate::upstream::Upstream;
use crate::variables::{Facts, Template, escaped};

/// Answers that are remembered.
const REMEMBERED: usize = 4096;
/// Names over TLS whose connections are kept.
const NAMES: usize = 64;

/// A URL with variables in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    pub is_tls: bool,
    /// Host, maybe with a port.
    pub authority: Template,
    /// Path and query; empty: the root.
    pub path: Template,
}

impl Url {
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || "is no URL; write http://host/path".to_owned();
        let (is_tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => return Err(wrong()),
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '@' | '"' | '\\' | '<' | '>' | '#');
        if authority.is_empty() || !text.chars().all(is_plain) {
            return Err(wrong());
        }
        let (authority, path) = (Template::parse(authority)?, Template::parse(path)?);
        if let Some(constant) = authority.constant() {
            split_port(constant, is_tls).ok_or_else(wrong)?;
        }
        Ok(Url { is_tls, authority, path })
    }
}

/// The host and port of an authority.
pub fn split_port(authority: &str, is_tls: bool) -> Option<(&str, u16)> {
    let usual = if is_tls { 443 } else { 80 };
    let (host, port) = match authority.rsplit_once(':') {
        // A colon of an IPv6 address is none before a port.
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (authority, usual),
    };
    (!host.is_empty() && !host.contains(['/', '?', '#', '@'])).then_some((host, port))
}

/// Where clients are sent that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signin {
    pub url: Template,
    /// The argument that says where they come from.
    pub argument: Box<str>,
}

impl Signin {
    pub fn location(&self, facts: &Facts<'_>) -> String {
        let url = self.url.fill(facts);
        let query = url.split_once('?').map(|(_, query)| query);
        let names = |query: &str| query.split('&').any(|pair| pair.split('=').next() == Some(&self.argument));
        let sign = match query {
            Some(query) if names(query) => return url,
            Some(_) => '&',
            None => '?',
        };
        let from = format!("{}://{}{}", facts.scheme(), facts.authority, escaped(&facts.request_uri()));
        format!("{url}{sign}{}={from}", self.argument)
    }
}

/// Which answers are remembered, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembering {
    pub key: Template,
    pub statuses: Vec<(u16, Duration)>,
}

/// What an Ingress says about who is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub url: Url,
    /// `None`: GET, and the request's own path is not told.
    pub method: Option<Method>,
    pub signin: Option<Signin>,
    /// Headers of the answer that the endpoint gets, in place of the client's.
    pub passed: Vec<HeaderName>,
    /// `X-Auth-Request-Redirect`; `None`: path and query of the request.
    pub redirect: Option<Template>,
    pub always_sets_cookie: bool,
    pub remembering: Option<Remembering>,
    /// The ConfigMap of more headers.
    pub headers: Option<Box<str>>,
}

/// What an answer said, as far as it matters.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub status: StatusCode,
    /// Those that are passed, `None` where the answer has none.
    pub headers: Vec<(HeaderName, Option<HeaderValue>)>,
    pub cookies: Vec<HeaderValue>,
    pub challenge: Option<HeaderValue>,
}

/// Who is asked for the requests of a route.
#[derive(Debug)]
pub struct External {
    pub question: Question,
    /// The port of a Service that the URL names, if it is one of this cluster.
    pub upstream: Option<Arc<Upstream>>,
    pub headers: Option<Slot<SetHeaders>>,
    remembered: Mutex<HashMap<String, (Instant, Verdict)>>,
    tls: Mutex<HashMap<Box<str>, Arc<BackendTls>>>,
}

impl PartialEq for External {
    /// What was answered is no part of what is wanted.
    fn eq(&self, other: &Self) -> bool {
        self.question == other.question
    }
}

impl External {
    pub fn new(question: Question, upstream: Option<Arc<Upstream>>, headers: Option<Slot<SetHeaders>>) -> Self {
        External { question, upstream, headers, remembered: Mutex::default(), tls: Mutex::default() }
    }

    /// What was answered to the same question at most so long ago.
    pub fn recall(&self, key: &str, now: Instant) -> Option<Verdict> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.get(key).filter(|(until, _)| now < *until).map(|(_, verdict)| verdict.clone())
    }

    pub fn remember(&self, key: String, verdict: &Verdict, now: Instant) {
        let statuses = self.question.remembering.as_ref().map(|held| &held.statuses[..]).unwrap_or_default();
        let held = statuses.iter().find(|(status, _)| *status == verdict.status.as_u16());
        let Some((_, time)) = held else { return };
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED {
            remembered.retain(|_, (until, _)| now < *until);
        }
        if remembered.len() < REMEMBERED {
            remembered.insert(key, (now + *time, verdict.clone()));
        }
    }

    /// TLS to this name; whoever answers is believed, as in ingress-nginx.
    pub fn tls(&self, host: &str) -> Option<Arc<BackendTls>> {
        let mut held: MutexGuard<'_, HashMap<_, _>> = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tls) = held.get(host) {
            return Some(Arc::clone(tls));
        }
        let name = ServerName::try_from(host.to_owned()).ok()?;
        if held.len() >= NAMES {
            held.clear();
        }
        let tls = Arc::new(BackendTls::unverified(Some(name), crypto::provider()));
        held.insert(host.into(), tls.clone());
        Some(tls)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use http::HeaderMap;

    use super::*;
    use crate::route::Ask;

    #[test]
    fn urls_are_read_and_what_is_none_is_told_of() {
        for (text, authority, path) in [
            ("http://auth.shop.svc.cluster.local:4180/oauth2/auth", "auth.shop.svc.cluster.local:4180", "/oauth2/auth"),
            ("https://$host/oauth2/auth?a=b", "${host}", "/oauth2/auth?a=b"),
            ("https://[::1]:8443", "[::1]:8443", ""),
        ] {
            let url = Url::parse(text).expect("a URL");
            assert_eq!((url.authority.to_string().as_str(), url.path.to_string().as_str()), (authority, path));
        }
        for text in
            ["auth", "ftp://a/", "http://", "http:///a", "http://a b/", "http://u@a/", "http://a:x/", "http://$x/"]
        {
            assert!(Url::parse(text).is_err(), "{text}");
        }
        assert_eq!(split_port("[::1]", true), Some(("[::1]", 443)));
        assert_eq!(split_port("a.example", false), Some(("a.example", 80)));
    }

    #[test]
    fn a_sign_in_says_where_the_client_wanted_to_go() {
        let headers = HeaderMap::new();
        let ask = Ask { host: "shop.example", path: "/a", query: "b=c", method: &Method::GET, headers: &headers };
        let facts = Facts { ask, authority: "shop.example", client: IpAddr::from([192, 0, 2, 1]), is_secure: true };
        for (url, argument, wanted) in [
            ("https://in.example/start", "rd", "https://in.example/start?rd=https://shop.example%2Fa%3Fb%3Dc"),
            ("https://in.example/?x=1", "next", "https://in.example/?x=1&next=https://shop.example%2Fa%3Fb%3Dc"),
            ("https://$host/in?rd=$escaped_request_uri", "rd", "https://shop.example/in?rd=%2Fa%3Fb%3Dc"),
        ] {
            let url = Template::parse(url).expect("known variables");
            assert_eq!(Signin { url, argument: argument.into() }.location(&facts), wanted);
        }
    }
}
