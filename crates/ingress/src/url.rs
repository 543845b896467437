//! URLs that annotations name, with variables in them, and who is behind each.

use std::collections::HashMap;
use std::fmt::{Display, Formatter};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls_pki_types::ServerName;

use crate::crypto;
use crate::gateway::BackendTls;
use crate::upstream::{Upstream, UpstreamKey};
use crate::variables::Template;

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

impl Display for Url {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}{}", if self.is_tls { "https" } else { "http" }, self.authority, self.path)
    }
}

impl Url {
    /// The port of a Service of this cluster, if the URL names one whatever the request.
    pub fn service(&self) -> Option<UpstreamKey> {
        let (host, port) = split_port(self.authority.constant()?, self.is_tls)?;
        UpstreamKey::of_name(host, port)
    }
}

/// Who is behind a URL.
#[derive(Debug, Default)]
pub struct Place {
    /// The port of a Service, if the URL names one: it is asked at its endpoints, as a node need not know the cluster's names.
    pub upstream: Option<Arc<Upstream>>,
    tls: Mutex<HashMap<Box<str>, Arc<BackendTls>>>,
}

impl Place {
    pub fn of(upstream: Option<Arc<Upstream>>) -> Self {
        Place { upstream, tls: Mutex::default() }
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
    use super::*;

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
}
