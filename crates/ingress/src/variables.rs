//! Texts with nginx's variables in them, such as `https://$host/login?rd=$escaped_request_uri`.

use std::fmt::{Display, Formatter, Write as _};
use std::net::IpAddr;

use http::HeaderName;

use crate::route::{Ask, cookie, query_value};

/// What of a request a variable stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Variable {
    /// `$remote_addr`
    Client,
    /// `$request_uri`: path and query as they came.
    RequestUri,
    /// `$escaped_request_uri`: the same, to be put into a query.
    EscapedRequestUri,
    /// `$uri`: the path.
    Path,
    /// `$args`
    Query,
    /// `$host`: without its port.
    Host,
    /// `$http_host`: as the client says it.
    Authority,
    /// `$scheme`
    Scheme,
    /// `$request_method`
    Method,
    /// `$req_id`
    RequestId,
    /// `$http_NAME`
    Header(HeaderName),
    /// `$cookie_NAME`
    Cookie(Box<str>),
    /// `$arg_NAME`
    Argument(Box<str>),
}

impl Variable {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "remote_addr" | "binary_remote_addr" | "the_real_ip" => Variable::Client,
            "request_uri" => Variable::RequestUri,
            "escaped_request_uri" => Variable::EscapedRequestUri,
            "uri" | "document_uri" => Variable::Path,
            "args" | "query_string" => Variable::Query,
            "host" | "server_name" => Variable::Host,
            "http_host" | "best_http_host" => Variable::Authority,
            "scheme" | "pass_access_scheme" => Variable::Scheme,
            "request_method" => Variable::Method,
            "req_id" | "request_id" => Variable::RequestId,
            _ => {
                if let Some(header) = name.strip_prefix("http_") {
                    Variable::Header(HeaderName::from_bytes(header.replace('_', "-").as_bytes()).ok()?)
                } else if let Some(cookie) = name.strip_prefix("cookie_").filter(|name| !name.is_empty()) {
                    Variable::Cookie(cookie.into())
                } else {
                    Variable::Argument(name.strip_prefix("arg_").filter(|name| !name.is_empty())?.into())
                }
            }
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Variable { name: Box<str>, means: Variable },
}

/// A text whose variables are filled in for each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Box<[Part]>);

/// What variables are filled in from.
pub struct Facts<'a> {
    pub ask: Ask<'a>,
    /// The host as the client says it, with its port.
    pub authority: &'a str,
    pub client: IpAddr,
    pub is_secure: bool,
}

impl Template {
    /// Reads `text`, in which `$name` and `${name}` are variables.
    ///
    /// # Errors
    /// Says which variable is not known.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            if at > 0 {
                parts.push(Part::Text(rest[..at].into()));
            }
            let after = &rest[at + 1..];
            let (name, left) = match after.strip_prefix('{') {
                Some(inner) => inner.split_once('}').ok_or("has a ${ without its }")?,
                None => {
                    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
                    after.split_at(after.find(|c: char| !is_part(c)).unwrap_or(after.len()))
                }
            };
            let means = Variable::named(name).ok_or_else(|| format!("has the variable ${name}, which is not known"))?;
            parts.push(Part::Variable { name: name.into(), means });
            rest = left;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.into()));
        }
        Ok(Template(parts.into()))
    }

    /// The text itself, if it is the same for every request.
    pub fn constant(&self) -> Option<&str> {
        match &self.0[..] {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    pub fn fill(&self, facts: &Facts<'_>) -> String {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Variable { means, .. } => facts.put(means, &mut out),
            }
        }
        out
    }
}

impl Display for Template {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Variable { name, .. } => write!(f, "${{{name}}}"),
        })
    }
}

impl Facts<'_> {
    pub fn scheme(&self) -> &'static str {
        if self.is_secure { "https" } else { "http" }
    }

    /// Path and query as they came.
    pub fn request_uri(&self) -> String {
        match self.ask.query {
            "" => self.ask.path.to_owned(),
            query => format!("{}?{query}", self.ask.path),
        }
    }

    fn put(&self, variable: &Variable, out: &mut String) {
        let header = |name: &str| self.ask.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match variable {
            // Writing to a String cannot fail.
            Variable::Client => drop(write!(out, "{}", self.client)),
            Variable::RequestUri => out.push_str(&self.request_uri()),
            Variable::EscapedRequestUri => out.push_str(&escaped(&self.request_uri())),
            Variable::Path => out.push_str(self.ask.path),
            Variable::Query => out.push_str(self.ask.query),
            Variable::Host => out.push_str(self.ask.host),
            Variable::Authority => out.push_str(self.authority),
            Variable::Scheme => out.push_str(self.scheme()),
            Variable::Method => out.push_str(self.ask.method.as_str()),
            Variable::RequestId => out.push_str(header("x-request-id")),
            Variable::Header(name) => out.push_str(header(name.as_str())),
            Variable::Cookie(name) => out.push_str(cookie(self.ask.headers, name).unwrap_or_default()),
            Variable::Argument(name) => out.push_str(query_value(self.ask.query, name).unwrap_or_default()),
        }
    }
}

/// A text as a value of a query (RFC 3986 2.3).
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            // Writing to a String cannot fail.
            _ => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, Method};

    use super::*;

    #[test]
    fn variables_are_filled_in_and_unknown_ones_told_of() {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", HeaderValue::from_static("ann"));
        headers.insert("cookie", HeaderValue::from_static("a=1; b=2"));
        let ask = Ask { host: "shop.example", path: "/a", query: "x=1&y=2", method: &Method::PUT, headers: &headers };
        let client = IpAddr::from([192, 0, 2, 1]);
        let facts = Facts { ask, authority: "shop.example:8080", client, is_secure: true };
        for (text, wanted) in [
            ("plain", "plain"),
            ("", ""),
            ("$request_uri$host", "/a?x=1&y=2shop.example"),
            ("${request_uri}-text", "/a?x=1&y=2-text"),
            ("$scheme://$http_host/?rd=$escaped_request_uri", "https://shop.example:8080/?rd=%2Fa%3Fx%3D1%26y%3D2"),
            ("$http_x_user/$cookie_b/$arg_y/$arg_z/$uri/$args", "ann/2/2///a/x=1&y=2"),
            ("$remote_addr $request_method", "192.0.2.1 PUT"),
        ] {
            let template = Template::parse(text).expect("known variables");
            assert_eq!(template.fill(&facts), wanted, "{text}");
            assert_eq!(Template::parse(&template.to_string()).as_ref(), Ok(&template), "{text}");
        }
        for text in ["$", "$nothing", "${host", "a$-b", "$arg_", "$cookie_"] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }
}
