//! Somebody else who says which requests may come (`auth-url`), asked for each with the request's own headers.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use crate::headers::SetHeaders;
use crate::registry::Slot;
use crate::url::{Place, Url};
use crate::variables::{Facts, Template, escaped};

/// Answers that are remembered.
const REMEMBERED: usize = 4096;

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
    pub place: Place,
    pub headers: Option<Slot<SetHeaders>>,
    remembered: Mutex<HashMap<String, (Instant, Verdict)>>,
}

impl PartialEq for External {
    /// What was answered is no part of what is wanted.
    fn eq(&self, other: &Self) -> bool {
        self.question == other.question
    }
}

impl External {
    pub fn new(question: Question, place: Place, headers: Option<Slot<SetHeaders>>) -> Self {
        External { question, place, headers, remembered: Mutex::default() }
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
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use http::HeaderMap;

    use super::*;
    use crate::route::Ask;

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
