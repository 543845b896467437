//! Requests that belong to one endpoint: by a cookie that names it, or by a key that all proxies compute alike.

use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::HeaderName;

use crate::route::{Ask, cookie};

/// Which endpoint a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    None,
    /// The one with this number.
    Endpoint(u64),
    /// The one that this key leads to (rendezvous hashing: few keys move when an endpoint comes or goes).
    Key(u64),
}

/// A cookie by which a client stays with an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity {
    pub cookie: Box<str>,
    pub path: Box<str>,
    pub domain: Option<Box<str>>,
    pub max_age: Option<Duration>,
    pub same_site: Option<Box<str>>,
    pub secure: Option<bool>,
}

impl Default for Affinity {
    fn default() -> Self {
        let (cookie, path) = ("INGRESSCOOKIE".into(), "/".into());
        Affinity { cookie, path, domain: None, max_age: None, same_site: None, secure: None }
    }
}

impl Affinity {
    pub fn wish(&self, headers: &http::HeaderMap) -> Wish {
        let held = cookie(headers, &self.cookie).and_then(|value| u64::from_str_radix(value, 16).ok());
        held.map_or(Wish::None, Wish::Endpoint)
    }

    /// The Set-Cookie header that makes a client come back to this endpoint.
    pub fn header(&self, endpoint: u64, is_tls: bool) -> String {
        let mut text = format!("{}={endpoint:016x}; Path={}; HttpOnly", self.cookie, self.path);
        if let Some(domain) = &self.domain {
            text.push_str(&format!("; Domain={domain}"));
        }
        if let Some(age) = self.max_age {
            text.push_str(&format!("; Max-Age={}", age.as_secs()));
        }
        if let Some(same_site) = &self.same_site {
            text.push_str(&format!("; SameSite={same_site}"));
        }
        if self.secure.unwrap_or(is_tls) {
            text.push_str("; Secure");
        }
        text
    }
}

/// What of a request the endpoint depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashBy {
    Client,
    /// Path and query.
    Uri,
    Host,
    Header(HeaderName),
    Cookie(Box<str>),
    Argument(Box<str>),
}

impl HashBy {
    /// Reads an nginx variable.
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.strip_prefix('$')?;
        let name = name.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or(name);
        Some(match name {
            "remote_addr" | "binary_remote_addr" => HashBy::Client,
            "request_uri" | "uri" => HashBy::Uri,
            "host" | "http_host" => HashBy::Host,
            _ => {
                if let Some(header) = name.strip_prefix("http_") {
                    HashBy::Header(HeaderName::from_bytes(header.replace('_', "-").as_bytes()).ok()?)
                } else if let Some(cookie) = name.strip_prefix("cookie_") {
                    HashBy::Cookie(cookie.into())
                } else {
                    HashBy::Argument(name.strip_prefix("arg_")?.into())
                }
            }
        })
    }

    pub fn wish(&self, ask: &Ask<'_>, client: IpAddr) -> Wish {
        let text = |text: &str| Wish::Key(number(text.as_bytes()));
        match self {
            HashBy::Client => text(&client.to_string()),
            HashBy::Uri => text(&format!("{}?{}", ask.path, ask.query)),
            HashBy::Host => text(ask.host),
            HashBy::Header(name) => ask.headers.get(name).map_or(Wish::None, |v| Wish::Key(number(v.as_bytes()))),
            HashBy::Cookie(name) => cookie(ask.headers, name).map_or(Wish::None, text),
            HashBy::Argument(name) => crate::route::query_value(ask.query, name).map_or(Wish::None, text),
        }
    }
}

/// The same on every node and at every start: FNV-1a, mixed.
pub fn number(bytes: &[u8]) -> u64 {
    struct Fnv(u64);
    impl Hasher for Fnv {
        fn finish(&self) -> u64 {
            mix(self.0)
        }

        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    hasher.write(bytes);
    hasher.finish()
}

/// The finalizer of splitmix64.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// An endpoint's number.
pub fn number_of(address: SocketAddr) -> u64 {
    number(address.to_string().as_bytes())
}
