//! Requests that belong to one endpoint: by a cookie that names it, or by a key that all proxies compute alike.

use std::hash::Hasher;
use std::net::SocketAddr;
use std::time::Duration;

use crate::route::cookie;

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

impl Wish {
    /// What a text leads to; none leads everywhere.
    pub fn of(text: &str) -> Self {
        if text.is_empty() { Wish::None } else { Wish::Key(number(text.as_bytes())) }
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
