//! Names of hosts: what a rule may say, and what a client asked for.

use std::fmt::{Display, Formatter};
use std::net::IpAddr;
use std::sync::Arc;

/// The hosts that a rule is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// In lower case.
    Exact(Arc<str>),
    /// `*.example.com`, here without `*.`: exactly one label in front (Ingress).
    OneLabel(Arc<str>),
    /// `*.example.com`, here without `*.`: one or more labels in front (Gateway).
    Suffix(Arc<str>),
    Any,
}

impl HostPattern {
    /// Reads the host of an Ingress rule.
    ///
    /// # Errors
    /// Says what a host may be.
    pub fn of_ingress(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("*.");
        let held = name.unwrap_or(text);
        match () {
            () if text.is_empty() => return Ok(HostPattern::Any),
            () if text == "*" => return Err("is \"*\"; leave it out to mean every host".to_owned()),
            () if text.parse::<IpAddr>().is_ok() => return Err(format!("is the address {text}; write a DNS name")),
            () if held.contains(':') => return Err(format!("is {text:?}; a host has no port")),
            () => {}
        }
        if let Some(problem) = api::names::dns_subdomain(held).first() {
            return Err(format!("is {text:?}: {problem}"));
        }
        let held = Arc::from(held);
        Ok(if name.is_some() { HostPattern::OneLabel(held) } else { HostPattern::Exact(held) })
    }

    /// Reads the host of a Gateway's listener or of a route: as an Ingress has it, but a wildcard is one or more labels.
    ///
    /// # Errors
    /// Says what a host may be.
    pub fn of_gateway(text: &str) -> Result<Self, String> {
        Ok(match HostPattern::of_ingress(text)? {
            HostPattern::OneLabel(rest) => HostPattern::Suffix(rest),
            other => other,
        })
    }
}

impl Display for HostPattern {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            HostPattern::Exact(name) => f.write_str(name),
            HostPattern::OneLabel(name) | HostPattern::Suffix(name) => write!(f, "*.{name}"),
            HostPattern::Any => f.write_str("*"),
        }
    }
}

/// The host of an authority, without port and the dot that makes a name absolute. `None` if it is no host at all.
pub fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let end = rest.find(']')?;
            let address = &rest[..end];
            address.parse::<std::net::Ipv6Addr>().ok()?;
            (&authority[..end + 2], &rest[end + 1..])
        }
        None => match authority.find(':') {
            Some(colon) => authority.split_at(colon),
            None => (authority, ""),
        },
    };
    let is_port = port.is_empty() || port.strip_prefix(':').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'[' | b']' | b':' | b'~' | b'%');
    if !is_port || host.is_empty() || !host.bytes().all(plain) {
        return None;
    }
    Some(host.strip_suffix('.').unwrap_or(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_names_a_host_and_maybe_a_port() {
        for (authority, host) in [
            ("shop.example", Some("shop.example")),
            ("shop.example.:8443", Some("shop.example")),
            ("192.0.2.1:80", Some("192.0.2.1")),
            ("[2001:db8::1]:80", Some("[2001:db8::1]")),
            ("[2001:db8::1]", Some("[2001:db8::1]")),
            ("[nothing]", None),
            ("shop.example:http", None),
            ("shop example", None),
            ("shop.example@evil.example", None),
            ("", None),
            (":80", None),
        ] {
            assert_eq!(host_of(authority), host, "{authority}");
        }
    }
}
