//! Who may use answers from other origins (the Fetch standard's CORS protocol).

use std::time::Duration;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};

#[derive(Clone, Debug, PartialEq)]
pub struct Cors {
    /// `https://*.example.com` stands for any label in front; `*` for every origin.
    pub origins: Vec<Box<str>>,
    pub methods: HeaderValue,
    pub headers: HeaderValue,
    pub expose: Option<HeaderValue>,
    pub credentials: bool,
    pub max_age: Duration,
    /// Where everything is allowed, answers name what was asked for instead of `*`: what Gateway API wants, as browsers take no
    /// `*` from who asks for credentials.
    pub reflects: bool,
}

impl Default for Cors {
    /// As ingress-nginx has it.
    fn default() -> Self {
        Cors {
            origins: vec!["*".into()],
            methods: HeaderValue::from_static("GET, PUT, POST, DELETE, PATCH, OPTIONS"),
            headers: HeaderValue::from_static(
                "DNT,Keep-Alive,User-Agent,X-Requested-With,If-Modified-Since,Cache-Control,Content-Type,Range,Authorization",
            ),
            expose: None,
            credentials: true,
            max_age: Duration::from_secs(1_728_000),
            reflects: false,
        }
    }
}

impl Cors {
    /// What an answer says to this origin; nothing if it may not have it.
    fn allowed(&self, origin: &HeaderValue) -> Option<HeaderValue> {
        if self.origins.iter().any(|held| &**held == "*") {
            let is_named = self.reflects && self.credentials;
            return Some(if is_named { origin.clone() } else { HeaderValue::from_static("*") });
        }
        let text = origin.to_str().ok()?;
        self.origins.iter().any(|held| fits(held, text)).then(|| origin.clone())
    }

    /// Completes an answer.
    pub fn apply(&self, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
        let Some(allowed) = origin.and_then(|origin| self.allowed(origin)) else { return };
        if allowed != "*" {
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        if let Some(expose) = &self.expose {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }

    /// The answer to a browser that asks beforehand.
    pub fn preflight(&self, request: &HeaderMap, headers: &mut HeaderMap) {
        self.apply(request.get(ORIGIN), headers);
        // What is allowed: as it is written, or what was asked for where all is.
        let told = |held: &HeaderValue, asked: &HeaderName| {
            let is_named = self.reflects && self.credentials && held == "*";
            request.get(asked).filter(|_| is_named).unwrap_or(held).clone()
        };
        if headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, told(&self.methods, &ACCESS_CONTROL_REQUEST_METHOD));
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, told(&self.headers, &ACCESS_CONTROL_REQUEST_HEADERS));
            headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from(self.max_age.as_secs()));
        }
    }
}

fn fits(held: &str, origin: &str) -> bool {
    match held.split_once("*.") {
        Some((scheme, rest)) => {
            let host = origin.strip_prefix(scheme).and_then(|host| host.strip_suffix(rest)?.strip_suffix('.'));
            host.is_some_and(|label| !label.is_empty() && !label.contains(['.', '/']))
        }
        None => held == origin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_equal_or_one_label_in_front() {
        for (held, origin, expected) in [
            ("https://a.example", "https://a.example", true),
            ("https://a.example", "http://a.example", false),
            ("https://*.a.example", "https://x.a.example", true),
            ("https://*.a.example", "https://a.example", false),
            ("https://*.a.example", "https://y.x.a.example", false),
            ("https://*.a.example", "https://evil.example/.a.example", false),
            ("https://*.a.example:8443", "https://x.a.example:8443", true),
        ] {
            assert_eq!(fits(held, origin), expected, "{held} {origin}");
        }
    }

    #[test]
    fn an_origin_that_may_not_hears_nothing() {
        let cors = Cors { origins: vec!["https://a.example".into()], ..Cors::default() };
        let mut headers = HeaderMap::new();
        let from = |origin| HeaderMap::from_iter([(ORIGIN, HeaderValue::from_static(origin))]);
        cors.preflight(&from("https://b.example"), &mut headers);
        assert!(headers.is_empty());
        cors.preflight(&from("https://a.example"), &mut headers);
        assert_eq!(
            (headers.len(), &headers["access-control-allow-origin"]),
            (6, &HeaderValue::from_static("https://a.example"))
        );
    }
}
